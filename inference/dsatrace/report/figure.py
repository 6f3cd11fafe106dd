"""A run's pictures: blocks touched, where they lie over time, overlap and age, tiers, serving.

`PANELS` is the table of them. Every share stands beside its baselines, which marks, dashes or hatches tell
apart without colour.

draw(RunReader(folder)).paths      # report.png in the run's folder
"""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from ..text import plain
from ..trace.rates import RATES, run_words, unit_words
from ..trace.reader import RunReader
from ..units import MIB
from .drawing import whole_numbers
from .panels import (
    BASELINE_STYLES,
    Drawn,
    Panel,
    PictureSettings,
    draw_panels,
    hatched,
    layers_axis,
    number_bar,
    numbers_axis,
    shares_axis,
)
from .run_subject import MAX_STEPS, RunSubject, several
from .tables import Summary, caveat, model_name
from .tier_tables import TIER_TITLES, tiers_of
from .workload_tables import steps_of_recall

MAX_ROWS = 512
"""Rows of the map, of one block or of several: the most selected of them is shown."""


def draw(run: RunReader, layer: int | None = None, settings: PictureSettings | None = None) -> Drawn:
    """Draws the sheet, or each panel that `settings` names, into the run's folder; the map shows `layer`."""
    subject = RunSubject(run, layer)
    counts = subject.summary["counts"]
    numbers = [several(counts["requests"], "request"), several(counts["steps"], "decode step")]
    heading = f"{plain(run.folder.name, 80)}: {', '.join(numbers)}"
    stem = run.folder / "report"
    return draw_panels(PANELS, subject, stem, heading, settings, caveat(subject.summary) or "")


def _not_sparse(subject: RunSubject) -> str | None:
    counts = subject.summary["counts"]
    if not counts["records"]:
        return "no step was recorded"
    return None if counts["sparse_records"] else "no step saw more than top-k, so everything was selected"


def _no_positions(subject: RunSubject) -> str | None:
    if reason := _not_sparse(subject):
        return reason
    return None if subject.kind.holds("offset_max") else "its ids are no positions"


def _no_map(subject: RunSubject) -> str | None:
    if reason := _no_positions(subject):
        return reason
    if subject.run.manifest["trace"]["level"] != "full" or not subject.kind.holds("selected_token_pos"):
        return "positions were not recorded"
    return None if subject.map_records else f"no step of layer {subject.layer} went past top-k"


def _no_overlap(subject: RunSubject) -> str | None:
    if reason := _not_sparse(subject):
        return reason
    compared = any(subject.summary[key]["pairs"] for key, _ in _OVERLAPS)
    return None if compared else "there are no two selections to compare"


def _no_needle(subject: RunSubject) -> str | None:
    recall = subject.summary.get("needle_recall")
    return None if recall and recall["records"] else "no answer is known"


def _no_latencies(subject: RunSubject) -> str | None:
    if not subject.summary.get("serving"):
        return "no requests arrived over time"
    histograms = subject.summary["histograms"]
    return None if any(histograms[f"{name}_us"]["values"] for name in _DURATIONS) else "none was served"


def _no_arrivals(subject: RunSubject) -> str | None:
    serving = subject.summary.get("serving")
    return None if serving and serving["requests_over_time"] else "no requests arrived over time"


def _not_tiered(subject: RunSubject) -> str | None:
    if subject.run.manifest.get("tiers") is None:
        return "HBM held everything"
    return None if subject.summary["counts"]["records"] else "no step was recorded"


def _nothing_moved(subject: RunSubject) -> str | None:
    if reason := _not_tiered(subject):
        return reason
    moved = any(num_bytes for _, num_bytes, _, _ in _moves(subject))
    return None if moved else "nothing was moved in a recorded step"


def _blocks_touched(axes: Any, subject: RunSubject) -> list[str]:
    rows = subject.summary["blocks_touched"]
    selectors = (
        ("mean", "measured"),
        ("uniform_mean", "uniform selector"),
        ("recency_mean", "recency selector"),
    )
    for i, (key, label) in enumerate(selectors):
        there = [
            (place, row[key] / row["context_mean"]) for place, row in enumerate(rows) if row[key] is not None
        ]
        places, shares = zip(*there, strict=True) if there else ((), ())
        bars = axes.bar(
            np.array(places) + 0.29 * (i - 1),
            shares,
            0.27,
            label=label,
            **hatched(i),
        )
        for bar, share in zip(bars, shares, strict=True):
            text = f"{100 * share:.0f}" if share >= 0.01 else f"{100 * share:.1g}"
            number_bar(axes, bar, text, share, upright=True)
    axes.set_xticks(range(len(rows)), [f"{row['block_size_tokens']}" for row in rows])
    axes.set(xlabel="block size (tokens)", ylabel="share of the context's blocks")
    shares_axis(axes.yaxis)
    return subject.facts("blocks of " + ", ".join(f"{row['block_size_tokens']}" for row in rows))


def _map(axes: Any, subject: RunSubject) -> list[str]:
    """Tokens selected of each block, step by step. Arrows mark the blocks that hold the answer."""
    from matplotlib.colors import PowerNorm

    records = subject.map_records
    size = records[0]["block_size_tokens"]
    num_blocks = (max(record["seq_len_current"] for record in records) - 1) // size + 1
    per_row = -(-num_blocks // MAX_ROWS)
    selected = np.zeros((-(-num_blocks // per_row) * per_row, len(records)))
    for column, record in enumerate(records):
        blocks = np.asarray(record["selected_token_pos"]) // size
        selected[:num_blocks, column] = np.bincount(blocks, minlength=num_blocks)
    pooled = selected.reshape(-1, per_row, len(records)).max(axis=1)
    end = len(pooled) * per_row
    # The root spreads the small counts, which are most of them; 0 is white.
    image = axes.imshow(
        pooled,
        norm=PowerNorm(0.5, vmin=0),
        cmap="Blues",
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(-0.5, len(records) - 0.5, -0.5, end - 0.5),
    )
    bar = axes.figure.colorbar(image, ax=axes, label="selected tokens (root scale)")
    whole_numbers(bar.ax.yaxis)
    steps = [record["step_idx"] for record in records]
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    axes.xaxis.set_major_formatter(lambda place, _: f"{steps[int(place)]}" if 0 <= place < len(steps) else "")
    axes.set(xlabel="decode step of the request", ylabel=f"block of {size} tokens")
    answer = {position // size for position in _needle_positions(subject.run, records[0]["request_id"])}
    for block in sorted({block // per_row for block in answer}):
        axes.annotate(
            "",
            xy=(1, min((block + 0.5) * per_row - 0.5, end)),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            arrowprops={"color": "C1", "headwidth": 6, "headlength": 6, "width": 1},
        )
    return [
        model_name(subject.run.manifest),
        f"request {plain(records[0]['request_id'], 40)}",
        f"layer {subject.layer} ({subject.why_layer})",
        f"blocks of {size} tokens",
        *([f"a row is the most of {per_row} blocks"] if per_row > 1 else []),
        subject.unit,
        f"{'the first ' if len(records) == MAX_STEPS else ''}{several(len(records), 'decode step')}",
        *(["arrows: the answer"] if answer else []),
    ]


def _needle_positions(run: RunReader, request_id: str) -> list[int]:
    same = (request for request in run.requests() if request["request_id"] == request_id)
    positions: list[int] = next(same, {}).get("needle_positions", [])
    return positions


_OVERLAPS = (("step_overlap", "the step before"), ("layer_overlap", "the layer before"))


def _overlap(axes: Any, subject: RunSubject) -> list[str]:
    for i, (key, label) in enumerate(_OVERLAPS):
        if subject.summary[key]["pairs"]:
            _by_layer(axes, subject, i, subject.summary[key], f"in {label}", f"at random, {label}")
    axes.set_ylabel("share of a selection")
    return subject.facts()


def _needle_recall(axes: Any, subject: RunSubject) -> list[str]:
    _by_layer(axes, subject, 0, subject.summary["needle_recall"], "measured", "random selector (k / N)")
    axes.set_ylabel("share of the answer's tokens")
    return [*subject.facts(), *steps_of_recall(subject.summary)]


def _by_layer(axes: Any, subject: RunSubject, i: int, section: Summary, label: str, baseline: str) -> None:
    """A line over the layers, and its random baseline, dashed or dotted."""
    num_layers = len(subject.kind.layers)
    shares = [np.nan if share is None else share for share in section["per_layer"]]
    axes.plot(range(len(shares)), shares, marker="os"[i], color=f"C{i}", label=label, clip_on=False)
    random = section["random_mean"]
    if random is not None:
        axes.axhline(random, color=f"C{i}", linestyle=BASELINE_STYLES[i], linewidth=1.8, label=baseline)
    layers_axis(axes.xaxis, range(num_layers))
    shares_axis(axes.yaxis)


def _offsets(axes: Any, subject: RunSubject) -> list[str]:
    """How far back selected tokens lie, beside the same of selectors that take any, or the newest."""
    histogram = subject.summary["histograms"]["offsets"]
    back, share = np.asarray(histogram["values"]) + 1, _cumulative(histogram)
    farthest = max(max(subject.contexts, default=1), int(back[-1]), 2)
    grid = np.unique(np.geomspace(1, farthest, 300).round())
    axes.step(
        np.append(back, farthest),
        np.append(share, 1),
        where="post",
        color="C0",
        linewidth=2.4,
        label="selected tokens",
    )
    baselines = (("uniform selector", subject.contexts, "C1"), ("recency selector", subject.sizes, "0.35"))
    for i, (label, reach, color) in enumerate(baselines):
        ends, weights = np.array(sorted(reach)), np.array([reach[end] for end in sorted(reach)], dtype=float)
        if not len(ends):  # the records are lost
            continue
        expected = (np.minimum(grid[:, None], ends) / np.maximum(ends, 1) * weights).sum(axis=1)
        axes.plot(grid, expected / weights.sum(), color=color, linestyle=BASELINE_STYLES[i], label=label)
    axes.set_xscale("log")
    axes.set(
        xlabel="tokens back from the query (1: itself)", ylabel="share of selected tokens", xlim=(1, farthest)
    )
    numbers_axis(axes.xaxis)
    shares_axis(axes.yaxis)
    return subject.facts(pooled=True)


def _cumulative(histogram: Summary) -> np.ndarray:
    counts = np.asarray(histogram["counts"], dtype=float)
    share: np.ndarray = np.cumsum(counts) / counts.sum()
    return share


def _found(axes: Any, subject: RunSubject) -> list[str]:
    """In which tier the selected tokens were, and the touched blocks; each adds up to 100 %."""
    setup, fetched = subject.run.manifest["tiers"], subject.summary["kv_fetch"]
    words = run_words(subject.run.manifest)
    measures = {
        key: textwrap.fill(RATES[name].of.format(**words), 14)
        for key, name in (("hit_tokens", "tokens"), ("hit_blocks", "blocks"))
    }
    names = tiers_of(setup)
    thick = 0.8 / len(names)
    for i, name in enumerate(names):
        counts = [fetched[name][key] for key in measures]
        shares = [
            count / (sum(fetched[other][key] for other in names) or 1)
            for key, count in zip(measures, counts, strict=True)
        ]
        places = np.arange(len(measures)) + thick * (i - (len(names) - 1) / 2)
        bars = axes.barh(places, shares, 0.9 * thick, label=TIER_TITLES[name], **hatched(i))
        texts = [f"{100 * share:.1f} % ({count:,})" for share, count in zip(shares, counts, strict=True)]
        for bar, text, share in zip(bars, texts, shares, strict=True):
            number_bar(axes, bar, text, share)
    axes.set_yticks(range(len(measures)), list(measures.values()))
    axes.set(xlabel="share found in the tier", ylim=(len(measures) - 0.5, -0.5))
    shares_axis(axes.xaxis)
    return subject.facts(words["recorded"], _moved_as(setup), pooled=True)


def _moved(axes: Any, subject: RunSubject) -> list[str]:
    """What was read from each pool and written into each tier, and how much of it was selected."""
    moves = _moves(subject)
    largest = max(num_bytes for _, num_bytes, _, _ in moves)
    for i, (_, num_bytes, useful, operations) in enumerate(moves):
        (bar,) = axes.barh(i, num_bytes / MIB, 0.7, color="C2", edgecolor="k", linewidth=0.5)
        if useful is not None:
            axes.barh(i, useful / MIB, 0.7, **hatched(1))
        text = f"{num_bytes / MIB:,.2f} MiB"
        text += "" if operations is None else f", {operations:,} reads"
        number_bar(axes, bar, text, num_bytes / largest)
    axes.barh(0, 0, color="C2", edgecolor="k", linewidth=0.5, label="moved")
    axes.barh(0, 0, **hatched(1), label="of that, selected")
    axes.set_yticks(range(len(moves)), [label for label, *_ in moves])
    axes.set(xlabel="MiB, recorded steps", ylim=(len(moves) - 0.5, -0.5), xlim=(0, 1.02 * largest / MIB))
    return subject.facts(_moved_as(subject.run.manifest["tiers"]), pooled=True)


def _moves(subject: RunSubject) -> list[tuple[str, int, int | None, int | None]]:
    """What was moved: its label, bytes, of those the selected ones, and reads."""
    fetched, names = subject.summary["kv_fetch"], tiers_of(subject.run.manifest["tiers"])
    reads = [
        (f"read from\n{TIER_TITLES[name]}", one["bytes_read"], one["bytes_useful"], one["read_ops"])
        for name in names[1:]
        if (one := fetched[name])
    ]
    written = [
        (f"written to\n{TIER_TITLES[name]}", fetched[name]["bytes_written"], None, None) for name in names
    ]
    return [*reads, *written]


def _moved_as(setup: Summary) -> str:
    return f"moved as {unit_words(setup['unit_tokens'])}"


_DURATIONS = {
    "queue": ("admission", "-"),
    "time_to_first_token": ("first token", "--"),
    "latency": ("finish", ":"),
}


def _latencies(axes: Any, subject: RunSubject) -> list[str]:
    serving, histograms = subject.summary["serving"], subject.summary["histograms"]
    times = {name: np.asarray(histograms[f"{name}_us"]["values"]) / 1000 for name in _DURATIONS}
    largest = max((ms.max() for ms in times.values() if len(ms)), default=0) or 1.0
    smallest = min((ms[ms > 0].min() for ms in times.values() if (ms > 0).any()), default=largest)
    for (name, (label, style)), color in zip(_DURATIONS.items(), ("C0", "C1", "C3"), strict=True):
        if len(ms := times[name]):
            share = _cumulative(histograms[f"{name}_us"])
            x, y = np.concatenate((ms[:1], ms, [largest])), np.concatenate(([0], share, [1]))
            axes.step(x, y, style, color=color, where="post", label=label, linewidth=1.8)
    if largest > 100 * smallest:
        axes.set_xscale("symlog", linthresh=10.0 ** np.floor(np.log10(smallest)), linscale=0.5)
        numbers_axis(axes.xaxis)
    axes.set(
        xlim=(0, 1.02 * largest),
        xlabel="ms since arrival",
        ylabel="share of served requests",
    )
    shares_axis(axes.yaxis)
    return [
        model_name(subject.run.manifest),
        f"{serving['counts']['served']:,} served requests",
        f"{plain(serving['mode'], 40)} batching",
        f"{plain(serving['clock'], 40)} clock",
    ]


def _arrivals(axes: Any, subject: RunSubject) -> list[str]:
    serving = subject.summary["serving"]
    buckets = serving["requests_over_time"]
    starts = np.array([bucket["start_s"] for bucket in buckets])
    width = starts[1] - starts[0] if len(starts) > 1 else 1
    edges = np.append(starts, starts[-1] + width)
    counts = {name: [bucket[name] for bucket in buckets] for name in ("arrived", "finished")}
    axes.stairs(counts["arrived"], edges, label="arrived", fill=True, color="C2")
    axes.stairs(counts["finished"], edges, label="finished", color="C0", linewidth=1.8)
    top = max(max(values) for values in counts.values())
    axes.set(
        xlim=(edges[0], edges[-1]),
        ylim=(0, 1.05 * max(top, 1)),
        xlabel="s since the run's start",
        ylabel=f"requests in {width} s",
    )
    whole_numbers(axes.yaxis)
    return [
        model_name(subject.run.manifest),
        f"{sum(counts['arrived']):,} requests",
        f"{plain(serving['mode'], 40)} batching",
    ]


PANELS: dict[str, Panel[RunSubject]] = {
    "blocks": Panel("KV blocks that a step touches", _blocks_touched, _no_positions),
    "map": Panel("Tokens selected per block, step by step", _map, _no_map),
    "overlap": Panel("Share of a selection that was selected before", _overlap, _no_overlap),
    "offsets": Panel("How far back selected tokens lie", _offsets, _no_positions),
    "needle": Panel("Share of the answer's tokens that a step selects", _needle_recall, _no_needle),
    "found": Panel("Where the selected KV was found", _found, _not_tiered),
    "moved": Panel("What was moved between tiers", _moved, _nothing_moved),
    "latencies": Panel("From a request's arrival to ...", _latencies, _no_latencies),
    "arrivals": Panel("Requests over time", _arrivals, _no_arrivals),
}
"""In the order of the sheet."""
