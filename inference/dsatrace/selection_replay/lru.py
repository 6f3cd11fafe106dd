"""LRU over sets, at every size of the buffer in one pass, exact.

A step's ids come to the top of the stack together, the highest first; the rest follow in their old
order. A buffer of B ids holds the top B, for every B at once: the order does not depend on B
(Mattson et al., IBM Systems Journal, 1970). So an id hits where its depth, counted from 0 before the
step, is below B. This holds for buffers that hold the largest step; smaller ones are not defined.

All of a step's depths are counted in the same old stack. The stack lies on a time line of slots, one
bit per slot that is in use: the bits above each word are summed once per step, and then each depth
costs one look-up and one count of bits. When the time line is full, the slots in use move to its
beginning.

    result = lru(steps, sizes=[2048, 4096])
    result.depths[4096:].sum() + result.never        # missed ids at B = 4096
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsatrace.jit import cached_njit, inner
from dsatrace.selection_replay.bits import ALL, ONE, lowest_bit, popcount
from dsatrace.selection_replay.replayed import largest_step
from dsatrace.selection_replay.steps import Start, Steps

ABSENT = -1


@dataclasses.dataclass(frozen=True, eq=False)
class LruResult:
    """Counts over the counted steps, for D ids in all, T steps and S named sizes.

    `pinned + never + depths.sum()` is the number of ids asked for.
    """

    depths: np.ndarray  # (D,) int64, ids by their depth in the stack
    never: int  # ids that no step before asked for and that the start did not hold
    pinned: int  # newest ids in their own slot: hits at every size
    deepest: np.ndarray  # (D,) int64, steps by the depth of their deepest id; a step without ids is in none
    deepest_never: int  # steps with an id among `never`: they miss at every size
    misses: np.ndarray  # (T, S) int64, missed ids of each step, those of the warm-up too
    evictions: np.ndarray  # (S,) int64
    ages: np.ndarray  # (S, T) int64, missed ids by steps since they were last asked for; 0: they never were


def lru(
    steps: Steps, sizes: Sequence[int] = (), *, start: Start = "empty", pin_newest: bool = False
) -> LruResult:
    """Replays LRU at all sizes; of those in `sizes` also misses by step, evictions and ages.

    `start`: with "first-b" the first stack is 0, 1, 2, ... With `pin_newest`, a step's newest id hits
    in a slot of its own: it neither enters nor moves in the stack.
    """
    asked = steps.without_newest() if pin_newest else steps
    ids, ptr = asked.ascending().arrays()
    order = np.argsort(sizes, kind="stable")
    ascending = np.array(sizes, np.int64)[order]
    counts = _Counts(
        depths=np.zeros(steps.num_ids, np.int64),
        deepest=np.zeros(steps.num_ids, np.int64),
        misses=np.zeros((steps.num_steps, len(sizes)), np.int64),
        ages=np.zeros((len(sizes), max(steps.num_steps, 1)), np.int64),
        new=np.zeros(steps.num_steps, np.int64),
    )
    num_first = steps.num_ids if start == "first-b" else 0
    stack = _empty_stack(steps.num_ids, 2 * steps.num_ids + largest_step(asked))
    counted = steps.counted
    deepest_never = _walk(ids, ptr, counted, ascending, num_first, stack, counts)
    back = np.argsort(order)
    misses = counts.misses[:, ::-1].cumsum(axis=1)[:, ::-1][:, back]  # what one size misses, smaller ones do
    in_stack = np.concatenate(([num_first], num_first + counts.new.cumsum()))[:, None]
    filled = np.diff(np.minimum(in_stack, sizes), axis=0)[counted].sum(axis=0)
    return LruResult(
        depths=counts.depths,
        never=int(counts.new[counted].sum()),
        pinned=int(steps.sizes[counted].sum() - asked.sizes[counted].sum()),
        deepest=counts.deepest,
        deepest_never=deepest_never,
        misses=misses,
        evictions=misses[counted].sum(axis=0) - filled,
        ages=counts.ages[::-1].cumsum(axis=0)[::-1][back],
    )


class _Stack(NamedTuple):
    """L slots, which grow towards the present, of D ids."""

    slot_of: np.ndarray  # (D,) int32, or ABSENT
    id_at: np.ndarray  # (L,) int32
    step_at: np.ndarray  # (L,) int32, the last step that asked for the slot's id, or ABSENT
    words: np.ndarray  # (L / 64 + 1,) uint64, a bit per slot that is in use
    above: np.ndarray  # (L / 64 + 1,) int64, slots in use above each word


class _Counts(NamedTuple):
    """As in `LruResult`, sizes ascending; an id counts once, at the largest size that misses it."""

    depths: np.ndarray
    deepest: np.ndarray
    misses: np.ndarray
    ages: np.ndarray
    new: np.ndarray  # (T,) ids of each step that the stack does not hold


def _empty_stack(num_ids: int, num_slots: int) -> _Stack:
    return _Stack(
        np.full(num_ids, ABSENT, np.int32),
        np.empty(num_slots, np.int32),
        np.empty(num_slots, np.int32),
        np.zeros((num_slots >> 6) + 1, np.uint64),
        np.zeros((num_slots >> 6) + 1, np.int64),
    )


@inner
def _use_slots_before(words: np.ndarray, end: int) -> None:
    """Sets their bits; all words are 0."""
    for word in range(end >> 6):
        words[word] = ALL
    if end & 63:
        words[end >> 6] = (ONE << np.uint64(end & 63)) - ONE


@inner
def _begin_with(stack: _Stack, num_first: int) -> None:
    """The stack 0, 1, 2, ..."""
    for slot in range(num_first):
        id_ = num_first - 1 - slot
        stack.slot_of[id_], stack.id_at[slot], stack.step_at[slot] = slot, id_, ABSENT
    _use_slots_before(stack.words, num_first)


@inner
def _compact(stack: _Stack, end: int) -> int:
    """Moves the slots in use to the beginning, in order; returns their number."""
    to = 0
    for word in range((end + 63) >> 6):
        bits = stack.words[word]
        stack.words[word] = 0
        while bits:
            slot = (word << 6) + lowest_bit(bits)
            bits &= bits - ONE
            id_ = stack.id_at[slot]
            stack.slot_of[id_], stack.id_at[to], stack.step_at[to] = to, id_, stack.step_at[slot]
            to += 1
    _use_slots_before(stack.words, to)
    return to


@inner
def _sum_above(stack: _Stack, end: int) -> None:
    num_above = np.int64(0)
    for word in range(end >> 6, -1, -1):
        stack.above[word] = num_above
        num_above += popcount(stack.words[word])


@inner
def _depth(stack: _Stack, slot: int) -> int:
    word = slot >> 6
    depth: int = stack.above[word] + popcount((stack.words[word] >> np.uint64(slot & 63)) >> ONE)
    return depth


@inner
def _bring_up(stack: _Stack, id_: int, step: int, end: int) -> None:
    slot = stack.slot_of[id_]
    if slot != ABSENT:
        stack.words[slot >> 6] &= ~(ONE << np.uint64(slot & 63))
    stack.slot_of[id_], stack.id_at[end], stack.step_at[end] = end, id_, step
    stack.words[end >> 6] |= ONE << np.uint64(end & 63)


@inner
def _count_depths(
    ids: np.ndarray, step: int, counted: bool, sizes: np.ndarray, stack: _Stack, counts: _Counts
) -> tuple[int, int]:
    """Counts one step's ids; returns how many are not in the stack, and the others' greatest depth."""
    num_new, deepest = 0, -1
    for id_ in ids:
        slot = stack.slot_of[id_]
        num_missed = len(sizes)
        age = 0
        if slot == ABSENT:
            num_new += 1
        else:
            depth = _depth(stack, slot)
            counts.depths[depth] += counted
            deepest = max(deepest, depth)
            num_missed = 0
            while num_missed < len(sizes) and depth >= sizes[num_missed]:
                num_missed += 1
            if num_missed and stack.step_at[slot] != ABSENT:
                age = step - stack.step_at[slot]
        if num_missed:
            counts.misses[step, num_missed - 1] += 1
            counts.ages[num_missed - 1, age] += counted
    return num_new, deepest


@cached_njit(nogil=True, _nrt=False)
def _walk(
    ids: np.ndarray,
    ptr: np.ndarray,
    counted: np.ndarray,
    sizes: np.ndarray,
    num_first: int,
    stack: _Stack,
    counts: _Counts,
) -> int:
    """Fills the counts; returns `deepest_never`."""
    deepest_never = 0
    _begin_with(stack, num_first)
    end = num_first
    for step in range(len(ptr) - 1):
        asked = ids[ptr[step] : ptr[step + 1]]
        if end + len(asked) > len(stack.id_at):
            end = _compact(stack, end)
        _sum_above(stack, end)
        num_new, deepest = _count_depths(asked, step, counted[step], sizes, stack, counts)
        for id_ in asked:
            _bring_up(stack, id_, step, end)
            end += 1
        counts.new[step] = num_new
        if not counted[step]:
            continue
        deepest_never += num_new > 0
        if num_new == 0 and deepest >= 0:
            counts.deepest[deepest] += 1
    return deepest_never
