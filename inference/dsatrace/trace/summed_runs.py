"""The sum of some runs' summaries, and a file of it that adds to the files of the other runs.

A summary.json holds shares and means, which do not add; this file holds the whole numbers behind them,
and a digest of them. A list of runs is cut into N shards of neighbours; the shards' sums, added, give
the summary of all runs, bit for bit.

    write_shard(path, summed, Shard(0, 2, names))
    record, num_runs = merge_shards([Path("0.json"), Path("1.json")])      # of summary.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.files import read_json, write_atomically
from dsatrace.trace.histogram import ExactSum, Histogram, ValueCounts
from dsatrace.trace.kind import SelectionKind
from dsatrace.trace.overlap import OverlapTotals, RecallTotals
from dsatrace.trace.request_totals import RequestTotals
from dsatrace.trace.summary import BlocksAtSize, Summary
from dsatrace.trace.unfinished import Share, Shares

SHARD_VERSION = 2
_FIELDS = (
    *("selections", "sections", "counts", "dropped_steps", "dense", "ratios", "step_us", "blocks_at"),
    *("recall", "recall_past", "requests", "fetch", "sparse_active", "scan_bytes", "shares"),
    *("prefix_cache_cold_starts", "_running", "_hot"),
)
"""Of a `Summary`, all that `merge` adds, beside its overlaps and the kind of its selections."""
_OVERLAPS = ("step", "layer")
_COUNTED = (ValueCounts, ExactSum, BlocksAtSize, OverlapTotals, RecallTotals, RequestTotals, Share, Shares)
_CLASSES: dict[str, type] = {kind.__name__: kind for kind in _COUNTED}
"""Stored attribute by attribute; nothing else is made from a file."""


@dataclasses.dataclass(frozen=True)
class SummedRuns:
    """Runs that were added up."""

    summary: Summary
    is_complete: bool  # every run ended by itself
    kind: Mapping[str, Any]  # what runs that add up must share

    def to_json(self) -> dict[str, Any]:
        """The record of summary.json."""
        return self.summary.to_json("complete" if self.is_complete else "incomplete")


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which runs of a list they are."""

    index: int
    count: int
    names: Sequence[str]  # of all runs of the list

    def of(self, runs: Sequence[Any]) -> Sequence[Any]:
        """Neighbours in the list, so that shards in their order give its order."""
        first, end = (len(runs) * i // self.count for i in (self.index, self.index + 1))
        return runs[first:end]


def write_shard(path: Path, summed: SummedRuns, shard: Shard) -> None:
    summary = summed.summary
    sums = {
        "selection": summary.kind and summary.kind.to_json(),
        **{name: _stored(getattr(summary, name)) for name in _FIELDS},
        **{f"{name}_overlap": _stored(getattr(summary.overlap, name)) for name in _OVERLAPS},
    }
    record = {
        "summary_shard": SHARD_VERSION,
        **dataclasses.asdict(shard),
        "is_complete": summed.is_complete,
        "kind": summed.kind,
        "sums": sums,
    }
    write_atomically(path, json.dumps({"sha256": _digest(record), **record}, separators=(",", ":")).encode())


def merge_shards(paths: Sequence[Path]) -> tuple[dict[str, Any], int]:
    """The record of summary.json of all runs, and how many they are.

    Raises `UserError` for a file that is no shard or is damaged, for shards of two lists, and for a list
    of which a shard is missing or given twice.
    """
    first, *others = sorted(((path, *_read_shard(path)) for path in paths), key=lambda one: one[1].index)
    (first_path, shard, total), complete = first, first[2].is_complete
    for path, other, summed in others:
        if (other.count, other.names) != (shard.count, shard.names):
            raise UserError(f"{path}: is a shard of other runs than {first_path}; merge those of one list")
        require_alike(str(path), summed.kind, str(first_path), total.kind)
    found = [other.index for _, other, _ in (first, *others)]
    for index in range(shard.count):
        if dataclasses.replace(shard, index=index).of(shard.names) and found.count(index) != 1:
            times = "is missing" if index not in found else f"is given {found.count(index)} times"
            raise UserError(f"shard {index}/{shard.count} of the runs {times}; name each shard's file once")
    for _, _, summed in others:
        total.summary.merge(summed.summary)
        complete = complete and summed.is_complete
    return dataclasses.replace(total, is_complete=complete).to_json(), len(shard.names)


def require_alike(name: str, kind: Mapping[str, Any], first_name: str, first: Mapping[str, Any]) -> None:
    """A sum of runs means something only where blocks, k, the source of the selections and such agree."""
    for what, found in kind.items():
        if found != first[what]:
            raise UserError(
                f"{name}: {what} {found}, but {first[what]} in {first_name}; summarize them apart, the sum "
                "would say nothing"
            )


def _read_shard(path: Path) -> tuple[Shard, SummedRuns]:
    record = read_json(path, broken="; summarize the shard again")
    if not isinstance(record, dict) or record.get("summary_shard") != SHARD_VERSION:
        raise UserError(f"{path}: no shard of this version's; make it by `dsatrace summarize --shard I/N`")
    if record.pop("sha256", None) != _digest(record):
        raise UserError(f"{path}: damaged: its digest is another; summarize the shard again")
    sums = record["sums"]
    sizes = tuple(one["fields"]["block_size"] for one in sums["blocks_at"])
    kind = None if sums["selection"] is None else SelectionKind.of(sums["selection"])
    summary = Summary(sizes, kind=kind)
    for name in _FIELDS:
        setattr(summary, name, _made(sums[name]))
    for name in _OVERLAPS:
        setattr(summary.overlap, name, _made(sums[f"{name}_overlap"]))
    shard = Shard(record["index"], record["count"], record["names"])
    return shard, SummedRuns(summary, record["is_complete"], record["kind"])


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _stored(value: Any) -> Any:
    """As JSON that `_made` turns back; types that JSON has no word for are named."""
    name = type(value).__name__
    told: dict[str, Any]
    if isinstance(value, list):
        return [_stored(one) for one in value]
    if isinstance(value, Histogram):
        told = value.to_json()
    elif isinstance(value, np.ndarray):
        told = {"values": value.tolist()}
    elif isinstance(value, dict):
        told = {"items": [[_stored(key), _stored(one)] for key, one in value.items()]}
    elif isinstance(value, tuple):
        told = {"items": [_stored(one) for one in value]}
    elif name in _CLASSES:
        told = {"fields": {field: _stored(one) for field, one in vars(value).items()}}
    else:
        return value.item() if isinstance(value, np.generic) else value
    return {"type": name, **told}


def _made(stored: Any) -> Any:
    if isinstance(stored, list):
        return [_made(one) for one in stored]
    if not isinstance(stored, dict):
        return stored
    name = stored["type"]
    if "items" in stored:
        items = _made(stored["items"])
        return tuple(items) if name == "tuple" else {"dict": dict, "Counter": Counter}[name](dict(items))
    if "fields" in stored:
        made: Any = object.__new__(_CLASSES[name])
        vars(made).update({field: _made(one) for field, one in stored["fields"].items()})
        return made
    if name == "ndarray":
        return np.array(stored["values"], np.int64)
    histogram = Histogram()
    histogram.add_json(stored)
    return histogram
