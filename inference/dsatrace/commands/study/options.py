"""The flags that the study's verbs share, and what they stand for.

Defaults come from the dataclasses that hold them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsatrace.commands.arguments import add_bad_rows_argument
from dsatrace.commands.parser import CommandParser
from dsatrace.commands.progress import records_counter
from dsatrace.errors import UserError
from dsatrace.study.output_folder import OutputFolder, check_output, open_study
from dsatrace.study.prepare import ClientOptions
from dsatrace.study.run import StudySettings
from dsatrace.study.sources import Client, Source
from dsatrace.study.tokenization import open_vocabulary
from dsatrace.trace.manifest import redact_argv
from dsatrace.workloads.mixed import WORKLOADS
from dsatrace.workloads.rows import BadRows

if TYPE_CHECKING:
    from dsatrace.report.grid import Grid

NOT_FOR_TRACES = ("arrival_rate", "turn_delay", "seed", "match_requests", "fixed_arrivals")
ALL = "all"
CONSOLE_WIDTH = 120


def new_parser(verb: str, description: str, examples: str) -> argparse.ArgumentParser:
    return CommandParser(f"study {verb}", description, examples=examples, allow_abbrev=False)


def add_client_arguments(parser: argparse.ArgumentParser, *, min_turns: int = 1) -> None:
    """Where the requests come from, and which of them."""
    default = {field.name: field.default for field in dataclasses.fields(ClientOptions)}
    group = parser.add_argument_group("requests (the embedded sample, unless a source is given)")
    add = group.add_argument
    add("--data-path", type=Path, help="conversations as ShareGPT has them, JSON or JSON lines")
    add("--trace-file", type=Path, help="a request trace: text, token ids, or block ids (Mooncake, Bailian)")
    add("--workload", choices=WORKLOADS, help="a seeded generator of --max-conversations conversations")
    add(
        "--max-conversations",
        type=_count_or_all,
        help=f"conversations, or {ALL} (default: {default['max_conversations']}; of a trace file {ALL})",
    )
    add("--max-tokens", type=int, help="drop conversations with a longer request, answer included")
    add("--min-turns", type=int, default=min_turns, help="drop those with fewer turns")
    add(
        "--match-requests",
        action="store_true",
        default=None,
        help="as many single-turn requests as multi-turn",
    )
    add("--order", choices=("arrival", "conversation"), default=default["order"], help="of the requests")
    add("--arrival-rate", type=float, help=f"conversations a second (default: {default['arrival_rate']:g})")
    add("--fixed-arrivals", action="store_true", default=None, help="equal gaps instead of Poisson arrivals")
    add("--turn-delay", type=float, help=f"seconds from turn to turn (default: {default['turn_delay']:g})")
    add("--seed", type=int, help=f"of arrivals and generators (default: {default['seed']})")
    add("--tokenizer", "--model", type=Path, help="tokenizer.json or its folder (default: a token a word)")
    add_bad_rows_argument(add)


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """The cache; defaults are those of `StudySettings`."""
    default = {field.name: field.default for field in dataclasses.fields(StudySettings)}
    add = parser.add_argument_group("cache").add_argument
    add("--block-size", type=int, default=default["block_size"], help="tokens")
    add("--num-blocks", type=int, help="usable blocks: vLLM's number less one (default: never full)")
    add("--concurrency", type=int, default=default["concurrency"], help="live requests")
    add("--no-prefix-caching", action="store_true", help="share nothing")
    add("--free-order", choices=("new", "old"), default=default["free_order"],
        help="partial blocks first, as vLLM does since PR 42656, or by release")  # fmt: skip
    add("--schedule", choices=("in_order", "continuous"), default=default["schedule"],
        help="one request after the other, or steps with preemption")  # fmt: skip
    add("--chunk-tokens", type=int, default=default["chunk_tokens"], help="prefill chunk")
    add("--no-decode", action="store_true", help="requests end with their prompt: answers are not cached")
    add("--host-blocks", type=int, help="a host pool of so many blocks takes what is evicted (default: none)")


def add_output_arguments(parser: argparse.ArgumentParser, file_help: str, *, pictures: bool = True) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", type=Path, help="a new or empty folder (default: outputs/study_<verb>_<time>)")
    add("--output-file", help=f"name of {file_help}, inside the folder")
    if pictures:
        add("--skip-visualization", action="store_true", help="no pictures")
    add("--markdown", action="store_true", help="print tables as markdown, to paste into a report")


def settings_from_args(args: argparse.Namespace) -> StudySettings:
    """Raises a `UserError` for a bad value."""
    return StudySettings(
        block_size=args.block_size,
        num_blocks=args.num_blocks,
        concurrency=args.concurrency,
        prefix_caching=not args.no_prefix_caching,
        free_order=args.free_order,
        schedule=args.schedule,
        chunk_tokens=args.chunk_tokens,
        decode=not args.no_decode,
        host_blocks=args.host_blocks,
    )


@contextlib.contextmanager
def open_client(args: argparse.Namespace) -> Iterator[Client]:
    """The reader of the source that the flags name, with progress where a person watches."""
    if args.trace_file is not None:
        given = [name for name in NOT_FOR_TRACES if getattr(args, name) is not None]
        if given:
            flag = f"--{given[0].replace('_', '-')}"
            raise UserError(
                f"{flag} makes a trace of conversations; a trace file has its own requests and times"
            )
    source = Source(args.data_path, args.trace_file, args.workload)
    options = _client_options(args)
    with records_counter("tokenize requests") as advance:
        done = 0

        def progress(num_requests: int, _num_tokens: int) -> None:
            nonlocal done
            advance(num_requests - done if num_requests > done else num_requests)
            done = num_requests

        yield Client(source, options, open_vocabulary(args.tokenizer), BadRows(args.bad_rows), progress)


def output_path(args: argparse.Namespace, verb: str) -> Path:
    """The study's folder; raises a `UserError` if it holds anything."""
    path = args.output_dir or Path("outputs") / f"study_{verb}_{time.strftime('%Y%m%d_%H%M%S')}"
    check_output(path)
    return path


def study_folder(
    path: Path, verb: str, argv: Iterable[str], client: Client, settings: StudySettings | None
) -> contextlib.AbstractContextManager[OutputFolder]:
    """The folder with its manifest: what was asked, of what source, with which settings."""
    manifest: dict[str, Any] = {"study": verb, "argv": redact_argv(argv), **client.describe()}
    if settings is not None:
        manifest["cache"] = dataclasses.asdict(settings)
    return open_study(path, manifest)


def show(grids: Iterable[Grid], as_markdown: bool) -> None:
    """Prints tables, for a terminal or as markdown."""
    from rich.console import Console

    console = Console(width=CONSOLE_WIDTH)
    for grid in grids:
        if as_markdown:
            print(grid.markdown())
        else:
            console.print(grid)


def say_what_was_read(client: Client) -> None:
    """Source, vocabulary, and what was dropped: nothing is left out silently."""
    source = client.source.describe()
    print(f"source: {source['kind']} {source.get('path') or source.get('workload')}")
    print(f"tokenizer: {client.vocabulary.label['name']}")
    for what, count in client.counts.items():
        print(f"{what}: {count:,}")
    if client.bad_rows.counts:
        print(client.bad_rows.text())


def _client_options(args: argparse.Namespace) -> ClientOptions:
    limit = args.max_conversations
    if limit is None:
        limit = ALL if args.trace_file is not None else ClientOptions.max_conversations
    values = {
        "max_conversations": None if limit == ALL else limit,
        "max_tokens": args.max_tokens,
        "min_turns": args.min_turns,
        "match_requests": args.match_requests,
        "order": args.order,
        "arrival_rate": args.arrival_rate,
        "use_poisson": None if args.fixed_arrivals is None else False,
        "turn_delay": args.turn_delay,
        "seed": args.seed,
    }
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f"--max-tokens must be at least 1, not {args.max_tokens}")
    chosen = {name: value for name, value in values.items() if value is not None}
    return ClientOptions(**{"max_conversations": None, **chosen})


def _count_or_all(text: str) -> int | str:
    return ALL if text == ALL else int(text)
