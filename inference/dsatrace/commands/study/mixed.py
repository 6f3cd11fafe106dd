"""`dsatrace study mixed`: several workloads in one cache, policy by policy.

dsatrace study mixed --output-dir outputs/mixed
dsatrace study mixed --pattern qa qa chat_multi chat_single summarization --output-dir outputs/rounds
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dsatrace.commands.parser import CommandParser
from dsatrace.commands.study import sweep_options as shared
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.study.mixed import (
    BLOCK_SIZE,
    CAPACITY_BLOCKS,
    NEED_PROFILE,
    WARM_UP_SHARE,
    Profile,
    default_policies,
    mixed_runs,
    profile_record,
    read_profile,
    warm_up,
)
from dsatrace.study.output_folder import check_output, open_study
from dsatrace.study.sweep import SweepSettings, sweep
from dsatrace.study.sweep_cells import OVERALL
from dsatrace.study.sweep_inputs import RequestLog, mixed_log, read_log
from dsatrace.study.tokenization import NamedVocabulary, open_vocabulary
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.synthetic import WORKLOADS


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the mix, prints its table and writes the folder; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    shared.check_flags(args)
    priorities = _priorities(args.priorities)
    names = args.policies = args.policies or default_policies(priorities is not None)
    given_profile = None if args.profile is None else read_profile(args.profile)
    check_output(args.output_dir)
    vocabulary = open_vocabulary(args.tokenizer)
    about = shared.manifest(args, argv, "mixed", vocabulary)
    with open_study(args.output_dir, about) as folder:
        bad_rows = BadRows(args.bad_rows)
        with shared.cells_bar("mixed") as on_done:
            log, dropped = shared.filtered(_log(args, vocabulary, bad_rows), args)
            block_size = args.block_size or log.block_size or BLOCK_SIZE
            rest, profile, how = _profiled(args, log, block_size, given_profile, names)
            runs = mixed_runs(names, profile, args.forms, priorities, args.seed)
            settings = SweepSettings((args.num_blocks,), runs, args.oversize, args.concurrency)
            given = rest.at(block_size, args.concurrency)
            workers = shared.workers_for(args, given.stream.num_accesses * len(runs))
            cells = sweep({(OVERALL, block_size): given}, settings, workers, on_done)
        record = about | {
            "trace": {
                "origin": log.origin,
                "requests": len(log),
                "replayed": len(rest),
                "prompt_tokens": log.num_prompt_tokens,
                "repeated_output_blocks": given.num_repeated,
            },
            "conversations": dropped,
            "bad_rows": bad_rows.summary(),
            "profile": {"from": how, "workloads": profile_record(profile or {})},
            "workers": workers,
        }
        shared.write_cells(folder, "mixed", cells, record)
        if profile is not None:
            folder.write_json("profile.json", profile_record(profile))
        if not args.skip_visualization:
            from dsatrace.report.study_figures import draw_mixed

            draw_mixed(folder.file("mixed_hit_rates.png"), cells)

        from dsatrace.report.study_tables import mixed_grid

        notes = (f"{log.name}: {log.origin}", f"profile of the workloads: {how}")
        shared.show_cells([mixed_grid(cells)], notes, vocabulary, folder)
    return 0


def _log(args: argparse.Namespace, vocabulary: NamedVocabulary, bad_rows: BadRows) -> RequestLog:
    if args.trace_file is None:
        return mixed_log(
            args.workloads or WORKLOADS,
            shared.seeded_settings(args),
            vocabulary,
            shared.conversations(args, bad_rows),
            str(args.data_path),
            args.pattern,
        )
    if args.pattern is not None:
        raise UserError("--pattern interleaves the seeded workloads; a trace file has its order already")
    log = read_log(args.trace_file, vocabulary, bad_rows)
    if len(set(log.labels)) < 2:
        raise UserError(f"{args.trace_file}: all requests are of one workload; use `dsatrace study sweep`")
    return log


def _profiled(
    args: argparse.Namespace, log: RequestLog, block_size: int, given: Profile | None, names: Sequence[str]
) -> tuple[RequestLog, Profile | None, str]:
    """The requests to replay, the profile for the workload-aware policies, and where it comes from."""
    if given is not None:
        unknown, missing = set(given) - set(log.labels), set(log.labels) - set(given)
        if missing:
            raise UserError(f"{args.profile}: lacks {', '.join(sorted(missing))}; profile every workload")
        known = {name: entry for name, entry in given.items() if name not in unknown}
        return log, known, f"the file {args.profile}; the whole trace is replayed"
    if not set(names) & set(NEED_PROFILE):
        return log, None, "none needed; the whole trace is replayed"
    rest, profile = warm_up(log, block_size, args.warm_up)
    num_first = len(log) - len(rest)
    how = f"the first {num_first:,} requests, which are not replayed; the other {len(rest):,} are"
    return rest, {name: profile[name] for name in dict.fromkeys(rest.labels)}, how


def _priorities(pairs: Sequence[str] | None) -> dict[str, float] | None:
    if pairs is None:
        return None
    priorities = {}
    for pair in pairs:
        name, equals, number = pair.rpartition("=")
        try:
            priorities[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or priorities[name] != priorities[name]:
            raise UserError(f"--priorities {pair!r}: write a workload and a number, such as qa=2")
    return priorities


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "study mixed",
        "Hit rates of several workloads that share one cache, under every policy.",
        examples="""
        %(prog)s --output-dir outputs/mixed
        %(prog)s --pattern qa qa chat_multi chat_single summarization --output-dir outputs/rounds
        """,
    )
    add = parser.add_argument_group("mix").add_argument
    add("--block-size", type=int, help=f"tokens per block (default: {BLOCK_SIZE}, or the trace's own)")
    add("--num-blocks", type=int, default=CAPACITY_BLOCKS, help="usable blocks of the cache")
    add(
        "--pattern",
        nargs="+",
        metavar="NAME",
        help="interleave the workloads in rounds of these names, each at least once (default: by arrival)",
    )
    policies = " ".join(default_policies(False))
    add(
        "--policies",
        nargs="+",
        metavar="NAME",
        help=f"eviction policies; OPT always runs as well (default: {policies})",
    )
    add(
        "--priorities",
        nargs="+",
        metavar="NAME=NUMBER",
        help="priorities of workloads, for policy priority; 0 if not named",
    )
    add("--profile", type=Path, help="profile.json of an earlier run, for the workload-aware policies")
    add(
        "--warm-up",
        type=float,
        default=WARM_UP_SHARE,
        help="without --profile, measure it on this share of the requests, which is not replayed",
    )
    shared.add_shared_arguments(parser, ("leaf", "flat"))
    return parser
