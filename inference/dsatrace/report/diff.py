"""What a comparison of two runs found, as lines, a table and a picture. Computes nothing.

show(diff_parts(record))
draw_diff(record, folder / "diff.png")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..text import counted, for_picture
from .drawing import picture, whole_numbers
from .grid import MAX_ROWS, Grid, number, percent

Record = Mapping[str, Any]

MAX_COLUMNS = 1000
"""Of the heat map: more steps share a column, which shows the least overlap among them."""


def diff_parts(record: Record) -> Iterator[str | Grid]:
    """What was compared, the first row that differs, and the layers."""
    rows, differing = record["num_rows"], record["num_differing"]
    share = f" ({differing / rows:.2%})" if rows else ""
    matched = f"{counted(record['num_requests'], 'request')}, matched by {record['matched_by']}"
    yield f"{matched}: {differing:,} of {rows:,} rows differ{share}"
    if first := record["first"]:
        yield f"first: {_where(first)}: {_swapped(first)}; {_tie(first)}"
    one = sum(layer["only_one"] for layer in record["layers"])
    if one:
        yield f"{one:,} rows stand in one of the runs only, and count as differing."
    if differing:
        yield "Records hold no tokens: where the answers part, later steps compare different contexts."
    yield _by_layer(record)


def _where(row: Record) -> str:
    head = f", KV head {row['kv_head']}" if row["kv_head"] else ""
    return f"request {row['request_id']}, layer {row['layer_id']}{head}, step {row['step_idx']}"


def _swapped(row: Record) -> str:
    def some(ids: list[int]) -> str:
        return ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")

    return f"{some(row['only_a']) or 'none'} in the first, {some(row['only_b']) or 'none'} in the second"


def _tie(row: Record) -> str:
    margins = [margin for margin in row["margins"] if margin is not None]
    if not margins:
        return "no scores tell whether they were tied"
    size = f"its k-th and next score are {min(margins):.2g} of the largest apart"
    return f"ties explain it: {size}" if row["is_tie"] else f"no tie explains it: {size}"


def _by_layer(record: Record) -> Grid:
    rows = [
        (
            number(layer["layer_id"]),
            number(layer["rows"], ","),
            number(layer["differing"], ","),
            number(layer["overlap"], ".4f"),
            percent(layer["ties"], layer["differing"]),
        )
        for layer in record["layers"]
    ]
    columns = ("layer", "rows", "differ", "overlap", "ties explain, of those")
    note = (
        "overlap: intersection over union; ties explain a row whose margin at the k-th score, times the ids "
        f"that moved, is at most {record['tie']:.2g} of its largest score"
    )
    return Grid(
        "Selections of both runs, by layer", columns, rows, note=note, most=MAX_ROWS, rest="diff.json"
    )


def draw_diff(record: Record, path: Path) -> None:
    """A heat map of the overlap by layer and step, and the share of differing rows by layer beside it."""
    overlap = np.array(record["overlap_by_step"], dtype=float)  # (layers, steps + 1)
    has_prompt = bool(np.isfinite(overlap[:, :1]).any())
    first = -1 if has_prompt else 0
    overlap = overlap[:, first + 1 :]
    per_column = max(1, -(-overlap.shape[1] // MAX_COLUMNS))
    if per_column > 1:
        missing = -overlap.shape[1] % per_column
        padded = np.pad(overlap, ((0, 0), (0, missing)), constant_values=np.nan)
        overlap = np.fmin.reduce(padded.reshape(len(padded), -1, per_column), axis=2)
    height = min(10.0, 2.6 + 0.12 * len(overlap))
    with picture(path, (11, height), columns=2, without="--no-figure") as (figure, (heat, bars)):
        heat.set(title="Overlap (intersection over union)", xlabel="step", ylabel="layer")
        if overlap.size:
            low = float(np.nanmin(overlap)) if np.isfinite(overlap).any() else 0.0
            end = first + overlap.shape[1] * per_column
            image = heat.imshow(
                np.ma.masked_invalid(overlap),
                vmin=min(low, 0.99),
                vmax=1,
                cmap="magma",
                aspect="auto",
                interpolation="nearest",
                extent=(first - 0.5, end - 0.5, len(overlap) - 0.5, -0.5),
            )
            figure.colorbar(image, ax=heat)
        heat.set_facecolor("0.85")
        layers = record["layers"]
        names = [layer["layer_id"] for layer in layers]
        num_rows = np.array([max(layer["rows"], 1) for layer in layers])
        num_ties = np.array([layer["ties"] for layer in layers])
        tied = num_ties / num_rows
        rest = (np.array([layer["differing"] for layer in layers]) - num_ties) / num_rows
        bars.barh(names, tied, 0.8, label="ties explain it", color="C0")
        bars.barh(names, rest, 0.8, tied, label="they do not, or are unknown", color="C3")
        bars.set(title="Rows that differ", xlabel="share of the layer's rows", ylabel="layer")
        bars.set_ylim(len(overlap) - 0.5, -0.5)
        bars.set_xlim(0, max(0.01, 1.05 * float(np.max(tied + rest, initial=0))))
        for axes in (heat, bars):
            whole_numbers(axes.yaxis)
        whole_numbers(heat.xaxis)
        bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
        figure.suptitle(" against ".join(for_picture(Path(name).name) for name in record["runs"]))
