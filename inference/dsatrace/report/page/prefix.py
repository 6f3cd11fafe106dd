"""How much of what a step touches lies in a prefix that an earlier request had, and its hot blocks.

Knows the summary alone.

    section = shared_prefix(material)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from ...text import plain
from ..grid import number, percent
from .material import Material, Record
from .section import LeftOut, Row, Section, told
from .stacked import Part, Stack, amounts
from .svg import Axis, Series, line_chart

TITLE = "How much lies in a shared prefix, and which blocks are hot?"
MOST_REQUESTS, MOST_BLOCKS = 4, 10
"""Drawn; the table holds all that the summary has."""


def shared_prefix(material: Material) -> Section | LeftOut:
    summary, kind = material.summary, material.kind
    hot = {name: blocks for name, blocks in summary["prefix_hot_blocks"].items() if blocks}
    if not summary["counts"]["records"]:
        return LeftOut(TITLE, "no step was recorded")
    if not kind.holds("prefix"):
        return LeftOut(TITLE, "the records do not tell which prefixes are shared")
    if not hot:
        return LeftOut(TITLE, "no step touched a block that an earlier request had too")
    ratio = summary["prefix_intersection_ratio"]
    said = (
        f"{percent(ratio['mean'])} of a record's touched blocks lie in the shared prefix (mean; p95 "
        f"{percent(ratio['p95'])}), in {len(hot)} of {summary['counts']['requests']} requests a block of it "
        "was touched."
    )
    body = f'<p class="answer">{told(said)}</p>{_shares(summary, said)}{_hot(hot)}'
    columns = ("request", "block", "records that touched it")
    note = (
        "Share: touched blocks of the shared prefix / touched blocks, of each of "
        f"{summary['counts']['records']:,} records, dense and prompt rows included; blocks of "
        f"{material.manifest['trace']['block_size_tokens']} tokens. A shared prefix is the full leading "
        "blocks that an earlier request had too. Hot: at most 20 blocks of each request that has such a "
        "prefix."
    )
    return Section(
        "prefix", TITLE, body, note, material.command("report", "--no-figure"), (columns, list(_rows(hot)))
    )


def _shares(summary: Record, said: str) -> str:
    stored = summary["histograms"]["prefix_intersection_ratio"]
    counts = np.array(stored["counts"], float)
    xs = [0.0, *stored["values"], 1.0]
    below = np.concatenate([[0.0], np.cumsum(counts) / counts.sum(), [1.0]])
    steps_x = np.repeat(xs, 2)[1:]
    steps_y = np.repeat(below, 2)[:-1]
    chart = line_chart(
        "Share of a record's touched blocks in the shared prefix", said,
        Axis("share of touched blocks in the shared prefix", 0, 1, share=True),
        Axis("records with at most that", 0, 1, share=True),
        [Series("records", steps_x.tolist(), steps_y.tolist())],
    )  # fmt: skip
    return chart


def _hot(hot: Record) -> str:
    parts = []
    for request_id, blocks in itertools.islice(hot.items(), MOST_REQUESTS):
        title = f"Hottest prefix blocks of {plain(request_id, 80)}"
        stacks = [
            Stack(f"block {one['block_id']}", [Part("", one["touches"], f"{one['touches']:,} records")])
            for one in blocks[:MOST_BLOCKS]
        ]
        parts.append(f"<h3>{told(title)}</h3>{amounts(title, _said(blocks), stacks)}")
    if len(hot) > MOST_REQUESTS:
        parts.append(f'<p class="note">{len(hot) - MOST_REQUESTS} more requests are among the numbers.</p>')
    return "".join(parts)


def _said(blocks: Sequence[Record]) -> str:
    first = blocks[0]
    return f"Block {first['block_id']} was touched most, in {first['touches']:,} records."


def _rows(hot: Record) -> Iterator[Row]:
    for request_id, blocks in hot.items():
        for one in blocks:
            yield plain(request_id), number(one["block_id"]), number(one["touches"])
