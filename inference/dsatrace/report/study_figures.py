"""The study's pictures: distributions, single turn beside multi turn, and hit rates of sweeps and mixes.

A series is a label and its values; an empty one is named in the legend, and a picture of empty
series says so. `about` says above each picture of which workload, source and cache it is. Computes
only cumulative shares.

    draw_sharing(folder.file("sharing_fraction_cdf.png"), "qa, synthetic, 256 blocks", {"qa": fractions})
    draw_capacities(folder.file("cache_hits_qa_lru.png"), "synthetic qa", "qa", "lru", cells)
"""

from __future__ import annotations

import functools
import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..schema import nearest_rank
from ..study.compare import Comparison
from ..study.output_folder import OutputFolder, file_labels
from ..study.sweep_cells import BYPASS, LRU, OPT, OVERALL, POOL, Cell
from ..text import for_picture
from ..units import size_text
from .drawing import picture, plain_label, whole_numbers

Series = Mapping[str, np.ndarray]
MAX_POINTS = 4000
"""Points of a curve. A picture shows no more, and a trace has millions of gaps."""

COMPARED = {
    "sharing_fraction_mean": "sharing fraction\n(mean)",
    "hit_rate_first_prefill": "hit rate\n(first prefill)",
    "hit_rate_blocks": "hit rate\n(blocks)",
    "hit_rate_infinite": "hit rate\n(infinite cache)",
    "block_reuse_rate": "block\nreuse rate",
    "sharing_above_0": "requests\nwith a hit",
}
MAX_TURNS = 30
CHARS_PER_INCH = 14.5
"""Of the text above a picture."""

_picture = functools.partial(picture, without="--skip-visualization")


def draw_sharing(path: Path, about: str, series: Series) -> None:
    """How much of each request's prompt was cached."""
    labels = ("hit tokens / prompt tokens, first prefill", "share of requests")
    with _axes(path, about, "Sharing fraction of requests", *labels) as axes:
        _cdfs(axes, series, "requests")
        axes.set_xlim(-0.02, 1.02)


def draw_block_hits(path: Path, about: str, series: Series) -> None:
    """The share of different blocks that were hit at least so often."""
    with _axes(
        path, about, "Hits per block", "hits", "share of different blocks hit at least so often"
    ) as axes:
        for i, (label, hits) in enumerate(series.items()):
            if not len(hits):
                axes.plot([], [], label=f"{plain_label(label)}: no block")
                continue
            counts, share = _cdf(hits)
            at_least = np.concatenate(([1.0], 1 - share[:-1]))
            text = f"{plain_label(label)}: mean {hits.mean():.2f}, hit at all {np.mean(hits > 0):.1%}"
            axes.step(counts, at_least, where="pre", marker=".", linewidth=_width(i), label=text)
        axes.set_yscale("log")
        axes.set_ylim(top=1.4)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        _from_zero(axes, series, linear_up_to=1)
        _say_if_empty(axes, series, "No full block was cached")


def draw_block_hits_cdf(path: Path, about: str, series: Series) -> None:
    """The same as a cumulative share, of one workload's blocks."""
    with _axes(
        path, about, "Hits per block", "hits", "share of different blocks hit at most so often"
    ) as axes:
        _cdfs(axes, series, "blocks")
        _from_zero(axes, series, linear_up_to=1)


def draw_gaps(path: Path, about: str, series: Series) -> None:
    """Trace time between accesses of a block."""
    labels = ("trace time between accesses of a block (s)", "share of gaps")
    with _axes(path, about, "Reuse gaps of blocks", *labels) as axes:
        _cdfs(axes, series, "gaps", ends=True)
        _from_zero(axes, series, linear_up_to=0.1)


def draw_comparison(path: Path, about: str, comparison: Comparison) -> None:
    """Single turn beside multi turn: rates, and the hit rate turn by turn."""
    with _picture(path, (12, 4.8), columns=2) as (figure, (bars, turns)):
        figure.suptitle(_lines(about, 12), fontsize=9)
        names = [name for name in COMPARED if name in comparison.metrics]
        place = np.arange(len(names))
        for i, side in enumerate(("single_turn", "multi_turn")):
            ranged = [comparison.ranged(name, side) for name in names]
            values = [value or 0.0 for value, *_ in ranged]
            label = side.replace("_", " ")
            drawn = bars.bar(place + 0.4 * (i - 0.5), values, 0.38, label=label, **_errors("y", ranged))
            bars.bar_label(drawn, [f"{100 * value:.1f}" for value in values], fontsize=8)
        bars.set_xticks(place, [COMPARED[name] for name in names], fontsize=8)
        bars.set(title="Rates (%)", ylim=(0, 1.08), yticks=np.linspace(0, 1, 6))
        bars.set_yticklabels([f"{tick:.0%}" for tick in np.linspace(0, 1, 6)])
        bars.legend(loc="upper left")
        _per_turn(turns, comparison)


def draw_capacities(path: Path, about: str, workload: str, policy: str, cells: Sequence[Cell]) -> None:
    """A line per block size, by capacity in blocks and in tokens; OPT is dashed, bands are intervals."""
    chosen = [cell for cell in cells if cell.workload == workload and cell.policy in (policy, OPT)]
    top = max(max(cell.hit_rate, cell.hit_rate_high or 0) for cell in chosen) or 1.0
    with _picture(path, (11, 4.4), columns=2) as (figure, panels):
        for axes, field, unit in zip(
            panels, ("capacity_blocks", "capacity_tokens"), ("blocks", "tokens"), strict=True
        ):
            for number, size in enumerate(sorted({cell.block_size for cell in chosen})):
                for name, style in ((policy, "o-"), (OPT, "--")):
                    line = sorted(
                        (
                            cell
                            for cell in chosen
                            if cell.block_size == size and cell.policy == name and cell.accesses
                        ),
                        key=lambda cell: cell.capacity_blocks,
                    )
                    sizes, color = [getattr(cell, field) for cell in line], f"C{number}"
                    label = f"{plain_label(name)}, block {size}"
                    rates = [cell.hit_rate for cell in line]
                    axes.plot(sizes, rates, style, color=color, label=label, markersize=4)
                    ends = [(cell.hit_rate_low, cell.hit_rate_high) for cell in line if name == policy]
                    _band(axes, sizes[: len(ends)], ends, color)
            ticks = sorted({getattr(cell, field) for cell in chosen})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30 if max(ticks) >= 10**5 else 0)
            axes.minorticks_off()
            axes.set(xlabel=f"capacity ({unit})", ylim=(-0.03 * top, 1.05 * top))
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("hit rate (of prompt blocks)")
        panels[0].legend(fontsize=8)
        rejected = max(cell.rejected for cell in chosen)
        note = f"; up to {rejected:,} of {chosen[0].requests:,} requests rejected as too long"
        of_blocks = ", ".join(f"{size:,}" for size in sorted({cell.block_size for cell in chosen}))
        places = [f"{end([cell.capacity_blocks for cell in chosen]):,}" for end in (min, max)]
        title = f"{plain_label(workload)} under {plain_label(policy)}, blocks of {of_blocks} tokens, "
        title += f"{' to '.join(dict.fromkeys(places))} blocks{note if rejected else ''}"
        figure.suptitle(f"{title}\n{_lines(about, 11)}", fontsize=9)


def draw_size(path: Path, about: str, record: Mapping[str, Any]) -> None:
    """Hit rates of the policies against bytes of cache on one device; the size to take stands out."""
    rows, advice, layout = record["curve"], record["recommendation"], record["layout"]
    unlimited = next(row["hit_rate"] for row in rows if row["bytes_per_device"] is None)
    sizes = sorted({row["bytes_per_device"] for row in rows if row["bytes_per_device"] is not None})
    with _picture(path, (8, 5)) as (figure, (axes,)):
        axes.axhline(unlimited, color="gray", linestyle=":", label=f"{POOL}, no limit: {unlimited:.1%}")
        styles = {POOL: ("o-", "C0", 2.4), LRU: ("s--", "C1", 1.2), OPT: ("^-", "C2", 1.2)}
        if any(row["policy"] == BYPASS for row in rows):  # earlier versions did not write it
            styles[BYPASS] = ("v:", "gray", 1.2)
        for name, (style, color, width) in styles.items():
            cells = sorted(
                (row for row in rows if row["policy"] == name), key=lambda row: row["bytes_per_device"]
            )
            rates = [row["hit_rate"] for row in cells]
            axes.plot(sizes, rates, style, color=color, linewidth=width, label=name, markersize=4)
            if name == POOL and cells[0]["hit_rate_low"] is not None:
                ends = ([row[f"hit_rate_{end}"] for row in cells] for end in ("low", "high"))
                axes.fill_between(sizes, *ends, color=color, alpha=0.15, label=f"{name}, 95 % interval")
        if advice["is_reached"]:
            chosen = advice["bytes_per_device"]
            axes.axvline(chosen, color="black", linewidth=1, label=f"recommended: {size_text(chosen)}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [size_text(each) for each in sizes], rotation=30, ha="right", fontsize=8)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
        axes.set(xlabel="cache on one device", ylabel="hit rate (of full prompt blocks)", ylim=(0, None))
        several = f", {record['replicas']} replicas" if record["replicas"] > 1 else ""
        model = for_picture(f"{layout['name']}, {layout['dtype']}")
        axes.set_title(f"Prefix cache of {model}, blocks of {rows[0]['block_size']} tokens{several}")
        axes.legend(loc="best", fontsize=9)
        axes.grid(alpha=0.3)
        figure.suptitle(_lines(about, 8), fontsize=9)


def draw_mixed(path: Path, about: str, cells: Sequence[Cell]) -> None:
    """A panel for all workloads together and one for each; a bar per policy, OPT as a dashed line."""
    workloads = sorted(dict.fromkeys(cell.workload for cell in cells), key=lambda name: name != OVERALL)
    policies = [name for name in dict.fromkeys(cell.policy for cell in cells) if name not in (OPT, BYPASS)]
    by_place = {(cell.policy, cell.workload): cell for cell in cells}
    size = (2.2 + 2.3 * len(workloads), 1.4 + 0.24 * len(policies))
    with _picture(path, size, columns=len(workloads), share_y=True) as (figure, panels):
        for axes, name in zip(panels, workloads, strict=True):
            here = [by_place[policy, name] for policy in policies]
            rates, bound = [cell.hit_rate for cell in here], by_place[OPT, name].hit_rate
            errors = _errors("x", [(cell.hit_rate, cell.hit_rate_low, cell.hit_rate_high) for cell in here])
            colors = [_color(policy) for policy in policies]
            bars = axes.barh(range(len(policies)), rates, color=colors, **errors)
            axes.axvline(bound, color="black", linestyle="--", linewidth=1)
            texts = axes.bar_label(bars, [f"{100 * rate:.1f}" for rate in rates], fontsize=7, padding=2)
            for text in texts:  # stands above the dashed line
                text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.3})
            top = max(*rates, *(cell.hit_rate_high or 0 for cell in here), bound)
            axes.set(title=plain_label(name), xlim=(0, 1.25 * top if top else 1), xlabel=f"opt {bound:.1%}")
            axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
            axes.xaxis.get_major_locator().set_params(nbins=4)
            axes.grid(axis="x", alpha=0.3)
        panels[0].set_yticks(range(len(policies)), policies, fontsize=8)
        panels[0].set_ylim(len(policies) - 0.4, -0.6)
        cell = cells[0]
        figure.suptitle(
            f"Hit rate of prompt blocks, {cell.capacity_blocks} blocks of {cell.block_size} tokens. "
            f"Blue: leaf-constrained, orange: flat, green: vLLM's pool; dashed: opt, a bound {OVERALL} only\n"
            f"{_lines(about, size[0])}",
            fontsize=9,
        )


def draw_all_capacities(folder: OutputFolder, about: str, cells: Sequence[Cell]) -> Iterator[Path]:
    """A picture for each workload and policy; yields each path once it is drawn."""
    labels = file_labels(list(dict.fromkeys(cell.workload for cell in cells)))
    for workload, label in labels.items():
        for policy in dict.fromkeys(cell.policy for cell in cells if cell.policy not in (OPT, BYPASS)):
            path = folder.file(f"cache_hits_{label}_{policy}.png")
            draw_capacities(path, about, workload, policy, cells)
            yield path


def draw_all_mixed(folder: OutputFolder, about: str, cells: Sequence[Cell]) -> Iterator[Path]:
    """A picture for each cache; yields each path once it is drawn."""
    places = {(cell.block_size, cell.capacity_blocks) for cell in cells}
    for size, capacity in sorted(places):
        label = f"_block{size}_cache{capacity}" if len(places) > 1 else ""
        path = folder.file(f"mixed_hit_rates{label}.png")
        draw_mixed(path, about, [c for c in cells if (c.block_size, c.capacity_blocks) == (size, capacity)])
        yield path


def _per_turn(axes: Any, comparison: Comparison) -> None:
    def line(name: str, metric: str, style: str, label: str, width: float = 2.0) -> None:
        rows = [
            row for row in comparison.per_turn[name] if row["turn"] is not None and row[metric] is not None
        ][:MAX_TURNS]
        spread = comparison.intervals.get("hit_rate_by_turn", {}).get(name, {})
        known = {} if metric == "hit_rate_infinite" else spread
        entries = [known.get(str(row["turn"]), {}) for row in rows]
        turns = [row["turn"] for row in rows]
        rates = [entry.get("mean", row[metric]) for row, entry in zip(rows, entries, strict=True)]
        (drawn,) = axes.plot(turns, rates, style, label=label, linewidth=width)
        _band(axes, turns, [(entry.get("low"), entry.get("high")) for entry in entries], drawn.get_color())

    line("single_turn", "hit_rate_first_prefill", "o-", "single turn", 4.0)
    line("multi_turn", "hit_rate_first_prefill", "o-", "multi turn")
    line("multi_turn", "hit_rate_infinite", "k:", "multi turn, infinite cache")
    axes.set(title="Hit rate (first prefill) by turn", xlabel="turn", ylim=(-0.03, 1.05))
    whole_numbers(axes.xaxis)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend(loc="best")


def _band(axes: Any, x: Sequence[Any], ends: Sequence[tuple[Any, Any]], color: str) -> None:
    """The interval about a line, where it is known; a bar where it is of a single point."""
    known = [(at, low, high) for at, (low, high) in zip(x, ends, strict=True) if low is not None]
    if known:
        at, low, high = zip(*known, strict=True)
        axes.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
        if len(known) == 1:
            axes.vlines(at, low, high, color=color)


def _errors(axis: str, ranged: Sequence[tuple[Any, Any, Any]]) -> dict[str, Any]:
    """What bars are drawn with for their intervals; without one a bar has a line of no length."""
    if all(low is None for _, low, _ in ranged):
        return {}
    ends = [
        (0, 0) if low is None else (max(0, value - low), max(0, high - value)) for value, low, high in ranged
    ]
    return {f"{axis}err": np.transpose(ends), "error_kw": {"elinewidth": 1, "capsize": 2}}


def _cdfs(axes: Any, series: Series, what: str, *, ends: bool = False) -> None:
    """With `ends` the legend also says minimum, median and maximum."""
    for i, (label, values) in enumerate(series.items()):
        if not len(values):
            axes.plot([], [], label=f"{plain_label(label)}: no {what}")
            continue
        points, share = _cdf(values)
        # Rises from 0 at the first value, so that a single value draws a step.
        x, y = np.concatenate((points[:1], points)), np.concatenate(([0.0], share))
        text = f"{plain_label(label)}: {len(values):,} {what}, mean {values.mean():.3g}"
        if ends:
            median = np.sort(values)[nearest_rank(len(values), 50)]
            for name, value in (("min", values.min()), ("median", median), ("max", values.max())):
                text += f", {name} {value:{',.0f' if value >= 100 else '.3g'}}"
        axes.step(x, y, where="post", linewidth=_width(i), label=text)
    axes.set_ylim(0, 1.03)
    _say_if_empty(axes, series, f"There are no {what}")


def _from_zero(axes: Any, series: Series, linear_up_to: float) -> None:
    """An x axis that begins at 0; logarithmic beyond `linear_up_to` if the values spread over decades."""
    largest = max((float(values.max()) for values in series.values() if len(values)), default=0.0)
    if largest <= 10 * linear_up_to:
        axes.set_xlim(-0.05 * max(largest, linear_up_to), 1.1 * max(largest, linear_up_to))
        return
    axes.set_xscale("symlog", linthresh=linear_up_to)
    axes.set_xlim(-0.2 * linear_up_to, 1.5 * largest)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _width(place: int) -> float:
    """Thinner for each further curve, so that a curve under it still shows."""
    return max(1.2, 3.6 - 0.8 * place)


def _say_if_empty(axes: Any, series: Series, nothing: str) -> None:
    if not any(len(values) for values in series.values()):
        axes.text(0.5, 0.5, nothing, ha="center", va="center", transform=axes.transAxes)


def _cdf(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` different values in order, and the share of all values up to each."""
    points, counts = np.unique(values, return_counts=True)
    share = np.cumsum(counts) / len(values)
    if len(points) > MAX_POINTS:
        kept = np.linspace(0, len(points) - 1, MAX_POINTS).round().astype(int)
        points, share = points[kept], share[kept]
    return points, share


@contextmanager
def _axes(path: Path, about: str, title: str, xlabel: str, ylabel: str) -> Iterator[Any]:
    with _picture(path, (7, 5)) as (figure, (axes,)):
        yield axes
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title)
        figure.suptitle(_lines(about, 7), fontsize=9)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", fontsize=9)  # below: no curve runs under it


def _lines(about: str, width: float) -> str:
    """Each line as plain text, folded at the width of a picture in inches."""
    most = int(width * CHARS_PER_INCH)
    folded = (textwrap.wrap(for_picture(line, 4 * most), most) for line in about.splitlines())
    return "\n".join(itertools.chain.from_iterable(folded))


def _color(policy: str) -> str:
    """Leaf-constrained, flat, and the block pool."""
    return "C2" if policy == POOL else "C1" if policy.endswith("-flat") else "C0"
