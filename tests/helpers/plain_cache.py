"""The definition of a cache in plain Python: the reference of `kv.policies.simulate`.

For each request, in order: what is done by then is released, tail first; if the request
does not fit beside those in flight, they are released early; its cached blocks are looked
up and pinned; then, tail first, each is used again or inserted, after evictions.

    hits, found, evicted = plain_simulate(stream, make_policy("lru", 100), stream.lengths)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from dsatrace.kv.policies.compiled import NO_PARENT, Access
from dsatrace.kv.policies.stream import AccessStream
from helpers.plain_policy import PlainPolicy


def plain_simulate(
    stream: AccessStream, policy: PlainPolicy, held: np.ndarray, admitted: Sequence[bool] | None = None
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Request r holds its first `held[r]` blocks, at most `policy.capacity`; one that is not `admitted`
    only those of them that are cached and follow no missing one.

    Returns per request the cached blocks before the first that is not, and all cached
    ones; and (request, block) of each eviction.
    """
    hits: list[int] = []
    found: list[int] = []
    evicted: list[tuple[int, int]] = []
    in_flight: dict[int, list[int]] = {}
    for request, accesses in enumerate(_accesses(stream, tuple(held.tolist()))):
        cached = [block in policy for block in accesses]
        found.append(sum(cached))
        hits.append(cached.index(False) if False in cached else len(cached))
        if admitted is not None and not admitted[request]:
            accesses = dict(itertools.islice(accesses.items(), hits[-1]))  # noqa: PLW2901
        for done in sorted(in_flight, key=lambda r: (stream.release[r], r)):
            blocks = {block for chain in in_flight.values() for block in chain} | set(accesses)
            if stream.release[done] <= request or len(blocks) > policy.capacity:
                for block in reversed(in_flight.pop(done)):
                    policy.unpin(block)
        for block in accesses:
            if block in policy:
                policy.pin(block)
        for block, access in reversed(accesses.items()):
            if block in policy:
                policy.hit(block, access)
                continue
            policy.miss(block, access)
            if len(policy) == policy.capacity:
                evicted.append((request, policy.evict()))
            policy.insert(block, access)
            policy.pin(block)
        in_flight[request] = list(accesses)
    return hits, found, evicted


@functools.lru_cache(maxsize=1)
def _accesses(stream: AccessStream, held: tuple[int, ...]) -> list[dict[int, Access]]:
    """Each request's held blocks, head first. The last are kept: a stream goes through every policy."""
    next_use = stream.next_use(np.array(held, np.int64))
    requests = []
    for request, (begin, end) in enumerate(zip(stream.starts[:-1], stream.starts[1:], strict=True)):
        chain = stream.blocks[begin:end].tolist()
        requests.append(
            {
                block: Access(
                    time=float(stream.times[request]),
                    workload=int(stream.workloads[request]),
                    parent=chain[depth - 1] if depth else NO_PARENT,
                    depth=depth,
                    from_end=len(chain) - 1 - depth,
                    next_use=int(next_use[begin + depth]),
                )
                for depth, block in enumerate(chain[: held[request]])
            }
        )
    return requests
