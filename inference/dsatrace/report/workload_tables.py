"""A run's workload as tables: was the answer selected, what was scored, how it was served.

Knows a run's summary; computes nothing that is not already in it. A table is there only if the
run has something to show in it.

for grid in workload_tables(summary): console.print(grid)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..trace.rates import RATES
from .grid import MAX_ROWS, Cell, Grid, number, percent

Summary = Mapping[str, Any]

DURATIONS = (
    ("latency", "latency_ms"),
    ("time to first token", "time_to_first_token_ms"),
    ("time per output token", "time_per_output_token_ms"),
    ("waiting to be taken up", "queue_ms"),
)


def workload_tables(summary: Summary) -> Iterator[Grid]:
    """A section that the summary lacks, as in an older run, has no table."""
    if recall := summary.get("needle_recall"):
        yield _recall(recall, summary)
    sections = {
        "scores": _scores,
        "past_answer": _past_answer,
        "serving": _serving,
        "prefix_cache": _prefix_cache,
        "workload": _workload,
    }
    for name, table in sections.items():
        if section := summary.get(name):
            yield table(section)


def steps_of_recall(summary: Summary) -> Iterator[str]:
    """Which steps `needle_recall` counts, where some may lie past the answers."""
    if "needle_recall_past" in summary:
        yield "up to the answers' ends"
    elif past := summary.get("past_answer"):  # an older run's
        yield f"{past['past_steps']:,} of {past['decode_steps']:,} steps past the answers among them"


def _recall(recall: Summary, summary: Summary) -> Grid:
    which = ", ".join([f"{recall['records']} sparse decode records", *steps_of_recall(summary)])
    title = f"Share of the answer's tokens that a step selected ({which})"
    past = summary.get("needle_recall_past")
    note = f"past the answers: {percent(past['mean'])}, of {past['records']} records" if past else ""
    random = percent(recall["random_mean"])
    layers = [
        (number(layer), percent(share), random)
        for layer, share in enumerate(recall["per_layer"])
        if share is not None
    ]
    rows = [("all", percent(recall["mean"]), random), *layers]
    columns = ("layer", "measured", "random selector (k / N)")
    return Grid(title, columns, rows, note=note, most=MAX_ROWS + 1)


def _scores(scores: Summary) -> Grid:
    def row(name: str, group: Summary) -> tuple[str, str, str]:
        return name, number(group["mean"], ".2f"), number(group["num_scored"])

    groups = [
        row(f"{label} {value}", group)
        for label, values in scores["by"].items()
        for value, group in values.items()
    ]
    rows = [row("all", scores), *groups]
    return Grid("Scores", ("group", "mean", "requests"), rows, most=MAX_ROWS + 1)


def _past_answer(past: Summary) -> Grid:
    steps = f"{past['past_steps']:,} of {past['decode_steps']:,}"
    if past["decode_steps"]:
        steps += f" ({percent(past['past_steps'] / past['decode_steps'])})"
    rows = [
        ("decode steps past the answer", Cell(steps, past["past_steps"])),
        ("requests that went on", number(past["requests"], ",")),
    ]
    return Grid("Past the answer: made to go on, which the model would not have said", ("", ""), rows)


def _serving(serving: Summary) -> Grid:
    title = f"Serving, {serving['mode']}, times of the {serving['clock']} clock (ms)"
    columns = ("p50", "p95", "p99", "max", "mean")
    rows = []
    for name, key in DURATIONS:
        values = (serving[key][column] for column in columns)
        rows.append((name, *(number(value, ",.1f", none="none") for value in values)))
    notes = [f"{count} {name}" for name, count in serving["counts"].items()]
    if serving["span_s"]:
        notes += [
            f"{serving['span_s']:,.1f} s from the first arrival to the last finish",
            f"{serving['requests_per_s']:,.2f} requests/s",
            f"{serving['output_tokens_per_s']:,.1f} output tokens/s",
        ]
    return Grid(title, ("", *columns), rows, note=", ".join(notes))


def _prefix_cache(cache: Summary) -> Grid:
    rows = [
        ("prompt tokens found in it", number(cache["hit_tokens"], ",", f" of {cache['prompt_tokens']:,}")),
        ("hit rate, of those prompt tokens", number(cache["hit_rate"], ".1%", none="none")),
        ("tokens prefilled", number(cache["computed_tokens"], ",", f" in {cache['prefill_s']:,.2f} s")),
    ]
    if cache["saved_s"] is not None:
        rows.append((f"prefill time saved, {cache['saved_kind']}", number(cache["saved_s"], ",.2f", " s")))
    return Grid(f"Prefix cache ({RATES['prompts'].over})", ("", ""), rows)


def _workload(workload: Summary) -> Grid:
    """Every value as `group name | value`; zeros and nulls are in summary.json only."""
    rows = [(name, value) for name, value in _leaves(workload) if value not in ("0", "None")]
    return Grid("The workload, in its own words", ("", ""), rows, most=MAX_ROWS)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name} {key}".strip())
    else:
        is_number = type(value) in (int, float)
        yield name, number(value) if is_number else f"{value}"
