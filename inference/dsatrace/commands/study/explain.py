"""`dsatrace study explain`: one trace under every definition of a hit rate in use.

dsatrace study explain --trace-file trace.jsonl --num-blocks 1000
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsatrace.commands.study import options
from dsatrace.errors import exits_cleanly
from dsatrace.text import plain

if TYPE_CHECKING:
    from dsatrace.report.grid import Grid


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Prints and writes every definition's value; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    options.caches(args)
    path = options.output_path(args, "explain")

    from dsatrace.report.study_tables import explain_grid, rejected_grid
    from dsatrace.study.explain import explain
    from dsatrace.study.run import run_study
    from dsatrace.study.spread import bootstrapped, over_seeds
    from dsatrace.study.sweep_cells import conversation_parts

    with options.open_client(args) as client:
        requests = client.requests(args.mode)
    seeds = options.seeds_of(args, client)
    of_seeds = [client.reseeded(seed).requests(args.mode) for seed in seeds[1:]]
    pools = options.caches(args, requests)
    grids: list[Grid] = []
    with options.study_folder(path, "explain", argv, client, options.described(pools)) as folder:
        for label, settings in pools.items():
            replayed = run_study(requests, settings)
            definitions = explain(replayed)
            intervals: dict[str, Any] = {"over": "conversations"}
            if client.source.is_seeded:
                others = (explain(run_study(each, settings)) for each in of_seeds)
                values = [{d.name: d.value for d in lines} for lines in (definitions, *others)]
                intervals, spread = {"over": "seeds", "seeds": seeds}, over_seeds(values)
            else:
                sums = {d.name: d.by_request for d in definitions if d.by_request is not None}
                spread = bootstrapped(sums, conversation_parts(replayed.trace.conversation))
            definitions = [line.with_spread(spread.get(line.name, {})) for line in definitions]
            cache, rejected = dataclasses.asdict(settings), replayed.result.rejections()
            record = {"cache": cache, "rejected": rejected, "intervals": intervals}
            record["definitions"] = {line.name: line.record() for line in definitions}
            folder.labelled(label).write_chosen(args.output_file, "explain.json", record)
            grids += [explain_grid(definitions, cache, intervals), rejected_grid({"trace": rejected})]
    options.show_of(client, grids, args.markdown)
    print(f"files: {plain(path)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        "explain",
        "Show one trace under every definition of a hit rate.",
        """
        %(prog)s --trace-file trace.jsonl --num-blocks 1000
        %(prog)s --data-path chats.json --tokenizer converted
        """,
    )
    options.add_request_arguments(parser, modes=options.TURNS)
    options.add_pool_arguments(parser)
    options.add_seeds_argument(parser.add_argument)
    options.add_output_arguments(parser, "the definitions", pictures=False)
    return parser
