"""A store of units for the tests: a dictionary that counts what goes in and out."""

from __future__ import annotations

import numpy as np


class DictStore:
    """Holds `capacity` units at most; None: all."""

    def __init__(self, unit_bytes: int, capacity: int | None = None) -> None:
        self.unit_bytes = unit_bytes
        self.capacity = capacity
        self.units: dict[int, bytes] = {}
        self.fetches: list[list[int]] = []  # the keys of each batch
        self.puts: list[list[int]] = []
        self.bytes_read = 0
        self.bytes_written = 0

    def put(self, keys: np.ndarray, data: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        assert keys.dtype == np.uint64 and len(set(keys.tolist())) == len(keys) > 0
        self.puts.append(keys.tolist())
        rows = np.arange(len(keys)) if rows is None else rows
        return np.array([self._keep(int(key), data[row]) for key, row in zip(keys, rows, strict=True)])

    def _keep(self, key: int, unit: np.ndarray) -> bool:
        if key not in self.units and len(self.units) == self.capacity:
            return False
        self.units[key] = unit.tobytes()
        self.bytes_written += self.unit_bytes
        return True

    def fetch(self, keys: np.ndarray, out: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        assert keys.dtype == np.uint64 and len(keys) > 0
        self.fetches.append(keys.tolist())
        rows = np.arange(len(keys)) if rows is None else rows
        assert len(set(rows.tolist())) == len(rows)
        hits = np.array([int(key) in self.units for key in keys])
        out[rows[~hits]] = 0xFF  # a miss may leave anything; a NaN would show
        for key, row in zip(keys[hits], rows[hits], strict=True):
            out[row] = np.frombuffer(self.units[int(key)], dtype=np.uint8)
            self.bytes_read += self.unit_bytes
        return hits

    def register(self, buffer: np.ndarray) -> None:
        assert buffer.dtype == np.uint8 and buffer.flags.c_contiguous and buffer.shape[1] == self.unit_bytes
