"""The time since the run's start: wall time, or one that only steps and waiting move.

Counted in whole nanoseconds, so that many short steps add up to exactly one long one and
every rank can hold the same number. Knows no request and no step.

    clock = VirtualClock()
    clock.advance(20_000_000)         # a step took 20 ms
    clock.wait_until(to_ns(3600.0))   # nothing to do for an hour: now it is later
"""

from __future__ import annotations

import time
from typing import Protocol

NS_PER_S = 1_000_000_000
MAX_SLEEP_NS = NS_PER_S // 10
"""How long a clock sleeps at a time, so that its caller can look for Ctrl-C in between."""


def to_ns(seconds: float) -> int:
    """The nearest whole nanosecond."""
    return round(seconds * NS_PER_S)


class Clock(Protocol):
    """The engine's time. `now_ns` stands still between calls, so that every decision of a step sees the
    same time; under tensor parallel it is overwritten with rank 0's.

    `jumps`: several modelled steps may be taken as one.
    """

    now_ns: int
    jumps: bool

    def start(self) -> None:
        """The run starts now."""

    def advance(self, step_ns: int) -> None:
        """A step is done that took `step_ns`, measured or modelled."""

    def wait_until(self, time_ns: int) -> None:
        """Lets time pass, at most until `time_ns`; it may return before, so call it again."""


class VirtualClock:
    """Advances by the time of steps and jumps over gaps."""

    jumps = True

    def __init__(self, start_s: float = 0.0) -> None:
        """`start_s`: seconds that a resumed run has behind it."""
        self._start_ns = self.now_ns = to_ns(start_s)

    def start(self) -> None:
        self.now_ns = self._start_ns

    def advance(self, step_ns: int) -> None:
        self.now_ns += step_ns

    def wait_until(self, time_ns: int) -> None:
        self.now_ns = max(self.now_ns, time_ns)


class RealClock:
    """Wall time. Sleeps through gaps, and until a modelled step is over."""

    jumps = False

    def __init__(self, start_s: float = 0.0) -> None:
        """`start_s`: seconds that a resumed run has behind it."""
        self._start_ns = to_ns(start_s)
        self.start()

    def start(self) -> None:
        self._zero_ns = time.perf_counter_ns() - self._start_ns
        self._read()

    def advance(self, step_ns: int) -> None:
        # A measured step needs no sleep: it lies between the last look and now.
        self._sleep(self._read_at_ns + step_ns - time.perf_counter_ns())

    def wait_until(self, time_ns: int) -> None:
        self._read()
        self._sleep(min(time_ns - self.now_ns, MAX_SLEEP_NS))

    def _read(self) -> None:
        self._read_at_ns = time.perf_counter_ns()
        self.now_ns = self._read_at_ns - self._zero_ns

    def _sleep(self, duration_ns: int) -> None:
        if duration_ns > 0:
            time.sleep(duration_ns / NS_PER_S)
        self._read()
