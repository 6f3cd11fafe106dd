"""The study's pictures: distributions over requests and blocks, and two traces side by side.

A series is a label and its values; one without values is named in the legend as empty, and a
picture without any says so. Computes nothing but cumulative shares.

    draw_sharing(folder.file("sharing_fraction_cdf.png"), {"multi_turn": fractions})
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..study.compare import Comparison

Series = Mapping[str, np.ndarray]
MAX_POINTS = 4000
"""Of a curve; a picture shows no more, and a trace has millions of gaps."""

COMPARED = {
    "sharing_fraction_mean": "sharing fraction\n(mean)",
    "hit_rate_first_prefill": "hit rate\n(first prefill)",
    "hit_rate_blocks": "hit rate\n(blocks)",
    "hit_rate_infinite": "hit rate\n(infinite cache)",
    "block_reuse_rate": "block\nreuse rate",
    "sharing_above_0": "requests\nwith a hit",
}
MAX_TURNS = 30
LABEL_CHARS = 40


def draw_sharing(path: Path, series: Series) -> Path:
    """How much of each request's prompt was cached."""
    with _axes(path, "Sharing fraction of requests") as axes:
        _cdfs(axes, series, "requests")
        axes.set(xlabel="hit tokens / prompt tokens, first prefill", ylabel="share of requests")
        axes.set_xlim(-0.02, 1.02)
    return path


def draw_block_hits(path: Path, series: Series) -> Path:
    """How often each different block was hit: the share of blocks hit at least so often."""
    with _axes(path, "Hits per block") as axes:
        for i, (label, hits) in enumerate(series.items()):
            if not len(hits):
                axes.plot([], [], label=f"{_short(label)}: no block")
                continue
            counts, share = _cdf(hits)
            at_least = np.concatenate(([1.0], 1 - share[:-1]))
            text = f"{_short(label)}: mean {hits.mean():.2f}, hit at all {np.mean(hits > 0):.1%}"
            axes.step(counts, at_least, where="pre", marker=".", linewidth=_width(i), label=text)
        axes.set_yscale("log")
        axes.set_ylim(top=1.4)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.set(xlabel="hits", ylabel="share of different blocks hit at least so often")
        _from_zero(axes, series, linear_up_to=1)
        _say_if_empty(axes, series, "No full block was cached")
    return path


def draw_block_hits_cdf(path: Path, series: Series) -> Path:
    """The same as a cumulative share, of one workload's blocks."""
    with _axes(path, "Hits per block") as axes:
        _cdfs(axes, series, "blocks")
        axes.set(xlabel="hits", ylabel="share of different blocks hit at most so often")
        _from_zero(axes, series, linear_up_to=1)
    return path


def draw_gaps(path: Path, series: Series) -> Path:
    """Trace time between accesses of a block."""
    with _axes(path, "Reuse gaps of blocks") as axes:
        _cdfs(axes, series, "gaps")
        axes.set(xlabel="trace time between accesses of a block (s)", ylabel="share of gaps")
        _from_zero(axes, series, linear_up_to=0.1)
    return path


def draw_comparison(path: Path, comparison: Comparison) -> Path:
    """Single turn beside multi turn: rates, and the hit rate turn by turn."""
    with _figure(path, (12, 4.8), columns=2) as (bars, turns):
        names = [name for name in COMPARED if name in comparison.metrics]
        place = np.arange(len(names))
        for i, side in enumerate(("single", "multi")):
            values = [getattr(comparison.metrics[name], side) or 0.0 for name in names]
            drawn = bars.bar(place + 0.4 * (i - 0.5), values, 0.38, label=f"{side} turn")
            bars.bar_label(drawn, [f"{100 * value:.1f}" for value in values], fontsize=8)
        bars.set_xticks(place, [COMPARED[name] for name in names], fontsize=8)
        bars.set(title="Rates (%)", ylim=(0, 1.08), yticks=np.linspace(0, 1, 6))
        bars.set_yticklabels([f"{tick:.0%}" for tick in np.linspace(0, 1, 6)])
        bars.legend(loc="upper left")
        _per_turn(turns, comparison)
    return path


def _per_turn(axes: Any, comparison: Comparison) -> None:
    def line(name: str, metric: str, style: str, label: str, width: float = 2.0) -> None:
        rows = [
            row for row in comparison.per_turn[name] if row["turn"] is not None and row[metric] is not None
        ]
        rows = rows[:MAX_TURNS]
        axes.plot(
            [row["turn"] for row in rows], [row[metric] for row in rows], style, label=label, linewidth=width
        )

    line("single_turn", "hit_rate_first_prefill", "o-", "single turn", 4.0)
    line("multi_turn", "hit_rate_first_prefill", "o-", "multi turn")
    line("multi_turn", "hit_rate_infinite", "k:", "multi turn, infinite cache")
    axes.set(title="Hit rate (first prefill) by turn", xlabel="turn", ylim=(-0.03, 1.05))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend(loc="best")


def _cdfs(axes: Any, series: Series, what: str) -> None:
    for i, (label, values) in enumerate(series.items()):
        if not len(values):
            axes.plot([], [], label=f"{_short(label)}: no {what}")
            continue
        points, share = _cdf(values)
        # From 0 up at the first value, so that a curve that is a single step is one.
        x, y = np.concatenate((points[:1], points)), np.concatenate(([0.0], share))
        text = f"{_short(label)}: {len(values):,} {what}, mean {values.mean():.3g}"
        axes.step(x, y, where="post", linewidth=_width(i), label=text)
    axes.set_ylim(0, 1.03)
    _say_if_empty(axes, series, f"There are no {what}")


def _from_zero(axes: Any, series: Series, linear_up_to: float) -> None:
    """An axis with room for 0 and, where values spread over decades, for the far ones; plain numbers."""
    largest = max((float(values.max()) for values in series.values() if len(values)), default=0.0)
    if largest <= 10 * linear_up_to:
        axes.set_xlim(-0.05 * max(largest, linear_up_to), 1.1 * max(largest, linear_up_to))
        return
    axes.set_xscale("symlog", linthresh=linear_up_to)
    axes.set_xlim(-0.2 * linear_up_to, 1.5 * largest)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _width(place: int) -> float:
    """Thinner for each further curve, so that one below another still shows."""
    return max(1.2, 3.6 - 0.8 * place)


def _say_if_empty(axes: Any, series: Series, nothing: str) -> None:
    if not any(len(values) for values in series.values()):
        axes.text(0.5, 0.5, nothing, ha="center", va="center", transform=axes.transAxes)


def _cdf(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different values in order and the share of values up to each, at most `MAX_POINTS` of them."""
    points, counts = np.unique(values, return_counts=True)
    share = np.cumsum(counts) / len(values)
    if len(points) > MAX_POINTS:
        kept = np.linspace(0, len(points) - 1, MAX_POINTS).round().astype(int)
        points, share = points[kept], share[kept]
    return points, share


def _short(label: str) -> str:
    """A label as plain text: a dollar would begin a formula, an underscore in front hide it."""
    text = label if len(label) <= LABEL_CHARS else f"{label[: LABEL_CHARS - 1]}…"
    return " ".join(text.replace("$", r"\$").replace("_", " ").split()) or "unnamed"


@contextmanager
def _axes(path: Path, title: str) -> Iterator[Any]:
    with _figure(path, (7, 5)) as (axes,):
        yield axes
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.figure.legend(loc="outside lower center", fontsize=9)  # below: no curve runs under it


@contextmanager
def _figure(path: Path, size: tuple[float, float], columns: int = 1) -> Iterator[Sequence[Any]]:
    """Axes to draw on; the picture is saved under `path` when the block ends well."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        yield list(axes[0])
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the picture: {error.strerror}; use --skip-visualization"
        ) from error
    finally:
        plt.close(figure)
