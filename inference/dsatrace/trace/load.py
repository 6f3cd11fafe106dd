"""A run in Python: its requests and records as data frames, its selections and touched blocks as arrays.

Works on every run that a reader can read: JSON lines, Parquet, laid out for replay, killed, still running,
of any door. Nothing is read before it is asked for, and what grows with the run comes in batches too.

    run = dsatrace.load("outputs/mine")
    run.records.to_pandas(("layer_id", "unique_blocks")).groupby("layer_id").mean()
    run.selections("p0", layer=3).array()           # (steps, k) int32
    for request in run.block_ids(16): ...           # touched blocks, request by request
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from dsatrace.errors import UserError
from dsatrace.schema import REQUEST_FIELDS, STEPS_FILE
from dsatrace.trace.frame import Frame
from dsatrace.trace.kind import SelectionKind
from dsatrace.trace.manifest import selection_kind
from dsatrace.trace.parquet.columns import (
    BLOCK_SIZE,
    BLOCKS,
    EXTRA,
    LINE,
    NOT_REPRESENTABLE,
    NULLS,
    POSITIONS,
    arrow_schema,
    derived_blocks,
    to_batch,
)
from dsatrace.trace.parquet.file import BATCH_RECORDS, read_batches
from dsatrace.trace.reader import RunReader
from dsatrace.trace.selection_parts import SelectionPart, selection_parts
from dsatrace.trace.selections import (
    LayerSelections,
    LayerSet,
    RequestSelections,
    read_part,
    read_selections,
)

_STORED = arrow_schema(pa.float32())
RECORD_SCHEMA = pa.schema([field for field in _STORED if field.name not in (NULLS, LINE)])
"""Of `Run.records`, the same for every run. Scores are float32."""
_REQUEST_TYPES = {
    "int": pa.int64(), "float": pa.float64(), "string": pa.string(), "int[]": pa.list_(pa.int64())
}  # fmt: skip
_LABEL = "labels_"


def load(folder: str | Path) -> Run:
    """The run in this folder or at this URL. Raises `UserError` if there is none."""
    return Run(folder)


class Run:
    """One run's folder. What cannot be read, or is not in the run, raises `UserError` naming it.

    `reader` gives the records as dicts, the summary, and what a kill cut short.
    """

    def __init__(self, folder: str | Path) -> None:
        self.reader = RunReader(folder)

    @property
    def folder(self) -> Path:
        return self.reader.folder

    @property
    def manifest(self) -> dict[str, Any]:
        """As `docs/records.md` has it."""
        return self.reader.manifest

    @functools.cached_property
    def kind(self) -> SelectionKind | None:
        """What an id of this run is; None where no model ran."""
        return selection_kind(self.manifest)

    @property
    def requests(self) -> Frame:
        """A row per line of requests.jsonl, a column per field of it: null where a line has none.

        Labels have columns of their own, `labels_<name>`; keys that no field has stand in `extra`, as JSON.
        """
        lines = list(self.reader.requests())
        labels = {f"{_LABEL}{name}": name for line in lines for name in line.get("labels", {})}
        fields = [(field.name, field.type.partition(" | ")[0]) for field in REQUEST_FIELDS]
        schema = pa.schema(
            [
                *((name, _REQUEST_TYPES[type_]) for name, type_ in fields if name != "labels"),
                *((column, pa.string()) for column in labels),
                (EXTRA, pa.string()),
            ]
        )
        known = {name for name, _ in fields}
        rows = [_request_row(line, known) for line in lines]

        def read(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
            chosen = pa.schema([schema.field(name) for name in columns])
            yield pa.RecordBatch.from_pylist(rows, chosen)

        return Frame(schema, read)

    @property
    def records(self) -> Frame:
        """A row per step record, in the order of the files; a column per field, `_` for the dots.

        The columns are the same for every run: null where the run or the record does not tell.
        """
        return Frame(RECORD_SCHEMA, self._record_batches)

    def _record_batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        wanted = {*columns} | ({POSITIONS, BLOCK_SIZE} if BLOCKS in columns else set())
        batches = self._parquet_batches(wanted) if self.reader.is_parquet else self._line_batches(wanted)
        for batch in batches:
            arrays = [_column(batch, name) for name in columns]
            yield pa.RecordBatch.from_arrays(
                arrays, schema=pa.schema([RECORD_SCHEMA.field(name) for name in columns])
            )

    def _parquet_batches(self, wanted: set[str]) -> Iterator[pa.RecordBatch]:
        for path in self.reader.step_paths:
            yield from read_batches(path, sorted(wanted))

    def _line_batches(self, wanted: set[str]) -> Iterator[pa.RecordBatch]:
        records, first = list[dict[str, Any]](), 1
        for _, record in self.reader.lines(STEPS_FILE):
            records.append(record)
            if len(records) == BATCH_RECORDS:
                yield self._of_lines(records, first, wanted)
                records, first = [], first + len(records)
        if records:
            yield self._of_lines(records, first, wanted)

    def _of_lines(self, records: list[dict[str, Any]], first: int, wanted: set[str]) -> pa.RecordBatch:
        try:
            return to_batch(records, pa.float32(), wanted)
        except NOT_REPRESENTABLE as error:
            for number, record in enumerate(records, first):
                try:
                    to_batch([record], pa.float32(), wanted)
                except NOT_REPRESENTABLE as cause:
                    place = f"{self.folder / STEPS_FILE}: line {number}"
                    raise UserError(f"{place}: {cause}; see `dsatrace verify`") from error
            raise

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of the requests that have records, in the order of the first ones."""
        return tuple(self._parts)

    @functools.cached_property
    def _parts(self) -> dict[str, SelectionPart]:
        """Where each request's selections lie."""
        return {name: part for part in selection_parts(self.reader, 1) for name in part.request_ids}

    def _part(self, request_id: str) -> SelectionPart:
        if (part := self._parts.get(request_id)) is None:
            raise UserError(
                f"{self.folder}: no request {request_id!r} with records; it has {_some(self.request_ids)}"
            )
        return part

    def selections(self, request_id: str, layer: int, kv_head: int = 0) -> LayerSelections:
        """What a layer, or one KV head of it, selected in the T recorded steps of a request.

        `array()` gives (T, k) ids filled up with -1, `rows()` the T arrays, `step_idx` and `seq_len` (T,)
        whose steps they are. Ids are of the run's unit, at level blocks touched blocks. Of Parquet only
        the row groups that can hold the layer are read, of JSON lines only its records are parsed.
        """
        found = next(read_part(self._part(request_id), layer), None)
        chosen = None if found is None else found.layers.get(LayerSet(layer, kv_head))
        if chosen is None:
            heads = [] if found is None else [head for _, head in found.layers]
            raise UserError(
                f"{self.folder}: request {request_id!r}: no selections of layer {layer}, KV head {kv_head}"
                + (f"; its KV heads are {heads[0]} to {heads[-1]}" if heads else "")
            )
        return chosen

    def request_selections(self, request_id: str) -> RequestSelections:
        """All layers of one request."""
        return next(read_selections(self.reader, [self._part(request_id)]))

    def all_selections(self) -> Iterator[RequestSelections]:
        """Request by request, all layers; holds some requests at a time, at least one."""
        return read_selections(self.reader)

    def block_ids(self, size: int) -> Iterator[RequestSelections]:
        """The same, but `ids` are the blocks of `size` tokens that each step touched, ascending.

        Raises `UserError` for ids that say nothing of positions, and, of a run at level blocks, for a size
        that is no multiple of its own.
        """
        if size < 1:
            raise UserError(f"block size {size}: use at least 1")
        id_tokens = self._tokens_per_id(size)
        return (
            dataclasses.replace(
                request,
                layers={
                    name: touched_blocks(layer, id_tokens, size) for name, layer in request.layers.items()
                },
            )
            for request in self.all_selections()
        )

    def _tokens_per_id(self, size: int) -> int:
        trace = self.manifest["trace"]
        if self.kind is None or not self.kind.holds(BLOCKS):
            ids = "there are none" if self.kind is None else f"{self.kind.unit}, {self.kind.id_kind}"
            raise UserError(f"{self.folder}: its ids ({ids}) are no positions, so it touched no known blocks")
        if trace["level"] != "blocks":
            return self.kind.unit_tokens
        own: int = trace["block_size_tokens"]
        if size % own:
            raise UserError(
                f"{self.folder}: block size {size}: it recorded blocks of {own} tokens; use a multiple"
            )
        return own

    def __repr__(self) -> str:
        return f"<Run {self.folder}, {self.reader.state}>"


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A record's field; touched blocks are derived where the file leaves that to the reader."""
    type_ = RECORD_SCHEMA.field(name).type
    stored = batch.column(name) if name in batch.schema.names else pa.nulls(len(batch), type_)
    if name == BLOCKS and POSITIONS in batch.schema.names:
        stored = pc.coalesce(stored, derived_blocks(batch.column(POSITIONS), batch.column(BLOCK_SIZE)))
    return stored if stored.type == type_ else stored.cast(type_)


def _request_row(line: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    row = {**line, **{f"{_LABEL}{name}": f"{value}" for name, value in line.get("labels", {}).items()}}
    unknown = {name: value for name, value in line.items() if name not in known}
    return row | {EXTRA: orjson.dumps(unknown).decode() if unknown else None}


def touched_blocks(layer: LayerSelections, id_tokens: int, size: int) -> LayerSelections:
    """Each step's distinct blocks of `size` tokens; an id covers `id_tokens`, as far as the query sees."""
    row = np.repeat(np.arange(len(layer)), np.diff(layer.ptr))
    start = layer.ids.astype(np.int64) * id_tokens
    stop = np.minimum(start + id_tokens, layer.seq_len[row])
    first = start // size
    counts = (stop - 1) // size - first + 1
    ends = np.cumsum(counts)
    blocks = np.repeat(first - (ends - counts), counts) + np.arange(counts.sum())
    most = int(blocks.max(initial=0)) + 1
    touched = np.unique(np.repeat(row, counts) * most + blocks)
    sizes = np.bincount(touched // most, minlength=len(layer))
    ptr = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    return dataclasses.replace(layer, ids=(touched % most).astype(np.int32), ptr=ptr)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "none"
