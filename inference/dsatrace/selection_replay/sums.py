"""Figures that add: what is measured of two streams, added, is what is measured of both.

A subclass is a frozen dataclass whose fields are whole numbers, tuples of them, matrices (tuples of
tuples), `Counter`s of whole numbers (histograms), or None for a figure that has no meaning here. Addition
goes field by field and is exact in any order; ratios are formed by the reader, at the end.

    a + b                                   # element by element; refused where one has a figure and one None
    Reuse.from_json(reuse.to_json())        # plain numbers, lists and {"values": [...], "counts": [...]}
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np

from dsatrace.schema import quantile_histogram

S = TypeVar("S", bound="Sums")


@dataclasses.dataclass(frozen=True)
class Sums:
    """The base; it has no figure itself."""

    SAME: ClassVar[tuple[str, ...]] = ()
    """Fields that say what the figures are of: they must be equal in both, and are not added."""

    def __add__(self: S, other: S) -> S:
        """Raises ValueError where a figure, or what the figures are of, is not known of both."""
        if type(self) is not type(other):
            return NotImplemented
        both = {}
        for name, one in vars(self).items():
            another = getattr(other, name)
            if name in self.SAME and one != another:
                raise ValueError(f"cannot add figures whose {name} differ: {one} and {another}")
            if (one is None) != (another is None):
                raise ValueError(f"cannot add: {name} is known of one part only")
            both[name] = one if one is None or name in self.SAME else _added(one, another)
        return type(self)(**both)

    def to_json(self) -> dict[str, Any]:
        return {field.name: _to_json(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls: type[S], stored: Mapping[str, Any]) -> S:
        """What `to_json` gave."""
        return cls(*(_from_json(stored[field.name]) for field in dataclasses.fields(cls)))


def quantile(histogram: Counter[int], percent: int) -> int | None:
    """The nearest-rank quantile; None when nothing was counted."""
    values = sorted(histogram)
    return quantile_histogram(values, [histogram[value] for value in values], percent) if values else None


def histogram_of(values: np.ndarray) -> Counter[int]:
    """How often each value stands in (n,) whole numbers >= 0."""
    distinct, counts = np.unique(values, return_counts=True)
    return Counter(dict(zip(distinct.tolist(), counts.tolist(), strict=True)))


def shares(parts: Iterable[int], wholes: Iterable[int], unit: float = 1.0) -> tuple[float | None, ...]:
    """Each `part * unit / whole`; None where the whole is 0."""
    pairs = zip(parts, wholes, strict=True)
    return tuple(part * unit / whole if whole else None for part, whole in pairs)


def _added(one: Any, other: Any) -> Any:
    if isinstance(one, Counter):
        both = Counter(one)
        both.update(other)
        return both
    if isinstance(one, tuple):
        return tuple(_added(a, b) for a, b in zip(one, other, strict=True))
    return one + other


def _to_json(value: Any) -> Any:
    if isinstance(value, Counter):
        values = sorted(value)
        return {"values": values, "counts": [value[each] for each in values]}
    return [_to_json(each) for each in value] if isinstance(value, tuple) else value


def _from_json(stored: Any) -> Any:
    if isinstance(stored, Mapping):
        return Counter(dict(zip(stored["values"], stored["counts"], strict=True)))
    return tuple(_from_json(each) for each in stored) if isinstance(stored, list) else stored
