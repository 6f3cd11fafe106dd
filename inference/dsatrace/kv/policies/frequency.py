"""LFU, segmented LRU and greedy-dual: blocks used more often stay longer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsatrace.kv.policies.compiled import RULES, Access, Cache, Rules, Shape, offer, pop, tick


class LfuState(NamedTuple):
    """Evicts the block used least often since it was cached; among equals, the least recent."""

    unused: bool  # numba has no empty tuple class


def lfu_state(shape: Shape) -> LfuState:
    return LfuState(False)


def _count_use(policy: LfuState, cache: Cache, slot: int, access: Access) -> None:
    cache.value[slot] += 1


RULES[LfuState] = Rules(again=_count_use)

PROBATION, PROTECTED = 0, 1


class SlruState(NamedTuple):
    """A block that is used again becomes protected. Beyond the protected share, the least recent
    evictable protected block returns to probation, as its most recent. Probation is evicted first."""

    limit: int
    num_protected: np.ndarray  # (1,) int64


def slru_state(shape: Shape, *, protected: float) -> SlruState:
    return SlruState(max(1, int(protected * shape.num_slots)), np.zeros(1, np.int64))


def _protect(policy: SlruState, cache: Cache, slot: int, access: Access) -> None:
    if cache.queue[slot] == PROTECTED:
        return
    cache.queue[slot] = PROTECTED
    policy.num_protected[0] += 1
    while policy.num_protected[0] > policy.limit and cache.heap_size[PROTECTED]:
        cooled = pop(cache, PROTECTED)
        cache.queue[cooled] = PROBATION
        cache.stamp[cooled] = tick(cache)
        policy.num_protected[0] -= 1
        offer(cache, cooled)


def _probation_first(policy: SlruState, cache: Cache) -> int:
    if cache.heap_size[PROBATION]:
        return pop(cache, PROBATION)
    return pop(cache, PROTECTED)


def _is_gone(policy: SlruState, cache: Cache, slot: int) -> None:
    policy.num_protected[0] -= cache.queue[slot] == PROTECTED


RULES[SlruState] = Rules(again=_protect, victim=_probation_first, left=_is_gone)


class GdsfState(NamedTuple):
    """Evicts the smallest value: uses x cost, plus the value of the last evicted block.

    All blocks have the same size. The cost is `1 + depth_cost * depth`: attention makes a block
    costlier to recompute the more blocks precede it.
    """

    depth_cost: float
    floor: np.ndarray  # (1,) float64
    uses: np.ndarray  # (S,) int64


def gdsf_state(shape: Shape, *, depth_cost: float) -> GdsfState:
    return GdsfState(float(depth_cost), np.zeros(1), np.zeros(shape.num_slots, np.int64))


def _first_use(policy: GdsfState, cache: Cache, slot: int, access: Access) -> None:
    policy.uses[slot] = 1
    cache.value[slot] = policy.floor[0] + (1 + policy.depth_cost * access.depth)


def _one_more_use(policy: GdsfState, cache: Cache, slot: int, access: Access) -> None:
    policy.uses[slot] += 1
    cache.value[slot] = policy.floor[0] + policy.uses[slot] * (1 + policy.depth_cost * access.depth)


def _least_value(policy: GdsfState, cache: Cache) -> int:
    slot = pop(cache, 0)
    policy.floor[0] = cache.value[slot]
    return slot


RULES[GdsfState] = Rules(enter=_first_use, again=_one_more_use, victim=_least_value)
