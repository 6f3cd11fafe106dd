"""One trace through one cache: the replay from which every number of the study is read.

Knows no file and prints nothing.

    replayed = run_study(requests, StudySettings(num_blocks=1024))
    measure(replayed)["hit_rate_first_prefill"]         # measure.py
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from dsatrace.errors import UserError
from dsatrace.flags import option
from dsatrace.kv.blocks import EVICT, MISS, FreeOrder
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.kv.simulation.replay import ReplayConfig, ReplayResult, Schedule, replay
from dsatrace.study.requests import StudyRequests, block_trace

LARGEST = 2**31 - 1


def check_size(flag: str, value: int | None) -> None:
    """Raises a `UserError` that names the flag."""
    if value is not None and not 1 <= value <= LARGEST:
        raise UserError(f"{flag} must lie between 1 and {LARGEST}, not {value}")


@dataclasses.dataclass(frozen=True)
class StudySettings:
    """The cache, and how requests are scheduled on it.

    `num_blocks` are usable blocks (vLLM's number less its null block); with None nothing is
    evicted. `chunk_tokens` is the prefill chunk of the `continuous` schedule, `recount_tokens` that
    of the metric that looks a prompt up again before each chunk. Without `decode`, requests end with
    their prompt and answers are not cached. `host_blocks` is the size of a host pool for evicted blocks.
    """

    block_size: int = 16
    num_blocks: int | None = None
    concurrency: int = 1
    prefix_caching: bool = True
    free_order: FreeOrder = "new"
    schedule: Schedule = "in_order"
    chunk_tokens: int = 2048
    decode: bool = True
    host_blocks: int | None = None
    recount_tokens: int = 64

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "num_blocks",
            "concurrency",
            "chunk_tokens",
            "host_blocks",
            "recount_tokens",
        ):
            check_size(option(name), getattr(self, name))

    def config(self, num_blocks_at_most: int = LARGEST) -> ReplayConfig:
        """Blocks beyond `num_blocks_at_most`, the most that the trace can use, are not allocated."""
        return ReplayConfig(
            num_blocks=None if self.num_blocks is None else min(self.num_blocks, max(1, num_blocks_at_most)),
            concurrency=self.concurrency,
            chunk_tokens=self.chunk_tokens if self.schedule == "continuous" else None,
            decode=self.decode,
            schedule=self.schedule,
            free_order=self.free_order,
            prefix_caching=self.prefix_caching,
            record_events=True,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Replayed:
    """R requests, their blocks, and the results of the cache and of one that never evicts."""

    requests: StudyRequests
    trace: BlockTrace
    settings: StudySettings
    result: ReplayResult  # with events
    unlimited: ReplayResult
    host_hits: NDArray[np.int64] | None  # (R,) blocks, None without a host pool

    @functools.cached_property
    def accesses(self) -> np.ndarray:
        """Events other than evictions, in order."""
        return self._events(evict=False)

    @functools.cached_property
    def evictions(self) -> np.ndarray:
        return self._events(evict=True)

    def _events(self, evict: bool) -> np.ndarray:
        assert self.result.events is not None, "a study records events"
        chosen: np.ndarray = self.result.events[(self.result.events["kind"] == EVICT) == evict]
        return chosen


def run_study(requests: StudyRequests, settings: StudySettings) -> Replayed:
    """Replays the requests in order.

    The cache without a limit is always replayed request by request, so that no turn is looked up before
    the turn before it has ended.
    """
    if not len(requests):
        raise UserError("the trace holds no request; check what its filters left")
    trace = block_trace(requests, settings.block_size)
    config = settings.config(trace.num_blocks_at_most)
    result = replay(trace, config)
    unlimited = dataclasses.replace(
        config, num_blocks=None, schedule="in_order", chunk_tokens=None, record_events=False
    )
    host_hits = None
    if settings.host_blocks is not None:
        host_hits = host_hit_blocks(trace, result, settings.host_blocks)
    return Replayed(requests, trace, settings, result, replay(trace, unlimited), host_hits)


def host_hit_blocks(trace: BlockTrace, result: ReplayResult, num_blocks: int) -> NDArray[np.int64]:
    """(R,) blocks that each request found in a host pool of `num_blocks` at its first prefill.

    The pool takes the blocks that the device evicts. It is LRU over insertions and lookups, and
    a block that is loaded back stays in it. It is read off a finished replay: a block loaded
    from the host takes the place of one that is computed, so the device's own hits do not change.

    The lookup begins where the device's prefix ends. A block that the device holds continues the
    chain and is not counted. The last token is always computed. Needs a result with events.
    """
    if num_blocks < 1:
        raise UserError(f"a host pool holds at least 1 block, not {num_blocks}")
    assert result.events is not None, "the host tier is read off a replay that records events"
    hits = np.zeros(trace.num_requests, np.int64)
    seen = np.zeros(trace.num_requests, bool)
    copies = [0] * trace.num_keys  # of each block, in the device's cache
    host: OrderedDict[int, None] = OrderedDict()
    events = result.events
    kinds, keys, requests = (events[name].tolist() for name in ("kind", "key", "request"))
    for kind, key, request in zip(kinds, keys, requests, strict=True):
        if not seen[request]:  # its first event follows its lookup at once
            seen[request] = True
            hits[request] = _host_lookup(trace, result, request, copies, host)
        if kind == EVICT:
            copies[key] -= 1
            host[key] = None
            host.move_to_end(key)
            if len(host) > num_blocks:
                host.popitem(last=False)
        elif kind == MISS:
            copies[key] += 1
    return hits


def _host_lookup(
    trace: BlockTrace, result: ReplayResult, request: int, copies: list[int], host: OrderedDict[int, None]
) -> int:
    most = int(trace.prompt_tokens[request] - 1) // trace.block_size
    num_hits = 0
    for key in trace.keys_of(request)[int(result.hit_tokens[request]) // trace.block_size : most]:
        if key in host and not copies[key]:
            host.move_to_end(key)
            num_hits += 1
        elif not copies[key]:
            break
    return num_hits
