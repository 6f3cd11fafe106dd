"""How large a prefix cache a workload is worth: hit rate against bytes, and the size to take.

The sweep's road with capacities in bytes: LRU at every size in one pass, OPT and vLLM's pool size by
size, and the pool without a limit, which is the most that the engine could hit. With several replicas
each has a cache of that size and the requests that a router gives it; hits are added up. All workloads
of a trace share the caches. Knows no file and no model, only the bytes of a block.

    traces = replica_traces(requests, block_size=64, replicas=1, routing="round-robin")
    sizes = default_sizes(traces, block_bytes)
    curve = SizeCurve.of(block_bytes, sizes, [size_cells(traces, settings_of(sizes, block_bytes))], "seeds")
    print(recommendation(curve, 0.9).text("device"))
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numba import njit

from dsatrace.errors import UserError
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.study.requests import StudyRequests, block_trace
from dsatrace.study.run import LARGEST
from dsatrace.study.spread import Kind, pooled, with_intervals
from dsatrace.study.sweep import SweepSettings, policy_runs, sweep
from dsatrace.study.sweep_cells import (
    BYPASS,
    LRU,
    OPT,
    OVERALL,
    POOL,
    Cell,
    Cells,
    Given,
    added,
    pool_cells,
)
from dsatrace.text import counted
from dsatrace.units import size_text

Routing = Literal["round-robin", "prefix-affine"]
UNLIMITED = "vllm, no limit"
SHOWN = (LRU, POOL, OPT, BYPASS)
NUM_SIZES = 10
"""Powers of two up to what holds the whole workload: a factor of 512 between the first and the last."""
MATCH_SHARE = 0.5
"""Prefix-affine: a request goes where at least this share of its prompt's blocks was served before,"""
MOST_LOAD = 1.5
"""unless that replica was given more than so many times an even share of the tokens."""


def replica_traces(
    requests: StudyRequests, block_size: int, replicas: int, routing: Routing
) -> list[BlockTrace]:
    """The blocks of each replica's requests, in order of arrival. Raises `UserError` if one gets none."""
    whole = block_trace(requests, block_size)
    if replicas == 1:
        return [whole]
    if whole.num_requests < replicas:
        raise UserError(f"--replicas {replicas}: there are only {counted(whole.num_requests, 'request')}")
    to = np.arange(whole.num_requests) % replicas
    if routing == "prefix-affine":
        to = _by_prefix(
            whole.keys, whole.key_ptr, whole.prompt_blocks, whole.total_tokens, whole.num_keys, replicas
        )
    counts = np.bincount(to, minlength=replicas)
    if not counts.all():
        raise UserError(f"--replicas {replicas}: {routing} routing leaves replica {counts.argmin()} idle")
    return [
        block_trace(requests.take(np.flatnonzero(to == replica)), block_size) for replica in range(replicas)
    ]


@njit(nogil=True)
def _by_prefix(
    keys: np.ndarray,
    key_ptr: np.ndarray,
    prompt_blocks: np.ndarray,
    total_tokens: np.ndarray,
    num_keys: int,
    replicas: int,
) -> np.ndarray:
    """(R,) the replica that served the longest known prefix last, if it is long enough and the replica not
    overloaded; else the one that was given the fewest tokens. Knows what was served, not what is still
    cached."""
    owner = np.full(num_keys, -1, np.int32)
    tokens, share = np.zeros(replicas, np.int64), 0.0
    to = np.zeros(len(prompt_blocks), np.int64)
    for request in range(len(prompt_blocks)):
        begin, end = key_ptr[request], key_ptr[request + 1]
        stop = min(end, begin + prompt_blocks[request])
        at = begin
        while at < stop and owner[keys[at]] >= 0:
            at += 1
        replica = np.argmin(tokens)
        if at > begin and at - begin >= MATCH_SHARE * prompt_blocks[request]:
            known = owner[keys[at - 1]]
            if tokens[known] <= MOST_LOAD * share:
                replica = known
        to[request] = replica
        tokens[replica] += total_tokens[request]
        share += total_tokens[request] / replicas
        for place in range(begin, end):
            owner[keys[place]] = replica
    return to


def working_set(traces: Sequence[BlockTrace]) -> int:
    """Different blocks that the replica with the most of them sees."""
    return max(trace.num_keys for trace in traces)


def default_sizes(traces: Sequence[BlockTrace], block_bytes: int) -> list[int]:
    """Powers of two in bytes, ascending; the last holds every block of a replica."""
    top = 1 << (working_set(traces) * block_bytes - 1).bit_length()
    return sorted(top >> i for i in range(NUM_SIZES) if top >> i >= block_bytes)


def settings_of(
    sizes: Sequence[int], block_bytes: int, concurrency: int = 1, by_conversation: bool = False
) -> SweepSettings:
    """LRU and OPT, with what a sweep adds, at these sizes. Raises `UserError` for one below a block."""
    capacities = tuple(size // block_bytes for size in sizes)
    if not capacities[0]:
        raise UserError(
            f"--gib: {size_text(sizes[0])} is less than a block, which has {size_text(block_bytes)}"
        )
    if capacities[-1] > LARGEST:
        raise UserError(f"--gib: {size_text(sizes[-1])} is more than {LARGEST:,} blocks")
    if len(set(capacities)) != len(capacities):
        raise UserError(f"--gib: two sizes hold the same number of blocks of {size_text(block_bytes)}")
    runs = policy_runs([LRU])
    return SweepSettings(capacities, runs, concurrency=concurrency, by_conversation=by_conversation)


def size_cells(
    traces: Sequence[BlockTrace],
    settings: SweepSettings,
    workers: int = 1,
    on_done: Callable[[], None] = lambda: None,
) -> Cells:
    """The cells of all replicas together, those of the unlimited pool with the capacity 0."""
    of_replicas = []
    for trace in traces:
        one = dataclasses.replace(trace, workload=np.zeros_like(trace.workload), workload_names=("",))
        cells = sweep({(OVERALL, one.block_size): one}, settings, workers, on_done)
        given = Given.of(one, settings.concurrency, settings.by_conversation)
        (most,) = pool_cells(OVERALL, given, max(1, one.num_blocks_at_most), settings.concurrency)
        cells.append(dataclasses.replace(most, policy=UNLIMITED, capacity_blocks=0))
        of_replicas.append([cell for cell in cells if cell.policy in (*SHOWN, UNLIMITED)])
    # Groups of conversations stay groups; a seed is one part, however many replicas serve it.
    together = np.concatenate if settings.by_conversation else functools.partial(np.sum, axis=0)
    return [added(same, together([cell.parts for cell in same])) for same in zip(*of_replicas, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class SizeCurve:
    """Hit rates of full prompt blocks at S sizes, ascending."""

    block_bytes: int
    sizes: tuple[int, ...]  # (S,) bytes on one device
    rates: dict[str, tuple[Cell, ...]]  # of each policy, (S,)
    unlimited: Cell

    @classmethod
    def of(cls, block_bytes: int, sizes: Sequence[int], of_seeds: Sequence[Cells], kind: Kind) -> SizeCurve:
        cells = with_intervals(pooled(of_seeds), kind)
        rates = {name: tuple(cell for cell in cells if cell.policy == name) for name in SHOWN}
        (unlimited,) = (cell for cell in cells if cell.policy == UNLIMITED)
        return cls(block_bytes, tuple(sizes), rates, unlimited)

    def rows(self) -> list[dict[str, Any]]:
        """A row per policy and size, with its bytes; the unlimited pool's bytes and blocks are null."""
        rows: list[dict[str, Any]] = [
            {"bytes_per_device": size, **cell.row()}
            for cells in self.rates.values()
            for size, cell in zip(self.sizes, cells, strict=True)
        ]
        nothing = {"bytes_per_device": None, "capacity_blocks": None, "capacity_tokens": None}
        return [*rows, {**nothing, **self.unlimited.row(), **nothing}]


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The least size of the curve at which the engine's pool hits the target's share of the unlimited pool.

    If none does, the largest size. Rates are those of the curve's cells. After the largest there is no next.
    """

    target: float  # share of the unlimited hit rate
    is_reached: bool
    bytes_per_device: int
    hit_rate: float
    hit_rate_low: float | None  # 95 % interval
    hit_rate_high: float | None
    unlimited_hit_rate: float
    opt_hit_rate: float  # at that size
    next_bytes: int | None
    next_hit_rate: float | None

    def text(self, device: str) -> str:
        """Two or three sentences. `device` says what has that size."""
        size, most = size_text(self.bytes_per_device), f"{100 * self.unlimited_hit_rate:.1f} %"
        if not self.unlimited_hit_rate:
            return "No cache of any size hits: no full prompt block is looked up again."
        share = self.hit_rate / self.unlimited_hit_rate
        spread = "one set of requests, no interval"
        if self.hit_rate_low is not None and self.hit_rate_high is not None:
            spread = f"95 %: {100 * self.hit_rate_low:.1f} to {100 * self.hit_rate_high:.1f}"
        here = f"{100 * self.hit_rate:.1f} % of prompt blocks hit ({spread}), of at most {most} at any size"
        if not self.is_reached:
            least = f"No size here serves {100 * self.target:g} % of what any size could"
            return f"{least}; {size} {device} serve {100 * share:.1f} %: {here}."
        text = f"{size} {device} serve {100 * share:.1f} % of what any size could: {here}."
        if self.next_bytes is not None and self.next_hit_rate is not None:
            is_twice = self.next_bytes == 2 * self.bytes_per_device
            more = "Doubling" if is_twice else f"The next size, {size_text(self.next_bytes)},"
            text += f" {more} adds {100 * (self.next_hit_rate - self.hit_rate):.1f} points."
        return f"{text} The best policy of that size would hit {100 * self.opt_hit_rate:.1f} %."


def recommendation(curve: SizeCurve, target: float) -> Recommendation:
    """From the engine's pool on the curve."""
    pool, most = curve.rates[POOL], curve.unlimited.hit_rate
    reached = [i for i, cell in enumerate(pool) if cell.hit_rate >= target * most]
    at = reached[0] if reached else len(pool) - 1
    is_last = at + 1 == len(pool)
    return Recommendation(
        target,
        bool(reached),
        curve.sizes[at],
        pool[at].hit_rate,
        pool[at].hit_rate_low,
        pool[at].hit_rate_high,
        most,
        curve.rates[OPT][at].hit_rate,
        None if is_last else curve.sizes[at + 1],
        None if is_last else pool[at + 1].hit_rate,
    )
