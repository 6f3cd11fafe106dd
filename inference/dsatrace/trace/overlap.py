"""How much of a selection was selected in the step before, and in the layer before.

Keeps each running request's last selection and nothing older; forget a request when it
finishes. Compares sparse selections only: a dense one holds everything. A layer that uses an
earlier one's selection is not compared with the layer before it, which has the very same.

    overlap = SelectionOverlap()
    overlap.add("r0", step_idx=3, seq_len=4096, tokens=tokens, has_indexer=own)   # (L, K) ascending, (L,)
    overlap.step.to_json()     # {"pairs": ..., "mean": ..., "random_mean": ..., "per_layer": [...]}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsatrace.trace.kernels import compile_kernels, count_shared


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

    def add_json(self, stored: Mapping[str, Any], k: int) -> None:
        """Adds what `to_json` gave of selections of `k` tokens."""
        shares, pairs = stored["per_layer"], stored["pairs"]
        if shares is not None:
            # A share is a quotient of integers far below 2^53, so rounding gives them back.
            tokens = np.array([0 if share is None else pairs * k for share in shares], dtype=np.int64)
            shared = np.array([share or 0.0 for share in shares]) * tokens
            self.add(np.rint(shared).astype(np.int64), tokens, stored["random_mean"] * pairs, pairs)

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

    Membership is one bit a position, wiped by unmarking: its cost follows the selection,
    not the context.
    """

    def __init__(self) -> None:
        compile_kernels()
        self.step = OverlapTotals()
        self.layer = OverlapTotals()
        self._last: dict[str, _Selection] = {}
        self._seen = np.zeros(0, dtype=np.uint64)

    def add(
        self, request_id: str, step_idx: int, seq_len: int, tokens: np.ndarray, has_indexer: np.ndarray
    ) -> None:
        """One request's selections in one step, (L, K) int32, ascending in each layer; `has_indexer` (L,)."""
        num_layers, k = tokens.shape
        if len(self._seen) * 64 < seq_len:
            self._seen = np.zeros(2 * (seq_len // 64 + 1), dtype=np.uint64)
        last = self._last.get(request_id)
        follows = last is not None and last.step_idx == step_idx - 1
        before = last.tokens if last is not None and follows else tokens[:0]
        with_before, with_layer = np.zeros((2, num_layers), dtype=np.int64)
        count_shared(tokens, before, self._seen, with_before, with_layer)
        if follows:
            self.step.add(with_before, np.full(num_layers, k), k / seq_len)
        compared = has_indexer & (np.arange(num_layers) > 0)
        if compared.any():
            self.layer.add(with_layer * compared, k * compared, k / seq_len)
        # A copy: the caller's array may be the next step's too.
        kept = (
            last.tokens if last is not None and last.tokens.shape == tokens.shape else np.empty_like(tokens)
        )
        np.copyto(kept, tokens)
        self._last[request_id] = _Selection(step_idx, kept)

    def forget(self, request_id: str) -> None:
        """Drops what is kept of a request."""
        self._last.pop(request_id, None)
