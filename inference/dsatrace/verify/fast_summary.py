"""The totals of `plain_summary.py` and `overlap.py`, added up in numpy.

Part of the third derivation; imported only where numpy is installed.

    totals = FastSummary(rules, block_sizes=(16, 32, 64))
    totals.add(record, chosen)             # in the order of the file
    totals.merge(of_the_next_chunk)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsatrace.verify.chosen import Chosen, integers, num_distinct
from dsatrace.verify.overlap import Overlaps
from dsatrace.verify.plain_summary import PlainSummary
from dsatrace.verify.rules import Rules
from dsatrace.verify.selections import ENGINES, Selections

Record = Mapping[str, Any]


class FastSummary(PlainSummary):
    """The same totals, added up in numpy."""

    def __init__(
        self, rules: Rules, block_sizes: Sequence[int], answers: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(
            top_k=rules.top_k,
            block_sizes=block_sizes,
            level=rules.level,
            offloaded=rules.tiers is not None,
            kind=rules.selections,
            answers=answers,
        )
        self._overlaps: FastOverlaps = FastOverlaps(rules.level == "full", rules.selections)
        self._chosen: Chosen | None = None  # of the record under way; None below level full
        self._by_offset = np.zeros(0, dtype=np.int64)  # [n]: positions n before their query
        self._by_tokens = np.zeros(0, dtype=np.int64)  # [n]: touched blocks of n positions

    def add(self, record: Record, chosen: Chosen | None = None) -> None:
        """`chosen`: what the record, which is right, selects; found here where it is not given."""
        if chosen is None and self.level == "full":
            chosen = Chosen.of(np.sort(integers(record["selected_token_pos"])), record["block_size_tokens"])
        self._chosen = chosen
        if chosen is not None:
            self._overlaps.selected = chosen.positions.astype(np.int32)
        super().add(record)

    def add_positions(self, record: Record) -> None:
        if self._chosen is None:
            return
        positions, _, in_block = self._chosen
        self._by_offset = _longer(self._by_offset, record["seq_len_current"])
        self._by_offset[record["seq_len_current"] - 1 - positions] += 1  # each offset occurs once
        self._by_tokens = _sum(self._by_tokens, np.bincount(in_block))

    def num_blocks(self, record: Record, size: int) -> int | None:
        if self._chosen is None:
            return super().num_blocks(record, size)
        positions, blocks, _ = self._chosen
        larger, rest = divmod(size, record["block_size_tokens"])
        if larger == 1 and not rest:
            return len(blocks)
        return num_distinct(positions // size if rest else blocks // larger)

    def merge(self, later: PlainSummary) -> None:
        super().merge(later)
        if isinstance(later, FastSummary):
            self._by_offset = _sum(self._by_offset, later._by_offset)
            self._by_tokens = _sum(self._by_tokens, later._by_tokens)

    def to_json(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        for name, counts in (("offsets", self._by_offset), ("tokens_per_touched_block", self._by_tokens)):
            values = np.flatnonzero(counts)
            if len(values):
                found = dict(zip(values.tolist(), counts[values].tolist(), strict=True))
                self._histograms[name] = Counter(found)
        return super().to_json(*args, **kwargs)


def _sum(counts: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Adds `more` to the counts, in place where there is room."""
    counts = _longer(counts, len(more))
    counts[: len(more)] += more
    return counts


def _longer(counts: np.ndarray, length: int) -> np.ndarray:
    """The counts, with room for `length` values and for those that come with longer contexts."""
    if len(counts) >= length:
        return counts
    return np.concatenate([counts, np.zeros(2 * length - len(counts), dtype=np.int64)])


class FastOverlaps(Overlaps):
    def __init__(self, with_tokens: bool, kind: Selections = ENGINES) -> None:
        super().__init__(with_tokens, kind)
        self.selected = np.zeros(0, dtype=np.int32)  # of the record under way
        self._is_held = np.zeros(0, dtype=bool)  # scratch: by position; False between two calls

    def selection(self, record: Record) -> np.ndarray:
        return self.selected

    def num_shared(self, selected: np.ndarray, before: np.ndarray) -> int:
        if not len(selected) or not len(before):
            return 0
        num_positions = 1 + max(int(selected[-1]), int(before[-1]))
        if len(self._is_held) < num_positions:
            self._is_held = np.zeros(2 * num_positions, dtype=bool)
        places = selected.astype(np.intp)  # numpy writes to these several times faster
        self._is_held[places] = True
        shared = int(np.count_nonzero(self._is_held.take(before)))
        self._is_held[places] = False
        return shared
