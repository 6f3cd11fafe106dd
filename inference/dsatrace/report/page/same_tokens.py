"""Whether two runs of the same tokens selected the same, as `dsatrace diff` finds it. Computes nothing.

section = same_tokens(record, "dsatrace diff outputs/a outputs/b")
"""

from __future__ import annotations

import numpy as np

from ..diff import diff_parts
from ..grid import Grid
from .heat_map import Ramp, heat_map
from .material import Record
from .section import LeftOut, Section, prose
from .svg import Axis

TITLE = "Do they select the same, token by token?"


def same_tokens(record: Record | str, command: str) -> Section | LeftOut:
    """`record` is diff.json's, or why there is none."""
    if isinstance(record, str):
        return LeftOut(TITLE, record)
    parts = list(diff_parts(record))
    lines = [part for part in parts if isinstance(part, str)]
    (grid,) = (part for part in parts if isinstance(part, Grid))
    body = "".join(f'<p class="answer">{prose(line)}</p>' for line in lines)
    overlap = np.array(record["overlap_by_step"], dtype=float)  # (layers, steps + 1), the prompt's rows first
    if overlap.size and np.isfinite(overlap).any():
        body += heat_map(
            "Overlap of both runs' selections, by layer and step",
            f"{len(overlap)} layers by {overlap.shape[1] - 1} decode steps, after the prompt's rows at -1.",
            overlap,
            Ramp("intersection over union", share=True),
            Axis("decode step (-1: the prompt's rows)", -1.5, overlap.shape[1] - 1.5, whole=True),
            Axis("layer", 0, len(overlap)),
            y_labels=[f"{layer}" for layer in range(len(overlap))],
            pool="mean",
        )
    note = f"A row is what a layer selects in a step. {grid.note[:1].upper()}{grid.note[1:]}."
    return Section("same", TITLE, body, note, command, (grid.columns, grid.rows))
