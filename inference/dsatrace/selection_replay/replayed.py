"""What the replay of one buffer gives, and what all its kernels share.

Kernels keep the state of a buffer of B ids in arrays by id, `used[id]`: the last step that asked for
a resident id, BEFORE for an id that the buffer held at the start, and ABSENT for any other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsatrace.selection_replay.steps import Start, Steps

ABSENT = -2
BEFORE = -1


class Replayed(NamedTuple):
    """Of T steps."""

    misses: np.ndarray  # (T,) int64, missed ids of each step, those of the warm-up too
    evictions: int  # of the counted steps


def num_first(steps: Steps, size: int, start: Start) -> int:
    """How many ids the buffer holds before the first step: the ids from 0 on."""
    return min(size, steps.num_ids) if start == "first-b" else 0


def largest_step(steps: Steps) -> int:
    return int(steps.sizes.max(initial=0))
