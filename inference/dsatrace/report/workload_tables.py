"""What a run says of its workload: was the answer selected, what was scored, how it was served.

Knows a run's summary; computes nothing that is not already in it. A table is there only
where the run has something to show in it.

for part in workload_tables(summary): console.print(part)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table

Summary = Mapping[str, Any]

MAX_ROWS = 64
"""Of a table that grows with the data; the rest is in summary.json."""

_DURATIONS = (
    ("latency", "latency_ms"),
    ("time to first token", "time_to_first_token_ms"),
    ("time per output token", "time_per_output_token_ms"),
    ("waiting to be taken up", "queue_ms"),
)


def new_table(title: str, *columns: str) -> Table:
    """The first column to the left, the others to the right; no names, no header."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def workload_tables(summary: Summary) -> Iterator[RenderableType]:
    """Runs from before a field was added have nothing to show for it."""
    if recall := summary.get("needle_recall"):
        yield _recall(recall)
    if scores := summary.get("scores"):
        yield _scores(scores)
    if serving := summary.get("serving"):
        yield _serving(serving)
    if cache := summary.get("prefix_cache"):
        yield _prefix_cache(cache)
    if workload := summary.get("workload"):
        yield _workload(workload)


def _recall(recall: Summary) -> Table:
    title = f"Share of the answer's tokens that a step selected ({recall['records']} sparse decode records)"
    table = new_table(title, "layer", "measured", "random selector (k / N)")
    random = f"{recall['random_mean']:.1%}"
    table.add_row("all", f"{recall['mean']:.1%}", random)
    layers = [(layer, share) for layer, share in enumerate(recall["per_layer"]) if share is not None]
    for layer, share in layers[:MAX_ROWS]:
        table.add_row(f"{layer}", f"{share:.1%}", random)
    _say_how_many_more(table, len(layers))
    return table


def _scores(scores: Summary) -> Table:
    table = new_table("Scores", "group", "mean", "requests")
    table.add_row("all", f"{scores['mean']:.2f}", f"{scores['num_scored']}")
    groups = [(label, value, of) for label, values in scores["by"].items() for value, of in values.items()]
    for label, value, of in groups[:MAX_ROWS]:
        table.add_row(f"{label} {value}", f"{of['mean']:.2f}", f"{of['num_scored']}")
    _say_how_many_more(table, len(groups))
    return table


def _serving(serving: Summary) -> Table:
    title = f"Serving, {serving['mode']}, times of the {serving['clock']} clock (ms)"
    columns = ("p50", "p95", "p99", "max", "mean")
    table = new_table(title, "", *columns)
    for name, key in _DURATIONS:
        values = (serving[key][column] for column in columns)
        table.add_row(name, *("none" if value is None else f"{value:,.1f}" for value in values))
    said = [f"{count} {name}" for name, count in serving["counts"].items()]
    if serving["span_s"]:
        said += [
            f"{serving['span_s']:,.1f} s from the first arrival to the last finish",
            f"{serving['requests_per_s']:,.2f} requests/s",
            f"{serving['output_tokens_per_s']:,.1f} output tokens/s",
        ]
    table.caption, table.caption_justify = ", ".join(said), "left"
    return table


def _prefix_cache(cache: Summary) -> Table:
    table = new_table("Prefix cache", "", "")
    table.add_row("prompt tokens found in it", f"{cache['hit_tokens']:,} of {cache['prompt_tokens']:,}")
    table.add_row("hit rate", "none" if cache["hit_rate"] is None else f"{cache['hit_rate']:.1%}")
    table.add_row("tokens prefilled", f"{cache['computed_tokens']:,} in {cache['prefill_s']:,.2f} s")
    if cache["saved_s"] is not None:
        table.add_row(f"prefill time saved, {cache['saved_kind']}", f"{cache['saved_s']:,.2f} s")
    return table


def _workload(workload: Summary) -> Table:
    """Whatever it said, as `group name | value`; what it counted zero of is in summary.json."""
    table = new_table("The workload, in its own words", "", "")
    rows = [(name, value) for name, value in _leaves(workload) if value not in ("0", "None")]
    for name, value in rows[:MAX_ROWS]:
        table.add_row(name, value)
    _say_how_many_more(table, len(rows))
    return table


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name} {key}".strip())
    else:
        yield name, f"{value}"


def _say_how_many_more(table: Table, num_rows: int) -> None:
    if num_rows > MAX_ROWS:
        table.add_row(f"... and {num_rows - MAX_ROWS} more in summary.json")
