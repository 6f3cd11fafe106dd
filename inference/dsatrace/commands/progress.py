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
from typing import TYPE_CHECKING, TypeAlias

from dsatrace.units import size_text

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, Task
    from rich.text import Text


Advance = Callable[[int], None]
Columns: TypeAlias = "tuple[ProgressColumn, ...]"
_Bar = contextlib.AbstractContextManager[Advance]
LINE_INTERVAL_S = 30.0
"""Between lines off a terminal."""
_LARGE_BYTES = 1 << 30
"""Of which the first line is said at once."""


def bytes_bar(label: str, *paths: Path) -> _Bar:
    """Yields a function to be told how many more bytes were read; a missing file counts nothing."""
    return _advancing(label, sum(path.stat().st_size for path in paths if path.exists()), _byte_columns)


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


def amount_bar(label: str, total: int) -> _Bar:
    """Yields a function to be told how many more of `total` bytes were read.

    A bar on a terminal; off it a line now and then that says what was read and what is left, of a GiB or
    more from the first call on.
    """

    def text(done: int) -> str:
        return f"{label}: {size_text(done)} read, {size_text(max(total - done, 0))} left"

    return _advancing(label, total, _byte_columns, _lines(text, total >= _LARGE_BYTES))


def records_counter(label: str) -> _Bar:
    """Yields a function to be told how many more records were done; how many there are is not known.

    A counter on a terminal; off it a line now and then.
    """

    def columns() -> Columns:
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        text = TextColumn("{task.description}: {task.completed:,.0f} records")
        return SpinnerColumn(), text, TimeElapsedColumn()

    return _advancing(label, None, columns, _lines(lambda done: f"{label}: {done:,} records so far"))


def counted_bar(label: str, total: int, noun: str) -> _Bar:
    """Yields a function to be told how many more of `total` were done."""

    def columns() -> Columns:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

        text = TextColumn(f"{{task.completed:,.0f}} of {total:,} {noun}")
        return TextColumn("{task.description}"), BarColumn(), text, TimeRemainingColumn()

    return _advancing(label, total, columns)


def requests_bar(total: int | None, status: Callable[[], str]) -> _Bar:
    """Yields a function to be told how many more requests have ended; `status` describes those under way."""

    def columns() -> Columns:
        from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import ProgressColumn as Column
        from rich.text import Text as Shown

        class Status(Column):
            """Rendered as often as the bar is drawn, so that a long prefill is seen to move."""

            def render(self, task: Task) -> Text:
                return Shown(status())

        return BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), Status()

    of = "" if total is None else f" of {total}"
    lines = _lines(lambda done: f"requests: {done}{of} ended, {status()}")
    return _advancing("requests", total, columns, lines)


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


def _byte_columns() -> Columns:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    return TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()


@contextlib.contextmanager
def _advancing(
    label: str,
    total: int | None,
    columns: Callable[[], Columns],
    elsewhere: Advance = lambda amount: None,
) -> Iterator[Advance]:
    """A bar to be told of each advance; off a terminal `elsewhere` is told."""
    if not _is_watched():
        yield elsewhere
        return
    with _bar(label, total, *columns()) as update:
        yield lambda amount: update(advance=amount)


@contextlib.contextmanager
def _bar(label: str, total: int | None, *columns: ProgressColumn) -> Iterator[Callable[..., None]]:
    """Yields rich's `Progress.update` for one task."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield partial(progress.update, progress.add_task(label, total=total))
