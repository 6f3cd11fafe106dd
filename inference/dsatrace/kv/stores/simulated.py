"""A store with another one's times: the bytes are real, the latency is modelled.

A batch takes `alpha_batch + ops * alpha_op + bytes / bandwidth`, with the operations and bytes
that the wrapped store counted. Nothing waits for that long. `stats().latency_kind` says so.

    store = SimulatedStore(ram_store(41984, 1024), load_preset("pcie5-x16"))
"""

from __future__ import annotations

import dataclasses
import threading

import numpy as np

from dsatrace.kv.stores.interface import Store, StoreStats
from dsatrace.kv.stores.presets import Preset


class SimulatedStore:
    """See `Store`; calls go to `store`, which nobody else may use meanwhile."""

    def __init__(self, store: Store, preset: Preset) -> None:
        self.unit_bytes = store.unit_bytes
        self.capacity_units = store.capacity_units
        self.preset = preset
        self._store = store
        self._read_us = 0.0
        self._write_us = 0.0
        self._lock = threading.Lock()

    def put(self, keys: np.ndarray, data: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        with self._lock:
            before = self._store.stats()
            stored = self._store.put(keys, data, rows)
            done = self._store.stats() - before
            if done.write_ops:
                self._write_us += self.preset.write_us(done.write_ops, done.bytes_written)
        return stored

    def fetch(self, keys: np.ndarray, out: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        with self._lock:
            before = self._store.stats()
            hits = self._store.fetch(keys, out, rows)
            done = self._store.stats() - before
            if done.read_ops:
                self._read_us += self.preset.read_us(done.read_ops, done.bytes_read)
        return hits

    def contains(self, keys: np.ndarray) -> np.ndarray:
        return self._store.contains(keys)

    def evict(self, keys: np.ndarray) -> np.ndarray:
        return self._store.evict(keys)

    def register(self, buffer: np.ndarray) -> None:
        self._store.register(buffer)

    def stats(self) -> StoreStats:
        with self._lock:
            return dataclasses.replace(
                self._store.stats(),
                read_us=self._read_us,
                write_us=self._write_us,
                latency_kind="modelled",
            )

    def close(self) -> None:
        self._store.close()
