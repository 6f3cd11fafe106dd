"""Units in a file read with O_DIRECT: every read bypasses the page cache and reaches the disk.

Units are padded to multiples of the disk's sector; the padding counts as bytes read. A batch is
sorted by place, neighbours are read in one operation, and several operations run at a time.

    store = direct_file_store(StoreSettings("file:/mnt/nvme/kv", unit_bytes=41984, capacity_units=1024))
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.stores.checked import FOUND, Batch, CheckedStore, Medium, Moved
from dsatrace.kv.stores.checksums import copy_units
from dsatrace.kv.stores.files import open_private_file
from dsatrace.kv.stores.interface import StoreError, StoreSettings

SECTORS = (512, 4096)  # bytes; the first that the disk takes
STAGING_BYTES = 8 << 20
PARALLEL = 8  # operations at a time

Transfer = Callable[[int, list[memoryview], int], int]  # os.preadv or os.pwritev


class DirectFileMedium(Medium):
    """Unit = `slot_bytes` at slot x `slot_bytes` of the file."""

    def __init__(self, fd: int, unit_bytes: int, sector: int) -> None:
        self._fd = fd
        self._slot_bytes = padded(unit_bytes, sector)
        self._staged_units = max(1, STAGING_BYTES // self._slot_bytes)
        memory = mmap.mmap(-1, self._staged_units * self._slot_bytes)  # O_DIRECT wants whole pages
        self._staging = np.frombuffer(memory, dtype=np.uint8).reshape(self._staged_units, self._slot_bytes)
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="direct-file")

    def write(self, batch: Batch) -> Moved:
        ops = 0
        for part, staged, sums in self._parts(batch):
            copy_units(batch.buffer, batch.rows[part], self._staging, staged, batch.keys[part], sums)
            batch.sums[part] = sums
            ops += self._transfer(os.pwritev, batch.slots[part])
        return Moved(np.ones(len(batch.keys), dtype=bool), ops, len(batch.keys) * self._slot_bytes)

    def read(self, batch: Batch) -> Moved:
        ops = 0
        for part, staged, sums in self._parts(batch):
            ops += self._transfer(os.preadv, batch.slots[part])
            copy_units(self._staging, staged, batch.buffer, batch.rows[part], batch.keys[part], sums)
            batch.sums[part] = sums
        return Moved(np.full(len(batch.keys), FOUND, np.uint8), ops, len(batch.keys) * self._slot_bytes)

    def _parts(self, batch: Batch) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The units by ascending slot, as many at a time as can be staged; their staging rows and sums."""
        order = np.argsort(batch.slots, kind="stable")
        for begin in range(0, len(order), self._staged_units):
            part = order[begin : begin + self._staged_units]
            yield part, np.arange(len(part)), np.empty(len(part), dtype=np.uint64)

    def _transfer(self, move: Transfer, slots: np.ndarray) -> int:
        """Moves staged units from or to ascending `slots`, one operation per run; returns how many."""
        begins = np.flatnonzero(np.diff(slots, prepend=-2) != 1)
        ends = np.append(begins[1:], len(slots))
        places = (slots[begins] * self._slot_bytes).tolist()
        spans = list(zip(begins.tolist(), ends.tolist(), places, strict=True))
        if len(spans) == 1:
            self._move(move, spans)
        else:
            shares = [spans[i::PARALLEL] for i in range(min(PARALLEL, len(spans)))]
            for _ in self._pool.map(lambda share: self._move(move, share), shares):
                pass
        return len(spans)

    def _move(self, move: Transfer, spans: list[tuple[int, int, int]]) -> None:
        for begin, end, place in spans:
            memory = self._staging[begin:end].data.cast("B")
            try:
                moved = move(self._fd, [memory], place)
            except OSError as error:
                raise StoreError("io", f"{len(memory)} bytes at {place} of the file: {error}") from error
            if moved != len(memory):
                raise StoreError("io", f"{moved} of {len(memory)} bytes at {place} of the file")

    def close(self, keys: np.ndarray) -> None:
        self._pool.shutdown()
        os.close(self._fd)


def direct_file_store(settings: StoreSettings) -> CheckedStore:
    """A store in a new private file."""
    num_bytes = padded(settings.unit_bytes, SECTORS[-1]) * settings.room
    fd = open_private_file(settings, num_bytes, os.O_DIRECT)
    medium = DirectFileMedium(fd, settings.unit_bytes, _sector(settings.spec, fd))
    return CheckedStore(medium, settings)


def padded(unit_bytes: int, sector: int) -> int:
    return -(-unit_bytes // sector) * sector


def _sector(spec: str, fd: int) -> int:
    """The smallest of `SECTORS` that the disk accepts."""
    page = mmap.mmap(-1, SECTORS[-1])
    for sector in SECTORS:
        try:
            os.preadv(fd, [memoryview(page)[:sector]], sector)
            return sector
        except OSError:
            continue
    os.close(fd)
    raise UserError(f"{spec}: this disk takes no direct reads of {SECTORS} bytes; use mmap:PATH")
