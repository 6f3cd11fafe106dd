"""What stores on a client library share: memory that the library addresses, and calls that end in time.

    memory = StagedMemory(unit_bytes, announce=lambda buffer: register(buffer.ctypes.data, buffer.nbytes))
    codes = memory.send(write, batch)      # `write` is a `Transfer`, see below

    caller = TimedCaller("mooncake", timeout_s=5.0)
    codes = caller.in_time(client.batch_remove, names)      # or StoreError, kind timeout

Registered memory is read and written in place, other memory through a copy of ours. A call that took
too long goes on in its thread, with the memory it was given: until it ends, no other call may begin
(`check_idle`). Knows neither the library nor what its codes mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

import numpy as np

from dsatrace.kv.stores.checked import Batch, parts
from dsatrace.kv.stores.checksums import copy_units, sum_units
from dsatrace.kv.stores.interface import StoreError

STAGING_BYTES = 16 << 20
MAX_UNITS = 1 << 14  # per call
Answer = TypeVar("Answer")

Transfer = Callable[[np.ndarray, np.ndarray, np.ndarray, bool], Sequence[int] | np.ndarray]
"""`transfer(keys, slots, addresses, direct)` moves unit i from or to `addresses[i]`; one code per unit.
`direct`: the addresses are in the caller's registered memory, not the staging memory."""


class StagedMemory:
    """Units in registered memory, else through staging memory, which no unfinished call may still use."""

    def __init__(self, unit_bytes: int, announce: Callable[[np.ndarray], None]) -> None:
        self._unit_bytes = unit_bytes
        self._announce = announce
        num_units = min(MAX_UNITS, max(1, STAGING_BYTES // unit_bytes))
        self._staging = np.empty((num_units, unit_bytes), dtype=np.uint8)
        self.buffers: list[np.ndarray] = []  # all that were announced, the staging memory first
        self.register(self._staging)

    def register(self, buffer: np.ndarray) -> None:
        self._announce(buffer)
        self.buffers.append(buffer)

    def send(self, write: Transfer, batch: Batch) -> np.ndarray:
        """Writes the batch; returns the codes, (N,) int64."""
        keys, slots, data, rows, sums = batch
        if self._is_registered(data):
            sum_units(data, rows, keys, sums)
            return self._in_place(write, batch)
        codes = np.empty(len(keys), dtype=np.int64)
        for part in parts(len(keys), len(self._staging)):
            staged = np.arange(len(keys[part]), dtype=np.int64)
            copy_units(data, rows[part], self._staging, staged, keys[part], sums[part])
            codes[part] = write(keys[part], slots[part], self._addresses(self._staging, staged), False)
        return codes

    def receive(self, read: Transfer, batch: Batch) -> np.ndarray:
        """Reads the batch; returns the codes, (N,) int64."""
        keys, slots, out, rows, sums = batch
        if self._is_registered(out):
            codes = self._in_place(read, batch)
            sum_units(out, rows, keys, sums)
            return codes
        codes = np.empty(len(keys), dtype=np.int64)
        for part in parts(len(keys), len(self._staging)):
            staged = np.arange(len(keys[part]), dtype=np.int64)
            codes[part] = read(keys[part], slots[part], self._addresses(self._staging, staged), False)
            copy_units(self._staging, staged, out, rows[part], keys[part], sums[part])
        return codes

    def _in_place(self, transfer: Transfer, batch: Batch) -> np.ndarray:
        codes = np.empty(len(batch.keys), dtype=np.int64)
        for part in parts(len(codes), MAX_UNITS):
            addresses = self._addresses(batch.buffer, batch.rows[part])
            codes[part] = transfer(batch.keys[part], batch.slots[part], addresses, True)
        return codes

    def _is_registered(self, buffer: np.ndarray) -> bool:
        begin, end = _span(buffer)
        return any(low <= begin and end <= high for low, high in map(_span, self.buffers[1:]))

    def _addresses(self, buffer: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return buffer.ctypes.data + rows * self._unit_bytes  # (N,) int64


def _span(buffer: np.ndarray) -> tuple[int, int]:
    return buffer.ctypes.data, buffer.ctypes.data + buffer.nbytes


class TimedCaller:
    """Makes one call at a time, in a separate thread; messages begin with `name`."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._unfinished: Future[Any] | None = None

    def in_time(self, call: Callable[..., Answer], *arguments: object) -> Answer:
        """Returns or raises what the call does; `StoreError` if it takes longer than `timeout_s`."""
        self.check_idle()
        future = self._unfinished = self._thread.submit(call, *arguments)
        try:
            answer: Answer = future.result(self._timeout_s)
            return answer
        except FutureTimeout:
            raise StoreError("timeout", f"{self._name}: no answer within {self._timeout_s:g} s") from None

    def check_idle(self) -> None:
        """Raises `StoreError` while a call that took too long is still running."""
        if not self.is_idle:
            raise StoreError("timeout", f"{self._name}: still busy with a call that took too long")

    @property
    def is_idle(self) -> bool:
        return self._unfinished is None or self._unfinished.done()

    def close(self) -> None:
        """Ends the thread; a call that is still running is abandoned."""
        self._thread.shutdown(wait=False)
