"""Two replays side by side, single-turn and multi-turn: every metric in both, and the difference.

compared = compare(single, multi)
compared.metrics["hit_rate_first_prefill"].points        # multi minus single, in percentage points
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dsatrace.study.measure import Value, measure, per_turn, rejections
from dsatrace.study.metrics import UNITS
from dsatrace.study.run import Replayed


@dataclasses.dataclass(frozen=True)
class Difference:
    """One metric in both replays. None stands for a missing value, and for a ratio that would divide by 0."""

    name: str
    single: Value
    multi: Value

    @property
    def unit(self) -> str:
        return UNITS[self.name]

    @property
    def difference(self) -> Value:
        """multi - single, in the metric's unit."""
        return None if self.single is None or self.multi is None else self.multi - self.single

    @property
    def points(self) -> float | None:
        """The difference of two shares, in percentage points."""
        return None if self.unit != "share" or self.difference is None else 100 * self.difference

    @property
    def ratio(self) -> float | None:
        """multi / single."""
        return self.multi / self.single if self.single and self.multi is not None else None

    def record(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "single_turn": self.single,
            "multi_turn": self.multi,
            "difference": self.difference,
            "points": self.points,
            "ratio": self.ratio,
        }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`per_turn` and `rejected` have an entry for single_turn and one for multi_turn."""

    metrics: dict[str, Difference]
    per_turn: dict[str, list[dict[str, Value]]]
    rejected: dict[str, dict[str, int]]

    def record(self) -> dict[str, Any]:
        """For comparison.json."""
        return {
            "metrics": {name: difference.record() for name, difference in self.metrics.items()},
            "per_turn": self.per_turn,
            "rejected": self.rejected,
        }


def compare(single: Replayed, multi: Replayed) -> Comparison:
    """Both must have been replayed with the same settings; raises `ValueError` otherwise."""
    if single.settings != multi.settings:
        raise ValueError(f"the replays differ in their settings: {single.settings} and {multi.settings}")
    both = {"single_turn": single, "multi_turn": multi}
    first, second = measure(single), measure(multi)
    return Comparison(
        {name: Difference(name, first[name], second[name]) for name in first},
        {name: per_turn(replayed) for name, replayed in both.items()},
        {name: rejections(replayed) for name, replayed in both.items()},
    )
