"""Which tier served an offloaded layer's units, and what that moved: per row of a forward, and in sum.

Pure accounting over arrays; knows no tensor and no store. Tiers are numbered in the order of
`schema.TIER_NAMES`: 0 is HBM, T is their number.

    units, first = first_touches(unit_of_token, scratch)    # which units, and who touches each first
    fetch = layer_fetch(unit_of, tier_of_unit, scratch, after - before, num_fetched=3, unit_bytes=18432, ...)
    StepFetches.of([fetch, ...], rows=[0, 2], top_k=2048)   # a forward's layers, its recorded rows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np

from dsatrace.schema import TIER_NAMES

NUM_TIERS = len(TIER_NAMES)
HBM, LOCAL, REMOTE = range(NUM_TIERS)


@dataclasses.dataclass(frozen=True)
class TierCounts:
    """What the tiers have counted so far; every array is (T,). Subtract two to get a batch's counts."""

    read_ops: np.ndarray  # int64
    evicted_units: np.ndarray  # int64
    written_units: np.ndarray  # int64, into the tier
    errors: np.ndarray  # int64, batches that failed and units that came back corrupt
    latency_us: np.ndarray  # float64

    def __sub__(self, earlier: TierCounts) -> TierCounts:
        names = [field.name for field in dataclasses.fields(self)]
        return TierCounts(*(getattr(self, name) - getattr(earlier, name) for name in names))


@dataclasses.dataclass(frozen=True)
class LayerFetch:
    """What was moved into HBM for R rows' selections in one layer; fields as in `StepFetches`."""

    served_by: np.ndarray  # (R, K)
    bytes_read: np.ndarray  # (R, T)
    bytes_useful: np.ndarray  # (R, T)
    read_ops: np.ndarray  # (R, T)
    evicted_units: np.ndarray  # (R, T)
    bytes_written: np.ndarray  # (R, T)
    errors: np.ndarray  # (R, T)
    latency_us: np.ndarray  # (T,)


@dataclasses.dataclass(frozen=True)
class StepFetches:
    """Which tiers held what one forward's recorded rows selected: L layers, B rows, K positions, T tiers.

    A unit fetched for several rows is charged to the first of them; the counts of a layer's batch are
    shared out in whole numbers. Sums over the rows are what was really moved.
    """

    served_by: np.ndarray  # (L, B, K) int8, the tier that held each position; -1 for padding
    bytes_read: np.ndarray  # (L, B, T) int64, units x unit bytes; 0 for HBM, whose reads are derived
    bytes_useful: np.ndarray  # (L, B, T) int64, those of selected tokens; 0 for HBM
    read_ops: np.ndarray  # (L, B, T) int64, as the store counts them, after coalescing; 0 for HBM
    evicted_units: np.ndarray  # (L, B, T) int64, given up by the tier
    bytes_written: np.ndarray  # (L, B, T) int64, into the tier
    errors: np.ndarray  # (L, B, T) int64, batches that failed and units that came back corrupt
    latency_us: np.ndarray  # (L, T) float64, of the layer's batch, which all its rows wait for

    @classmethod
    def of(cls, layers: Sequence[LayerFetch], rows: Sequence[int], top_k: int) -> StepFetches:
        """From a forward's layers in order; `rows` are those that are recorded, K becomes `top_k`."""
        kept = list(rows)
        names = {field.name for field in dataclasses.fields(cls)} - {"served_by", "latency_us"}
        stacked = {name: np.stack([getattr(layer, name)[kept] for layer in layers]) for name in names}
        served_by = np.full((len(layers), len(kept), top_k), -1, dtype=np.int8)
        for layer, padded in zip(layers, served_by, strict=True):
            padded[:, : layer.served_by.shape[1]] = layer.served_by[kept]
        return cls(served_by, **stacked, latency_us=np.stack([layer.latency_us for layer in layers]))


def first_touches(units: np.ndarray, scratch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct `units (M,)`, ascending, and the index of each one's first occurrence.

    `scratch` is an int64 array with an element per unit id, of any content. This takes linear time,
    where `np.unique` sorts all M with their indices.
    """
    order = np.arange(len(units))
    scratch[units[::-1]] = order[::-1]  # of equal indices, the last assignment stays: the first touch
    distinct = np.sort(units[scratch[units] == order])
    return distinct, scratch[distinct]


def layer_fetch(
    unit_of: np.ndarray,
    tier_of_unit: np.ndarray,
    scratch: np.ndarray,
    moved: TierCounts | None,
    *,
    num_fetched: int,
    unit_bytes: int,
    token_bytes: int,
) -> LayerFetch:
    """From the rows' units `unit_of (R, K)`, padded by -1, and the tier that served each unit.

    `tier_of_unit` and `scratch` have an element per unit id. A row is charged for the fetched units that
    no earlier row touches, and for its share of the batch that fetched `num_fetched` units: of the
    counts `moved`. If `moved` is None, there was no batch and nothing is charged.
    """
    num_rows = len(unit_of)
    is_unit = unit_of >= 0
    served_by = np.where(is_unit, tier_of_unit[np.where(is_unit, unit_of, 0)], np.int8(-1)).astype(np.int8)
    if moved is None:
        nothing = np.zeros((num_rows, NUM_TIERS), dtype=np.int64)
        return LayerFetch(served_by, *(nothing,) * 6, latency_us=np.zeros(NUM_TIERS))
    row, column = np.nonzero(served_by > HBM)
    unit, tier = unit_of[row, column], served_by[row, column].astype(np.int64)
    units, first = first_touches(unit, scratch)
    owner = row[scratch[unit]]  # the row that touches it first

    def by_row_and_tier(touches: np.ndarray) -> np.ndarray:
        counts = np.bincount(row[touches] * NUM_TIERS + tier[touches], minlength=num_rows * NUM_TIERS)
        return counts.reshape(num_rows, NUM_TIERS)

    charged, useful = by_row_and_tier(first), by_row_and_tier(np.flatnonzero(owner == row))
    share = partial(share_out, weights=charged.sum(1), rest=num_fetched - len(units))
    return LayerFetch(
        served_by=served_by,
        bytes_read=charged * unit_bytes,
        bytes_useful=useful * token_bytes,
        read_ops=share(moved.read_ops),
        evicted_units=share(moved.evicted_units),
        bytes_written=share(moved.written_units) * unit_bytes,
        errors=share(moved.errors),
        latency_us=moved.latency_us,
    )


def share_out(totals: np.ndarray, weights: np.ndarray, rest: int = 0) -> np.ndarray:
    """Shares `(R, T)` of `totals (T,)` in whole numbers, in proportion to `weights (R,)`.

    `rest` is the weight of all others. If it is 0, the shares add up to the totals.
    """
    ends = np.concatenate([[0], np.cumsum(weights)])
    whole = int(ends[-1]) + rest
    if whole == 0:
        return np.zeros((len(weights), len(totals)), dtype=np.int64)
    return np.diff(ends[:, None] * totals[None, :] // whole, axis=0)


@dataclasses.dataclass
class FetchCounters:
    """What one layer has done since its cache was made. A unit counts once however many rows want it.

    `fetched_units == missed_units + refetched_units + refilled_units + prefetched_units`. A decode
    step refetches nothing.
    """

    requested_units: int = 0
    missed_units: int = 0  # not in HBM when the step selected them
    refetched_units: int = 0  # again, because a prefill chunk selects more than HBM holds
    refilled_units: int = 0  # because a token was written to a unit that had been evicted
    prefetched_units: int = 0  # by a guess, before the step selected
    used_units: int = 0  # of those, the ones the step then selected
    fetched_units: int = 0
    evicted_units: int = 0
    written_units: int = 0  # of those, the dirty ones

    @property
    def hit_units(self) -> int:
        return self.requested_units - self.missed_units

    def __add__(self, other: FetchCounters) -> FetchCounters:
        names = [field.name for field in dataclasses.fields(self)]
        return FetchCounters(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def __sub__(self, earlier: FetchCounters) -> FetchCounters:
        names = [field.name for field in dataclasses.fields(self)]
        return FetchCounters(**{name: getattr(self, name) - getattr(earlier, name) for name in names})
