"""LFU over sets: the id goes that was asked for least often since it became resident.

Among equals the least recent goes, and of one step the lowest. Ids of a buffer that starts with ids
0 to B - 1 count as asked for once, in that order.

One list per number of uses, in the order of the last use: a step moves its ids to the ends of their
next lists, so behind an id of the step only ids of the step follow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from dsatrace.jit import cached_njit
from dsatrace.selection_replay.bits import ONE, lowest_bit
from dsatrace.selection_replay.replayed import ABSENT, BEFORE, Replayed, largest_step, num_first
from dsatrace.selection_replay.steps import Start, Steps


class _Uses(NamedTuple):
    """D ids and U numbers of uses."""

    node: np.ndarray  # (D + U, 2) int32, OLDER and NEWER; node D + u ends the list of u uses, as a circle
    uses: np.ndarray  # (D,) int32, of resident ids
    words: np.ndarray  # (U / 64 + 1,) uint64; a list whose bit is not set is empty


OLDER, NEWER = 0, 1


def lfu(steps: Steps, size: int, start: Start) -> Replayed:
    num_lists = steps.num_steps + 1  # a step adds one use
    misses = np.zeros(steps.num_steps, np.int64)
    state = _Uses(
        np.repeat(np.arange(steps.num_ids + num_lists, dtype=np.int32), 2).reshape(-1, 2),
        np.zeros(steps.num_ids, np.int32),
        np.zeros((num_lists >> 6) + 1, np.uint64),
    )
    evictions = _walk(
        *steps.ascending().arrays(),
        steps.num_warm,
        size,
        num_first(steps, size, start),
        np.full(steps.num_ids, ABSENT, np.int32),
        state,
        np.empty(largest_step(steps) + 1, np.int32),
        misses,
    )
    return Replayed(misses, evictions)


@njit(nogil=True)
def _append(state: _Uses, id_: int, uses: int) -> None:
    node = state.node
    end = len(state.uses) + uses
    last = node[end, OLDER]
    node[last, NEWER], node[id_, OLDER] = id_, last
    node[id_, NEWER], node[end, OLDER] = end, id_
    state.uses[id_] = uses
    state.words[uses >> 6] |= ONE << np.uint64(uses & 63)


@njit(nogil=True)
def _take_out(state: _Uses, id_: int) -> None:
    older, newer = state.node[id_, OLDER], state.node[id_, NEWER]
    state.node[older, NEWER], state.node[newer, OLDER] = newer, older


@njit(nogil=True)
def _evict(state: _Uses, used: np.ndarray, step: int, num_victims: int) -> None:
    num_ids = len(state.uses)
    word = 0
    bits = state.words[0]
    while num_victims:
        while not bits:
            word += 1
            bits = state.words[word]
        uses = (word << 6) + lowest_bit(bits)
        oldest = state.node[num_ids + uses, NEWER]
        if oldest < num_ids and used[oldest] != step:
            _take_out(state, oldest)
            used[oldest] = ABSENT
            num_victims -= 1
            continue
        if oldest >= num_ids:
            state.words[word] &= ~(bits & (~bits + ONE))
        bits &= bits - ONE


@cached_njit(nogil=True, _nrt=False)
def _walk(
    ids: np.ndarray,
    ptr: np.ndarray,
    num_warm: int,
    size: int,
    num_first: int,
    used: np.ndarray,
    state: _Uses,
    missed: np.ndarray,
    misses: np.ndarray,
) -> int:
    """Fills `misses`; returns the evictions."""
    num_held, evictions = num_first, 0
    for id_ in range(num_first):
        _append(state, id_, 0)
        used[id_] = BEFORE
    for step in range(len(ptr) - 1):
        num_missed = 0
        for id_ in ids[ptr[step] : ptr[step + 1]]:
            if used[id_] == ABSENT:
                missed[num_missed] = id_
                num_missed += 1
            else:
                _take_out(state, id_)
                _append(state, id_, state.uses[id_] + 1)
                used[id_] = step
        misses[step] = num_missed
        num_victims = max(0, num_held + num_missed - size)
        num_held += num_missed - num_victims
        if step >= num_warm:
            evictions += num_victims
        _evict(state, used, step, num_victims)
        for id_ in missed[:num_missed]:
            _append(state, id_, 0)
            used[id_] = step
    return evictions
