"""`dsatrace study three-turns`: one conversation of three turns by hand, block by block.

dsatrace study three-turns
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dsatrace.commands.study import options
from dsatrace.errors import exits_cleanly

BLOCK_SIZE = 16
TURNS = ((40, 16), (72, 16), (104, 16))
"""Tokens asked and answered; each prompt is the one before, its answer, and 16 tokens more."""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Prints what each turn finds, with answers cached and without; returns the exit code."""
    args = _parser().parse_args(argv)

    from dsatrace.report.grid import Grid, number
    from dsatrace.study.requests import RequestsBuilder
    from dsatrace.study.run import StudySettings, run_study

    builder = RequestsBuilder()
    for turn, (asked, answered) in enumerate(TURNS):
        answer = range(asked, asked + answered)
        builder.add(turn, range(asked), answer, conversation=("c0",), turn=turn)
    requests, grids = builder.build(), []
    for decode in (False, True):
        replayed = run_study(requests, StudySettings(block_size=BLOCK_SIZE, decode=decode))
        rows = []
        for turn, hit_tokens in enumerate(replayed.result.hit_tokens.tolist()):
            blocks, hits = int(replayed.trace.needed_blocks[turn]), hit_tokens // BLOCK_SIZE
            rows.append(
                (
                    number(turn),
                    number(TURNS[turn][0]),
                    number(hits),
                    number(blocks),
                    number(hits / blocks, ".0%"),
                    number(hit_tokens / TURNS[turn][0], ".0%"),
                )
            )
        title = f"Blocks of {BLOCK_SIZE} tokens, answers {'' if decode else 'not '}cached"
        columns = ("turn", "tokens", "hit blocks", "of blocks", "blocks hit", "tokens hit")
        grids.append(Grid(title, columns, rows))
    options.show(grids, args.markdown)
    print(
        "A partial last block counts as a block and is never hit. A turn finds the full blocks of the\n"
        "prompt before it and, if answers are cached, those that its answer completes."
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options.new_parser("three-turns", "Show one conversation of three turns by hand.", "%(prog)s")
    parser.add_argument("--markdown", action="store_true", help="print tables as markdown")
    return parser
