"""`dsatrace study sweep`: block sizes x capacities x policies x workloads, each workload alone in the cache.

`dsatrace study mixed` is the same with all workloads in one cache (`--together`).

dsatrace study sweep --workloads qa chat_multi --output-dir outputs/sweep
dsatrace study mixed --pattern qa qa chat_multi chat_single summarization --output-dir outputs/rounds
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from dsatrace.commands.parser import count
from dsatrace.commands.progress import counted_bar
from dsatrace.commands.study import options
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.flags import Flag, add_flags
from dsatrace.kv.policies.registry import POLICIES
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.study.output_folder import OutputFolder
from dsatrace.study.profile import (
    ADMITTING,
    NEED_PROFILE,
    WARM_UP_SHARE,
    Profile,
    learned_profile,
    params_of,
    profile_record,
    read_profile,
)
from dsatrace.study.requests import StudyRequests, block_trace
from dsatrace.study.run import check_size
from dsatrace.study.sources import Client
from dsatrace.study.spread import Kind, pooled, with_intervals
from dsatrace.study.sweep import (
    BY_WORKLOAD,
    Form,
    Inputs,
    SweepSettings,
    num_cores,
    num_jobs,
    policy_runs,
    sweep,
)
from dsatrace.study.sweep_cells import OVERALL, SEMANTICS, Cell, num_repeated_outputs
from dsatrace.text import counted, plain
from dsatrace.workloads.synthetic import WORKLOADS

ACCESSES_PER_WORKER = 10_000_000
"""Starting a worker takes as long as replaying this many block accesses."""
TOGETHER = "--together"


class _Verb(NamedTuple):
    """What is different if workloads share a cache: the defaults, and the files' name."""

    name: str
    block_sizes: tuple[int, ...]
    capacities: tuple[int, ...]
    policies: tuple[str, ...]
    forms: tuple[Form, ...]


_ALONE = tuple(name for name in POLICIES if name not in BY_WORKLOAD)
ALONE = _Verb("sweep", (16, 32, 64), (64, 128, 256, 512), _ALONE, ("leaf",))
_MIXED = (*(name for name in POLICIES if name != "priority"), "admit-lru")
MIXED = _Verb("mixed", (16,), (256,), _MIXED, ("leaf", "flat"))


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep, prints its tables and writes the folder; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    verb = MIXED if TOGETHER in argv else ALONE
    args = _parser(verb).parse_args(argv)
    capacities = options.capacities_of(args, verb.capacities)
    check_size("--concurrency", args.concurrency)
    policies, profiled = _policies(args, verb)
    priorities = None if args.priorities is None else options.numbers_by_name("--priorities", args.priorities)
    given_profile = None if args.profile is None else read_profile(args.profile)
    path = options.output_path(args, verb.name)

    def settings_for(inputs: Inputs, seed: int) -> tuple[SweepSettings, Profile | None, str]:
        profile, since_s, how = _profile(args, inputs, given_profile, profiled)
        params = params_of(policies, profile, since_s, admit=args.admit, priorities=priorities, seed=seed)
        runs = policy_runs(policies, args.forms, params)
        by_conversation = not client.source.is_seeded
        settings = SweepSettings(capacities, runs, args.oversize, args.concurrency, by_conversation)
        return settings, profile, how

    with options.open_client(args, WORKLOADS) as client:
        seeds = options.seeds_of(args, client)
        traces, inputs = _inputs(args, verb, client)
    settings, profile, how = settings_for(inputs, seeds[0])
    workers = num_workers(args.workers, inputs, settings)
    kind: Kind = "seeds" if client.source.is_seeded else "conversations"
    about = {
        "settings": dataclasses.asdict(settings),
        "semantics": SEMANTICS,
        "intervals": {"over": kind, "seeds": seeds},
    }
    with options.study_folder(path, verb.name, [a for a in argv if a != TOGETHER], client, about) as folder:
        of_seeds = []
        with counted_bar(verb.name, num_jobs(inputs, settings) * len(seeds), "replays") as advance:
            of_seeds.append(sweep(inputs, settings, workers, lambda: advance(1)))
            for seed in seeds[1:]:
                _, others = _inputs(args, verb, client.reseeded(seed))
                of_seeds.append(sweep(others, settings_for(others, seed)[0], workers, lambda: advance(1)))
        cells = with_intervals(pooled(of_seeds), kind)
        record = client.describe() | about | {"traces": _described(traces, inputs, client)}
        if args.together:
            record["profile"] = {"from": how, "workloads": profile_record(profile or {})}
        title = options.title_of(client, None, record["intervals"])
        _write(folder, verb, args, cells, record | {"workers": workers}, title)
        if profile is not None:
            folder.write_json("profile.json", profile_record(profile))

    from dsatrace.report.study_tables import mixed_grids, sweep_grids

    options.show_of(client, (mixed_grids if args.together else sweep_grids)(cells), args.markdown)
    if args.admit is not None:
        admitting = ", ".join(name for name in policies if name in ADMITTING)
        print(f"admitted by {admitting}: {plain(', '.join(args.admit))}")
    if profiled:
        print(f"profile of the workloads, for {', '.join(profiled)}: {plain(how)}")
    of = options.spread_over(seeds, traces.values(), kind)
    print(f"intervals: 95 %, over {of}; counts are of all of them")
    print(f"files: {plain(path)}")
    return 0


def _write(
    folder: OutputFolder,
    verb: _Verb,
    args: argparse.Namespace,
    cells: Sequence[Cell],
    record: dict[str, Any],
    about: str,
) -> None:
    """The cells as CSV and, with the record, as JSON; the pictures."""
    rows = [cell.row() for cell in cells]
    folder.write_chosen(args.output_file, f"{verb.name}.json", record | {"cells": rows})
    folder.write_counts(f"{verb.name}.csv", rows)
    if not args.skip_visualization:
        from dsatrace.report.study_figures import draw_all_capacities, draw_all_mixed

        draw = draw_all_mixed if args.together else draw_all_capacities
        list(draw(folder, about, cells))


def _inputs(
    args: argparse.Namespace, verb: _Verb, client: Client
) -> tuple[dict[str, StudyRequests], dict[tuple[str, int], BlockTrace]]:
    """The requests by the name of their trace, and their blocks at each size."""
    traces = {OVERALL: client.requests()} if args.together else client.each()
    if args.together:
        _check_is_mixed(traces[OVERALL], client)
    return traces, {
        (name, size): block_trace(requests, size)
        for name, requests in traces.items()
        for size in options.sizes_of(args, verb.block_sizes, requests.tokens_per_id)
    }


def _policies(args: argparse.Namespace, verb: _Verb) -> tuple[list[str], list[str]]:
    """Those of the flag or the verb's, `priority` only with priorities; and which of them use a profile."""
    by_workload = sorted(set(args.policies or ()) & set(BY_WORKLOAD))
    if by_workload and not args.together:
        raise UserError(
            f"policy {by_workload[0]} tells workloads apart, and here each has the cache for itself; "
            "use `dsatrace study mixed`"
        )
    of_a_mix = [
        name for name in ("pattern", "admit", "priorities", "profile") if vars(args)[name] is not None
    ]
    if of_a_mix and not args.together:
        raise UserError(
            f"--{of_a_mix[0]} is for workloads that share a cache, and here each has one for itself; "
            "use `dsatrace study mixed`"
        )
    with_priority = ["priority"] if args.together and args.priorities is not None else []
    policies = list(args.policies or [*verb.policies, *with_priority])
    profiled = [name for name in NEED_PROFILE if args.admit is None or name not in ADMITTING]
    used_by = {"admit": ADMITTING, "profile": profiled, "priorities": ("priority",)}
    for flag, users in used_by.items():
        if vars(args)[flag] is not None and not set(users) & set(policies):
            raise UserError(f"--{flag} is for {', '.join(users)}, and no such policy runs; see --policies")
    return policies, [name for name in policies if name in profiled]


def _check_is_mixed(requests: StudyRequests, client: Client) -> None:
    if len(set(requests.workload.tolist())) > 1:
        return
    if client.source.has_requests:
        raise UserError(
            f"{client.source.path}: all requests are of one workload; use `dsatrace study sweep`, or name "
            "workloads with --log NAME=FILE NAME=FILE"
        )
    raise UserError(
        f"a mix needs two different workloads or more, each once: {', '.join(client.source.workloads)}"
    )


def _profile(
    args: argparse.Namespace,
    inputs: Inputs,
    given: Profile | None,
    profiled: Sequence[str],
) -> tuple[Profile | None, float, str]:
    """The profile for the policies that use one, the time from which it is known, and its origin."""
    trace = next(iter(inputs.values()))
    names = trace.workload_names
    if given is not None:
        missing = set(names) - set(given)
        if missing:
            raise UserError(f"{args.profile}: lacks {', '.join(sorted(missing))}; profile every workload")
        return {name: given[name] for name in names}, 0.0, f"the file {args.profile}"
    if not profiled:
        return None, 0.0, "none needed"
    profile, since_s = learned_profile(trace, args.warm_up)
    num_first = round(args.warm_up * trace.num_requests)
    how = f"learned from the first {counted(num_first, 'request')}, until then they are lru"
    return profile, since_s, how


def num_workers(given: int | None, inputs: Inputs, settings: SweepSettings) -> int:
    """Processes: as many as pay, at most one per core."""
    if given is not None:
        return given
    num_accesses = sum(len(trace.keys) for trace in inputs.values())
    of_all = num_accesses * len(settings.runs) * len(settings.capacities)
    return max(1, min(num_cores(), of_all // ACCESSES_PER_WORKER))


def _described(traces: Mapping[str, StudyRequests], inputs: Inputs, client: Client) -> list[dict[str, Any]]:
    return [
        {
            "workload": name,
            "origin": client.source.origin(name),
            "requests": len(requests),
            "prompt_tokens": int(requests.num_prompt_tokens.sum()),
            "repeated_output_blocks": {
                str(size): num_repeated_outputs(trace) for (of, size), trace in inputs.items() if of == name
            },
        }
        for name, requests in traces.items()
    ]


def _parser(verb: _Verb) -> argparse.ArgumentParser:
    descriptions = {
        ALONE: "Hit rates by block size, capacity and policy; each workload has the cache for itself.",
        MIXED: "Hit rates of several workloads that share one cache, under every policy.",
    }
    parser = options.new_parser(
        verb.name,
        descriptions[verb],
        """
        %(prog)s --workloads qa chat_multi --output-dir outputs/mine
        %(prog)s --trace-file conversation_trace.jsonl --num-blocks 1000 5000
        """,
    )
    options.add_request_arguments(parser, "seeded workloads")
    add = options.add_cache_arguments(parser, verb.block_sizes, verb.capacities)
    add(TOGETHER, action="store_true", help="all workloads share one cache, as in `dsatrace study mixed`")
    add(
        "--policies",
        nargs="+",
        metavar="NAME",
        help=f"eviction policies; OPT always runs as well (default: {' '.join(verb.policies)})",
    )
    add(
        "--forms",
        default=verb.forms,
        nargs="+",
        choices=get_args(Form),
        metavar="FORM",
        help="leaf: evict no block that a cached one follows; flat: evict any",
    )
    oversize = "prompts longer than the cache: reject them, or hold their first blocks"
    add_flags(add, SweepSettings, {"oversize": Flag(oversize)})
    add(
        "--priorities",
        nargs="+",
        metavar="NAME=NUMBER",
        help="priorities of workloads, for policy priority; 0 if not named",
    )
    add(
        "--admit",
        nargs="+",
        metavar="NAME",
        help="workloads that wa-lru prefers and admit-lru inserts (default: learned)",
    )
    add("--profile", type=Path, help="profile.json of an earlier run, for the workload-aware policies")
    add(
        "--warm-up",
        type=float,
        default=WARM_UP_SHARE,
        help="without --profile, learn it from this share of the requests, the first ones",
    )
    options.add_seeds_argument(add)
    add("--workers", type=count, help="processes (default: as many as pay, at most one per core)")
    options.add_output_arguments(parser, "the table's JSON")
    return parser
