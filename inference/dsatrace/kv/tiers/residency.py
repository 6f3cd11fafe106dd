"""Which KV units lie in a tier: a map from unit to slot, who must go next, and who must be written back.

A unit is what moves as one: a block, or a row (one token). In HBM one map serves one layer; the
local pool has one for all, if there is a remote pool behind it. Pure accounting: it moves no
byte and knows no tensor, layer, request or store. `admit` decides, and whoever asked carries
the moves out, the write-backs first, since their slots are reused.

In order: `Residency` and the `Moves` it asks for; `EvictionOrder`, who must go next, as a stamp
per slot (`StampOrder`: LRU, FIFO) or as any policy of the registry (`PolicyOrder`).

    residency = Residency(num_units=100, num_slots=8)
    moves = residency.admit(np.array([3, 7]))         # both missed: moves.units == [3, 7]
    residency.mark_dirty(np.array([7]))               # unit 7 was written to
    residency.slot_of[[3, 7]]                         # where they lie; -1: not here
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.policies.policy import Access

__all__ = ["ABSENT", "TIER_POLICIES", "Moves", "Residency"]

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


@dataclasses.dataclass(frozen=True)
class Moves:
    """What an admission asks for. All arrays int64 but `victim_dirty`, which is bool.

    `units[i]` is to be brought into `slots[i]`. `victims[j]` lay in `victim_slots[j]`, whose
    bytes are still there until a unit is brought in, and are needed where `victim_dirty[j]`.
    """

    units: np.ndarray  # (M,)
    slots: np.ndarray  # (M,)
    victims: np.ndarray  # (V,), V <= M: free slots are used first
    victim_slots: np.ndarray  # (V,)
    victim_dirty: np.ndarray  # (V,)


class Residency:
    """At most `num_slots` of the units 0 .. num_units - 1 are resident; `policy` says who goes first.

    Units of one admission are used in the order given, and never evict one another. Free slots
    are filled before anything is evicted.
    """

    def __init__(self, num_units: int, num_slots: int, policy: str = "lru") -> None:
        """`policy`: one of `TIER_POLICIES`, else `UserError`."""
        if num_units < 1 or num_slots < 1:
            raise ValueError(f"a residency needs at least 1 unit and 1 slot, not {num_units} and {num_slots}")
        self.num_slots = num_slots
        self.policy = policy
        self.slot_of = np.full(num_units, ABSENT, dtype=np.int64)
        self.unit_of = np.full(num_slots, ABSENT, dtype=np.int64)
        self._is_dirty = np.zeros(num_slots, dtype=bool)
        self._num_free = num_slots
        self._order = make_order(policy, num_slots, self.slot_of)

    def is_resident(self, units: np.ndarray) -> np.ndarray:
        """Which of `units (N,)` are here, (N,) bool. Counts as no use."""
        return self.slot_of[units] != ABSENT

    def admit(self, units: np.ndarray) -> Moves:
        """Makes the distinct `units (N,)` resident, clean where they were not. Needs N <= `num_slots`."""
        assert len(units) <= self.num_slots, f"{len(units)} units do not fit {self.num_slots} slots"
        here = self.is_resident(units)
        missing = units[~here]
        free = self._free_slots(len(missing))
        slots = self._order.admit(units, here, free)
        victim_slots = slots[len(free) :]
        victims = self.unit_of[victim_slots]
        moves = Moves(missing, slots, victims, victim_slots, self._is_dirty[victim_slots])
        self.slot_of[victims] = ABSENT
        self.slot_of[missing] = slots
        self.unit_of[slots] = missing
        self._is_dirty[slots] = False
        self._num_free -= len(free)
        return moves

    def mark_dirty(self, units: np.ndarray) -> None:
        """Resident `units` were written to: nowhere else are they as they are now."""
        assert self.is_resident(units).all(), "a unit that is not resident cannot be written to"
        self._is_dirty[self.slot_of[units]] = True

    def is_dirty(self, units: np.ndarray) -> np.ndarray:
        """Which of the resident `units (N,)` have been written to since they came, (N,) bool."""
        return self._is_dirty[self.slot_of[units]]

    def drop(self, units: np.ndarray) -> None:
        """Forgets units, resident or not, dirty or not: their bytes are void."""
        units = np.unique(units[self.is_resident(units)])
        self._order.forget(units)
        slots = self.slot_of[units]
        self.slot_of[units] = ABSENT
        self.unit_of[slots] = ABSENT
        self._is_dirty[slots] = False
        self._num_free += len(slots)

    def _free_slots(self, at_most: int) -> np.ndarray:
        if not self._num_free:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self.unit_of == ABSENT)[:at_most]


class EvictionOrder(Protocol):
    """The order in which the units of one map are given up. It holds no map: `slot_of` is the caller's."""

    def admit(self, units: np.ndarray, is_here: np.ndarray, free: np.ndarray) -> np.ndarray:
        """The slots that the units which are not here get, (M,) int64: those in `free` first.

        `units (N,)` are distinct and used in the order given; none of them is chosen to go. The
        units that lie in the slots after the free ones are forgotten, the first to go first.
        """

    def forget(self, units: np.ndarray) -> None:
        """`units`, all of them here, are no longer."""


def make_order(policy: str, num_slots: int, slot_of: np.ndarray) -> EvictionOrder:
    """Raises `UserError` for a policy that no tier can run."""
    if policy not in TIER_POLICIES:
        raise UserError(f"--tier-policy {policy}: no such policy; use one of {', '.join(TIER_POLICIES)}")
    if policy in ("lru", "fifo"):
        return StampOrder(num_slots, slot_of, by_recency=policy == "lru")
    return PolicyOrder(policy, num_slots, slot_of)


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
