"""What one handle has stored: for each key a slot and the checksum of what was put.

Knows no bytes and no medium. Slots are addresses in media that have them (memory, files). They are
handed out in ascending order at first, so that units put together lie together. The table of keys
uses open addressing with linear probing, compiled.

    ledger = Ledger(capacity=1024)
    slots = ledger.take(keys)             # (N,) int64, -1 where it is full
    ledger.sums[slots] = checksums
    ledger.find(keys)                     # the same slots, -1 where unknown
    ledger.free(keys)
"""

from __future__ import annotations

import numpy as np

from dsatrace.jit import cached_njit

FIRST_SLOTS = 1024
"""Initial slots of a ledger without capacity; they double when they run out."""

# numba turns uint64 mixed with int64 into float64, hence the types.
_HASH_ODD, _HASH_SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)


class Ledger:
    """Maps keys to slots below `capacity`; if that is None, it grows as needed."""

    def __init__(self, capacity: int | None) -> None:
        self._grows = capacity is None
        self._num_spare = 0
        self._allocate(FIRST_SLOTS if capacity is None else capacity)

    def __len__(self) -> int:
        return len(self._spare) - self._num_spare

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The slots of `keys`, -1 where unknown: (N,) int64."""
        slots = np.empty(len(keys), dtype=np.int64)
        _find(self._table, self._slot_keys, keys, slots)
        return slots

    def take(self, keys: np.ndarray) -> np.ndarray:
        """The slots of `keys`, new ones for unknown keys, -1 if none is left: (N,) int64."""
        while self._grows and self._num_spare < len(keys):
            self._grow()
        slots = np.empty(len(keys), dtype=np.int64)
        self._num_spare = _take(self._table, self._slot_keys, self._spare, self._num_spare, keys, slots)
        return slots

    def free(self, keys: np.ndarray) -> None:
        """Forgets `keys`; unknown ones are ignored."""
        self._num_spare = _free(self._table, self._slot_keys, self._spare, self._num_spare, keys)

    def keys(self) -> np.ndarray:
        """All known keys, by slot: (K,) uint64."""
        return self._slot_keys[np.sort(self._table[self._table >= 0])]

    def _allocate(self, num_slots: int) -> None:
        self._table = np.full(1 << (2 * num_slots - 1).bit_length(), -1, dtype=np.int64)  # half full at most
        self._slot_keys = np.zeros(num_slots, dtype=np.uint64)
        self.sums = np.zeros(num_slots, dtype=np.uint64)
        self._spare = np.arange(num_slots - 1, -1, -1, dtype=np.int64)
        self._num_spare = num_slots

    def _grow(self) -> None:
        """Doubles the slots. A key keeps its checksum; its slot becomes its rank among the old slots."""
        keys = self.keys()
        sums = self.sums[self.find(keys)]
        self._allocate(2 * len(self._spare))
        self.sums[self.take(keys)] = sums


@cached_njit(nogil=True, inline="always")
def _place(table, slot_keys, key):  # type: ignore[no-untyped-def]
    """The place of `key` in the table, or the free place where it would be."""
    mask = len(table) - 1
    place = np.int64((key * _HASH_ODD) >> _HASH_SHIFT) & mask
    while table[place] >= 0 and slot_keys[table[place]] != key:
        place = (place + 1) & mask
    return place


@cached_njit("void(int64[::1], uint64[::1], uint64[::1], int64[::1])", nogil=True)
def _find(table, slot_keys, keys, slots):  # type: ignore[no-untyped-def]
    """`slots[i]` of `keys[i]`, or -1."""
    for i in range(len(keys)):
        slots[i] = table[_place(table, slot_keys, keys[i])]


@cached_njit("int64(int64[::1], uint64[::1], int64[::1], int64, uint64[::1], int64[::1])", nogil=True)
def _take(table, slot_keys, free, num_free, keys, slots):  # type: ignore[no-untyped-def]
    """`slots[i]` of `keys[i]`, old or taken from the end of `free`, or -1 if none is left.

    Returns how many are free now.
    """
    for i in range(len(keys)):
        place = _place(table, slot_keys, keys[i])
        if table[place] < 0 and num_free > 0:
            num_free -= 1
            table[place] = free[num_free]
            slot_keys[free[num_free]] = keys[i]
        slots[i] = table[place]
    return num_free


@cached_njit("int64(int64[::1], uint64[::1], int64[::1], int64, uint64[::1])", nogil=True)
def _free(table, slot_keys, free, num_free, keys):  # type: ignore[no-untyped-def]
    """Forgets `keys`, known or not; their slots go to the end of `free`. Returns how many are free now."""
    mask = len(table) - 1
    for i in range(len(keys)):
        hole = _place(table, slot_keys, keys[i])
        if table[hole] < 0:
            continue
        free[num_free] = table[hole]
        num_free += 1
        after = (hole + 1) & mask
        while table[after] >= 0:  # later entries move up, unless that is before their own home
            home = np.int64((slot_keys[table[after]] * _HASH_ODD) >> _HASH_SHIFT) & mask
            if ((after - home) & mask) >= ((after - hole) & mask):
                table[hole] = table[after]
                hole = after
            after = (after + 1) & mask
        table[hole] = -1
    return num_free
