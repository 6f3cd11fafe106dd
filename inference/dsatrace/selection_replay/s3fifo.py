"""S3-FIFO over sets: a small queue that new ids must pass, a main queue, and ghosts of evicted ids.

The rules are those of `dsatrace.kv.policies.s3fifo`, with its parameters; a step's ids are passed over
and keep their place. Missed ids enter one by one, in the order in which they were recorded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from dsatrace.jit import cached_njit
from dsatrace.kv.policies.lists import IN_NONE, Lists, append, empty_lists, oldest, take_out
from dsatrace.kv.policies.registry import POLICIES
from dsatrace.kv.policies.s3fifo import MAIN, MOST_USES, SMALL, s3fifo_limits
from dsatrace.selection_replay.replayed import ABSENT, BEFORE, Replayed, largest_step, num_first
from dsatrace.selection_replay.steps import Start, Steps

NUM_HELD, HEAD, NUM_BEHIND, NUM_PASSED, NUM_EVICTABLE = range(5)


class _Queues(NamedTuple):
    """Q = 2 queues, of a buffer of B ids of D."""

    ring: np.ndarray  # (Q, B) int32, ids from HEAD on, the oldest first
    passed: np.ndarray  # (Q, largest step) int32, ids of the step that stood before HEAD
    counts: np.ndarray  # (Q, 5) int64; NUM_HELD = NUM_BEHIND + NUM_PASSED
    queue: np.ndarray  # (D,) int8, of resident ids
    uses: np.ndarray  # (D,) int8, of resident ids
    used: np.ndarray  # (D,) int32
    ghosts: Lists  # one list of ids
    has_evicted: np.ndarray  # (1,) bool
    limits: np.ndarray  # (Q,) int64
    most_ghosts: int
    threshold: int


def s3fifo(steps: Steps, size: int, start: Start) -> Replayed:
    params = POLICIES["s3-fifo"].params
    misses = np.zeros(steps.num_steps, np.int64)
    largest = largest_step(steps) + 1
    state = _Queues(
        ring=np.empty((2, size), np.int32),
        passed=np.empty((2, largest), np.int32),
        counts=np.zeros((2, 5), np.int64),
        queue=np.zeros(steps.num_ids, np.int8),
        uses=np.zeros(steps.num_ids, np.int8),
        used=np.full(steps.num_ids, ABSENT, np.int32),
        ghosts=empty_lists(steps.num_ids, 1),
        has_evicted=np.zeros(1, np.bool_),
        limits=np.array(s3fifo_limits(size, params["small"])),
        most_ghosts=int(params["ghost"] * size),
        threshold=params["threshold"],
    )
    first = num_first(steps, size, start)
    scratch = np.empty(largest, np.int32)
    evictions = _walk(*steps.arrays(), steps.num_warm, size, first, state, scratch, misses)
    return Replayed(misses, evictions)


@njit(nogil=True)
def _append(state: _Queues, queue: int, id_: int) -> None:
    counts = state.counts[queue]
    size = state.ring.shape[1]
    at = counts[HEAD] + counts[NUM_BEHIND]
    state.ring[queue, at if at < size else at - size] = id_
    state.queue[id_] = queue
    counts[NUM_BEHIND] += 1
    counts[NUM_HELD] += 1


@njit(nogil=True)
def _pop(state: _Queues, queue: int, step: int) -> int:
    """Takes the oldest id out that the step does not ask for; there is one."""
    counts = state.counts[queue]
    while True:
        id_ = state.ring[queue, counts[HEAD]]
        counts[HEAD] = counts[HEAD] + 1 if counts[HEAD] + 1 < state.ring.shape[1] else 0
        counts[NUM_BEHIND] -= 1
        if state.used[id_] != step:
            counts[NUM_HELD] -= 1
            counts[NUM_EVICTABLE] -= 1
            return id_
        state.passed[queue, counts[NUM_PASSED]] = id_
        counts[NUM_PASSED] += 1


@njit(nogil=True)
def _put_back(state: _Queues) -> None:
    """Ids that were passed over take their old places."""
    for queue in range(2):
        counts = state.counts[queue]
        for at in range(counts[NUM_PASSED] - 1, -1, -1):
            counts[HEAD] = counts[HEAD] - 1 if counts[HEAD] else state.ring.shape[1] - 1
            state.ring[queue, counts[HEAD]] = state.passed[queue, at]
        counts[NUM_BEHIND] += counts[NUM_PASSED]
        counts[NUM_PASSED] = 0


@njit(nogil=True)
def _to_main(state: _Queues, id_: int, uses: int) -> None:
    _append(state, MAIN, id_)
    state.counts[MAIN, NUM_EVICTABLE] += 1
    state.uses[id_] = uses


@njit(nogil=True)
def _victim(state: _Queues, step: int) -> int:
    state.has_evicted[0] = True
    main = state.counts[MAIN]
    if main[NUM_EVICTABLE] == 0 or main[NUM_HELD] <= state.limits[MAIN]:
        while state.counts[SMALL, NUM_EVICTABLE]:
            id_ = _pop(state, SMALL, step)
            if state.uses[id_] < state.threshold:
                _remember(state, id_)
                return id_
            _to_main(state, id_, 0)
    while True:
        id_ = _pop(state, MAIN, step)
        if state.uses[id_] == 0:
            return id_
        _to_main(state, id_, state.uses[id_] - 1)


@njit(nogil=True)
def _remember(state: _Queues, id_: int) -> None:
    ghosts = state.ghosts
    if ghosts.size[0] and ghosts.size[0] == state.most_ghosts:
        take_out(ghosts, oldest(ghosts, 0))
    if state.most_ghosts:
        append(ghosts, 0, id_)


@njit(nogil=True)
def _recall(state: _Queues, id_: int) -> bool:
    """Whether the id was a ghost; it no longer is."""
    returns = state.ghosts.list_of[id_] != IN_NONE
    if returns:
        take_out(state.ghosts, id_)
    return returns


@njit(nogil=True)
def _enter(state: _Queues, id_: int, step: int, returns: bool) -> None:
    filling = not state.has_evicted[0] and state.counts[SMALL, NUM_HELD] >= state.limits[SMALL]
    _append(state, MAIN if returns or filling else SMALL, id_)
    state.uses[id_] = 0
    state.used[id_] = step


@cached_njit(nogil=True, _nrt=False)
def _walk(
    ids: np.ndarray,
    ptr: np.ndarray,
    num_warm: int,
    size: int,
    num_first: int,
    state: _Queues,
    missed: np.ndarray,
    misses: np.ndarray,
) -> int:
    """Fills `misses`; returns the evictions."""
    num_held, evictions = num_first, 0
    for id_ in range(num_first):
        _enter(state, id_, BEFORE, False)
    for step in range(len(ptr) - 1):
        num_missed = 0
        state.counts[SMALL, NUM_EVICTABLE] = state.counts[SMALL, NUM_HELD]
        state.counts[MAIN, NUM_EVICTABLE] = state.counts[MAIN, NUM_HELD]
        for id_ in ids[ptr[step] : ptr[step + 1]]:
            if state.used[id_] == ABSENT:
                missed[num_missed] = id_
                num_missed += 1
            else:
                state.used[id_] = step
                state.uses[id_] = min(state.uses[id_] + 1, MOST_USES)
                state.counts[state.queue[id_], NUM_EVICTABLE] -= 1
        misses[step] = num_missed
        for id_ in missed[:num_missed]:
            returns = _recall(state, id_)
            if num_held < size:
                num_held += 1
            else:
                evictions += step >= num_warm
                state.used[_victim(state, step)] = ABSENT
            _enter(state, id_, step, returns)
        _put_back(state)
    return evictions
