"""`run_dataset.py`: a data set through the traced model, all requests there from the start.

python3 run_dataset.py --ckpt-path converted --config config_tiny.json --dataset ruler --limit 10
torchrun --nproc-per-node 8 run_dataset.py --ckpt-path ... --config ... --dataset longbenchv2 --limit 20
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dsatrace.commands.interrupt import ends_by_signal
from dsatrace.commands.parser import CommandParser
from dsatrace.commands.run_arguments import (
    add_chat_arguments,
    add_run_arguments,
    add_source_arguments,
    parse_run,
)
from dsatrace.commands.workload_run import run_workload
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.trace.config import add_trace_arguments
from dsatrace.workloads.catalog import DATA_SETS
from dsatrace.workloads.data_set import DataSet


@exits_cleanly
@ends_by_signal
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the data set; returns the exit code."""
    parser = _parser()
    args, argv = parse_run(parser, sys.argv[1:] if argv is None else list(argv))
    data_set = DATA_SETS[args.dataset]
    if args.split not in (None, *data_set.splits):
        raise UserError(f"--split {args.split}: {args.dataset} has {' or '.join(data_set.splits)} only")
    for name, other in _served().items():
        for flag in other.flags if name != args.dataset else ():
            if getattr(args, flag.attribute) != parser.get_default(flag.attribute):
                raise UserError(f"{flag.name} belongs to --dataset {name}, not {args.dataset}; leave it out")
    return run_workload(args, argv, data_set)


def _served() -> dict[str, DataSet]:
    """The data sets whose requests are all there from the start."""
    return {name: data_set for name, data_set in DATA_SETS.items() if not data_set.arrivals}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "run DATASET",
        "Run a data set through the model, and trace what DSA reads.",
        script="run_dataset.py",
        examples="""
        dsatrace run ruler --ckpt-path converted --limit 10
        dsatrace run sharegpt --ckpt-path converted --limit 64 --sharegpt-turn-mode per_user_turn
        python3 run_dataset.py --ckpt-path converted --dataset longbenchv2 --limit 20
        """,
        allow_abbrev=False,  # the manifest hides the values of some flags, which it knows by name
    )
    add_run_arguments(parser)
    add_chat_arguments(parser)
    add = parser.add_argument_group("data set").add_argument
    add(
        "--dataset",
        choices=tuple(_served()),
        required=True,
        help="the data set; set by `dsatrace run DATASET`",
    )
    add("--split", help="each data set has one; RULER's is called train or validation")
    add("--limit", type=int, help="requests in all (default: all)")
    add("--max-new-tokens", type=int, help="tokens per answer (default: 128; for RULER the task's own)")
    add_source_arguments(parser)
    for data_set in _served().values():
        data_set.add_flags(parser)
    add_trace_arguments(parser, always=True)
    return parser
