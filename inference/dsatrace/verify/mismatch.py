"""What the verifier found: one field that contradicts the rest of the run, and its place.

Standard library only. Knows no rule of a record.

    with located("trace_steps.jsonl", line=7, record=record):
        compare(record["unique_blocks"], 8, "unique_blocks")
"""

from __future__ import annotations

import contextlib
import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

MEAN_TOLERANCE = 1e-9
"""Relative, for a summary's means, which are summed in another order. Everything else is exact."""

_MEANS = ("mean", "random_mean", "uniform_mean", "recency_mean", "context_mean", "per_layer")


class Mismatch(Exception):
    """A field (dotted path) and what is wrong with it; `at` adds the place on the way out."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(field, what)
        self.field = field
        self.what = what
        self.where = ""

    def __str__(self) -> str:
        return f"{self.where}{': ' if self.where else ''}{self.field}: {self.what}"

    def at(
        self, file_name: str, line: int | None = None, record: Mapping[str, Any] | None = None
    ) -> Mismatch:
        """Names the place, unless it has one already."""
        if not self.where:
            place = file_name if line is None else f"{file_name} line {line}"
            self.where = place + _of_record(record or {})
        return self


@contextlib.contextmanager
def located(
    file_name: str, line: int | None = None, record: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Names this place in a `Mismatch` of the block that names none."""
    try:
        yield
    except Mismatch as mismatch:
        raise mismatch.at(file_name, line, record) from None


def require(holds: bool, field: str, stored: object, rule: str) -> None:
    """Raises `Mismatch` unless the rule about the stored value holds."""
    if not holds:
        raise Mismatch(field, f"stored {reprlib.repr(stored)}, {rule}")


def require_range(field: str, stored: float, low: float, high: float) -> None:
    require(low <= stored <= high, field, stored, f"derived {low} to {high}")


def compare(stored: Any, derived: Any, path: str = "", summed: bool = False) -> None:
    """Raises `Mismatch` at the first leaf of `derived` that `stored` does not have.

    Keys that `derived` lacks are not compared. Exact, except for the means with `summed`.
    """
    if stored == derived:
        return
    if isinstance(derived, Mapping) and isinstance(stored, Mapping):
        for key, value in derived.items():
            inner = f"{path}.{key}" if path else str(key)
            if key not in stored:
                raise Mismatch(inner, f"missing, derived {reprlib.repr(value)}")
            compare(stored[key], value, inner, summed)
    elif isinstance(derived, list) and isinstance(stored, list):
        for i, (left, right) in enumerate(zip(stored, derived, strict=False)):
            compare(left, right, f"{path}[{i}]", summed)
        if len(stored) != len(derived):
            raise Mismatch(path, f"stored {len(stored)} entries, derived {len(derived)}")
    elif not (summed and _same_mean(stored, derived, path)):
        raise Mismatch(path, f"stored {reprlib.repr(stored)}, derived {reprlib.repr(derived)}")


def _same_mean(stored: object, derived: object, path: str) -> bool:
    name = path.rpartition(".")[2].partition("[")[0]
    numbers = isinstance(stored, (int, float)) and isinstance(derived, (int, float))
    # mypy does not see through `numbers`
    return name in _MEANS and numbers and math.isclose(stored, derived, rel_tol=MEAN_TOLERANCE)  # type: ignore[arg-type]


def _of_record(record: Mapping[str, Any]) -> str:
    names = (("request_id", "request"), ("step_idx", "step"), ("layer_id", "layer"))
    said = [f"{word} {reprlib.repr(record[name])}" for name, word in names if name in record]
    return f" ({', '.join(said)})" if said else ""
