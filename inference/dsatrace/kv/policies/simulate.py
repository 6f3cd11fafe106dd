"""Replays a stream of block accesses through one cache: hits and evictions under any policy.

The cache holds `capacity` blocks of any content. A request is served out of it block by
block from its first on, and holds all its blocks until it is done. Two counts come of one
replay, since what is cached does not depend on them: `hits`, which end at a request's first
block that is not cached (a prefix cache), and `hits_any`, which do not.

    stream = AccessStream.of([["a", "b", "c"], ["a", "b", "d"], ["a", "b", "c"]])
    simulate(stream, "lru", 3).hits          # [0 2 2]
    simulate(stream, "lru", 4).hits          # [0 2 3]
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.policies.cache import Shape, empty_cache
from dsatrace.kv.policies.registry import policy_info
from dsatrace.kv.policies.replay import Requests, replay
from dsatrace.kv.policies.settings import Workloads
from dsatrace.kv.policies.stream import AccessStream

Oversize = Literal["truncate", "reject"]


@dataclasses.dataclass(frozen=True, eq=False)
class SimResult:
    """What became of R requests in W workloads; a rejected request has no accesses."""

    policy: str
    capacity: int  # blocks
    leaf: bool
    accesses: np.ndarray  # (R,) int64, blocks asked for
    hits: np.ndarray  # (R,) int32, cached blocks before the first that was not
    hits_any: np.ndarray  # (R,) int32, cached blocks
    workloads: np.ndarray  # (R,) int32, index of workload_names
    workload_names: tuple[str, ...]
    num_evictions: int
    num_oversize: int  # requests longer than the cache
    num_waited: int  # requests that had to wait until others in flight were done
    evictions: np.ndarray | None  # (num_evictions, 2) int32, request and block, if asked for

    @property
    def misses(self) -> np.ndarray:
        """(R,) int64, the other side of `hits`."""
        return self.accesses - self.hits

    @property
    def hit_rate(self) -> float:
        """Hits of all accesses, 0 where there are none."""
        return float(self.hits.sum() / max(self.accesses.sum(), 1))

    def by_workload(self) -> dict[str, dict[str, int]]:
        """Of each workload: accesses, hits, misses, hits_any."""
        size = len(self.workload_names)
        counts = {
            field: np.bincount(self.workloads, getattr(self, field), size).astype(int).tolist()
            for field in ("accesses", "hits", "misses", "hits_any")
        }
        return {
            name: {field: of_each[index] for field, of_each in counts.items()}
            for index, name in enumerate(self.workload_names)
        }


def simulate(
    stream: AccessStream,
    policy: str,
    capacity: int,
    *,
    leaf: bool = False,
    oversize: Oversize = "truncate",
    log_evictions: bool = False,
    **params: Any,
) -> SimResult:
    """Replays the stream from an empty cache of `capacity` blocks.

    With `leaf`, a block is evicted only once no cached child hangs on it, for which ids
    must name whole prefixes. Of a request longer than the cache the first `capacity`
    blocks are held and the rest are misses; or it is rejected whole. The first call for a
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
    )
    num_queues = info.num_queues or stream.num_workloads
    cache = empty_cache(shape, num_queues, stream.parents if leaf else None)
    totals = replay(info.state(shape, **settings), cache, requests)
    return SimResult(
        policy,
        capacity,
        leaf,
        np.where((held == 0) & (oversize == "reject"), 0, stream.lengths),
        requests.hits,
        requests.found,
        stream.workloads,
        stream.workload_names,
        totals.num_evictions,
        int(np.count_nonzero(stream.lengths > capacity)),
        totals.num_waited,
        requests.evicted[: totals.num_evictions].copy() if log_evictions else None,
    )


def held_blocks(stream: AccessStream, capacity: int, oversize: Oversize) -> np.ndarray:
    """How many of its first blocks each request holds, (R,) int64."""
    if capacity < 1:
        raise UserError(f"a cache holds at least 1 block, not {capacity}")
    if oversize not in ("truncate", "reject"):
        raise UserError(f"oversize is 'truncate' or 'reject', not {oversize!r}")
    lengths = stream.lengths
    return np.where(lengths <= capacity, lengths, capacity if oversize == "truncate" else 0)
