"""One picture of a replay: miss curves, misses over layers and steps, overlap of layers, reuse.

draw_replay(record, folder / "replay.png")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .drawing import picture, whole_numbers
from .published import FIGURES
from .replay_tables import NULL_TITLES
from .tables import caveat

Record = Mapping[str, Any]

_GREYS = {"uniform": ("0.55", ":"), "recency": ("0.55", "--"), "shuffled": ("0.7", "-")}
_MARKS = {"sglang": "x", "fifo": "s", "random": "^", "opt": "*", "lfu": "v", "s3-fifo": "D"}


def draw_replay(record: Record, path: Path) -> None:
    """Six panels; one that has nothing to show says so."""
    panels = (_curves, _heat_map, _layer_overlap, _by_layer, _reuse, _lags)
    with picture(path, (13, 13), rows=3, columns=2, without="--no-figure") as (figure, axes):
        for panel, place in zip(panels, axes, strict=True):
            panel(place, record)
        overall = record["overall"]
        title = f"{record['num_requests']} requests, {overall['steps']:,} steps; unit: {record['unit']}"
        figure.suptitle(f"{title}\n{caveat(record)}" if caveat(record) else title)


def _curves(axes: Any, record: Record) -> None:
    """Sizes in multiples of top-k, so that other models' points can stand beside them."""
    overall, top_k = record["overall"], max(record["top_k"])
    largest = max((size for curve in overall["curves"].values() for size in curve["sizes"]), default=top_k)
    for name, curve in overall["curves"].items():
        if not curve["sizes"]:
            continue
        sizes = np.array([*curve["sizes"], largest]) / top_k  # beyond its last size a curve stays level
        rates = [*curve["miss_rate"], curve["miss_rate"][-1]]
        if name == "run":
            axes.plot(sizes, rates, label="LRU", color="C0", linewidth=2)
        else:
            color, style = _GREYS[name]
            label = f"LRU, {NULL_TITLES[name]}"
            axes.plot(sizes, rates, color=color, linestyle=style, linewidth=1, label=label)
    for i, (policy, cells) in enumerate(overall["policies"].items()):
        if policy == "lru":
            continue
        points = [
            (cell["ids"] / top_k, cell["miss_rate"])
            for cell in cells.values()
            if cell["miss_rate"] is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), _MARKS.get(policy, "o"), color=f"C{i + 1}", label=policy)
    published: dict[str, list[tuple[float, float]]] = {}
    for figure in FIGURES:
        if figure.policy == "lru" and figure.buffer_k is not None and figure.low == figure.high:
            published.setdefault(figure.of.model.partition(",")[0], []).append((figure.buffer_k, figure.low))
    for model, mark in zip(published, "ovP", strict=False):
        (points,) = axes.plot(*zip(*published[model], strict=True), mark, color="k", markersize=5)
        points.set(markerfacecolor="none", label=f"published: {model}")
    ticks = [tick for tick in (1, 2, 4, 8, 16, 32, 64) if tick <= max(largest / top_k, 4)]
    context = (overall["contexts"]["p50"] or 0) / top_k
    if context > 1:
        axes.axvline(context, color="0.8", zorder=0)
        axes.annotate(" N", (context, 0.97), xycoords=("data", "axes fraction"), color="0.5")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick}k" if tick > 1 else "k" for tick in ticks])
    axes.set(
        title="Ids that a buffer misses",
        xlabel=f"buffer size (k = top-k = {top_k})",
        ylabel="share",
        ylim=(0, None),
    )
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)


def _middle_size(record: Record) -> str | None:
    """The size that the panels of one size show: 2k if it was replayed, else the first that could be."""
    sizes = list(record["overall"]["missed_by_step"])
    return "2k" if "2k" in sizes else next(iter(sizes), None)


def _heat_map(axes: Any, record: Record) -> None:
    size = _middle_size(record)
    whose = "decode step" if record["settings"]["share"] == "none" else "step of the buffer"
    axes.set(title=f"Ids missed at {size} (LRU), by step", xlabel=f"counted {whose}", ylabel="layer")
    rows = [
        layer["missed_by_step"][size] for layer in record["layers"] if size in layer.get("missed_by_step", {})
    ]
    if not rows:
        _say(axes, "layers share a buffer, or no size fits a step")
        return
    misses = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(misses, rows, strict=True):
        row[: len(values)] = values
    image = axes.imshow(
        misses, aspect="auto", origin="lower", cmap="magma_r", vmin=0, interpolation="nearest"
    )
    axes.figure.colorbar(image, ax=axes, label="missed ids, mean over requests")
    for axis in (axes.xaxis, axes.yaxis):
        whole_numbers(axis)


def _layer_overlap(axes: Any, record: Record) -> None:
    group = max(record["layer_overlap"], key=lambda group: len(group["layers"]))
    recall = np.array(group["recall"], dtype=float)
    off_diagonal = ~np.eye(len(recall), dtype=bool)
    chance = np.array(group["chance"], dtype=float)
    expected = f"; chance {np.nanmean(chance):.1%}" if chance.size else ""
    axes.set(
        title=f"Share of a layer's ids that another selects too{expected}",
        xlabel="layer",
        ylabel="other layer",
    )
    shown = np.where(off_diagonal, recall, np.nan)
    edges = (-0.5, len(recall) - 0.5)
    image = axes.imshow(shown, origin="lower", cmap="viridis", vmin=0, vmax=1, extent=(*edges, *edges))
    axes.figure.colorbar(image, ax=axes)
    step = max(1, len(recall) // 8)
    ticks = range(0, len(recall), step)
    labels = [f"{group['layers'][tick]}" for tick in ticks]
    axes.set_xticks(list(ticks), labels)
    axes.set_yticks(list(ticks), labels)


def _by_layer(axes: Any, record: Record) -> None:
    size = _middle_size(record)
    axes.set(title=f"Ids missed per step at {size} (LRU)", xlabel="layer", ylabel="ids")
    cells = [
        (layer["name"], layer["policies"]["lru"][size]["misses_per_step"])
        for layer in record["layers"]
        if size in layer.get("missed_by_step", {})
    ]
    if not cells:
        _say(axes, "layers share a buffer, or no size fits a step")
        return
    place = np.arange(len(cells))
    for quantile, color in (("p99", "0.85"), ("p95", "0.65"), ("p50", "C0")):
        axes.bar(place, [missed[quantile] for _, missed in cells], 0.8, color=color, label=quantile)
    step = max(1, len(cells) // 16)
    axes.set_xticks(place[::step], [layer for layer, _ in cells][::step])
    axes.legend()


def _reuse(axes: Any, record: Record) -> None:
    reuse = record["overall"]["reuse"]
    never = reuse["never_selected_before"]
    axes.set(
        title="When a selected id was selected before",
        xlabel="steps ago",
        ylabel="CDF of selected ids",
        ylim=(0, 1.02),
    )
    values, counts = (
        np.array(reuse["distances"]["values"]),
        np.array(reuse["distances"]["counts"], dtype=float),
    )
    if not len(values):
        _say(axes, "no id was selected twice")
        return
    axes.step(values, np.cumsum(counts) / counts.sum() * (1 - never), where="post")
    axes.axhline(1 - never, color="0.6", linestyle=":", label=f"never before: {never:.1%}")
    axes.set_xscale("log")
    axes.legend(loc="lower right")


def _lags(axes: Any, record: Record) -> None:
    overlaps = record["overall"]["overlap"]
    run = overlaps["run"]
    axes.set(title="Share of a selection that an earlier step had too", xlabel="steps back", ylim=(0, 1.02))
    _line(axes, run["lags"], run["share"], label="measured", color="C0", marker="o")
    if run["shifted_share"] is not None:
        _line(
            axes,
            run["lags"],
            run["shifted_share"],
            label="moved along with the query",
            color="C1",
            marker=".",
        )
    _line(axes, run["lags"], run["chance"], label="chance (k / N)", color="k", linestyle=":")
    for name, overlap in overlaps.items():
        if name != "run":
            color, style = _GREYS[name]
            _line(
                axes, overlap["lags"], overlap["share"], label=NULL_TITLES[name], color=color, linestyle=style
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(run["lags"], [f"{lag}" for lag in run["lags"]])
    axes.legend(fontsize="small")


def _line(axes: Any, lags: list[int], shares: list[float | None], **style: Any) -> None:
    axes.plot(lags, [np.nan if share is None else share for share in shares], **style)


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes)
