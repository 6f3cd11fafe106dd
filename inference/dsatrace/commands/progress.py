"""Progress over the bytes of files or a count of records, where a person watches and `rich` is there.

Needs the standard library only, and shows nothing without rich or off a terminal.

    with bytes_bar("verify", path) as advance:
        advance(1 << 20)
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn


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
