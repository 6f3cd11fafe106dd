"""Needle recall: which share of the answer's tokens did a selection hold, and what would chance give.

1 means that sparse attention could see the whole answer at that step and layer. A selector
that draws k of N visible positions at random holds k / N of it on average: a recall says
something only beside that. Standard library only; knows no trace.

    sums = RecallSums()
    sums.add(layer_id, step_idx, needle_recall(selected, answer), chance_recall(len(selected), seq_len))
    sums.to_json()["recall"]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any


def needle_recall(selected_positions: Iterable[int], answer_positions: Collection[int]) -> float:
    """|answer & selected| / |answer|; both are absolute token positions of the same request."""
    answer = set(answer_positions)
    if not answer:
        raise ValueError("needle recall needs at least one answer position")
    return len(answer.intersection(selected_positions)) / len(answer)


def chance_recall(num_selected: int, seq_len: int) -> float:
    """What `num_selected` of `seq_len` visible positions, drawn at random, hold on average: k / N."""
    if not 0 <= num_selected <= seq_len or seq_len == 0:
        raise ValueError(f"{num_selected} selected of {seq_len} visible positions: not a selection")
    return num_selected / seq_len


@dataclasses.dataclass
class _Mean:
    count: int = 0
    recall: float = 0.0
    chance: float = 0.0

    def add(self, recall: float, chance: float) -> None:
        self.count += 1
        self.recall += recall
        self.chance += chance

    def to_json(self) -> dict[str, Any]:
        """Means over the selections seen; None before the first."""
        mean = {"recall": self.recall / self.count, "chance": self.chance / self.count} if self.count else {}
        return {"recall": None, "chance": None, **mean, "num_selections": self.count}


class RecallSums:
    """Mean recall beside its chance baseline: overall, by layer and by decode step."""

    def __init__(self) -> None:
        self._all = _Mean()
        self._layers: dict[int, _Mean] = {}
        self._steps: dict[int, _Mean] = {}

    def add(self, layer_id: int, step_idx: int, recall: float, chance: float) -> None:
        """Counts one selection, of one request at one step and layer."""
        for mean in (
            self._all,
            self._layers.setdefault(layer_id, _Mean()),
            self._steps.setdefault(step_idx, _Mean()),
        ):
            mean.add(recall, chance)

    def to_json(self) -> dict[str, Any]:
        """`{recall, chance, num_selections, by_layer, by_step}`, ids ascending."""

        def table(means: dict[int, _Mean], key: str) -> list[dict[str, Any]]:
            return [{key: i, **means[i].to_json()} for i in sorted(means)]

        return {
            **self._all.to_json(),
            "by_layer": table(self._layers, "layer_id"),
            "by_step": table(self._steps, "step_idx"),
        }
