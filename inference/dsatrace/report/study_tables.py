"""The study's numbers as tables: for a terminal, or as markdown to paste into a report.

A value that does not exist is shown as `-`. Computes nothing.

    for grid in run_grids("multi_turn", statistics):
        console.print(rich_table(grid))            # or print(markdown(grid))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..study.compare import Comparison
from ..study.engine_check import EngineCheck
from ..study.explain import Definition
from ..study.measure import Value
from ..study.metrics import UNITS

NONE = "-"
TURNS_SHOWN = 10
HEADLINES = (
    "num_requests",
    "prompt_tokens",
    "sharing_fraction_mean",
    "sharing_fraction_median",
    "sharing_fraction_p90",
    "sharing_above_0",
    "hit_rate_first_prefill",
    "hit_rate_with_preempted",
    "hit_rate_blocks",
    "hit_rate_blocks_any",
    "hit_rate_infinite",
    "hit_rate_chunks_recounted",
    "hit_rate_with_host",
    "host_hit_blocks",
    "block_reuse_rate",
    "blocks_allocated",
    "blocks_reused",
    "blocks_unique",
    "blocks_evicted",
    "blocks_hit",
    "accesses_per_block_mean",
    "hits_per_block_mean",
    "hits_per_hit_block_mean",
    "reuse_gap_s_median",
    "hit_gap_s_median",
)
"""What a console table shows; the stats files hold every metric."""
assert set(HEADLINES) <= set(UNITS)

TURN_COLUMNS = {
    "num_requests": "requests",
    "sharing_fraction_mean": "sharing, mean",
    "sharing_above_0": "sharing above 0",
    "hit_rate_first_prefill": "hit rate",
    "hit_rate_infinite": "infinite cache",
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table's text; columns are flush right but for those in `left`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: tuple[int, ...] = (0,)


def rich_table(grid: Grid) -> Group:
    """For a terminal: the title above, where a narrow table does not fold it."""
    table = Table()
    for i, column in enumerate(grid.columns):
        table.add_column(column, justify="left" if i in grid.left else "right", overflow="fold")
    for row in grid.rows:
        table.add_row(*map(Text, row))  # Text: what a trace names a workload is no markup
    return Group(Text(grid.title, style="bold"), table)


def markdown(grid: Grid) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join("---" if i in grid.left else "---:" for i in range(len(grid.columns))) + "|"
    return "\n".join((f"**{grid.title}**", "", line(grid.columns), rule, *map(line, grid.rows), ""))


def shown(name: str, value: Value) -> str:
    """A metric's value with its unit."""
    if value is None:
        return NONE
    unit = UNITS[name]
    if unit == "share":
        return f"{100 * value:.2f} %"
    if unit == "s":
        return f"{value:,.2f} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def run_grids(name: str, statistics: Mapping[str, Any]) -> Iterator[Grid]:
    """One replay: the metrics, rejections, workloads if there are several, turns if they are known."""
    metrics = statistics["metrics"]
    rows = [(key, shown(key, metrics[key])) for key in HEADLINES if key in metrics]
    yield Grid(f"{name}: {cache_text(statistics['cache'])}", ("metric", "value"), rows)
    yield rejected_grid({name: statistics["rejected"]})
    workloads = statistics.get("workloads", {})
    if workloads:
        columns = ("workload", *TURN_COLUMNS.values())
        of_each = [
            (workload or "(unnamed)", *(shown(key, entry["metrics"][key]) for key in TURN_COLUMNS))
            for workload, entry in workloads.items()
        ]
        yield Grid("By workload", columns, of_each)
    yield from _turns(f"{name}, by turn", statistics["per_turn"])


def engine_grid(check: EngineCheck) -> Grid:
    """What the engine's own scheduler found, beside the replay."""
    rows = [
        ("requests", f"{check.num_requests:,}"),
        ("of these with the replay's hits", f"{check.num_equal:,}"),
        ("rejected", f"{check.num_rejected:,}"),
        ("hit rate, first prefill", f"{check.hit_rate:.2%}"),
        ("hit tokens, the replay's", f"{check.hit_tokens:,}, {check.replay_hit_tokens:,}"),
        ("tokens prefilled", f"{check.num_prefill_tokens:,}"),
        ("preemptions", f"{check.num_preemptions:,}"),
    ]
    return Grid("Through the engine's scheduler, with the token simulator", ("", "value"), rows)


def compare_grids(comparison: Comparison, cache: Mapping[str, Any]) -> Iterator[Grid]:
    """Both traces, what lies between them in points (shares) or as a difference, and the ratio."""
    rows = []
    for key in HEADLINES:
        if key not in comparison.metrics:
            continue
        both = comparison.metrics[key]
        if both.unit == "share":
            between = NONE if both.points is None else f"{both.points:+.2f} points"
        else:
            between = NONE if both.difference is None else f"{both.difference:+,.6g}"
        ratio = NONE if both.ratio is None else f"{both.ratio:.2f} x"
        rows.append((key, shown(key, both.single), shown(key, both.multi), between, ratio))
    columns = ("metric", "single turn", "multi turn", "multi - single", "multi / single")
    yield Grid(f"Single turn against multi turn: {cache_text(cache)}", columns, rows)
    yield rejected_grid(comparison.rejected)
    for name, turns in comparison.per_turn.items():
        yield from _turns(f"{name}, by turn", turns)


def explain_grid(definitions: Sequence[Definition], cache: Mapping[str, Any]) -> Grid:
    """Every definition with both sides of its fraction."""

    def number(value: float | None) -> str:
        return NONE if value is None else f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"

    rows = [
        (
            line.name,
            NONE if line.value is None else f"{100 * line.value:.2f} %",
            number(line.numerator),
            number(line.denominator),
            line.formula + (f" ({line.used_by})" if line.used_by else ""),
        )
        for line in definitions
    ]
    columns = ("definition", "rate", "numerator", "denominator", "formula (as used by)")
    return Grid(f"One trace, every definition: {cache_text(cache)}", columns, rows, left=(0, 4))


def rejected_grid(rejected: Mapping[str, Mapping[str, int]]) -> Grid:
    """Requests not served, or not whole, and why; always shown, so that a zero is one."""
    reasons = list(next(iter(rejected.values())))
    rows = [(name, *(f"{counts[reason]:,}" for reason in reasons)) for name, counts in rejected.items()]
    return Grid(
        "Requests rejected, or cut", ("trace", *(reason.replace("_", " ") for reason in reasons)), rows
    )


def cache_text(cache: Mapping[str, Any]) -> str:
    """One line on the cache."""
    size = "no limit" if cache["num_blocks"] is None else f"{cache['num_blocks']:,} blocks"
    text = f"{size} of {cache['block_size']} tokens, {cache['concurrency']} live, {cache['schedule']}"
    if cache["host_blocks"] is not None:
        text += f", host pool of {cache['host_blocks']:,}"
    return text + ("" if cache["prefix_caching"] else ", prefix caching off")


def _turns(title: str, turns: Sequence[Mapping[str, Value]]) -> Iterator[Grid]:
    if [row["turn"] for row in turns] == [None]:
        return
    rows = [
        (
            "unknown" if row["turn"] is None else f"{row['turn']}",
            *(shown(key, row[key]) for key in TURN_COLUMNS),
        )
        for row in turns[:TURNS_SHOWN]
    ]
    more = f" (the first {TURNS_SHOWN} of {len(turns)})" if len(turns) > TURNS_SHOWN else ""
    yield Grid(title + more, ("turn", *TURN_COLUMNS.values()), rows)
