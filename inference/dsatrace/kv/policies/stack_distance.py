"""LRU's hits at every capacity from one pass over the stream, exact.

LRU is a stack algorithm (Mattson et al., IBM Systems Journal, 1970): order the blocks that requests
in flight hold first, then the rest by recency, and a cache of any capacity holds the top of that one
stack. So a block is a hit at every capacity above its stack distance, the number of blocks above it
when its request arrives; in a prefix, at every capacity above the distances of the blocks before it
too. Requests are released tail first, so a parent lies above its children on a prefix tree: there
the leaf constraint changes nothing, and both counts agree.

This holds for one request at a time at any capacity, with longer requests truncated, since a
truncated request leaves only its first blocks in the cache. With several requests in flight it holds
where all of them fit at all times. At smaller capacities some wait, how long depends on the capacity,
and these capacities are simulated one by one.

    lru_hits_at(stream, [64, 128, 256]).hits.sum(axis=1)        # three numbers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dsatrace.jit import inner
from dsatrace.kv.policies.compiled import compiled_whole
from dsatrace.kv.policies.simulate import check_capacity, simulate
from dsatrace.kv.policies.stream import AccessStream


@dataclasses.dataclass(frozen=True, eq=False)
class LruHits:
    """LRU at C capacities, for W workloads."""

    capacities: np.ndarray  # (C,) int64, in the order asked for
    hits: np.ndarray  # (C, W) int64, cached blocks before a request's first that is not
    hits_any: np.ndarray  # (C, W) int64, cached blocks
    num_simulated: int  # capacities that one pass could not serve


def lru_hits_at(stream: AccessStream, capacities: Sequence[int]) -> LruHits:
    """The same numbers as `simulate(stream, "lru", capacity)` for each capacity; raises as it does."""
    sizes = np.array(capacities, np.int64)
    check_capacity(int(sizes.min(initial=1)))
    counts, exact_from = _one_pass(stream, sizes)
    simulated = np.flatnonzero(sizes < exact_from)
    for index in simulated:
        result = simulate(stream, "lru", int(sizes[index]))
        for row, field in enumerate((result.hits, result.hits_any)):
            counts[row, index] = stream.by_workload(field)
    return LruHits(sizes, counts[0], counts[1], len(simulated))


def _one_pass(stream: AccessStream, sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """hits and hits_any, (2, C, W), and the capacity from which they are exact."""
    widest = min(int(sizes.max()), max(stream.num_blocks, 1))
    by_farthest = np.zeros((stream.num_workloads, widest + 1), np.int64)
    by_own = np.zeros_like(by_farthest)
    num_places = 4 * widest + 64
    most_in_use = _walk(
        stream.blocks,
        stream.starts,
        stream.workloads,
        stream.release,
        stream.release_order,
        np.full(stream.num_blocks, -1, np.int32),
        np.zeros(stream.num_blocks, np.int32),
        np.zeros(num_places + 1, np.int32),
        np.full(num_places, -1, np.int32),
        by_farthest,
        by_own,
    )
    up_to = np.minimum(sizes, widest) - 1  # a hit where distance < capacity
    counts = np.stack([histogram.cumsum(axis=1)[:, up_to].T for histogram in (by_farthest, by_own)])
    one_at_a_time = bool(np.all(stream.release == np.arange(stream.num_requests) + 1))
    return counts, 0 if one_at_a_time else most_in_use


@inner
def _add(tree: np.ndarray, at: int, change: int) -> None:
    """A Fenwick tree: adds at a position, 0-based."""
    at += 1
    while at < len(tree):
        tree[at] += change
        at += at & -at


@inner
def _sum_to(tree: np.ndarray, at: int) -> int:
    """Sum of positions 0 to `at`."""
    at += 1
    total = 0
    while at > 0:
        total += tree[at]
        at &= at - 1
    return total


@inner
def _compact(
    tree: np.ndarray, block_at: np.ndarray, place: np.ndarray, end: int, num_in_stack: int, num_kept: int
) -> int:
    """Moves the `num_kept` most recent blocks to the first places, in order, and drops the rest, which
    no capacity reaches. Returns how many are left."""
    num_dropped = max(0, num_in_stack - num_kept)
    to = 0
    for at in range(end):
        block = block_at[at]
        if block < 0:
            continue
        block_at[at] = -1
        if num_dropped:
            num_dropped -= 1
            place[block] = -1
        else:
            block_at[to] = block
            place[block] = to
            to += 1
    for at in range(1, len(tree)):  # position p counts 1 if p < to
        lowest = at - (at & -at)
        tree[at] = max(0, min(at, to) - lowest)
    return to


@compiled_whole
def _walk(
    blocks: np.ndarray,
    starts: np.ndarray,
    workloads: np.ndarray,
    release: np.ndarray,
    release_order: np.ndarray,
    place: np.ndarray,
    pins: np.ndarray,
    tree: np.ndarray,
    block_at: np.ndarray,
    by_farthest: np.ndarray,
    by_own: np.ndarray,
) -> int:
    """Fills both histograms of stack distances by workload, (W, widest + 1): of the farthest block so
    far in the request, and of the block itself. The last column counts what is out of reach. Returns
    the most blocks ever in use at once."""
    widest = by_own.shape[1] - 1
    end = in_stack = in_use = most_in_use = num_released = 0
    for request in range(len(starts) - 1):
        while release[release_order[num_released]] <= request:
            done = release_order[num_released]
            num_released += 1
            for at in range(starts[done + 1] - 1, starts[done] - 1, -1):
                block = blocks[at]
                pins[block] -= 1
                if pins[block]:
                    continue
                if end == len(block_at):
                    end = in_stack = _compact(tree, block_at, place, end, in_stack, widest)
                in_use -= 1
                in_stack += 1
                place[block], block_at[end] = end, block
                _add(tree, end, 1)
                end += 1
        farthest = 0
        workload = workloads[request]
        for index in range(starts[request + 1] - starts[request]):
            block = blocks[starts[request] + index]
            distance = widest
            if pins[block]:
                distance = index
            elif place[block] >= 0:
                distance = max(index, in_use + in_stack - _sum_to(tree, place[block]))
            distance = min(distance, widest)
            farthest = max(farthest, distance)
            by_own[workload, distance] += 1
            by_farthest[workload, farthest] += 1
        for at in range(starts[request], starts[request + 1]):
            block = blocks[at]
            if pins[block] == 0:
                in_use += 1
                if place[block] >= 0:
                    _add(tree, place[block], -1)
                    block_at[place[block]] = -1
                    place[block] = -1
                    in_stack -= 1
            pins[block] += 1
        most_in_use = max(most_in_use, in_use)
    return most_in_use
