"""Shares of a selection: held by the step and the layer before, and of the answer's tokens.

Compares sparse selections only: a dense one holds everything. A layer that uses an earlier one's
selection is not compared with the layer before it, which has the very same; nor are experts, which are
others in each layer. A needle is a prompt position that holds the answer; the workload says which they
are. Both shares mean something only beside k / N, what a random selector would have. Knows no prompt and
no file.

    overlap = SelectionOverlap()
    overlap.add("r0", step_idx=3, visible=4096, ids=ids, ptr=ptr, sparse=sparse, kind=kind)
    overlap.step.to_json()     # {"pairs": ..., "mean": ..., "random_mean": ..., "per_layer": [...]}
    counts = count_needles(((), (17, 18)), stats, num_layers=2)
    counts.tokens, counts.selected       # [0 0 2 2], [0 0 1 2]: the second request's two records
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from dsatrace.trace.histogram import ExactSum
from dsatrace.trace.kernels import compile_kernels, count_held, count_shared
from dsatrace.trace.kind import SelectionKind
from dsatrace.trace.statistics import StepStatistics


class OverlapTotals:
    """Sums over compared pairs, by layer; they merge by addition."""

    def __init__(self) -> None:
        self.pairs = 0
        self._shared = np.zeros(0, dtype=np.int64)  # (L,) tokens held by both
        self._tokens = np.zeros(0, dtype=np.int64)  # (L,) tokens selected
        self._random = ExactSum()  # of k / N over pairs

    def add(self, shared: np.ndarray, tokens: np.ndarray, random: float, pairs: int = 1) -> None:
        """(L,) counts of `pairs` comparisons; a layer that was not compared has 0 tokens."""
        if len(self._shared) < len(shared):
            self._shared = np.pad(self._shared, (0, len(shared) - len(self._shared)))
            self._tokens = np.pad(self._tokens, (0, len(tokens) - len(self._tokens)))
        self._shared[: len(shared)] += shared
        self._tokens[: len(tokens)] += tokens
        self._random.add(random)
        self.pairs += pairs

    def merge(self, other: OverlapTotals) -> None:
        self.add(other._shared, other._tokens, 0.0, other.pairs)
        self._random.merge(other._random)

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
        self.add(-part._shared, -part._tokens, -part._random.total, -part.pairs)

    def to_json(self) -> dict[str, Any]:
        pairs = zip(self._shared.tolist(), self._tokens.tolist(), strict=True)
        shared, tokens = int(self._shared.sum()), int(self._tokens.sum())
        return {
            "pairs": self.pairs,
            "mean": shared / tokens if tokens else None,
            "random_mean": self._random.total / self.pairs if tokens else None,
            "per_layer": [s / t if t else None for s, t in pairs] if tokens else None,
        }


@dataclasses.dataclass(frozen=True)
class _Selection:
    step_idx: int
    ids: np.ndarray  # (M,) int32, of all sets
    ptr: np.ndarray  # (L + 1,) int64
    sparse: np.ndarray  # (L,) bool


class SelectionOverlap:
    """Compares every sparse selection with its neighbours in time and depth.

    Keeps each running request's last selection; `forget` a request when it finishes. Membership is
    one bit per id, cleared by unmarking, so the cost follows the selection, not the context.
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
        visible: int,  # ids that the query can choose from
        ids: np.ndarray,  # (M,) int32, of L sets, each ascending
        ptr: np.ndarray,  # (L + 1,) int64
        sparse: np.ndarray,  # (L,) bool
        kind: SelectionKind,
        own: tuple[OverlapTotals, OverlapTotals] | None = None,
    ) -> None:
        """One request's selections in one step.

        Also adds to its `own` totals of steps and layers, where they are kept apart.
        """
        if len(self._seen) * 64 <= (largest := int(ids[ptr[1:] - 1].max())):
            self._seen = np.zeros(2 * (largest // 64 + 1), dtype=np.uint64)
        last = self._last.get(request_id)
        before = last if last and last.step_idx == step_idx - 1 else None
        with_before, with_layer = np.zeros((2, len(sparse)), dtype=np.int64)
        before_ids, before_ptr = (before.ids, before.ptr) if before else (ids[:0], np.zeros(1, np.int64))
        set_before = kind.set_before
        count_shared(ids, ptr, before_ids, before_ptr, set_before, self._seen, with_before, with_layer)
        of_steps = sparse & before.sparse if before else np.zeros_like(sparse)
        of_layers = sparse & (set_before >= 0) & sparse[set_before]
        sizes = np.diff(ptr)
        for i, (shared, compared) in enumerate(((with_before, of_steps), (with_layer, of_layers))):
            if compared.any():
                selected = sizes * compared
                random = int(selected @ selected) / (int(selected.sum()) * visible)
                counts = kind.per_layer(shared * compared), kind.per_layer(selected)
                for totals in ((self.step, self.layer)[i], *((own[i],) if own else ())):
                    totals.add(*counts, random)
        # A copy: the caller may use its array for the next step too.
        kept = last.ids if last and last.ids.shape == ids.shape else np.empty_like(ids)
        np.copyto(kept, ids)
        self._last[request_id] = _Selection(step_idx, kept, ptr, sparse)

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


class Recall(NamedTuple):
    """What a record selected of the answer's tokens."""

    layer: int
    tokens: int
    selected: int
    visible: int
    k: int  # positions it selects, of those visible


def recalls(
    counts: NeedleCounts,
    layer: np.ndarray,
    seq_len: np.ndarray,
    num_tokens: np.ndarray,
    counted: np.ndarray,
) -> list[Recall | None]:
    """Arrays are (R,); `counted` marks the sparse decode records. None of the others, and of those without
    a needle."""
    found: list[Recall | None] = [None] * len(layer)
    places = np.flatnonzero(counted & (counts.tokens > 0))
    columns = (layer, counts.tokens, counts.selected, seq_len, num_tokens)
    for place, *numbers in zip(places.tolist(), *(x[places].tolist() for x in columns), strict=True):
        found[place] = Recall(*numbers)
    return found


class RecallTotals:
    """Sums over sparse decode records; exact, so they merge by addition in any order."""

    def __init__(self) -> None:
        self._selected = Counter[tuple[int, int]]()  # (layer, needle tokens) -> selected tokens
        self._records = Counter[int]()  # by layer
        self._random = Counter[tuple[int, int]]()  # (k, N) -> records

    def add(self, recall: Recall, sign: Literal[1, -1] = 1) -> None:
        """Sign -1 takes a record off that was added."""
        self._selected[recall.layer, recall.tokens] += sign * recall.selected
        self._records[recall.layer] += sign
        self._random[recall.k, recall.visible] += sign

    def merge(self, other: RecallTotals) -> None:
        self._selected.update(other._selected)
        self._records.update(other._records)
        self._random.update(other._random)

    def to_json(self) -> dict[str, Any] | None:
        """`{records, mean, random_mean, per_layer}`; None where nothing was counted."""
        total = self._records.total()
        if not total:
            return None
        sums = {layer: self._sum(layer) for layer, count in self._records.items() if count}
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
