"""Units in memory of this process: host memory (`ram`), or a file mapped into it (`mmap`).

A read of a mapped file is a copy where its pages are in the kernel's page cache, else page faults of
unknown length. For reads that certainly reach the disk see `direct_file`.

    store = ram_store(StoreSettings("ram", unit_bytes=41984, capacity_units=1024))
    store = ram_store(StoreSettings("ram", 41984, 1024, memory=pinned))      # the caller's array
    store = mmap_store(StoreSettings("mmap:/mnt/nvme/kv", 41984, 1024))
"""

from __future__ import annotations

import mmap
import os

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.stores.checked import FOUND, Batch, CheckedStore, Medium, Moved
from dsatrace.kv.stores.checksums import copy_units
from dsatrace.kv.stores.files import open_private_file
from dsatrace.kv.stores.interface import StoreSettings


class ArrayMedium(Medium):
    """Unit = row `slot` of `array`, (capacity, unit_bytes) uint8."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def write(self, batch: Batch) -> Moved:
        copy_units(batch.buffer, batch.rows, self.array, batch.slots, batch.keys, batch.sums)
        return self._moved(batch, np.ones(len(batch.keys), dtype=bool))

    def read(self, batch: Batch) -> Moved:
        copy_units(self.array, batch.slots, batch.buffer, batch.rows, batch.keys, batch.sums)
        return self._moved(batch, np.full(len(batch.keys), FOUND, np.uint8))

    def _moved(self, batch: Batch, outcome: np.ndarray) -> Moved:
        """Neighbouring slots are one operation."""
        slots = batch.slots
        num_ops = len(slots) - int(np.count_nonzero(slots[1:] == slots[:-1] + 1))
        return Moved(outcome, num_ops, len(slots) * self.array.shape[1])

    def close(self, keys: np.ndarray) -> None:
        self.array = np.empty((0, self.array.shape[1]), dtype=np.uint8)


def ram_store(settings: StoreSettings) -> CheckedStore:
    """A store in host memory, or in `settings.memory`: (capacity_units, unit_bytes) uint8."""
    shape, memory = (settings.room, settings.unit_bytes), settings.memory
    if memory is None:
        try:
            memory = np.zeros(shape, dtype=np.uint8)
        except MemoryError as error:
            gigabytes = shape[0] * shape[1] / 1e9
            raise UserError(f"ram: no room for {gigabytes:.1f} GB of units; ask for fewer") from error
    elif memory.shape != shape or memory.dtype != np.uint8 or not memory.flags.c_contiguous:
        raise ValueError(f"ram: memory is {memory.shape} {memory.dtype}, not C-contiguous {shape} uint8")
    return CheckedStore(ArrayMedium(memory), settings)


def mmap_store(settings: StoreSettings) -> CheckedStore:
    """A store in a new private file, which lives as long as the array that maps it."""
    shape = (settings.room, settings.unit_bytes)
    num_bytes = shape[0] * shape[1]
    fd = open_private_file(settings, num_bytes)
    try:
        mapping = mmap.mmap(fd, num_bytes)
    finally:
        os.close(fd)
    return CheckedStore(ArrayMedium(np.frombuffer(mapping, dtype=np.uint8).reshape(shape)), settings)
