"""Many requests or values of one length, as rows of an array: how batches get on and off the wire.

frames = Frames(b"*3\r\n$3\r\nSET\r\n", key_bytes=24, value_bytes=41984)
request = frames.filled(keys, data, rows)      # (N, frame bytes) uint8, N times SET
unpack(reply, begins, out, rows)               # the values found in a reply
"""

from __future__ import annotations

import numpy as np
from numba import njit


class Frames:
    """`start`, then a key and, if it has `value_bytes`, a value, as a server reads them."""

    def __init__(self, start: bytes, key_bytes: int, value_bytes: int = 0) -> None:
        key = b"$%d\r\n%s\r\n" % (key_bytes, bytes(key_bytes))
        value = b"$%d\r\n%s\r\n" % (value_bytes, bytes(value_bytes)) if value_bytes else b""
        self._template = np.frombuffer(start + key + value, dtype=np.uint8)
        self._frames = np.empty((0, len(self._template)), dtype=np.uint8)
        self._key_end = len(start + key) - 2
        self._value_begin = len(self._template) - value_bytes - 2

    def filled(
        self, keys: np.ndarray, data: np.ndarray | None = None, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """One frame for each of `keys`, (N, key_bytes) uint8, and of the values `data[rows]`.

        Returns (N, frame bytes) uint8, valid until the next call.
        """
        if len(self._frames) < len(keys):
            self._frames = np.tile(self._template, (len(keys), 1))
        frames = self._frames[: len(keys)]
        frames[:, self._key_end - keys.shape[1] : self._key_end] = keys
        if data is not None and rows is not None:
            _pack(data, rows, frames, self._value_begin)
        return frames


@njit("void(uint8[:,::1], int64[::1], uint8[:,::1], int64)", nogil=True, cache=True)
def _pack(data, rows, frames, value_begin):  # type: ignore[no-untyped-def]
    """`frames[i, value_begin:][:unit] = data[rows[i]]`."""
    for i in range(len(rows)):
        unit = data[rows[i]]
        place = frames[i, value_begin : value_begin + len(unit)]
        for j in range(len(unit)):
            place[j] = unit[j]


@njit("void(uint8[::1], int64[::1], uint8[:,::1], int64[::1])", nogil=True, cache=True)
def unpack(reply, begins, out, rows):  # type: ignore[no-untyped-def]
    """`out[rows[i]]` = the unit that begins at `reply[begins[i]]`."""
    for i in range(len(rows)):
        unit = out[rows[i]]
        value = reply[begins[i] : begins[i] + len(unit)]
        for j in range(len(unit)):
            unit[j] = value[j]
