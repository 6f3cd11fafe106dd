"""`trace_steps.parquet`, or the parts of it, read for the verifier: the records that columns and kept
texts stand for.

The second reader of the format, from the schema alone: a leaf's column is named by its path; null
means absent unless the schema allows null, and `nulls` names fields that are null where it does not;
touched blocks follow from the positions where they are not stored, and the intersection is so many of
the first of them; `line` is a record whose columns would not give it back. Checks nothing.

    steps = ParquetSteps([Path("outputs/mine/trace_steps.parquet")])
    for row, record in steps.records((0, steps.num_records)): ...
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dsatrace.errors import UserError
from dsatrace.schema import STEP_FIELDS, Field

_BATCH_RECORDS = 1 << 9
_INTERSECTION = "prefix.intersection_blocks"


class ParquetSteps:
    """The step records of files, one after the other; a file that cannot be read raises `UserError`."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._groups: list[tuple[Path, int]] = []  # each row group's file, and its index there
        sizes: list[int] = []
        for path in paths:
            with _open(path) as file:
                groups = range(file.metadata.num_row_groups)
                sizes += [file.metadata.row_group(i).num_rows for i in groups]
            self._groups += [(path, i) for i in groups]
        self._starts = [0, *itertools.accumulate(sizes)]
        self.num_bytes = sum(path.stat().st_size for path in paths)

    @property
    def num_records(self) -> int:
        return self._starts[-1]

    def chunks(self, size: int) -> Iterator[tuple[int, int]]:
        """Rows from and to, of whole forwards and about `size` bytes of the file."""
        num_rows = max(size * self.num_records // self.num_bytes, 1)
        start, before = 0, None
        for row, batch in self._batches(0, self.num_records, ["forward_idx"]):
            for i, forward in enumerate(batch.column(0).to_pylist(), row):
                if forward != before and i - start >= num_rows:
                    yield start, i
                    start = i
                before = forward
        if start < self.num_records:
            yield start, self.num_records

    def records(self, chunk: tuple[int, int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row, record)."""
        for row, batch in self._batches(*chunk, None):
            yield from enumerate(_records(batch), row)

    def bytes_of(self, chunk: tuple[int, int]) -> int:
        """The chunk's share of the file."""
        return (chunk[1] - chunk[0]) * self.num_bytes // max(self.num_records, 1)

    def _batches(
        self, start: int, end: int, columns: list[str] | None
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(first row, batch), of the wanted rows alone."""
        first = bisect.bisect_right(self._starts, start) - 1
        row = self._starts[first]
        for path, of_file in itertools.groupby(self._groups[first:], key=lambda group: group[0]):
            groups = [index for _, index in of_file]
            with _open(path) as file:
                try:
                    for batch in file.iter_batches(_BATCH_RECORDS, row_groups=groups, columns=columns):
                        if row >= end:
                            return
                        skipped = max(start - row, 0)
                        if skipped < len(batch):
                            yield row + skipped, batch.slice(skipped, end - row - skipped)
                        row += len(batch)
                except (OSError, pa.ArrowException) as error:
                    raise UserError(f"{path}: cannot read it: {error}; export the run again") from error


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False)  # else an iterator keeps all that it has read
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a whole Parquet file: {error}; export the run again") from error


def _records(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    columns = {name: _values(batch.column(name)) for name in batch.schema.names}
    nothing = [None] * len(batch)
    positions, sizes = (columns.get(name, nothing) for name in ("selected_token_pos", "block_size_tokens"))
    blocks = columns.get("selected_block_ids", nothing)
    columns["selected_block_ids"] = [
        found if chosen is None or not size else (np.unique(np.array(chosen) // size)).tolist()
        for found, chosen, size in zip(blocks, positions, sizes, strict=True)
    ]
    records = []
    for row in range(len(batch)):
        if (text := columns["line"][row]) is not None:
            records.append(json.loads(text))
            continue
        nulls = (columns.get("nulls", nothing)[row] or "").split(",")
        record = _object(STEP_FIELDS, "", columns, row, nulls) or {}
        extra = columns["extra"][row]
        records.append(record | (json.loads(extra) if extra is not None else {}))
    return records


def _object(
    fields: tuple[Field, ...],
    above: str,
    columns: dict[str, list[Any]],
    row: int,
    nulls: Collection[str] = (),
) -> dict[str, Any] | None:
    """The fields that the row has, and the `nulls`; None where it has none."""
    found: dict[str, Any] = {}
    for field in fields:
        path = above + field.name
        if field.keys:
            of_keys = {key: _object(field.children, f"{path}.{key}.", columns, row) for key in field.keys}
            value: Any = {key: inner for key, inner in of_keys.items() if inner is not None} or None
        elif field.children:
            value = _object(field.children, f"{path}.", columns, row)
        elif path == _INTERSECTION:
            count = columns.get("num_prefix_intersection_blocks", columns["line"])[row]
            value = None if count is None else (columns["selected_block_ids"][row] or [])[:count]
        else:
            stored = columns.get(_column(path))
            value = stored[row] if stored is not None else None
            if stored is not None and value is None and field.type.endswith("| null"):
                found[field.name] = None
        if value is not None or field.name in nulls:
            found[field.name] = value
    return found or None


def _column(path: str) -> str:
    """`kv_fetch.hbm.read_ops` -> `kv_fetch_hbm_read_ops`, `prefix.prefix_key` -> `prefix_key`."""
    parent, _, name = path.rpartition(".")
    return name if not parent or name.startswith(f"{parent}_") else f"{parent.replace('.', '_')}_{name}"


def _values(column: pa.Array) -> list[Any]:
    """Python values; a float32 as JSON would have shown it."""
    kind = column.type.value_type if pa.types.is_list(column.type) else column.type
    values: list[Any] = column.to_pylist()
    if not pa.types.is_float32(kind):
        return values
    return [
        [_shown(item) for item in value] if isinstance(value, list) else _shown(value) for value in values
    ]


def _shown(value: float | None) -> float | None:
    return None if value is None else float(str(np.float32(value)))
