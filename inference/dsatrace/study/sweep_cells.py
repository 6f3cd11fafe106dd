"""One cell of a sweep: a policy, a capacity, a block size and a trace, and the counts it gives.

Requests are served from a cache of `capacity` blocks, and hold their blocks until they end.
`accesses` are the full blocks of a prompt. `hits` are those found before the first that is
missing: a contiguous prefix. `misses` are the rest. `block_hits` also has those found behind a
gap. The full blocks of the output are cached too, and never looked up; one that was cached
already, behind a cached prompt, counts as an `output_hit` only, because an engine computes it
again. A prompt that needs more blocks than the cache has, its last partial one included, is
rejected, and all its blocks are misses (`oversize="reject"`), or its first blocks are held and the
rest are misses (`"truncate"`): the accesses are the same at every capacity. Output blocks that do
not fit are dropped.

That is vLLM's block pool under LRU, except that the pool (the cell `vllm`, which replays it)
1. also needs a block for each request's last, partial one. One request at a time, with one
   such block each, the pool with capacity C hits exactly what LRU hits with C - 1;
2. keeps a second copy of a block that it computes again, which takes a block of room;
3. computes the last block of a wholly cached prompt again if the prompt ends with it;
4. gives room to output blocks of unknown content while they are in use.
So LRU at C - 1 <= pool at C <= LRU at C, except for 2 to 4. OPT bounds hits and output hits
together, so it bounds hits if no output repeats; `opt-bypass` bounds them always. Knows no file
and no process.

    given = Given.of(trace)
    lru_cells("qa", given, [64, 128], "reject")
    simulated_cells("qa", given, PolicyRun("fifo", leaf=True), 64, "reject")
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsatrace.errors import UserError
from dsatrace.kv.policies.bypass import bypassing_hits
from dsatrace.kv.policies.registry import policy_info
from dsatrace.kv.policies.simulate import Oversize, simulate
from dsatrace.kv.policies.stack_distance import lru_hits_at
from dsatrace.kv.policies.stream import AccessStream
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.kv.simulation.replay import ReplayConfig, replay
from dsatrace.study.requests import conversation_groups

OVERALL = "overall"
ADMIT = "admit-"  # before a policy's name
OPT, LRU, POOL, BYPASS = "opt", "lru", "vllm", "opt-bypass"

SEMANTICS = {
    "accesses": "full blocks of all prompts, those of rejected requests too",
    "hits": "of those, cached blocks before a request's first that is not (contiguous prefix)",
    "misses": "accesses - hits",
    "block_hits": "cached blocks wherever they stand in the prompt (flat: or in an output that repeats)",
    "output_hits": "blocks of outputs that were cached already behind a cached prompt; no part of hits",
    "hit_rate": "hits / accesses; 0 where there are no accesses",
    "hit_rate_low, hit_rate_high": "95 % interval: over seeds, or bootstrapped over conversations of a log",
    "gain": "hit_rate less that of lru on the same requests, with the interval of the paired difference",
    "admit-lru": "lru that never inserts the blocks of workloads that are not admitted",
    "policy": "no block is evicted while a cached one follows it; NAME-flat is without that rule",
    "in flight": "a request holds its blocks until --concurrency later ones have come",
    "outputs": "full blocks of outputs are cached, where the trace tells their content",
    "rejected": "prompts of more blocks than the cache has, the last partial one included",
    "rejected_accesses": "full blocks of the prompts of rejected requests, all of them misses",
    "opt": "evicts the block whose next use is farthest. It holds every request that it serves and leaves "
    "no block out: over all of a trace no such policy has more hits and output_hits together",
    "opt-bypass": "keeps after each request the blocks that are looked up again first, and leaves the others "
    "out; it holds no request, so it rejects none: the most hits that any cache can have, and the bound "
    "of a tier behind the device",
    "vllm": "vLLM's block pool (free order of 2026-05 and later) with as many usable blocks; unlike lru it "
    "also takes a block for each partial one in use and for second copies, and computes the last block "
    "of a wholly cached prompt again",
}
"""What a result file says of its columns."""

Cells = list["Cell"]
MAX_GROUPS = 64
"""Of conversations; a bootstrap draws them. One pass of LRU counts hits by group and capacity."""


@dataclasses.dataclass(frozen=True)
class PolicyRun:
    """A policy as it is replayed: leaf-constrained or flat, with its parameters.

    With `admit`, requests of other workloads are never inserted; before `since_s` all are.
    """

    policy: str
    leaf: bool = True
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    admit: tuple[str, ...] | None = None
    since_s: float = 0.0

    @property
    def name(self) -> str:
        """`fifo` is leaf-constrained, `fifo-flat` is not. If both hit the same, there is one name."""
        name = self.policy if self.admit is None else f"{ADMIT}{self.policy}"
        return name if self.leaf or policy_info(self.policy).leaf_first else f"{name}-flat"

    def admitted(self, stream: AccessStream) -> NDArray[np.bool_] | None:
        """(R,) whether each request is inserted, None for all. Raises a `UserError` for an unknown name."""
        if self.admit is None:
            return None
        unknown = sorted(set(self.admit) - set(stream.workload_names))
        if unknown:
            there = ", ".join(stream.workload_names)
            raise UserError(f"--admit names workloads, unknown: {', '.join(unknown)}; there are {there}")
        welcome = np.array([name in self.admit for name in stream.workload_names])
        mask: NDArray[np.bool_] = welcome[stream.workloads] | (stream.times < self.since_s)
        return mask


COUNTED = (
    "requests", "rejected", "accesses", "hits", "misses", "block_hits", "output_hits", "rejected_accesses",
)  # fmt: skip
"""The counts of a cell."""
DIGITS = 6
"""Decimals of a rate in files; of an interval in tables, too, which are shown again from the files."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Counts of one workload, or of all workloads of the trace (`overall`)."""

    workload: str
    block_size: int  # tokens
    capacity_blocks: int
    policy: str  # see `PolicyRun.name`, or `vllm`
    requests: int
    rejected: int  # of those
    accesses: int
    hits: int
    misses: int
    block_hits: int
    output_hits: int
    rejected_accesses: int  # of the misses
    hit_rate_low: float | None = None  # 95 % interval, see `spread`
    hit_rate_high: float | None = None
    gain: float | None = None  # hit rate less LRU's
    gain_low: float | None = None
    gain_high: float | None = None
    parts: NDArray[np.int64] = dataclasses.field(  # (P, 2) hits and accesses of each part
        default_factory=lambda: np.zeros((0, 2), np.int64), repr=False, compare=False
    )

    @property
    def capacity_tokens(self) -> int:
        return self.block_size * self.capacity_blocks

    @property
    def hit_rate(self) -> float:
        """hits / accesses; 0 without accesses."""
        return self.hits / max(self.accesses, 1)

    @property
    def block_hit_rate(self) -> float:
        return self.block_hits / max(self.accesses, 1)

    def row(self) -> dict[str, str | int | float | None]:
        """The columns of CSV and JSON."""
        values = {name: value for name, value in vars(self).items() if name != "parts"}
        values |= {
            "capacity_tokens": self.capacity_tokens,
            "hit_rate": self.hit_rate,
            "block_hit_rate": self.block_hit_rate,
        }
        return {
            name: round(value, DIGITS) if isinstance(value, float) else value
            for name, value in values.items()
        }


def added(cells: Sequence[Cell], parts: NDArray[np.int64]) -> Cell:
    """The counts of the same cell in several replays, added up."""
    return dataclasses.replace(
        cells[0], **{name: sum(getattr(cell, name) for cell in cells) for name in COUNTED}, parts=parts
    )


def conversation_parts(conversation: NDArray[np.integer]) -> NDArray[np.int64]:
    """(R,) at most `MAX_GROUPS` groups of whole conversations; a request of none (-1) is a conversation."""
    number = conversation_groups(conversation)
    shuffled = np.random.default_rng(0).permutation(number.max(initial=0) + 1)
    return (shuffled[number] % MAX_GROUPS).astype(np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """R requests in blocks, as the pool and as the policies read them, in W workloads and P parts."""

    trace: BlockTrace
    stream: AccessStream
    part: NDArray[np.int64]  # (R,) the part that each request is counted in
    num_parts: int

    @classmethod
    def of(cls, trace: BlockTrace, concurrency: int = 1, by_conversation: bool = False) -> Given:
        """One part, or at most `MAX_GROUPS` groups of conversations; without one, a request is its own."""
        stream = AccessStream.of_trace(trace, concurrency)
        part = np.zeros(trace.num_requests, np.int64)
        if by_conversation:
            part = conversation_parts(trace.conversation)
        return cls(trace, stream, part, int(part.max(initial=0)) + 1)

    @property
    def label(self) -> NDArray[np.int64]:
        """(R,) each request's workload and part as one number."""
        return self.stream.workloads * self.num_parts + self.part

    def summed(self, column: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """(W, P) sums of a column of all requests, or of those of the mask."""
        label = self.label if mask is None else self.label[mask]
        size = self.stream.num_workloads * self.num_parts
        return np.bincount(label, column, size).astype(np.int64).reshape(-1, self.num_parts)


def num_repeated_outputs(trace: BlockTrace) -> int:
    """Blocks of outputs that occurred before in the trace."""
    place = np.arange(len(trace.keys))
    is_output = place >= np.repeat(trace.key_ptr[:-1] + trace.prompt_blocks, np.diff(trace.key_ptr))
    first = np.unique(trace.keys, return_index=True)[1]
    return int(np.count_nonzero(is_output & (first[trace.keys] != place)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Served:
    """The requests that a cache of one size serves; `part` is their stream."""

    given: Given
    mask: NDArray[np.bool_]  # (R,)
    part: AccessStream

    @classmethod
    def at(cls, given: Given, capacity: int, oversize: Oversize) -> _Served:
        mask = (given.trace.needed_blocks <= capacity) | (oversize == "truncate")
        return cls(given, mask, given.stream if mask.all() else given.stream.select(mask))

    def cells(self, trace: str, capacity: int, policy: str, counts: Sequence[NDArray[np.int64]]) -> Cells:
        """From hits, block hits and output hits, (W, P) each: a cell per workload, `overall` of several."""
        given, blocks = self.given, self.given.trace.prompt_blocks
        requests, rejected = given.summed(np.ones(len(blocks))), given.summed(~self.mask)
        accesses, rejected_accesses = given.summed(blocks), given.summed(np.where(self.mask, 0, blocks))
        hits, block_hits, output_hits = counts

        def cell(name: str, which: slice) -> Cell:
            columns = (requests, rejected, accesses, hits, accesses - hits, block_hits, output_hits)
            sums = [int(column[which].sum()) for column in (*columns, rejected_accesses)]
            parts = np.stack([column[which].sum(axis=0) for column in (hits, accesses)], axis=1)
            named = dict(zip(COUNTED, sums, strict=True))
            return Cell(name, given.trace.block_size, capacity, policy, parts=parts, **named)

        names = given.stream.workload_names
        if len(names) == 1:
            return [cell(trace, slice(None))]
        return [cell(OVERALL, slice(None)), *(cell(name, slice(i, i + 1)) for i, name in enumerate(names))]


def lru_cells(trace: str, given: Given, capacities: Sequence[int], oversize: Oversize) -> Cells:
    """LRU at all capacities, in one pass per different set of rejected requests.

    If outputs repeat it is simulated, since one pass cannot tell which hits end in an output.
    """
    if num_repeated_outputs(given.trace):
        each = (simulated_cells(trace, given, PolicyRun(LRU), size, oversize) for size in capacities)
        return list(itertools.chain.from_iterable(each))
    served = [_Served.at(given, capacity, oversize) for capacity in capacities]
    num_served = [int(one.mask.sum()) for one in served]
    cells: Cells = []
    shape = (given.stream.num_workloads, given.num_parts)
    for number in sorted(set(num_served)):
        same = [i for i, other in enumerate(num_served) if other == number]
        one = served[same[0]]
        labelled = dataclasses.replace(  # hits by workload and part, which LRU does not look at
            one.part,
            workloads=given.label[one.mask],
            workload_names=tuple(map(str, range(shape[0] * shape[1]))),
        )
        hits = lru_hits_at(labelled, [capacities[i] for i in same])
        for at, i in enumerate(same):
            counts = [by_label[at].reshape(shape) for by_label in (hits.hits, hits.hits_any)]
            cells += served[i].cells(trace, capacities[i], LRU, [*counts, np.zeros_like(counts[0])])
    return cells


def simulated_cells(trace: str, given: Given, run: PolicyRun, capacity: int, oversize: Oversize) -> Cells:
    """Any policy at one capacity."""
    served = _Served.at(given, capacity, oversize)
    admitted = run.admitted(served.part)
    result = simulate(served.part, run.policy, capacity, leaf=run.leaf, admitted=admitted, **run.params)
    prompt_blocks = given.trace.prompt_blocks[served.mask]
    hits = np.minimum(result.hits, prompt_blocks)
    columns = (hits, np.minimum(result.hits_any, prompt_blocks), result.hits - hits)
    return served.cells(trace, capacity, run.name, [given.summed(c, served.mask) for c in columns])


def bypass_cells(trace: str, given: Given, capacity: int) -> Cells:
    """The bound of a tier behind the device, which need not hold what it serves."""
    hits = bypassing_hits(given.stream, given.trace.prompt_blocks, capacity)
    served, summed = _Served.at(given, capacity, "truncate"), given.summed(hits)
    return served.cells(trace, capacity, BYPASS, [summed, summed, np.zeros_like(summed)])


def pool_cells(trace: str, given: Given, capacity: int, concurrency: int) -> Cells:
    """vLLM's block pool with `capacity` usable blocks; it rejects prompts that are too long."""
    room = min(capacity, max(1, given.trace.num_blocks_at_most))  # more is never used, and takes memory
    result = replay(given.trace, ReplayConfig(room, concurrency=concurrency))
    served = _Served.at(given, capacity, "reject")
    assert np.array_equal(served.mask, result.served), "the pool and the policies reject different requests"
    hits = given.summed(result.hit_tokens // given.trace.block_size)
    block_hits = given.summed(result.cached_blocks[served.mask], served.mask)
    return served.cells(trace, capacity, POOL, [hits, block_hits, np.zeros_like(hits)])
