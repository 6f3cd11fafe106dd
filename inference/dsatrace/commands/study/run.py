"""`dsatrace study run`: one trace through one cache, with every metric.

dsatrace study run --trace-file conversation_trace.jsonl --block-size 512 --num-blocks 1000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsatrace.commands.study import options
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.study.output_folder import OutputFolder, file_labels
from dsatrace.study.run import Replayed
from dsatrace.study.sources import Client

MAX_WORKLOAD_PICTURES = 12


if TYPE_CHECKING:
    from dsatrace.report.grid import Grid


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Replays the trace, writes statistics, rows and pictures; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    options.caches(args)
    path = options.output_path(args, "run")

    from dsatrace.report.study_tables import engine_grid, run_grids
    from dsatrace.study.accesses import ACCESSES_FILE, REQUESTS_FILE, write_accesses
    from dsatrace.study.engine_check import through_the_engine
    from dsatrace.study.results import write_results
    from dsatrace.study.run import run_study
    from dsatrace.study.sources import trace_name
    from dsatrace.workloads.trace_rows import write_trace_rows

    with options.open_client(args) as client:
        requests = client.requests(args.mode)
    seeds = options.seeds_of(args, client)
    name, pools = trace_name(requests), options.caches(args, requests)
    grids: list[Grid] = []
    if args.write_accesses and len({settings.block_size for settings in pools.values()}) > 1:
        raise UserError("--write-accesses writes blocks of one size; give one --block-size")
    with options.study_folder(path, "run", argv, client, options.described(pools)) as folder:
        for label, settings in pools.items():
            part = folder.labelled(label)
            replayed = run_study(requests, settings)
            intervals = _intervals(args, client, seeds, replayed)
            grids += run_grids(name, write_results(part, name, replayed, args.output_file, intervals))
            if args.runner == "engine":
                check = through_the_engine(replayed)
                part.write_json("engine_stats.json", check.to_json())
                grids.append(engine_grid(check))
            if not args.skip_visualization:
                draw_run(part, replayed, name, client)
        if client.has_text:
            write_trace_rows(folder.file(f"{name}_trace.jsonl"), client.rows(args.mode))
        if args.write_accesses:
            for file in (REQUESTS_FILE, ACCESSES_FILE):
                folder.file(file)
            write_accesses(folder.path, requests, replayed.trace)
    options.show_of(client, grids, args.markdown)
    options.say_where(path, client)
    return 0


def _intervals(
    args: argparse.Namespace, client: Client, seeds: Sequence[int], replayed: Replayed
) -> dict[str, Any]:
    """Of the metrics, over the seeds of a seeded source, else over the trace's conversations."""
    from dsatrace.study.measure import measure
    from dsatrace.study.run import run_study
    from dsatrace.study.spread import bootstrapped, over_seeds, sums_of
    from dsatrace.study.sweep_cells import conversation_parts

    if not client.source.is_seeded:
        part = conversation_parts(replayed.trace.conversation)
        return {"over": "conversations", "metrics": bootstrapped(sums_of(replayed), part)}
    others = (client.reseeded(seed).requests(args.mode) for seed in seeds[1:])
    values = [measure(replayed), *(measure(run_study(each, replayed.settings)) for each in others)]
    return {"over": "seeds", "seeds": list(seeds), "metrics": over_seeds(values)}


def draw_run(folder: OutputFolder, replayed: Replayed, name: str, client: Client) -> None:
    """The distributions, over all requests and over those of each workload."""
    from dsatrace.report import study_figures as figures
    from dsatrace.study.measure import block_counts, of_workload, reuse_gaps, sharing_fractions, workloads_in

    about = options.title_of(client, replayed.settings)
    draw_distributions(folder, about, {name: replayed})
    workloads = workloads_in(replayed)
    labels = file_labels([workload or name for workload in workloads])
    for workload in _drawn(workloads):
        chosen, shown = of_workload(replayed, workload), workload or name
        label = labels[shown]
        fractions = {shown: sharing_fractions(replayed, chosen)}
        hits = {shown: block_counts(replayed, chosen).hits}
        gaps = {shown: reuse_gaps(replayed, chosen)}
        figures.draw_sharing(folder.file(f"reuse_fraction_cdf_{label}.png"), about, fractions)
        figures.draw_block_hits_cdf(folder.file(f"block_hits_cdf_{label}.png"), about, hits)
        figures.draw_gaps(folder.file(f"block_reuse_gaps_cdf_{label}.png"), about, gaps)


def draw_distributions(folder: OutputFolder, about: str, replayed: Mapping[str, Replayed]) -> None:
    """Sharing, hits and gaps, with all the traces in each picture."""
    from dsatrace.report import study_figures as figures
    from dsatrace.study.measure import block_counts, reuse_gaps, sharing_fractions

    fractions = {name: sharing_fractions(each) for name, each in replayed.items()}
    figures.draw_sharing(folder.file("sharing_fraction_cdf.png"), about, fractions)
    hits = {name: block_counts(each).hits for name, each in replayed.items()}
    figures.draw_block_hits(folder.file("block_hit_distribution.png"), about, hits)
    gaps = {}
    for name, each in replayed.items():
        gaps[f"{name}, between accesses"] = reuse_gaps(each)
        gaps[f"{name}, hit to hit"] = reuse_gaps(each, hits_only=True)
    figures.draw_gaps(folder.file("reuse_gap_cdf.png"), about, gaps)


def _drawn(workloads: Sequence[str]) -> Iterable[str]:
    if len(workloads) > MAX_WORKLOAD_PICTURES:
        print(
            f"pictures of the first {MAX_WORKLOAD_PICTURES} of {len(workloads)} workloads; "
            "the statistics have them all",
            file=sys.stderr,
        )
    return workloads[:MAX_WORKLOAD_PICTURES]


def _parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        "run",
        "Replay one trace through one prefix cache.",
        """
        %(prog)s --trace-file conversation_trace.jsonl --block-size 512 --num-blocks 1000
        %(prog)s --data-path chats.json --tokenizer converted --output-dir outputs/chats
        """,
    )
    options.add_request_arguments(parser, modes=options.TURNS)
    options.add_pool_arguments(parser)
    options.add_seeds_argument(parser.add_argument)
    options.add_output_arguments(parser, "the statistics")
    parser.add_argument(
        "--runner",
        choices=("replay", "engine"),
        default="replay",
        help="engine: also serve the trace with the engine's scheduler and the token simulator",
    )
    parser.add_argument(
        "--write-accesses", action="store_true", help="write requests.jsonl and accesses.jsonl for the sweeps"
    )
    return parser
