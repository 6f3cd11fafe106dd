"""`dsatrace study explain`: one trace under every definition of a hit rate in use.

dsatrace study explain --trace-file trace.jsonl --num-blocks 1000
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    from dsatrace.study.measure import rejections
    from dsatrace.study.run import run_study

    with options.open_client(args) as client:
        requests = client.requests(args.mode)
    pools = options.caches(args, requests)
    grids: list[Grid] = []
    with options.study_folder(path, "explain", argv, client, options.described(pools)) as folder:
        for label, settings in pools.items():
            replayed = run_study(requests, settings)
            definitions = explain(replayed)
            cache, rejected = dataclasses.asdict(settings), rejections(replayed)
            record = {"cache": cache, "rejected": rejected}
            record["definitions"] = {line.name: line.record() for line in definitions}
            folder.labelled(label).write_chosen(args.output_file, "explain.json", record)
            grids += [explain_grid(definitions, cache), rejected_grid({"trace": rejected})]
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
    options.add_output_arguments(parser, "the definitions", pictures=False)
    return parser
