"""A step record as flat, typed columns, and back: what `trace_steps.parquet` holds.

One column a leaf of `schema.STEP_FIELDS`, named by its path with underscores:
`layer_id`, `unique_blocks`, `kv_fetch_hbm_bytes_read`, `tokens_per_touched_block_p95`,
`prefix_cache_hit`, `indexer_scan_tokens`. Ints are int64, positions and block ids
list<int32>, floats double, scores float where their text allows. Null means absent, or
null where the schema says so. What can be derived is not stored:

- `selected_block_ids` only where a record has no `selected_token_pos` (they are
  `position // block_size_tokens`);
- `num_prefix_intersection_blocks` stands for the list: that many of the first touched blocks;
- `nulls`: names of fields that are null though the schema's table has no null there: the run's
  selections do not tell them;
- `extra`: keys the schema does not know, as JSON; `line`: the whole record as JSON, only
  where the columns would not give it back byte for byte (see `file.py`).

On the way back objects are filled column by column, from the leaves up. Knows no file.

    batch = to_batch(records, pa.float32())
    to_records(batch, fields=("layer_id", "prefix.intersection_ratio"))
    to_lines(batch)              # as the tracer wrote them, byte for byte
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from dsatrace.schema import OFFLOADED_FETCH, STEP_FIELDS, Field

NULLS, EXTRA, LINE = "nulls", "extra", "line"
POSITIONS, BLOCKS, INTERSECTION = "selected_token_pos", "selected_block_ids", "prefix.intersection_blocks"
BLOCK_SIZE = "block_size_tokens"
_NAMES = {INTERSECTION: "num_prefix_intersection_blocks"}

NOT_REPRESENTABLE = (pa.ArrowException, TypeError, ValueError, OverflowError)
"""Errors of pyarrow for a value that its column's type cannot hold."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A field of the schema: an object with `children`, or a leaf, which is a column."""

    name: str
    path: str  # dotted
    type: pa.DataType | None = None  # None: an object
    is_score: bool = False
    nullable: bool = False  # null is a value, not absence
    children: tuple[Node, ...] = ()

    @functools.cached_property
    def column(self) -> str:
        """`prefix.prefix_key` -> `prefix_key`, `kv_fetch.hbm.read_ops` -> `kv_fetch_hbm_read_ops`."""
        parent, _, name = self.path.rpartition(".")
        return _NAMES.get(self.path) or "_".join(
            [parent.replace(".", "_")] * (bool(parent) and not name.startswith(f"{parent}_")) + [name]
        )


def _node(field: Field, prefix: str = "") -> Node:
    path = prefix + field.name
    if field.keys:
        tiers = (Field(key, "object", "", "", children=field.children) for key in field.keys)
        return Node(field.name, path, children=tuple(_node(tier, f"{path}.") for tier in tiers))
    if field.children:
        return Node(field.name, path, children=tuple(_node(child, f"{path}.") for child in field.children))
    declared, _, null = field.type.partition(" | ")
    if path == INTERSECTION:
        declared = "int"
    return Node(field.name, path, _TYPES[declared], field.unit == "score", nullable=null == "null")


_TYPES = {
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "string": pa.string(),
    "int[]": pa.list_(pa.int32()),
    "float[]": pa.list_(pa.float64()),
}
TREE = tuple(_node(field) for field in STEP_FIELDS)
_KNOWN = frozenset(node.name for node in TREE)


def _leaves(nodes: Sequence[Node]) -> Iterator[Node]:
    for node in nodes:
        yield from _leaves(node.children) if node.children else (node,)


LEAVES = tuple(_leaves(TREE))


OF_TIERS = frozenset(
    leaf.column
    for leaf in LEAVES
    if leaf.path.startswith("kv_fetch.") and leaf.path.rpartition(".")[2] in OFFLOADED_FETCH
)
"""Columns that only runs with tiers fill: the file of another run lacks them."""


def without_tiers(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field for field in schema if field.name not in OF_TIERS])


@functools.cache
def arrow_schema(score_type: pa.DataType) -> pa.Schema:
    """Every column there can be, scores held as `score_type`: float32 or float64."""
    columns = [(leaf.column, _stored_type(leaf, score_type)) for leaf in LEAVES]
    return pa.schema([*columns, *((name, pa.string()) for name in (NULLS, EXTRA, LINE))])


def _stored_type(leaf: Node, score_type: pa.DataType) -> pa.DataType:
    if not leaf.is_score:
        return leaf.type
    return pa.list_(score_type) if pa.types.is_list(leaf.type) else score_type


def to_batch(
    records: Sequence[Mapping[str, Any]], score_type: pa.DataType, wanted: Collection[str] | None = None
) -> pa.RecordBatch:
    """The records' columns, or those `wanted` and `nulls`, `extra` and `line`, which is left empty.

    A value its column cannot hold raises `NOT_REPRESENTABLE`.
    """
    schema = arrow_schema(score_type)
    columns = {
        leaf.column: pa.array(_column_values(records, leaf), schema.field(leaf.column).type)
        for leaf in LEAVES
        if wanted is None or leaf.column in wanted
    }
    columns[NULLS] = pa.array([nulls_of(record) for record in records], pa.string())
    columns[EXTRA] = pa.array([_extra(record) for record in records], pa.string())
    columns[LINE] = pa.nulls(len(records), pa.string())
    schema = pa.schema([schema.field(name) for name in columns])
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)


def _column_values(records: Sequence[Mapping[str, Any]], leaf: Node) -> list[Any]:
    values: list[Any] = list(records)
    for key in leaf.path.split("."):
        values = [value.get(key) if type(value) is dict else None for value in values]
    if leaf.path == INTERSECTION:
        return [None if value is None else len(value) for value in values]
    if leaf.path == BLOCKS:  # derived from the positions, where there are any
        return [
            None if record.get(POSITIONS) is not None else value
            for record, value in zip(records, values, strict=True)
        ]
    return values


def nulls_of(record: Mapping[str, Any]) -> str | None:
    """The column `nulls` of a record, or of a layout of several."""
    return ",".join(node.name for node in TREE if _is_null(node, record)) or None


def _is_null(node: Node, record: Mapping[str, Any]) -> bool:
    return not node.nullable and node.name in record and record[node.name] is None


def _extra(record: Mapping[str, Any]) -> str | None:
    unknown = {key: value for key, value in record.items() if key not in _KNOWN}
    return orjson.dumps(unknown).decode() if unknown else None


def columns_for(fields: Collection[str]) -> list[str]:
    """The columns that give back `fields`; a name the schema does not know raises `ValueError`."""
    if unknown := sorted(set(fields) - set(_paths(TREE))):
        raise ValueError(f"no field {', '.join(unknown)} in a step record; see schema.STEP_FIELDS")
    names = {leaf.column for leaf in _leaves(_chosen(TREE, fields))} | {NULLS, LINE}
    if not names.isdisjoint((BLOCKS, _NAMES[INTERSECTION])):
        names |= {POSITIONS, BLOCKS, BLOCK_SIZE}
    return sorted(names)


def _paths(nodes: Sequence[Node]) -> Iterator[str]:
    for node in nodes:
        yield node.path
        yield from _paths(node.children)


def _chosen(nodes: Sequence[Node], fields: Collection[str]) -> tuple[Node, ...]:
    """The part of the tree that `fields` name."""
    chosen: list[Node] = []
    for node in nodes:
        if node.path in fields:
            chosen.append(node)
        elif children := _chosen(node.children, fields):
            chosen.append(dataclasses.replace(node, children=children))
    return tuple(chosen)


_ABSENT: Any = object()


class _Values(NamedTuple):
    """One value per row; `holes`: some of them are `_ABSENT`."""

    rows: list[Any]
    holes: bool = False


def to_lines(batch: pa.RecordBatch) -> list[bytes]:
    """The batch's records as the tracer writes them, without newlines."""
    option = orjson.OPT_SERIALIZE_NUMPY  # float32 values keep their short text
    return [orjson.dumps(record, option=option) for record in _records(_Columns(batch, keep_float32=True))]


def to_records(batch: pa.RecordBatch, fields: Collection[str] | None = None) -> list[dict[str, Any]]:
    """The batch's records as parsing their lines would give them, without regard to `line`."""
    return _records(_Columns(batch), fields)


def _records(columns: _Columns, fields: Collection[str] | None = None) -> list[dict[str, Any]]:
    nodes = TREE if fields is None else _chosen(TREE, fields)
    whole = {node.name for node in nodes if node in TREE}  # of a part of an object, null is nothing
    nulls = {name: rows for name, rows in columns.nulls().items() if name in whole}
    values = _objects(nodes, columns, nulls) or _Values([_ABSENT] * columns.num_rows, True)
    records = [{} if row is _ABSENT else row for row in values.rows] if values.holes else values.rows
    if fields is None and (extra := columns.plain(EXTRA)) is not None:
        for record, text in zip(records, extra.rows, strict=True):
            if text is not _ABSENT:
                record.update(orjson.loads(text))
    return records


def _objects(
    nodes: Sequence[Node], columns: _Columns, nulls: Mapping[str, Collection[int]] | None = None
) -> _Values | None:
    """One object per row, filled column by column (the fastest way); None if no row has any of the nodes.

    `nulls`: rows in which a field is null, by its name.
    """
    found: dict[str, _Values] = {}
    for node in nodes:
        values = _objects(node.children, columns) if node.children else columns.leaf(node)
        if nulls and node.name in nulls:
            values = values or _Values([_ABSENT] * columns.num_rows, True)
            rows = [None if i in nulls[node.name] else row for i, row in enumerate(values.rows)]
            values = _Values(rows, any(row is _ABSENT for row in rows))
        if values:
            found[node.name] = values
    if not found:
        return None
    objects: list[Any] = [{} for _ in range(columns.num_rows)]
    for name, values in found.items():
        for target, value in zip(objects, values.rows, strict=True):
            if value is not _ABSENT:
                target[name] = value
    if all(values.holes for values in found.values()):
        objects = [target or _ABSENT for target in objects]
        return _Values(objects, any(target is _ABSENT for target in objects))
    return _Values(objects)


class _Columns:
    """A batch's columns as lists of Python values; touched blocks are derived once."""

    def __init__(self, batch: pa.RecordBatch, keep_float32: bool = False) -> None:
        self.num_rows = len(batch)
        self._batch = batch
        self._names = frozenset(batch.schema.names)
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
        """The stored values; None for a column that the file lacks or that holds no value."""
        if name not in self._names:
            return None
        array = self._batch.column(name)
        if array.null_count == 0 or keep_null:
            return _Values(_python_values(array, self._keep_float32))
        if array.null_count == len(array):
            return None
        values = _python_values(array, self._keep_float32)
        return _Values([_ABSENT if value is None else value for value in values], True)

    def nulls(self) -> dict[str, set[int]]:
        """The rows in which a field is null, by its name."""
        found: dict[str, set[int]] = {}
        stored = self.plain(NULLS)
        for i, names in enumerate(stored.rows if stored else ()):
            for name in names.split(",") if names is not _ABSENT else ():
                found.setdefault(name, set()).add(i)
        return found

    def _touched(self) -> list[list[int] | None]:
        """Every record's touched blocks, as stored or derived from its positions."""
        if self._blocks is None:
            names = self._names
            stored = _python_values(self._batch.column(BLOCKS)) if BLOCKS in names else None
            derived = None
            if POSITIONS in names and BLOCK_SIZE in names:
                positions = self._batch.column(POSITIONS)
                if positions.null_count < len(positions):
                    derived = _python_values(derived_blocks(positions, self._batch.column(BLOCK_SIZE)))
            nothing: list[list[int] | None] = [None] * len(self._batch)
            self._blocks = [
                mine if mine is not None else ours
                for mine, ours in zip(stored or nothing, derived or nothing, strict=True)
            ]
        return self._blocks


def _or_none(rows: list[Any]) -> _Values | None:
    num_absent = sum(row is _ABSENT for row in rows)
    return None if num_absent == len(rows) else _Values(rows, num_absent > 0)


def derived_blocks(positions: pa.ListArray, block_sizes: pa.Array) -> pa.ListArray:
    """list<int32>: each record's distinct `position // block size`, ascending; null without positions."""
    values, offsets = positions.values.to_numpy(zero_copy_only=False), positions.offsets.to_numpy()
    values = values[offsets[0] : offsets[-1]]  # a slice holds those of its neighbours too
    sizes = np.maximum(block_sizes.fill_null(1).to_numpy(), 1)
    record = np.repeat(np.arange(len(positions)), np.diff(offsets))
    blocks = values // sizes[record]
    ascends = (np.diff(blocks) >= 0) | (np.diff(record) > 0)
    if not ascends.all():  # kept in score order
        blocks = blocks[np.lexsort((blocks, record))]
    is_new = np.ones(len(blocks), dtype=bool)
    is_new[1:] = (np.diff(blocks) != 0) | (np.diff(record) > 0)
    counts = np.bincount(record[is_new], minlength=len(positions))
    ends = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    flat = pa.array(blocks[is_new].astype(np.int32))
    return pa.ListArray.from_arrays(pa.array(ends), flat, mask=positions.is_null())


def _python_values(array: pa.Array, keep_float32: bool = False) -> list[Any]:
    """The values as parsed JSON; null is None."""
    if pa.types.is_list(array.type):
        offsets, valid = array.offsets.to_numpy(), array.is_valid().to_pylist()
        values = array.values.slice(offsets[0], offsets[-1] - offsets[0])  # not those of a slice's neighbours
        ends = (offsets - offsets[0]).tolist()
        keep_array = keep_float32 and pa.types.is_float32(array.type.value_type)
        flat = values.to_numpy(zero_copy_only=False) if keep_array else _python_values(values)
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
