"""Charts as inline SVG: axes, lines, bars with percentiles. Each reads without colour.

Colours are the style sheet's variables, so that one drawing serves a light and a dark page. A legend is
HTML above the plot, never over the data. Text widths are estimated, since nobody measures them here.

    line_chart("Misses by size", "LRU misses 13 % at 4,096", Axis("ids", 2048, 65536, log=True),
               Axis("misses", 0, 1, share=True), [Series("LRU", sizes, rates)])
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from .section import told

WIDTH, HEIGHT = 680, 320
"""Of a chart, in its own units; on the page it takes the column's width."""
FONT = 12
LINE = 15
DASHES = ("", "7 4", "2 3", "9 3 2 3", "1 4", "12 4", "5 2 1 2 1 2", "3 3")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "plus", "ring", "bar")
NUM_RAMP = 8
"""Colours of the sequential ramp, `--r0` to `--r7` in the style sheet."""


def text_width(text: str, size: float = FONT) -> float:
    """Of a system font, estimated on the wide side; in the chart's units."""
    narrow, wide = "ijltf.,:;'|![]() ", "mwMWQO@%_"
    ems = sum(0.32 if c in narrow else 0.9 if c in wide or ord(c) > 0x2E80 else 0.6 for c in text)
    return ems * size


def lines_of(text: str, width: float, size: float = FONT) -> list[str]:
    """The text in lines that are not wider, as far as its words allow."""
    lines: list[str] = []
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def text_at(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> str:
    """A label whose baseline is at y. `kind`: a class of the style sheet's."""
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{told(text)}</text>'


def box(kind: str, x: float, y: float, width: float, height: float) -> str:
    """A rectangle of a class of the style sheet's."""
    size = f'width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size}/>'


def swatch(content: str, text: str) -> str:
    """A legend's entry: a drawing of 34 by 16, and what it stands for."""
    return f'<svg class="key" viewBox="0 0 34 16" aria-hidden="true">{content}</svg>{told(text)}'


def compact(value: float) -> str:
    """A tick's label: 0, 0.25, 512, 2,048, 1.5 M."""
    if value == 0:
        return "0"
    for unit, size in ((" G", 1e9), (" M", 1e6)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


@dataclasses.dataclass(frozen=True)
class Axis:
    """`title` names what is counted and its unit. The axis of a share goes from 0 to 100 %."""

    title: str
    low: float
    high: float
    log: bool = False
    share: bool = False
    whole: bool = False  # ticks at whole numbers only
    nice: bool = False  # ends at a tick
    ticks: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.share:
            object.__setattr__(self, "low", 0.0)
            object.__setattr__(self, "high", 1.0)
        if self.log:
            object.__setattr__(self, "low", max(self.low, 1e-12))
        if not self.high > self.low:  # one value: it stands in the middle
            low, high = (self.low / 2, self.low * 2) if self.log else (self.low - 0.5, self.low + 0.5)
            object.__setattr__(self, "low", low)
            object.__setattr__(self, "high", high)
        if self.nice:
            ticks = _ticks(self.low, self.high, 6, self.whole)
            step = ticks[1] - ticks[0] if len(ticks) > 1 else self.high - ticks[-1]
            object.__setattr__(self, "high", max(self.high, ticks[-1] + step if ticks[-1] < self.high else 0))

    def place(self, value: float) -> float:
        """From 0 to 1 along the axis."""
        if self.log:
            return (math.log(max(value, self.low)) - math.log(self.low)) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def tick_values(self, most: int) -> list[float]:
        if self.ticks is not None:
            return [tick for tick in self.ticks if self.low <= tick <= self.high]
        if self.log:
            return _log_ticks(self.low, self.high, most)
        return _ticks(self.low, self.high, most, self.whole)

    def label(self, value: float) -> str:
        return f"{value * 100:.3g}%" if self.share else compact(value)


def _ticks(low: float, high: float, most: int, whole: bool) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * by for by in (1, 2, 2.5, 5, 10, 20) if (high - low) / (step * by) <= most)
    step = max(1, math.ceil(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of two, or of ten where there are many."""
    for base in (2.0, 4.0, 10.0, 100.0, 1000.0):
        first = math.ceil(math.log(low, base) - 1e-9)
        last = math.floor(math.log(high, base) + 1e-9)
        if last - first + 1 <= most:
            break
    ticks = [base**i for i in range(first, last + 1)]
    return ticks if len(ticks) > 1 else [low, high]


@dataclasses.dataclass(frozen=True)
class Series:
    """A named line. `style` numbers its colour, dashes and marker; `null` draws it grey and thin."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int = 0
    null: bool = False
    line: bool = True
    marked: bool = False  # a marker at every point


def known_points(xs: Iterable[float], ys: Iterable[float | None]) -> tuple[list[float], list[float]]:
    """Those of the points that have a value."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


@dataclasses.dataclass(frozen=True)
class Plot:
    """Where the data lie: left, top, width, height; and the axes' drawing around them."""

    left: float
    top: float
    width: float
    height: float
    total_width: float
    total_height: float
    axes: str
    x: Callable[[float], float]
    y: Callable[[float], float]


def frame(
    x: Axis,
    y: Axis,
    width: float = WIDTH,
    height: float = HEIGHT,
    *,
    x_labels: Sequence[tuple[float, str]] | None = None,
    y_labels: Sequence[tuple[float, str]] | None = None,
    grid: bool = True,
    down: bool = False,
) -> Plot:
    """Axes with ticks and titles, sized so that no label is cut off or lies over another.

    `x_labels` and `y_labels` (place in data, text) replace the ticks'; of those that do not fit some are
    left out. `down`: the y axis begins at the top.
    """
    if y_labels is None:
        y_labels = [(tick, y.label(tick)) for tick in y.tick_values(6)]
    top, bottom, right = 14.0, 46.0, 18.0
    y_title = lines_of(y.title, height - top - bottom + 20)
    left = 11 + LINE * len(y_title) + max((text_width(text) for _, text in y_labels), default=0) + 6
    if x_labels is None:
        x_labels = [(tick, x.label(tick)) for tick in x.tick_values(9)]
    if x_labels:
        right = max(right, text_width(x_labels[-1][1]) / 2 + 4)
    inner_width, inner_height = width - left - right, height - top - bottom

    def at_x(value: float) -> float:
        return left + x.place(value) * inner_width

    def at_y(value: float) -> float:
        place = y.place(value)
        return top + (place if down else 1 - place) * inner_height

    parts = []
    lines = [(at_x(value), text) for value, text in x_labels]
    for place, text in spaced(lines, lambda label: text_width(label) + 10):
        parts.append(f'<path class="tick" d="M{place:.1f} {top + inner_height:.1f}v4"/>')
        parts.append(text_at(place, top + inner_height + 17, text))
    for place, text in spaced([(at_y(value), text) for value, text in y_labels], lambda _: LINE):
        if grid:
            parts.append(f'<path class="grid" d="M{left:.1f} {place:.1f}h{inner_width:.1f}"/>')
        parts.append(text_at(left - 7, place + 4, text, "end"))
    base = top + inner_height
    parts.append(f'<path class="axis" d="M{left:.1f} {top:.1f}V{base:.1f}H{left + inner_width:.1f}"/>')
    parts.append(text_at(left + inner_width / 2, height - 8, x.title, kind="title"))
    for i, line in enumerate(y_title):
        turned = f"translate({14 + LINE * i} {top + inner_height / 2:.1f}) rotate(-90)"
        parts.append(f'<text class="title" transform="{turned}" text-anchor="middle">{told(line)}</text>')
    return Plot(left, top, inner_width, inner_height, width, height, "".join(parts), at_x, at_y)


def spaced(labels: Iterable[tuple[float, str]], space: Callable[[str], float]) -> list[tuple[float, str]]:
    """Those of the labels (place, text) that leave each other room, from the first on."""
    ordered = sorted(labels)
    for every in range(1, len(ordered) + 1):
        kept = ordered[::every]
        pairs = itertools.pairwise(kept)
        if all(b - a >= (space(one) + space(two)) / 2 for (a, one), (b, two) in pairs):
            return kept
    return ordered[:1]


def drawing(title: str, desc: str, plot: Plot, content: str) -> str:
    """The `<svg>` of a chart. Its description must say in words what the figure shows."""
    return (
        f'<svg role="img" aria-label="{told(title)}" '
        f'viewBox="0 0 {plot.total_width:g} {plot.total_height:g}">'
        f"<title>{told(title)}</title><desc>{told(desc, None)}</desc>{plot.axes}{content}</svg>"
    )


def figure(title: str, svg: str, legend: Sequence[str] = (), kind: str = "chart") -> str:
    """A drawing in a frame that scrolls where the page is narrow, its legend above it. `kind`: classes."""
    keys = f'<ul class="legend">{"".join(f"<li>{key}</li>" for key in legend)}</ul>' if legend else ""
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{told(title)}">{svg}</div>'
    return f'<figure class="{kind}">{keys}{scroll}</figure>'


def marker(kind: int, x: float, y: float, size: float = 3.4) -> str:
    """One of `MARKERS` as a path."""
    a, name = size, MARKERS[(kind + 3 * (kind // len(MARKERS))) % len(MARKERS)]
    paths = {
        "circle": f"M{x - a:.1f} {y:.1f}a{a} {a} 0 1 0 {2 * a} 0a{a} {a} 0 1 0 {-2 * a} 0",
        "ring": f"M{x - a:.1f} {y:.1f}a{a} {a} 0 1 0 {2 * a} 0a{a} {a} 0 1 0 {-2 * a} 0",
        "square": f"M{x - a:.1f} {y - a:.1f}h{2 * a}v{2 * a}h{-2 * a}z",
        "triangle": f"M{x:.1f} {y - a * 1.2:.1f}l{a * 1.15:.1f} {a * 2.1:.1f}h{-a * 2.3:.1f}z",
        "diamond": f"M{x:.1f} {y - a * 1.3:.1f}l{a * 1.3:.1f} {a * 1.3:.1f}l{-a * 1.3:.1f} {a * 1.3:.1f}"
        f"l{-a * 1.3:.1f} {-a * 1.3:.1f}z",
        "cross": f"M{x - a:.1f} {y - a:.1f}l{2 * a} {2 * a}m0 {-2 * a}l{-2 * a} {2 * a}",
        "plus": f"M{x - a:.1f} {y:.1f}h{2 * a}m{-a} {-a}v{2 * a}",
        "bar": f"M{x - a:.1f} {y:.1f}h{2 * a}",
    }
    hollow = " hollow" if name in ("ring", "cross", "plus", "bar") else ""
    return f'<path class="marker{hollow}" d="{paths[name]}"/>'


def line_key(series: Series) -> str:
    """The legend's entry of a line."""
    null = " null" if series.null else ""
    line = f'<path class="line" {_dash(series.style)} d="M1 8H33"/>' if series.line else ""
    point = "" if series.null else marker(series.style, 17, 8)
    return swatch(f'<g class="s{series.style % 8}{null}">{line}{point}</g>', series.name)


def _dash(style: int) -> str:
    dash = DASHES[
        (style + style // len(DASHES)) % len(DASHES)
    ]  # beyond eight, other pairs of dash and marker
    return f'stroke-dasharray="{dash}"' if dash else ""


def line_chart(
    title: str,
    desc: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    lines_at: Sequence[tuple[float, str]] = (),
    x_labels: Sequence[tuple[float, str]] | None = None,
) -> str:
    """Lines over x; `lines_at` (x, label) are drawn upright, their labels above the plot.

    Where two of those labels have no room, the first stays. `x_labels` (x, label) replace the ticks'.
    """
    plot = frame(x, y, x_labels=x_labels)
    parts = []
    labelled: list[tuple[float, float]] = []  # middle and room of each
    for value, label in lines_at:
        if not x.low <= value <= x.high:
            continue
        place, wide = plot.x(value), text_width(label, 11) + 8
        parts.append(f'<path class="at" d="M{place:.1f} {plot.top:.1f}v{plot.height:.1f}"/>')
        middle = min(max(place, wide / 2), plot.total_width - wide / 2)  # not beyond the edge
        if all(abs(middle - other) >= (wide + room) / 2 for other, room in labelled):
            labelled.append((middle, wide))
            parts.append(text_at(middle, 10, label, kind="small"))
    for one in sorted(series, key=lambda one: not one.null):  # grey lines below the others
        points = [(plot.x(a), plot.y(b)) for a, b in zip(one.xs, one.ys, strict=True)]
        if not points:
            continue
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        line = f'<path class="line" {_dash(one.style)} d="M{path}"/>' if one.line and len(points) > 1 else ""
        marked = points if one.marked or not one.line or len(points) == 1 else _some(points)
        dots = "" if one.null and len(points) > 1 else "".join(marker(one.style, *point) for point in marked)
        parts.append(f'<g class="s{one.style % 8}{" null" if one.null else ""}">{line}{dots}</g>')
    return figure(title, drawing(title, desc, plot, "".join(parts)), [line_key(one) for one in series])


def _some(points: Sequence[tuple[float, float]], apart: float = 70) -> list[tuple[float, float]]:
    """Points some way apart, so that a line's marker is seen and the line too."""
    kept: list[tuple[float, float]] = []
    for point in points:
        if not kept or point[0] - kept[-1][0] >= apart:
            kept.append(point)
    return kept


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar up to `value`, with marks at further values, such as p95 and p99."""

    label: str
    value: float
    marks: Sequence[float | None] = ()


def bars(
    title: str,
    desc: str,
    x_title: str,
    y: Axis,
    values: Sequence[Bar],
    names: Sequence[str],
    *,
    whiskers: bool = True,
    height: float = HEIGHT,
) -> str:
    """Upright bars; `names` are the legend's: of the bar, then of each mark, to which a whisker leads."""
    x = Axis(x_title, -0.5, len(values) - 0.5)
    plot = frame(x, y, height=height, x_labels=[(i, bar.label) for i, bar in enumerate(values)])
    wide = min(plot.width / max(len(values), 1) * 0.7, 60)
    parts = []
    for i, bar in enumerate(values):
        middle, top = plot.x(i), plot.y(bar.value)
        parts.append(box("bar s0", middle - wide / 2, top, wide, plot.top + plot.height - top))
        known = [mark for mark in bar.marks if mark is not None]
        if known and whiskers:
            parts.append(f'<path class="whisker" d="M{middle:.1f} {top:.1f}V{plot.y(max(known)):.1f}"/>')
        drawn: list[float] = []
        for place, mark in enumerate(bar.marks):
            if mark is not None:
                size, high = min(wide / 2, 4.5), plot.y(mark)
                aside = sum(abs(high - other) < 2 * size for other in drawn) * 2.4 * size  # not over another
                drawn.append(high)
                point = marker(place + 2, middle + aside, high, size)
                parts.append(f'<g class="s{place + 1} on-bar">{point}</g>')
    keys = [swatch(box("bar s0", 9, 2, 16, 12), names[0])]
    for place, name in enumerate(names[1:]):
        keys.append(swatch(f'<g class="s{place + 1}">{marker(place + 2, 17, 8, 4.5)}</g>', name))
    return figure(title, drawing(title, desc, plot, "".join(parts)), keys if len(names) > 1 else ())


def ramp_level(value: float, high: float) -> int:
    """Of a value from 0 to `high`, the colour of the ramp."""
    share = value / high if high else 0.0
    return min(max(int(share * NUM_RAMP), 0), NUM_RAMP - 1)
