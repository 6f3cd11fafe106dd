"""The definition of a cache, compiled: hit, else evict until it fits, else insert.

One loop for every policy, with that policy's rules compiled in. For each request, in order:
what is done by then is released, tail first; if the request does not fit beside those in
flight, they are released early, as an engine would let it wait; all its cached blocks are
looked up and pinned; then, tail first, each is used again or inserted. Knows no policy by
name. The tests hold it equal to the same in plain Python, over `PlainPolicy`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from dsatrace.kv.policies.cache import ABSENT, CACHED, IN_USE, Cache, compiled_whole, offer, tick, withdraw
from dsatrace.kv.policies.policy import NEVER, NO_PARENT, Access
from dsatrace.kv.policies.rules import again, enter, miss, released, victim


class Requests(NamedTuple):
    """The stream's arrays, R requests and N accesses; and what becomes of them."""

    blocks: np.ndarray  # (N,) int32
    starts: np.ndarray  # (R + 1,) int64
    times: np.ndarray  # (R,) float64
    workloads: np.ndarray  # (R,) int32
    release: np.ndarray  # (R,) int64
    release_order: np.ndarray  # (R,) int64
    next_use: np.ndarray  # (N,) int64, or (0,) where no policy asks for it
    held: np.ndarray  # (R,) int64, in: how many of its first blocks a request shall hold; 0 once released
    hits: np.ndarray  # (R,) int32, out: cached blocks before the first that is not
    found: np.ndarray  # (R,) int32, out: cached blocks
    evicted: np.ndarray  # (N, 2) int32, out: request and block of each eviction; (0, 2): not asked for


class Totals(NamedTuple):
    num_evictions: int
    num_waited: int  # requests that did not fit beside those in flight


@njit(nogil=True)
def _access(cache: Cache, requests: Requests, request: int, at: int) -> Access:
    """What a policy is told of the access at position `at`."""
    block = requests.blocks[at]
    return Access(
        requests.times[request],
        requests.workloads[request],
        cache.parent[block] if cache.leaf else NO_PARENT,
        at - requests.starts[request],
        requests.starts[request + 1] - 1 - at,
        requests.next_use[at] if len(requests.next_use) else NEVER,
    )


@njit(nogil=True)
def _look_up(cache: Cache, requests: Requests, request: int, end: int) -> None:
    """Counts what is cached and pins it."""
    hits = found = 0
    for at in range(requests.starts[request], end):
        slot = cache.slot_of[requests.blocks[at]]
        if slot == ABSENT:
            continue
        found += 1
        hits += hits == at - requests.starts[request]
        if cache.pins[slot] == 0:
            cache.counts[IN_USE] += 1
            if cache.place[slot] != ABSENT:
                withdraw(cache, slot)
        cache.pins[slot] += 1
    requests.hits[request], requests.found[request] = hits, found


@njit(nogil=True)
def _missing_pins(cache: Cache, requests: Requests, request: int, end: int) -> int:
    """How many more slots would be in use with this request."""
    num_missing = 0
    for at in range(requests.starts[request], end):
        slot = cache.slot_of[requests.blocks[at]]
        num_missing += slot == ABSENT or cache.pins[slot] == 0
    return num_missing


@njit(nogil=True)
def _clear(cache: Cache, slot: int) -> None:
    """The evicted block is gone; its parent may have become a leaf."""
    block = cache.block_of[slot]
    cache.slot_of[block] = ABSENT
    if cache.leaf and cache.parent[block] != NO_PARENT:
        parent = cache.parent[block]
        cache.children[parent] -= 1
        above = cache.slot_of[parent]
        if cache.children[parent] == 0 and above != ABSENT and cache.pins[above] == 0:
            offer(cache, above)


@njit(nogil=True)
def _fill(cache: Cache, slot: int, block: int) -> None:
    cache.slot_of[block] = slot
    cache.block_of[slot] = block
    cache.pins[slot] = 1
    cache.counts[IN_USE] += 1
    cache.value[slot] = 0.0
    cache.queue[slot] = 0
    cache.stamp[slot] = tick(cache)
    if cache.leaf and cache.parent[block] != NO_PARENT:
        cache.children[cache.parent[block]] += 1


@njit(nogil=True)
def _release(policy: Any, cache: Cache, requests: Requests, request: int) -> None:
    """The request lets go of its blocks, the tail first."""
    begin = requests.starts[request]
    for at in range(begin + requests.held[request] - 1, begin - 1, -1):
        block = requests.blocks[at]
        slot = cache.slot_of[block]
        cache.pins[slot] -= 1
        if cache.pins[slot] == 0:
            cache.counts[IN_USE] -= 1
            released(policy, cache, slot)
            if not cache.leaf or cache.children[block] == 0:
                offer(cache, slot)
    requests.held[request] = 0


@njit(nogil=True)
def _wait(policy: Any, cache: Cache, requests: Requests, request: int, num_released: int) -> bool:
    """Releases requests in flight early, next to end first, until this one fits."""
    num_slots = len(cache.block_of)
    end = requests.starts[request] + requests.held[request]
    due = num_released
    while cache.counts[IN_USE] + _missing_pins(cache, requests, request, end) > num_slots:
        in_flight = requests.release_order[due]
        due += 1
        if in_flight < request:
            _release(policy, cache, requests, in_flight)
    return due > num_released


@njit(nogil=True)
def _slot_for_new(policy: Any, cache: Cache, requests: Requests, request: int, num_evictions: int) -> int:
    """A slot that was never used, or else the one the policy gives up."""
    if cache.counts[CACHED] < len(cache.block_of):
        cache.counts[CACHED] += 1
        return cache.counts[CACHED] - 1
    slot = victim(policy, cache)
    if len(requests.evicted):
        requests.evicted[num_evictions, 0] = request
        requests.evicted[num_evictions, 1] = cache.block_of[slot]
    _clear(cache, slot)
    return slot


def _loop(policy: Any, cache: Cache, requests: Requests) -> tuple[int, int]:
    num_evictions = num_waited = num_released = 0
    num_requests, num_slots = len(requests.release), len(cache.block_of)
    for request in range(num_requests):
        while requests.release[requests.release_order[num_released]] <= request:
            _release(policy, cache, requests, requests.release_order[num_released])
            num_released += 1
        begin = requests.starts[request]
        end = begin + requests.held[request]
        if cache.counts[IN_USE] + end - begin > num_slots:
            num_waited += _wait(policy, cache, requests, request, num_released)
        _look_up(cache, requests, request, end)
        for at in range(end - 1, begin - 1, -1):
            block = requests.blocks[at]
            access = _access(cache, requests, request, at)
            slot = cache.slot_of[block]
            if slot != ABSENT:
                again(policy, cache, slot, access)
                continue
            miss(policy, cache, block, access)
            num_evictions += cache.counts[CACHED] == num_slots
            slot = _slot_for_new(policy, cache, requests, request, num_evictions - 1)
            _fill(cache, slot, block)
            enter(policy, cache, slot, access)
    return num_evictions, num_waited


# numba keeps compiled functions on disk by name and by the source file they stand in, while this
# loop also contains the rules and heaps of other files. With a digest of all of them in its name,
# no change to a policy can meet a loop, or an index of loops, from before it.
_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()
_loop.__qualname__ += f"_{_SOURCES[:16]}"
_compiled_loop = compiled_whole(_loop)


def replay(policy: NamedTuple, cache: Cache, requests: Requests) -> Totals:
    """Runs the stream through the cache; fills `requests.hits`, `found` and `evicted`."""
    return Totals(*_compiled_loop(policy, cache, requests))
