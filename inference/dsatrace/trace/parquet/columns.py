"""A step record as flat, typed columns: what `trace_steps.parquet` holds.

One column a leaf of `schema.STEP_FIELDS`, named by its path with underscores:
`layer_id`, `unique_blocks`, `kv_fetch_hbm_bytes_read`, `tokens_per_touched_block_p95`,
`prefix_cache_hit`, `indexer_scan_tokens`. Ints are int64, positions and block ids
list<int32>, floats double, scores float where their text allows. Null means absent, or
null where the schema says so. What can be derived is not stored:

- `selected_block_ids` only where a record has no `selected_token_pos` (they are
  `position // block_size_tokens`);
- `num_prefix_intersection_blocks` stands for the list: the first so many touched blocks;
- `extra`: keys the schema does not know, as JSON; `line`: the whole record as JSON, only
  where the columns would not give it back byte for byte (see `file.py`).

`rows.py` goes the other way. Knows no file.

    batch = to_batch(records, pa.float32())
    columns_for(("layer_id", "prefix.intersection_ratio"))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa

from dsatrace.schema import STEP_FIELDS, Field

EXTRA, LINE = "extra", "line"
POSITIONS, BLOCKS, INTERSECTION = "selected_token_pos", "selected_block_ids", "prefix.intersection_blocks"
BLOCK_SIZE = "block_size_tokens"
_NAMES = {INTERSECTION: "num_prefix_intersection_blocks"}

NOT_REPRESENTABLE = (pa.ArrowException, TypeError, ValueError, OverflowError)
"""What pyarrow raises for a value that its column's type cannot hold."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A field of the schema: an object of `children`, or a leaf that is a column."""

    name: str
    path: str  # dotted
    type: pa.DataType | None = None  # None: an object
    is_score: bool = False
    nullable: bool = False  # null is a value, not absence
    children: tuple[Node, ...] = ()

    @property
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


def arrow_schema(score_type: pa.DataType) -> pa.Schema:
    """Every column of the file, scores held as `score_type`: float32 or float64."""
    columns = [(leaf.column, _stored_type(leaf, score_type)) for leaf in LEAVES]
    return pa.schema([*columns, (EXTRA, pa.string()), (LINE, pa.string())])


def _stored_type(leaf: Node, score_type: pa.DataType) -> pa.DataType:
    if not leaf.is_score:
        return leaf.type
    return pa.list_(score_type) if pa.types.is_list(leaf.type) else score_type


def to_batch(records: Sequence[Mapping[str, Any]], score_type: pa.DataType) -> pa.RecordBatch:
    """The records' columns, `line` left empty. A value its column cannot hold raises `NOT_REPRESENTABLE`."""
    schema = arrow_schema(score_type)
    columns = {
        leaf.column: pa.array(_column_values(records, leaf), schema.field(leaf.column).type)
        for leaf in LEAVES
    }
    columns[EXTRA] = pa.array([_extra(record) for record in records], pa.string())
    columns[LINE] = pa.nulls(len(records), pa.string())
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


def _extra(record: Mapping[str, Any]) -> str | None:
    unknown = {key: value for key, value in record.items() if key not in _KNOWN}
    return orjson.dumps(unknown).decode() if unknown else None


def columns_for(fields: Collection[str]) -> list[str]:
    """The columns that give back `fields`; a name the schema does not know raises `ValueError`."""
    wanted = list(_leaves(chosen_nodes(TREE, fields)))
    known = {node.path for node in _all_nodes(TREE)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"no field {', '.join(unknown)} in a step record; see schema.STEP_FIELDS")
    names = {leaf.column for leaf in wanted} | {LINE}
    if not names.isdisjoint((BLOCKS, _NAMES[INTERSECTION])):
        names |= {POSITIONS, BLOCKS, BLOCK_SIZE}
    return sorted(names)


def _all_nodes(nodes: Sequence[Node]) -> Iterator[Node]:
    for node in nodes:
        yield node
        yield from _all_nodes(node.children)


def chosen_nodes(nodes: Sequence[Node], fields: Collection[str] | None) -> tuple[Node, ...]:
    """The part of the tree that `fields` name."""
    if fields is None:
        return tuple(nodes)
    chosen: list[Node] = []
    for node in nodes:
        if node.path in fields:
            chosen.append(node)
        elif children := chosen_nodes(node.children, fields):
            chosen.append(dataclasses.replace(node, children=children))
    return tuple(chosen)
