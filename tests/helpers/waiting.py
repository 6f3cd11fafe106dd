"""Waiting for something to happen, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

LIMIT_S = 600.0
"""Only what hangs takes so long."""


def until(holds: Callable[[], object]) -> None:
    """Waits until it holds."""
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


class Clock:
    """Stands for a module's `time`: a test moves it on, and so does each look at it, by `tick`."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now = 1000.0
        self._tick = tick

    def monotonic(self) -> float:
        self.now += self._tick
        return self.now


def until_asleep(pid: int) -> None:
    """Waits until the process's main thread sleeps, as in `input()`, and goes on sleeping."""
    stat = Path(f"/proc/{pid}/task/{pid}/stat")
    seen: list[bool] = []

    def is_asleep() -> bool:
        seen.append(stat.read_text().rpartition(")")[2].split()[0] == "S")
        return len(seen) >= 20 and all(seen[-20:])

    until(is_asleep)
