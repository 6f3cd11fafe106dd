"""How local one stream of selections is, without any buffer.

Each class is one idea, made by `of(steps, ordered)` from one stream and added over streams (`Sums`). A
ratio is formed at the end from sums of whole numbers: the share of an overlap is the sum of the
intersections through the sum of the set sizes, not the mean of each step's share, which could not be
added in any order. Where all sets have one size the two are the same.

`ordered` says that ids are positions in time (tokens, compressed entries, blocks); slots and experts are
not, and what asks for positions is None there. Only steps from `num_warm` on are counted; those before
are seen as the past.

    lags = LagOverlap.of(steps) + LagOverlap.of(other_steps)
    lags.share()[0], lags.chance_share()[0]        # overlap with the step before, and that of a random set
    figures = {name: kind.of(steps, ordered) for name, kind in MEASURES.items()}
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from dsatrace.jit import cached_njit
from dsatrace.selection_replay.nulls import CHANCE_UNIT, expected_shared
from dsatrace.selection_replay.steps import Steps
from dsatrace.selection_replay.sums import Sums, histogram_of, shares

MAX_LAG = 64
WINDOWS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class LagOverlap(Sums):
    """|S_t & S_(t - g)|, summed over pairs of steps; element g - 1 of each tuple is of lag g = 1 .. 64."""

    pairs: tuple[int, ...]  # pairs of steps compared
    selected: tuple[int, ...]  # ids of the later steps
    earlier: tuple[int, ...]  # ids of the earlier steps
    shared: tuple[int, ...]  # ids that stand in both
    shifted: tuple[int, ...] | None
    """The same when the earlier set has moved on with the query: by as many ids as have become visible
    since, which is + g at lag g where each step adds one token. It compares distances from the query, not
    positions. None where ids have no order."""
    chance: tuple[int, ...]  # ids that a random set of the later step's size would share, in CHANCE_UNIT

    @classmethod
    def of(cls, steps: Steps, ordered: bool = True) -> LagOverlap:
        sizes = steps.sizes
        pairs = [_pairs(steps, lag) for lag in range(1, min(MAX_LAG + 1, max(steps.num_steps, 1)))]
        longer = (0,) * (MAX_LAG - len(pairs))  # no two steps of the stream lie so far apart
        chance = (
            expected_shared(sizes[later], sizes[earlier], steps.visible[later]) for later, earlier in pairs
        )
        return cls(
            pairs=(*(len(sizes[later]) for later, _ in pairs), *longer),
            selected=(*(int(sizes[later].sum()) for later, _ in pairs), *longer),
            earlier=(*(int(sizes[earlier].sum()) for _, earlier in pairs), *longer),
            shared=_lag_counts(steps, steps.ids, steps.num_ids),
            shifted=_lag_counts(steps, *_distances(steps)) if ordered else None,
            chance=(*chance, *longer),
        )

    def share(self) -> tuple[float | None, ...]:
        """(64,) share of the later step's ids that the earlier one had: r of ESS, the identity at B = k."""
        return shares(self.shared, self.selected)

    def shifted_share(self) -> tuple[float | None, ...] | None:
        return None if self.shifted is None else shares(self.shifted, self.selected)

    def chance_share(self) -> tuple[float | None, ...]:
        """(64,) the share of a random selector: k / N."""
        return shares(self.chance, self.selected, CHANCE_UNIT)

    def jaccard(self) -> tuple[float | None, ...]:
        """(64,) intersections / unions."""
        sums = zip(self.selected, self.earlier, self.shared, strict=True)
        return shares(self.shared, (a + b - both for a, b, both in sums))

    def chance_jaccard(self) -> tuple[float | None, ...]:
        """(64,) of random sets: expected intersections / expected unions."""
        expected = [part * CHANCE_UNIT for part in self.chance]
        both = zip(self.selected, self.earlier, expected, strict=True)
        return tuple(part / (a + b - part) if a + b else None for a, b, part in both)


@dataclasses.dataclass(frozen=True)
class Reuse(Sums):
    """How long ago each selected id was selected before; 1 is the step before."""

    distances: Counter[int]  # steps -> selected ids
    never: int  # selected ids that were not selected before

    @classmethod
    def of(cls, steps: Steps, ordered: bool = True) -> Reuse:
        """Found distances are shorter than the stream, which cuts long ones off: they count as `never`."""
        counts = _gaps(steps)[0]
        distances = {gap: int(counts[gap]) for gap in np.flatnonzero(counts).tolist() if gap}
        return cls(Counter(distances), int(counts[0]))


@dataclasses.dataclass(frozen=True)
class WorkingSets(Sums):
    """Distinct ids in w steps that follow each other, for each w of `WINDOWS`; only whole windows count.

    A window counts where all of its steps do.
    """

    distinct: tuple[Counter[int], ...]  # per w: distinct ids -> windows

    @classmethod
    def of(cls, steps: Steps, ordered: bool = True) -> WorkingSets:
        # An id is new to a window at its n-th step (0-based) if it was not selected in the n steps before.
        recent, size = _gaps(steps)[1][steps.num_warm :], steps.sizes[steps.num_warm :]
        new = size[:, None] - np.cumsum(recent, axis=1)
        found, so_far = [], np.zeros(len(size), np.int64)
        for index in range(min(WINDOWS[-1], len(size))):
            so_far = so_far[: len(size) - index] + new[index:, index]
            if index + 1 in WINDOWS:
                found.append(histogram_of(so_far))
        return cls(tuple(found) + (Counter(),) * (len(WINDOWS) - len(found)))

    def sums(self) -> tuple[int, ...]:
        """Per w: distinct ids, summed over windows."""
        return tuple(sum(value * count for value, count in each.items()) for each in self.distinct)

    def means(self) -> tuple[float | None, ...]:
        """Per w: mean distinct ids of a window."""
        return shares(self.sums(), (each.total() for each in self.distinct))


@dataclasses.dataclass(frozen=True)
class Frequency(Sums):
    """In how many of a stream's steps an id is selected; element x of each tuple: x % of them, rounded down.

    An id that became visible late is held against all counted steps too. Ids never selected are left out.
    """

    ids: tuple[int, ...]  # (101,) ids that were selected in x % of the steps
    selected: tuple[int, ...]  # (101,) how often these ids were selected, together

    @classmethod
    def of(cls, steps: Steps, ordered: bool = True) -> Frequency:
        counts = np.bincount(steps.ids[steps.ptr[steps.num_warm] :])
        counts = counts[counts > 0]
        percent = counts * 100 // max(steps.num_steps - steps.num_warm, 1)
        of_percent = np.zeros(101, np.int64)
        np.add.at(of_percent, percent, counts)
        return cls(_whole(np.bincount(percent, minlength=101)), _whole(of_percent))


@dataclasses.dataclass(frozen=True)
class Ages(Sums):
    """How far behind the newest visible id the selected ones lie, in powers of two."""

    selected: tuple[int, ...] | None
    """(33,) element 0: the newest visible id itself; element b: those 2^(b-1) to 2^b - 1 before it.
    None where ids have no order."""

    @classmethod
    def of(cls, steps: Steps, ordered: bool = True) -> Ages:
        """Raises ValueError where an id was not yet visible."""
        if not ordered:
            return cls(None)
        first = steps.ptr[steps.num_warm]
        ages = np.repeat(steps.visible - 1, steps.sizes)[first:] - steps.ids[first:]
        if ages.min(initial=0) < 0:
            raise ValueError("a step selects an id that it could not see: its ids have no order in time")
        sums = np.concatenate([[0], np.cumsum(np.bincount(ages))])  # element a: ages below a
        edges = np.minimum([0, *(2**bits for bits in range(33))], len(sums) - 1)
        return cls(_whole(np.diff(sums[edges])))


MEASURES: dict[str, Any] = {
    "lags": LagOverlap,
    "reuse": Reuse,
    "working_sets": WorkingSets,
    "frequency": Frequency,
    "ages": Ages,
}
"""All that is measured of one stream, by its name in results; each has `of(steps, ordered)`."""


def _whole(values: np.ndarray) -> tuple[int, ...]:
    return tuple(values.tolist())


def _pairs(steps: Steps, lag: int) -> tuple[slice, slice]:
    """The later and the earlier steps of the counted pairs."""
    first = max(steps.num_warm, lag)
    return slice(first, None), slice(first - lag, max(steps.num_steps - lag, 0))


def _distances(steps: Steps) -> tuple[np.ndarray, int]:
    """Ids counted from the end of what is visible, moved up so that none is negative; and how many."""
    most = int(steps.visible.max(initial=0))
    moved = np.repeat(most - steps.visible, steps.sizes) + steps.ids
    return moved.astype(np.int32), int(moved.max(initial=-1)) + 1


def _lag_counts(steps: Steps, ids: np.ndarray, num_ids: int) -> tuple[int, ...]:
    counts = np.zeros(MAX_LAG, np.int64)
    _count_lags(ids, steps.ptr, num_ids, steps.num_warm, counts)
    return _whole(counts)


def _gaps(steps: Steps) -> tuple[np.ndarray, np.ndarray]:
    counts = np.zeros(steps.num_steps + 1, np.int64)
    recent = np.zeros((steps.num_steps, WINDOWS[-1]), np.int64)
    _count_gaps(steps.ids, steps.ptr, steps.num_ids, steps.num_warm, counts, recent)
    return counts, recent


@cached_njit(nogil=True)
def _count_lags(ids, ptr, num_ids, num_warm, counts):  # type: ignore[no-untyped-def]
    """Adds to counts[g - 1] the ids of counted steps that stood in the step g before.

    Per id it keeps the last 64 steps as bits, and counts all lags of a step at once: bit j of many words
    adds up inside byte lanes, for 255 words before a lane could overflow.
    """
    lanes, one = np.uint64(0x0101010101010101), np.uint64(1)
    history = np.zeros(num_ids, np.uint64)  # bit n: selected n steps before `last`
    last = np.full(num_ids, -MAX_LAG - 1, np.int64)
    before = np.zeros(255, np.uint64)  # bit g - 1: selected g steps before this one
    for step in range(len(ptr) - 1):
        for start in range(ptr[step], ptr[step + 1], 255):
            num = min(255, ptr[step + 1] - start)
            for index in range(num):
                id_ = ids[start + index]
                gap = step - last[id_]
                past = history[id_] << np.uint64(gap - 1) if gap <= MAX_LAG else np.uint64(0)
                before[index] = past
                history[id_] = (past << one) | one
                last[id_] = step
            if step < num_warm:
                continue
            for bit in range(8):
                total = np.uint64(0)
                for index in range(num):
                    total += (before[index] >> np.uint64(bit)) & lanes
                for lane in range(8):
                    counts[lane * 8 + bit] += np.int64((total >> np.uint64(lane * 8)) & np.uint64(255))


@cached_njit(nogil=True)
def _count_gaps(ids, ptr, num_ids, num_warm, counts, recent):  # type: ignore[no-untyped-def]
    """Steps since each id was selected: of counted steps in `counts`, 0 for never; short ones per step.

    recent[t, g], for 0 < g < its width: ids of step t that were last selected g steps before.
    """
    last = np.full(num_ids, -1, np.int64)
    width = recent.shape[1]
    for step in range(len(ptr) - 1):
        for place in range(ptr[step], ptr[step + 1]):
            id_ = ids[place]
            gap = step - last[id_] if last[id_] >= 0 else 0
            last[id_] = step
            if step >= num_warm:
                counts[gap] += 1
            if 0 < gap < width:
                recent[step, gap] += 1
