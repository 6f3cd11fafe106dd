"""How far behind the query the selected tokens lie, beside a uniform and a recency selector.

The measured curve is the summary's, of the whole run. The baselines are exact expectations for the
contexts of the run's first `MAX_RECORDS` records.

    section = offsets(material)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ...trace.kind import SelectionKind
from ...trace.reader import RunReader
from ..grid import number, percent
from .material import Material, Record
from .section import LeftOut, Section, told
from .svg import Axis, Series, line_chart

TITLE = "How far back do the selected tokens lie?"
MAX_RECORDS = 20_000
"""Whose contexts the baselines are of, from the run's start."""
_POINTS = 96
NAMES = ("measured", "uniform selector", "recency selector")


def offsets(material: Material) -> Section | LeftOut:
    summary = material.summary
    if not summary["counts"]["records"]:
        return LeftOut(TITLE, "no step was recorded")
    if not material.kind.holds("offset_max"):
        return LeftOut(TITLE, "its ids are no positions, so how far back they lie is not known")
    stored = summary["histograms"]["offsets"]
    if not stored["values"]:
        return LeftOut(TITLE, "no token was selected")
    contexts, num_records = contexts_of(material.run)
    largest = max(int(stored["values"][-1]), int(contexts[0].max()) - 1, 1)
    at = points(largest)
    shares = (measured(stored, at), *baselines(material.kind, contexts, at))
    half = [int(at[np.searchsorted(share, 0.5)]) for share in shares]
    said = (
        f"Half of the selected tokens lie within {summary['offsets']['p50']:,} tokens of the query; a "
        f"uniform selector's within about {half[1]:,}."
    )
    chart = line_chart(
        "How far back a selected token lies", said,
        Axis("offset from the query + 1 (tokens)", 1, largest + 1, log=True),
        Axis("selected tokens within that offset", 0, 1, share=True),
        [
            Series(name, (at + 1).tolist(), share.tolist(), style, null=style > 0)
            for style, (name, share) in enumerate(zip(NAMES, shares, strict=True))
        ],
    )  # fmt: skip
    rows = [
        (number(int(offset)), *(percent(float(share[i])) for share in shares)) for i, offset in enumerate(at)
    ]
    of = "all" if num_records == summary["counts"]["records"] else f"the first {num_records:,}"
    note = (
        "Offset: query position - selected position, 0 for the query itself. Share of all "
        f"{sum(stored['counts']):,} selected tokens of {summary['counts']['records']:,} records, dense and "
        "prompt rows included. Uniform: as many tokens drawn at random from each record's context; recency: "
        f"its newest ones; expected, over {of} records."
    )
    body = f'<p class="answer">{told(said)}</p>{chart}'
    return Section(
        "offsets", TITLE, body, note, material.command("report", "--no-figure"), (("offset", *NAMES), rows)
    )


def contexts_of(run: RunReader) -> tuple[np.ndarray, int]:
    """(3, P) distinct contexts: visible and selected tokens, and records of both; and how many records."""
    fields = ("seq_len_current", "unique_token_pos_count")
    records = itertools.islice(run.steps(fields), MAX_RECORDS)
    pairs = np.array([[record[name] for name in fields] for record in records], np.int64)
    distinct, counts = np.unique(pairs, axis=0, return_counts=True)
    return np.vstack([distinct.T, counts]), len(pairs)


def points(largest: int) -> np.ndarray:
    """Offsets from 0 to `largest`, evenly on a log scale."""
    return np.unique(np.geomspace(1, largest + 1, _POINTS).astype(np.int64)) - 1


def measured(stored: Record, at: np.ndarray) -> np.ndarray:
    """Share of the tokens within each offset."""
    below = np.concatenate([[0], np.cumsum(stored["counts"])])
    share: np.ndarray = below[np.searchsorted(stored["values"], at, side="right")] / below[-1]
    return share


def baselines(kind: SelectionKind, contexts: np.ndarray, at: np.ndarray) -> Sequence[np.ndarray]:
    """The same, expected of a uniform and of a recency selector."""
    seq_len, k, records = contexts
    there = np.minimum(kind.visible(seq_len) * kind.unit_tokens, seq_len)  # tokens that ids cover
    k = np.minimum(k, there)
    within = np.clip(at[:, None] + 1 - (seq_len - there), 0, there)  # (A, P), of the tokens that are covered
    whole = (k * records).sum()
    uniform = (within * (k / there) * records).sum(axis=1) / whole
    recency = (np.minimum(within, k) * records).sum(axis=1) / whole
    return uniform, recency
