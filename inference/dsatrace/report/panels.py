"""Pictures made of panels: a table says of each its title, what draws it and what it needs.

All panels make one sheet; a named one is a picture of its own, for a paper also without a title. A panel
without data is left out, and why stands in what `draw_panels` returns.

    PANELS = {"overlap": Panel("Overlap of selections", draw=_overlap, needs=_no_overlap)}
    drawn = draw_panels(PANELS, subject, folder / "report", "8 requests")
    drawn.paths          # [folder / "report.png"]
    drawn.left_out       # {"tiers": "HBM held everything"}
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import UserError
from ..text import plain
from .drawing import blank_picture

Subject = TypeVar("Subject")

BASELINE_STYLES = ((0, (4, 4)), (3.3, (1, 0.6, 1, 5.4)))
"""Dashes of two baselines, each in the other's gaps: both are seen where they are equal."""
HATCHES = ("", "///", "...", "xx")
"""Of bars side by side."""


@dataclasses.dataclass(frozen=True)
class Style:
    """How large a panel is (inches), and matplotlib's settings."""

    size: tuple[float, float]
    rc: Mapping[str, Any]
    has_title: bool = True


_COLOURS = ("#08519c", "#e6842a", "#9bd0c2", "#6a3d9a", "#b15928", "#c51b7d")
"""Told apart by the colour-blind; the first three also in grey: dark, middle, light."""


def _rc(text: float, small: float, **more: Any) -> dict[str, Any]:
    sizes = {
        "font.size": text,
        "axes.labelsize": text,
        "figure.titlesize": text,
        "xtick.labelsize": small,
        "ytick.labelsize": small,
        "legend.fontsize": small,
    }
    return {**sizes, "legend.frameon": False, "hatch.linewidth": 0.6, **more}


STYLES = {
    "screen": Style((6.2, 4.6), _rc(9.5, 8.5)),
    "paper": Style(
        (3.33, 2.6), _rc(8, 7, **{"lines.linewidth": 1.1, "lines.markersize": 4, "savefig.dpi": 300}), False
    ),
}


@dataclasses.dataclass(frozen=True)
class Panel(Generic[Subject]):
    """One panel: `draw(axes, subject)` gives what its title says besides; `needs(subject)` why it cannot be
    drawn, or None."""

    title: str
    draw: Callable[[Any, Subject], Iterable[str]]
    needs: Callable[[Subject], str | None]


@dataclasses.dataclass(frozen=True)
class PictureSettings:
    """What people choose of a picture. Without `panels` it is the sheet of all."""

    format: str = "png"
    style: str = "screen"
    panels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The files; of those without a title, the caption; of the panels that could not be drawn, why."""

    paths: list[Path]
    captions: dict[Path, str]
    left_out: dict[str, str]

    def lines(self) -> Iterator[str]:
        """What a command says of it."""
        for path in self.paths:
            yield f"picture: {path}"
            if path in self.captions:
                yield f"caption: {self.captions[path]}"
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            yield f"no panel {', '.join(names)}: {reason}"


def check_names(panels: Mapping[str, Panel[Any]], names: Sequence[str]) -> None:
    """Raises a `UserError` for a name that is no panel's."""
    for name in names:
        if name not in panels:
            raise UserError(f"--panel {name}: no such panel; use {', '.join(panels)}")


def left_out(panels: Mapping[str, Panel[Subject]], subject: Subject) -> dict[str, str]:
    """The panels that the subject has no data for, and why."""
    return {name: reason for name, panel in panels.items() if (reason := panel.needs(subject))}


def draw_panels(
    panels: Mapping[str, Panel[Subject]],
    subject: Subject,
    stem: Path,
    heading: str,
    settings: PictureSettings | None = None,
    warning: str = "",
) -> Drawn:
    """Draws the sheet as `stem`, or each of the named panels as `stem_NAME`.

    `heading` stands above a sheet, `warning` below its title on every picture. Raises a `UserError` for a
    named panel that has no data, once the others are drawn.
    """
    settings = settings or PictureSettings()
    check_names(panels, settings.panels)
    style, missing = STYLES[settings.style], left_out(panels, subject)
    drawn = Drawn([], {}, {name: why for name, why in missing.items() if not settings.panels})

    def saved(suffix: str, size: tuple[float, float]) -> Any:
        path = stem.with_name(f"{stem.name}{suffix}.{settings.format}")
        drawn.paths.append(path)
        return blank_picture(path, size, without="--no-figure", rc=style_rc(style))

    for name in settings.panels:
        if name not in missing:
            with saved(f"_{name}", style.size) as figure:
                caption = draw_panel(figure, panels[name], subject, style, warning)
            if not style.has_title:
                drawn.captions[drawn.paths[-1]] = caption
    if unmet := [f"--panel {name}: {missing[name]}" for name in settings.panels if name in missing]:
        raise UserError(f"{'; '.join(unmet)}. Leave it out")
    there = [panel for name, panel in panels.items() if name not in missing]
    if settings.panels or not there:
        return drawn
    columns = min(2, len(there))
    rows = -(-len(there) // columns)
    with saved("", (columns * style.size[0], rows * style.size[1] + 0.5)) as figure:
        if style.has_title:
            _title(figure, "\n".join([heading, *([warning] if warning else [])]))
        places = figure.subfigures(rows, columns, squeeze=False).flat
        for place, panel in zip(places, there, strict=False):
            draw_panel(place, panel, subject, style, warning)
    return drawn


def style_rc(style: Style) -> dict[str, Any]:
    """All of matplotlib's settings for it."""
    from matplotlib.rcsetup import cycler

    return {"axes.prop_cycle": cycler(color=_COLOURS), **style.rc}


def draw_panel(place: Any, panel: Panel[Subject], subject: Subject, style: Style, warning: str) -> str:
    """Draws it into a figure or part of one, its legend below the axes; returns the caption."""
    axes = place.subplots()
    facts = [plain(fact, 80) for fact in panel.draw(axes, subject)]
    caption = f"{panel.title}: {', '.join(facts)}"
    if style.has_title:
        unbroken = (fact.replace(" ", _NO_BREAK) for fact in facts)
        _title(place, f"{panel.title}\n{', '.join(unbroken)}")
    elif warning:
        _title(place, warning)
    _legend(place, axes)
    return f"{caption}. {warning}" if warning else caption


_NO_BREAK = "\N{NO-BREAK SPACE}"
_ROOM_FOR_LEGEND = 0.45
"""Inches of a panel's height."""


def _title(place: Any, text: str) -> None:
    """Each line of it broken into as many as are no wider than the place."""
    title = place.suptitle("")
    title.set_parse_math(False)
    renderer, widest = place.figure.canvas.get_renderer(), 0.96 * place.bbox.width

    def is_too_wide(lines: Sequence[str]) -> bool:
        title.set_text("\n".join(lines))
        return bool(title.get_window_extent(renderer).width > widest)

    fitting: list[str] = []
    for line in text.splitlines():
        chars = len(line)
        while is_too_wide(lines := textwrap.wrap(line, chars)) and chars > 10:
            chars -= 1 + chars // 20
        fitting += lines
    title.set_text("\n".join(fitting))


def _legend(place: Any, axes: Any) -> None:
    """Below the axes, so that no data runs under it, in as many columns as there is room for."""
    handles, labels = axes.get_legend_handles_labels()
    renderer = place.figure.canvas.get_renderer()
    for columns in range(min(len(labels), 4), 0, -1):
        legend = place.legend(
            handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=2.8
        )
        extent = legend.get_window_extent(renderer)
        if columns == 1 or extent.width < 0.98 * place.bbox.width:
            break
        legend.remove()
    if labels and place is place.figure:  # a picture of its own grows for it
        width, height = place.get_size_inches()
        place.set_size_inches(width, height + max(0, extent.height / place.dpi - _ROOM_FOR_LEGEND))


def shares_axis(axis: Any) -> None:
    """From 0 to 100 %, and not beyond."""
    axis.axes.set(**{f"{axis.axis_name}lim": (0, 1)})
    axis.set_ticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")


def layers_axis(axis: Any, names: Sequence[object]) -> None:
    """A place per layer, as many of them named as there is room for."""
    step = max(1, -(-len(names) // 12))
    axis.set_ticks(range(0, len(names), step), [f"{name}" for name in names[::step]])
    axis.axes.set(**{f"{axis.axis_name}lim": (-0.5, len(names) - 0.5), f"{axis.axis_name}label": "layer"})


def numbers_axis(axis: Any) -> None:
    """A logarithmic axis whose ticks are plain numbers."""
    axis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}")
    axis.set_minor_formatter(lambda value, _: "")


def hatched(i: int) -> dict[str, Any]:
    """The look of the i-th of bars side by side."""
    return {"color": f"C{i}", "hatch": HATCHES[i], "edgecolor": "k", "linewidth": 0.5}


def number_bar(axes: Any, bar: Any, text: str, share: float, upright: bool = False) -> None:
    """At the end of a bar, in it where there is no room behind: `share` is of the axis."""
    inside = share > 0.55
    back = -3 if inside else 3
    middle = bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height() / 2
    aligned = {"ha": "center", "va": "top" if inside else "bottom"}
    if not upright:
        aligned = {"ha": "right" if inside else "left", "va": "center"}
    axes.annotate(
        text,
        (middle[0], bar.get_height()) if upright else (bar.get_width(), middle[1]),
        xytext=(0, back) if upright else (back, 0),
        textcoords="offset points",
        fontsize="small",
        bbox={"facecolor": "w", "edgecolor": "none", "pad": 1} if inside else None,
        **aligned,
    )
