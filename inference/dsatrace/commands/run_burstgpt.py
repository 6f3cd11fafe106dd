"""`run_burstgpt.py`: BurstGPT's arrivals through the traced model, on a real or a virtual clock.

python3 run_burstgpt.py --ckpt-path converted --burstgpt-csv BurstGPT_1.csv --limit 100 --serving continuous
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dsatrace.commands.interrupt import ends_by_signal
from dsatrace.commands.parser import CommandParser
from dsatrace.commands.run_arguments import (
    add_run_arguments,
    add_source_arguments,
    parse_run,
)
from dsatrace.commands.workload_run import ServingSettings, run_workload
from dsatrace.errors import exits_cleanly
from dsatrace.trace.config import add_trace_arguments
from dsatrace.workloads.burstgpt import BURSTGPT


@exits_cleanly
@ends_by_signal
def main(argv: Sequence[str] | None = None) -> int:
    """Serves the arrivals; returns the exit code."""
    args, argv = parse_run(_parser(), sys.argv[1:] if argv is None else list(argv))
    return run_workload(args, argv, BURSTGPT, ServingSettings(args.serving, args.clock))


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
    add = parser.add_argument_group("serving").add_argument
    add("--limit", type=int, help="requests (default: all)")
    add(
        "--serving",
        choices=("fifo-batch", "continuous"),
        default="fifo-batch",
        help="when to take requests: a new batch after the last has ended, or one whenever a place is free",
    )
    add(
        "--clock",
        choices=("virtual", "real"),
        default="virtual",
        help="skip the gaps, or sleep through them",
    )
    add_source_arguments(parser)
    BURSTGPT.add_flags(parser)
    add_trace_arguments(parser, always=True)
    return parser
