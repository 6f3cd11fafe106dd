"""Any policy for a cache whose blocks are admitted a batch at a time, compiled: the tiers' units.

A batch is to it what a request is to `simulate`, but its owner names the slots that are free, and takes
blocks out when their bytes are no longer valid. Knows no tier.

    order = BatchOrder("arc", num_blocks=1000, num_slots=64)
    order.admit(np.array([3, 7]), np.array([0, 1]))        # [0 1], the slots of blocks 3 and 7
    order.forget(np.array([3]))
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsatrace.kv.policies.compiled import (
    ABSENT,
    NEVER,
    NO_PARENT,
    Access,
    Cache,
    Shape,
    again,
    clear,
    compiled_whole,
    empty_cache,
    enter,
    fill,
    is_evictable,
    left,
    miss,
    offer,
    released,
    victim,
    withdraw,
)
from dsatrace.kv.policies.registry import Workloads, policy_info


class BatchOrder:
    """The order in which a policy evicts blocks 0 to `num_blocks - 1` from `num_slots` slots.

    A batch's cached blocks are pinned first, its new ones when they enter; all are unpinned at the end, in
    the order given, which is the order of their recency.
    """

    def __init__(self, name: str, num_blocks: int, num_slots: int) -> None:
        """Raises `UserError` for a policy that is unknown, or needs to see a stream."""
        info = policy_info(name)
        shape = Shape(num_slots, num_blocks, num_workloads=1)
        self._policy = info.state(shape, **info.settings({}, Workloads(("all",), None)))
        self._cache = empty_cache(shape, info.num_queues or 1, parents=None)

    def admit(self, blocks: np.ndarray, free: np.ndarray) -> np.ndarray:
        """The slots of those distinct `blocks` (N,) that were not cached, (M,) int64: the `free` ones, then
        those of the blocks evicted for them, in the order in which the policy gives them up."""
        slots = np.empty(len(blocks), np.int64)
        slots[: len(free)] = free
        return slots[: _admit(self._policy, self._cache, blocks, slots, len(free))].copy()

    def forget(self, blocks: np.ndarray) -> None:
        """Takes cached `blocks` out."""
        _forget(self._policy, self._cache, blocks)


@compiled_whole
def _admit(policy: Any, cache: Cache, blocks: np.ndarray, slots: np.ndarray, num_free: int) -> int:
    access = Access(0.0, 0, NO_PARENT, 0, 0, NEVER)
    for block in blocks:
        slot = cache.slot_of[block]
        if slot != ABSENT:
            withdraw(cache, slot)
            cache.pins[slot] = 1
    num_new = 0
    for block in blocks:
        slot = cache.slot_of[block]
        if slot != ABSENT:
            again(policy, cache, slot, access)
            continue
        miss(policy, cache, block, access)
        if num_new == num_free:
            slots[num_new] = victim(policy, cache)
            left(policy, cache, slots[num_new])
            clear(cache, slots[num_new])
            num_free += 1
        fill(cache, slots[num_new], block)
        enter(policy, cache, slots[num_new], access)
        num_new += 1
    for block in blocks:
        slot = cache.slot_of[block]
        cache.pins[slot] = 0
        released(policy, cache, slot)
        offer(cache, slot)
    return num_new


@compiled_whole
def _forget(policy: Any, cache: Cache, blocks: np.ndarray) -> None:
    for block in blocks:
        slot = cache.slot_of[block]
        assert is_evictable(cache, slot)
        withdraw(cache, slot)
        left(policy, cache, slot)
        clear(cache, slot)
