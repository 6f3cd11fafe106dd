"""Ctrl-C and SIGTERM as a request: the step under way finishes first, so that files are left whole
and stores empty.

with on_interrupt(engine.request_abort): ...
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `action` instead of raising, SIGTERM instead of killing, inside the block; main
    thread only."""
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.enter_context(on_signal(number, action))
        yield


@contextlib.contextmanager
def on_signal(number: signal.Signals, action: Callable[[], None]) -> Iterator[None]:
    """The signal calls `action` inside the block; main thread only."""

    def handler(signum: int, frame: FrameType | None) -> None:
        action()

    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)
