"""Which layers miss, and when: by layer and step, and by layer with its percentiles."""

from __future__ import annotations

import numpy as np

from ..grid import Cell, number
from .heat_map import Ramp, heat_map
from .material import Material, Record
from .miss_curve import rate
from .section import LeftOut, Section, figures_html
from .svg import Axis, Bar, bars

BY_STEP = "Which layers miss, and when?"
BY_LAYER = "How many misses has a step, by layer?"
PERCENTILES = ("p50", "p95", "p99")
MOST_TABLE_STEPS, MOST_TABLE_CELLS = 64, 2000
"""Columns of steps in the table, and cells; beyond, steps are averaged."""


def misses_by_step(material: Material) -> Section | LeftOut:
    found = _layers(material, BY_STEP)
    if isinstance(found, LeftOut):
        return found
    size, layers = found
    rows = [layer["missed_by_step"][size] for layer in layers.values()]
    values = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, missed in zip(values, rows, strict=True):
        row[: len(missed)] = missed
    num_steps = values.shape[1]
    body = heat_map(
        BY_STEP,
        f"Missed {material.ids} per step, {len(rows)} layers by {num_steps} steps. {_most(layers, size)}",
        values,
        Ramp(f"missed {material.ids} per step"),
        Axis("decode step", 0.5, num_steps + 0.5, whole=True),
        Axis("layer", 0, len(rows)),
        y_labels=list(layers),
    )
    by = -(-num_steps // max(min(MOST_TABLE_STEPS, MOST_TABLE_CELLS // len(rows)), 1))
    starts = range(0, num_steps, by)
    heads = (f"{i + 1}" if by == 1 else f"{i + 1}-{min(i + by, num_steps)}" for i in starts)
    means = (
        (name, *(number(_mean(row[i : i + by]), ".1f") for i in starts))
        for name, row in zip(layers, values, strict=True)
    )
    note = (
        f"Missed {material.ids} of LRU at {size}, mean over the requests that reach the step. Step 1 is the "
        "first that counts: past top-k, and after those that fill the buffer."
    )
    if by > 1:
        note += f" The columns of the numbers are means of {by} steps."
    table = (("layer", *heads), list(means))
    return Section("by-step", BY_STEP, body, note, material.replay_command, table)


def misses_by_layer(material: Material) -> Section | LeftOut:
    found = _layers(material, BY_LAYER)
    if isinstance(found, LeftOut):
        return found
    size, layers = found
    cells = {name: layer["policies"]["lru"][size] for name, layer in layers.items()}
    missed = {name: cell["misses_per_step"] for name, cell in cells.items()}
    high = max(one[key] for one in missed.values() for key in ("mean", *PERCENTILES))
    body = figures_html(_answer(material, missed)) + bars(
        BY_LAYER,
        f"Missed {material.ids} per step at {size}, by layer. {_most(layers, size)}",
        "layer",
        Axis(f"missed {material.ids} per step", 0, high or 1, nice=True),
        [Bar(name, one["mean"], [one[key] for key in PERCENTILES]) for name, one in missed.items()],
        ("mean", *PERCENTILES),
    )
    columns = (
        "layer", "buffer, ids", "mean", *PERCENTILES, "missed", "steps with a miss", "in the step before too",
    )  # fmt: skip
    rows = [
        (
            name,
            number(cells[name]["ids"], ",.0f"),
            number(one["mean"], ".1f"),
            *(number(one[key]) for key in PERCENTILES),
            rate(cells[name]["miss_rate"]),
            rate(cells[name]["step_miss_rate"]),
            rate(layers[name]["overlap"]["run"]["share"][0]),
        )
        for name, one in missed.items()
    ]
    note = (
        f"Missed {material.ids} per decode step of a layer, LRU at {size}; percentiles over the steps of all "
        "requests (nearest rank). A step waits for all of its misses, so the tail decides how long it takes. "
        f"In the numbers, shares are of the selected {material.ids}, and of the steps."
    )
    return Section("by-layer", BY_LAYER, body, note, material.replay_command, (columns, rows))


def _layers(material: Material, title: str) -> tuple[str, dict[str, Record]] | LeftOut:
    """The size, and by name the layers that have steps at it."""
    record, size = material.replay, material.size
    if record is None:
        return LeftOut(title, material.no_replay)
    if record["settings"]["share"] == "request":
        return LeftOut(title, "the layers of a request share a buffer, so none has misses of its own")
    if "lru" not in record["settings"]["policies"]:
        return LeftOut(title, "LRU was not replayed; add it to --policy")
    if size is None:
        return LeftOut(title, "no replayed size holds a step's ids; add a larger one to --sizes")
    layers = {layer["name"]: layer for layer in record["layers"] if layer["missed_by_step"].get(size)}
    return (size, layers) if layers else LeftOut(title, f"no layer has a step that counts at {size}")


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _most(layers: dict[str, Record], size: str) -> str:
    """The extremes, in words."""
    means = {
        name: layer["policies"]["lru"][size]["misses_per_step"]["mean"] for name, layer in layers.items()
    }
    worst, best = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    return f"Most in layer {worst} ({means[worst]:.1f}), fewest in layer {best} ({means[best]:.1f})."


def _answer(material: Material, missed: dict[str, Record]) -> list[str | Cell]:
    def of(name: str) -> list[str | Cell]:
        return [number(missed[name]["mean"], ".1f"), " on average, ", number(missed[name]["p99"]), " at p99"]

    by_mean = sorted(missed, key=lambda name: -missed[name]["mean"])
    said = [f"A step of layer {by_mean[0]} misses most {material.ids}: ", *of(by_mean[0])]
    if of(by_mean[0]) != of(by_mean[-1]):
        said += [f"; of layer {by_mean[-1]} fewest: ", *of(by_mean[-1])]
    return [*said, "."]
