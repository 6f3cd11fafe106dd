"""Units in an array of this process: host memory, or a file mapped into it.

store = ram_store(unit_bytes=41984, capacity_units=1024)
store = ram_store(41984, 1024, memory=pinned)      # the caller's array, say pinned for CUDA
"""

from __future__ import annotations

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.stores.checked import CheckedStore
from dsatrace.kv.stores.checksums import copy_units
from dsatrace.kv.stores.medium import FOUND, Medium, Moved, num_runs


class ArrayMedium(Medium):
    """Unit = row `slot` of `array`, (capacity, unit_bytes) uint8."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def write(
        self, keys: np.ndarray, slots: np.ndarray, data: np.ndarray, rows: np.ndarray, sums: np.ndarray
    ) -> Moved:
        copy_units(data, rows, self.array, slots, keys, sums)
        return Moved(np.ones(len(keys), dtype=bool), num_runs(slots), len(keys) * self.array.shape[1])

    def read(
        self, keys: np.ndarray, slots: np.ndarray, out: np.ndarray, rows: np.ndarray, sums: np.ndarray
    ) -> Moved:
        copy_units(self.array, slots, out, rows, keys, sums)
        return Moved(np.full(len(keys), FOUND, np.uint8), num_runs(slots), len(keys) * self.array.shape[1])

    def holds(self, keys: np.ndarray) -> np.ndarray:
        return np.ones(len(keys), dtype=bool)

    def drop(self, keys: np.ndarray) -> np.ndarray:
        return np.ones(len(keys), dtype=bool)

    def register(self, buffer: np.ndarray) -> None:
        """Memory is addressed as it is."""

    def close(self, keys: np.ndarray) -> None:
        self.array = np.empty((0, self.array.shape[1]), dtype=np.uint8)


def ram_store(unit_bytes: int, capacity_units: int, memory: np.ndarray | None = None) -> CheckedStore:
    """A store in host memory; `memory`, if given, is `(capacity_units, unit_bytes)` uint8."""
    shape = (capacity_units, unit_bytes)
    if memory is None:
        try:
            memory = np.zeros(shape, dtype=np.uint8)
        except MemoryError as error:
            gigabytes = capacity_units * unit_bytes / 1e9
            raise UserError(f"ram: no room for {gigabytes:.1f} GB of units; ask for fewer") from error
    elif memory.shape != shape or memory.dtype != np.uint8 or not memory.flags.c_contiguous:
        raise ValueError(f"ram: memory is {memory.shape} {memory.dtype}, not C-contiguous {shape} uint8")
    return CheckedStore(ArrayMedium(memory), unit_bytes, capacity_units)
