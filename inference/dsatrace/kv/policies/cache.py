"""The compiled cache: which slot holds which block, and heaps of the slots that may be evicted.

State is an array a field, indexed by slot where it can be, so that it stays as small as
the cache is, however many blocks the stream has. Exactly the evictable slots stand in a
heap, each queue having its own; the smallest value is first, then the smallest stamp.
Slots with equal keys never move, so a heap of them is a bag (`uniform`, `sieve`).
Knows no policy and no request.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

ABSENT = -1


class Shape(NamedTuple):
    """What the arrays are sized by."""

    num_slots: int  # blocks that fit
    num_blocks: int  # ids of the stream are below it
    num_workloads: int


class Cache(NamedTuple):
    """B blocks of the stream, S slots, Q queues."""

    slot_of: np.ndarray  # (B,) int32, ABSENT when not cached
    block_of: np.ndarray  # (S,) int32
    pins: np.ndarray  # (S,) int32
    parent: np.ndarray  # (B,) int32, (1,) when flat
    children: np.ndarray  # (B,) int32, cached children of a block, (1,) when flat
    value: np.ndarray  # (S,) float64
    stamp: np.ndarray  # (S,) int64
    queue: np.ndarray  # (S,) int32
    heap: np.ndarray  # (Q, S) int32, slots
    heap_size: np.ndarray  # (Q,) int64
    place: np.ndarray  # (S,) int32, index in its heap, ABSENT when not evictable
    counts: np.ndarray  # (3,) int64: the CLOCK, CACHED slots and slots IN_USE
    leaf: bool


CLOCK, CACHED, IN_USE = range(3)

compiled_whole = njit(nogil=True, cache=True, _nrt=False)  # type: ignore[call-overload]
"""For a loop over a stream, with all it calls. `_nrt=False`, which the called inherit: nothing there
allocates, and counting references to the state's arrays, with an atomic instruction each, made the
loops three to six times slower."""


def empty_cache(shape: Shape, num_queues: int, parents: np.ndarray | None) -> Cache:
    """A cache without blocks; leaf-constrained where `parents` (B,) are given."""
    slots, blocks = shape.num_slots, shape.num_blocks
    leaf = parents is not None
    return Cache(
        slot_of=np.full(blocks, ABSENT, np.int32),
        block_of=np.full(slots, ABSENT, np.int32),
        pins=np.zeros(slots, np.int32),
        parent=np.full(1, ABSENT, np.int32) if parents is None else parents,
        children=np.zeros(blocks if leaf else 1, np.int32),
        value=np.zeros(slots),
        stamp=np.zeros(slots, np.int64),
        queue=np.zeros(slots, np.int32),
        heap=np.zeros((num_queues, slots), np.int32),
        heap_size=np.zeros(num_queues, np.int64),
        place=np.full(slots, ABSENT, np.int32),
        counts=np.zeros(3, np.int64),
        leaf=leaf,
    )


@njit(nogil=True)
def tick(cache: Cache) -> int:
    """A stamp later than all before."""
    cache.counts[CLOCK] += 1
    return cache.counts[CLOCK]


@njit(nogil=True)
def is_evictable(cache: Cache, slot: int) -> bool:
    return cache.place[slot] != ABSENT


@njit(nogil=True)
def _before(cache: Cache, slot: int, other: int) -> bool:
    if cache.value[slot] != cache.value[other]:
        return cache.value[slot] < cache.value[other]
    return cache.stamp[slot] < cache.stamp[other]


@njit(nogil=True)
def _sift_up(cache: Cache, queue: int, at: int, slot: int) -> None:
    while at > 0:
        above = (at - 1) >> 1
        other = cache.heap[queue, above]
        if not _before(cache, slot, other):
            break
        cache.heap[queue, at] = other
        cache.place[other] = at
        at = above
    cache.heap[queue, at] = slot
    cache.place[slot] = at


@njit(nogil=True)
def _sift_down(cache: Cache, queue: int, at: int, slot: int) -> None:
    size = cache.heap_size[queue]
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        if below + 1 < size and _before(cache, cache.heap[queue, below + 1], cache.heap[queue, below]):
            below += 1
        other = cache.heap[queue, below]
        if not _before(cache, other, slot):
            break
        cache.heap[queue, at] = other
        cache.place[other] = at
        at = below
    cache.heap[queue, at] = slot
    cache.place[slot] = at


@njit(nogil=True)
def offer(cache: Cache, slot: int) -> None:
    """Lines a slot up in its queue; its key must not change while it stands there."""
    queue = cache.queue[slot]
    cache.heap_size[queue] += 1
    _sift_up(cache, queue, cache.heap_size[queue] - 1, slot)


@njit(nogil=True)
def withdraw(cache: Cache, slot: int) -> None:
    """Takes a slot out of its queue, wherever it stands."""
    queue, at = cache.queue[slot], cache.place[slot]
    cache.heap_size[queue] -= 1
    cache.place[slot] = ABSENT
    last = cache.heap[queue, cache.heap_size[queue]]
    if last == slot:
        return
    if at > 0 and _before(cache, last, cache.heap[queue, (at - 1) >> 1]):
        _sift_up(cache, queue, at, last)
    else:
        _sift_down(cache, queue, at, last)


@njit(nogil=True)
def first(cache: Cache, queue: int) -> int:
    """The first evictable slot of a queue that is not empty."""
    return cache.heap[queue, 0]


@njit(nogil=True)
def pop(cache: Cache, queue: int) -> int:
    """Takes the first slot out of a queue that is not empty."""
    slot = cache.heap[queue, 0]
    withdraw(cache, slot)
    return slot
