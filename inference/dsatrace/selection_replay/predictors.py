"""What a prefetch would have fetched: guesses of a layer's next set, held against the set itself.

Knows ids and no bytes. Every predictor is counted over the same steps: those counted that have a step
before them. A predictor that needs the layer before is None where there is none.

    found = predictions_of(steps, before=steps_of_layer_before)
    found["previous_step"].recall, found["previous_step"].extra
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dsatrace.jit import cached_njit
from dsatrace.selection_replay.nulls import CHANCE_UNIT, expected_shared
from dsatrace.selection_replay.steps import Steps
from dsatrace.selection_replay.sums import Sums

EMA_UNIT = 1 << 20


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
    score = np.zeros(num_ids, np.int64)
    active = np.empty(num_ids, np.int64)
    keys = np.empty(num_ids, np.int64)
    num_active, hits = 0, 0
    for step in range(len(ptr) - 1):
        size = ptr[step + 1] - ptr[step]
        predicted[step] = min(size, num_active)
        if step >= first and size:
            lowest = np.int64(0)
            if num_active > size:
                for index in range(num_active):
                    keys[index] = score[active[index]] << 31 | active[index]
                lowest = np.partition(keys[:num_active], num_active - size)[num_active - size]
            for place in range(ptr[step], ptr[step + 1]):
                id_ = ids[place]
                hits += score[id_] > 0 and (score[id_] << 31 | id_) >= lowest
        kept = 0
        for index in range(num_active):
            id_ = active[index]
            score[id_] = score[id_] * 7 >> 3
            if score[id_]:
                active[kept] = id_
                kept += 1
        num_active = kept
        for place in range(ptr[step], ptr[step + 1]):
            id_ = ids[place]
            if not score[id_]:
                active[num_active] = id_
                num_active += 1
            score[id_] += EMA_UNIT
    return hits
