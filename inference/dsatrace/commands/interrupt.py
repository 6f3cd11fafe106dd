"""Ctrl-C, SIGTERM and SIGHUP as a request: the step under way finishes first, so that files are left
whole and stores empty.

    @exits_cleanly
    @ends_by_signal                                   # SIGTERM and SIGHUP are a Ctrl-C
    def main(argv=None):
        with on_interrupt(engine.request_abort): ...  # and here all of them only ask
"""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from dsatrace.errors import is_rank_0, note_ending

_ENDINGS = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `action` instead of raising, SIGTERM and SIGHUP instead of killing, inside the block;
    main thread only."""
    with _on_signals((signal.SIGINT, *_ENDINGS), action):
        yield


@contextlib.contextmanager
def on_ending(action: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGHUP call `action` inside the block, Ctrl-C does what it did; main thread only."""
    with _on_signals(_ENDINGS, action):
        yield


def ends_by_signal(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a `main()` that writes a run: SIGTERM and SIGHUP raise `KeyboardInterrupt`, as Ctrl-C does, so
    that a file being replaced leaves no half of itself behind. Other ranks than 0 write nothing."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    @functools.wraps(main)
    def run(*args: object, **kwargs: object) -> int:
        if not is_rank_0():
            return main(*args, **kwargs)
        with on_ending(interrupt):
            return main(*args, **kwargs)

    return run


@contextlib.contextmanager
def _on_signals(numbers: Sequence[signal.Signals], action: Callable[[], None]) -> Iterator[None]:
    def handler(signum: int, frame: FrameType | None) -> None:
        if signum in _ENDINGS:
            note_ending()
        action()

    # `nohup` ignores SIGHUP, and so does what it starts.
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    with contextlib.ExitStack() as stack:
        for number in numbers:
            if number != signal.SIGHUP or not is_ignored:
                stack.callback(signal.signal, number, signal.signal(number, handler))
        yield
