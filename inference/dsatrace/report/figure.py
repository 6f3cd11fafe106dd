"""One picture of a run: blocks touched, where they lie over time, overlap and age, tiers, serving.

A panel is there only if the run has something to show in it.

draw(RunReader(folder))      # writes report.png into the run's folder
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..text import for_picture
from ..trace.kind import engine_kind
from ..trace.manifest import selection_kind
from ..trace.reader import RunReader
from .drawing import picture, whole_numbers
from .tables import Summary, caveat
from .tier_tables import TIER_TITLES, tiers_of

FIGURE_FILE = "report.png"
MAX_STEPS = 1000
"""Columns of the heat map. More would be narrower than a pixel."""


def draw(run: RunReader, layer_id: int | None = None) -> Path | None:
    """Draws the panels; the heat map shows the first request in `layer_id` (default: the last layer).

    Returns None, without a picture, if there is nothing to show.
    """
    summary = run.summary()
    panels = list(_panels(run, summary, layer_id))
    if not panels:
        return None
    path, num_rows = run.folder / FIGURE_FILE, -(-len(panels) // 2)
    with picture(path, (12, 4 * num_rows), rows=num_rows, columns=2, without="--no-figure") as (figure, axes):
        for panel, place in itertools.zip_longest(panels, axes):
            if panel is None:
                place.set_axis_off()
            else:
                panel(place)
        counts = summary["counts"]
        title = (
            f"{for_picture(run.folder.name)}: {counts['requests']} requests, {counts['steps']} decode steps"
        )
        figure.suptitle(f"{title}\n{caveat(summary)}" if caveat(summary) else title)
    return path


def _panels(run: RunReader, summary: Summary, layer_id: int | None) -> Iterator[Callable[[Any], None]]:
    if summary["counts"]["records"]:
        kind = selection_kind(run.manifest) or engine_kind(run.manifest["model_config"]["n_layers"], 1)
        num_layers = len(kind.layers)
        if layer_id is not None and not 0 <= layer_id < num_layers:
            raise UserError(f"--layer {layer_id}: the run has layers 0 to {num_layers - 1}")
        layer = int(kind.set_layers[-1]) if layer_id is None else layer_id
        is_sparse = summary["counts"]["sparse_records"] > 0
        if is_sparse and kind.holds("unique_blocks"):
            yield lambda axes: _blocks_touched(axes, summary)
        if kind.holds("selected_token_pos"):
            yield lambda axes: _heat_map(axes, run, layer, is_sparse)
        if is_sparse:
            yield lambda axes: _overlap(axes, summary)
        if kind.holds("offset_max"):
            yield lambda axes: _offsets(axes, summary)
    if serving := summary.get("serving"):
        yield lambda axes: _latencies(axes, summary["histograms"], serving["clock"])
        yield lambda axes: _over_time(axes, serving["requests_over_time"])
    if recall := summary.get("needle_recall"):
        yield lambda axes: _needle_recall(axes, recall)
    if (setup := run.manifest.get("tiers")) and summary["counts"]["records"]:
        yield lambda axes: draw_tiers(axes, setup, summary["kv_fetch"])


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
    """Tokens selected of each block, step by step, of the first request that is past top-k.

    Arrows mark the blocks that hold the answer, if the workload knows them.
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
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
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
    """The decode records of one layer, and its first KV head, of the first request on that path, up to
    `MAX_STEPS` of them."""
    of_layer = (
        record
        for record in run.steps()
        if record["layer_id"] == layer_id
        and record["phase"] != "prefill"
        and "selected_token_pos" in record
        and record.get("kv_head", 0) == 0
    )
    first = next((record for record in of_layer if record["path"] == path), None)
    if first is None:
        return []
    same = (record for record in of_layer if record["request_id"] == first["request_id"])
    return [first, *itertools.islice(same, MAX_STEPS - 1)]


def _overlap(axes: Any, summary: Summary) -> None:
    axes.set(title="Overlap of selections", ylim=(0, 1))
    for key, label in (("step_overlap", "step before"), ("layer_overlap", "layer before")):
        if summary[key]["pairs"]:
            _by_layer(axes, summary[key], f"already in the {label}", "random selector")


def _needle_recall(axes: Any, recall: Summary) -> None:
    axes.set(title="Share of the answer's tokens selected", ylim=(0, 1.02))
    _by_layer(axes, recall, "measured", "random selector (k / N)")


def _by_layer(axes: Any, section: Summary, label: str, baseline: str) -> None:
    """A line over the layers, and its random baseline dotted in the same colour."""
    shares = [np.nan if share is None else share for share in section["per_layer"]]
    (line,) = axes.plot(range(len(shares)), shares, marker="o", label=label)
    axes.axhline(section["random_mean"], color=line.get_color(), linestyle=":", label=baseline)
    axes.set(xlabel="layer", ylabel="share")
    whole_numbers(axes.xaxis)
    axes.legend()


def _offsets(axes: Any, summary: Summary) -> None:
    labels = {"xlabel": "offset from the query (tokens)", "ylabel": "CDF"}
    axes.set(title="How far back a selected token lies", **labels)
    _cdf(axes, summary["histograms"]["offsets"])


def _cdf(axes: Any, histogram: Summary, per_unit: float = 1, label: str | None = None) -> None:
    """A cumulative share over `values / per_unit`; nothing if the histogram is empty."""
    values, counts = np.asarray(histogram["values"]), np.asarray(histogram["counts"], dtype=float)
    if len(values):
        axes.step(values / per_unit, np.cumsum(counts) / counts.sum(), where="post", label=label)
        axes.set_xscale("symlog")
        axes.set_ylim(0, 1.02)


def draw_tiers(axes: Any, setup: Summary, fetched: Summary) -> None:
    """What each tier served and moved; the parts of a bar add up to all of the recorded steps."""
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
    axes.set(title="From a request's arrival to ...", xlabel=f"ms ({for_picture(clock)} clock)", ylabel="CDF")
    durations = (("queue", "admission"), ("time_to_first_token", "first token"), ("latency", "finish"))
    for name, label in durations:
        _cdf(axes, histograms[f"{name}_us"], 1000, label)
    if axes.lines:
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
    whole_numbers(axes.yaxis)
    axes.legend()
