"""LFU, segmented LRU and greedy-dual: blocks used more often stay longer.

Gdsf(capacity, depth_cost=0.001)     # recomputing block d of a chain costs 1 + d / 1000
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsatrace.kv.policies.compiled import RULES, Cache, Rules, Shape, offer, pop, tick
from dsatrace.kv.policies.policy import Access, PlainPolicy


class Lfu(PlainPolicy):
    """Evicts the block used least often since it was cached; among equals, the least recent."""

    def again(self, block: int, access: Access) -> None:
        self.value[block] += 1


class LfuState(NamedTuple):
    unused: bool  # numba has no empty tuple class


def lfu_state(shape: Shape) -> LfuState:
    return LfuState(False)


def _count_use(policy: LfuState, cache: Cache, slot: int, access: Access) -> None:
    cache.value[slot] += 1


RULES[LfuState] = Rules(again=_count_use)

PROBATION, PROTECTED = 0, 1


class Slru(PlainPolicy):
    """A block that is used again becomes protected. Beyond the protected share, the least recent
    evictable protected block returns to probation, as its most recent. Probation is evicted first."""

    def __init__(self, capacity: int, *, protected: float, leaf: bool = False) -> None:
        super().__init__(capacity, leaf=leaf, num_queues=2)
        self._limit = max(1, int(protected * capacity))
        self._num_protected = 0

    def again(self, block: int, access: Access) -> None:
        if self.queue[block] == PROTECTED:
            return
        self.queue[block] = PROTECTED
        self._num_protected += 1
        while self._num_protected > self._limit and self.first(PROTECTED) is not None:
            cooled = self.pop(PROTECTED)
            self.queue[cooled], self.stamp[cooled] = PROBATION, self.tick()
            self._num_protected -= 1
            self.offer(cooled)

    def victim(self) -> int:
        return self.pop(PROTECTED if self.first(PROBATION) is None else PROBATION)

    def left(self, block: int) -> None:
        self._num_protected -= self.queue[block] == PROTECTED


class SlruState(NamedTuple):
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


class Gdsf(PlainPolicy):
    """Evicts the smallest value: uses x cost, plus the value of the last evicted block.

    All blocks have the same size. The cost is `1 + depth_cost * depth`: attention makes a block
    costlier to recompute the more blocks precede it.
    """

    def __init__(self, capacity: int, *, depth_cost: float, leaf: bool = False) -> None:
        super().__init__(capacity, leaf=leaf)
        self._depth_cost = depth_cost
        self._floor = 0.0
        self._uses: dict[int, int] = {}

    def enter(self, block: int, access: Access) -> None:
        self._uses[block] = 0
        self.again(block, access)

    def again(self, block: int, access: Access) -> None:
        self._uses[block] += 1
        self.value[block] = self._floor + self._uses[block] * (1 + self._depth_cost * access.depth)

    def victim(self) -> int:
        block = self.pop(0)
        self._floor = self.value[block]
        return block

    def left(self, block: int) -> None:
        del self._uses[block]


class GdsfState(NamedTuple):
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
