"""One record's selection in numpy: its touched blocks, and what bounds the accounts of its tiers.

Part of the third derivation; imported only where numpy is installed.

    chosen = Chosen.of(integers(record["selected_token_pos"]), block_size=16)      # ascending ones
    chosen.blocks
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from typing import NamedTuple

import numpy as np

from dsatrace.verify.check_tiers import Selected


class Chosen(NamedTuple):
    """A record's positions, and its touched blocks."""

    positions: np.ndarray  # (k,) int64, ascending
    blocks: np.ndarray  # (n,) int64, ascending
    in_block: np.ndarray  # (n,) int64: positions in each

    @classmethod
    def of(cls, positions: np.ndarray, block_size: int) -> Chosen:
        """Of one or more ascending positions."""
        block_of = positions // block_size
        starts = np.flatnonzero(block_of[1:] != block_of[:-1]) + 1
        bounds = np.concatenate([[0], starts, [len(positions)]])
        return cls(positions, block_of[bounds[:-1]], bounds[1:] - bounds[:-1])


@dataclasses.dataclass(frozen=True)
class FastSelected(Selected):
    """The same bounds, found in numpy; `positions` and `blocks` stand in `chosen`."""

    chosen: Chosen

    def tokens_of(self, blocks: int) -> tuple[int, int]:
        if not 0 <= blocks <= self.num_blocks:
            raise ValueError("more blocks than are touched")
        in_fewest = self._in_fewest
        return int(in_fewest[blocks]), int(in_fewest[-1] - in_fewest[self.num_blocks - blocks])

    def runs_of(self, num_hit: int, by_row: bool) -> tuple[int, int]:
        ids = self.chosen.positions if by_row else self.chosen.blocks
        lengths = np.diff(np.flatnonzero(np.diff(ids, prepend=-2, append=-2) != 1))
        in_most = np.sort(lengths)[::-1].cumsum()
        fewest = int(np.searchsorted(in_most, num_hit)) + 1 if num_hit else 0
        return fewest, min(num_hit, len(lengths) + len(ids) - num_hit)

    def num_units(self, unit_tokens: int) -> int:
        return num_distinct(self.chosen.positions // unit_tokens)

    @functools.cached_property
    def _in_fewest(self) -> np.ndarray:
        """[n]: the tokens in the n touched blocks that have the fewest."""
        return np.concatenate([[0], np.sort(self.chosen.in_block).cumsum()])


def integers(values: list[int]) -> np.ndarray:
    """(n,) int64; anything but integers of 64 bits raises `struct.error`, a bool `TypeError`."""
    numbers = np.frombuffer(struct.pack(f"{len(values)}q", *values), dtype=np.int64)
    # `pack` takes a bool for 0 or 1.
    if any(type(values[i]) is bool for i in np.flatnonzero(numbers < 2)):
        raise TypeError("a bool is no integer")
    return numbers


def num_distinct(ascending: np.ndarray) -> int:
    """Of one or more numbers."""
    return 1 + int(np.count_nonzero(ascending[1:] != ascending[:-1]))


def num_runs(ascending: np.ndarray) -> int:
    """Runs of adjacent numbers among one or more."""
    return 1 + int(np.count_nonzero(ascending[1:] != ascending[:-1] + 1))
