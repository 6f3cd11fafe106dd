"""A `Store` over any medium: a medium moves bytes, everything else that stores share stands here.

`CheckedStore` checks arguments, keeps a key's slot and checksum (`Ledger`), counts and times, so
that a unit counts only if it is, byte for byte, what this handle put last. A `Medium` is called by
one thread at a time, with non-empty batches whose arrays are right, and reads only keys it has stored.

    store = CheckedStore(ArrayMedium(array), StoreSettings("ram", unit_bytes=41984, capacity_units=1024))

    def read(self, batch):              # of a medium that lost everything
        return Moved(np.full(len(batch.keys), ABSENT, np.uint8), ops=0, num_bytes=0)
"""

from __future__ import annotations

import dataclasses
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import NamedTuple, TypeVar

import numpy as np

from dsatrace.kv.stores.backoff import Backoff
from dsatrace.kv.stores.interface import (
    StoreError,
    StoreSettings,
    StoreStats,
    are_distinct,
    check_batch,
    check_keys,
)
from dsatrace.kv.stores.ledger import Ledger

Question = TypeVar("Question")
Answer = TypeVar("Answer")
ABSENT, FOUND, DAMAGED = range(3)
"""Outcome of reading a unit: not there; read in full; there, but not `unit_bytes` long."""


class Batch(NamedTuple):
    """N units to move, none of them twice in a write: unit i is row `rows[i]` of `buffer`."""

    keys: np.ndarray  # (N,) uint64
    slots: np.ndarray  # (N,) int64, distinct numbers below the capacity, constant while a key is stored
    buffer: np.ndarray  # (M, unit_bytes) uint8
    rows: np.ndarray  # (N,) int64
    sums: np.ndarray  # (N,) uint64, out: the checksum of the bytes that were given, or that arrived


class Moved(NamedTuple):
    """Each unit's outcome, and the operations and bytes of the whole batch."""

    outcome: np.ndarray  # (N,): bool for writes (stored), uint8 for reads (ABSENT, FOUND, DAMAGED)
    ops: int
    num_bytes: int


class Medium(ABC):
    """A place for units, addressed by slot or by key. Its failures raise `StoreError`."""

    @property
    def num_retries(self) -> int:
        """How often it asked twice; see `StoreStats.retries`."""
        return 0

    @abstractmethod
    def write(self, batch: Batch) -> Moved:
        """Stores units in place of older versions, or reports no room for them."""

    @abstractmethod
    def read(self, batch: Batch) -> Moved:
        """Reads units into the buffer."""

    def holds(self, keys: np.ndarray) -> np.ndarray:
        """Which units are there, (N,) bool; unless overridden, all that were stored."""
        return np.ones(len(keys), dtype=bool)

    def drop(self, keys: np.ndarray) -> np.ndarray:
        """Which units are gone now, (N,) bool: False for those that the medium must keep."""
        return np.ones(len(keys), dtype=bool)

    def register(self, buffer: np.ndarray) -> None:  # noqa: B027
        """See `Store.register`; not every medium needs it."""

    @abstractmethod
    def close(self, keys: np.ndarray) -> None:
        """Releases the medium; in a shared one, drops `keys`, all units that are left, first."""


def parts(num_units: int, at_most: int) -> Iterator[slice]:
    """A batch in slices of `at_most` units."""
    for begin in range(0, num_units, at_most):
        yield slice(begin, min(begin + at_most, num_units))


COUNTED = tuple(field.name for field in dataclasses.fields(StoreStats) if field.name != "latency_kind")


class CheckedStore:
    """See `Store` for the contract."""

    def __init__(self, medium: Medium, settings: StoreSettings) -> None:
        self.unit_bytes = settings.unit_bytes
        self.capacity_units = settings.capacity_units
        self._medium = medium
        self._ledger = Ledger(settings.capacity_units)
        self._backoff = Backoff(settings.timeout_s)
        self._counts: dict[str, float] = dict.fromkeys(COUNTED, 0)
        self._lock = threading.Lock()
        self._closed = False

    def put(self, keys: np.ndarray, data: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        rows = check_batch(self.unit_bytes, keys, data, rows)
        if not are_distinct(keys):
            raise ValueError("a put names a key twice; which version should be stored?")
        with self._lock:
            self._check_open()
            self._counts["write_batches"] += 1
            self._counts["put_units"] += len(keys)
            slots = self._ledger.take(keys)
            stored = slots >= 0
            if not len(keys):
                return stored
            if stored.all():
                return self._write(keys, slots, data, rows)
            if stored.any():
                stored[stored] = self._write(keys[stored], slots[stored], data, rows[stored])
            return stored

    def _write(self, keys: np.ndarray, slots: np.ndarray, data: np.ndarray, rows: np.ndarray) -> np.ndarray:
        counts = self._counts
        sums = np.empty(len(keys), dtype=np.uint64)
        begin = perf_counter()
        try:
            moved = self._asked(self._medium.write, Batch(keys, slots, data, rows, sums))
        except BaseException:
            self._ledger.free(keys)  # which of them hold the new version is unknown
            raise
        self._ledger.sums[slots] = sums
        num_stored = int(np.count_nonzero(moved.outcome))
        if num_stored < len(keys):
            self._ledger.free(keys[~moved.outcome])
        counts["stored_units"] += num_stored
        counts["write_ops"] += moved.ops
        counts["bytes_written"] += moved.num_bytes
        counts["write_us"] += (perf_counter() - begin) * 1e6
        return moved.outcome

    def fetch(self, keys: np.ndarray, out: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        given, rows = rows, check_batch(self.unit_bytes, keys, out, rows)
        if given is not None and not are_distinct(rows):
            raise ValueError("a fetch names a row twice; which unit should it hold?")
        with self._lock:
            self._check_open()
            self._counts["read_batches"] += 1
            self._counts["requested_units"] += len(keys)
            slots = self._ledger.find(keys)
            hits = slots >= 0
            num_known = int(np.count_nonzero(hits))
            self._counts["missed_units"] += len(keys) - num_known
            if not num_known:
                return hits
            if num_known == len(keys):
                return self._read(keys, slots, out, rows)
            hits[hits] = self._read(keys[hits], slots[hits], out, rows[hits])
            return hits

    def _read(self, keys: np.ndarray, slots: np.ndarray, out: np.ndarray, rows: np.ndarray) -> np.ndarray:
        counts = self._counts
        sums = np.empty(len(keys), dtype=np.uint64)
        begin = perf_counter()
        try:
            moved = self._asked(self._medium.read, Batch(keys, slots, out, rows, sums))
        except BaseException:
            counts["missed_units"] += len(keys)
            raise
        hits: np.ndarray = (moved.outcome == FOUND) & (sums == self._ledger.sums[slots])
        num_hits = int(np.count_nonzero(hits))
        if num_hits < len(keys):
            self._ledger.free(keys[~hits])
            num_absent = int(np.count_nonzero(moved.outcome == ABSENT))
            counts["missed_units"] += len(keys) - num_hits
            counts["corrupt_units"] += len(keys) - num_hits - num_absent
        counts["hit_units"] += num_hits
        counts["read_ops"] += moved.ops
        counts["bytes_read"] += moved.num_bytes
        counts["bytes_useful"] += num_hits * self.unit_bytes
        counts["read_us"] += (perf_counter() - begin) * 1e6
        return hits

    def contains(self, keys: np.ndarray) -> np.ndarray:
        check_keys(keys)
        with self._lock:
            self._check_open()
            return self._of_stored(self._medium.holds, keys)

    def evict(self, keys: np.ndarray) -> np.ndarray:
        check_keys(keys)
        if not are_distinct(keys):
            raise ValueError("an evict names a key twice")
        with self._lock:
            self._check_open()
            gone = self._of_stored(self._medium.drop, keys)
            self._ledger.free(keys[gone])
            self._counts["evicted_units"] += int(np.count_nonzero(gone))
            return gone

    def _of_stored(self, question: Callable[[np.ndarray], np.ndarray], keys: np.ndarray) -> np.ndarray:
        """The medium's answer for stored keys, False for the others."""
        answer = self._ledger.find(keys) >= 0
        if answer.any():
            answer[answer] = self._asked(question, keys[answer])
        return answer

    def _asked(self, ask: Callable[[Question], Answer], question: Question) -> Answer:
        """The medium's answer. Counts its failures; while it hangs, it is not asked."""
        try:
            self._backoff.check()
            answer = ask(question)
        except StoreError as error:
            self._counts["errors"] += 1
            self._counts["timeouts"] += error.kind == "timeout"
            self._counts["skipped_batches"] += error.kind == "hanging"
            if error.kind == "timeout":
                self._backoff.timed_out(error)
            raise
        self._backoff.answered()
        return answer

    def keys(self) -> np.ndarray:
        """What is stored now, (K,) uint64."""
        with self._lock:
            return self._ledger.keys()

    def register(self, buffer: np.ndarray) -> None:
        if buffer.dtype != np.uint8 or not buffer.flags.c_contiguous:
            raise ValueError("register a C-contiguous uint8 array")
        with self._lock:
            self._check_open()
            self._medium.register(buffer)

    def stats(self) -> StoreStats:
        with self._lock:
            counts = self._counts | {"retries": self._medium.num_retries}
            return StoreStats(**counts)  # type: ignore[arg-type]

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._medium.close(self._ledger.keys())  # unlocked: a thread that it ends may be in `keys`

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the store is closed")
