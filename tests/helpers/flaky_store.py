"""A store for the tests that fails, forgets and refuses at random, as the contract allows."""

from __future__ import annotations

import random

import numpy as np

from dsatrace.kv.stores.interface import StoreError
from helpers.memory_store import MemoryStore


class FlakyStore(MemoryStore):
    """Does at random whatever the contract lets a store do to its user."""

    def __init__(self, unit_bytes: int, capacity_units: int | None, rng: random.Random, rate: float) -> None:
        super().__init__(unit_bytes, capacity_units)
        self.rng = rng
        self.rate = rate
        self.num_errors = 0

    def happens(self) -> bool:
        return self.rng.random() < self.rate

    def fail(self) -> None:
        self.num_errors += 1
        raise StoreError("timeout", f"failure {self.num_errors}")

    def lose(self, keys: np.ndarray) -> None:
        for key in keys.tolist():
            self._open_units().pop(key, None)

    def put(self, keys: np.ndarray, data: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        if self.happens():
            self.lose(keys)
            self.fail()
        stored = super().put(keys, data, rows) & np.array([not self.happens() for _ in keys], dtype=bool)
        self.lose(keys[~stored])
        return stored

    def fetch(self, keys: np.ndarray, out: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        self.lose(np.array([key for key in keys if self.happens()]))
        hits = super().fetch(keys, out, rows)
        rows = np.arange(len(keys)) if rows is None else rows
        if self.happens():
            out[rows] = 255
            self.fail()
        out[rows[~hits]] = 254
        return hits

    def evict(self, keys: np.ndarray) -> np.ndarray:
        if self.happens():
            self.fail()
        return super().evict(keys)
