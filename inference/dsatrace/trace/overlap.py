"""Shares of a selection: held by the step and the layer before, and of the answer's tokens.

Compares sparse selections only: a dense one holds everything. A layer that uses an earlier one's
selection is not compared with the layer before it, which has the very same. A needle is a prompt
position that holds the answer; the workload says which they are. Both shares mean something only
beside k / N, what a random selector would have. Knows no prompt and no file.

    overlap = SelectionOverlap()
    overlap.add("r0", step_idx=3, seq_len=4096, tokens=tokens, has_indexer=own)   # (L, K) ascending, (L,)
    overlap.step.to_json()     # {"pairs": ..., "mean": ..., "random_mean": ..., "per_layer": [...]}
    counts = count_needles(((), (17, 18)), stats, num_layers=2)
    counts.tokens, counts.selected       # [0 0 2 2], [0 0 1 2]: the second request's two records
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsatrace.trace.kernels import compile_kernels, count_held, count_shared
from dsatrace.trace.statistics import StepStatistics


class OverlapTotals:
    """Sums over compared pairs, by layer; they merge by addition."""

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
        """Adds what `to_json` gave, for selections of `k` tokens."""
        shares, pairs = stored["per_layer"], stored["pairs"]
        if shares is not None:
            # A share is a quotient of integers far below 2^53, so rounding gives them back.
            tokens = np.array([0 if share is None else pairs * k for share in shares], dtype=np.int64)
            shared = np.array([share or 0.0 for share in shares]) * tokens
            self.add(np.rint(shared).astype(np.int64), tokens, stored["random_mean"] * pairs, pairs)

    def subtract_json(self, stored: Mapping[str, Any], k: int) -> None:
        """Takes off what `to_json` gave of a part of this."""
        part = OverlapTotals()
        part.add_json(stored, k)
        self.add(-part._shared, -part._tokens, -part._random, -part.pairs)

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

    Keeps each running request's last selection; `forget` a request when it finishes. Membership is
    one bit per position, cleared by unmarking, so the cost follows the selection, not the context.
    """

    def __init__(self) -> None:
        compile_kernels()
        self.step = OverlapTotals()
        self.layer = OverlapTotals()
        self._last: dict[str, _Selection] = {}
        self._seen = np.zeros(0, dtype=np.uint64)

    def add(
        self,
        request_id: str,
        step_idx: int,
        seq_len: int,
        tokens: np.ndarray,
        has_indexer: np.ndarray,
        own: tuple[OverlapTotals, OverlapTotals] | None = None,
    ) -> None:
        """One request's selections in one step, (L, K) int32, ascending in each layer; `has_indexer` (L,).

        Also adds to its `own` totals of steps and layers, where they are kept apart.
        """
        num_layers, k = tokens.shape
        if len(self._seen) * 64 < seq_len:
            self._seen = np.zeros(2 * (seq_len // 64 + 1), dtype=np.uint64)
        last = self._last.get(request_id)
        follows = last is not None and last.step_idx == step_idx - 1
        before = last.tokens if last and follows else tokens[:0]
        with_before, with_layer = np.zeros((2, num_layers), dtype=np.int64)
        count_shared(tokens, before, self._seen, with_before, with_layer)
        compared = has_indexer & (np.arange(num_layers) > 0)
        for of_steps, of_layers in ((self.step, self.layer), *((own,) if own else ())):
            if follows:
                of_steps.add(with_before, np.full(num_layers, k), k / seq_len)
            if compared.any():
                of_layers.add(with_layer * compared, k * compared, k / seq_len)
        # A copy: the caller may use its array for the next step too.
        kept = last.tokens if last and last.tokens.shape == tokens.shape else np.empty_like(tokens)
        np.copyto(kept, tokens)
        self._last[request_id] = _Selection(step_idx, kept)

    def forget(self, request_id: str) -> None:
        """Drops what is kept of a request."""
        self._last.pop(request_id, None)


@dataclasses.dataclass(frozen=True)
class NeedleCounts:
    """Of R records, the answer's tokens and those of them that are selected."""

    tokens: np.ndarray  # (R,) int64; 0 where the request's answer is not known
    selected: np.ndarray  # (R,) int64


def count_needles(
    needles: Sequence[Sequence[int]],  # (B,) each request's positions, ascending
    stats: StepStatistics,
    num_layers: int,
) -> NeedleCounts | None:
    """None when no request of the step has a needle."""
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
        """Arrays are (R,); `counted` marks the sparse decode records; those without a needle add nothing."""
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
        """Sum of selected / tokens over a layer's records, or over all; fsum rounds once."""
        parts: Counter[int] = Counter()
        for (of_layer, tokens), selected in self._selected.items():
            if layer in (of_layer, None):
                parts[tokens] += selected
        return math.fsum(selected / tokens for tokens, selected in parts.items())
