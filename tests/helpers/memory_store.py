"""The plain store: a dictionary. What the contract means, in the fewest words; the stores
are tested against it.

    store = MemoryStore(unit_bytes=656, capacity_units=100)
"""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np

from dsatrace.kv.stores.interface import StoreStats, are_distinct, check_batch, check_keys


class MemoryStore:
    """See `Store`. An operation is one unit; time is not taken."""

    def __init__(self, unit_bytes: int, capacity_units: int | None = None) -> None:
        self.unit_bytes = unit_bytes
        self.capacity_units = capacity_units
        self._units: dict[int, bytes] | None = {}
        self._counts: Counter[str] = Counter()  # fields of `StoreStats`
        self._lock = threading.RLock()

    def put(self, keys: np.ndarray, data: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        rows = check_batch(self.unit_bytes, keys, data, rows)
        if not are_distinct(keys):
            raise ValueError("a put names a key twice")
        with self._lock:
            units = self._open_units()
            pairs = zip(keys.tolist(), rows, strict=True)
            stored = [self._keep(units, key, data[row].tobytes()) for key, row in pairs]
            self._counts["write_batches"] += 1
            self._counts["put_units"] += len(keys)
            self._counts["stored_units"] += sum(stored)
        return np.array(stored, dtype=bool)

    def _keep(self, units: dict[int, bytes], key: int, unit: bytes) -> bool:
        if key not in units and len(units) == self.capacity_units:
            return False
        units[key] = unit
        return True

    def fetch(self, keys: np.ndarray, out: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        rows = check_batch(self.unit_bytes, keys, out, rows)
        if not are_distinct(rows):
            raise ValueError("a fetch names a row twice")
        with self._lock:
            hits = self.contains(keys)
            for key, row in zip(keys[hits], rows[hits], strict=True):
                out[row] = np.frombuffer(self._open_units()[int(key)], dtype=np.uint8)
            self._counts["read_batches"] += 1
            self._counts["requested_units"] += len(keys)
            self._counts["hit_units"] += int(hits.sum())
        return hits

    def contains(self, keys: np.ndarray) -> np.ndarray:
        check_keys(keys)
        with self._lock:
            units = self._open_units()
            return np.array([int(key) in units for key in keys], dtype=bool)

    def evict(self, keys: np.ndarray) -> np.ndarray:
        check_keys(keys)
        if not are_distinct(keys):
            raise ValueError("an evict names a key twice")
        with self._lock:
            units = self._open_units()
            gone = [units.pop(int(key), None) is not None for key in keys]
            self._counts["evicted_units"] += sum(gone)
        return np.array(gone, dtype=bool)

    def register(self, buffer: np.ndarray) -> None:
        self._open_units()

    def stats(self) -> StoreStats:
        with self._lock:
            hits, stored = self._counts["hit_units"], self._counts["stored_units"]
            return StoreStats(
                **self._counts,
                missed_units=self._counts["requested_units"] - hits,
                read_ops=hits,
                bytes_read=hits * self.unit_bytes,
                bytes_useful=hits * self.unit_bytes,
                write_ops=stored,
                bytes_written=stored * self.unit_bytes,
                latency_kind="none",
            )

    def close(self) -> None:
        with self._lock:
            self._units = None

    def _open_units(self) -> dict[int, bytes]:
        if self._units is None:
            raise ValueError("the store is closed")
        return self._units
