"""Progress over the bytes of files, weights, a count of records or of requests.

Needs the standard library only. Without rich or off a terminal, bytes show nothing, and records
and requests a line now and then, since a run may take days under nohup.

    with bytes_bar("verify", path) as advance:
        advance(1 << 20)
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsatrace.units import size_text

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, Task
    from rich.text import Text


Advance = Callable[[int], None]
LINE_INTERVAL_S = 30.0
"""Between lines off a terminal."""
_LARGE_BYTES = 1 << 30
"""Of which the first line is said at once."""


@contextlib.contextmanager
def bytes_bar(label: str, *paths: Path) -> Iterator[Advance]:
    """Yields a function to be told how many more bytes were read; a missing file counts nothing."""
    if not _is_watched():
        yield lambda amount: None
        return
    total = sum(path.stat().st_size for path in paths if path.exists())
    with _bar(label, total, *_byte_columns()) as update:
        yield lambda amount: update(advance=amount)


@contextlib.contextmanager
def totals_bar(
    label: str, *, shown: bool = True, elsewhere: str | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to be told (bytes done, bytes in all).

    A bar on a terminal; off it the line `elsewhere`, where `{}` is the size. Nothing unless `shown`.
    """
    if shown and _is_watched():
        with _bar(label, None, *_byte_columns()) as update:
            yield lambda done, total: update(completed=done, total=total)
        return
    lines = [elsewhere] if shown and elsewhere else []

    def say_once(_done: int, total: int) -> None:
        if lines:
            print(lines.pop().format(size_text(total)), file=sys.stderr, flush=True)

    yield say_once


@contextlib.contextmanager
def amount_bar(label: str, total: int) -> Iterator[Advance]:
    """Yields a function to be told how many more of `total` bytes were read.

    A bar on a terminal; off it a line now and then that says what was read and what is left, of a GiB or
    more from the first call on.
    """
    if _is_watched():
        with _bar(label, total, *_byte_columns()) as update:
            yield lambda amount: update(advance=amount)
        return
    yield _lines(
        lambda done: f"{label}: {size_text(done)} read, {size_text(max(total - done, 0))} left",
        total >= _LARGE_BYTES,
    )


@contextlib.contextmanager
def records_counter(label: str) -> Iterator[Advance]:
    """Yields a function to be told how many more records were done; how many there are is not known.

    A counter on a terminal; off it a line now and then.
    """
    if not _is_watched():
        yield _lines(lambda done: f"{label}: {done:,} records so far")
        return
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}: {task.completed:,.0f} records")
    with _bar(label, None, SpinnerColumn(), text, TimeElapsedColumn()) as update:
        yield lambda amount: update(advance=amount)


@contextlib.contextmanager
def counted_bar(label: str, total: int, noun: str) -> Iterator[Advance]:
    """Yields a function to be told how many more of `total` were done."""
    if not _is_watched():
        yield lambda amount: None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    text = TextColumn(f"{{task.completed:,.0f}} of {total:,} {noun}")
    columns = (TextColumn("{task.description}"), BarColumn(), text, TimeRemainingColumn())
    with _bar(label, total, *columns) as update:
        yield lambda amount: update(advance=amount)


@contextlib.contextmanager
def requests_bar(total: int | None, status: Callable[[], str]) -> Iterator[Advance]:
    """Yields a function to be told how many more requests have ended; `status` describes those under way."""
    if not _is_watched():
        yield _LinesOfRequests(total, status).advance
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import ProgressColumn as Column
    from rich.text import Text as Shown

    class Status(Column):
        """Rendered as often as the bar is drawn, so that a long prefill is seen to move."""

        def render(self, task: Task) -> Text:
            return Shown(status())

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), Status())
    with _bar("requests", total, *columns) as update:
        yield lambda amount: update(advance=amount)


class _LinesOfRequests:
    """A line on stderr whenever a request has ended and the last line is old enough."""

    def __init__(self, total: int | None, status: Callable[[], str]) -> None:
        self._of = "" if total is None else f"/{total}"
        self._status = status
        self._done = 0
        self._said = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        if time.monotonic() >= self._said + LINE_INTERVAL_S:
            self._said = time.monotonic()
            print(f"{self._done}{self._of} requests, {self._status()}", file=sys.stderr)


def _lines(text: Callable[[int], str], at_once: bool = False) -> Advance:
    """Says now and then what `text` makes of the amount so far, `at_once` the first time."""
    done, said = 0, -math.inf if at_once else time.monotonic()

    def advance(amount: int) -> None:
        nonlocal done, said
        done += amount
        if time.monotonic() >= said + LINE_INTERVAL_S:
            said = time.monotonic()
            print(text(done), file=sys.stderr, flush=True)

    return advance


def _is_watched() -> bool:
    return sys.stderr.isatty() and importlib.util.find_spec("rich") is not None


def _byte_columns() -> tuple[ProgressColumn, ...]:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    return TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()


@contextlib.contextmanager
def _bar(label: str, total: int | None, *columns: ProgressColumn) -> Iterator[Callable[..., None]]:
    """Yields rich's `Progress.update` for one task."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield partial(progress.update, progress.add_task(label, total=total))
