"""Policies that look at the request: priorities, admission by workload, tails, probability of reuse.

Workloads are indices of the stream's; their worth is given, or measured by `reuse`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsatrace.jit import inner
from dsatrace.kv.policies.compiled import RULES, Access, Cache, Rules, Shape, first, pop, same_stamp, tick


class ByWorkloadState(NamedTuple):
    """Evicts the lowest worth first; among equals, the least recent.

    A block's worth is the highest worth of the workloads that used it since it was cached: a
    priority; or 1 for admitted workloads and 0 for the rest, whose blocks stay only while the room
    is not needed. Before `since_s` all workloads are worth as much as the best: LRU.
    """

    worth: np.ndarray  # (W,) float64
    best: float  # the largest
    since_s: float


def by_workload_state(shape: Shape, *, worth: Sequence[float], since_s: float = 0.0) -> ByWorkloadState:
    return ByWorkloadState(np.array(worth, np.float64), float(max(worth)), float(since_s))


def _worth(policy: ByWorkloadState, cache: Cache, slot: int, access: Access) -> None:
    cache.value[slot] = policy.worth[access.workload] if access.time >= policy.since_s else policy.best


def _greatest_worth(policy: ByWorkloadState, cache: Cache, slot: int, access: Access) -> None:
    worth = policy.worth[access.workload] if access.time >= policy.since_s else policy.best
    cache.value[slot] = max(cache.value[slot], worth)


RULES[ByWorkloadState] = Rules(enter=_worth, again=_greatest_worth)


class TailFirstState(NamedTuple):
    """Evicts the ends of requests that a next turn can recompute in time, then LRU.

    A turn can compute a certain number of blocks within its latency target, and its new prompt needs
    some of them. The rest, `slack`, may be missing at the end of its earlier turns. Improves the tail of
    the latency, not the hit rate.
    """

    slack: int


def tail_first_state(shape: Shape, *, slack_blocks: int) -> TailFirstState:
    return TailFirstState(int(slack_blocks))


def _is_needed(policy: TailFirstState, cache: Cache, slot: int, access: Access) -> None:
    cache.value[slot] = 1.0 if access.from_end >= policy.slack else 0.0


RULES[TailFirstState] = Rules(enter=_is_needed, again=_is_needed)

AGE_WEIGHT = 1 / 64
"""Weight of each further evicted block's age in the expected lifespan."""


class ReuseProbabilityState(NamedTuple):
    """Evicts the block least likely to be reused within the time a block can expect to stay.

    Of workload w a share p(w) of uses is followed by another, after a time that is
    exponential with mean m(w). A block unused for t seconds is then reused within the next
    L seconds with the probability

        p e^(-t/m) (1 - e^(-L/m)) / (1 - p + p e^(-t/m))

    where L is the running mean of the age of evicted blocks. It falls with t, so each workload's
    least recent block is its candidate; of equals, the deeper block is evicted. Before `since_s` the
    least recent of the candidates goes, as in LRU.
    """

    probability: np.ndarray  # (W,) float64
    mean: np.ndarray  # (W,) float64, seconds
    used_at: np.ndarray  # (S,) float64, seconds
    depth: np.ndarray  # (S,) int64
    clock: np.ndarray  # (2,) float64: NOW and LIFESPAN, seconds
    since_s: float


NOW, LIFESPAN = 0, 1


def reuse_probability_state(
    shape: Shape, *, reuse_probability: Sequence[float], mean_reuse_s: Sequence[float], since_s: float = 0.0
) -> ReuseProbabilityState:
    return ReuseProbabilityState(
        np.array(reuse_probability, np.float64),
        np.array(mean_reuse_s, np.float64),
        np.zeros(shape.num_slots),
        np.zeros(shape.num_slots, np.int64),
        np.zeros(2),
        float(since_s),
    )


def _set_clock(policy: ReuseProbabilityState, cache: Cache, block: int, access: Access) -> None:
    policy.clock[NOW] = access.time


def _note_use(policy: ReuseProbabilityState, cache: Cache, slot: int, access: Access) -> None:
    cache.queue[slot] = access.workload
    cache.stamp[slot] = tick(cache)
    policy.clock[NOW] = access.time
    policy.used_at[slot] = access.time
    policy.depth[slot] = access.depth


@inner
def _score(policy: ReuseProbabilityState, workload: int, slot: int) -> float:
    mean, probability = policy.mean[workload], policy.probability[workload]
    if policy.clock[NOW] < policy.since_s:
        used: float = policy.used_at[slot] - policy.clock[NOW]
        return used
    still = probability * math.exp((policy.used_at[slot] - policy.clock[NOW]) / mean)
    score: float = still * (1 - math.exp(-policy.clock[LIFESPAN] / mean)) / (1 - probability + still)
    return score


def _least_likely(policy: ReuseProbabilityState, cache: Cache) -> int:
    chosen, depth, lowest = -1, -1, np.inf
    for workload in range(len(policy.mean)):
        if cache.heap_size[workload] == 0:
            continue
        slot = first(cache, workload)
        score = _score(policy, workload, slot)
        if score < lowest or (score == lowest and policy.depth[slot] > depth):
            chosen, depth, lowest = workload, policy.depth[slot], score
    slot = pop(cache, chosen)
    age = policy.clock[NOW] - policy.used_at[slot]
    policy.clock[LIFESPAN] += (age - policy.clock[LIFESPAN]) * AGE_WEIGHT
    return slot


RULES[ReuseProbabilityState] = Rules(
    miss=_set_clock, enter=_note_use, again=_note_use, released=same_stamp, victim=_least_likely
)
