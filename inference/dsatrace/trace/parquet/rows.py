"""Columns of `trace_steps.parquet` back as records and lines: `columns.py` the other way.

Objects are filled column by column, from the leaves up; block ids are derived from the
positions where they are not stored. Knows no file.

    to_records(batch, fields=("layer_id", "prefix.intersection_ratio"))
    to_lines(batch)              # as the tracer wrote them, byte for byte
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from dsatrace.trace.parquet.columns import (
    BLOCK_SIZE,
    BLOCKS,
    EXTRA,
    INTERSECTION,
    POSITIONS,
    TREE,
    Node,
    chosen_nodes,
)

_ABSENT: Any = object()


class _Values(NamedTuple):
    """One value a row; `holes`: some of them are `_ABSENT`."""

    rows: list[Any]
    holes: bool = False


def to_lines(batch: pa.RecordBatch) -> list[bytes]:
    """The batch's records as the tracer writes them, without newlines."""
    option = orjson.OPT_SERIALIZE_NUMPY  # a float32 has a text of its own
    return [orjson.dumps(record, option=option) for record in _records(_Columns(batch, keep_float32=True))]


def to_records(batch: pa.RecordBatch, fields: Collection[str] | None = None) -> list[dict[str, Any]]:
    """The batch's records as parsing their lines would give them; `line` is the caller's to look at."""
    return _records(_Columns(batch), fields)


def _records(columns: _Columns, fields: Collection[str] | None = None) -> list[dict[str, Any]]:
    values = _objects(chosen_nodes(TREE, fields), columns) or _Values([_ABSENT] * columns.num_rows, True)
    records = [{} if row is _ABSENT else row for row in values.rows] if values.holes else values.rows
    if fields is None and (extra := columns.plain(EXTRA)) is not None:
        for record, text in zip(records, extra.rows, strict=True):
            if text is not _ABSENT:
                record.update(orjson.loads(text))
    return records


def _objects(nodes: Sequence[Node], columns: _Columns) -> _Values | None:
    """One object a row, filled column by column (the quickest way); None when no row has any of it."""
    found = {
        node.name: values
        for node in nodes
        if (values := _objects(node.children, columns) if node.children else columns.leaf(node))
    }
    if not found:
        return None
    objects: list[Any] = [{} for _ in range(columns.num_rows)]
    for name, values in found.items():
        if values.holes:
            for target, value in zip(objects, values.rows, strict=True):
                if value is not _ABSENT:
                    target[name] = value
        else:
            for target, value in zip(objects, values.rows, strict=True):
                target[name] = value
    if all(values.holes for values in found.values()):
        objects = [target or _ABSENT for target in objects]
        return _Values(objects, any(target is _ABSENT for target in objects))
    return _Values(objects)


class _Columns:
    """A batch's columns as lists of Python values; the touched blocks are derived once."""

    def __init__(self, batch: pa.RecordBatch, keep_float32: bool = False) -> None:
        self.num_rows = len(batch)
        self._batch = batch
        self._keep_float32 = keep_float32  # as numpy values, rather than as JSON's doubles
        self._blocks: list[Any] | None = None

    def leaf(self, node: Node) -> _Values | None:
        if node.path == BLOCKS:
            return _or_none([_ABSENT if blocks is None else blocks for blocks in self._touched()])
        values = self.plain(node.column, keep_null=node.nullable)
        if node.path != INTERSECTION or values is None:
            return values
        return _or_none(
            [
                _ABSENT if count is _ABSENT else (blocks or [])[:count]
                for count, blocks in zip(values.rows, self._touched(), strict=True)
            ]
        )

    def plain(self, name: str, keep_null: bool = False) -> _Values | None:
        """The stored values; None for a column that the file lacks or that is all absent."""
        if name not in self._batch.schema.names:
            return None
        array = self._batch.column(name)
        if array.null_count == 0 or keep_null:
            return _Values(_python_values(array, self._keep_float32))
        if array.null_count == len(array):
            return None
        values = _python_values(array, self._keep_float32)
        return _Values([_ABSENT if value is None else value for value in values], True)

    def _touched(self) -> list[list[int] | None]:
        """Touched blocks of every record: stored, or derived from its positions."""
        if self._blocks is None:
            names = self._batch.schema.names
            stored = _python_values(self._batch.column(BLOCKS)) if BLOCKS in names else None
            derived = None
            if POSITIONS in names and BLOCK_SIZE in names:
                derived = _derive_blocks(self._batch.column(POSITIONS), self._batch.column(BLOCK_SIZE))
            nothing: list[list[int] | None] = [None] * len(self._batch)
            self._blocks = [
                mine if mine is not None else ours
                for mine, ours in zip(stored or nothing, derived or nothing, strict=True)
            ]
        return self._blocks


def _or_none(rows: list[Any]) -> _Values | None:
    num_absent = sum(row is _ABSENT for row in rows)
    return None if num_absent == len(rows) else _Values(rows, num_absent > 0)


def _derive_blocks(positions: pa.ListArray, block_sizes: pa.Array) -> list[list[int] | None] | None:
    """`position // block size`, each once, ascending; None for a record without positions."""
    if positions.null_count == len(positions):
        return None
    values, offsets = _list_parts(positions)
    sizes = np.maximum(block_sizes.fill_null(1).to_numpy(), 1)
    record = np.repeat(np.arange(len(positions)), np.diff(offsets))
    blocks = values // sizes[record]
    ascends = (np.diff(blocks) >= 0) | (np.diff(record) > 0)
    if not ascends.all():  # kept in score order
        blocks = blocks[np.lexsort((blocks, record))]
    is_new = np.ones(len(blocks), dtype=bool)
    is_new[1:] = (np.diff(blocks) != 0) | (np.diff(record) > 0)
    blocks, counts = blocks[is_new], np.bincount(record[is_new], minlength=len(positions))
    flat, ends = blocks.tolist(), [0, *np.cumsum(counts).tolist()]
    valid = positions.is_valid().to_pylist()
    return [flat[ends[i] : ends[i + 1]] if valid[i] else None for i in range(len(positions))]


def _list_parts(array: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Values (N,) and offsets (rows + 1,) into them; a null row is an empty one."""
    return array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()


def _python_values(array: pa.Array, keep_float32: bool = False) -> list[Any]:
    """What JSON would have given; null is None."""
    if pa.types.is_list(array.type):
        ends, valid = array.offsets.to_pylist(), array.is_valid().to_pylist()
        keep_array = keep_float32 and pa.types.is_float32(array.type.value_type)
        flat = array.values.to_numpy(zero_copy_only=False) if keep_array else _python_values(array.values)
        return [flat[ends[i] : ends[i + 1]] if valid[i] else None for i in range(len(array))]
    if pa.types.is_float32(array.type):
        return _float32_values(array, keep_float32)
    if pa.types.is_string(array.type) and len(array):
        encoded = array.dictionary_encode()
        words = [*encoded.dictionary.to_pylist(), None]
        return [words[i] for i in encoded.indices.fill_null(len(words) - 1).to_pylist()]
    if array.null_count or not len(array):
        return list(array.to_pylist())
    return list(array.to_numpy(zero_copy_only=False).tolist())


def _float32_values(array: pa.Array, keep_float32: bool) -> list[Any]:
    numbers = array.to_numpy(zero_copy_only=False)  # NaN where null: JSON has no other NaN
    if keep_float32:
        return [
            number if valid else None
            for number, valid in zip(numbers, array.is_valid().to_pylist(), strict=True)
        ]
    # A float32's shortest text, read as a double: what a reader of the line sees.
    return list(orjson.loads(orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)))
