"""Units in memory of this process: host memory (`ram`), or a file mapped into it (`mmap`).

A read of a mapped file is a copy where its pages are in the kernel's page cache, else page faults of
unknown length. For reads that certainly reach the disk see `direct_file`.

    store = ram_store(unit_bytes=41984, capacity_units=1024)
    store = ram_store(41984, 1024, memory=pinned)      # the caller's array, such as pinned memory
    store = mmap_store("mmap:/mnt/nvme/kv", Path("/mnt/nvme/kv"), unit_bytes=41984, capacity_units=1024)
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.stores.checked import FOUND, Batch, CheckedStore, Medium, Moved
from dsatrace.kv.stores.checksums import copy_units
from dsatrace.kv.stores.files import open_private_file


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


def ram_store(unit_bytes: int, capacity_units: int, memory: np.ndarray | None = None) -> CheckedStore:
    """A store in host memory; `memory`, if given, is (capacity_units, unit_bytes) uint8."""
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


def mmap_store(spec: str, path: Path, unit_bytes: int, capacity_units: int) -> CheckedStore:
    """A store in a new private file at `path`, which lives as long as the array that maps it."""
    num_bytes = unit_bytes * capacity_units
    fd = open_private_file(spec, path, num_bytes)
    try:
        mapping = mmap.mmap(fd, num_bytes)
    finally:
        os.close(fd)
    array = np.frombuffer(mapping, dtype=np.uint8).reshape(capacity_units, unit_bytes)
    return CheckedStore(ArrayMedium(array), unit_bytes, capacity_units)
