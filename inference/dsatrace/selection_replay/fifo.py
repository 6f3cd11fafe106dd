"""FIFO over sets: the id that became resident first goes first.

Ids of the current step are passed over and keep their place. A step's missed ids enter in the order
in which they were recorded; a buffer that starts with ids 0 to B - 1 holds 0 as the oldest.
"""

from __future__ import annotations

import numpy as np

from dsatrace.jit import cached_njit
from dsatrace.selection_replay.replayed import ABSENT, BEFORE, Replayed, scratch, walked
from dsatrace.selection_replay.steps import Start, Steps


def fifo(steps: Steps, size: int, start: Start) -> Replayed:
    used = np.full(steps.num_ids, ABSENT, np.int32)
    return walked(_walk, steps, size, start, used, np.empty(size, np.int32), *scratch(steps))


@cached_njit(nogil=True, _nrt=False)
def _walk(
    ids: np.ndarray,
    ptr: np.ndarray,
    counted: np.ndarray,
    num_first: int,
    used: np.ndarray,
    ring: np.ndarray,
    missed: np.ndarray,
    passed: np.ndarray,
    misses: np.ndarray,
) -> int:
    """Fills `misses`; returns the evictions. `ring` holds the resident ids, the oldest at `head`."""
    size = len(ring)
    head, num_held, evictions = 0, num_first, 0
    for id_ in range(num_first):
        ring[id_] = id_
        used[id_] = BEFORE
    for step in range(len(ptr) - 1):
        num_missed = 0
        for at in range(ptr[step], ptr[step + 1]):
            id_ = ids[at]
            missed[num_missed] = id_
            num_missed += used[id_] == ABSENT
            used[id_] = ABSENT if used[id_] == ABSENT else step
        misses[step] = num_missed
        num_victims = max(0, num_held + num_missed - size)
        num_held -= num_victims
        evictions += num_victims * counted[step]
        num_passed = 0
        while num_victims:
            id_ = ring[head]
            head = head + 1 if head + 1 < size else 0
            passed[num_passed] = id_
            num_passed += used[id_] == step
            num_victims -= used[id_] != step
            used[id_] = step if used[id_] == step else ABSENT
        for at in range(num_passed - 1, -1, -1):  # to the front again, in their old order
            head = head - 1 if head else size - 1
            ring[head] = passed[at]
        for at in range(num_missed):
            behind = head + num_held
            ring[behind if behind < size else behind - size] = missed[at]
            used[missed[at]] = step
            num_held += 1
    return evictions
