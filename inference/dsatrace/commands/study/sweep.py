"""`dsatrace study sweep`: block sizes x capacities x policies x workloads, each workload alone in the cache.

dsatrace study sweep --workloads qa chat_multi --output-dir outputs/sweep
dsatrace study sweep --trace-file conversation_trace.jsonl --capacities 1000 5000 --output-dir outputs/conv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from dsatrace.commands.parser import CommandParser
from dsatrace.commands.study import sweep_options as shared
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.study.output_folder import OutputFolder, check_output, file_labels, open_study
from dsatrace.study.sweep import (
    BLOCK_SIZES,
    BY_WORKLOAD,
    CAPACITIES,
    Inputs,
    SweepSettings,
    policy_runs,
    single_workload_policies,
    sweep,
)
from dsatrace.study.sweep_cells import OPT, Cell
from dsatrace.study.sweep_inputs import RequestLog, read_log, seeded_logs, split_by_workload
from dsatrace.study.tokenization import NamedVocabulary, open_vocabulary
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.synthetic import WORKLOADS


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep, prints its tables and writes the folder; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    settings = _settings(args)
    shared.check_flags(args)
    check_output(args.output_dir)
    vocabulary = open_vocabulary(args.tokenizer)
    about = shared.manifest(args, argv, "sweep", vocabulary)
    with open_study(args.output_dir, about) as folder:
        bad_rows = BadRows(args.bad_rows)
        with shared.cells_bar("sweep") as on_done:
            logs, dropped = _logs(args, vocabulary, bad_rows)
            inputs = {
                (log.name, size): log.at(size, args.concurrency)
                for log in logs
                for size in _block_sizes(args, log)
            }
            num_accesses = sum(given.stream.num_accesses for given in inputs.values())
            workers = shared.workers_for(args, num_accesses * len(settings.runs) * len(settings.capacities))
            cells = sweep(inputs, settings, workers, on_done)
        record = {
            "traces": _described(logs, inputs),
            "conversations": dropped,
            "bad_rows": bad_rows.summary(),
            "workers": workers,
        }
        shared.write_cells(folder, "sweep", cells, about | record)
        if not args.skip_visualization:
            _draw(folder, cells)

        from dsatrace.report.study_tables import sweep_grids

        notes = [f"{log.name}: {log.origin}" for log in logs]
        shared.show_cells(sweep_grids(cells), notes, vocabulary, folder)
    return 0


def _settings(args: argparse.Namespace) -> SweepSettings:
    by_workload = sorted(set(args.policies) & set(BY_WORKLOAD))
    if by_workload:
        raise UserError(
            f"policy {by_workload[0]} tells workloads apart, and here each has the cache for itself; "
            "use `dsatrace study mixed`"
        )
    runs = policy_runs(args.policies, args.forms, {"random": {"seed": args.seed}})
    return SweepSettings(tuple(sorted(args.capacities)), runs, args.oversize, args.concurrency)


def _logs(
    args: argparse.Namespace, vocabulary: NamedVocabulary, bad_rows: BadRows
) -> tuple[list[RequestLog], dict[str, dict[str, int]]]:
    if args.trace_file is not None:
        logs = split_by_workload(read_log(args.trace_file, vocabulary, bad_rows))
    else:
        names = args.workloads or WORKLOADS
        if len(set(names)) != len(names):
            raise UserError(f"name each workload once: {', '.join(names)}")
        real = shared.conversations(args, bad_rows)
        logs = seeded_logs(names, shared.seeded_settings(args), vocabulary, real, str(args.data_path))
    pairs = [shared.filtered(log, args) for log in logs]
    return [log for log, _ in pairs], {log.name: counts for log, counts in pairs}


def _block_sizes(args: argparse.Namespace, log: RequestLog) -> Sequence[int]:
    """By default a log that was recorded in blocks is swept at their size alone."""
    sizes = args.block_sizes or ((log.block_size,) if log.block_size else BLOCK_SIZES)
    if len(set(sizes)) != len(sizes):
        raise UserError(f"name each block size once: {', '.join(map(str, sizes))}")
    return tuple(sizes)


def _described(logs: Sequence[RequestLog], inputs: Inputs) -> list[dict[str, Any]]:
    return [
        {
            "workload": log.name,
            "origin": log.origin,
            "requests": len(log),
            "prompt_tokens": log.num_prompt_tokens,
            "repeated_output_blocks": {
                str(size): given.num_repeated for (name, size), given in inputs.items() if name == log.name
            },
        }
        for log in logs
    ]


def _draw(folder: OutputFolder, cells: Sequence[Cell]) -> None:
    from dsatrace.report.study_figures import draw_capacities

    labels = file_labels(list(dict.fromkeys(cell.workload for cell in cells)))
    for workload, label in labels.items():
        for policy in dict.fromkeys(cell.policy for cell in cells if cell.policy != OPT):
            draw_capacities(folder.file(f"cache_hits_{label}_{policy}.png"), workload, policy, cells)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "study sweep",
        "Hit rates by block size, capacity and policy; each workload has the cache for itself.",
        examples="""
        %(prog)s --workloads qa chat_multi --output-dir outputs/sweep
        %(prog)s --trace-file conversation_trace.jsonl --capacities 1000 5000 --output-dir outputs/conv
        """,
    )
    add = parser.add_argument_group("sweep").add_argument
    sizes = " ".join(map(str, BLOCK_SIZES))
    add(
        "--block-sizes",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help=f"tokens per block (default: {sizes}, or the trace's own)",
    )
    add(
        "--capacities",
        "--num-blocks",
        type=int,
        nargs="+",
        default=CAPACITIES,
        metavar="BLOCKS",
        help="usable blocks of each cache",
    )
    add(
        "--policies",
        nargs="+",
        default=single_workload_policies(),
        metavar="NAME",
        help="eviction policies; OPT always runs as well",
    )
    shared.add_shared_arguments(parser, ("leaf",))
    return parser
