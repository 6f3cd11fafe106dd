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
from ..text import counted
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
    "reuse_gap_s_mean", "reuse_gap_s_median", "reuse_gap_s_min", "reuse_gap_s_max", "hit_gap_s_mean",
    "hit_gap_s_median", "hit_gap_s_min", "hit_gap_s_max",
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


def shown(
    name: str, value: Value, low: float | None = None, high: float | None = None, like: Value = None
) -> Cell:
    """A metric's value with its interval and unit; a count is written whole if `like`, or it, is."""
    form, scale, unit = _form_of(name, value if like is None else like)
    return _ranged(value, low, high, form, unit, scale)


def _form_of(name: str, value: Value) -> tuple[str, float, str]:
    """How a metric is written: format, scale, unit. A count is whole, and so is the mean of counts."""
    unit = UNITS[name]
    if unit == "share":
        return ".2f", 100, " %"
    return (",.0f" if isinstance(value, int) else ",.2f"), 1, " s" if unit == "s" else ""


def notes_of(manifest: Mapping[str, Any]) -> list[str]:
    """What every table and picture must say: a token that is a word, times that nobody recorded."""
    notes = ["a token is a word"] if manifest.get("tokenizer", {}).get("unit") == "word" else []
    return notes + (["times are assumed"] if manifest.get("times") == "assumed" else [])


def about_text(
    source: str, manifest: Mapping[str, Any], cache: str = "", intervals: Mapping[str, Any] | None = None
) -> str:
    """What stands above a picture: where requests come from, the cache, what a token is, what is assumed."""
    tokens = manifest.get("tokenizer", {}).get("name", "unknown").removeprefix("none: the trace holds ")
    notes = notes_of({**manifest, "tokenizer": {}})
    parts = (cache, f"tokens: {tokens}", *notes, intervals_text(intervals or {}))
    return "\n".join((source, "; ".join(filter(None, parts))))


def noted(grids: Iterable[Grid], manifest: Mapping[str, Any]) -> Iterator[Grid]:
    """The tables with the notes in their titles."""
    notes = "; ".join(notes_of(manifest))
    for grid in grids:
        yield dataclasses.replace(grid, title=f"{grid.title} ({notes})") if notes else grid


def run_grids(name: str, statistics: Mapping[str, Any]) -> Iterator[Grid]:
    """One replay: metrics, rejections, workloads if there are several, turns if they are known."""
    metrics, intervals = statistics["metrics"], statistics.get("intervals", {})
    mean = _mean_column(intervals)
    rows = []
    for key in (key for key in HEADLINES if key in metrics):
        value, entry = metrics[key], intervals.get("metrics", {}).get(key, {})
        ends = (entry.get("low"), entry.get("high"))
        means = [shown(key, entry.get("mean"), *ends, like=value) for _ in mean]
        rows.append((key, shown(key, value, *((None, None) if mean else ends)), *means))
    title = f"{name}: {_cache_and_intervals(statistics['cache'], intervals)}"
    yield Grid(title, ("metric", "value", *mean), rows)
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
    """Both traces, their difference (of shares: in percentage points) and their ratio, with intervals."""
    rows = []
    for key in HEADLINES:
        if key not in comparison.metrics:
            continue
        cells = []
        for side in ("single_turn", "multi_turn", "difference"):
            value, low, high = comparison.ranged(key, side)
            form, scale, unit = _form_of(key, comparison.metrics[key].multi)
            if side == "difference":
                form, unit = f"+{form}", " points" if unit == " %" else ""
            cells.append(_ranged(value, low, high, form, unit, scale))
        single, multi = (cell.value for cell in cells[:2])
        ratio = multi / single if single and multi is not None else None
        rows.append((key, *cells, number(ratio, ",.2f" if ratio is None or ratio < 100 else ",.0f", " x")))
    columns = ("metric", "single turn", "multi turn", "multi - single", "multi / single")
    title = f"Single turn against multi turn: {_cache_and_intervals(cache, comparison.intervals)}"
    yield Grid(title, columns, rows)
    yield rejected_grid(comparison.rejected)
    for name, turns in comparison.per_turn.items():
        yield from _turns(f"{name}, by turn", turns)


def intervals_text(intervals: Mapping[str, Any]) -> str:
    """What the ranges of a table or picture are; empty if it has none."""
    if not intervals.get("over") or len(intervals.get("seeds", (0, 0))) < 2:
        return ""
    if intervals["over"] == "seeds":
        return f"over {len(intervals['seeds'])} seeds with 95 % intervals"
    if not intervals.get("metrics", True):
        return "no intervals: they need two conversations"
    return "95 % intervals over conversations"


def _mean_column(intervals: Mapping[str, Any]) -> list[str]:
    """The head of a column of its own for means over seeds, whose intervals are not about the values."""
    seeds = intervals.get("seeds", ()) if intervals.get("over") == "seeds" else ()
    return [f"mean over {len(seeds)} seeds"] if len(seeds) > 1 else []


def explain_grid(
    definitions: Sequence[Definition], cache: Mapping[str, Any], intervals: Mapping[str, Any]
) -> Grid:
    """Every definition with both sides of its fraction, and its interval."""

    def count(value: float | None) -> Cell:
        return number(value, ",.6g" if isinstance(value, float) else ",")

    mean = _mean_column(intervals)
    columns = ["definition", "rate", *mean, "numerator", "denominator", "formula (as used by)"]
    rows = []
    for line in definitions:
        ends = (line.low, line.high)
        rate = _ranged(line.value, *((None, None) if mean else ends), ".2f", " %")
        means = [_ranged(line.mean, *ends, ".2f", " %") for _ in mean]
        used_by = f" ({line.used_by})" if line.used_by else ""
        numbers = (count(line.numerator), count(line.denominator))
        rows.append((line.name, rate, *means, *numbers, line.formula + used_by))
    found = {**intervals, "metrics": [line.name for line in definitions if line.low is not None]}
    title = f"One trace, every definition: {_cache_and_intervals(cache, found)}"
    return Grid(title, columns, rows, left=(0, len(columns) - 1))


def rejected_grid(rejected: Mapping[str, Mapping[str, int]]) -> Grid:
    """Requests that were rejected or cut, by reason. Shown even if there are none."""
    reasons = list(next(iter(rejected.values())))
    rows = [(name, *(number(counts[reason], ",") for reason in reasons)) for name, counts in rejected.items()]
    return Grid(
        "Requests rejected, or cut", ("trace", *(reason.replace("_", " ") for reason in reasons)), rows
    )


def cache_text(cache: Mapping[str, Any]) -> str:
    """One line on the cache."""
    size = "no limit" if cache["num_blocks"] is None else counted(cache["num_blocks"], "block")
    tokens = counted(cache["block_size"], "token")
    text = f"{size} of {tokens}, {cache['concurrency']} live, {cache['schedule']}"
    if cache["host_blocks"] is not None:
        text += f", host pool of {cache['host_blocks']:,}"
    return text + ("" if cache["prefix_caching"] else ", prefix caching off")


def _cache_and_intervals(cache: Mapping[str, Any], intervals: Mapping[str, Any]) -> str:
    return "; ".join(filter(None, (cache_text(cache), intervals_text(intervals))))


BOUNDS = (OPT, BYPASS)
BOUNDS_NOTE = (
    "opt evicts what is used again last, and holds every request that it serves, as a device must; "
    "opt-bypass may leave blocks out: the bound of a tier behind the device."
)
"""Below the last table of hit rates."""
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
    """Two tables per workload and block size, of hit rates and of gains over LRU; a column per capacity."""
    places = list(dict.fromkeys((cell.workload, cell.block_size) for cell in cells))
    for workload, size in places:
        chosen = [cell for cell in cells if (cell.workload, cell.block_size) == (workload, size)]
        capacities = sorted({cell.capacity_blocks for cell in chosen})
        by_place = {(cell.policy, cell.capacity_blocks): cell for cell in chosen}
        columns = ("policy", *(counted(capacity, "block") for capacity in capacities))
        rates, gains = [], []
        for policy in _bounds_last(cell.policy for cell in chosen):
            here = [by_place.get((policy, capacity)) for capacity in capacities]
            rates.append((policy, *map(_hit_rate, here)))
            if any(cell is not None and cell.gain is not None for cell in here):
                gains.append((policy, *map(_gain, here)))
        for field, text in COUNTS.items():
            numbers = (getattr(by_place[OPT, capacity], field) for capacity in capacities)
            rates.append((text, *(number(count, ",") for count in numbers)))
        title = f"{workload}, blocks of {counted(size, 'token')}"
        note = BOUNDS_NOTE if (workload, size) == places[-1] else ""
        yield Grid(f"{title}: hit rate in % of prompt blocks", columns, rates, note=note)
        if gains:
            yield Grid(f"{title}: gain over lru in points", columns, gains)


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
        rates = [
            _ranged(cells[name]["hit_rate"] if name in cells else None, None, None, ".2f")
            for name in policies
        ]
        low, high = pool["hit_rate_low"], pool["hit_rate_high"]
        rates[policies.index(POOL)] = _ranged(pool["hit_rate"], low, high, ".2f")
        first = Cell("no limit", None) if size_bytes is None else bytes_cell(size_bytes)
        lines.append((first, number(pool["capacity_blocks"], ","), *rates, number(pool["rejected"], ",")))
    title = f"Hit rate in % of {rows[0]['accesses']:,} prompt blocks, by cache on one device"
    columns = ("per device", "blocks", *policies, "rejected requests")
    return Grid(title, columns, lines, note=f"{BOUNDS_NOTE} {note}".strip())


def mixed_grids(cells: Sequence[SweepCell]) -> Iterator[Grid]:
    """A table per cache: a row per policy; a column for all workloads together and one for each."""
    for size, capacity in dict.fromkeys((cell.block_size, cell.capacity_blocks) for cell in cells):
        here = [cell for cell in cells if (cell.block_size, cell.capacity_blocks) == (size, capacity)]
        workloads = list(dict.fromkeys(cell.workload for cell in here))
        by_place = {(cell.policy, cell.workload): cell for cell in here}
        rows = []
        for policy in _bounds_last(cell.policy for cell in here):
            rates = (_hit_rate(by_place.get((policy, name))) for name in workloads)
            rows.append((policy, *rates, _gain(by_place[policy, OVERALL])))
        for field, text in COUNTS.items():
            of_each = (number(getattr(by_place[OPT, name], field), ",") for name in workloads)
            rows.append((text, *of_each, ""))
        cache = f"{counted(capacity, 'block')} of {counted(size, 'token')}"
        title = f"Mixed: hit rate in % of prompt blocks, {cache}"
        yield Grid(title, ("policy", *workloads, "gain over lru"), rows, note=BOUNDS_NOTE)


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
        return Cell(NONE, None)
    return _ranged(cell.hit_rate, cell.hit_rate_low, cell.hit_rate_high, ".2f")


def _gain(cell: SweepCell | None) -> Cell:
    """Over LRU, in points, with its interval if it has one."""
    if cell is None:
        return Cell(NONE, None)
    return _ranged(cell.gain, cell.gain_low, cell.gain_high, "+.2f")


def _ranged(
    value: float | None, low: float | None, high: float | None, form: str, unit: str = "", scale: float = 100
) -> Cell:
    """`61.2 ± 3.1`, or `0.2 (0.0 to 0.6)` where the interval lies unevenly; a share without another scale."""
    if value is None:
        return Cell(NONE, None)
    text = f"{scale * value:{form}}"
    if low is not None and high is not None and low < high:
        even = abs(low + high - 2 * value) <= ROUNDING * max(1.0, abs(value))
        unsigned = form.removeprefix("+")
        ends = f"({scale * low:{unsigned}} to {scale * high:{unsigned}})"
        text += f" ± {scale * (high - low) / 2:{unsigned}}" if even else f" {ends}"
    return Cell(text + unit, value)


def _bounds_last(policies: Iterable[str]) -> list[str]:
    """Different names in order, but the bounds below the others."""
    names = list(dict.fromkeys(policies))
    return [name for name in names if name not in BOUNDS] + [name for name in BOUNDS if name in names]
