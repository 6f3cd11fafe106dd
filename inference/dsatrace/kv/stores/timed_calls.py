"""Calls into a client library that cannot be broken off, ended in time all the same.

    caller = TimedCaller("mooncake", timeout_s=5.0)
    codes = caller.in_time(client.batch_remove, names)      # or StoreError, kind timeout

A call that took too long goes on in its thread, and the memory it was given with it: until it
ends there are no others.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from dsatrace.kv.stores.interface import StoreError

Answer = TypeVar("Answer")


class TimedCaller:
    """One call at a time, in a thread of its own; `name` stands before every message."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._unfinished: Future[Any] | None = None

    def in_time(self, call: Callable[..., Answer], *arguments: object) -> Answer:
        """What the call returns or raises; `StoreError` if that takes longer than `timeout_s`."""
        self.check_idle()
        future = self._unfinished = self._thread.submit(call, *arguments)
        try:
            return future.result(self._timeout_s)
        except FutureTimeout:
            raise StoreError("timeout", f"{self._name}: no answer within {self._timeout_s:g} s") from None

    def check_idle(self) -> None:
        """Raises `StoreError` while a call that took too long still goes on."""
        if not self.is_idle:
            raise StoreError("timeout", f"{self._name}: still busy with a call that took too long")

    @property
    def is_idle(self) -> bool:
        return self._unfinished is None or self._unfinished.done()

    def close(self) -> None:
        """No more calls; one that goes on is left to itself."""
        self._thread.shutdown(wait=False)
