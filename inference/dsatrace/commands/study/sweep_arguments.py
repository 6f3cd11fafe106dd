"""The flags that `sweep` and `mixed` share, and what they stand for."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from dsatrace.commands.arguments import add_bad_rows_argument
from dsatrace.errors import UserError
from dsatrace.study.requests import Order
from dsatrace.study.sweep import num_cores
from dsatrace.study.sweep_cells import SEMANTICS
from dsatrace.study.sweep_inputs import SeededOptions, Trace, first_conversations, limited
from dsatrace.study.tokenization import NamedVocabulary
from dsatrace.workloads.digests import file_sha256
from dsatrace.workloads.mixed import WORKLOADS
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.sharegpt import Conversation, ShareGPTLoader

ACCESSES_A_WORKER = 10_000_000
"""Starting a worker takes as long as replaying this many block accesses."""


def add_shared_arguments(parser: argparse.ArgumentParser, forms: Sequence[str]) -> None:
    """Source, filters, cache and output; defaults come from the dataclasses."""
    default = {field.name: field.default for field in dataclasses.fields(SeededOptions)}
    add = parser.add_argument_group("what is replayed").add_argument
    add(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        metavar="NAME",
        help=f"{', '.join(WORKLOADS)} (default: all)",
    )
    add("--data-path", type=Path, help="ShareGPT conversations for the chat workloads (default: made up)")
    add(
        "--trace-file",
        type=Path,
        help="a trace of any known kind, or the folder of `study run --write-accesses`",
    )
    add(
        "--num-requests",
        type=int,
        default=default["num_requests"],
        help="requests a seeded workload, conversations of chat_multi",
    )
    add("--max-conversations", type=int, default=1000, help="read from --data-path")
    add("--max-tokens", type=int, help="drop conversations with a request of more, answer included")
    add("--min-turns", type=int, default=1, help="drop conversations of fewer turns")
    add(
        "--arrival-rate",
        type=float,
        default=default["arrival_rate"],
        help="conversations a second: of each workload alone, of all in a mix",
    )
    add("--turn-delay", type=float, default=default["turn_delay"], help="seconds between turns")
    add("--order", choices=get_args(Order), default="arrival", help="of the replay")
    add("--seed", type=int, default=default["seed"], help="of arrivals and generators")
    add("--tokenizer", "--model", type=Path, help="tokenizer.json or its folder (default: a token a word)")
    add_bad_rows_argument(add)
    add = parser.add_argument_group("the cache").add_argument
    add(
        "--forms",
        default=forms,
        nargs="+",
        choices=("leaf", "flat"),
        metavar="FORM",
        help=f"leaf: evict no block that a cached one follows; flat: any ({' '.join(forms)})",
    )
    add("--concurrency", type=int, default=1, help="requests in flight, which hold their blocks")
    add(
        "--oversize",
        choices=("reject", "truncate"),
        default="reject",
        help="prompts longer than the cache",
    )
    add = parser.add_argument_group("running and output").add_argument
    add("--workers", type=int, help="processes (default: as many as pay, at most one a core)")
    add("--output-dir", type=Path, required=True, help="new or empty folder")
    add("--skip-visualization", action="store_true", help="no pictures")


def seeded_options(args: argparse.Namespace) -> SeededOptions:
    return SeededOptions(args.num_requests, args.arrival_rate, args.turn_delay, args.seed)


def check_source(args: argparse.Namespace) -> None:
    """Raises a `UserError` for flags that exclude each other."""
    if args.trace_file is not None and (args.data_path is not None or args.workloads is not None):
        raise UserError("--trace-file is a source by itself; leave out --data-path and --workloads")


def conversations(args: argparse.Namespace, bad_rows: BadRows) -> list[Conversation] | None:
    """Those of --data-path with turns enough, if it is given."""
    if args.data_path is None:
        return None
    loader = ShareGPTLoader(args.data_path, args.max_conversations, bad_rows=bad_rows)
    return first_conversations(loader, args.min_turns, str(args.data_path))


def filtered(trace: Trace, args: argparse.Namespace) -> tuple[Trace, dict[str, int]]:
    """The trace after --max-tokens and --min-turns, and how many conversations are left and were dropped."""
    min_turns = args.min_turns if args.trace_file is not None else 1  # else they were read so
    return limited(trace, args.max_tokens, min_turns, args.order)


def workers_for(args: argparse.Namespace, num_accesses: int) -> int:
    """`num_accesses` of all replays together."""
    if args.workers is not None:
        return int(args.workers)
    return max(1, min(num_cores(), num_accesses // ACCESSES_A_WORKER))


def manifest(
    args: argparse.Namespace, argv: list[str], study: str, vocabulary: NamedVocabulary, **more: Any
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
        "argv": argv,
        "sources": [
            {"path": str(path), **({"sha256": file_sha256(path)} if path.is_file() else {})} for path in files
        ]
        or ["synthetic: seeded generators"],
        "tokenizer": vocabulary.label,
        "settings": settings,
        "semantics": SEMANTICS,
        **more,
    }


@contextlib.contextmanager
def cells_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to be told the jobs done and all of them; shown where a person watches."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
