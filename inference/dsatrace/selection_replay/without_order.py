"""Buffers without an order of their own: what they hold follows from the step, or they hold nothing.

They do not fill on demand: a missed id is read and used, and only the rule decides what stays.
"""

from __future__ import annotations

import numpy as np

from dsatrace.jit import cached_njit
from dsatrace.selection_replay.replayed import ABSENT, BEFORE, Replayed, num_first
from dsatrace.selection_replay.steps import Start, Steps


def window(steps: Steps, size: int, sinks: int) -> Replayed:
    """Of the ids that are visible to a step, the first `sinks` and the newest, `size` in all."""
    sinks = min(sinks, size)
    lowest = np.maximum(sinks, steps.visible - (size - sinks))  # of the newest ones
    misses = np.zeros(steps.num_steps, np.int64)
    _outside(*steps.arrays(), sinks, lowest, misses)
    left = np.minimum(lowest[1:], np.maximum(steps.visible[:-1], sinks)) - lowest[:-1]
    return Replayed(misses, int(np.maximum(left, 0)[steps.counted[1:]].sum()))


def previous(steps: Steps, size: int, start: Start) -> Replayed:
    """The ids of the step before, however many fit."""
    misses = np.zeros(steps.num_steps, np.int64)
    held = np.full(steps.num_ids, ABSENT, np.int32)
    num_before = num_first(steps, size, start)
    held[:num_before] = BEFORE
    _outside_previous(*steps.arrays(), held, misses)
    hits = steps.sizes - misses
    evicted = np.concatenate(([num_before], steps.sizes))[: steps.num_steps] - hits
    return Replayed(misses, int(evicted[steps.counted].sum()))


def nothing(steps: Steps, size: int) -> Replayed:
    """No buffer: every id misses."""
    return Replayed(steps.sizes, 0)


@cached_njit(nogil=True, _nrt=False)
def _outside(ids: np.ndarray, ptr: np.ndarray, sinks: int, lowest: np.ndarray, misses: np.ndarray) -> None:
    for step in range(len(ptr) - 1):
        for id_ in ids[ptr[step] : ptr[step + 1]]:
            misses[step] += (id_ >= sinks) & (id_ < lowest[step])


@cached_njit(nogil=True, _nrt=False)
def _outside_previous(ids: np.ndarray, ptr: np.ndarray, held: np.ndarray, misses: np.ndarray) -> None:
    for step in range(len(ptr) - 1):
        for id_ in ids[ptr[step] : ptr[step + 1]]:
            misses[step] += held[id_] != step - 1
            held[id_] = step
