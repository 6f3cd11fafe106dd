"""Exact counts of values: quantiles without a sketch, merged by addition.

`Histogram` counts small integers >= 0 that come in large arrays, `ValueCounts` numbers of any size
with few distinct values, `ExactSum` adds floats of parts. None knows what it counts.

    offsets = Histogram()
    offsets.add(np.array([3, 1, 3]))
    offsets.distribution()       # {"min": 1, "p50": 3, "p95": 3, "max": 3, "mean": 2.333...}
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dsatrace.schema import distribution, quantile_histogram


class _Counts(ABC):
    """What both can say, from ascending distinct values and their counts."""

    @abstractmethod
    def items(self) -> tuple[list[Any], list[int]]:
        """Ascending distinct values, and how often each was counted."""

    def distribution(self) -> dict[str, Any]:
        """`{min, p50, p95, max, mean}`; all null when nothing was counted."""
        values, counts = self.items()
        total = sum(counts)
        # Integer sums are exact; fsum rounds once, so the order of merging cannot show.
        mean = math.fsum(v * n for v, n in zip(values, counts, strict=True)) / total if total else None
        return distribution(values, counts, mean)

    def quantile(self, percent: int) -> Any:
        """The nearest-rank quantile, or None when nothing was counted."""
        values, counts = self.items()
        return quantile_histogram(values, counts, percent) if counts else None

    def to_json(self) -> dict[str, list[Any]]:
        values, counts = self.items()
        return {"values": values, "counts": counts}


class Histogram(_Counts):
    """Counts of integers >= 0, dense: memory grows with the largest value."""

    def __init__(self) -> None:
        self._counts = np.zeros(64, dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        """Counts every element."""
        self._add_counts(np.bincount(values))

    def merge(self, other: Histogram) -> None:
        self._add_counts(other._counts)

    def add_json(self, stored: Mapping[str, list[int]]) -> None:
        """Adds what `to_json` gave."""
        self.add_counted(np.array(stored["values"], dtype=np.int64), np.array(stored["counts"]))

    def add_counted(self, values: np.ndarray, counts: np.ndarray) -> None:
        """Counts `values[i]` `counts[i]` times; values may repeat."""
        if len(values):
            self._reserve(int(values.max()) + 1)
            np.add.at(self._counts, values, counts)

    def counts_below(self, limit: int) -> np.ndarray:
        """The counts of every value below `limit`, and perhaps more, to be added to in place."""
        self._reserve(limit)
        return self._counts

    def items(self) -> tuple[list[int], list[int]]:
        values = np.flatnonzero(self._counts)
        return values.tolist(), self._counts[values].tolist()

    @property
    def total(self) -> int:
        return int(self._counts.sum())

    @property
    def mean(self) -> float | None:
        total = self.total
        return int(self._counts @ np.arange(len(self._counts))) / total if total else None

    def _add_counts(self, counts: np.ndarray) -> None:
        self._reserve(len(counts))
        self._counts[: len(counts)] += counts

    def _reserve(self, size: int) -> None:
        if size > len(self._counts):
            grown = np.zeros(max(size, 2 * len(self._counts)), dtype=np.int64)
            grown[: len(self._counts)] = self._counts
            self._counts = grown


class ValueCounts(_Counts):
    """Counts of numbers of any kind, sparse: memory grows with the distinct values."""

    def __init__(self) -> None:
        self._counts: Counter[Any] = Counter()

    def add(self, values: Iterable[float]) -> None:
        self._counts.update(values)

    @property
    def total(self) -> int:
        return self._counts.total()

    def merge(self, other: ValueCounts) -> None:
        self._counts.update(other._counts)

    def items(self) -> tuple[list[Any], list[int]]:
        values = sorted(self._counts)
        return values, [self._counts[value] for value in values]


class ExactSum:
    """A sum of floats: rounded as it grows within a part, once over all parts, so their order cannot show."""

    def __init__(self) -> None:
        self._own = 0.0
        self._others: list[float] = []

    def add(self, value: float) -> None:
        self._own += value

    def merge(self, other: ExactSum) -> None:
        self._others += [other._own, *other._others]

    @property
    def total(self) -> float:
        return math.fsum((self._own, *self._others))
