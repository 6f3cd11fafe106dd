"""SIEVE: one queue in order of entry, and a hand that spares blocks used since it last passed.

After Zhang et al. (NSDI 2024). The hand moves from old to new and evicts the first block not used since it
last passed. Blocks that are not evictable are passed over unchanged.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsatrace.kv.policies.compiled import (
    RULES,
    Access,
    Cache,
    Rules,
    Shape,
    is_evictable,
    same_stamp,
    withdraw,
)
from dsatrace.kv.policies.lists import Lists, append, empty_lists, end, oldest, take_out


class SieveState(NamedTuple):
    order: Lists  # one list of slots
    hand: np.ndarray  # (1,) int64, a slot or the list's end
    used: np.ndarray  # (S,) bool


def sieve_state(shape: Shape) -> SieveState:
    slots = shape.num_slots
    return SieveState(empty_lists(slots, 1), np.array([slots]), np.zeros(slots, np.bool_))


def _join(policy: SieveState, cache: Cache, slot: int, access: Access) -> None:
    cache.stamp[slot] = 0  # only the list has an order; the heap serves as a set
    policy.used[slot] = False
    append(policy.order, 0, slot)


def _mark_used(policy: SieveState, cache: Cache, slot: int, access: Access) -> None:
    policy.used[slot] = True


def _sieve(policy: SieveState, cache: Cache) -> int:
    order = policy.order
    slot = policy.hand[0]
    while True:
        if slot == end(order, 0):
            slot = np.int64(oldest(order, 0))
        if is_evictable(cache, slot):
            if not policy.used[slot]:
                break
            policy.used[slot] = False
        slot = np.int64(order.newer[slot])
    policy.hand[0] = slot
    withdraw(cache, slot)
    chosen: int = slot
    return chosen


def _is_gone(policy: SieveState, cache: Cache, slot: int) -> None:
    if policy.hand[0] == slot:
        policy.hand[0] = policy.order.newer[slot]
    take_out(policy.order, slot)


RULES[SieveState] = Rules(enter=_join, again=_mark_used, released=same_stamp, victim=_sieve, left=_is_gone)
