"""ARC: shares the cache between blocks used once and more often, and learns the share.

After Megiddo and Modha (FAST 2003): T1 and T2 hold blocks used once and more often; B1 and B2, their
ghosts, remember the blocks that each evicted last. A block that returns from B1 shows that T1 was too
small, one from B2 that T2 was; `target` is the desired size of T1. If T1 or T2 has no evictable
block, the other one gives one up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsatrace.jit import inner
from dsatrace.kv.policies.compiled import RULES, Access, Cache, Rules, Shape, pop
from dsatrace.kv.policies.lists import IN_NONE, Lists, append, empty_lists, oldest, take_out

ONCE, OFTEN = 0, 1  # T1 and T2; B1 and B2 of the ghosts


class ArcState(NamedTuple):
    """For the paper's cases I to IV."""

    target: np.ndarray  # (1,) float64
    sizes: np.ndarray  # (2,) int64
    ghosts: Lists  # two lists of blocks
    returning_to: np.ndarray  # (1,) int64, IN_NONE if the missed block was no ghost


def arc_state(shape: Shape) -> ArcState:
    return ArcState(
        np.zeros(1), np.zeros(2, np.int64), empty_lists(shape.num_blocks, 2), np.zeros(1, np.int64)
    )


def _recall(policy: ArcState, cache: Cache, block: int, access: Access) -> None:
    ghosts = policy.ghosts
    which = np.int64(ghosts.list_of[block])
    policy.returning_to[0] = which
    if which == IN_NONE:
        return
    step = max(1.0, ghosts.size[1 - which] / ghosts.size[which])
    change = step if which == ONCE else -step
    policy.target[0] = min(max(policy.target[0] + change, 0.0), float(len(cache.block_of)))
    take_out(ghosts, block)


def _once_or_often(policy: ArcState, cache: Cache, slot: int, access: Access) -> None:
    cache.queue[slot] = ONCE if policy.returning_to[0] == IN_NONE else OFTEN
    policy.sizes[cache.queue[slot]] += 1


def _often(policy: ArcState, cache: Cache, slot: int, access: Access) -> None:
    policy.sizes[cache.queue[slot]] -= 1
    cache.queue[slot] = OFTEN
    policy.sizes[OFTEN] += 1


@inner
def _drop_oldest(ghosts: Lists, which: int) -> None:
    if ghosts.size[which]:
        take_out(ghosts, oldest(ghosts, which))


def _replace(policy: ArcState, cache: Cache) -> int:
    ghosts, sizes, capacity = policy.ghosts, policy.sizes, len(cache.block_of)
    if policy.returning_to[0] == IN_NONE:
        if sizes[ONCE] + ghosts.size[ONCE] >= capacity:
            if ghosts.size[ONCE] == 0 and cache.heap_size[ONCE]:
                return pop(cache, ONCE)
            _drop_oldest(ghosts, ONCE)
        elif sizes[ONCE] + sizes[OFTEN] + ghosts.size[ONCE] + ghosts.size[OFTEN] >= 2 * capacity:
            _drop_oldest(ghosts, OFTEN)
    size, target = sizes[ONCE], policy.target[0]
    from_once = size > target or (size == target and policy.returning_to[0] == OFTEN)
    queue = ONCE if from_once else OFTEN
    if cache.heap_size[queue] == 0:
        queue = 1 - queue
    slot = pop(cache, queue)
    append(ghosts, queue, cache.block_of[slot])
    return slot


def _is_gone(policy: ArcState, cache: Cache, slot: int) -> None:
    policy.sizes[cache.queue[slot]] -= 1


RULES[ArcState] = Rules(miss=_recall, enter=_once_or_often, again=_often, victim=_replace, left=_is_gone)
