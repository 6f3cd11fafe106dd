"""Runs a whole block trace through the block pool, by one of two schedules, and counts the hits.

`in_order`: requests one after another, at most `concurrency` live. A new request is prefilled and
decoded at once and stays live. The oldest live requests finish when the limit is reached or blocks
run out; a request that does not fit an empty cache is rejected. This is the schedule under which
the recorded answers of vLLM's own manager were taken, and it equals them block by block.

`continuous`: step by step, as an engine runs. In each step every live request has a chunk of its
prompt or its next token computed. A request that finds no block preempts the newest one, possibly
itself; a preempted request is resumed first and looks its prefix up again. Requests are admitted as
soon as there is room: the trace's times only order them. A turn waits for the end of the turn before it,
and others pass it.

`replay` is compiled and takes some nanoseconds per block; the tests hold it equal to the same
schedules in plain Python over `PrefixPool`.

    result = replay(trace, ReplayConfig(num_blocks=1024, concurrency=8))
    result.hit_tokens[result.served].sum() / trace.prompt_tokens[result.served].sum()
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from dsatrace.kv.blocks import FreeOrder
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.kv.simulation.replay_kernels import (
    CUT,
    EVENT,
    REQUEST_COLUMNS,
    Requests,
    Settings,
    free_queue,
    new_pool,
    run_continuous,
    run_in_order,
)

Schedule = Literal["in_order", "continuous"]

STATUS_NAMES = ("served", "output_cut", "prompt_too_long", "request_too_long")
"""By status. `output_cut`: served, but the cache was full before the last output token (`in_order`).
`prompt_too_long`, `request_too_long`: rejected, since an empty cache does not hold the prompt
(`in_order`), or prompt and output (`continuous`)."""

WHOLE_PROMPT = 1 << 62
"""Chunk size in tokens that no prompt exceeds."""


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """How the pool is set up and requests are scheduled."""

    num_blocks: int | None  # with the null block, if there is one; None: as many as never evict
    concurrency: int = 1
    chunk_tokens: int | None = None  # of a prefill chunk; None: the whole prompt at once
    decode: bool = True  # False: requests end with their prompt
    schedule: Schedule = "in_order"
    free_order: FreeOrder = "new"
    null_block: bool = False
    prefix_caching: bool = True
    record_events: bool = False  # 13 bytes per event

    def __post_init__(self) -> None:
        least = 2 if self.null_block else 1
        for name, value, floor in (
            ("num_blocks", self.num_blocks, least),
            ("concurrency", self.concurrency, 1),
            ("chunk_tokens", self.chunk_tokens, 1),
        ):
            if value is not None and value < floor:
                raise ValueError(f"{name} must be at least {floor}, not {value}")

    def outputs(self, trace: BlockTrace) -> np.ndarray:
        """Output tokens to decode, (R,) int64."""
        return trace.output_tokens if self.decode else np.zeros_like(trace.output_tokens)

    def pool_blocks(self, trace: BlockTrace) -> int:
        if self.num_blocks is None:
            return max(1, trace.num_blocks_at_most) + self.null_block
        return self.num_blocks


@dataclasses.dataclass(frozen=True, eq=False)
class PoolState:
    """The pool after a replay, which releases nothing at its end."""

    block_keys: np.ndarray  # (num_blocks,) int32, -1: none
    num_users: np.ndarray  # (num_blocks,) int32
    free_queue: np.ndarray  # (free blocks,) int32, in the order they would be handed out


@dataclasses.dataclass(frozen=True, eq=False)
class ReplayResult:
    """Columns by request (R,), by key (K,) and, where recorded, by event (E,).

    Hits are those of a request's first prefill; what a preempted request finds when it is resumed
    is counted apart. An access is a full block with a key, of a prompt or output, that was hit, or
    computed and cached (a miss).
    """

    status: np.ndarray  # (R,) int8, see STATUS_NAMES
    hit_tokens: np.ndarray  # (R,) int64, first prefill; 0 where rejected
    cached_blocks: np.ndarray  # (R,) int64, full prompt blocks that are cached at the lookup, also past a gap
    blocks_allocated: np.ndarray  # (R,) int64, for prefill, decode and after preemption
    num_preemptions: np.ndarray  # (R,) int64
    resumed_tokens: np.ndarray  # (R,) int64, looked up when it was resumed: prompt and output so far
    resumed_hit_tokens: np.ndarray  # (R,) int64, of those
    generated_tokens: np.ndarray  # (R,) int64, all output tokens unless the output was cut
    key_accesses: np.ndarray  # (K,) int32
    key_hits: np.ndarray  # (K,) int32
    key_first: np.ndarray  # (K,) int32, clock of the first allocation; -1: never cached
    events: np.ndarray | None  # (E,) in order: kind, key, the request that caused it, clock
    final: PoolState

    @property
    def served(self) -> np.ndarray:
        """(R,) bool: not rejected."""
        return self.status <= CUT

    @property
    def num_hit_blocks(self) -> int:
        """Blocks reused, at first prefills and after preemptions."""
        return int(self.key_hits.sum())

    @property
    def num_blocks_allocated(self) -> int:
        return int(self.blocks_allocated.sum())

    @property
    def num_unique_keys(self) -> int:
        """Distinct full blocks that were ever cached."""
        return int((self.key_accesses > 0).sum())

    def rejections(self, chosen: np.ndarray | None = None) -> dict[str, int]:
        """How many of the `chosen` requests (R,), or of all, were not served, or not whole, by reason."""
        status = self.status if chosen is None else self.status[chosen]
        counts = np.bincount(status, minlength=len(STATUS_NAMES)).tolist()
        return {name: n for name, n in zip(STATUS_NAMES, counts, strict=True) if name != "served"}


def replay(trace: BlockTrace, config: ReplayConfig) -> ReplayResult:
    """Runs the whole trace.

    The clock of events and of `key_first` is the index of the newest request admitted so far:
    `trace.time_s[clock]` is its time.
    """
    room = 2 * len(trace.keys) if config.record_events else 0  # more are needed only after preemptions
    result, num_events = _run(trace, config, room)
    if config.record_events and num_events > room:
        result, _ = _run(trace, config, num_events)
    return result


def _run(trace: BlockTrace, config: ReplayConfig, room: int) -> tuple[ReplayResult, int]:
    """The result with at most `room` events, and how many there were."""
    num_blocks = config.pool_blocks(trace)
    pool = new_pool(num_blocks, int(config.null_block), trace.num_keys, room)
    columns = np.zeros((len(REQUEST_COLUMNS), trace.num_requests), np.int64)
    after = following(trace)
    requests = Requests(trace.prompt_tokens, config.outputs(trace), trace.keys, trace.key_ptr, after, columns)
    settings = Settings(
        block_size=trace.block_size,
        num_usable=num_blocks - config.null_block,
        concurrency=min(config.concurrency, max(1, trace.num_requests)),
        chunk=config.chunk_tokens or WHOLE_PROMPT,
        new_order=config.free_order == "new",
        caching=config.prefix_caching,
    )
    run = run_in_order if config.schedule == "in_order" else run_continuous
    run(tuple(pool), tuple(requests), tuple(settings))
    num_events = int(pool.counts[EVENT])
    result = ReplayResult(
        **columns_by_name(columns),
        key_accesses=pool.contents["accesses"],
        key_hits=pool.contents["hits"],
        key_first=pool.contents["first"],
        events=pool.events[:num_events] if config.record_events else None,
        final=PoolState(pool.blocks["key"][:-1], pool.blocks["num_users"][:-1], free_queue(pool)),
    )
    return result, num_events


def following(trace: BlockTrace) -> np.ndarray:
    """(R,) int64, the next request of the same conversation, -1 without one."""
    after = np.full(trace.num_requests, -1, np.int64)
    known = np.flatnonzero(trace.conversation >= 0)
    order = known[np.argsort(trace.conversation[known], kind="stable")]
    same = np.diff(trace.conversation[order]) == 0
    after[order[:-1][same]] = order[1:][same]
    return after


def columns_by_name(columns: np.ndarray) -> dict[str, np.ndarray]:
    """The columns that a schedule fills, by their names in `ReplayResult`."""
    by_name = dict(zip(REQUEST_COLUMNS, columns, strict=True))
    return {**by_name, "status": by_name["status"].astype(np.int8)}
