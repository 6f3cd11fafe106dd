"""Who must go next when units come into a full tier: the orders that `Residency` runs on, by name.

LRU and FIFO are one array of stamps and never look at a unit alone. The others are the plain
policies that the block pool and the replay use, asked unit by unit: the same rules, but 2 us a
unit instead of 0.03; SIEVE, whose plain form searches a list, more. What a tier cannot run is
left out: `opt` needs the future, and those that weigh workloads or chains of blocks would all
be LRU, since a unit has neither. Knows no byte, no tensor and no layer.

    slot_of = np.full(100, ABSENT)                         # the map's own, read when units are admitted
    order = make_order("lru", num_slots=2, slot_of=slot_of)
    order.admit(np.array([3, 7]), np.array([False, False]), free=np.array([0, 1]))     # [0, 1]
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.policies.policy import Access

TIER_POLICIES = (
    "lru",
    "fifo",
    "mru",
    "filo",
    "lfu",
    "slru",
    "s3-fifo",
    "sieve",
    "arc",
    "gdsf",
    "random",
)
"""What `--tier-policy` takes, the default first."""

ABSENT = -1
_FREE = np.iinfo(np.int64).max  # the stamp of a slot that holds nothing, or nothing that may go
_NO_ACCESS = Access()  # a unit has no workload, no parent and no depth


class EvictionOrder(Protocol):
    """The order in which the units of one map are given up. It holds no map: `slot_of` is the caller's."""

    def admit(self, units: np.ndarray, is_here: np.ndarray, free: np.ndarray) -> np.ndarray:
        """The slots that the units which are not here get, (M,) int64: those in `free` first.

        `units (N,)` are distinct and used in the order given; none of them is chosen to go. The
        units that lie in the slots after the free ones are forgotten, the first to go first.
        """

    def forget(self, units: np.ndarray) -> None:
        """`units`, all of them here, are no longer."""


class StampOrder:
    """Evicts the unit used (LRU) or else entered (FIFO) the longest time ago."""

    def __init__(self, num_slots: int, slot_of: np.ndarray, *, by_recency: bool) -> None:
        self._slot_of = slot_of
        self._by_recency = by_recency
        self._stamp = np.full(num_slots, _FREE, dtype=np.int64)
        self._clock = 0

    def admit(self, units: np.ndarray, is_here: np.ndarray, free: np.ndarray) -> np.ndarray:
        slots = self._slot_of[units]
        num_missing = len(units) - int(np.count_nonzero(is_here))
        victims = self._oldest(num_missing - len(free), slots[is_here])
        new_slots = np.concatenate([free, victims]) if len(free) else victims
        slots[~is_here] = new_slots
        stamped = slots if self._by_recency else new_slots
        self._stamp[stamped] = np.arange(self._clock, self._clock + len(stamped))
        self._clock += len(stamped)
        return new_slots

    def forget(self, units: np.ndarray) -> None:
        self._stamp[self._slot_of[units]] = _FREE

    def _oldest(self, n: int, spared: np.ndarray) -> np.ndarray:
        """The `n` slots with the oldest stamps, oldest first; none of `spared`."""
        if n == 0:
            return np.empty(0, dtype=np.int64)
        stamps = self._stamp[spared]
        self._stamp[spared] = _FREE
        oldest = np.argpartition(self._stamp, n - 1)[:n]
        oldest = oldest[np.argsort(self._stamp[oldest])]
        self._stamp[spared] = stamps
        return oldest


class PolicyOrder:
    """Any policy of the registry, told of units one at a time, as the replay tells it of a request's blocks.

    What is here is pinned first, what comes when it comes; all are let go of once the whole
    admission is in, in the order given, from which recency counts.
    """

    def __init__(self, name: str, num_slots: int, slot_of: np.ndarray) -> None:
        from dsatrace.kv.policies.registry import make_policy  # compiled kernels, which LRU does without

        self._slot_of = slot_of
        self._policy = make_policy(name, num_slots)

    def admit(self, units: np.ndarray, is_here: np.ndarray, free: np.ndarray) -> np.ndarray:
        policy = self._policy
        num_free = len(free)
        victims: list[int] = []
        for unit in units[is_here].tolist():
            policy.pin(unit)
        for unit, here in zip(units.tolist(), is_here.tolist(), strict=True):
            if here:
                policy.hit(unit, _NO_ACCESS)
                continue
            policy.miss(unit, _NO_ACCESS)
            if num_free:
                num_free -= 1
            else:
                victims.append(policy.evict())
            policy.insert(unit, _NO_ACCESS)
            policy.pin(unit)
        for unit in units.tolist():
            policy.unpin(unit)
        return np.concatenate([free, self._slot_of[np.array(victims, dtype=np.int64)]])

    def forget(self, units: np.ndarray) -> None:
        for unit in units.tolist():
            self._policy.forget(unit)


def make_order(policy: str, num_slots: int, slot_of: np.ndarray) -> EvictionOrder:
    """Raises `UserError` for a policy that no tier can run."""
    if policy not in TIER_POLICIES:
        raise UserError(f"--tier-policy {policy}: no such policy; use one of {', '.join(TIER_POLICIES)}")
    if policy in ("lru", "fifo"):
        return StampOrder(num_slots, slot_of, by_recency=policy == "lru")
    return PolicyOrder(policy, num_slots, slot_of)
