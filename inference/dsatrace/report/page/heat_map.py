"""A large heat map: a canvas that the page's script fills, over a coarse drawing for readers without it.

Cells are one byte each, gzip and base64 in the page; a map that is too large is pooled, and says so in
its caption. Knows no run.

    body = heat_map("Misses", "...", values, Ramp("missed ids"), Axis("step", 0, 64), Axis("layer", 0, 61))
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .section import told
from .svg import NUM_RAMP, Axis, Plot, box, compact, drawing, frame, ramp_level, swatch

MOST_COLUMNS, MOST_ROWS = 2000, 500
MAX_BYTES = 150_000
"""Of one map's data in the page."""
_COARSE_COLUMNS, _COARSE_ROWS = 68, 24
_LEVELS = 254  # a byte is 0 for no value, else 1 + the level

Pool = Literal["max", "mean"]


@dataclasses.dataclass(frozen=True)
class Ramp:
    """What the colours mean: `title` names the value and its unit; they begin at 0."""

    title: str
    high: float | None = None  # None: the largest value
    share: bool = False  # of 1; the ramp ends at 100 % unless `high` says otherwise
    root: bool = False  # colours go with the square root, which spreads small values


@dataclasses.dataclass(frozen=True)
class Mark:
    """A box around columns `left` to `right` and rows `top` to `bottom`, in cells before pooling."""

    name: str
    left: float
    right: float
    top: float
    bottom: float
    style: int = 0


@dataclasses.dataclass(frozen=True)
class Outline:
    """A line through points (column, row), in cells; a negative row lies above the map."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    wide: bool = False


def heat_map(
    title: str,
    desc: str,
    values: np.ndarray,
    ramp: Ramp,
    x: Axis,
    y: Axis,
    *,
    y_labels: Sequence[str] | None = None,
    pool: Pool = "max",
    marks: Sequence[Mark] = (),
    outlines: Sequence[Outline] = (),
    said: str = "",
    max_bytes: int = MAX_BYTES,
) -> str:
    """(R, C) values, NaN for none, row 0 on top; x and y are the axes' ranges over all columns and rows.

    `y_labels` name the rows instead of the axis' ticks; `said` stands below the map.
    """
    values = np.asarray(values, np.float64)
    by = [-(-values.shape[0] // MOST_ROWS), -(-values.shape[1] // MOST_COLUMNS)]
    by = [max(one, 1) for one in by]
    while True:
        pooled = pooled_by(values, by[0], by[1], pool)
        high = _high(pooled, ramp)
        cells, data = quantized(pooled, high), packed(pooled, high)
        if len(data) <= max_bytes or max(pooled.shape) <= 1:
            break
        by[0 if y_labels is None and pooled.shape[0] > pooled.shape[1] / 4 else 1] *= 2
    rows, columns = values.shape
    height = 14 + 46 + (min(max(rows * 18, 120), 420) if y_labels is not None else 300)
    labels = None
    if y_labels is not None:
        labels, y = [(i + 0.5, label) for i, label in enumerate(y_labels)], Axis(y.title, 0, rows)
    whole_rows, whole_columns = (
        cells.shape[0] * by[0],
        cells.shape[1] * by[1],
    )  # the last cell may stand for fewer
    x, y = _stretched(x, whole_columns / columns), _stretched(y, whole_rows / rows)
    plot = frame(x, y, height=height, y_labels=labels, grid=False, down=True)
    coarse_by = -(-rows // _COARSE_ROWS), -(-columns // _COARSE_COLUMNS)
    coarse = pooled_by(values, *coarse_by, pool)
    preview = _preview(coarse, high, ramp.root, plot, coarse_by[0] / whole_rows, coarse_by[1] / whole_columns)
    svg = drawing(title, desc, plot, f'<g class="preview">{preview}</g>')
    sides = {
        "left": plot.left / plot.total_width,
        "top": plot.top / plot.total_height,
        "width": plot.width / plot.total_width,
        "height": plot.height / plot.total_height,
    }
    style = ";".join(f"{name}:{100 * part:.3f}%" for name, part in sides.items())
    facts = {
        "rows": cells.shape[0], "columns": cells.shape[1], "high": high, "levels": _levels(high, pooled),
        "share": ramp.share, "root": ramp.root, "value": ramp.title,
        "x": [x.title, x.low, x.high], "y": [y.title, y.low, y.high], "yLabels": list(y_labels or ()),
        "rowsPerCell": by[0], "columnsPerCell": by[1], "pool": pool,
    }  # fmt: skip
    canvas = (
        f'<canvas class="heat" style="{style}" width="{cells.shape[1]}" height="{cells.shape[0]}" '
        f'data-facts="{told(json.dumps(facts), None)}" data-cells="{data.decode()}" '
        f'tabindex="0" role="img" aria-label="{told(title)}, read cell by cell with the arrow keys"></canvas>'
    )
    over = "".join(_mark(mark, whole_rows, whole_columns) for mark in marks)
    over += "".join(_outline(one, whole_rows, whole_columns) for one in outlines)
    if over:
        over = (
            f'<svg class="marks" style="{style}" viewBox="0 0 1000 1000" preserveAspectRatio="none" '
            f'aria-hidden="true">{over}</svg>'
        )
    names = {mark.name: mark for mark in marks}
    keys = "".join(
        f"<li>{swatch(box(f'mark m{mark.style}', 6, 2, 22, 12), mark.name)}</li>" for mark in names.values()
    )
    lines = {one.name: f'<path class="{_kind(one)}" d="{_swatch_path(one)}"/>' for one in outlines}
    keys += "".join(f"<li>{swatch(line, name)}</li>" for name, line in lines.items())
    legend = f'<ul class="legend"><li>{_ramp_key(ramp, high)}</li>{keys}</ul>'
    said = " ".join(text for text in (pooling_said(by[0], by[1], pool), said) if text)
    return (
        f'<figure class="chart">{legend}'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{told(title)}">'
        f'<div class="stack">{svg}{canvas}{over}</div></div>'
        f'<figcaption><span class="readout" aria-live="polite"></span>{told(said)}<span class="fit"></span>'
        "</figcaption></figure>"
    )


def pooled_by(values: np.ndarray, rows: int, columns: int, pool: Pool) -> np.ndarray:
    """(R / rows, C / columns), the largest or the mean of each group's values; NaN where it has none."""
    rows, columns = max(rows, 1), max(columns, 1)
    if rows == columns == 1:
        return values
    num_rows, num_columns = -(-values.shape[0] // rows), -(-values.shape[1] // columns)
    padded = np.full((num_rows * rows, num_columns * columns), np.nan)
    padded[: values.shape[0], : values.shape[1]] = values
    groups = padded.reshape(num_rows, rows, num_columns, columns)
    known = ~np.isnan(groups)
    count = known.sum(axis=(1, 3))
    if pool == "max":
        found = np.where(known, groups, -np.inf).max(axis=(1, 3))
    else:
        found = np.where(known, groups, 0).sum(axis=(1, 3)) / np.maximum(count, 1)
    return np.where(count > 0, found, np.nan)


def quantized(values: np.ndarray, high: float) -> np.ndarray:
    """(R, C) uint8: 0 for no value, else 1 + the nearest of the levels from 0 to `high`."""
    levels = _levels(high, values)
    known = np.where(np.isnan(values), 0, values)
    scaled = np.clip(np.rint(known * (levels / high) if high else known * 0), 0, levels)
    return np.where(np.isnan(values), 0, scaled + 1).astype(np.uint8)


def packed(values: np.ndarray, high: float) -> bytes:
    """The quantised cells as the page holds them, row by row."""
    return base64.b64encode(gzip.compress(quantized(values, high).tobytes(), 9, mtime=0))


def _levels(high: float, values: np.ndarray) -> int:
    """Whole numbers up to 254 have a level each, so nothing is rounded."""
    known = values[~np.isnan(values)]
    whole = high == int(high) and 0 < high <= _LEVELS and bool(np.all(known == np.rint(known)))
    return int(high) if whole else _LEVELS


def _high(values: np.ndarray, ramp: Ramp) -> float:
    if ramp.high is not None:
        return ramp.high
    known = values[~np.isnan(values)]
    return 1.0 if ramp.share else float(known.max(initial=0)) or 1.0


def pooling_said(rows: int, columns: int, pool: Pool) -> str:
    """What a cell of the figure stands for; nothing where it is one value."""
    if rows == columns == 1:
        return ""
    parts = [f"{count} {name}" for count, name in ((rows, "rows"), (columns, "columns")) if count > 1]
    what = "the largest" if pool == "max" else "the mean"
    return f"Pooled to fit: a cell of the figure shows {what} of {' by '.join(parts)}."


def _stretched(axis: Axis, by: float) -> Axis:
    return dataclasses.replace(axis, high=axis.low + (axis.high - axis.low) * by)


def _preview(values: np.ndarray, high: float, root: bool, plot: Plot, tall: float, wide: float) -> str:
    """A path for each colour of the ramp; equal neighbours in a row are one box.

    `tall` and `wide` are a cell's size as a share of the plot's.
    """
    columns = values.shape[1]
    paths: list[list[str]] = [[] for _ in range(NUM_RAMP)]
    for row, shown in enumerate(values.tolist()):
        top, bottom = row * tall, min((row + 1) * tall, 1.0)
        levels = [-1 if math.isnan(value) else ramp_level(_place(value, high, root), 1) for value in shown]
        start = 0
        for end in range(1, columns + 1):
            if end == columns or levels[end] != levels[start]:
                if levels[start] >= 0:
                    at, across = start * wide * plot.width, (min(end * wide, 1.0) - start * wide) * plot.width
                    down = (bottom - top) * plot.height
                    place = f"M{plot.left + at:.1f} {plot.top + top * plot.height:.1f}"
                    paths[levels[start]].append(f"{place}h{across:.1f}v{down:.1f}h{-across:.1f}z")
                start = end
    return "".join(
        f'<path class="r{level}" d="{"".join(path)}"/>' for level, path in enumerate(paths) if path
    )


def _place(value: float, high: float, root: bool) -> float:
    """On the ramp, from 0 to 1."""
    share = value / high if high else 0.0
    return math.sqrt(share) if root else share


def _outline(one: Outline, rows: int, columns: int) -> str:
    x, y = 1000 / max(columns, 1), 1000 / max(rows, 1)
    points = "L".join(f"{a * x:.1f} {b * y:.1f}" for a, b in one.points)
    halo = "" if one.wide else f'<path class="halo" d="M{points}"/>'
    return f'{halo}<path class="{_kind(one)}" d="M{points}"/>'


def _swatch_path(one: Outline) -> str:
    is_upright = one.wide and one.points[0][0] == one.points[-1][0]
    return "M17 3V13" if is_upright else "M3 8H31"


def _kind(one: Outline) -> str:
    return f"line-mark m{one.style}{' wide' if one.wide else ''}"


def _mark(mark: Mark, rows: int, columns: int) -> str:
    x, y = 1000 / max(columns, 1), 1000 / max(rows, 1)
    wide, tall = max((mark.right - mark.left) * x, 1), max((mark.bottom - mark.top) * y, 1)
    return box(f"mark m{mark.style}", mark.left * x, mark.top * y, wide, tall)


def _ramp_key(ramp: Ramp, high: float) -> str:
    """The colours, with the values at their ends and the name of what they show."""
    ends = ("0%", f"{high * 100:.3g}%") if ramp.share else ("0", compact(high))
    boxes = "".join(f'<rect class="r{i}" x="{i * 14}" width="14.5" height="12"/>' for i in range(NUM_RAMP))
    fit = f'viewBox="0 0 {NUM_RAMP * 14} 12" preserveAspectRatio="none" aria-hidden="true"'
    scale = " (square-root scale)" if ramp.root and high != 1 else ""
    return f'{told(ramp.title)}{scale}: {ends[0]} <svg class="ramp" {fit}>{boxes}</svg> {ends[1]}'
