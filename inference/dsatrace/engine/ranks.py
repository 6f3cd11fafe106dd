"""What the processes that share one model must agree on at every step: rank 0's word.

Every rank runs the same loop over the same requests. Which tokens were sampled, what time it
is and whether to stop is rank 0's to say, so that no two ranks ever schedule different
steps. A single process agrees with itself; the broadcast is in
`runner/distributed.py`, which needs torch.
"""

from __future__ import annotations

import os
from typing import NamedTuple, Protocol


class Word(NamedTuple):
    """One rank's view behind a step: `tokens` holds those sampled, by request."""

    abort: bool
    now_ns: int
    tokens: list[list[int]]


class Ranks(Protocol):
    """The processes that serve together."""

    def agree(self, word: Word) -> Word:
        """Rank 0's word, on every rank. Called by all of them, with equally many tokens."""


class SingleProcess:
    """Nobody to agree with."""

    def agree(self, word: Word) -> Word:
        return word


def is_rank_0() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0
