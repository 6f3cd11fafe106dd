"""Progress over the bytes of files, weights, a count of records or of requests.

Needs the standard library only. Without rich or off a terminal, bytes and records show
nothing, and requests a line now and then, since a run of them may take days under nohup.

    with bytes_bar("verify", path) as advance:
        advance(1 << 20)
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dsatrace.units import size_text

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, Task
    from rich.text import Text


Advance = Callable[[int], None]


@contextlib.contextmanager
def bytes_bar(label: str, *paths: Path) -> Iterator[Advance]:
    """Yields a function to be told how many more bytes were read; a missing file counts nothing."""
    if not _is_watched():
        yield _nothing
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    total = sum(path.stat().st_size for path in paths if path.exists())
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with _shown(label, total, *columns) as advance:
        yield advance


@contextlib.contextmanager
def records_counter(label: str) -> Iterator[Advance]:
    """Yields a function to be told how many more records were done; how many there are is not known."""
    if not _is_watched():
        yield _nothing
        return
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}: {task.completed:,.0f} records")
    with _shown(label, None, SpinnerColumn(), text, TimeElapsedColumn()) as advance:
        yield advance


@contextlib.contextmanager
def requests_bar(total: int | None, status: Callable[[], str]) -> Iterator[Advance]:
    """Yields a function to be told how many more requests have ended; `status` says what goes on now."""
    if not _is_watched():
        yield _LinesOfRequests(total, status).advance
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import ProgressColumn as Column
    from rich.text import Text as Shown

    class Status(Column):
        """Asked for as often as the bar is drawn, so that a long prefill is seen to move."""

        def render(self, task: Task) -> Text:
            return Shown(status())

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), Status())
    with _shown("requests", total, *columns) as advance:
        yield advance


class _LinesOfRequests:
    """A line on stderr whenever a request has ended and the last line is old enough."""

    INTERVAL_S = 30.0

    def __init__(self, total: int | None, status: Callable[[], str]) -> None:
        self._of = "" if total is None else f"/{total}"
        self._status = status
        self._done = 0
        self._said = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        if time.monotonic() >= self._said + self.INTERVAL_S:
            self._said = time.monotonic()
            print(f"{self._done}{self._of} requests, {self._status()}", file=sys.stderr)


@contextlib.contextmanager
def weights_bar(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to be told (bytes done, bytes in all) while weights load.

    A bar on a terminal, one line elsewhere, nothing unless `shown`.
    """
    if not (shown and _is_watched()):
        said = not shown

        def say_once(_done: int, total: int) -> None:
            nonlocal said
            if not said:
                print(f"loading {size_text(total)} of weights ...", file=sys.stderr, flush=True)
                said = True

        yield say_once
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading weights", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _is_watched() -> bool:
    return sys.stderr.isatty() and importlib.util.find_spec("rich") is not None


def _nothing(amount: int) -> None:
    """Nobody watches."""


@contextlib.contextmanager
def _shown(label: str, total: int | None, *columns: ProgressColumn) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda amount: progress.advance(task, amount)
