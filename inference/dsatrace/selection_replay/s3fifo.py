"""S3-FIFO over sets: a small queue that new ids must pass, a main queue, and ghosts of evicted ids.

The rules and parameters are those of `dsatrace.kv.policies.s3fifo`; a step's ids are passed over and
keep their place. Missed ids enter one by one, in the order in which they were recorded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsatrace.jit import cached_njit, inner
from dsatrace.kv.policies.registry import POLICIES
from dsatrace.kv.policies.s3fifo import MAIN, MOST_USES, SMALL, s3fifo_limits
from dsatrace.selection_replay.replayed import ABSENT, BEFORE, Replayed, scratch, walked
from dsatrace.selection_replay.steps import Start, Steps

USED, QUEUE, USES, GHOST = range(4)
NO_GHOST = -1
NUM_HELD, HEAD, NUM_BEHIND, NUM_PASSED, NUM_EVICTABLE = range(5)
OLDEST, END, NUM_GHOSTS = range(3)


class _State(NamedTuple):
    """Q = 2 queues, of a buffer of B ids of D, and G ghosts at most."""

    of_id: np.ndarray  # (D, 4) int32: USED; QUEUE and USES of a resident id; place as a GHOST, or NO_GHOST
    ring: np.ndarray  # (Q, B) int32, ids from HEAD on, the oldest first
    passed: np.ndarray  # (Q, largest step) int32, ids of the step that stood before HEAD
    counts: np.ndarray  # (Q, 5) int64; NUM_HELD = NUM_BEHIND + NUM_PASSED
    ghosts: np.ndarray  # (2 G + 1,) int32, ids in the order of eviction, from OLDEST to END, with gaps
    ghost_counts: np.ndarray  # (3,) int64
    has_evicted: np.ndarray  # (1,) bool
    limits: np.ndarray  # (Q,) int64
    most_ghosts: int
    threshold: int


def s3fifo(steps: Steps, size: int, start: Start) -> Replayed:
    params = POLICIES["s3-fifo"].params
    most_ghosts, passed = int(params["ghost"] * size), scratch(steps)
    of_id = np.full((steps.num_ids, 4), NO_GHOST, np.int32)
    of_id[:, USED] = ABSENT
    state = _State(
        of_id=of_id,
        ring=np.empty((2, size), np.int32),
        passed=passed,
        counts=np.zeros((2, 5), np.int64),
        ghosts=np.empty(2 * most_ghosts + 1, np.int32),
        ghost_counts=np.zeros(3, np.int64),
        has_evicted=np.zeros(1, np.bool_),
        limits=np.array(s3fifo_limits(size, params["small"])),
        most_ghosts=most_ghosts,
        threshold=params["threshold"],
    )
    return walked(_walk, steps, size, start, size, state, np.empty_like(passed[0]))


@inner
def _append(state: _State, queue: int, id_: int, uses: int) -> None:
    counts = state.counts[queue]
    size = state.ring.shape[1]
    at = counts[HEAD] + counts[NUM_BEHIND]
    state.ring[queue, at if at < size else at - size] = id_
    state.of_id[id_, QUEUE], state.of_id[id_, USES] = queue, uses
    counts[NUM_BEHIND] += 1
    counts[NUM_HELD] += 1


@inner
def _pop(state: _State, queue: int, step: int) -> int:
    """Takes the oldest id out that the step does not ask for; there is one."""
    counts = state.counts[queue]
    size = state.ring.shape[1]
    head, num_passed = counts[HEAD], counts[NUM_PASSED]
    while True:
        id_: int = state.ring[queue, head]
        head = head + 1 if head + 1 < size else 0
        if state.of_id[id_, USED] != step:
            break
        state.passed[queue, num_passed] = id_
        num_passed += 1
    counts[NUM_BEHIND] -= 1 + num_passed - counts[NUM_PASSED]
    counts[HEAD], counts[NUM_PASSED] = head, num_passed
    counts[NUM_HELD] -= 1
    counts[NUM_EVICTABLE] -= 1
    return id_


@inner
def _put_back(state: _State) -> None:
    """Ids that were passed over take their old places."""
    for queue in range(2):
        counts = state.counts[queue]
        head = counts[HEAD]
        for at in range(counts[NUM_PASSED] - 1, -1, -1):
            head = head - 1 if head else state.ring.shape[1] - 1
            state.ring[queue, head] = state.passed[queue, at]
        counts[HEAD] = head
        counts[NUM_BEHIND] += counts[NUM_PASSED]
        counts[NUM_PASSED] = 0


@inner
def _victim(state: _State, step: int) -> int:
    state.has_evicted[0] = True
    small, main = state.counts[SMALL], state.counts[MAIN]
    if main[NUM_EVICTABLE] == 0 or main[NUM_HELD] <= state.limits[MAIN]:
        while small[NUM_EVICTABLE]:
            id_ = _pop(state, SMALL, step)
            if state.of_id[id_, USES] < state.threshold:
                _remember(state, id_)
                return id_
            _append(state, MAIN, id_, 0)
            main[NUM_EVICTABLE] += 1
    while True:
        id_ = _pop(state, MAIN, step)
        uses = state.of_id[id_, USES]
        if uses == 0:
            return id_
        _append(state, MAIN, id_, uses - 1)
        main[NUM_EVICTABLE] += 1


@inner
def _forget(state: _State, id_: int) -> None:
    state.of_id[id_, GHOST] = NO_GHOST
    state.ghost_counts[NUM_GHOSTS] -= 1


@inner
def _remember(state: _State, id_: int) -> None:
    """Makes the id the newest ghost; the oldest goes if there are too many."""
    if not state.most_ghosts:
        return
    ghosts, counts = state.ghosts, state.ghost_counts
    if counts[NUM_GHOSTS] == state.most_ghosts:
        while state.of_id[ghosts[counts[OLDEST]], GHOST] != counts[OLDEST]:
            counts[OLDEST] += 1
        _forget(state, ghosts[counts[OLDEST]])
        counts[OLDEST] += 1
    if counts[END] == len(ghosts):
        end = 0
        for at in range(counts[OLDEST], counts[END]):
            if state.of_id[ghosts[at], GHOST] == at:
                ghosts[end] = ghosts[at]
                state.of_id[ghosts[end], GHOST] = end
                end += 1
        counts[OLDEST], counts[END] = 0, end
    ghosts[counts[END]] = id_
    state.of_id[id_, GHOST] = counts[END]
    counts[END] += 1
    counts[NUM_GHOSTS] += 1


@inner
def _enter(state: _State, id_: int, step: int, returns: bool) -> None:
    filling = not state.has_evicted[0] and state.counts[SMALL, NUM_HELD] >= state.limits[SMALL]
    _append(state, MAIN if returns or filling else SMALL, id_, 0)
    state.of_id[id_, USED] = step


@cached_njit(nogil=True, _nrt=False)
def _walk(
    ids: np.ndarray,
    ptr: np.ndarray,
    counted: np.ndarray,
    num_first: int,
    size: int,
    state: _State,
    missed: np.ndarray,
    misses: np.ndarray,
) -> int:
    """Fills `misses`; returns the evictions."""
    num_held, evictions = num_first, 0
    for id_ in range(num_first):
        _enter(state, id_, BEFORE, False)
    for step in range(len(ptr) - 1):
        num_missed = num_main = num_hits = 0
        for id_ in ids[ptr[step] : ptr[step + 1]]:
            row = state.of_id[id_]
            is_missed = row[USED] == ABSENT
            missed[num_missed] = id_
            num_missed += is_missed
            num_hits += not is_missed
            num_main += not is_missed and row[QUEUE] == MAIN
            row[USED] = ABSENT if is_missed else step
            row[USES] = min(row[USES] + 1, MOST_USES)  # of a missed id it says nothing
        state.counts[MAIN, NUM_EVICTABLE] = state.counts[MAIN, NUM_HELD] - num_main
        state.counts[SMALL, NUM_EVICTABLE] = state.counts[SMALL, NUM_HELD] - (num_hits - num_main)
        misses[step] = num_missed
        for id_ in missed[:num_missed]:
            returns = state.of_id[id_, GHOST] != NO_GHOST
            if returns:
                _forget(state, id_)
            if num_held < size:
                num_held += 1
            else:
                evictions += counted[step]
                state.of_id[_victim(state, step), USED] = ABSENT
            _enter(state, id_, step, returns)
        _put_back(state)
    return evictions
