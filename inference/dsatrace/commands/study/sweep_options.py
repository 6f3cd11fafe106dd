"""The flags that `sweep` and `mixed` share, what they stand for, and what both verbs write and print."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dsatrace.commands.study import options
from dsatrace.errors import UserError
from dsatrace.flags import Flag, add_flags, values_of
from dsatrace.study.output_folder import OutputFolder
from dsatrace.study.prepare import DEFAULT_MAX_CONVERSATIONS, ClientSettings
from dsatrace.study.sweep import Form, SweepSettings, num_cores
from dsatrace.study.sweep_cells import SEMANTICS, Cell
from dsatrace.study.sweep_inputs import RequestLog, SeededSettings, first_conversations, limited
from dsatrace.study.tokenization import NamedVocabulary
from dsatrace.trace.manifest import redact_argv
from dsatrace.workloads.digests import file_sha256
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.sharegpt import Conversation, ShareGPTLoader
from dsatrace.workloads.synthetic import WORKLOADS

if TYPE_CHECKING:
    from dsatrace.report.grid import Grid

ACCESSES_PER_WORKER = 10_000_000
"""Starting a worker takes as long as replaying this many block accesses."""

SEEDED_FLAGS = {"num_requests": Flag("requests per seeded workload; of chat_multi, conversations")}
REQUEST_FLAGS = {
    name: (options.FILTER_FLAGS | options.CONVERSATION_FLAGS)[name]
    for name in ("max_tokens", "min_turns", "arrival_rate", "turn_delay", "order", "seed")
}
SWEEP_FLAGS = {
    "concurrency": options.CONCURRENCY,
    "oversize": Flag("prompts longer than the cache: reject them, or hold their first blocks"),
}
"""The fields of `SweepSettings` that have the same flag in both verbs."""


def add_shared_arguments(parser: argparse.ArgumentParser, forms: Sequence[Form]) -> None:
    """Source, filters, cache and output. `forms` are the verb's default."""
    add = parser.add_argument_group("requests (default: seeded workloads)").add_argument
    names = ", ".join(WORKLOADS)
    add("--workloads", nargs="+", choices=WORKLOADS, metavar="NAME", help=f"{names} (default: all)")
    options.add_file_arguments(add, ", or the folder of `study run --write-accesses`")
    add_flags(add, SeededSettings, SEEDED_FLAGS)
    text = f"conversations of --data-path, which the chat workloads take, or {options.ALL}"
    options.add_max_conversations(add, DEFAULT_MAX_CONVERSATIONS, text)
    add_flags(add, ClientSettings, REQUEST_FLAGS)
    options.add_reading_arguments(add)
    add = parser.add_argument_group("cache").add_argument
    add(
        "--forms",
        default=forms,
        nargs="+",
        choices=get_args(Form),
        metavar="FORM",
        help="leaf: evict no block that a cached one follows; flat: evict any",
    )
    add_flags(add, SweepSettings, SWEEP_FLAGS)
    add = parser.add_argument_group("running and output").add_argument
    add("--workers", type=int, help="processes (default: as many as pay, at most one per core)")
    add("--output-dir", type=Path, required=True, help="new or empty folder")
    options.add_skip_visualization(add)


def check_flags(args: argparse.Namespace) -> None:
    """Raises a `UserError` for flags that exclude each other, and for bad values of the filters."""
    if args.trace_file is not None and (args.data_path is not None or args.workloads is not None):
        raise UserError("--trace-file is a source by itself; leave out --data-path and --workloads")
    limit = options.given_limit(args.max_conversations)
    ClientSettings(max_conversations=limit, **values_of(args, REQUEST_FLAGS))
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers must be at least 1, not {args.workers}")


def seeded_settings(args: argparse.Namespace) -> SeededSettings:
    return SeededSettings(args.num_requests, args.arrival_rate, args.turn_delay, args.seed)


def conversations(args: argparse.Namespace, bad_rows: BadRows) -> list[Conversation] | None:
    """The conversations of --data-path that have enough turns; None without the flag."""
    if args.data_path is None:
        return None
    limit = options.given_limit(args.max_conversations)
    loader = ShareGPTLoader(args.data_path, limit, bad_rows=bad_rows)
    return first_conversations(loader, args.min_turns, str(args.data_path))


def filtered(log: RequestLog, args: argparse.Namespace) -> tuple[RequestLog, dict[str, int]]:
    """The log after --max-tokens and --min-turns, and how many conversations were kept and dropped."""
    min_turns = args.min_turns if args.trace_file is not None else 1  # `conversations` has applied it
    return limited(log, args.max_tokens, min_turns, args.order)


def workers_for(args: argparse.Namespace, num_accesses: int) -> int:
    """Processes for `num_accesses`, those of all replays together."""
    if args.workers is not None:
        return int(args.workers)
    return max(1, min(num_cores(), num_accesses // ACCESSES_PER_WORKER))


def manifest(
    args: argparse.Namespace, argv: Sequence[str], study: str, vocabulary: NamedVocabulary
) -> dict[str, Any]:
    """What the study is, before it runs."""
    files = [path for path in (args.data_path, args.trace_file) if path is not None]
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name != "output_dir"
    }
    return {
        "study": study,
        "argv": ["dsatrace", "study", study, *redact_argv(argv)],
        "sources": [
            {"path": str(path), **({"sha256": file_sha256(path)} if path.is_file() else {})} for path in files
        ]
        or ["synthetic: seeded generators"],
        "tokenizer": vocabulary.label,
        "settings": settings,
        "semantics": SEMANTICS,
    }


def write_cells(folder: OutputFolder, name: str, cells: Sequence[Cell], record: dict[str, Any]) -> None:
    """The cells as `name`.csv, and with the record as `name`.json."""
    rows = [cell.row() for cell in cells]
    folder.write_json(f"{name}.json", record | {"cells": rows})
    folder.write_csv(f"{name}.csv", list(rows[0]), (list(row.values()) for row in rows))


def show_cells(
    grids: Iterable[Grid], notes: Iterable[str], vocabulary: NamedVocabulary, folder: OutputFolder
) -> None:
    """Prints the tables, then a line per note, the tokenizer and the folder."""
    from dsatrace.report.grid import WIDE, show

    tokenizer = f"tokenizer, where there is text: {vocabulary.label['name']}"
    show((*grids, *notes, tokenizer, f"files: {folder.path}"), WIDE)


@contextlib.contextmanager
def cells_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to be told the jobs done and all of them; the bar shows if a person watches."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
