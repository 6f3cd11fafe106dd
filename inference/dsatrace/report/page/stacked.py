"""Lying bars with their numbers: parts that add up to a whole, or amounts side by side.

A part is told from its neighbours by its label, its hatching and its colour. A drawing is no wider than a
telephone, so that numbers at the ends of bars are in sight there too. Knows no run.

    stacked("Found", "...", [Stack("tokens", [Part("HBM", 0.74, "74.0%"), Part("pool", 0.26, "26.0%")])])
    amounts("Moved", "...", [Stack("HBM", [Part("read", 17e6, "17.0 MiB"), Part("written", 4e6, "4.0 MiB")])])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .svg import LINE, Plot, box, drawing, figure, lines_of, swatch, text_at, text_width

_WIDE = 400.0
_TALL, _ROW, _GAP = 22.0, 34.0, 2.0


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    value: float
    text: str  # its number, as people read it
    style: int | None = None  # numbers its colour and hatching; None: by its name
    null: bool = False  # grey


@dataclasses.dataclass(frozen=True)
class Stack:
    label: str
    parts: Sequence[Part]


def stacked(title: str, desc: str, stacks: Sequence[Stack]) -> str:
    """Each bar is as long as the others, since it is a whole. A number that does not fit into its part
    stands at the bar's end, with the part's name."""
    left = _left([stack.label for stack in stacks])
    room = _WIDE - left - 4
    names = _names(stacks)
    content: list[str] = []
    y = 8.0
    for stack in stacks:
        y += _label(content, left, y, stack.label)
        whole, x, beside = sum(part.value for part in stack.parts), left, []
        for part in stack.parts:
            wide = room * part.value / whole if whole else 0.0
            if wide > 0:
                content.append(_part(part, names, x, y, wide))
            if text_width(part.text) + 10 <= wide:
                content.append(_number(x + wide / 2, y, part.text))
            else:
                beside.append(f"{part.name} {part.text}")
            x += wide
        y += _TALL
        for line in lines_of(", ".join(beside), _WIDE - 8) if beside else ():
            content.append(text_at(left + room, y + 13, line, "end"))
            y += LINE
        y += _ROW - _TALL
    keys = [_key(i, name) for i, name in enumerate(names)]
    return figure(title, _drawn(title, desc, y, content), keys, kind="chart lying")


def amounts(title: str, desc: str, groups: Sequence[Stack]) -> str:
    """A bar from 0 for each part, all on one scale, its number behind it. A part may have no name."""
    bars = [
        (group, part, ", ".join(filter(None, (group.label, part.name))))
        for group in groups
        for part in group.parts
    ]
    left = _left([label for _, _, label in bars])
    texts = max((text_width(part.text) for _, part, _ in bars), default=0)
    most = max((part.value for _, part, _ in bars), default=0)
    room, names = _WIDE - left - texts - 12, _names(groups)
    content: list[str] = []
    y = 8.0
    for group, part, label in bars:
        wide = max(room * part.value / most, 1) if part.value > 0 else 0.0
        y += _label(content, left, y, label)
        if wide:
            content.append(_part(part, names, left, y, wide))
        content.append(text_at(left + wide + 7, y + _TALL / 2 + 4, part.text, "start"))
        y += _TALL + (14 if part is group.parts[-1] and len(group.parts) > 1 else 5)
    return figure(title, _drawn(title, desc, y, content), kind="chart lying")


def _left(labels: Sequence[str]) -> float:
    """Where bars begin: behind their labels, or below them where a label would take over a third."""
    wide = 12 + max(map(text_width, labels), default=0)
    return wide if wide <= _WIDE / 3 else 0.0


def _label(content: list[str], left: float, y: float, label: str) -> float:
    """Draws the label of a bar at y; returns how much it moves the bar down."""
    if left:
        content.append(text_at(left - 8, y + _TALL / 2 + 4, label, "end"))
        return 0.0
    lines = lines_of(label, _WIDE - 8)
    content += [text_at(0, y + LINE * i + 11, line, "start") for i, line in enumerate(lines)]
    return LINE * len(lines) + 1.0


def _drawn(title: str, desc: str, height: float, content: Sequence[str]) -> str:
    place = Plot(0, 0, _WIDE, height, _WIDE, height, "", float, float)  # no axes: the numbers are written out
    return drawing(title, desc, place, "".join(content))


def _names(stacks: Sequence[Stack]) -> list[str]:
    return list(dict.fromkeys(part.name for stack in stacks for part in stack.parts))


def _part(part: Part, names: Sequence[str], x: float, y: float, wide: float) -> str:
    style, null = names.index(part.name) if part.style is None else part.style, " null" if part.null else ""
    wide = max(wide - _GAP, 0.5)
    return (
        f'<g class="s{style % 8}{null}">{box("bar soft", x, y, wide, _TALL)}'
        f'<path class="hatch" d="{hatching(style, x, y, wide, _TALL)}"/></g>'
    )


def _number(x: float, y: float, text: str) -> str:
    """On a plate, so that no hatching runs through it."""
    wide = text_width(text) + 6
    return box("plate", x - wide / 2, y + 3, wide, _TALL - 6) + text_at(
        x, y + _TALL / 2 + 4, text, kind="ink"
    )


def _key(style: int, name: str) -> str:
    drawn = f'{box("bar soft", 5, 2, 24, 12)}<path class="hatch" d="{hatching(style, 5, 2, 24, 12)}"/>'
    return swatch(f'<g class="s{style % 8}">{drawn}</g>', name)


def hatching(style: int, x: float, y: float, wide: float, tall: float) -> str:
    """Lines that fill a box: none, rising, falling, upright; then the same again, closer."""
    kind, apart = style % 4, 7.0 / (1 + style // 4)
    if kind == 0:
        return ""
    if kind == 3:
        return "".join(f"M{x + at:.1f} {y:.1f}v{tall:.1f}" for at in _every(apart, wide))
    parts = []
    for at in _every(apart, wide + tall):
        a, b = max(at - tall, 0.0), min(at, wide)  # where the line enters and leaves
        low, high = at - a, at - b  # heights above the box's foot at these places, for a rising line's mirror
        ya, yb = (y + low, y + high) if kind == 1 else (y + tall - low, y + tall - high)
        parts.append(f"M{x + a:.1f} {ya:.1f}L{x + b:.1f} {yb:.1f}")
    return "".join(parts)


def _every(apart: float, end: float) -> list[float]:
    return [apart * (i + 0.5) for i in range(int(end / apart + 0.5))]
