"""Two replays side by side, single-turn and multi-turn: every metric in both, and the difference.

compared = compare(single, multi)
compared.metrics["hit_rate_first_prefill"].points        # multi minus single, in percentage points
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsatrace.study.measure import Value, measure, per_turn
from dsatrace.study.metrics import UNITS
from dsatrace.study.run import Replayed
from dsatrace.study.spread import QUANTILES, bootstrapped, drawn_rates, of_parts, over_seeds, sums_of
from dsatrace.study.sweep_cells import conversation_parts


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
    """`per_turn` and `rejected` have an entry for single_turn and one for multi_turn.

    `intervals` says what they are over; its `metrics` have a `Spread` for single_turn, multi_turn and
    difference, its `hit_rate_by_turn` one by turn for both modes.
    """

    metrics: dict[str, Difference]
    per_turn: dict[str, list[dict[str, Value]]]
    rejected: dict[str, dict[str, int]]
    intervals: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For comparison.json."""
        return {
            "metrics": {name: difference.record() for name, difference in self.metrics.items()},
            "per_turn": self.per_turn,
            "rejected": self.rejected,
            "intervals": self.intervals,
        }

    def ranged(self, name: str, side: str) -> tuple[Value, float | None, float | None]:
        """A metric of single_turn, multi_turn or difference and its interval; over seeds, of their mean."""
        entry = self.intervals.get("metrics", {}).get(side, {}).get(name, {})
        return entry.get("mean", self.metrics[name].record()[side]), entry.get("low"), entry.get("high")


def compare(single_turn: Replayed, multi_turn: Replayed) -> Comparison:
    """Both must have been replayed with the same settings; raises `ValueError` otherwise."""
    both = {"single_turn": single_turn, "multi_turn": multi_turn}
    caches = [each.settings for each in both.values()]
    if caches[0] != caches[1]:
        raise ValueError(f"the replays differ in their settings: {caches[0]} and {caches[1]}")
    first, second = map(measure, both.values())
    return Comparison(
        {name: Difference(name, first[name], second[name]) for name in first},
        {name: per_turn(replayed) for name, replayed in both.items()},
        {name: replayed.result.rejections() for name, replayed in both.items()},
    )


def over_all_seeds(of_seeds: Sequence[Comparison], seeds: Sequence[int]) -> Comparison:
    """The first seed's comparison, with intervals over all. A difference is paired: of the same seed."""
    sides = {"single_turn": 0.0, "multi_turn": 0.0, "difference": -float("inf")}
    spreads = {
        side: over_seeds([{n: d.record()[side] for n, d in one.metrics.items()} for one in of_seeds], least)
        for side, least in sides.items()
    }
    by_turn = {
        mode: over_seeds([_rates_by_turn(one.per_turn[mode]) for one in of_seeds])
        for mode in of_seeds[0].per_turn
    }
    about = {"over": "seeds", "seeds": list(seeds), "metrics": spreads, "hit_rate_by_turn": by_turn}
    return dataclasses.replace(of_seeds[0], intervals=about)


def over_all_conversations(compared: Comparison, single_turn: Replayed, multi_turn: Replayed) -> Comparison:
    """With intervals over the conversations. Each draw takes the same ones in both modes."""
    both = {"single_turn": single_turn, "multi_turn": multi_turn}
    numbers: dict[str, int] = {}
    conversations = []
    for each in both.values():
        names = [numbers.setdefault(name, len(numbers)) for name in each.requests.conversation_ids]
        conversations.append(np.array([*names, -1])[each.requests.conversation])
    together = conversation_parts(np.concatenate(conversations))
    parts = np.split(together, [len(single_turn.requests)])
    sums = [sums_of(each) for each in both.values()]
    spreads = {mode: bootstrapped(s, part) for mode, s, part in zip(both, sums, parts, strict=True)}
    size = int(together.max()) + 1
    spreads["difference"] = {}
    for name in spreads["multi_turn"]:
        rates = [drawn_rates(*of_parts(s[name], part, size)) for s, part in zip(sums, parts, strict=True)]
        low, high = np.quantile(rates[1] - rates[0], QUANTILES).tolist()
        spreads["difference"][name] = {"low": low, "high": high}
    by_turn = {}
    for (mode, each), part in zip(both.items(), parts, strict=True):
        hits = np.array([each.result.hit_tokens, each.trace.prompt_tokens])
        turn = each.requests.turn
        by_turn[mode] = bootstrapped({str(n): hits * (turn == n) for n in np.unique(turn) if n >= 0}, part)
    about = {"over": "conversations", "metrics": spreads, "hit_rate_by_turn": by_turn}
    return dataclasses.replace(compared, intervals=about)


def _rates_by_turn(rows: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    return {str(row["turn"]): row["hit_rate_first_prefill"] for row in rows if row["turn"] is not None}
