"""How alike layers select: what share of its ids each finds in every other, and who could share an index."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..grid import Cell, number, percent
from .heat_map import Mark, Ramp, heat_map
from .material import Material, Record
from .miss_curve import rate
from .section import LeftOut, Row, Section, figures_html, told
from .svg import (
    LINE,
    NUM_RAMP,
    Axis,
    Series,
    box,
    drawing,
    figure,
    frame,
    known_points,
    line_chart,
    lines_of,
    ramp_level,
    text_at,
    text_width,
)

TITLE = "Do layers select the same?"
MOST_MATRIX = 32
"""Layers of a matrix that is drawn and told cell by cell."""


def layer_overlap(material: Material) -> Section | LeftOut:
    record = material.replay
    if record is None:
        return _beside_the_one_before(material)
    groups = [group for group in record["layer_overlap"] if len(group["layers"]) > 1]
    chance = [share for group in groups for row in group["chance"] for share in row if share is not None]
    if not chance:  # nor then is there a share
        return LeftOut(TITLE, "no two layers choose from the same ids")
    body, rows, outlines = figures_html(_answer(groups)), [], []
    for group in groups:
        outlined, what = _outlined(material, group)
        if len(groups) > 1:
            body += f"<h3>Layers {told(_range(group['layers']))}</h3>"
        body += _drawn(group, outlined)
        outlines.append(what)
        rows += list(_rows(group))
    at_random = dict.fromkeys((f"{min(chance):.1%}", f"{max(chance):.1%}"))
    note = (
        "Row: a layer whose selection is used; column: the layer that uses it. A cell is the share of the "
        "column's own ids that the row selects in the same step (the diagonal is all of them), over "
        f"{record['overall']['steps']:,} steps of a layer; chance (k / N) is {' to '.join(at_random)}. "
        f"{' '.join(dict.fromkeys(outlines))} Colours run up to the largest share. Overlap "
        "only: what sharing costs in quality is not known."
    )
    columns = ("selection of layer", "used by layer", "share", "chance")
    return Section("layers", TITLE, body, note, material.replay_command, (columns, rows))


def _drawn(group: Record, outlined: list[tuple[int, int]]) -> str:
    recall = np.array([[math.nan if v is None else v for v in row] for row in group["recall"]])
    labels = [f"{layer}" for layer in group["layers"]]
    np.fill_diagonal(recall, math.nan)  # a layer has all of its own ids
    others, high = recall[~np.isnan(recall)], float(np.nanmax(recall)) or 1.0
    said = f"Shares from {others.min():.1%} to {others.max():.1%} between different layers."
    if len(labels) <= MOST_MATRIX:
        return _matrix(said, recall, labels, outlined, high)
    return heat_map(
        TITLE,
        said,
        recall,
        Ramp("share of the using layer's ids", high, share=True),
        Axis("used by layer (its place)", -0.5, len(labels) - 0.5, whole=True),
        Axis("selection of layer", 0, len(labels)),
        y_labels=labels,
        pool="mean",
        marks=[Mark("shares the index", using, using + 1, used, used + 1) for used, using in outlined],
    )


def _matrix(
    said: str, shares: np.ndarray, labels: list[str], outlined: list[tuple[int, int]], high: float
) -> str:
    """(L, L) shares, NaN for none, with their texts where they fit; the ramp ends at `high`."""
    n, used, using = len(labels), "selection of layer", "used by layer"
    cell = max(min(520 / n, 56), 14)
    height = n * cell + 60
    beside = LINE * len(lines_of(used, height - 40)) + max(map(text_width, labels)) + 40
    width = max(n * cell + beside, text_width(using) * 2)
    y = Axis(used, -0.5, n - 0.5)
    x = Axis(using, -0.5, (width - beside) / cell - 0.5)
    places = list(enumerate(labels))
    plot = frame(x, y, width, height, x_labels=places, y_labels=places, grid=False, down=True)
    size, parts = plot.height / n, []
    for row, column in zip(*np.nonzero(~np.isnan(shares)), strict=True):
        level, text = ramp_level(shares[row, column], high), f"{shares[row, column]:.0%}"
        middle, centre = plot.x(column), plot.y(row)
        parts.append(box(f"r{level}", middle - size / 2, centre - size / 2, size - 1, size - 1))
        if text_width(text, 11) <= size - 4:
            dark = " on-dark" if level > NUM_RAMP / 2 else ""
            parts.append(text_at(middle - 0.5, centre + 4, text, kind=f"small cell{dark}"))
    for row, column in outlined:
        left, top = plot.x(column) - size / 2 + 0.5, plot.y(row) - size / 2 + 0.5
        parts.append(box("outline", left, top, size - 2, size - 2))
    svg = drawing(TITLE, said, plot, "".join(parts))
    return figure(TITLE, f'<div style="width:{width:.0f}px">{svg}</div>')


def _outlined(material: Material, group: Record) -> tuple[list[tuple[int, int]], str]:
    """Places (used, using) of the layers that share an index, and what the pattern is."""
    place = {layer: i for i, layer in enumerate(group["layers"])}
    of_layers = material.kind.layers
    sources = {layer: of_layers[layer].source_layer for layer in place if layer < len(of_layers)}
    own = [(place[source], place[layer]) for layer, source in sources.items() if source in place]
    if own:
        return own, "Outlined: layers that use an earlier layer's selection in this model."
    for suggested in sorted(group["suggested"], key=lambda one: -one["least_recall"]):
        pattern, pairs, full = suggested["pattern"], [], 0
        for i, letter in enumerate(pattern):
            full = i if letter == "F" else full
            if letter == "S":
                pairs.append((full, i))
        if pairs:
            return pairs, (
                f"Outlined: the pattern {pattern}, in which F computes an index, S uses the last F's, and "
                f"every layer keeps at least {suggested['least_recall']:.0%} of its ids."
            )
    return [], "Nothing is outlined: no layer could use an earlier one's selection and keep half of its ids."


def _answer(groups: list[Record]) -> list[str | Cell]:
    """Adjacent layers, beside chance."""
    shares, chance = [], []
    for group in groups:
        for i in range(len(group["layers"]) - 1):
            share, random = group["recall"][i][i + 1], group["chance"][i][i + 1]
            if share is not None and random is not None:
                shares.append(share)
                chance.append(random)
    if not shares:
        return []
    said = [
        "The layer before selects ",
        percent(sum(shares) / len(shares)),
        " of a layer's ids in the same step",
    ]
    if len(shares) > 1:
        said += [" (from ", percent(min(shares)), " to ", percent(max(shares)), ")"]
    return [*said, "; chance gives ", percent(sum(chance) / len(chance)), "."]


def _rows(group: Record) -> Iterator[Row]:
    """A row per pair; of many layers only the adjacent ones."""
    layers = group["layers"]
    every = len(layers) <= MOST_MATRIX
    for i, used in enumerate(layers):
        for j, using in enumerate(layers):
            if j == i + 1 or (every and i != j):
                yield f"{used}", number(using), rate(group["recall"][i][j]), rate(group["chance"][i][j])


def _beside_the_one_before(material: Material) -> Section | LeftOut:
    """From the summary alone: each layer beside the one before it, and beside its step before."""
    series: list[Series] = []
    columns, pairs = ["layer"], []
    by_layer: dict[float, dict[str, float]] = {}
    for style, key in enumerate(("layer_overlap", "step_overlap")):
        overlap = material.summary[key]
        of_layers = overlap["per_layer"] or []  # None where nothing was recorded
        layers, shares = known_points(range(len(of_layers)), of_layers)
        if not layers:
            continue
        name = f"in the {key.removesuffix('_overlap')} before"
        columns.append(name)
        pairs.append(f"{overlap['pairs']:,} pairs {name}")
        series.append(Series(f"selected {name}", layers, shares, style, marked=True))
        chance = [overlap["random_mean"]] * 2
        series.append(Series(f"chance, {name}", [layers[0], layers[-1]], chance, style + 4, null=True))
        for layer, share in zip(layers, shares, strict=True):
            by_layer.setdefault(layer, {})[name] = share
    if not series:
        return LeftOut(TITLE, "the run has no two selections to compare")
    body = line_chart(
        TITLE,
        "Share of a selection that was selected before, by layer.",
        Axis("layer", -0.3, max(by_layer) + 0.3, whole=True),
        Axis("share of a selection", 0, 1, share=True),
        series,
    )
    rows = [
        (f"{layer}", *(rate(of.get(name)) for name in columns[1:])) for layer, of in sorted(by_layer.items())
    ]
    note = (
        f"Share of a layer's selection that was selected before: {', '.join(pairs)}; chance is k / N. The "
        f"matrix of all pairs of layers needs a replay: {material.no_replay}."
    )
    return Section("layers", TITLE, body, note, material.command("report"), (columns, rows))


def _range(layers: list[int]) -> str:
    return ", ".join(map(str, layers)) if len(layers) <= 8 else f"{layers[0]} to {layers[-1]} ({len(layers)})"
