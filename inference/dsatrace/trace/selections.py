"""What a run's requests selected, one request at a time, as arrays: what a replay reads.

Reads JSON lines and Parquet, in whatever order the records lie, part by part (`selection_parts`). Parquet
is read without a Python object per record. Derives nothing.

    run = RunReader("outputs/mine")
    for request in read_selections(run):
        layer = request.layers[LayerSet(0)]
        layer.ids[layer.ptr[3] : layer.ptr[4]]      # what the layer selected in its 4th recorded step
        layer.array()                               # all its steps, (T, k)
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dsatrace.errors import UserError
from dsatrace.jit import cached_njit
from dsatrace.trace.parquet.file import open_file, read_group
from dsatrace.trace.reader import REQUEST_ID, RunReader
from dsatrace.trace.selection_parts import SelectionPart, Span, is_parquet, selection_parts

_LARGE_BYTES = 1 << 20

_INTS = ("layer_id", "step_idx", "seq_len_current", "forward_idx")
_HEAD = "kv_head"


class LayerSet(NamedTuple):
    """Whose selections they are: a layer's, or those of one of its KV heads."""

    layer_id: int
    kv_head: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class LayerSelections:
    """One layer's T recorded steps, ascending, which selected N ids in all."""

    step_idx: np.ndarray  # (T,) int64; -1: the prompt's last position
    seq_len: np.ndarray  # (T,) int64, positions visible to the query, itself included
    forward_idx: np.ndarray  # (T,) int64
    phase: np.ndarray  # (T,) str
    ids: np.ndarray  # (N,) int32, within a step in the order they were recorded
    ptr: np.ndarray  # (T + 1,) int64: step t selected ids[ptr[t] : ptr[t + 1]]

    def __len__(self) -> int:
        return len(self.step_idx)

    def rows(self) -> list[np.ndarray]:
        """What each step selected: T views of `ids`, of as many ids as it has."""
        return np.split(self.ids, self.ptr[1:-1]) if len(self) else []

    def array(self) -> np.ndarray:
        """(T, k) int32, k the ids of the largest step; a step that has fewer is filled up with -1."""
        sizes = np.diff(self.ptr)
        out = np.full((len(self), int(sizes.max(initial=0))), -1, np.int32)
        out[np.arange(out.shape[1]) < sizes[:, None]] = self.ids
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class RequestSelections:
    """All that was recorded of a request."""

    request_id: str
    num_prompt_tokens: int | None  # None: not asked for, or a kill came before its line in requests.jsonl
    layers: Mapping[LayerSet, LayerSelections]  # by layer and KV head, ascending


def read_selections(
    run: RunReader, parts: Iterable[SelectionPart] | None = None
) -> Iterator[RequestSelections]:
    """The requests of these parts, or of all, in the parts' order. At level blocks ids are touched blocks.

    Holds one part's selections at a time. Raises `UserError` for what cannot be read, and for a record
    without a field that it must have.
    """
    parts = selection_parts(run) if parts is None else parts
    prompts = {line["request_id"]: line["num_prompt_tokens"] for line in run.requests()}
    for part in parts:
        for request in read_part(part):
            yield dataclasses.replace(request, num_prompt_tokens=prompts.get(request.request_id))


def read_part(part: SelectionPart, layer_id: int | None = None) -> Iterator[RequestSelections]:
    """A part's requests, from its step files alone, so without `num_prompt_tokens`; raises the same.

    With `layer_id` that layer alone is read, and a request without it is left out.
    """
    chunks: list[_Chunk] = []
    for span in part.spans:
        read = _parquet_chunks if is_parquet(span.path) else _line_chunks
        chunks.extend(read(span, part.request_ids, part.id_fields, layer_id))
    for index, layers in _grouped(chunks):
        yield RequestSelections(part.request_ids[index], None, layers)


class _Chunk(NamedTuple):
    """R records of some requests, in file order."""

    request: np.ndarray  # (R,) index into the part's request ids
    ints: np.ndarray  # (5, R) int64, of _INTS and _HEAD
    phase: np.ndarray  # (R,) str
    ids: np.ndarray  # int32
    start: np.ndarray  # (R,) int64: record r selected ids[start[r] : stop[r]]
    stop: np.ndarray  # (R,) int64


def _parquet_chunks(
    span: Span, request_ids: Sequence[str], fields: Sequence[str], layer_id: int | None
) -> Iterator[_Chunk]:
    wanted = pa.array(request_ids, pa.string())
    with open_file(span.path) as file:
        for index in range(span.start, span.stop):
            if layer_id is not None and not _may_hold(file, index, layer_id):
                continue
            table = read_group(file, span.path, index, ("request_id", *_INTS, _HEAD, "phase", *fields))
            request = pc.index_in(table["request_id"], wanted).fill_null(-1).to_numpy()
            is_asked = request >= 0
            if layer_id is not None:
                is_asked &= _ints(table, "layer_id", span.path) == layer_id
            rows = np.flatnonzero(is_asked)
            if not len(rows):
                continue
            names = [name for name in fields if name in table.schema.names and not table[name].null_count]
            if not names:
                raise UserError(f"{span.path}: a record without {fields[0]}; see `dsatrace verify`")
            lists = table[names[0]].chunk(0)
            ids, ends = lists.values.to_numpy(), lists.offsets.to_numpy().astype(np.int64)
            start, stop = ends[:-1][rows], ends[1:][rows]
            if len(rows) < len(request):  # do not hold what belongs to others
                ids, start, stop = _copied(ids, start, stop)
            ints = np.stack([_ints(table, field, span.path)[rows] for field in (*_INTS, _HEAD)])
            phases = table["phase"].chunk(0).dictionary_encode()
            phase = np.array(phases.dictionary.to_pylist())[phases.indices.to_numpy()[rows]]
            yield _Chunk(request[rows], ints, phase, ids, start, stop)


def _may_hold(file: pq.ParquetFile, group: int, layer_id: int) -> bool:
    """Whether the row group has records of the layer, as far as its statistics tell."""
    told = file.metadata.row_group(group).column(file.schema.names.index("layer_id")).statistics
    if told is None or not told.has_min_max or told.null_count:
        return True
    return bool(told.min <= layer_id <= told.max)


def _ints(table: pa.Table, field: str, path: Path) -> np.ndarray:
    """(R,) int64; the KV head is 0 where a layer has one set."""
    if field == _HEAD:
        present = _HEAD in table.schema.names
        return table[_HEAD].fill_null(0).to_numpy() if present else np.zeros(len(table), np.int64)
    if table[field].null_count:
        raise UserError(f"{path}: a record without {field}; see `dsatrace verify`")
    values: np.ndarray = table[field].to_numpy()
    return values


_LAYER_ID = re.compile(rb'"layer_id":\s*(\d+)')


def _line_chunks(
    span: Span, request_ids: Sequence[str], fields: Sequence[str], layer_id: int | None
) -> Iterator[_Chunk]:
    """One chunk per record; the lines of other requests and layers are not parsed."""
    wanted: dict[bytes, int | None] = {}  # a request id as a line spells it -> which it is
    places = {name: index for index, name in enumerate(request_ids)}
    with span.path.open("rb") as file:
        file.seek(span.start)
        at = span.start
        while at < span.stop:
            line = file.readline()
            if not line:
                raise UserError(f"{span.path}: ends at byte {at:,}, and had more when it was first read")
            at += len(line)
            raw = found[1] if (found := REQUEST_ID.search(line)) else b"null"
            if raw not in wanted:
                wanted[raw] = places.get(orjson.loads(raw))
            index = wanted[raw]
            if index is not None and layer_id is not None:
                told = _LAYER_ID.search(line)
                index = index if told is None or int(told[1]) == layer_id else None
            if index is not None:
                try:
                    yield _line_chunk(line, index, fields)
                except _NO_RECORD as error:
                    raise UserError(
                        f"{span.path}: a line of request {request_ids[index]} is no whole record: "
                        f"{type(error).__name__} {error}; see `dsatrace verify`"
                    ) from error


_NO_RECORD = (LookupError, StopIteration, TypeError, ValueError, OverflowError)


def _line_chunk(line: bytes, index: int, fields: Sequence[str]) -> _Chunk:
    record: dict[str, Any] = orjson.loads(line)
    chosen = next(record[name] for name in fields if record.get(name) is not None)
    ints = np.array([*([record[field]] for field in _INTS), [record.get(_HEAD, 0)]], np.int64)
    ids = np.array(chosen, np.int32)
    phase = np.array([record["phase"]])
    return _Chunk(np.array([index]), ints, phase, ids, np.zeros(1, np.int64), np.array([len(ids)]))


def _grouped(chunks: list[_Chunk]) -> Iterator[tuple[int, dict[LayerSet, LayerSelections]]]:
    """The records by request, layer, KV head and step."""
    if not chunks:
        return
    request = np.concatenate([chunk.request for chunk in chunks])
    layer, step, seq_len, forward, head = np.concatenate([chunk.ints for chunk in chunks], axis=1)
    phase = np.concatenate([chunk.phase for chunk in chunks])
    sizes = np.concatenate([chunk.stop - chunk.start for chunk in chunks])
    order = np.lexsort((forward, step, head, layer, request))
    ends = np.concatenate([[0], np.cumsum(sizes[order])])
    targets = np.empty_like(sizes)
    targets[order] = ends[:-1]
    ids = np.empty(ends[-1], np.int32)
    row = 0
    chunks.reverse()
    while chunks:  # ids are large, so what is copied goes, and arrow gives its pages back
        chunk = chunks.pop()
        copy_runs(chunk.ids, chunk.start, chunk.stop, targets[row : row + len(chunk.request)], ids)
        row += len(chunk.request)
        if chunk.ids.nbytes >= _LARGE_BYTES:
            del chunk
            pa.default_memory_pool().release_unused()
    request, layer, head, step, seq_len, forward, phase = (
        column[order] for column in (request, layer, head, step, seq_len, forward, phase)
    )
    is_new = (np.diff(request) != 0) | (np.diff(layer) != 0) | (np.diff(head) != 0)
    bounds = [0, *(np.flatnonzero(is_new) + 1).tolist(), len(order)]
    layers: dict[LayerSet, LayerSelections] = {}
    for first, last in itertools.pairwise(bounds):
        layers[LayerSet(int(layer[first]), int(head[first]))] = LayerSelections(
            step_idx=step[first:last],
            seq_len=seq_len[first:last],
            forward_idx=forward[first:last],
            phase=phase[first:last],
            ids=ids[ends[first] : ends[last]],
            ptr=ends[first : last + 1] - ends[first],
        )
        if last == len(order) or request[last] != request[first]:
            yield int(request[first]), layers
            layers = {}


def _copied(
    ids: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Only the ids of these runs, and where those lie then."""
    ends = np.concatenate([[0], np.cumsum(stop - start)])
    out = np.empty(ends[-1], np.int32)
    copy_runs(ids, start, stop, ends[:-1], out)
    return out, ends[:-1], ends[1:]


@cached_njit(nogil=True)
def copy_runs(values, start, stop, at, out):  # type: ignore[no-untyped-def]
    """Copies values[start[r] : stop[r]] to out[at[r] :], for all r."""
    for r in range(len(start)):
        to = at[r]
        for i in range(start[r], stop[r]):
            out[to] = values[i]
            to += 1
