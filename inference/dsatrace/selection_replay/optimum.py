"""The fewest misses that any policy can have: the farthest next use goes, the step's own set stays.

Belady's rule (IBM Systems Journal, 1966) with a set as the unit. Two ids that are next asked for by
the same step may be exchanged for one another: behind that step both are resident, whichever went.
So the buffer is only a count of ids per next use. The hits of a step are the ids whose next use it
is, and no id needs to be looked up.
"""

from __future__ import annotations

import numpy as np

from dsatrace.jit import cached_njit
from dsatrace.selection_replay.bits import ONE, lowest_bit
from dsatrace.selection_replay.replayed import Replayed, num_first
from dsatrace.selection_replay.steps import Start, Steps


def optimum(steps: Steps, size: int, start: Start) -> Replayed:
    ids, ptr = steps.arrays()
    misses = np.zeros(steps.num_steps, np.int64)
    nearness = np.empty(len(ids), np.int32)
    coming = np.zeros(steps.num_ids, np.int32)
    _next_uses(ids, ptr, coming, nearness)
    num_nearness = steps.num_steps + 1
    evictions = _walk(
        ptr,
        steps.counted,
        size,
        coming[: num_first(steps, size, start)],
        nearness,
        np.zeros(num_nearness, np.int64),
        np.zeros((num_nearness >> 6) + 1, np.uint64),
        misses,
    )
    return Replayed(misses, evictions)


@cached_njit(nogil=True, _nrt=False)
def _next_uses(ids: np.ndarray, ptr: np.ndarray, coming: np.ndarray, nearness: np.ndarray) -> None:
    """The steps that are left at each id's next use, 0 if there is none: of T steps, step t is T - t.

    `coming` is 0 by id; afterwards it is the nearness of each id's first use.
    """
    num_steps = len(ptr) - 1
    for step in range(num_steps - 1, -1, -1):
        for at in range(ptr[step], ptr[step + 1]):
            nearness[at] = coming[ids[at]]
            coming[ids[at]] = num_steps - step


@cached_njit(nogil=True, _nrt=False)
def _walk(
    ptr: np.ndarray,
    counted: np.ndarray,
    size: int,
    first: np.ndarray,
    nearness: np.ndarray,
    count: np.ndarray,
    words: np.ndarray,
    misses: np.ndarray,
) -> int:
    """Fills `misses`; returns the evictions. `count[n]` ids have nearness n, and bit n of `words` is
    set if any has; no word below `lowest` has a bit."""
    num_steps = len(ptr) - 1
    evictions = 0
    lowest = 0
    num_held = len(first)
    for at in range(num_held):
        count[first[at]] += 1
        words[first[at] >> 6] |= ONE << np.uint64(first[at] & 63)
    for step in range(num_steps):
        begin, end = ptr[step], ptr[step + 1]
        now = num_steps - step
        num_missed = end - begin - count[now]
        count[now] = 0
        words[now >> 6] &= ~(ONE << np.uint64(now & 63))
        misses[step] = num_missed
        num_victims = max(0, num_held + num_missed - size)
        num_held += num_missed - num_victims
        evictions += num_victims * counted[step]
        while num_victims:
            while not words[lowest]:
                lowest += 1
            bit = lowest_bit(words[lowest])
            farthest = (lowest << 6) + bit
            gone = min(num_victims, count[farthest])
            count[farthest] -= gone
            num_victims -= gone
            if not count[farthest]:
                words[lowest] &= ~(ONE << np.uint64(bit))
        for at in range(begin, end):
            near = nearness[at]
            count[near] += 1
            words[near >> 6] |= ONE << np.uint64(near & 63)
            lowest = min(lowest, near >> 6)
    return evictions
