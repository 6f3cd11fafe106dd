"""OPT of an outer tier: the most hits any cache can have, if it may leave blocks out.

The OPT of `optimal` is that of a device: it holds all blocks of a request while it serves it, and
rejects a request that does not fit. A pool behind the device has neither duty. After each request
it keeps, of the blocks it has and those of the request, the ones whose next lookup comes first.
Each stay from one access of a block to its next is worth one hit and takes one block of room, and
among intervals that compete for room, giving up the one that ends last is optimal. A parent is
looked up whenever its child is, and before it, so a child never outstays its parent: the hits of
each request are an unbroken prefix.

    bypassing_hits(stream, stream.lengths, 64).sum()
"""

from __future__ import annotations

import numpy as np

from dsatrace.jit import inner
from dsatrace.kv.policies.compiled import NEVER, compiled_whole
from dsatrace.kv.policies.stream import AccessStream


def bypassing_hits(stream: AccessStream, looked_up: np.ndarray, capacity: int) -> np.ndarray:
    """Cached blocks before the first that is not, of each request: (R,) int64.

    A request looks up its first `looked_up` (R,) blocks; the rest it only produces. Requests in
    flight hold nothing here, so `stream.release` does not matter.
    """
    hits = np.zeros(stream.num_requests, np.int64)
    num_blocks = stream.num_blocks
    _walk(
        stream.blocks,
        stream.starts,
        np.require(looked_up, np.int64),
        np.full(num_blocks, NEVER, np.int64),
        np.empty(stream.num_accesses, np.int64),
        np.full(num_blocks, -1, np.int32),
        np.zeros(num_blocks, np.int64),
        np.zeros(max(1, min(capacity, num_blocks)), np.int32),
        hits,
    )
    return hits


@inner
def _sift_up(heap: np.ndarray, place: np.ndarray, key: np.ndarray, at: int) -> None:
    """The heap holds blocks, that of the latest lookup first."""
    block = heap[at]
    while at > 0 and key[heap[(at - 1) >> 1]] < key[block]:
        heap[at] = heap[(at - 1) >> 1]
        place[heap[at]] = at
        at = (at - 1) >> 1
    heap[at] = block
    place[block] = at


@inner
def _sift_down(heap: np.ndarray, place: np.ndarray, key: np.ndarray, size: int) -> None:
    at, block = 0, heap[0]
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        if below + 1 < size and key[heap[below + 1]] > key[heap[below]]:
            below += 1
        if key[heap[below]] <= key[block]:
            break
        heap[at] = heap[below]
        place[heap[at]] = at
        at = below
    heap[at] = block
    place[block] = at


@compiled_whole
def _walk(
    blocks: np.ndarray,
    starts: np.ndarray,
    looked_up: np.ndarray,
    coming: np.ndarray,
    next_lookup: np.ndarray,
    place: np.ndarray,
    key: np.ndarray,
    heap: np.ndarray,
    hits: np.ndarray,
) -> None:
    for request in range(len(hits) - 1, -1, -1):
        for at in range(starts[request], starts[request + 1]):
            block = blocks[at]
            next_lookup[at] = coming[block]
            # What is produced again need not be kept until then.
            coming[block] = at if at < starts[request] + looked_up[request] else NEVER
    size = 0
    for request in range(len(hits)):
        begin, end = starts[request], starts[request + 1]
        at = begin
        while at < begin + looked_up[request] and at < end and place[blocks[at]] >= 0:
            at += 1
        hits[request] = at - begin
        for at in range(begin, end):
            block = blocks[at]
            if place[block] >= 0:
                key[block] = next_lookup[at]
                _sift_up(heap, place, key, place[block])
        for at in range(begin, end):
            block = blocks[at]
            if place[block] >= 0 or next_lookup[at] == NEVER:
                continue
            key[block] = next_lookup[at]
            if size < len(heap):
                heap[size] = block
                size += 1
                _sift_up(heap, place, key, size - 1)
            elif next_lookup[at] < key[heap[0]]:
                place[heap[0]] = -1
                heap[0] = block
                _sift_down(heap, place, key, size)
