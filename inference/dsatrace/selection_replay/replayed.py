"""What the replay of one buffer gives, and what all its kernels share.

Kernels keep the state of a buffer of B ids in arrays by id, `used[id]`: the last step that asked for
a resident id, BEFORE for an id that the buffer held at the start, and ABSENT for any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


def walked(walk: Callable[..., int], steps: Steps, size: int, start: Start, *state: Any) -> Replayed:
    """By a kernel that takes ids, ptr, which steps count, the ids held before, its own state, and `misses`
    to fill, and returns the evictions."""
    misses = np.zeros(steps.num_steps, np.int64)
    first = num_first(steps, size, start)
    return Replayed(misses, walk(*steps.arrays(), steps.counted, first, *state, misses))


def scratch(steps: Steps) -> np.ndarray:
    """(2, largest step + 1) int32; one more, since a kernel writes before it knows."""
    return np.empty((2, largest_step(steps) + 1), np.int32)


def largest_step(steps: Steps) -> int:
    return int(steps.sizes.max(initial=0))
