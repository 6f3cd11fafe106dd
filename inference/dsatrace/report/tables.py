"""A run's findings as tables: every figure beside the baseline it has to be read against.

Knows a run's manifest and summary; computes nothing that is not already in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from ..trace.manifest import shared_layers_of
from ..trace.reader import RunReader
from .places import NUM_SINKS, RECENT, places
from .tier_tables import tier_tables
from .workload_tables import MAX_ROWS, new_table, workload_tables

Summary = Mapping[str, Any]

CAVEATS = {
    "synthetic": "The selections are synthetic: they show the format, and nothing about any model.",
    "random_weights": "The model's weights are random: this shows the machinery, and nothing about locality.",
    "none": "No model ran: what a run served says how requests were scheduled, not how fast a model is.",
}


def caveat(summary: Summary) -> str | None:
    """What forbids reading locality off this run, or None."""
    return CAVEATS.get(summary["selections"])


def run_tables(run: RunReader) -> Iterator[RenderableType]:
    """What a run found, in the order of the questions people ask."""
    summary, state = run.summary(), run.state
    counts = summary["counts"]
    yield (
        f"{counts['requests']} requests, {counts['steps']} traced decode steps, "
        f"{counts['records']} records ({counts['sparse_records']} past top-k), run {state}"
    )
    if warning := caveat(summary):
        yield warning
    yield from workload_tables(summary)
    if counts["records"] == 0:
        yield "No step was recorded: there are no selections to show."
        return
    if num_shared := len(shared_layers_of(run.manifest)):
        num_layers = run.manifest["model_config"]["n_layers"]
        yield (
            f"{num_layers - num_shared} of {num_layers} layers have an indexer; each of the others uses the "
            "selection of the last one before it, and is not compared with the layer before."
        )
    if counts["sparse_records"] == 0:
        yield "No step saw more tokens than top-k: everything was selected, there is nothing sparse to show."
    else:
        yield _blocks(summary)
        yield _overlap(summary)
        if run.manifest["trace"]["level"] == "full":
            yield from _places(run)
    yield _prefix(summary)
    yield from tier_tables(run.manifest, summary)
    yield _bytes(summary)
    yield _costs(run, summary)


def _blocks(summary: Summary) -> Table:
    table = new_table(
        "KV blocks touched by one decode step, per layer (mean)",
        "block size",
        "measured",
        "p95",
        "uniform selector",
        "recency selector",
        "in context",
    )
    for row in summary["blocks_touched"]:
        means = (row["uniform_mean"], row["recency_mean"], row["context_mean"])
        table.add_row(
            f"{row['block_size_tokens']} tokens",
            f"{row['mean']:.1f}",
            f"{row['p95']}",
            *(f"{mean:.1f}" for mean in means),
        )
    return table


def _overlap(summary: Summary) -> Table:
    table = new_table("Share of a selection already selected ...", "", "measured", "random selector", "pairs")
    for name, key in (("in the step before", "step_overlap"), ("in the layer before", "layer_overlap")):
        overlap = summary[key]
        if overlap["pairs"]:
            shares = (overlap["mean"], overlap["random_mean"])
            table.add_row(name, *(f"{share:.1%}" for share in shares), f"{overlap['pairs']}")
    return table


def _places(run: RunReader) -> Iterator[Table]:
    """Sinks and the recent window, where positions were recorded."""
    found = places(run)
    if not found:
        return
    table = new_table(
        f"Share of a selection: first {NUM_SINKS} tokens (sinks), last {RECENT}",
        "layer",
        "sinks",
        "uniform",
        "recent",
        "uniform",
        "recency selector",
    )
    for row in found[:MAX_ROWS]:
        shares = (row.sinks, row.uniform_sinks, row.recent, row.uniform_recent, row.recency_recent)
        table.add_row(f"{row.layer_id}", *(f"{share:.1%}" for share in shares))
    yield table


def _prefix(summary: Summary) -> RenderableType:
    if not summary["prefix_hot_blocks"]:
        return "No request began like an earlier one: no touched block lies in a shared prefix.\n"
    table = new_table("Touched blocks that lie in a shared prefix", "", "")
    ratio = summary["prefix_intersection_ratio"]
    table.add_row("share of a record's touched blocks (mean)", f"{ratio['mean']:.1%}")
    table.add_row("p95", f"{ratio['p95']:.1%}")
    for request_id, hot in summary["prefix_hot_blocks"].items():
        hottest = ", ".join(f"{entry['block_id']} ({entry['touches']}x)" for entry in hot[:5])
        table.add_row(f"hottest of {request_id}", hottest)
    return table


def _bytes(summary: Summary) -> Table:
    table = new_table("Bytes read, whole run", "", "MB", "share")
    total = summary["bytes_read"]["with_indexer_scan"]
    fetched = summary["kv_fetch"].values()
    in_tiers = "hit_tokens" in summary["kv_fetch"]["hbm"]
    whole = "latents read, all tiers" if in_tiers else "latents of the touched blocks"
    rows = (
        ("latents of the selected tokens alone", sum(one["bytes_useful"] for one in fetched)),
        (whole, summary["bytes_read"]["without_indexer_scan"]),
        ("indexer keys (it scans every token)", summary["bytes_read"]["indexer_scan"]),
        ("latents and scan together" if in_tiers else "touched blocks and scan together", total),
    )
    for name, num_bytes in rows:
        table.add_row(name, f"{num_bytes / 1e6:,.2f}", f"{num_bytes / total:.1%}" if total else "")
    return table


def _costs(run: RunReader, summary: Summary) -> Table:
    cost, step_ms = summary["tracing_cost"], summary["step_ms"]
    table = new_table("The trace itself", "", "")
    trace_bytes = run.steps_path.stat().st_size
    num_records = summary["counts"]["records"]
    per_record = f", {trace_bytes / num_records:,.0f} bytes a record" if num_records else ""
    table.add_row("size", f"{trace_bytes / 1e6:,.2f} MB{per_record}")
    table.add_row(
        "decode step (median)", f"{step_ms['p50']:.2f} ms" if step_ms["p50"] is not None else "none"
    )
    if cost is not None:  # as in a summary that was recomputed
        for name, key in (("without", "without_sync_us_mean"), ("with", "with_sync_us_mean")):
            value = cost[key]
            shown = "none" if value is None else f"{value / 1e3:.2f} ms a step"
            table.add_row(f"model thread held up, {name} synchronisation", shown)
        table.add_row("writer thread busy, whole run", f"{cost['writer_busy_ms']:.1f} ms")
    table.add_row("files", str(run.folder))
    return table
