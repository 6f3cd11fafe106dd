"""How much of a selection was selected in the step before, and in the layer before.

Keeps each running request's last selection and nothing older; forget a request when it
finishes. Compares sparse selections only: a dense one holds everything.

    overlap = SelectionOverlap()
    overlap.add("r0", step_idx=3, seq_len=4096, tokens=tokens)     # (L, K) ascending
    overlap.step.to_json()     # {"pairs": ..., "mean": ..., "random_mean": ..., "per_layer": [...]}
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


class OverlapTotals:
    """Sums over compared pairs, one place a layer; they merge by addition."""

    def __init__(self) -> None:
        self.pairs = 0
        self._shared = np.zeros(0, dtype=np.int64)  # (L,) tokens held by both
        self._tokens = np.zeros(0, dtype=np.int64)  # (L,) tokens selected
        self._random = 0.0  # sum of k / N over pairs

    def add(self, shared: np.ndarray, tokens: np.ndarray, random: float, pairs: int = 1) -> None:
        """(L,) counts of `pairs` comparisons; a layer that was not compared has 0 tokens."""
        if len(self._shared) < len(shared):
            self._shared = np.pad(self._shared, (0, len(shared) - len(self._shared)))
            self._tokens = np.pad(self._tokens, (0, len(tokens) - len(self._tokens)))
        self._shared[: len(shared)] += shared
        self._tokens[: len(tokens)] += tokens
        self._random += random
        self.pairs += pairs

    def merge(self, other: OverlapTotals) -> None:
        self.add(other._shared, other._tokens, other._random, other.pairs)

    def to_json(self) -> dict[str, Any]:
        pairs = zip(self._shared.tolist(), self._tokens.tolist(), strict=True)
        shared, tokens = int(self._shared.sum()), int(self._tokens.sum())
        return {
            "pairs": self.pairs,
            "mean": shared / tokens if tokens else None,
            "random_mean": self._random / self.pairs if tokens else None,
            "per_layer": [s / t if t else None for s, t in pairs] if tokens else None,
        }


@dataclasses.dataclass(frozen=True)
class _Selection:
    step_idx: int
    tokens: np.ndarray  # (L, K) int32, ascending


class SelectionOverlap:
    """Compares every sparse selection with its neighbours in time and depth.

    Membership is a table of marks, one byte a layer and position, wiped by unmarking:
    its cost follows the selection, not the context.
    """

    def __init__(self) -> None:
        self.step = OverlapTotals()
        self.layer = OverlapTotals()
        self._last: dict[str, _Selection] = {}
        self._width = 0
        self._marks = np.zeros(0, dtype=bool)

    def add(self, request_id: str, step_idx: int, seq_len: int, tokens: np.ndarray) -> None:
        """One request's selections in one step, (L, K) int32, ascending in each layer."""
        num_layers, k = tokens.shape
        self._reserve(num_layers, seq_len)
        keys = tokens + np.arange(num_layers)[:, None] * self._width  # (L, K) int64
        random = k / seq_len
        last = self._last.get(request_id)
        if last is not None and last.step_idx == step_idx - 1:
            before = last.tokens + np.arange(num_layers)[:, None] * self._width
            self.step.add(self._shared(before, keys), np.full(num_layers, k), random)
        if num_layers > 1:
            shared = self._shared(keys, keys[1:] - self._width)  # layer l looked up in l - 1
            compared = np.full(num_layers, k)
            compared[0] = 0
            self.layer.add(np.insert(shared, 0, 0), compared, random)
        self._last[request_id] = _Selection(step_idx, tokens)

    def forget(self, request_id: str) -> None:
        """Drops what is kept of a request."""
        self._last.pop(request_id, None)

    def _shared(self, members: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """How many of each row of `asked` are in `members`."""
        self._marks[members] = True
        shared = self._marks[asked].sum(axis=1)
        self._marks[members] = False
        return shared

    def _reserve(self, num_layers: int, seq_len: int) -> None:
        if self._width < seq_len or len(self._marks) < num_layers * self._width:
            self._width = max(seq_len, 2 * self._width)
            self._marks = np.zeros(num_layers * self._width, dtype=bool)
