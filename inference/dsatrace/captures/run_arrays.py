"""The selections of a run as arrays (rows, layers, k) int32, and as files that `dsatrace import` reads.

    written = export_arrays(RunReader("outputs/mine"), Path("outputs/mine_npy"))
    written.num_rows

A request is one `.npy` file of its rows from the first recorded one to the last; -1 stands where a set
holds fewer ids, and a row that was not recorded is all zeros, as engines have it. `capture.json` beside
them is the `--describe` file that gives the run back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.captures.description import layers_text
from dsatrace.errors import UserError
from dsatrace.files import write_json
from dsatrace.text import for_file_name, plain
from dsatrace.trace.export import new_folder
from dsatrace.trace.kind import SelectionKind
from dsatrace.trace.manifest import selection_kind
from dsatrace.trace.reader import RunReader
from dsatrace.trace.selections import RequestSelections, read_selections

_CHUNK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Written:
    """What an export wrote."""

    num_requests: int
    num_rows: int
    num_bytes: int


def kind_of(run: RunReader) -> SelectionKind:
    """Raises `UserError` for a run whose records hold no ids."""
    kind = selection_kind(run.manifest)
    if kind is None or not len(kind.set_layers):
        raise UserError(f"{run.folder}: its manifest does not say what was selected; record it anew")
    if run.manifest["trace"]["level"] != "full":
        raise UserError(f"{run.folder}: its records hold no ids; record with --trace-level full")
    return kind


def recorded_rows(request: RequestSelections, kind: SelectionKind) -> Iterator[tuple[int, np.ndarray]]:
    """Stretches of consecutive rows: the first's position, and (R, S, K) int32. Raises `UserError` for a
    request whose records are not of this kind."""
    layers = list(request.layers.values())
    seq_len, width = layers[0].seq_len, kind.max_width
    num_sets = len(kind.set_layers)
    if len(layers) != num_sets or any(len(one.seq_len) != len(seq_len) for one in layers):
        raise UserError(f"request {plain(request.request_id)}: layers are missing; see `dsatrace verify`")
    size = max(_CHUNK_BYTES // (4 * num_sets * width), 1)
    bounds = np.flatnonzero(np.diff(seq_len) != 1) + 1
    for stretch in np.split(np.arange(len(seq_len)), bounds):
        for at in range(0, len(stretch), size):
            rows = stretch[at : at + size]
            ids = np.full((len(rows), num_sets, width), -1, dtype=np.int32)
            for s, layer in enumerate(layers):
                for r, row in enumerate(rows.tolist()):
                    held = layer.ids[layer.ptr[row] : layer.ptr[row + 1]]
                    if len(held) > width:
                        raise UserError(
                            f"request {plain(request.request_id)}: a record of {len(held)} ids, and top-k is "
                            f"{width}; see `dsatrace verify`"
                        )
                    ids[r, s, : len(held)] = held
            yield int(seq_len[rows[0]]) - 1, ids


def export_arrays(
    run: RunReader, out: Path, progress: Callable[[int], None] = lambda num_rows: None
) -> Written:
    """Fills `out`, a folder that is new or empty. Raises `UserError`, and leaves nothing behind."""
    kind = kind_of(run)
    layers, heads = _layers(run, kind)
    requests: dict[str, dict[str, int]] = {}
    num_rows = num_bytes = 0
    try:
        with new_folder(out) as folder:
            for request in read_selections(run):
                name = f"{len(requests):06d}_{for_file_name(request.request_id)}"
                first, rows, size = _write(folder / f"{name}.npy", request, kind, heads, progress)
                requests[name] = {"start": first, "prompt_tokens": request.num_prompt_tokens or max(first, 1)}
                num_rows, num_bytes = num_rows + rows, num_bytes + size
            if not requests:
                raise UserError(f"{run.folder}: holds no step records; nothing to export")
            write_json(folder / "capture.json", _described(run, kind, layers, heads, requests))
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot export there: {error.strerror}") from error
    return Written(len(requests), num_rows, num_bytes)


def _layers(run: RunReader, kind: SelectionKind) -> tuple[list[int], int]:
    """The layers that select, and the sets of each."""
    layers = sorted(set(kind.set_layers.tolist()))
    heads = {kind.layers[layer].heads for layer in layers}
    if len(heads) > 1:
        raise UserError(f"{run.folder}: its layers differ in their KV heads; export it to parquet")
    return layers, heads.pop()


def _write(
    path: Path, request: RequestSelections, kind: SelectionKind, heads: int, progress: Callable[[int], None]
) -> tuple[int, int, int]:
    """The first row's position, rows, and bytes."""
    seq_len = next(iter(request.layers.values())).seq_len
    first, end = int(seq_len[0]) - 1, int(seq_len[-1])
    sets = (len(kind.set_layers) // heads, heads) if heads > 1 else (len(kind.set_layers),)
    shape = end - first, *sets, kind.max_width
    row_bytes = 4 * len(kind.set_layers) * kind.max_width
    with path.open("wb") as file:
        header = {"descr": "<i4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
        for position, ids in recorded_rows(request, kind):
            file.seek(begin + (position - first) * row_bytes)  # what is skipped reads as zeros
            file.write(ids.astype("<i4", copy=False).tobytes())
            progress(len(ids))
        return first, end - first, file.tell()


def _described(
    run: RunReader, kind: SelectionKind, layers: list[int], heads: int, requests: dict[str, dict[str, int]]
) -> dict[str, Any]:
    described: dict[str, Any] = {"layers": layers_text(layers), "unit": kind.unit, "requests": requests}
    if kind.unit_tokens > 1:
        described["unit_tokens"] = kind.unit_tokens
    if kind.num_ids is not None:
        described["experts"] = kind.num_ids
    else:
        described["ids"] = kind.id_kind
    if heads > 1:
        described["heads"] = heads
    model = run.manifest["model_config"].get("name")
    return described | ({"model": plain(model, 200)} if isinstance(model, str) else {})
