"""A replay's pictures: miss curves, misses over layers and steps, overlap of layers, reuse.

`PANELS` is the table of them.

draw_replay(record, folder / "replay").paths      # replay.png in the folder
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..text import counted
from .drawing import plain_label, whole_numbers
from .panels import (
    BASELINE_STYLES,
    Drawn,
    Panel,
    PictureSettings,
    draw_panels,
    layers_axis,
    numbers_axis,
    shares_axis,
)
from .published import lru_points
from .replay_tables import NULL_TITLES
from .tables import caveat

Record = Mapping[str, Any]

_GREYS = {
    "uniform": ("0.4", BASELINE_STYLES[1]),
    "recency": ("0.4", BASELINE_STYLES[0]),
    "shuffled": ("0.6", "-"),
}
_MARKS = {"sglang": "x", "fifo": "s", "random": "^", "opt": "*", "lfu": "v", "s3-fifo": "D"}


def draw_replay(
    record: Record, stem: Path, settings: PictureSettings | None = None, whose: str = ""
) -> Drawn:
    """Draws the sheet, or each panel that `settings` names; `whose` selections these are, if it is known."""
    record, overall = {**record, "whose": whose}, record["overall"]
    heading = f"{counted(record['num_requests'], 'request')}, {counted(overall['steps'], 'step')} of a layer"
    return draw_panels(PANELS, record, stem, heading, settings, caveat(record) or "")


def _facts(record: Record, *own: str) -> list[str]:
    """Of a panel: whose selections these are."""
    num_requests, num_layers = record["num_requests"], len(record["layers"])
    unit = record["unit"]
    if record["unit_tokens"] > 1:
        unit += f" of {record['unit_tokens']} tokens"
    return [
        record["whose"] or f"model of config {record['model_config_digest'][:8]}",
        "1 request" if num_requests == 1 else f"mean of {num_requests:,} requests",
        counted(num_layers, "layer"),
        *own,
        f"unit: {unit}",
        f"{counted(record['overall']['steps'], 'step')} of a layer",
        *_past_answers(record),
    ]


def _past_answers(record: Record) -> Iterator[str]:
    past = record["past_answer"]
    if past and past["past"] and record["settings"]["steps"] == "all":
        yield f"{past['past']:,} of {past['steps']:,} decode steps past the answers"


def _no_step(record: Record) -> str | None:
    return None if record["overall"]["steps"] else "no step was counted"


def _no_size(record: Record) -> str | None:
    if reason := _no_step(record):
        return reason
    return None if _by_layer_sizes(record) else "layers share a buffer, or no size holds a step"


def _no_second_layer(record: Record) -> str | None:
    largest = max((len(group["layers"]) for group in record["layer_overlap"]), default=0)
    return None if largest > 1 else "there are no two layers to compare"


def _no_reuse(record: Record) -> str | None:
    return None if record["overall"]["reuse"]["distances"]["values"] else "no id was selected twice"


def _no_lags(record: Record) -> str | None:
    there = any(share is not None for share in record["overall"]["overlap"]["run"]["share"])
    return None if there else "there are no two steps to compare"


def _no_curve(record: Record) -> str | None:
    return None if record["overall"]["curves"]["run"]["sizes"] else "no step was counted"


def _curves(axes: Any, record: Record) -> list[str]:
    """Sizes in multiples of top-k, so that other models' points can stand beside them."""
    import matplotlib as mpl

    overall, top_k = record["overall"], max(record["top_k"])
    published = {
        model: [(figure.buffer_k or 0, figure.low) for figure in figures]
        for model, figures in lru_points().items()
    }
    largest = max(max(curve["sizes"], default=0) for curve in overall["curves"].values()) / top_k
    end = max([largest, 4, *(size for points in published.values() for size, _ in points)])
    for name, curve in overall["curves"].items():
        if not curve["sizes"]:
            continue
        sizes = np.array([*curve["sizes"], end * top_k]) / top_k  # beyond its last size a curve stays level
        rates = [*curve["miss_rate"], curve["miss_rate"][-1]]
        if name == "run":
            axes.plot(sizes, rates, label="LRU", color="C0", linewidth=2)
        else:
            color, style = _GREYS[name]
            axes.plot(
                sizes, rates, color=color, linestyle=style, linewidth=1.2, label=f"LRU, {NULL_TITLES[name]}"
            )
    # Hollow, and each larger than the one before, so that equal points show all of their marks.
    for i, (policy, cells) in enumerate(overall["policies"].items()):
        points = [
            (cell["ids"] / top_k, cell["miss_rate"])
            for cell in cells.values()
            if cell["miss_rate"] is not None
        ]
        if policy != "lru" and points:
            axes.plot(
                *zip(*points, strict=True),
                _MARKS.get(policy, "o"),
                color=f"C{1 + (i - 1) % 5}",
                markersize=(0.6 + 0.3 * i) * mpl.rcParams["lines.markersize"],
                markerfacecolor="none",
                label=plain_label(policy),
                clip_on=False,
            )
    for model, mark in zip(published, "oPv", strict=False):
        (line,) = axes.plot(*zip(*published[model], strict=True), mark, color="k", markersize=4)
        line.set(label=f"published: {model}", clip_on=False)
    if context := overall["contexts"]["p50"]:
        axes.axvline(context / top_k, color="0.75", zorder=0, label="the median context")
        end = max(end, context / top_k)
    ticks = [2**i for i in range(int(np.log2(end)) + 1)]
    ticks = ticks[:: -(-len(ticks) // 9)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick}k" if tick > 1 else "k" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=f"buffer size (k: top-k, {top_k} ids)", ylabel="share of selected ids missed")
    axes.set_xlim(min(1.0, *(size for size, _ in itertools.chain(*published.values()))) / 1.1, 1.1 * end)
    shares_axis(axes.yaxis)
    return _facts(record, f"start: {record['settings']['start']}")


def _middle_size(record: Record) -> str | None:
    """The size that the panels of one size show: 2k if it was replayed, else the first that could be."""
    sizes = list(record["overall"]["missed_by_step"])
    return "2k" if "2k" in sizes else next(iter(sizes), None)


def _by_layer_sizes(record: Record) -> list[Record]:
    """The layers that have a buffer of that size."""
    size = _middle_size(record)
    return [layer for layer in record["layers"] if layer.get("missed_by_step", {}).get(size)]


def _heat_map(axes: Any, record: Record) -> list[str]:
    size, layers = _middle_size(record), _by_layer_sizes(record)
    rows = [layer["missed_by_step"][size] for layer in layers]
    misses = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(misses, rows, strict=True):
        row[: len(values)] = values
    image = axes.imshow(
        misses, aspect="auto", origin="lower", cmap="magma_r", vmin=0, interpolation="nearest"
    )
    if not np.nanmax(misses):
        image.set_clim(0, 1)
    axes.figure.colorbar(image, ax=axes, label="mean of missed ids")
    whose = "decode step" if record["settings"]["share"] == "none" else "step of the buffer"
    axes.set_xlabel(f"counted {whose}")
    whole_numbers(axes.xaxis)
    layers_axis(axes.yaxis, [layer["name"] for layer in layers])
    return _facts(record, f"LRU, a buffer of {size} a layer")


def _layer_overlap(axes: Any, record: Record) -> list[str]:
    group = max(record["layer_overlap"], key=lambda group: len(group["layers"]))
    recall, chance = np.array(group["recall"], dtype=float), np.array(group["chance"], dtype=float)
    shown = np.where(~np.eye(len(recall), dtype=bool), recall, np.nan)
    image = axes.imshow(shown, origin="lower", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    bar = axes.figure.colorbar(image, ax=axes, label="share of the layer's ids")
    shares_axis(bar.ax.yaxis)
    for axis in (axes.xaxis, axes.yaxis):
        layers_axis(axis, group["layers"])
    axes.set_ylabel("other layer")
    expected = [f"{np.nanmean(chance):.1%} by chance"] if np.isfinite(chance).any() else []
    return _facts(record, *expected)


def _by_layer(axes: Any, record: Record) -> list[str]:
    size, layers = _middle_size(record), _by_layer_sizes(record)
    cells = [layer["policies"]["lru"][size]["misses_per_step"] for layer in layers]
    place = np.arange(len(cells))
    drawn = zip(("p99", "p95", "p50"), ("0.93", "C2", "C0"), ("...", "///", ""), strict=True)
    for quantile, color, hatch in drawn:
        axes.bar(
            place,
            [missed[quantile] for missed in cells],
            0.8,
            color=color,
            hatch=hatch,
            edgecolor="k",
            linewidth=0.4,
            label=quantile,
        )
    layers_axis(axes.xaxis, [layer["name"] for layer in layers])
    top = max(missed["p99"] for missed in cells)
    axes.set(ylabel="missed ids per step", ylim=(0, 1.03 * top or 1))
    whole_numbers(axes.yaxis)
    return _facts(record, f"LRU, a buffer of {size} a layer")


def _reuse(axes: Any, record: Record) -> list[str]:
    reuse = record["overall"]["reuse"]
    never = reuse["never_selected_before"]
    values = np.array(reuse["distances"]["values"])
    share = np.cumsum(reuse["distances"]["counts"]) / np.sum(reuse["distances"]["counts"]) * (1 - never)
    last = max(values[-1], 2)
    axes.step(
        np.append(values, last),
        np.append(share, share[-1]),
        where="post",
        color="C0",
        label="selected before",
    )
    axes.axhline(
        1 - never, color="0.4", linestyle=BASELINE_STYLES[0], label=f"the rest, {never:.1%}: never before"
    )
    axes.set_xscale("log")
    axes.set(xlabel="steps ago", ylabel="share of selected ids", xlim=(1, last))
    numbers_axis(axes.xaxis)
    shares_axis(axes.yaxis)
    return _facts(record)


def _lags(axes: Any, record: Record) -> list[str]:
    overlaps = record["overall"]["overlap"]
    run = overlaps["run"]
    _line(axes, run["lags"], run["share"], label="measured", color="C0", marker="o")
    if run["shifted_share"] is not None:
        _line(
            axes,
            run["lags"],
            run["shifted_share"],
            label="moved along with the query",
            color="C1",
            marker="s",
        )
    _line(axes, run["lags"], run["chance"], label="chance (k / N)", color="k", marker="_", linestyle="")
    for name, overlap in overlaps.items():
        if name != "run":
            color, style = _GREYS[name]
            _line(
                axes, overlap["lags"], overlap["share"], label=NULL_TITLES[name], color=color, linestyle=style
            )
    there = [lag for lag, share in zip(run["lags"], run["share"], strict=True) if share is not None]
    axes.set_xscale("log", base=2)
    axes.set_xticks(there, [f"{lag}" for lag in there])
    axes.minorticks_off()
    axes.set(xlabel="steps back", ylabel="share of a selection", xlim=(there[0] / 1.1, there[-1] * 1.1))
    shares_axis(axes.yaxis)
    return _facts(record)


def _line(axes: Any, lags: list[int], shares: list[float | None], **style: Any) -> None:
    axes.plot(lags, [np.nan if share is None else share for share in shares], **style)


PANELS: dict[str, Panel[Record]] = {
    "curves": Panel("Share of selected ids that a buffer misses", _curves, _no_curve),
    "misses": Panel("Ids missed, by layer and step", _heat_map, _no_size),
    "between": Panel("Share of a layer's ids that another selects too", _layer_overlap, _no_second_layer),
    "layers": Panel("Ids missed per step, by layer", _by_layer, _no_size),
    "reuse": Panel("When a selected id was selected before", _reuse, _no_reuse),
    "lags": Panel("Share of a selection that an earlier step had too", _lags, _no_lags),
}
"""In the order of the sheet."""
