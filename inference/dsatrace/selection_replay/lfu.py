"""LFU over sets: the id goes that was asked for least often since it became resident.

Among equals the least recent goes, and of one step the lowest. Ids of a buffer that starts with ids
0 to B - 1 count as asked for once, in that order.

One list per number of uses, in the order of the last use: a step moves its ids to the ends of their
next lists, so behind an id of the step only ids of the step follow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsatrace.jit import cached_njit, inner
from dsatrace.selection_replay.bits import ONE, lowest_bit
from dsatrace.selection_replay.replayed import ABSENT, BEFORE, Replayed, scratch, walked
from dsatrace.selection_replay.steps import Start, Steps


class _Uses(NamedTuple):
    """D ids and U numbers of uses. Of each id one row, so that it costs one line of the processor's cache."""

    node: np.ndarray  # (D + U, 4) int32: OLDER, NEWER, USES, USED; node D + u closes the circle of u uses
    words: np.ndarray  # (U / 64 + 1,) uint64; a list whose bit is not set is empty
    num_ids: int


OLDER, NEWER, USES, USED = range(4)


def lfu(steps: Steps, size: int, start: Start) -> Replayed:
    num_lists = steps.num_steps + 1  # a step adds one use
    node = np.full((steps.num_ids + num_lists, 4), ABSENT, np.int32)
    node[:, OLDER] = node[:, NEWER] = np.arange(len(node))
    uses = _Uses(node, np.zeros((num_lists >> 6) + 1, np.uint64), steps.num_ids)
    return walked(_walk, steps.ascending(), size, start, size, uses, *scratch(steps))


@inner
def _append(state: _Uses, id_: int, uses: int, step: int) -> None:
    node = state.node
    end = state.num_ids + uses
    last = node[end, OLDER]
    node[last, NEWER] = node[end, OLDER] = id_
    node[id_, OLDER], node[id_, NEWER], node[id_, USES], node[id_, USED] = last, end, uses, step
    state.words[uses >> 6] |= ONE << np.uint64(uses & 63)


@inner
def _take_out(state: _Uses, id_: int) -> None:
    older, newer = state.node[id_, OLDER], state.node[id_, NEWER]
    state.node[older, NEWER], state.node[newer, OLDER] = newer, older


@inner
def _evict(state: _Uses, step: int, num_victims: int) -> None:
    num_ids = state.num_ids
    word = 0
    bits = state.words[0]
    while num_victims:
        while not bits:
            word += 1
            bits = state.words[word]
        uses = (word << 6) + lowest_bit(bits)
        oldest = state.node[num_ids + uses, NEWER]
        if oldest < num_ids and state.node[oldest, USED] != step:
            _take_out(state, oldest)
            state.node[oldest, USED] = ABSENT
            num_victims -= 1
            continue
        if oldest >= num_ids:
            state.words[word] &= ~(bits & (~bits + ONE))
        bits &= bits - ONE


@cached_njit(nogil=True, _nrt=False)
def _walk(
    ids: np.ndarray,
    ptr: np.ndarray,
    counted: np.ndarray,
    num_first: int,
    size: int,
    state: _Uses,
    missed: np.ndarray,
    hits: np.ndarray,
    misses: np.ndarray,
) -> int:
    """Fills `misses`; returns the evictions."""
    num_held, evictions = num_first, 0
    for id_ in range(num_first):
        _append(state, id_, 0, BEFORE)
    for step in range(len(ptr) - 1):
        num_missed = num_hits = 0
        for id_ in ids[ptr[step] : ptr[step + 1]]:
            is_missed = state.node[id_, USED] == ABSENT
            missed[num_missed] = hits[num_hits] = id_
            num_missed += is_missed
            num_hits += not is_missed
        for id_ in hits[:num_hits]:
            _take_out(state, id_)
            _append(state, id_, state.node[id_, USES] + 1, step)
        misses[step] = num_missed
        num_victims = max(0, num_held + num_missed - size)
        num_held += num_missed - num_victims
        evictions += num_victims * counted[step]
        _evict(state, step, num_victims)
        for id_ in missed[:num_missed]:
            _append(state, id_, 0, step)
    return evictions
