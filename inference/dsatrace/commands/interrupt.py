"""Ctrl-C as a request, which the step under way may finish.

with on_interrupt(engine.request_abort): ...
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `action` instead of raising, inside the block; main thread only."""

    def handler(signum: int, frame: FrameType | None) -> None:
        action()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
