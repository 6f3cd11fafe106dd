"""`dsatrace study compare`: single-turn against multi-turn on the same conversations.

dsatrace study compare --data-path chats.json --tokenizer converted --num-blocks 1024
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsatrace.commands.study import options
from dsatrace.commands.study.run import draw_distributions
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.study.sources import CHATS
from dsatrace.workloads.trace_rows import MULTI_TURN

if TYPE_CHECKING:
    from dsatrace.report.grid import Grid


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Replays both traces, writes the results of each and their comparison; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    options.caches(args)
    if args.workloads and not set(CHATS) & set(args.workloads):
        raise UserError(f"--workloads {args.workloads[0]} has one turn per conversation; compare chat_multi")
    path = options.output_path(args, "compare")

    from dsatrace.report.study_figures import draw_comparison
    from dsatrace.report.study_tables import compare_grids
    from dsatrace.study.compare import compare, over_all_conversations, over_all_seeds
    from dsatrace.study.results import write_results
    from dsatrace.study.run import run_study
    from dsatrace.workloads.trace_rows import write_trace_rows

    with options.open_client(args) as client:
        requests = {mode: client.requests(mode) for mode in options.TURNS}
    seeds = options.seeds_of(args, client)
    others = [client.reseeded(seed) for seed in seeds[1:]]
    of_seeds = [{mode: other.requests(mode) for mode in options.TURNS} for other in others]
    pools = options.caches(args, requests[MULTI_TURN])
    grids: list[Grid] = []
    with options.study_folder(path, "compare", argv, client, options.described(pools)) as folder:
        for label, settings in pools.items():
            part = folder.labelled(label)
            replayed = {mode: run_study(requests[mode], settings) for mode in options.TURNS}
            comparison = compare(**replayed)
            if client.source.is_seeded:
                more = ({mode: run_study(one[mode], settings) for mode in one} for one in of_seeds)
                comparison = over_all_seeds([comparison, *(compare(**each) for each in more)], seeds)
            else:
                comparison = over_all_conversations(comparison, **replayed)
            for mode in options.TURNS:
                intervals = {**comparison.intervals, "metrics": comparison.intervals["metrics"][mode]}
                cache = write_results(part, mode, replayed[mode], intervals=intervals)["cache"]
            part.write_chosen(args.output_file, "comparison.json", {"cache": cache, **comparison.record()})
            if not args.skip_visualization:
                draw_distributions(part, options.title_of(client, settings), replayed)
                about = options.title_of(client, settings, comparison.intervals)
                draw_comparison(part.file("comparison.png"), about, comparison)
            grids += compare_grids(comparison, cache)
        for mode in options.TURNS if client.has_text else ():
            write_trace_rows(folder.file(f"{mode}_trace.jsonl"), client.rows(mode))
    options.show_of(client, grids, args.markdown)
    options.say_where(path, client)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        "compare",
        "Compare single-turn and multi-turn traces of the same conversations.",
        """
        %(prog)s --data-path chats.json --tokenizer converted --num-blocks 1024
        %(prog)s --workload chat_multi --match-requests
        """,
    )
    options.add_request_arguments(parser)
    parser.set_defaults(min_turns=2)
    options.add_pool_arguments(parser)
    options.add_seeds_argument(parser.add_argument)
    options.add_output_arguments(parser, "the comparison")
    return parser
