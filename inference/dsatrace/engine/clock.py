"""The run's time, from its start: the world's own, or one that only steps and waiting move.

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
"""How long a clock sleeps at a time: whoever waits looks up this often, for Ctrl-C say."""


def to_ns(seconds: float) -> int:
    """The nearest whole nanosecond."""
    return round(seconds * NS_PER_S)


class Clock(Protocol):
    """What time it is for the engine. `now_ns` stands still between calls, so that everything
    decided on it is decided alike; under tensor parallel it is overwritten with rank 0's.

    `jumps`: several modelled steps may be taken as one.
    """

    now_ns: int
    jumps: bool

    def start(self) -> None:
        """The run starts now."""

    def advance(self, step_ns: int) -> None:
        """A step is done that took `step_ns`, measured or modelled."""

    def wait_until(self, time_ns: int) -> None:
        """Lets time pass, at most until `time_ns`; a caller that needs that time calls until it is."""


class VirtualClock:
    """Advances by the time of steps and jumps over gaps: a day of arrivals takes as long as its work."""

    jumps = True

    def __init__(self, start_s: float = 0.0) -> None:
        """`start_s` is what a resumed run has behind it."""
        self._start_ns = self.now_ns = to_ns(start_s)

    def start(self) -> None:
        self.now_ns = self._start_ns

    def advance(self, step_ns: int) -> None:
        self.now_ns += step_ns

    def wait_until(self, time_ns: int) -> None:
        self.now_ns = max(self.now_ns, time_ns)


class RealClock:
    """Wall time. Sleeps through gaps, and through what a modelled step has left of its time."""

    jumps = False

    def __init__(self, start_s: float = 0.0) -> None:
        """`start_s` is what a resumed run has behind it."""
        self._start_ns = to_ns(start_s)
        self.start()

    def start(self) -> None:
        self._zero_ns = time.perf_counter_ns() - self._start_ns
        self._read()

    def advance(self, step_ns: int) -> None:
        # Nothing is left of a step that was measured: it lies between the last look and now.
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
