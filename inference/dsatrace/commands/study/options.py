"""The flags that the study's verbs share, and what they stand for.

One table per settings dataclass; types, defaults and choices are the dataclass's own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsatrace.commands.arguments import add_bad_rows_argument
from dsatrace.commands.parser import CommandParser
from dsatrace.commands.progress import records_counter
from dsatrace.errors import UserError
from dsatrace.flags import Flag, add_flags, values_of
from dsatrace.study.output_folder import OutputFolder, check_output, open_study
from dsatrace.study.prepare import ClientSettings
from dsatrace.study.run import StudySettings
from dsatrace.study.sources import Client, Source
from dsatrace.study.tokenization import open_vocabulary
from dsatrace.text import plain
from dsatrace.trace.manifest import redact_argv
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.synthetic import WORKLOADS
from dsatrace.workloads.trace_rows import MULTI_TURN, SINGLE_TURN

if TYPE_CHECKING:
    from dsatrace.report.grid import Grid

ALL = "all"

FILTER_FLAGS = {
    "max_tokens": Flag("drop conversations with a longer request, its answer included"),
    "min_turns": Flag("drop conversations with fewer turns"),
    "order": Flag("order of the requests"),
}
CONVERSATION_FLAGS = {
    "match_requests": Flag("lengthen the single-turn trace to as many requests as the multi-turn one"),
    "arrival_rate": Flag("conversations per second"),
    "use_poisson": Flag("equal gaps instead of Poisson arrivals", ("--fixed-arrivals",), negated=True),
    "turn_delay": Flag("seconds from turn to turn"),
    "seed": Flag("seed of arrivals and generators"),
}
"""They make requests of conversations, so a file of requests has no use for them. With `FILTER_FLAGS`
all fields of `ClientSettings` but `max_conversations`, whose flag also takes `all`."""

CONCURRENCY = Flag("requests in flight, which hold their blocks")

CACHE_FLAGS = {
    "block_size": Flag("tokens per block"),
    "num_blocks": Flag("usable blocks: vLLM's number less one (default: never full)"),
    "concurrency": CONCURRENCY,
    "prefix_caching": Flag("share no block", ("--no-prefix-caching",), negated=True),
    "free_order": Flag("new: free partial blocks first, as vLLM does since PR 42656; old: by release"),
    "schedule": Flag("in_order: one request after the other; continuous: steps with preemption"),
    "chunk_tokens": Flag("tokens of a prefill chunk"),
    "decode": Flag("end requests with their prompt: answers are not cached", ("--no-decode",), negated=True),
    "host_blocks": Flag("blocks of a host pool that takes what is evicted (default: no host pool)"),
}
"""The fields of `StudySettings`: all of them."""


def new_parser(verb: str, description: str, examples: str) -> argparse.ArgumentParser:
    return CommandParser(f"study {verb}", description, examples=examples, allow_abbrev=False)


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the requests come from, and which of them."""
    add = parser.add_argument_group("requests (default: the embedded sample)").add_argument
    add_file_arguments(add)
    add("--workload", choices=WORKLOADS, help="a seeded generator of --max-conversations conversations")
    limit = ClientSettings.max_conversations
    add_max_conversations(add, None, f"conversations, or {ALL} (default: {limit}; of a trace file {ALL})")
    add_flags(add, ClientSettings, FILTER_FLAGS)
    add_flags(_none_by_default(add), ClientSettings, CONVERSATION_FLAGS)
    add_reading_arguments(add)


def add_file_arguments(add: Callable[..., argparse.Action], more_traces: str = "") -> None:
    """The two kinds of file; `more_traces` names what else --trace-file takes."""
    add("--data-path", type=Path, metavar="FILE", help="ShareGPT conversations, JSON or JSON lines")
    add(
        "--trace-file",
        type=Path,
        metavar="FILE",
        help=f"requests as text, token ids or block ids (Mooncake, Bailian){more_traces}",
    )


def add_max_conversations(add: Callable[..., argparse.Action], default: int | None, text: str) -> None:
    add("--max-conversations", type=_count_or_all, metavar="N", default=default, help=text)


def add_reading_arguments(add: Callable[..., argparse.Action]) -> None:
    """How files are read."""
    add("--tokenizer", "--model", type=Path, help="tokenizer.json or its folder (default: a token per word)")
    add_bad_rows_argument(add)


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser.add_argument_group("cache").add_argument, StudySettings, CACHE_FLAGS)


def add_mode_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode",
        choices=(SINGLE_TURN, MULTI_TURN),
        default=MULTI_TURN,
        help="which trace of the conversations; a trace file is taken whole",
    )


def add_output_arguments(parser: argparse.ArgumentParser, file_help: str, *, pictures: bool = True) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", type=Path, help="new or empty folder (default: outputs/study_<verb>_<time>)")
    add("--output-file", help=f"name of {file_help}, inside the folder")
    if pictures:
        add_skip_visualization(add)
    add("--markdown", action="store_true", help="print tables as markdown, to paste into a report")


def add_skip_visualization(add: Callable[..., argparse.Action]) -> None:
    add("--skip-visualization", action="store_true", help="no pictures")


def settings_from_args(args: argparse.Namespace) -> StudySettings:
    """Raises a `UserError` for a bad value."""
    return StudySettings(**values_of(args, CACHE_FLAGS))


def given_limit(value: int | str | None) -> int | None:
    """What --max-conversations stands for: None for all."""
    return None if value in (ALL, None) else int(value)


@contextlib.contextmanager
def open_client(args: argparse.Namespace) -> Iterator[Client]:
    """The reader of the source that the flags name, with progress if a person watches."""
    source = Source(args.data_path, args.trace_file, args.workload)
    settings = _client_settings(args)
    with records_counter("tokenize requests") as advance:
        done = 0

        def progress(num_requests: int, _num_tokens: int) -> None:
            nonlocal done
            advance(num_requests - done if num_requests > done else num_requests)  # less: the next trace
            done = num_requests

        yield Client(source, settings, open_vocabulary(args.tokenizer), BadRows(args.bad_rows), progress)


def output_path(args: argparse.Namespace, verb: str) -> Path:
    """The study's folder; raises a `UserError` if it holds anything."""
    path = args.output_dir or Path("outputs") / f"study_{verb}_{time.strftime('%Y%m%d_%H%M%S')}"
    check_output(path)
    return path


def study_folder(
    path: Path, verb: str, argv: Iterable[str], client: Client, settings: StudySettings | None
) -> contextlib.AbstractContextManager[OutputFolder]:
    """The folder with its manifest: command line, source and settings."""
    manifest: dict[str, Any] = {"study": verb, "argv": redact_argv(argv), **client.describe()}
    if settings is not None:
        manifest["cache"] = dataclasses.asdict(settings)
    return open_study(path, manifest)


def show(grids: Iterable[Grid], as_markdown: bool) -> None:
    """Prints tables, for a terminal or as markdown."""
    from dsatrace.report.grid import WIDE
    from dsatrace.report.grid import show as show_in_terminal

    if as_markdown:
        for grid in grids:
            print(grid.markdown())
    else:
        show_in_terminal(grids, WIDE)


def say_what_was_read(client: Client) -> None:
    """Source, vocabulary, and what was dropped: nothing is left out silently."""
    source = client.source.describe()
    print(f"source: {source['kind']} {plain(source.get('path') or source.get('workload'))}")
    print(f"tokenizer: {plain(client.vocabulary.label['name'])}")
    for what, count in client.counts.items():
        print(f"{what}: {count:,}")
    if client.bad_rows.counts:
        print(plain(client.bad_rows.text()))


def _client_settings(args: argparse.Namespace) -> ClientSettings:
    given = [name for name, flag in CONVERSATION_FLAGS.items() if getattr(args, flag.dest(name)) is not None]
    limit = given_limit(args.max_conversations)
    if args.trace_file is not None and given:
        flag = CONVERSATION_FLAGS[given[0]].option_strings(given[0])[0]
        raise UserError(f"{flag} makes a trace of conversations; a trace file has its own requests and times")
    if args.trace_file is None and args.max_conversations is None:
        limit = ClientSettings.max_conversations
    values = values_of(args, FILTER_FLAGS)
    values |= values_of(args, {name: CONVERSATION_FLAGS[name] for name in given})
    return ClientSettings(max_conversations=limit, **values)


def _none_by_default(add: Callable[..., argparse.Action]) -> Callable[..., argparse.Action]:
    """An `add` whose flags are None unless they are given; the default stands in their help."""

    def add_flag(*names: str, **options: Any) -> argparse.Action:
        default = options.pop("default", None)
        if default is not None:
            options["help"] += f" (default: {default})"
        return add(*names, default=None, **options)

    return add_flag


def _count_or_all(text: str) -> int | str:
    return ALL if text == ALL else int(text)
