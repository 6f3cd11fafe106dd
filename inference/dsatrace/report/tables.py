"""A run's findings as tables: every figure beside the baseline it has to be read against.

Knows the run's manifest and summary. Only the sinks and the recent window are counted here, from
records.

    for part in run_tables(RunReader(folder)): console.print(part)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..text import counted, plain
from ..trace.kind import SelectionKind, engine_kind, inactive
from ..trace.manifest import selection_kind, shared_layers_of
from ..trace.reader import RunReader
from ..units import size_text
from .grid import MAX_ROWS, Cell, Grid, number, percent, size
from .tier_tables import tier_tables
from .workload_tables import workload_tables

Summary = Mapping[str, Any]

CAVEATS = {
    "synthetic": "The selections are synthetic: they show the format, and nothing about any model.",
    "random_weights": "The model's weights are random: this shows the machinery, and nothing about locality.",
    "none": "No model ran: what a run served says how requests were scheduled, not how fast a model is.",
}
NUM_SINKS = 16
"""Attention sinks: tokens at the start of the context."""
NUM_RECENT = 64
"""The recent window: tokens at the end of the context, the query's own included."""
_SCAN = "indexer keys (it scans every token)"
MAX_RECORDS = 20_000
"""Records that are read for sinks and the recent window, from the run's start."""


def caveat(summary: Summary) -> str | None:
    """What forbids reading locality off this run, or None."""
    return CAVEATS.get(summary["selections"])


def model_name(manifest: Summary) -> str:
    """What the manifest calls the model, and the digest of its hyperparameters."""
    if not manifest["model_config"]:
        return "no model"
    named = named_model(manifest) or "model"
    return f"{plain(named, 40)} (config {plain(manifest['model_config_digest'][:8])})"


def named_model(manifest: Summary) -> str | None:
    """The model's name or type in its own config, as it stands there."""
    values = (manifest["model_config"].get(key) for key in ("name", "_name_or_path", "model_type"))
    return next((value for value in values if isinstance(value, str) and value not in ("", "unknown")), None)


def run_kind(manifest: Summary) -> SelectionKind:
    """What the run selects; as the engine does where its manifest, an old one, does not tell."""
    return selection_kind(manifest) or engine_kind(manifest["model_config"].get("n_layers", 1), 1)


def unit_text(kind: SelectionKind) -> str:
    """What one id stands for: `token`, `entry of 4 tokens`."""
    return kind.unit if kind.unit_tokens == 1 else f"{kind.unit} of {kind.unit_tokens} tokens"


def run_tables(run: RunReader) -> Iterator[str | Grid]:
    """What a run found, in the order of the questions people ask."""
    run.require_order_of_steps("report on")
    summary = run.summary()
    counts = summary["counts"]
    yield (
        f"{counted(counts['requests'], 'request')}, {counted(counts['steps'], 'traced decode step')}, "
        f"{counts['records']} records ({counts['sparse_records']} past top-k), run {run.state}"
    )
    if warning := caveat(summary):
        yield warning
    yield from workload_tables(summary)
    if counts["records"] == 0:
        yield "No step was recorded: there are no selections to show."
        return
    kind = run_kind(run.manifest)
    yield from _kind(run.manifest, kind)
    if counts["sparse_records"] == 0:
        yield "No step saw more tokens than top-k: everything was selected, there is nothing sparse to show."
    else:
        yield from _evidence(run.manifest, summary, kind)
        if kind.holds("unique_blocks"):
            yield _blocks(summary)
        if grid := _overlap(summary):
            yield grid
        if run.manifest["trace"]["level"] == "full" and kind.holds("selected_token_pos"):
            yield from _sinks(run)
    if kind.holds("prefix"):
        yield _prefix(summary)
    yield from tier_tables(run.manifest, summary)
    if grid := _bytes(summary):
        yield grid
    yield _costs(run, summary)


def sink_shares(run: RunReader) -> dict[int, list[float]]:
    """By layer, mean shares of the selections of sparse decode records that stored their positions.

    Sinks, sinks if k of N were drawn at random, the recent window, the same at random, and the
    recent window if the last k were taken.
    """
    fields = ("layer_id", "seq_len_current", "phase", "path", "selected_token_pos")
    sparse = (
        record
        for record in run.steps(fields)
        if record["path"] == "sparse" and record["phase"] != "prefill" and "selected_token_pos" in record
    )
    shares: dict[int, list[tuple[float, ...]]] = {}
    for record in itertools.islice(sparse, MAX_RECORDS):
        positions, seq_len = np.asarray(record["selected_token_pos"]), record["seq_len_current"]
        k = len(positions)
        row = (
            np.count_nonzero(positions < NUM_SINKS) / k,
            min(NUM_SINKS, seq_len) / seq_len,
            np.count_nonzero(positions >= seq_len - NUM_RECENT) / k,
            min(NUM_RECENT, seq_len) / seq_len,
            min(NUM_RECENT, k) / k,
        )
        shares.setdefault(record["layer_id"], []).append(row)
    return {layer: np.mean(rows, axis=0).tolist() for layer, rows in sorted(shares.items())}


def _kind(manifest: Summary, kind: SelectionKind) -> Iterator[str]:
    """What the selections are of, as far as that is not one set of tokens per layer."""
    if kind.door != "serve":
        ids = (
            "a place of the engine's that says nothing of positions"
            if kind.id_kind == "slot"
            else f"one {unit_text(kind)}"
        )
        missing = f" It does not tell: {', '.join(kind.missing)}." if kind.missing else ""
        yield f"Selections of door {kind.door}; an id is {ids}.{missing}"
    several = sum(layer.heads > 1 for layer in kind.layers)
    if several:
        yield f"In {several} of {len(kind.layers)} layers each KV head selects apart: a record is of one."
    if idle := sum(layer.heads == 0 for layer in kind.layers):
        yield f"{idle} of {len(kind.layers)} layers select nothing."
    if num_shared := len(shared_layers_of(manifest)):
        num_layers = len(kind.layers)
        yield (
            f"{num_layers - num_shared} of {num_layers} layers have an indexer; each of the others uses the "
            "selection of the last one before it, and is not compared with the layer before."
        )


def _evidence(manifest: Summary, summary: Summary, kind: SelectionKind) -> Iterator[str]:
    """That sparse attention was active, where the run does not show it."""
    stored = (manifest.get("selection") or {}).get("sparse_active", summary.get("sparse_active"))
    if warning := inactive(summary["counts"]["sparse_records"], stored):
        yield warning
    elif not kind.holds("offset_max") and kind.unit != "expert":
        yield "Whether sparse attention was active, these ids cannot tell: they are no positions."


def _blocks(summary: Summary) -> Grid:
    columns = ("block size", "measured", "p95", "uniform selector", "recency selector", "in context")
    rows = [
        (
            number(row["block_size_tokens"], unit=" tokens"),
            number(row["mean"], ".1f"),
            number(row["p95"]),
            *(number(row[key], ".1f") for key in ("uniform_mean", "recency_mean", "context_mean")),
        )
        for row in summary["blocks_touched"]
    ]
    return Grid("KV blocks touched by one decode step, per layer (mean)", columns, rows)


def _overlap(summary: Summary) -> Grid | None:
    rows = []
    for name, key in (("in the step before", "step_overlap"), ("in the layer before", "layer_overlap")):
        overlap = summary[key]
        if overlap["pairs"]:
            shares = (percent(overlap["mean"]), percent(overlap["random_mean"]))
            rows.append((name, *shares, number(overlap["pairs"])))
    columns = ("", "measured", "random selector", "pairs")
    return Grid("Share of a selection already selected ...", columns, rows) if rows else None


def _sinks(run: RunReader) -> Iterator[Grid]:
    shares = sink_shares(run)
    if not shares:
        return
    title = f"Share of a selection: first {NUM_SINKS} tokens (sinks), last {NUM_RECENT}"
    columns = ("layer", "sinks", "uniform", "recent", "uniform", "recency selector")
    rows = [(number(layer), *map(percent, row)) for layer, row in shares.items()]
    yield Grid(title, columns, rows, most=MAX_ROWS, rest="what --json prints")


def _prefix(summary: Summary) -> str | Grid:
    if not summary["prefix_hot_blocks"]:
        return "No request began like an earlier one: no touched block lies in a shared prefix."
    ratio = summary["prefix_intersection_ratio"]
    rows = [
        ("share of a record's touched blocks (mean)", percent(ratio["mean"])),
        ("p95", percent(ratio["p95"])),
    ]
    for request_id, hot in summary["prefix_hot_blocks"].items():
        hottest = ", ".join(f"{entry['block_id']} ({entry['touches']}x)" for entry in hot[:5])
        touches = [[entry["block_id"], entry["touches"]] for entry in hot[:5]]
        rows.append((f"hottest of {request_id}", Cell(hottest, touches)))
    return Grid("Touched blocks that lie in a shared prefix", ("", ""), rows)


def _bytes(summary: Summary) -> Grid | None:
    read = summary["bytes_read"]
    if summary["kv_fetch"] is None or read["indexer_scan"] is None:
        known = {"latents of the touched blocks": "without_indexer_scan", _SCAN: "indexer_scan"}
        rows = [(name, size(read[key]), "") for name, key in known.items() if read[key] is not None]
        return Grid("Bytes read, all records", ("", "bytes", ""), rows) if rows else None
    total = read["with_indexer_scan"]
    fetched = summary["kv_fetch"].values()
    in_tiers = "hit_tokens" in summary["kv_fetch"]["hbm"]
    whole = "latents read, all tiers" if in_tiers else "latents of the touched blocks"
    all_rows = (
        ("latents of the selected tokens alone", sum(one["bytes_useful"] for one in fetched)),
        (whole, read["without_indexer_scan"]),
        (_SCAN, read["indexer_scan"]),
        ("latents and scan together" if in_tiers else "touched blocks and scan together", total),
    )
    texts = [(name, size(count), percent(count, total) if total else "") for name, count in all_rows]
    return Grid("Bytes read, all records", ("", "bytes", "share"), texts)


def _costs(run: RunReader, summary: Summary) -> Grid:
    cost, step_ms = summary["tracing_cost"], summary["step_ms"]
    trace_bytes = sum(path.stat().st_size for path in run.step_paths)
    num_records = summary["counts"]["records"]
    per_record = f", {trace_bytes / num_records:,.0f} bytes per record" if num_records else ""
    rows = [
        ("size", Cell(f"{size_text(trace_bytes)}{per_record}", trace_bytes)),
        ("decode step (median)", number(step_ms["p50"], ".2f", " ms", none="none")),
    ]
    if cost is not None:  # as in a summary that was recomputed
        for name, key in (("without", "without_sync_us_mean"), ("with", "with_sync_us_mean")):
            held_ms = None if cost[key] is None else cost[key] / 1e3
            shown = number(held_ms, ".2f", " ms per step", none="none")
            rows.append((f"model thread held up, {name} synchronisation", shown))
        rows.append(("writer thread busy, whole run", number(cost["writer_busy_ms"], ".1f", " ms")))
    return Grid("The trace itself", ("", ""), [*rows, ("files", str(run.folder))])
