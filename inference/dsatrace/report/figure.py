"""One picture of a run: blocks touched, where they lie over time, overlap and age; who served it, and how.

A panel is there only where the run has something to show in it.

draw(RunReader(folder))      # writes report.png into the run's folder
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..trace.reader import RunReader
from .tables import Summary, caveat
from .tier_tables import TIER_TITLES, tiers_of

FIGURE_FILE = "report.png"
MAX_STEPS = 1000
"""Columns of the heat map; more would be narrower than a pixel."""


def draw(run: RunReader, layer_id: int | None = None) -> Path | None:
    """Draws the panels; the heat map shows the first request in `layer_id` (the last layer).

    None, and no picture, where there is nothing to show.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    summary = run.summary()
    panels = _panels(run, summary, layer_id)
    if not panels:
        return None
    num_rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(num_rows, 2, figsize=(12, 4 * num_rows), layout="constrained", squeeze=False)
    for panel, place in itertools.zip_longest(panels, axes.flat):
        if panel is None:
            place.set_axis_off()
        else:
            panel(place)
    counts = summary["counts"]
    title = f"{run.folder.name}: {counts['requests']} requests, {counts['steps']} decode steps"
    figure.suptitle(f"{title}\n{caveat(summary)}" if caveat(summary) else title)
    path = run.folder / FIGURE_FILE
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"{path}: cannot write the picture: {error.strerror}; use --no-figure") from error
    finally:
        plt.close(figure)
    return path


def _panels(run: RunReader, summary: Summary, layer_id: int | None) -> list[Callable[[Any], None]]:
    panels: list[Callable[[Any], None]] = []
    if summary["counts"]["records"]:
        num_layers = run.manifest["model_config"]["n_layers"]
        if layer_id is not None and not 0 <= layer_id < num_layers:
            raise UserError(f"--layer {layer_id}: the run has layers 0 to {num_layers - 1}")
        layer = num_layers - 1 if layer_id is None else layer_id
        is_sparse = summary["counts"]["sparse_records"] > 0
        if is_sparse:
            panels.append(lambda axes: _blocks_touched(axes, summary))
        panels.append(lambda axes: _heat_map(axes, run, layer, is_sparse))
        if is_sparse:
            panels.append(lambda axes: _overlap(axes, summary))
        panels.append(lambda axes: _offsets(axes, summary))
    if serving := summary.get("serving"):
        panels += [
            lambda axes: _latencies(axes, summary["histograms"], serving["clock"]),
            lambda axes: _over_time(axes, serving["requests_over_time"]),
        ]
    if recall := summary.get("needle_recall"):
        panels.append(lambda axes: _needle_recall(axes, recall))
    if (setup := run.manifest.get("tiers")) and summary["counts"]["records"]:
        panels.append(lambda axes: draw_tiers(axes, setup, summary["kv_fetch"]))
    return panels


def _blocks_touched(axes: Any, summary: Summary) -> None:
    rows = summary["blocks_touched"]
    selectors = (("mean", "measured"), ("uniform_mean", "uniform"), ("recency_mean", "recency"))
    place = np.arange(len(rows))
    for i, (key, label) in enumerate(selectors):
        shares = [row[key] / row["context_mean"] if row[key] is not None else 0 for row in rows]
        axes.bar(place + 0.27 * (i - 1), shares, 0.25, label=label)
    axes.set_xticks(place, [f"{row['block_size_tokens']}" for row in rows])
    axes.set(
        title="Share of the context's blocks touched by a step", xlabel="block size (tokens)", ylim=(0, 1.2)
    )
    axes.legend(loc="upper center", ncols=3)


def _heat_map(axes: Any, run: RunReader, layer_id: int, is_sparse: bool) -> None:
    """How many tokens of each block were selected, step by step, for the first request that is past top-k.

    Arrows mark the blocks that hold the answer, where the workload knows them.
    """
    from matplotlib.colors import PowerNorm

    records = _first_request(run, layer_id, "sparse" if is_sparse else "dense")
    axes.set(title=f"Tokens selected per block, layer {layer_id}", xlabel="decode step", ylabel="block")
    if not records:
        axes.text(0.5, 0.5, "positions were not recorded", ha="center", transform=axes.transAxes)
        return
    block_size = records[0]["block_size_tokens"]
    num_blocks = max(record["seq_len_current"] for record in records) // block_size + 1
    touched = np.zeros((num_blocks, len(records)))
    for step, record in enumerate(records):
        blocks = np.asarray(record["selected_token_pos"]) // block_size
        touched[:, step] = np.bincount(blocks, minlength=num_blocks)
    # The root spreads the small counts, which are most of them; 0 is white.
    image = axes.imshow(
        touched,
        norm=PowerNorm(0.5, vmin=0),
        cmap="Blues",
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    axes.figure.colorbar(image, ax=axes, label="selected tokens")
    for locator in (axes.xaxis, axes.yaxis):
        locator.get_major_locator().set_params(integer=True)
    needle = {position // block_size for position in _needle_positions(run, records[0]["request_id"])}
    for block in needle:
        where = {"xy": (1, block), "xycoords": ("axes fraction", "data")}
        axes.annotate(
            "",
            **where,
            xytext=(8, 0),
            textcoords="offset points",
            arrowprops={"color": "C3", "headwidth": 6, "headlength": 6, "width": 1},
        )
    if needle:
        axes.set_title(f"{axes.get_title()}; arrows: the answer")


def _needle_positions(run: RunReader, request_id: str) -> list[int]:
    same = (request for request in run.requests() if request["request_id"] == request_id)
    return next(same, {}).get("needle_positions", [])


def _first_request(run: RunReader, layer_id: int, path: str) -> list[dict[str, Any]]:
    """The decode records of one layer of the first request on that path, up to `MAX_STEPS` of them."""
    of_layer = (
        record
        for record in run.steps()
        if record["layer_id"] == layer_id and record["phase"] == "decode" and "selected_token_pos" in record
    )
    first = next((record for record in of_layer if record["path"] == path), None)
    if first is None:
        return []
    same = (record for record in of_layer if record["request_id"] == first["request_id"])
    return [first, *itertools.islice(same, MAX_STEPS - 1)]


def _overlap(axes: Any, summary: Summary) -> None:
    for key, label in (("step_overlap", "step before"), ("layer_overlap", "layer before")):
        overlap = summary[key]
        if not overlap["pairs"]:
            continue
        shares = [np.nan if share is None else share for share in overlap["per_layer"]]
        (line,) = axes.plot(range(len(shares)), shares, marker="o", label=f"already in the {label}")
        axes.axhline(overlap["random_mean"], color=line.get_color(), linestyle=":", label="random selector")
    axes.set(title="Overlap of selections", xlabel="layer", ylabel="share", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.lines:
        axes.legend()


def _offsets(axes: Any, summary: Summary) -> None:
    histogram = summary["histograms"]["offsets"]
    values, counts = np.asarray(histogram["values"]), np.asarray(histogram["counts"], dtype=float)
    axes.set(
        title="How far back a selected token lies", xlabel="offset from the query (tokens)", ylabel="CDF"
    )
    if len(values):
        axes.step(values, np.cumsum(counts) / counts.sum(), where="post")
        axes.set_xscale("symlog")
        axes.set_ylim(0, 1.02)


def _needle_recall(axes: Any, recall: Summary) -> None:
    shares = [np.nan if share is None else share for share in recall["per_layer"]]
    axes.plot(range(len(shares)), shares, marker="o", label="measured")
    axes.axhline(recall["random_mean"], color="C0", linestyle=":", label="random selector (k / N)")
    axes.set(title="Share of the answer's tokens selected", xlabel="layer", ylabel="share", ylim=(0, 1.02))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def draw_tiers(axes: Any, setup: Summary, fetched: Summary) -> None:
    """What each tier served and moved; every bar's parts add up to all of the recorded steps."""
    there = tiers_of(setup)
    measures = {
        "hit_tokens": "selected tokens",
        "hit_blocks": "touched blocks",
        "bytes_read": "bytes read",
        "read_ops": "reads",
        "bytes_written": "bytes written",
    }
    place, begins = np.arange(len(measures)), np.zeros(len(measures))
    totals = [sum(fetched[name][measure] for name in there) for measure in measures]
    for name in there:
        shares = [
            fetched[name][measure] / total if total else 0
            for measure, total in zip(measures, totals, strict=True)
        ]
        axes.barh(place, shares, 0.6, begins, label=TIER_TITLES[name])
        begins += shares
    axes.set_yticks(place, list(measures.values()))
    axes.set(
        title="Where the selected KV was",
        xlabel="share of all tiers",
        xlim=(0, 1),
        ylim=(len(measures) - 0.5, -1.4),
    )
    axes.legend(loc="upper center", ncols=len(there))


def _latencies(axes: Any, histograms: Summary, clock: str) -> None:
    durations = (("queue", "admission"), ("time_to_first_token", "first token"), ("latency", "finish"))
    axes.set(title="From a request's arrival to ...", xlabel=f"ms ({clock} clock)", ylabel="CDF")
    for name, label in durations:
        histogram = histograms[f"{name}_us"]
        values, counts = np.asarray(histogram["values"]), np.asarray(histogram["counts"], dtype=float)
        if len(values):
            axes.step(values / 1000, np.cumsum(counts) / counts.sum(), where="post", label=label)
    if axes.lines:
        axes.set_xscale("symlog")
        axes.set_ylim(0, 1.02)
        axes.legend(loc="lower right")


def _over_time(axes: Any, buckets: list[Summary]) -> None:
    axes.set(title="Requests over time", xlabel="s from the run's start", ylabel="requests")
    if not buckets:
        return
    starts = np.array([bucket["start_s"] for bucket in buckets])
    width = starts[1] - starts[0] if len(starts) > 1 else 1
    edges = np.append(starts, starts[-1] + width)
    axes.set_ylabel(f"requests in {width} s")
    for name, filled in (("arrived", True), ("finished", False)):
        counts = [bucket[name] for bucket in buckets]
        axes.stairs(counts, edges, label=name, fill=filled, alpha=0.4 if filled else 1, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend()
