"""The compiled cache that policies run in, and how the loop finds a policy's rules.

`Cache`: which slot holds which block, and heaps of the slots that may be evicted. State is one array
per field, indexed by slot where it can be, so it stays as small as the cache however many blocks the
stream has. Exactly the evictable slots stand in heaps, one heap per queue: smallest value first, then
smallest stamp. Slots with equal keys never move, so a heap of them is a bag (`uniform`, `sieve`).

`Rules`: a policy is a NamedTuple of arrays and up to six plain functions over it and the `Cache`,
registered under the NamedTuple's type. A loop (`simulate`, `batches`) calls `enter`, `victim` and the
rest by name, and numba compiles the rules of that one policy into it: policies that are not used are
not compiled, and nothing is looked up while the loop runs. Knows no policy by name and no request.

    RULES[LfuState] = Rules(again=count_use)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from dsatrace.jit import cached_njit, inner

NO_PARENT = -1
NEVER = 2**62
"""`next_use` of a block that is not used again."""
ABSENT = -1


class Access(NamedTuple):
    """One use of one block by one request; every field has a neutral default."""

    time: float = 0.0  # seconds
    workload: int = 0  # the request's class
    parent: int = NO_PARENT  # the block before it in the chain
    depth: int = 0  # blocks before it in its request
    from_end: int = 0  # blocks after it in its request
    next_use: int = NEVER  # position of its next access in the stream; OPT only


class Shape(NamedTuple):
    """Sizes of the arrays."""

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


def compiled_whole(function: Callable[..., Any]) -> Any:
    """Compiles a loop and all it calls.

    `_nrt=False` applies to the callees too: nothing there allocates, and counting references to the state's
    arrays made the loops three to six times slower. numba caches a compiled function by its name and source
    file, but a loop contains the rules and heaps of other files, too. The digest of all of them in its name
    makes every change recompile it.
    """
    function.__qualname__ += f"_{_sources()}"
    return cached_njit(nogil=True, _nrt=False)(function)


@functools.cache
def _sources() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def empty_cache(shape: Shape, num_queues: int, parents: np.ndarray | None) -> Cache:
    """A cache without blocks; leaf-constrained if `parents` (B,) are given."""
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


@inner
def tick(cache: Cache) -> int:
    """A stamp later than all before."""
    cache.counts[CLOCK] += 1
    now: int = cache.counts[CLOCK]
    return now


@inner
def is_evictable(cache: Cache, slot: int) -> bool:
    listed: bool = cache.place[slot] != ABSENT
    return listed


@inner
def _before(cache: Cache, slot: int, other: int) -> bool:
    before: bool = cache.stamp[slot] < cache.stamp[other]
    if cache.value[slot] != cache.value[other]:
        before = cache.value[slot] < cache.value[other]
    return before


@inner
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


@inner
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


@inner
def offer(cache: Cache, slot: int) -> None:
    """Adds a slot to its queue; its value and stamp must not change while it is there."""
    queue = cache.queue[slot]
    cache.heap_size[queue] += 1
    _sift_up(cache, queue, cache.heap_size[queue] - 1, slot)


@inner
def withdraw(cache: Cache, slot: int) -> None:
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


@inner
def first(cache: Cache, queue: int) -> int:
    """The first evictable slot of a queue that is not empty."""
    slot: int = cache.heap[queue, 0]
    return slot


@inner
def pop(cache: Cache, queue: int) -> int:
    """Takes the first slot out of a queue that is not empty."""
    slot = first(cache, queue)
    withdraw(cache, slot)
    return slot


@inner
def fill(cache: Cache, slot: int, block: int) -> None:
    """A block enters a slot that is empty, with one pin."""
    cache.slot_of[block] = slot
    cache.block_of[slot] = block
    cache.pins[slot] = 1
    cache.counts[IN_USE] += 1
    cache.value[slot] = 0.0
    cache.queue[slot] = 0
    cache.stamp[slot] = tick(cache)
    if cache.leaf and cache.parent[block] != NO_PARENT:
        cache.children[cache.parent[block]] += 1


@inner
def clear(cache: Cache, slot: int) -> None:
    """The slot's block, which stands in no heap, is gone; its parent may have become a leaf."""
    block = cache.block_of[slot]
    cache.slot_of[block] = ABSENT
    if cache.leaf and cache.parent[block] != NO_PARENT:
        parent = cache.parent[block]
        cache.children[parent] -= 1
        above = cache.slot_of[parent]
        if cache.children[parent] == 0 and above != ABSENT and cache.pins[above] == 0:
            offer(cache, above)


Rule = Callable[..., Any]


def nothing_on_miss(policy: Any, cache: Cache, block: int, access: Access) -> None:
    """For policies that do not remember evicted blocks."""


def nothing_to_do(policy: Any, cache: Cache, slot: int, access: Access) -> None:
    """For policies that do not count this."""


def fresh_stamp(policy: Any, cache: Cache, slot: int) -> None:
    """Recency: in use until now."""
    cache.stamp[slot] = tick(cache)


def same_stamp(policy: Any, cache: Cache, slot: int) -> None:
    """The stamp stays that of entry, or whatever the policy's other rules set."""


def nothing_left(policy: Any, cache: Cache, slot: int) -> None:
    """For policies that count nothing of what is cached."""


def first_of_queue_0(policy: Any, cache: Cache) -> int:
    return pop(cache, 0)


@dataclasses.dataclass(frozen=True)
class Rules:
    """One policy's rules. Without any, LRU."""

    miss: Rule = nothing_on_miss  # a block is not cached; evictions and its entry follow
    enter: Rule = nothing_to_do  # a new block: in queue 0 with value 0 and a fresh stamp
    again: Rule = nothing_to_do  # a cached block was used again
    released: Rule = fresh_stamp  # the block's last pin is gone
    victim: Rule = first_of_queue_0  # chooses an evictable slot, usually by `pop`
    left: Rule = nothing_left  # the victim's block is about to be forgotten


RULES: dict[type, Rules] = {}
"""By the type of the policy's state."""


# The loops call these six; numba replaces each by the rule of the policy whose state it is given.


def miss(policy: Any, cache: Cache, block: int, access: Access) -> None: ...
def enter(policy: Any, cache: Cache, slot: int, access: Access) -> None: ...
def again(policy: Any, cache: Cache, slot: int, access: Access) -> None: ...
def released(policy: Any, cache: Cache, slot: int) -> None: ...
def victim(policy: Any, cache: Cache) -> int: ...  # type: ignore[empty-body]
def left(policy: Any, cache: Cache, slot: int) -> None: ...


# strict=False: numba would compare annotations as well, and rules annotate their own state.
overload(miss, strict=False)(lambda policy, cache, block, access: RULES[policy.instance_class].miss)
overload(enter, strict=False)(lambda policy, cache, slot, access: RULES[policy.instance_class].enter)
overload(again, strict=False)(lambda policy, cache, slot, access: RULES[policy.instance_class].again)
overload(released, strict=False)(lambda policy, cache, slot: RULES[policy.instance_class].released)
overload(victim, strict=False)(lambda policy, cache: RULES[policy.instance_class].victim)
overload(left, strict=False)(lambda policy, cache, slot: RULES[policy.instance_class].left)
