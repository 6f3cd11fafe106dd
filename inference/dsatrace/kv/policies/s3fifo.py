"""S3-FIFO: a small queue that new blocks must pass, a main queue, and ghosts of evicted blocks.

After Yang et al. (SOSP 2023). Only blocks that were used while in the small queue reach the main one, which
sends a used block to its back, once per use. A block evicted from the small queue is remembered for a while,
and enters the main one if it returns. As in the authors' simulator, blocks go to the main queue while the
small one is full and nothing has been evicted yet. Blocks that are not evictable are passed over and keep
their place.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsatrace.jit import inner
from dsatrace.kv.policies.compiled import RULES, Access, Cache, Rules, Shape, offer, pop, same_stamp, tick
from dsatrace.kv.policies.lists import IN_NONE, Lists, append, empty_lists, oldest, take_out

SMALL, MAIN = 0, 1
MOST_USES = 3  # two bits


def s3fifo_limits(capacity: int, small: float) -> tuple[int, int]:
    """Target sizes in blocks of the small and the main queue."""
    of_small = max(1, int(capacity * small))
    return of_small, capacity - of_small


class S3FifoState(NamedTuple):
    limits: np.ndarray  # (2,) int64
    most_ghosts: int
    threshold: int
    sizes: np.ndarray  # (2,) int64
    uses: np.ndarray  # (S,) int8
    ghosts: Lists  # one list of blocks
    flags: np.ndarray  # (2,) bool: RETURNING (the last missed block was a ghost), HAS_EVICTED


RETURNING, HAS_EVICTED = 0, 1


def s3fifo_state(shape: Shape, *, small: float, ghost: float, threshold: int) -> S3FifoState:
    return S3FifoState(
        np.array(s3fifo_limits(shape.num_slots, small)),
        int(ghost * shape.num_slots),
        int(threshold),
        np.zeros(2, np.int64),
        np.zeros(shape.num_slots, np.int8),
        empty_lists(shape.num_blocks, 1),
        np.zeros(2, np.bool_),
    )


def _recall(policy: S3FifoState, cache: Cache, block: int, access: Access) -> None:
    policy.flags[RETURNING] = policy.ghosts.list_of[block] != IN_NONE
    if policy.flags[RETURNING]:
        take_out(policy.ghosts, block)


def _to_small_or_main(policy: S3FifoState, cache: Cache, slot: int, access: Access) -> None:
    filling = not policy.flags[HAS_EVICTED] and policy.sizes[SMALL] >= policy.limits[SMALL]
    cache.queue[slot] = MAIN if policy.flags[RETURNING] or filling else SMALL
    policy.sizes[cache.queue[slot]] += 1
    policy.uses[slot] = 0


def _one_more_use(policy: S3FifoState, cache: Cache, slot: int, access: Access) -> None:
    policy.uses[slot] = min(policy.uses[slot] + 1, MOST_USES)


@inner
def _into_main(policy: S3FifoState, cache: Cache, slot: int, uses: int) -> None:
    policy.sizes[cache.queue[slot]] -= 1
    policy.sizes[MAIN] += 1
    policy.uses[slot] = uses
    cache.queue[slot] = MAIN
    cache.stamp[slot] = tick(cache)
    offer(cache, slot)


@inner
def _remember(policy: S3FifoState, block: int) -> None:
    ghosts = policy.ghosts
    if ghosts.size[0] == policy.most_ghosts and ghosts.size[0]:
        take_out(ghosts, oldest(ghosts, 0))
    if policy.most_ghosts:
        append(ghosts, 0, block)


def _small_or_main(policy: S3FifoState, cache: Cache) -> int:
    policy.flags[HAS_EVICTED] = True
    if cache.heap_size[MAIN] == 0 or policy.sizes[MAIN] <= policy.limits[MAIN]:
        while cache.heap_size[SMALL]:
            slot = pop(cache, SMALL)
            if policy.uses[slot] < policy.threshold:
                _remember(policy, cache.block_of[slot])
                return slot
            _into_main(policy, cache, slot, 0)
    while True:
        slot = pop(cache, MAIN)
        if policy.uses[slot] == 0:
            return slot
        _into_main(policy, cache, slot, policy.uses[slot] - 1)


def _is_gone(policy: S3FifoState, cache: Cache, slot: int) -> None:
    policy.sizes[cache.queue[slot]] -= 1


RULES[S3FifoState] = Rules(
    miss=_recall,
    enter=_to_small_or_main,
    again=_one_more_use,
    released=same_stamp,
    victim=_small_or_main,
    left=_is_gone,
)
