"""The study's numbers as tables. A value that does not exist is shown as `-`. Computes nothing.

for grid in run_grids("multi_turn", statistics): console.print(grid)        # or print(grid.markdown())
for grid in sweep_grids(cells): console.print(grid)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..study.compare import Comparison
from ..study.engine_check import EngineCheck
from ..study.explain import Definition
from ..study.measure import Value
from ..study.metrics import UNITS
from ..study.sweep_cells import BYPASS, OPT, OVERALL, POOL
from ..study.sweep_cells import Cell as SweepCell
from .grid import NONE, Cell, Grid, number
from .grid import size as bytes_cell

HEADLINES = (
    "num_requests", "prompt_tokens", "sharing_fraction_mean", "sharing_fraction_median",
    "sharing_fraction_min", "sharing_fraction_max", "sharing_above_0", "hit_rate_first_prefill",
    "hit_rate_served", "hit_rate_with_preempted", "hit_rate_blocks", "hit_rate_blocks_any",
    "hit_rate_infinite", "hit_rate_chunks_recounted", "hit_rate_host", "hit_rate_with_host",
    "host_hit_blocks", "block_reuse_rate", "blocks_allocated", "blocks_reused", "blocks_unique",
    "blocks_evicted", "blocks_hit", "accesses_per_block_mean", "hits_per_block_mean",
    "hits_per_block_median", "hits_per_block_min", "hits_per_block_max", "hits_per_hit_block_mean",
    "reuse_gap_s_mean", "reuse_gap_s_median", "reuse_gap_s_min", "reuse_gap_s_max", "hit_gap_s_median",
)  # fmt: skip
"""The metrics of a printed table; the stats files hold all of them."""
assert set(HEADLINES) <= set(UNITS)

TURN_COLUMNS = {
    "num_requests": "requests",
    "hit_blocks": "hit blocks",
    "prompt_blocks": "of blocks",
    "sharing_fraction_mean": "sharing, mean",
    "sharing_above_0": "sharing above 0",
    "hit_rate_first_prefill": "hit rate",
    "hit_rate_infinite": "infinite cache",
}


def shown(name: str, value: Value) -> Cell:
    """A metric's value with its unit."""
    unit = UNITS[name]
    if unit == "share":
        return _share(value)
    if unit == "s":
        return number(value, ",.2f", " s")
    return number(value, "," if isinstance(value, int) else ",.2f")


def _spread(name: str, entry: Mapping[str, float] | None) -> tuple[Cell, Cell, Cell]:
    """Mean of a metric, and the ends of its interval."""
    mean, low, high = (
        shown(name, None if entry is None else entry.get(key)) for key in ("mean", "low", "high")
    )
    return mean, low, high


def _share(value: Value, unit: str = " %") -> Cell:
    return Cell(NONE if value is None else f"{100 * value:.2f}{unit}", value)


def notes_of(manifest: Mapping[str, Any]) -> list[str]:
    """What every table and picture must say: a token that is a word, times that nobody recorded."""
    notes = ["a token is a word"] if manifest.get("tokenizer", {}).get("unit") == "word" else []
    return notes + (["times are assumed"] if manifest.get("times") == "assumed" else [])


def noted(grids: Iterable[Grid], manifest: Mapping[str, Any]) -> Iterator[Grid]:
    """The tables with the notes in their titles."""
    notes = "; ".join(notes_of(manifest))
    for grid in grids:
        yield dataclasses.replace(grid, title=f"{grid.title} ({notes})") if notes else grid


def run_grids(name: str, statistics: Mapping[str, Any]) -> Iterator[Grid]:
    """One replay: metrics, rejections, workloads if there are several, turns if they are known."""
    metrics, intervals = statistics["metrics"], statistics.get("intervals", {})
    head = ["metric", "value"]
    if intervals:
        seeds = f"{len(intervals.get('seeds', ()))} seeds"
        over_seeds = intervals["over"] == "seeds"  # over conversations, it is around the value itself
        head += [f"mean over {seeds}", "95 %: from"] if over_seeds else ["95 % over conversations: from"]
        head.append("to")
    rows = []
    for key in (key for key in HEADLINES if key in metrics):
        spread = _spread(key, intervals.get("metrics", {}).get(key))
        rows.append((key, shown(key, metrics[key]), *spread[5 - len(head) :]))
    yield Grid(f"{name}: {cache_text(statistics['cache'])}", tuple(head), rows)
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
        ("requests", number(check.num_requests, ",")),
        ("of these with the replay's hits", number(check.num_equal, ",")),
        ("rejected", number(check.num_rejected, ",")),
        ("hit rate, first prefill", number(check.hit_rate, ".2%")),
        ("hit tokens, the replay's", number(check.hit_tokens, ",", f", {check.replay_hit_tokens:,}")),
        ("tokens prefilled", number(check.num_prefill_tokens, ",")),
        ("preemptions", number(check.num_preemptions, ",")),
    ]
    return Grid("Through the engine's scheduler, with the token simulator", ("", "value"), rows)


def compare_grids(comparison: Comparison, cache: Mapping[str, Any]) -> Iterator[Grid]:
    """Both traces, their difference (of shares: in percentage points) and their ratio."""
    rows = []
    for key in HEADLINES:
        if key not in comparison.metrics:
            continue
        both = comparison.metrics[key]
        if both.unit == "share":
            between = number(both.points, "+.2f", " points")
        else:
            between = number(both.difference, "+,.6g")
        ratio = number(both.ratio, ",.2f" if both.ratio is None or both.ratio < 100 else ",.0f", " x")
        rows.append((key, shown(key, both.single), shown(key, both.multi), between, ratio))
    columns = ("metric", "single turn", "multi turn", "multi - single", "multi / single")
    yield Grid(f"Single turn against multi turn: {cache_text(cache)}", columns, rows)
    yield rejected_grid(comparison.rejected)
    for name, turns in comparison.per_turn.items():
        yield from _turns(f"{name}, by turn", turns)


def explain_grid(definitions: Sequence[Definition], cache: Mapping[str, Any]) -> Grid:
    """Every definition with both sides of its fraction."""

    def count(value: float | None) -> Cell:
        return number(value, ",.6g" if isinstance(value, float) else ",")

    rows = [
        (
            line.name,
            _share(line.value),
            count(line.numerator),
            count(line.denominator),
            line.formula + (f" ({line.used_by})" if line.used_by else ""),
        )
        for line in definitions
    ]
    columns = ("definition", "rate", "numerator", "denominator", "formula (as used by)")
    return Grid(f"One trace, every definition: {cache_text(cache)}", columns, rows, left=(0, 4))


def rejected_grid(rejected: Mapping[str, Mapping[str, int]]) -> Grid:
    """Requests that were rejected or cut, by reason. Shown even if there are none."""
    reasons = list(next(iter(rejected.values())))
    rows = [(name, *(number(counts[reason], ",") for reason in reasons)) for name, counts in rejected.items()]
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


BOUNDS = (OPT, BYPASS)
ROUNDING = 1e-5
"""Of rates in a file."""
COUNTS = {
    "requests": "requests",
    "accesses": "prompt blocks",
    "rejected": "rejected requests",
    "rejected_accesses": "their prompt blocks",
}
"""The last rows of a sweep's table: what the hit rates are of, and what is missed for want of room."""


def sweep_grids(cells: Sequence[SweepCell]) -> Iterator[Grid]:
    """A table per workload and block size; a column per capacity."""
    for workload, size in dict.fromkeys((cell.workload, cell.block_size) for cell in cells):
        chosen = [cell for cell in cells if (cell.workload, cell.block_size) == (workload, size)]
        capacities = sorted({cell.capacity_blocks for cell in chosen})
        by_place = {(cell.policy, cell.capacity_blocks): cell for cell in chosen}
        rows = [
            (policy, *(_hit_rate(by_place.get((policy, capacity))) for capacity in capacities))
            for policy in _bounds_last(cell.policy for cell in chosen)
        ]
        for field, text in COUNTS.items():
            numbers = (getattr(by_place[OPT, capacity], field) for capacity in capacities)
            rows.append((text, *(number(count, ",") for count in numbers)))
        yield Grid(
            f"{workload}, blocks of {size} tokens: hit rate in % of prompt blocks",
            ("policy", *(f"{capacity:,} blocks" for capacity in capacities)),
            rows,
        )


def size_grid(rows: Sequence[Mapping[str, Any]], note: str = "") -> Grid:
    """The curve of `study size`: a row per size, the last one without a limit; a column per policy.

    Only the pool, of which the recommendation is, has its interval.
    """
    by_size: dict[int | None, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        name = POOL if row["bytes_per_device"] is None else row["policy"]  # only the pool has no limit
        by_size.setdefault(row["bytes_per_device"], {})[name] = row
    policies = list(next(iter(by_size.values())))
    lines = []
    for size_bytes, cells in by_size.items():
        pool = cells[POOL]
        rates = [number(100 * cells[name]["hit_rate"] if name in cells else None, ".2f") for name in policies]
        ends = pool["hit_rate_low"], pool["hit_rate_high"]
        rates[policies.index(POOL)] = _with_interval(pool["hit_rate"], *ends, ".2f")
        first = Cell("no limit", None) if size_bytes is None else bytes_cell(size_bytes)
        lines.append((first, number(pool["capacity_blocks"], ","), *rates, number(pool["rejected"], ",")))
    title = f"Hit rate in % of {rows[0]['accesses']:,} prompt blocks, by cache on one device"
    return Grid(title, ("per device", "blocks", *policies, "rejected requests"), lines, note=note)


def mixed_grids(cells: Sequence[SweepCell]) -> Iterator[Grid]:
    """A table per cache: a row per policy; a column for all workloads together and one for each."""
    for size, capacity in dict.fromkeys((cell.block_size, cell.capacity_blocks) for cell in cells):
        here = [cell for cell in cells if (cell.block_size, cell.capacity_blocks) == (size, capacity)]
        workloads = list(dict.fromkeys(cell.workload for cell in here))
        by_place = {(cell.policy, cell.workload): cell for cell in here}
        rows = []
        for policy in _bounds_last(cell.policy for cell in here):
            one = by_place[policy, OVERALL]
            gain = _with_interval(one.gain, one.gain_low, one.gain_high, "+.2f")
            rows.append((policy, *(_hit_rate(by_place.get((policy, name))) for name in workloads), gain))
        for field, text in COUNTS.items():
            of_each = (number(getattr(by_place[OPT, name], field), ",") for name in workloads)
            rows.append((text, *of_each, ""))
        title = f"Mixed: hit rate in % of prompt blocks, {capacity} blocks of {size} tokens"
        yield Grid(title, ("policy", *workloads, "gain over lru"), rows)


def _turns(title: str, turns: Sequence[Mapping[str, Value]]) -> Iterator[Grid]:
    """Every turn; of a folder that an earlier version wrote, the columns that it has."""
    if [row["turn"] for row in turns] == [None]:
        return
    rows = [
        (
            number(row["turn"], none="unknown"),
            *(shown(key, row.get(key)) for key in TURN_COLUMNS),
        )
        for row in turns
    ]
    yield Grid(title, ("turn", *TURN_COLUMNS.values()), rows)


def _hit_rate(cell: SweepCell | None) -> Cell:
    """In %, with its interval if it has one."""
    if cell is None or not cell.accesses:
        return _share(None)
    return _with_interval(cell.hit_rate, cell.hit_rate_low, cell.hit_rate_high, ".2f")


def _with_interval(share: float | None, low: float | None, high: float | None, form: str) -> Cell:
    """`61.2 ± 3.1`, or `0.2 (0.0 to 0.6)` where the interval lies unevenly about the value."""
    if share is None:
        return Cell(NONE, None)
    text = f"{100 * share:{form}}"
    if low is not None and high is not None:
        even = abs(low + high - 2 * share) < ROUNDING
        text += f" ± {50 * (high - low):.2f}" if even else f" ({100 * low:.2f} to {100 * high:.2f})"
    return Cell(text, share)


def _bounds_last(policies: Iterable[str]) -> list[str]:
    """Different names in order, but the bounds below the others."""
    names = list(dict.fromkeys(policies))
    return [name for name in names if name not in BOUNDS] + [name for name in BOUNDS if name in names]
