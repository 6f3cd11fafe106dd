"""ARC: shares the cache between blocks used once and more often, and learns the share.

After Megiddo and Modha (FAST 2003): T1 and T2 hold blocks used once and more often; B1 and B2, their
ghosts, remember the blocks that each evicted last. A block that returns from B1 shows that T1 was too
small, one from B2 that T2 was; `target` is the desired size of T1. If T1 or T2 has no evictable
block, the other one gives one up.

    Arc(capacity)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsatrace.jit import inner
from dsatrace.kv.policies.compiled import RULES, Cache, Rules, Shape, pop
from dsatrace.kv.policies.lists import IN_NONE, Lists, append, empty_lists, oldest, take_out
from dsatrace.kv.policies.policy import Access, PlainPolicy

ONCE, OFTEN = 0, 1  # T1 and T2; B1 and B2 of the ghosts


class Arc(PlainPolicy):
    """Implements the paper's cases I to IV."""

    def __init__(self, capacity: int, *, leaf: bool = False) -> None:
        super().__init__(capacity, leaf=leaf, num_queues=2)
        self._target = 0.0
        self._sizes = [0, 0]
        self._ghosts: tuple[dict[int, None], dict[int, None]] = ({}, {})  # oldest first
        self._missed: int | None = None
        self._returning_to: int | None = None  # the queue whose ghost the missed block was

    def miss(self, block: int, access: Access) -> None:
        self._missed, self._returning_to = block, None
        for which in (ONCE, OFTEN):
            own, others = self._ghosts[which], self._ghosts[1 - which]
            if block in own:
                step = max(1.0, len(others) / len(own))
                change = step if which == ONCE else -step
                self._target = min(max(self._target + change, 0.0), float(self.capacity))
                del own[block]
                self._returning_to = which

    def enter(self, block: int, access: Access) -> None:
        if self._missed != block:
            self.miss(block, access)
        self.queue[block] = ONCE if self._returning_to is None else OFTEN
        self._sizes[self.queue[block]] += 1
        self._missed = self._returning_to = None

    def again(self, block: int, access: Access) -> None:
        self._sizes[self.queue[block]] -= 1
        self.queue[block] = OFTEN
        self._sizes[OFTEN] += 1

    def victim(self) -> int:
        once, often = self._ghosts
        if self._returning_to is None:
            if self._sizes[ONCE] + len(once) >= self.capacity:
                if not once and self.first(ONCE) is not None:
                    return self.pop(ONCE)  # not remembered
                self._drop_oldest(once)
            elif len(self) + len(once) + len(often) >= 2 * self.capacity:
                self._drop_oldest(often)
        size, target = self._sizes[ONCE], self._target
        from_once = size > target or (size == target and self._returning_to == OFTEN)
        queue = ONCE if from_once else OFTEN
        if self.first(queue) is None:
            queue = 1 - queue
        block = self.pop(queue)
        self._ghosts[queue][block] = None
        return block

    def left(self, block: int) -> None:
        self._sizes[self.queue[block]] -= 1

    @staticmethod
    def _drop_oldest(ghosts: dict[int, None]) -> None:
        if ghosts:
            del ghosts[next(iter(ghosts))]


class ArcState(NamedTuple):
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
