"""Replays a stream of block accesses through one cache: hits and evictions under any policy.

The cache holds `capacity` blocks of any content. Its definition, in one compiled loop for every
policy: for each request, in order, requests that are done by then are released, tail first; if the
request does not fit beside those in flight, they are released early, as if an engine let it wait;
all its cached blocks are looked up and pinned; then, tail first, each block is used again or, after
an eviction if the cache is full, inserted. A request may be kept from inserting. The tests hold
the loop equal to the same in plain Python.

Two counts come out of one replay: `hits` end at a request's first block that is not cached (a prefix
cache), `hits_any` do not. What is cached does not depend on which of them is used.

    stream = AccessStream.of([["a", "b", "c"], ["a", "b", "d"], ["a", "b", "c"]])
    simulate(stream, "lru", 3).hits          # [0 2 2]
    simulate(stream, "lru", 4).hits          # [0 2 3]
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np

from dsatrace.errors import UserError
from dsatrace.jit import inner
from dsatrace.kv.policies.compiled import (
    ABSENT,
    CACHED,
    IN_USE,
    NEVER,
    NO_PARENT,
    Access,
    Cache,
    Shape,
    again,
    clear,
    compiled_whole,
    empty_cache,
    enter,
    fill,
    left,
    miss,
    offer,
    released,
    victim,
    withdraw,
)
from dsatrace.kv.policies.registry import Workloads, policy_info
from dsatrace.kv.policies.stream import AccessStream

Oversize = Literal["truncate", "reject"]


class Requests(NamedTuple):
    """The stream's arrays, with R requests and N accesses, and the result's."""

    blocks: np.ndarray  # (N,) int32
    starts: np.ndarray  # (R + 1,) int64
    times: np.ndarray  # (R,) float64
    workloads: np.ndarray  # (R,) int32
    release: np.ndarray  # (R,) int64
    release_order: np.ndarray  # (R,) int64
    next_use: np.ndarray  # (N,) int64; (0,) if the policy does not need it
    held: np.ndarray  # (R,) int64, in: how many of its first blocks each request holds; 0 once released
    hits: np.ndarray  # (R,) int32, out: cached blocks before the first that is not
    found: np.ndarray  # (R,) int32, out: cached blocks
    evicted: np.ndarray  # (N, 2) int32, out: request and block of each eviction; (0, 2): not recorded
    admitted: np.ndarray  # (R,) bool, whether its blocks are inserted; (0,): all are


@inner
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


@inner
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


@inner
def _num_cached(cache: Cache, requests: Requests, begin: int, end: int) -> tuple[int, int]:
    """Cached blocks before the first that is not, and all cached blocks."""
    leading = found = 0
    for at in range(begin, end):
        if cache.slot_of[requests.blocks[at]] != ABSENT:
            leading += found == at - begin
            found += 1
    return leading, found


@inner
def _missing_pins(cache: Cache, requests: Requests, request: int, end: int) -> int:
    """How many more slots would be in use with this request."""
    num_missing = 0
    for at in range(requests.starts[request], end):
        slot = cache.slot_of[requests.blocks[at]]
        num_missing += slot == ABSENT or cache.pins[slot] == 0
    return num_missing


@inner
def _release(policy: Any, cache: Cache, requests: Requests, request: int) -> None:
    """Unpins the request's blocks, tail first."""
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


@inner
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


@inner
def _slot_for_new(policy: Any, cache: Cache, requests: Requests, request: int, num_evictions: int) -> int:
    """A slot that was never used, else the policy's victim's."""
    if cache.counts[CACHED] < len(cache.block_of):
        unused: int = cache.counts[CACHED]
        cache.counts[CACHED] += 1
        return unused
    slot = victim(policy, cache)
    if len(requests.evicted):
        requests.evicted[num_evictions, 0] = request
        requests.evicted[num_evictions, 1] = cache.block_of[slot]
    left(policy, cache, slot)
    clear(cache, slot)
    return slot


@compiled_whole
def _loop(policy: Any, cache: Cache, requests: Requests) -> tuple[int, int]:
    num_evictions = num_waited = num_released = 0
    num_requests, num_slots = len(requests.release), len(cache.block_of)
    for request in range(num_requests):
        while requests.release[requests.release_order[num_released]] <= request:
            _release(policy, cache, requests, requests.release_order[num_released])
            num_released += 1
        begin = requests.starts[request]
        end = begin + requests.held[request]
        found = -1
        if len(requests.admitted) and not requests.admitted[request]:
            requests.held[request], found = _num_cached(cache, requests, begin, end)
            end = begin + requests.held[request]
        if cache.counts[IN_USE] + end - begin > num_slots:
            num_waited += _wait(policy, cache, requests, request, num_released)
        _look_up(cache, requests, request, end)
        if found >= 0:
            requests.found[request] = found
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
            fill(cache, slot, block)
            enter(policy, cache, slot, access)
    return num_evictions, num_waited


@dataclasses.dataclass(frozen=True, eq=False)
class SimResult:
    """Results of R requests; a rejected request has no accesses."""

    accesses: np.ndarray  # (R,) int64, blocks asked for
    hits: np.ndarray  # (R,) int32, cached blocks before the first that was not
    hits_any: np.ndarray  # (R,) int32, cached blocks
    num_evictions: int
    num_waited: int  # requests that had to wait until others in flight were done
    evictions: np.ndarray | None  # (num_evictions, 2) int32, request and block, if recorded

    @property
    def hit_rate(self) -> float:
        """Hits of all accesses, 0 where there are none."""
        return float(self.hits.sum() / max(self.accesses.sum(), 1))


def simulate(
    stream: AccessStream,
    policy: str,
    capacity: int,
    *,
    leaf: bool = False,
    oversize: Oversize = "truncate",
    log_evictions: bool = False,
    admitted: np.ndarray | None = None,
    **params: Any,
) -> SimResult:
    """Replays the stream from an empty cache of `capacity` blocks.

    With `leaf`, a block with a cached child is not evicted; ids must then stand for whole prefixes.
    Of a request longer than the cache, the first `capacity` blocks are held and the rest are misses,
    or it is rejected whole (`oversize`). Of a request that is not `admitted` (R,) bool, no block is
    inserted: it holds and uses again the cached blocks that it begins with. The first call for a
    policy compiles it (seconds), later ones load it. Raises `UserError`.
    """
    info = policy_info(policy)
    settings = info.settings(params, Workloads(stream.workload_names, stream))
    held = held_blocks(stream, capacity, oversize)
    shape = Shape(max(1, min(capacity, stream.num_blocks)), stream.num_blocks, stream.num_workloads)
    requests = Requests(
        stream.blocks,
        stream.starts,
        stream.times,
        stream.workloads,
        stream.release,
        stream.release_order,
        stream.next_use(held) if info.needs_future else np.empty(0, np.int64),
        held.copy(),
        np.zeros(stream.num_requests, np.int32),
        np.zeros(stream.num_requests, np.int32),
        np.empty((stream.num_accesses if log_evictions else 0, 2), np.int32),
        np.zeros(0, np.bool_) if admitted is None else np.require(admitted, np.bool_),
    )
    num_queues = info.num_queues or stream.num_workloads
    cache = empty_cache(shape, num_queues, stream.parents if leaf else None)
    num_evictions, num_waited = _loop(info.state(shape, **settings), cache, requests)
    return SimResult(
        accesses=np.where((held == 0) & (oversize == "reject"), 0, stream.lengths),
        hits=requests.hits,
        hits_any=requests.found,
        num_evictions=num_evictions,
        num_waited=num_waited,
        evictions=requests.evicted[:num_evictions].copy() if log_evictions else None,
    )


def check_capacity(capacity: int) -> None:
    if capacity < 1:
        raise UserError(f"a cache holds at least 1 block, not {capacity}")


def held_blocks(stream: AccessStream, capacity: int, oversize: Oversize) -> np.ndarray:
    """How many of its first blocks each request holds, (R,) int64."""
    check_capacity(capacity)
    if oversize not in ("truncate", "reject"):
        raise UserError(f"oversize is 'truncate' or 'reject', not {oversize!r}")
    lengths = stream.lengths
    return np.where(lengths <= capacity, lengths, capacity if oversize == "truncate" else 0)
