"""Was the answer among the selected tokens: counts of a step's records, and their sums.

A needle is a prompt position that holds the answer; the workload says which they are. A
recall means something only beside k / N, what a selector that draws at random would have.
Knows no prompt and no file.

    counts = count_needles(((), (17, 18)), stats, num_layers=2)
    counts.tokens, counts.selected       # [0 0 2 2], [0 0 1 2]: the second request's two records
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsatrace.trace.kernels import count_held
from dsatrace.trace.statistics import StepStatistics


@dataclasses.dataclass(frozen=True)
class NeedleCounts:
    """Of R records."""

    tokens: np.ndarray  # (R,) int64, needle positions of the record's request; 0 where none is known
    selected: np.ndarray  # (R,) int64, those of them that are selected


def count_needles(
    needles: Sequence[Sequence[int]],  # (B,) each request's positions, ascending
    stats: StepStatistics,
    num_layers: int,
) -> NeedleCounts | None:
    """None when no request of the step has any."""
    if not any(needles):
        return None
    lengths = np.array([len(positions) for positions in needles], dtype=np.int64)
    flat = np.fromiter((position for positions in needles for position in positions), np.int64)
    ends = np.cumsum(lengths)
    first, end = np.repeat(ends - lengths, num_layers), np.repeat(ends, num_layers)
    selected = np.zeros(len(end), dtype=np.int64)
    count_held(stats.tokens, stats.token_ptr, flat, first, end, selected)
    return NeedleCounts(end - first, selected)


class RecallTotals:
    """Sums over sparse decode records; exact, so they merge by addition in any order."""

    def __init__(self) -> None:
        self._selected = Counter[tuple[int, int]]()  # (layer, needle tokens) -> selected tokens
        self._records = Counter[int]()  # by layer
        self._random = Counter[tuple[int, int]]()  # (k, N) -> records

    def add(
        self, counts: NeedleCounts, layer: np.ndarray, seq_len: np.ndarray, k: int, counted: np.ndarray
    ) -> None:
        """(R,) of everything; `counted` marks the sparse decode records; only those with a needle add."""
        counted = counted & (counts.tokens > 0)
        columns = (layer, counts.tokens, counts.selected, seq_len)
        for one_layer, tokens, selected, visible in zip(*(x[counted].tolist() for x in columns), strict=True):
            self._selected[one_layer, tokens] += selected
            self._records[one_layer] += 1
            self._random[k, visible] += 1

    def merge(self, other: RecallTotals) -> None:
        self._selected.update(other._selected)
        self._records.update(other._records)
        self._random.update(other._random)

    def to_json(self) -> dict[str, Any] | None:
        """`{records, mean, random_mean, per_layer}`; None where nothing was counted."""
        total = self._records.total()
        if not total:
            return None
        sums = {layer: self._sum(layer) for layer in self._records}
        random = math.fsum(k * count / visible for (k, visible), count in self._random.items())
        return {
            "records": total,
            "mean": self._sum(None) / total,
            "random_mean": random / total,
            "per_layer": [
                sums[layer] / self._records[layer] if layer in sums else None
                for layer in range(max(sums) + 1)
            ],
        }

    def _sum(self, layer: int | None) -> float:
        """Of selected / tokens over a layer's records, or over all; fsum rounds once."""
        parts: Counter[int] = Counter()
        for (of_layer, tokens), selected in self._selected.items():
            if layer in (of_layer, None):
                parts[tokens] += selected
        return math.fsum(selected / tokens for tokens, selected in parts.items())
