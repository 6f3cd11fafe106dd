"""The input of a simulation: requests in order, each the chain of blocks it needs from its first token on.

A block's id is a small integer that stands for its content and everything before it (a node of the
prefix tree), so equal ids mean equal prefixes. A request is in flight until request `release[r]`
arrives. Knows no token, policy or cache.

    stream = AccessStream.of([["a", "b"], ["a", "c"]], times=[0.0, 1.0])
    stream.blocks, stream.starts          # [0 1 0 2], [0 2 4]
    stream.lengths, stream.num_blocks     # [2 2], 3
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from dsatrace.errors import UserError
from dsatrace.jit import cached_njit
from dsatrace.kv.policies.compiled import NEVER
from dsatrace.kv.simulation.block_trace import BlockTrace, offsets_of, parents_of


@dataclasses.dataclass(frozen=True, eq=False)
class AccessStream:
    """R requests with N block accesses in all, over B blocks, in W workloads.

    Raises `UserError` for arrays that contradict each other.
    """

    blocks: np.ndarray  # (N,) int32, 0 <= id < B
    starts: np.ndarray  # (R + 1,) int64, request r has blocks[starts[r]:starts[r + 1]]
    times: np.ndarray  # (R,) float64, seconds, not falling
    workloads: np.ndarray  # (R,) int32, index of workload_names
    release: np.ndarray  # (R,) int64, above r: request r is done before request release[r] arrives
    workload_names: tuple[str, ...] = ("all",)

    @classmethod
    def of(
        cls,
        chains: Iterable[Sequence[Hashable]],
        *,
        times: Sequence[float] | None = None,
        workloads: Sequence[str] | None = None,
        concurrency: int = 1,
    ) -> AccessStream:
        """From chains of ids of any kind; `concurrency` requests are in flight at a time."""
        number: dict[Hashable, int] = {}
        numbered = [[number.setdefault(block, len(number)) for block in chain] for chain in chains]
        num_requests = len(numbered)
        names = tuple(dict.fromkeys(workloads or ("all",)))
        return cls(
            blocks=np.array([block for chain in numbered for block in chain]),
            starts=offsets_of(np.array([len(chain) for chain in numbered], np.int64)),
            times=np.arange(num_requests) if times is None else np.array(times),
            workloads=np.array([names.index(name) for name in workloads or names * num_requests]),
            release=release_by_concurrency(num_requests, concurrency),
            workload_names=names,
        )

    @classmethod
    def of_trace(cls, trace: BlockTrace, concurrency: int = 1) -> AccessStream:
        """A block trace's requests: each is the chain of its prompt's and its output's keys."""
        return cls(
            blocks=trace.keys,
            starts=trace.key_ptr,
            times=trace.time_s,
            workloads=trace.workload,
            release=release_by_concurrency(trace.num_requests, concurrency),
            workload_names=trace.workload_names,
        )

    def __post_init__(self) -> None:
        kinds = (
            ("blocks", np.int32),
            ("starts", np.int64),
            ("times", np.float64),
            ("workloads", np.int32),
            ("release", np.int64),
        )
        for name, kind in kinds:  # one type each, or the replay would be compiled anew
            object.__setattr__(self, name, np.require(getattr(self, name), kind, ["C", "W"]))
        self._check_shapes()
        self._check_values()

    def _check_shapes(self) -> None:
        if len(self.starts) < 1 or self.starts[0] != 0 or self.starts[-1] != len(self.blocks):
            raise UserError(f"starts must run from 0 to the number of accesses, {len(self.blocks)}")
        for name in ("times", "workloads", "release"):
            if len(getattr(self, name)) != self.num_requests:
                raise UserError(
                    f"{name} has {len(getattr(self, name))} entries for {self.num_requests} requests"
                )

    def _check_values(self) -> None:
        if np.any(np.diff(self.starts) < 0):
            raise UserError(f"starts fall at request {int(np.argmax(np.diff(self.starts) < 0))}")
        if np.any(self.blocks < 0):
            raise UserError(f"block ids must not be negative: {int(self.blocks.min())}")
        if np.any(np.diff(self.times) < 0):
            at = int(np.argmax(np.diff(self.times) < 0)) + 1
            raise UserError(f"request {at} comes before the one above it; sort requests by time")
        if np.any(self.release <= np.arange(self.num_requests)):
            raise UserError("a request cannot be released before it comes: release[r] must exceed r")
        if self.num_requests and not 0 <= self.workloads.min() <= self.workloads.max() < self.num_workloads:
            raise UserError(f"workloads must be indices of workload_names {list(self.workload_names)}")
        repeated = _repeated_block(self.blocks, self.starts, self.num_blocks)
        if repeated >= 0:
            raise UserError(f"request {repeated} names a block twice; an id stands for a whole prefix")

    @property
    def num_requests(self) -> int:
        return len(self.starts) - 1

    @property
    def num_accesses(self) -> int:
        return len(self.blocks)

    @property
    def num_workloads(self) -> int:
        return len(self.workload_names)

    @functools.cached_property
    def num_blocks(self) -> int:
        """B: ids are below it."""
        return int(self.blocks.max()) + 1 if len(self.blocks) else 0

    @property
    def lengths(self) -> np.ndarray:
        """Blocks of each request, (R,) int64."""
        return np.diff(self.starts)

    @functools.cached_property
    def parents(self) -> np.ndarray:
        """The block each block follows, (B,) int32, `NO_PARENT` for a first one.

        Raises `UserError` when an id follows two different blocks.
        """
        parents, wrong = parents_of(self.blocks, self.starts, self.num_blocks)
        if wrong is not None:
            request, block = wrong
            raise UserError(
                f"block {block} of request {request} also follows another block elsewhere; "
                "the leaf constraint needs ids that stand for whole prefixes"
            )
        return parents

    @functools.cached_property
    def release_order(self) -> np.ndarray:
        """Requests in the order of their release, (R,) int64."""
        return np.argsort(self.release, kind="stable")

    def next_use(self, held: np.ndarray) -> np.ndarray:
        """The position of the next access to each access's block, or `NEVER`: (N,) int64.

        Only the first `held[r]` blocks of request r count as accesses.
        """
        positions: np.ndarray = _next_use(self.blocks, self.starts, held, self.num_blocks)
        return positions

    def by_workload(self, of_requests: np.ndarray) -> np.ndarray:
        """Sums of (R,) counts over each workload's requests, (W,) int64."""
        return np.bincount(self.workloads, of_requests, self.num_workloads).astype(np.int64)

    def head(self, share: float) -> AccessStream:
        """The first requests: this share of them, at least one."""
        return self.select(np.arange(self.num_requests) < max(1, round(share * self.num_requests)))

    def select(self, chosen: np.ndarray) -> AccessStream:
        """The stream of these requests alone, in flight beside each other as before; chosen is (R,) bool."""
        kept = np.flatnonzero(chosen)
        return dataclasses.replace(
            self,
            blocks=self.blocks[np.repeat(chosen, self.lengths)],
            starts=offsets_of(self.lengths[kept]),
            times=self.times[kept],
            workloads=self.workloads[kept],
            release=np.searchsorted(kept, self.release[kept]),
        )


def release_by_concurrency(num_requests: int, concurrency: int) -> np.ndarray:
    """`release` where a request ends when the `concurrency`-th after it comes; 1 is one at a time."""
    if concurrency < 1:
        raise UserError(f"concurrency must be at least 1, not {concurrency}")
    return np.arange(num_requests, dtype=np.int64) + concurrency


@cached_njit(nogil=True)
def _repeated_block(blocks: np.ndarray, starts: np.ndarray, num_blocks: int) -> int:
    """The first request that names a block twice, or -1."""
    named_by = np.full(num_blocks, -1, np.int32)
    for request in range(len(starts) - 1):
        for at in range(starts[request], starts[request + 1]):
            if named_by[blocks[at]] == request:
                return request
            named_by[blocks[at]] = request
    return -1


@cached_njit(nogil=True)
def _next_use(blocks: np.ndarray, starts: np.ndarray, held: np.ndarray, num_blocks: int) -> np.ndarray:
    coming = np.full(num_blocks, NEVER, np.int64)
    result = np.full(len(blocks), NEVER, np.int64)
    for request in range(len(starts) - 2, -1, -1):
        begin = starts[request]
        for at in range(begin, begin + held[request]):
            result[at] = coming[blocks[at]]
            coming[blocks[at]] = at
    return result
