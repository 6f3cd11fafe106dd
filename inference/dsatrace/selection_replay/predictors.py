"""What a prefetch would have fetched: guesses of a layer's next set, held against the set itself.

Knows ids and no bytes. Every predictor is counted over the same steps: those counted that have a step
before them. A predictor that needs the layer before is None where there is none.

    found = predictions_of(steps, before=steps_of_layer_before)
    found["previous_step"].recall, found["previous_step"].extra
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dsatrace.jit import cached_njit, inner
from dsatrace.selection_replay.nulls import CHANCE_UNIT, expected_shared
from dsatrace.selection_replay.steps import Steps
from dsatrace.selection_replay.sums import Sums

EMA_UNIT = 1 << 20  # a score stays below 8 of it
_ID_BITS, _ID_MASK = 31, (1 << 31) - 1
_BUCKET_BITS = 12 + _ID_BITS  # 2,048 buckets of scores


@dataclasses.dataclass(frozen=True)
class Prediction(Sums):
    """One predictor, summed over steps."""

    steps: int
    selected: int  # ids of the sets that were to be guessed
    predicted: int  # ids guessed
    hits: int  # ids in both
    chance: int  # hits of a random guess of the same size, in CHANCE_UNIT

    @property
    def recall(self) -> float | None:
        """Share of the selected ids that were predicted."""
        return self.hits / self.selected if self.selected else None

    @property
    def chance_recall(self) -> float | None:
        return self.chance * CHANCE_UNIT / self.selected if self.selected else None

    @property
    def precision(self) -> float | None:
        """Share of the predicted ids that were selected."""
        return self.hits / self.predicted if self.predicted else None

    @property
    def extra(self) -> int:
        """Ids fetched in vain."""
        return self.predicted - self.hits


PREDICTORS = {
    "previous_step": "the layer's own set of the step before",
    "previous_layer": "the set of the layer before, in the same step",
    "previous_layer_and_step": "the set of the layer before, in the step before",
    "ema": "as many ids as the step selects, those with the highest moving average of having been selected",
}


def predictions_of(steps: Steps, before: Steps | None = None) -> dict[str, Prediction | None]:
    """All `PREDICTORS` of one layer's stream; `before` is the layer before, step by step the same.

    Raises ValueError where the two have not the same steps.
    """
    if before is not None and (
        before.num_steps != steps.num_steps or not np.array_equal(before.visible, steps.visible)
    ):
        raise ValueError("a layer and the one before it do not choose from the same ids")
    return {
        "previous_step": _from_sets(steps, steps, 1),
        "previous_layer": _from_sets(steps, before, 0) if before else None,
        "previous_layer_and_step": _from_sets(steps, before, 1) if before else None,
        "ema": _from_average(steps),
    }


def _first(steps: Steps) -> int:
    return min(max(steps.num_warm, 1), steps.num_steps)


def _from_sets(steps: Steps, guesses: Steps, lag: int) -> Prediction:
    """The guess for a step is another stream's set `lag` steps before."""
    first = _first(steps)
    num_ids = max(steps.num_ids, guesses.num_ids)
    hits = _count_hits(steps.ids, steps.ptr, guesses.ids, guesses.ptr, lag, first, num_ids)
    return _prediction(steps, guesses.sizes[first - lag : steps.num_steps - lag], hits)


def _from_average(steps: Steps) -> Prediction:
    predicted = np.zeros(steps.num_steps, np.int64)
    hits = _count_average(steps.ids, steps.ptr, steps.num_ids, _first(steps), predicted)
    return _prediction(steps, predicted[_first(steps) :], hits)


def _prediction(steps: Steps, predicted: np.ndarray, hits: int) -> Prediction:
    first = _first(steps)
    sizes = steps.sizes[first:]
    chance = expected_shared(sizes, predicted, steps.visible[first:])
    return Prediction(len(sizes), int(sizes.sum()), int(predicted.sum()), int(hits), chance)


@cached_njit(nogil=True)
def _count_hits(ids, ptr, guessed, guessed_ptr, lag, first, num_ids):  # type: ignore[no-untyped-def]
    marked = np.full(num_ids, -1, np.int64)
    hits = 0
    for step in range(first, len(ptr) - 1):
        for place in range(guessed_ptr[step - lag], guessed_ptr[step - lag + 1]):
            marked[guessed[place]] = step
        for place in range(ptr[step], ptr[step + 1]):
            hits += marked[ids[place]] == step
    return hits


@cached_njit(nogil=True)
def _count_average(ids, ptr, num_ids, first, predicted):  # type: ignore[no-untyped-def]
    """Hits of the moving average; `predicted` (T,) gets the size of each step's guess.

    Per step an id keeps 7/8 of its score, rounded down, and gains EMA_UNIT if it was selected: whole
    numbers, so that ties are real ones; the higher id is then preferred. What has sunk to 0 is no candidate.
    """
    place_of = np.full(num_ids, -1, np.int64)  # where a candidate stands in `keys`
    keys = np.empty(num_ids, np.int64)  # candidates: score and, below it, the id
    num, hits = 0, 0
    for step in range(len(ptr) - 1):
        size = ptr[step + 1] - ptr[step]
        predicted[step] = min(size, num)
        if step >= first and size:
            lowest = _nth_largest(keys[:num], size) if num > size else np.int64(0)
            for index in range(ptr[step], ptr[step + 1]):
                place = place_of[ids[index]]
                hits += place >= 0 and keys[place] >= lowest
        kept = 0
        for place in range(num):
            key = keys[place]
            id_, score = key & _ID_MASK, (key >> _ID_BITS) * 7 >> 3
            keys[kept] = score << _ID_BITS | id_
            place_of[id_] = kept if score else -1
            kept += score > 0
        num = kept
        for index in range(ptr[step], ptr[step + 1]):
            id_ = np.int64(ids[index])
            if place_of[id_] < 0:
                place_of[id_] = num
                keys[num] = id_
                num += 1
            keys[place_of[id_]] += EMA_UNIT << _ID_BITS
    return hits


@inner
def _nth_largest(keys: np.ndarray, nth: int) -> int:
    """The n-th largest of many keys, which all differ: first its bucket by score, then inside that."""
    counts = np.zeros(2048, np.int64)
    for key in keys:
        counts[key >> _BUCKET_BITS] += 1
    bucket, above = 2047, 0
    while above + counts[bucket] < nth:
        above += counts[bucket]
        bucket -= 1
    inside = np.empty(counts[bucket], np.int64)
    num = 0
    for key in keys:
        if key >> _BUCKET_BITS == bucket:
            inside[num] = key
            num += 1
    return _smallest(inside, num - (nth - above))


@inner
def _smallest(keys: np.ndarray, nth: int) -> int:
    """What stands at `nth` when the keys, which all differ, ascend; Hoare's selection, which moves them."""
    low, high = 0, len(keys) - 1
    while low < high:
        pivot = keys[(low + high) // 2]
        left, right = low, high
        while left <= right:
            while keys[left] < pivot:
                left += 1
            while keys[right] > pivot:
                right -= 1
            if left <= right:
                keys[left], keys[right] = keys[right], keys[left]
                left += 1
                right -= 1
        if nth <= right:
            high = right
        elif nth >= left:
            low = left
        else:
            break
    return int(keys[nth])
