"""The figures of a replay: shares, percentiles, curves and intervals, derived from a result's sums.

Each is derived here once, for replay.json, the tables and the pictures. What cannot be given is None: a
buffer smaller than a step, an interval over fewer than five requests.

    record = figures(result)
    record["overall"]["policies"]["lru"]["2k"]["miss_rate"]
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsatrace.selection_replay.layer_overlap import LayerOverlap, suggest_sharing
from dsatrace.selection_replay.locality import WINDOWS, Ages, Frequency, LagOverlap, Reuse, WorkingSets
from dsatrace.selection_replay.nulls import CHANCE_UNIT
from dsatrace.selection_replay.predictors import Prediction
from dsatrace.selection_replay.result import RUN, Asked, Cell, Curve, Misses, Result, Tree, added
from dsatrace.selection_replay.sums import quantile

SERVED = (90, 95, 99)
"""Shares of the selected ids, in percent, that a buffer is sized for."""
MIN_REQUESTS = 5
"""Requests that an interval needs."""
LAGS = (1, 2, 4, 8, 16, 32, 64)
RECALLS = (0.5, 0.7, 0.9)
"""Of a suggested pattern of layers that share an index: what every one of them keeps."""
_DRAWS = 2000


def figures(result: Result) -> dict[str, Any]:
    """All figures; `overall` holds those of all layers together."""
    num_sets = len(result.locality)
    intervals = _intervals(result)
    bytes_per_id = result.header["bytes_per_id"]
    return {
        "num_requests": len(result.requests),
        "num_groups": sum("misses" in told for told in result.requests.values()),
        "past_answer": _told(result, "answer"),
        "shared_prefixes": _told(result, "prefix"),
        "overall": {
            **_of_buffers(added(result.buffers.values()), result.header, num_sets, intervals),
            **_locality(added(result.locality.values()), bytes_per_id),
        },
        "layers": [
            {
                "name": layer,  # the layer, or layer.head where it has a set per KV head
                **_of_own_buffer(result, layer),
                **_locality(result.locality[layer], bytes_per_id),
            }
            for layer in sorted(result.locality, key=lambda name: [*map(int, name.split("."))])
        ],
        "layer_overlap": [_layer_overlap(group["layer_overlap"]) for group in result.between.values()],
    }


def _told(result: Result, name: str) -> dict[str, Any] | None:
    """The sum of what requests tell; None where none does."""
    found = [told[name] for told in result.requests.values() if name in told]
    return functools.reduce(operator.add, found).to_json() if found else None


def _of_own_buffer(result: Result, layer: str) -> dict[str, Any]:
    """Nothing where a request's layers share one."""
    streams = result.buffers.get(layer)
    return _of_buffers(streams, result.header, 1, {}) if streams else {}


def _of_buffers(
    streams: Tree, header: Mapping[str, Any], num_sets: int, intervals: Mapping[str, Any]
) -> dict[str, Any]:
    """`num_sets`: that a decode step selects."""
    asked: Asked = streams[RUN]["asked"]
    largest = max(asked.step_sizes, default=0)
    cells = {
        policy: {
            size: _cell(cell, _null_rates(streams, policy, size), largest, header, num_sets)
            | {"interval": intervals.get(policy, {}).get(size)}
            for size, cell in sizes.items()
        }
        for policy, sizes in streams[RUN]["policies"].items()
    }
    curves = {name: _curve(stream["curve"], stream["asked"]) for name, stream in streams.items()}
    return {
        "steps": asked.steps,
        "selected": asked.selected,
        "largest_step": largest,
        "contexts": _quantiles(asked.contexts, (50, 100)),
        "chance": _share(asked.chance * CHANCE_UNIT, asked.selected),
        "policies": cells,
        "missed_by_step": _by_step(streams[RUN]),
        "curves": curves,
        "served": {name: _served(curve) for name, curve in curves.items()},
    }


def _by_step(run: Tree) -> dict[str, list[float]]:
    """By size, the mean ids that LRU misses in each step; steps count from the first counted one."""
    asked: Asked = run["asked"]
    steps = sorted(asked.at_step)
    cells: Mapping[str, Cell] = run["policies"].get("lru", {})
    return {
        size: [cell.missed_at[step] / asked.at_step[step] for step in steps]
        for size, cell in cells.items()
        if cell.missed_at is not None and not cell.too_small
    }


def _null_rates(streams: Tree, policy: str, size: str) -> dict[str, float | None]:
    rates: dict[str, float | None] = {}
    for name, stream in streams.items():
        if name != RUN and policy in stream["policies"]:
            cell: Cell = stream["policies"][policy][size]
            rates[name] = _share(cell.missed, cell.selected)
    return rates


def _cell(
    cell: Cell, nulls: Mapping[str, float | None], largest: int, header: Mapping[str, Any], num_sets: int
) -> dict[str, Any]:
    """The figures of one policy at one size, or why there are none."""
    if cell.too_small:
        return {"miss_rate": None, "too_small": f"a step asks for up to {largest} ids at once"}
    if not cell.steps:
        return {"miss_rate": None, "too_small": None}
    per_step, bytes_per_id = cell.missed / cell.steps, header["bytes_per_id"]
    figures: dict[str, Any] = {
        "ids": cell.ids / cell.buffers,
        "miss_rate": _share(cell.missed, cell.selected),
        "nulls": dict(nulls),
        "step_miss_rate": cell.missed_steps / cell.steps,
        "misses_per_step": {"mean": per_step, **_quantiles(cell.misses, (50, 95, 99))},
        "reads_per_token": per_step * num_sets,
        "bytes_per_token": None if bytes_per_id is None else per_step * num_sets * bytes_per_id,
        "evictions_per_step": cell.evictions / cell.steps,
    }
    if cell.by_seed is not None:
        rates = [missed / cell.selected for missed in cell.by_seed] if cell.selected else []
        figures["by_seed"] = {
            "min": min(rates, default=None),
            "max": max(rates, default=None),
            "seeds": len(rates),
        }
    if cell.ages is not None:
        figures["steps_since_selected"] = _quantiles(cell.ages, (50, 95))
        figures["never_selected_before"] = _share(cell.never or 0, cell.missed)
    return figures


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _quantiles(histogram: Counter[int], percents: tuple[int, ...]) -> dict[str, int | None]:
    return {f"p{percent}": quantile(histogram, percent) for percent in percents}


def _curve(curve: Curve, asked: Asked) -> dict[str, list[float]]:
    """LRU's miss rates from the smallest size that holds every step."""
    sizes, ids, steps = curve.misses(max(asked.step_sizes, default=0))
    return {
        "sizes": sizes.tolist(),
        "miss_rate": (ids / max(asked.selected, 1)).tolist(),
        "step_miss_rate": (steps / max(asked.steps, 1)).tolist(),
    }


def _served(curve: Mapping[str, list[float]]) -> dict[str, float | None]:
    """The smallest sizes in which LRU serves that share; None where no size does."""
    pairs = list(zip(curve["sizes"], curve["miss_rate"], strict=True))
    return {
        f"{percent}%": next((size for size, rate in pairs if rate <= 1 - percent / 100), None)
        for percent in SERVED
    }


def _locality(streams: Tree, bytes_per_id: int | None) -> dict[str, Any]:
    """What says how local the selections are, without a buffer."""
    run = streams[RUN]
    reuse: Reuse = run["reuse"]
    frequency: Frequency = run["frequency"]
    ages: Ages = run["ages"]
    selected = sum(reuse.distances.values()) + reuse.never
    return {
        "overlap": {name: _overlap(stream["lags"]) for name, stream in streams.items()},
        "working_set": {name: _working_set(stream["working_sets"]) for name, stream in streams.items()},
        "reuse": {
            "steps_since_selected": _quantiles(reuse.distances, (50, 95, 99)),
            "never_selected_before": _share(reuse.never, selected),
            "distances": {
                "values": sorted(reuse.distances),
                "counts": [reuse.distances[d] for d in sorted(reuse.distances)],
            },
        },
        "frequency": {"ids": list(frequency.ids), "selected": list(frequency.selected)},
        "distance_to_newest": None if ages.selected is None else list(ages.selected),
        "predictors": {name: _prediction(found, bytes_per_id) for name, found in run["predictors"].items()},
    }


def _overlap(lags: LagOverlap) -> dict[str, Any]:
    shifted = lags.shifted_share()
    columns = {
        "share": lags.share(),
        "shifted_share": shifted,
        "chance": lags.chance_share(),
        "jaccard": lags.jaccard(),
        "chance_jaccard": lags.chance_jaccard(),
    }
    return {"lags": list(LAGS)} | {
        name: None if column is None else [column[lag - 1] for lag in LAGS]
        for name, column in columns.items()
    }


def _working_set(sets: WorkingSets) -> dict[str, Any]:
    return {"steps": list(WINDOWS), "mean_ids": list(sets.means())}


def _prediction(found: Prediction, bytes_per_id: int | None) -> dict[str, float | None]:
    extra = _share(found.extra, found.steps)
    return {
        "recall": found.recall,
        "chance_recall": found.chance_recall,
        "precision": found.precision,
        "extra_ids_per_step": extra,
        "extra_bytes_per_step": None if extra is None or bytes_per_id is None else extra * bytes_per_id,
    }


def _layer_overlap(overlap: LayerOverlap) -> dict[str, Any]:
    suggested = []
    for recall in RECALLS:
        sharing = suggest_sharing(overlap, recall)
        suggested.append(
            {
                "least_recall": recall,
                "pattern": sharing.letters,
                "full_layers": sharing.num_full,
                "recall_of_shared": sharing.recall_of_shared(),
            }
        )
    return {
        "layers": list(overlap.layers),
        "recall": [list(row) for row in overlap.recalls()],
        "chance": [list(row) for row in overlap.chance_recalls()],
        "suggested": suggested,
    }


def _intervals(result: Result) -> dict[str, dict[str, list[float] | None]]:
    """95 % intervals of the overall miss rates: percentiles over requests drawn with replacement, or over
    groups of them that share buffers."""
    requests = [told["misses"] for _, told in sorted(result.requests.items()) if "misses" in told]
    if len(requests) < MIN_REQUESTS:
        return {}
    drawn = np.random.default_rng(0).integers(len(requests), size=(_DRAWS, len(requests)))
    intervals: dict[str, dict[str, list[float] | None]] = {}
    for policy, sizes in requests[0].items():
        for size in sizes:
            cells: list[Misses] = [request[policy][size] for request in requests]
            missed, selected = (
                np.array([getattr(cell, name) for cell in cells]) for name in ("missed", "selected")
            )
            sums = selected[drawn].sum(axis=1)
            rates = missed[drawn].sum(axis=1)[sums > 0] / sums[sums > 0]
            interval = np.percentile(rates, (2.5, 97.5)).tolist() if len(rates) else None
            intervals.setdefault(policy, {})[size] = interval
    return intervals
