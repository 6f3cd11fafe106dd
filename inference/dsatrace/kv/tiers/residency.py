"""Which KV units lie in a tier: a map from unit to slot, which to evict next, and which to write back.

A unit is the unit of transfer: a block, or a row (one token). HBM has one map per layer; a local pool
with a remote pool behind it has one for all layers. Pure accounting: it moves no byte and knows no
tensor, layer, request or store. `admit` decides, and the caller carries the moves out, write-backs
first, since their slots are reused.

Which unit is evicted next is an `EvictionOrder`: a stamp per slot (`StampOrder`: LRU, FIFO), or any
policy of the registry (`BatchOrder`).

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

STAMP_POLICIES = ("lru", "fifo")
COMPILED_POLICIES = ("mru", "filo", "lfu", "slru", "s3-fifo", "sieve", "arc", "gdsf", "random")
TIER_POLICIES = STAMP_POLICIES + COMPILED_POLICIES
"""The values of `--tier-policy`, the default first."""

ABSENT = -1
_FREE = np.iinfo(np.int64).max  # the stamp of a slot that is empty, or may not be evicted


@dataclasses.dataclass(frozen=True)
class Moves:
    """What an admission requires: write back the dirty victims, then bring `units` into `slots`.

    The bytes of `victims[j]` stay in `victim_slots[j]` until a unit is brought in there.
    """

    units: np.ndarray  # (M,) int64
    slots: np.ndarray  # (M,) int64
    victims: np.ndarray  # (V,) int64, V <= M: free slots are used first
    victim_slots: np.ndarray  # (V,) int64
    victim_dirty: np.ndarray  # (V,) bool


class Residency:
    """At most `num_slots` of the units 0 .. num_units - 1 are resident; `policy` orders evictions.

    Units of one admission count as used in the order given, and never evict one another. Free slots
    are filled before any unit is evicted.
    """

    def __init__(self, num_units: int, num_slots: int, policy: str = "lru") -> None:
        """`policy`: one of `TIER_POLICIES`, else `UserError`."""
        if num_units < 1 or num_slots < 1:
            raise ValueError(f"a residency needs at least 1 unit and 1 slot, not {num_units} and {num_slots}")
        if policy not in TIER_POLICIES:
            raise UserError(f"--tier-policy {policy}: no such policy; use one of {', '.join(TIER_POLICIES)}")
        self.num_slots = num_slots
        self.slot_of = np.full(num_units, ABSENT, dtype=np.int64)
        self.unit_of = np.full(num_slots, ABSENT, dtype=np.int64)
        self._is_dirty = np.zeros(num_slots, dtype=bool)
        self._num_free = num_slots
        self._order: EvictionOrder
        if policy in STAMP_POLICIES:
            self._order = StampOrder(num_slots, self.slot_of, by_recency=policy == "lru")
        else:
            from dsatrace.kv.policies.batches import BatchOrder  # numba, which LRU does not need

            self._order = BatchOrder(policy, num_units, num_slots)

    def is_resident(self, units: np.ndarray) -> np.ndarray:
        """Which of `units (N,)` are resident, (N,) bool. Does not count as a use."""
        resident: np.ndarray = self.slot_of[units] != ABSENT
        return resident

    def admit(self, units: np.ndarray) -> Moves:
        """Makes the distinct `units (N,)` resident, new ones clean. N must not exceed `num_slots`."""
        assert len(units) <= self.num_slots, f"{len(units)} units do not fit {self.num_slots} slots"
        here = self.is_resident(units)
        missing = units[~here]
        free = self._free_slots(len(missing))
        slots = self._order.admit(units, free)
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
        """These resident units were written to: no other tier has their present bytes."""
        assert self.is_resident(units).all(), "a unit that is not resident cannot be written to"
        self._is_dirty[self.slot_of[units]] = True

    def drop(self, units: np.ndarray) -> None:
        """Forgets units, resident or not, dirty or not: their bytes are no longer valid."""
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
    """The order in which a residency's units are evicted."""

    def admit(self, units: np.ndarray, free: np.ndarray) -> np.ndarray:
        """The slots for those `units` that are not resident, (M,) int64: `free` ones, then victims' slots.

        `units (N,)` are distinct and count as used in the order given; none of them becomes a victim.
        Victims are forgotten, in the order in which the policy gives them up.
        """

    def forget(self, units: np.ndarray) -> None:
        """Resident `units` are no longer resident."""


class StampOrder:
    """Evicts the unit used (LRU) or admitted (FIFO) the longest time ago."""

    def __init__(self, num_slots: int, slot_of: np.ndarray, *, by_recency: bool) -> None:
        self._slot_of = slot_of
        self._by_recency = by_recency
        self._stamp = np.full(num_slots, _FREE, dtype=np.int64)
        self._clock = 0

    def admit(self, units: np.ndarray, free: np.ndarray) -> np.ndarray:
        slots = self._slot_of[units]
        is_here = slots != ABSENT
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
        """The `n` slots with the oldest stamps, oldest first, without `spared`."""
        if n == 0:
            return np.empty(0, dtype=np.int64)
        stamps = self._stamp[spared]
        self._stamp[spared] = _FREE
        oldest = np.argpartition(self._stamp, n - 1)[:n]
        oldest = oldest[np.argsort(self._stamp[oldest])]
        self._stamp[spared] = stamps
        return oldest
