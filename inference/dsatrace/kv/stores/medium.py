"""What a store's member writes: bytes in and out of one medium, nothing else.

`CheckedStore` wraps a medium into a `Store`: it checks arguments, knows what was stored,
compares checksums, counts and times. A medium is called by one thread at a time, with
non-empty batches whose arrays are right, and reads only keys it has stored.

    def read(self, keys, slots, out, rows, sums):              # a medium that lost everything
        return Moved(np.full(len(keys), ABSENT, np.uint8), ops=0, num_bytes=0)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

ABSENT, FOUND, DAMAGED = range(3)
"""What became of a unit that was read: not there; read in full; there, but not `unit_bytes` long."""


class Moved(NamedTuple):
    """What a batch moved: each unit's outcome, and the operations and bytes of the whole batch."""

    outcome: np.ndarray  # (N,): bool for writes (stored), uint8 for reads (ABSENT, FOUND, DAMAGED)
    ops: int
    num_bytes: int


class Medium(Protocol):
    """A place for units. Failures of the medium raise `StoreError`.

    `slots` are distinct numbers below the store's capacity, the same for a key as long as it
    is stored; media that address by key ignore them. `rows` are the rows of the buffer.
    """

    def write(
        self, keys: np.ndarray, slots: np.ndarray, data: np.ndarray, rows: np.ndarray, sums: np.ndarray
    ) -> Moved:
        """Keeps `data[rows[i]]` as unit i, over an older one, or says it has no room for it.

        `sums[i]` becomes the checksum of what was given.
        """

    def read(
        self, keys: np.ndarray, slots: np.ndarray, out: np.ndarray, rows: np.ndarray, sums: np.ndarray
    ) -> Moved:
        """Reads unit i into `out[rows[i]]`; `sums[i]` becomes the checksum of what arrived there."""

    def holds(self, keys: np.ndarray) -> np.ndarray:
        """Which units are there, (N,) bool."""

    def drop(self, keys: np.ndarray) -> np.ndarray:
        """Which units are gone now, (N,) bool: False where the medium insists on keeping one."""

    def register(self, buffer: np.ndarray) -> None:
        """See `Store.register`."""

    def close(self, keys: np.ndarray) -> None:
        """Lets go of the medium; where others share it, drops `keys` first: all that is left."""


def parts(num_units: int, at_most: int) -> Iterator[slice]:
    """A batch in stretches of `at_most` units."""
    for begin in range(0, num_units, at_most):
        yield slice(begin, min(begin + at_most, num_units))


def num_runs(slots: np.ndarray) -> int:
    """Operations that read or write `slots` in this order, neighbours merged."""
    return len(slots) - int(np.count_nonzero(slots[1:] == slots[:-1] + 1))
