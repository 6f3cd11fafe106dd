"""What an offloaded layer asked for, found in HBM and moved: by request for one step, in sum for a run.

Pure accounting over arrays; knows no tensor and no store.

    selected = SelectedUnits.of(slots, request_of_row, num_requests=2, unit_tokens=16)
    fetch = layer_fetch(3, selected, missed=~residency.is_resident(selected.units))
    counters += FetchCounters(requested_units=int(fetch.requested_units.sum()))
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class SelectedUnits:
    """The units that one step of one layer selects, for R requests; all int64.

    Touch t is one request's use of one unit; touches are ordered by request, then unit.
    """

    num_requests: int
    request: np.ndarray  # (T,) of each touch
    unit: np.ndarray  # (T,)
    tokens: np.ndarray  # (T,) distinct tokens the request selects in the unit
    new_tokens: np.ndarray  # (T,) of those, the ones that no earlier request selects
    units: np.ndarray  # (U,) distinct, ascending
    first_touch: np.ndarray  # (U,) by the first request that selects it

    @classmethod
    def of(
        cls, slots: np.ndarray, request_of_row: np.ndarray, num_requests: int, unit_tokens: int
    ) -> SelectedUnits:
        """From `slots (N, K)` (unit * unit_tokens + offset; -1: none) and each row's request `(N,)`."""
        is_slot = slots >= 0
        width = int(slots.max(initial=0)) + 1
        pairs = np.unique((slots + request_of_row[:, None] * width)[is_slot])
        request, token = np.divmod(pairs, width)
        unit = token // unit_tokens
        is_new = np.zeros(len(token), dtype=np.int64)
        is_new[np.unique(token, return_index=True)[1]] = 1
        starts = np.flatnonzero(np.diff(request, prepend=-1) | np.diff(unit, prepend=-1))
        units, first_touch = np.unique(unit[starts], return_index=True)
        return cls(
            num_requests=num_requests,
            request=request[starts],
            unit=unit[starts],
            tokens=np.diff(starts, append=len(token)),
            new_tokens=np.add.reduceat(is_new, starts) if len(starts) else starts,
            units=units,
            first_touch=first_touch,
        )

    def per_request(self, values: np.ndarray) -> np.ndarray:
        """Sums `values (T,)` over each request's touches: (R,) int64."""
        return np.bincount(self.request, weights=values, minlength=self.num_requests).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class LayerFetch:
    """One layer's reads in one step; every array is (R,) int64, a request each.

    `requested == hit + missed`, for units and tokens alike, as things stood before the step
    read anything. Requests that miss the same unit each count it as missed; it is fetched
    once, and charged to the first of them: `charged_units` and `charged_tokens` add up to
    what a single batch fetches, and to the tokens in it that anybody selected.
    """

    layer_id: int
    requested_units: np.ndarray
    requested_tokens: np.ndarray
    missed_units: np.ndarray
    missed_tokens: np.ndarray
    charged_units: np.ndarray
    charged_tokens: np.ndarray
    num_units: int  # distinct, of all requests
    num_missed: int

    @property
    def hit_units(self) -> np.ndarray:
        return self.requested_units - self.missed_units

    @property
    def hit_tokens(self) -> np.ndarray:
        return self.requested_tokens - self.missed_tokens


def layer_fetch(layer_id: int, selected: SelectedUnits, missed: np.ndarray) -> LayerFetch:
    """`missed (U,)`: which of `selected.units` were not in HBM."""
    touch_missed = missed[np.searchsorted(selected.units, selected.unit)]
    is_first = np.zeros(len(selected.unit), dtype=bool)
    is_first[selected.first_touch] = True
    return LayerFetch(
        layer_id=layer_id,
        requested_units=selected.per_request(np.ones(len(selected.unit))),
        requested_tokens=selected.per_request(selected.tokens),
        missed_units=selected.per_request(touch_missed),
        missed_tokens=selected.per_request(selected.tokens * touch_missed),
        charged_units=selected.per_request(touch_missed & is_first),
        charged_tokens=selected.per_request(selected.new_tokens * touch_missed),
        num_units=len(selected.units),
        num_missed=int(missed.sum()),
    )


@dataclasses.dataclass(frozen=True)
class StepFetches:
    """Where one forward's recorded rows found what they selected: L layers, B rows, K positions, T tiers.

    Tiers stand in the order of `schema.TIER_NAMES`. A unit fetched for several rows is charged to
    the first of them, and what a layer's batch did is shared out in whole numbers: sums over the
    rows are what really moved.
    """

    served_by: np.ndarray  # (L, B, K) int8, the tier that held each position; -1 where there is none
    bytes_read: np.ndarray  # (L, B, T) int64, units x unit bytes; 0 for HBM, whose reads are derived
    bytes_useful: np.ndarray  # (L, B, T) int64, of those the selected tokens' own; 0 for HBM
    read_ops: np.ndarray  # (L, B, T) int64, the store's own after coalescing; 0 for HBM
    evicted_units: np.ndarray  # (L, B, T) int64, given up by the tier
    bytes_written: np.ndarray  # (L, B, T) int64, into the tier
    errors: np.ndarray  # (L, B, T) int64, batches that failed and units that came back corrupt
    latency_us: np.ndarray  # (L, T) float64, of the layer's batch: all its rows wait for it together


@dataclasses.dataclass
class FetchCounters:
    """Everything one layer did since its cache was made. Distinct units, whoever asked for them.

    `fetched_units == missed_units + refetched_units + refilled_units`, and each is `unit_bytes`
    of `bytes_read`. A step of decode refetches nothing.
    """

    requested_units: int = 0
    missed_units: int = 0  # not in HBM when the step selected them
    refetched_units: int = 0  # again, because a prefill chunk selects more than HBM holds
    refilled_units: int = 0  # because a token was written to a unit that had been evicted
    fetched_units: int = 0
    bytes_read: int = 0
    bytes_useful: int = 0  # of the missed units, the selected tokens' own
    read_batches: int = 0
    read_ops: int = 0  # runs of adjacent unit ids
    read_us: float = 0.0
    evicted_units: int = 0
    written_units: int = 0  # of those, the dirty ones
    bytes_written: int = 0
    write_batches: int = 0
    write_us: float = 0.0

    @property
    def hit_units(self) -> int:
        return self.requested_units - self.missed_units

    def __add__(self, other: FetchCounters) -> FetchCounters:
        names = [field.name for field in dataclasses.fields(self)]
        return FetchCounters(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def __sub__(self, earlier: FetchCounters) -> FetchCounters:
        names = [field.name for field in dataclasses.fields(self)]
        return FetchCounters(**{name: getattr(self, name) - getattr(earlier, name) for name in names})


def num_runs(units: np.ndarray) -> int:
    """Runs of adjacent ids among the distinct `units (N,)`."""
    return int((np.diff(np.sort(units)) != 1).sum()) + 1 if len(units) else 0
