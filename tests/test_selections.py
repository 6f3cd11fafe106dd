"""Selections come out of every format as the records hold them, request by request, whatever the parts."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest

from dsatrace.errors import UserError
from dsatrace.schema import STEPS_FILE, STEPS_PARQUET_FILE
from dsatrace.trace.export import export_run
from dsatrace.trace.parquet import file as parquet
from dsatrace.trace.reader import RunReader
from dsatrace.trace.selection_parts import SelectionPart, selection_parts
from dsatrace.trace.selections import LayerSet, read_selections
from helpers.golden_run import write_golden
from helpers.resume_samples import serve

FORMATS = ("jsonl", "parquet")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run in each format, in row groups of 5 records."""
    folder = tmp_path_factory.mktemp("selections")
    write_golden(folder / "jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "GROUP_RECORDS", 5)
        export_run(RunReader(folder / "jsonl"), "parquet", folder / "parquet")
    assert pq.ParquetFile(folder / "parquet" / STEPS_PARQUET_FILE).num_row_groups > 5
    return folder


def plainly(run: RunReader) -> dict[str, dict[int, list[Any]]]:
    """Request -> layer -> (step, length, forward, phase, ids) in ascending order."""
    found: dict[str, dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for record in run.steps():
        row = [record[name] for name in ("step_idx", "seq_len_current", "forward_idx", "phase")]
        found[record["request_id"]][record["layer_id"]].append((*row, record["selected_token_pos"]))
    return {name: {layer: sorted(rows) for layer, rows in layers.items()} for name, layers in found.items()}


def as_read(run: RunReader, parts: list[SelectionPart] | None = None) -> dict[str, dict[int, list[Any]]]:
    found = {}
    for request in read_selections(run, parts):
        assert list(request.layers) == sorted(request.layers)
        assert request.request_id not in found
        found[request.request_id] = {
            layer: [
                (*row, selected.ids[selected.ptr[t] : selected.ptr[t + 1]].tolist())
                for t, row in enumerate(
                    zip(
                        selected.step_idx.tolist(),
                        selected.seq_len.tolist(),
                        selected.forward_idx.tolist(),
                        selected.phase.tolist(),
                        strict=True,
                    )
                )
            ]
            for (layer, _), selected in request.layers.items()
        }
    return found


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("part_bytes", [1, 1 << 11, 1 << 30])
def test_selections_are_the_records(runs: Path, format_: str, part_bytes: int) -> None:
    run = RunReader(runs / format_)
    parts = selection_parts(run, part_bytes)
    assert as_read(run, parts) == plainly(run)
    names = [name for part in parts for name in part.request_ids]
    assert names == list(plainly(run))
    assert sum(part.num_records for part in parts) == len(list(run.steps()))
    if part_bytes == 1:
        assert len(parts) == len(names)
    assert as_read(run, parts[:1]) == {name: plainly(run)[name] for name in parts[0].request_ids}


def test_prompts_are_those_of_the_requests(runs: Path) -> None:
    for format_ in FORMATS:
        run = RunReader(runs / format_)
        expected = {line["request_id"]: line["num_prompt_tokens"] for line in run.requests()}
        assert {r.request_id: r.num_prompt_tokens for r in read_selections(run)} == expected


def test_arrays_have_the_types_of_a_replay(runs: Path) -> None:
    for format_ in FORMATS:
        layer = next(read_selections(RunReader(runs / format_))).layers[LayerSet(0)]
        assert (layer.ids.dtype, layer.ptr.dtype, layer.step_idx.dtype) == (np.int32, np.int64, np.int64)
        assert layer.ids.flags.c_contiguous


def test_a_killed_run_gives_its_whole_lines(tmp_path: Path) -> None:
    folder = serve(tmp_path / "run", stop_at=6)
    steps = folder / STEPS_FILE
    steps.write_bytes(steps.read_bytes()[:-10])
    (folder / "requests.jsonl").write_bytes(b"")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"state": "running", "files": None}))
    run = RunReader(folder)
    assert as_read(run) == plainly(run)
    assert "cut short" in run.torn_lines[STEPS_FILE]
    assert None in {request.num_prompt_tokens for request in read_selections(run)}


def test_a_file_that_has_become_shorter_is_named(tmp_path: Path) -> None:
    run = RunReader(write_golden(tmp_path / "run"))
    parts, steps = selection_parts(run), tmp_path / "run" / STEPS_FILE
    steps.write_bytes(b"".join(steps.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=f"{STEPS_FILE}: ends at byte"):
        list(read_selections(run, parts))


def test_records_kept_as_text_are_read(runs: Path, tmp_path: Path) -> None:
    lines = (runs / "jsonl" / STEPS_FILE).read_bytes().splitlines()
    first = orjson.loads(lines[0])
    lines[0] = orjson.dumps(dict(reversed(first.items())))
    written = parquet.write_parquet(tmp_path / STEPS_PARQUET_FILE, [(x, orjson.loads(x)) for x in lines])
    assert written.num_kept_as_text == 1
    for name in ("manifest.json", "requests.jsonl"):
        (tmp_path / name).write_bytes((runs / "jsonl" / name).read_bytes())
    assert as_read(RunReader(tmp_path)) == plainly(RunReader(runs / "jsonl"))


def test_what_holds_no_selections_is_refused(runs: Path, tmp_path: Path) -> None:
    write_golden(tmp_path / "stats", level="stats")
    with pytest.raises(UserError, match="of level stats, hold no selections; record with --trace-level full"):
        list(read_selections(RunReader(tmp_path / "stats")))
    write_golden(tmp_path / "bad")
    steps = tmp_path / "bad" / STEPS_FILE
    steps.write_bytes(steps.read_bytes().replace(b'"phase"', b'"phrase"', 1))
    with pytest.raises(UserError, match="a line of request r0 is no whole record: KeyError 'phase'"):
        list(read_selections(RunReader(tmp_path / "bad")))
