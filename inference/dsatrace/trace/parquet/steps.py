"""A derived step as the columns of `columns.py`, straight from its arrays: no text, no object per record.

Takes the layout that JSON lines are written from, so that a field is told once. Knows no file.

    batch = step_batch(step)             # pa.RecordBatch of step.num_records rows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dsatrace.trace.json_lines import Choice, Layout, Optional, Runs
from dsatrace.trace.parquet.columns import BLOCKS, INTERSECTION, POSITIONS, TREE, Node, arrow_schema, nulls_of
from dsatrace.trace.records import StepRecords, record_layout

SCHEMA = arrow_schema(pa.float32())


def step_batch(step: StepRecords) -> pa.RecordBatch:
    """The step's records; holds copies, so the step's arrays may be reused."""
    return layout_batch(record_layout(step), step.num_records)


def layout_batch(layout: Layout, num_records: int) -> pa.RecordBatch:
    """The records of a layout whose fields the schema knows."""
    if unknown := set(layout) - {node.name for node in TREE}:
        raise ValueError(f"the schema knows no field {', '.join(sorted(unknown))}; add it to STEP_FIELDS")
    hidden = {BLOCKS} if layout.get(POSITIONS) is not None else set()
    values = [*_leaf_values(TREE, layout, hidden), nulls_of(layout), None, None]
    columns = [
        pa.nulls(num_records, field.type) if value is None else _column(value, field.type, num_records)
        for value, field in zip(values, SCHEMA, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _leaf_values(nodes: Sequence[Node], layout: Layout, hidden: set[str]) -> Iterator[Any]:
    """What the layout says of each leaf, in the order of the columns; None: nothing."""
    for node in nodes:
        value = layout.get(node.name)
        if node.children:
            yield from _leaf_values(node.children, _inner(value, node), hidden)
        elif isinstance(value, Runs) and node.path == INTERSECTION:
            yield value.stop - value.start
        else:
            yield None if node.path in hidden else value


def _inner(value: Any, node: Node) -> Layout:
    """An object's layout; where its records choose among objects, each of its fields does."""
    if not isinstance(value, Choice | Optional):
        return value or {}
    return {
        child.name: Optional([one and one.get(child.name) for one in value.values], value.which)
        for child in node.children
    }


def _column(value: Any, type_: pa.DataType, num_records: int) -> pa.Array:
    if isinstance(value, Runs):
        return _lists(value, type_)
    if isinstance(value, Choice | Optional):
        return pa.array(value.values, type_).take(pa.array(value.which))
    if isinstance(value, np.ndarray):
        return pa.array(value, type_, from_pandas=True)  # nan is null
    assert not isinstance(value, Mapping)
    return pa.repeat(pa.scalar(value, type_), num_records)


def _lists(runs: Runs, type_: pa.DataType) -> pa.Array:
    start, stop = runs.start, runs.stop
    if not np.array_equal(start[1:], stop[:-1]):
        raise ValueError("lists that do not lie one behind the other")
    offsets = np.append(start, stop[-1:]) - start[0]
    values = np.array(runs.values[start[0] : stop[-1]])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, type_.value_type), type_)
