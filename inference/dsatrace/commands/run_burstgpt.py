"""`run_burstgpt.py`: BurstGPT's arrivals through the traced model, on a real or a virtual clock.

python3 run_burstgpt.py --ckpt-path converted --burstgpt-csv BurstGPT_1.csv --limit 100 --serving continuous
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from dsatrace.commands.parser import CommandParser
from dsatrace.commands.run_arguments import (
    add_run_arguments,
    add_source_arguments,
    find,
    parse_run,
)
from dsatrace.commands.workload_run import Opened, Served, run_workload
from dsatrace.errors import exits_cleanly
from dsatrace.trace.config import add_trace_arguments
from dsatrace.workloads.burstgpt import Replay, read_burstgpt
from dsatrace.workloads.burstgpt_synthetic import BurstSettings, SyntheticPrompts, generate_burstgpt
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.served.burstgpt import BurstGPTWorkload

_GENERATOR_FLAGS = {
    "gap_shape": "shape of the Gamma distributed gaps; below 1 makes bursts",
    "gap_scale_s": "scale of the gaps, s; their mean is shape x scale",
    "zipf_exponent": "of the lengths",
    "max_request_tokens": "longest prompt",
    "max_response_tokens": "longest answer",
    "api_share": "share of rows without a session",
    "failure_share": "share of rows without a response; served with --keep-failures only",
}


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Serves the arrivals; returns the exit code."""
    args, argv = parse_run(_parser(), sys.argv[1:] if argv is None else list(argv))
    return run_workload(args, argv, "burstgpt", open_burstgpt, Served(args.serving, args.clock))


def open_burstgpt(args: argparse.Namespace, chat: Chat) -> Opened:
    """The log's arrivals, or generated ones, with prompts made up to their lengths."""
    bad_rows = BadRows(args.bad_rows)
    if args.burstgpt_generate:
        settings = _settings(args)
        rows, description = generate_burstgpt(settings), f"generator: {settings.text()}"
        said = f"BurstGPT-like arrivals from the {description}"
    else:
        source = find(args, "burstgpt", args.burstgpt_csv)
        rows, description, said = read_burstgpt(source.file, bad_rows), source.description, source.text()
    ordinary = chat.tokenizer.ordinary_ids
    workload = BurstGPTWorkload(
        Replay(rows, args.limit, keep_failures=args.keep_failures, time_scale=args.time_scale),
        SyntheticPrompts(ordinary.start, len(ordinary), args.shared_prefix_share, args.seed),
        bad_rows,
        args.max_new_tokens_cap,
        args.temperature,
    )
    return Opened(workload, description, said, args.limit)


def _settings(args: argparse.Namespace) -> BurstSettings:
    num_rows = {} if args.limit is None else {"num_rows": args.limit}
    return BurstSettings(
        seed=args.seed, **num_rows, **{name: getattr(args, name) for name in _GENERATOR_FLAGS}
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "run burstgpt",
        "Serve BurstGPT's arrivals, and trace what DSA reads.",
        script="run_burstgpt.py",
        examples="""
        %(prog)s --ckpt-path converted --burstgpt-csv BurstGPT_1.csv --limit 100
        %(prog)s --ckpt-path converted --limit 100 --serving continuous --clock real
        %(prog)s --runner simulator --burstgpt-generate --limit 1000
        """,
        allow_abbrev=False,  # the manifest hides the values of some flags, which it knows by name
    )
    add_run_arguments(parser)
    parser.set_defaults(thinking=False, chat_template=None)  # prompts are made up: nobody is talked to
    add = parser.add_argument_group("arrivals").add_argument
    add("--burstgpt-csv", type=Path, help="a BurstGPT file, of either layout")
    add("--limit", type=int, help="requests (default: all)")
    add("--max-new-tokens-cap", type=int, help="most tokens of an answer (default: as many as the log's)")
    add("--keep-failures", action="store_true", help="serve logged failures too, for one token")
    add("--time-scale", type=float, default=1.0, help="times every gap; 0 sends all at once")
    add(
        "--shared-prefix-share",
        type=float,
        default=0.5,
        help="share of a prompt that its session has in common",
    )
    add(
        "--serving",
        choices=("fifo-batch", "continuous"),
        default="fifo-batch",
        help="take a new batch when the last has ended, or a request as a place is free",
    )
    add(
        "--clock",
        choices=("virtual", "real"),
        default="virtual",
        help="skip the gaps, or sleep through them",
    )
    add_source_arguments(parser)
    group = parser.add_argument_group("generated arrivals")
    group.add_argument(
        "--burstgpt-generate", action="store_true", help="generate --limit arrivals, else 2000"
    )
    default = {field.name: field.default for field in dataclasses.fields(BurstSettings)}
    default["failure_share"] = 0.0  # so that --limit is what is served
    for name, meaning in _GENERATOR_FLAGS.items():
        value = default[name]
        group.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{meaning}")
    add_trace_arguments(parser, always=True)
    return parser
