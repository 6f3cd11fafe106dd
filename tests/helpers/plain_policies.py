"""The rules of every policy of the registry, in plain Python.

policy = make_policy("slru", capacity=1000, leaf=True, protected=0.5)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dsatrace.kv.policies.arc import OFTEN, ONCE
from dsatrace.kv.policies.compiled import Access
from dsatrace.kv.policies.frequency import PROBATION, PROTECTED
from dsatrace.kv.policies.registry import Workloads, policy_info
from dsatrace.kv.policies.s3fifo import MAIN, MOST_USES, SMALL, s3fifo_limits
from dsatrace.kv.policies.workload_aware import AGE_WEIGHT
from helpers.plain_policy import NothingEvictable, PlainPolicy

_64_BITS = 2**64 - 1


class Ordered(PlainPolicy):
    """Evicts the block used (or else cached) the longest time ago, or with `newest_first` the shortest."""

    def __init__(self, capacity: int, *, by_recency: bool, newest_first: bool, leaf: bool = False) -> None:
        super().__init__(capacity, leaf=leaf)
        self._by_recency = by_recency
        self._sign = -1 if newest_first else 1

    def enter(self, block: int, access: Access) -> None:
        self.stamp[block] *= self._sign

    def released(self, block: int) -> None:
        if self._by_recency:
            self.stamp[block] = self._sign * self.tick()


class Uniform(PlainPolicy):
    """Evicts any evictable block, each equally likely; a seed repeats its choices."""

    def __init__(self, capacity: int, *, seed: int, leaf: bool = False) -> None:
        super().__init__(capacity, leaf=leaf)
        self._state = seed & _64_BITS
        self._bag: list[int] = []
        self._place: dict[int, int] = {}

    def offer(self, block: int) -> None:
        self._place[block] = len(self._bag)
        self._bag.append(block)

    def withdraw(self, block: int) -> None:
        at, last = self._place.pop(block), self._bag.pop()
        if last != block:
            self._bag[at] = last
            self._place[last] = at

    def victim(self) -> int:
        if not self._bag:
            raise NothingEvictable
        return self._bag[(self._random() >> 32) * len(self._bag) >> 32]

    def _random(self) -> int:
        """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _64_BITS
        bits = self._state
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _64_BITS
        return bits ^ bits >> 31


class Lfu(PlainPolicy):
    """Evicts the block used least often since it was cached; among equals, the least recent."""

    def again(self, block: int, access: Access) -> None:
        self.value[block] += 1


class Slru(PlainPolicy):
    """A block that is used again becomes protected. Beyond the protected share, the least recent
    evictable protected block returns to probation, as its most recent. Probation is evicted first."""

    def __init__(self, capacity: int, *, protected: float, leaf: bool = False) -> None:
        super().__init__(capacity, leaf=leaf, num_queues=2)
        self._limit = max(1, int(protected * capacity))
        self._num_protected = 0

    def again(self, block: int, access: Access) -> None:
        if self.queue[block] == PROTECTED:
            return
        self.queue[block] = PROTECTED
        self._num_protected += 1
        while self._num_protected > self._limit and self.first(PROTECTED) is not None:
            cooled = self.pop(PROTECTED)
            self.queue[cooled], self.stamp[cooled] = PROBATION, self.tick()
            self._num_protected -= 1
            self.offer(cooled)

    def victim(self) -> int:
        return self.pop(PROTECTED if self.first(PROBATION) is None else PROBATION)

    def left(self, block: int) -> None:
        self._num_protected -= self.queue[block] == PROTECTED


class Gdsf(PlainPolicy):
    """Evicts the smallest value: uses x cost, plus the value of the last evicted block.

    All blocks have the same size. The cost is `1 + depth_cost * depth`: attention makes a block
    costlier to recompute the more blocks precede it.
    """

    def __init__(self, capacity: int, *, depth_cost: float, leaf: bool = False) -> None:
        super().__init__(capacity, leaf=leaf)
        self._depth_cost = depth_cost
        self._floor = 0.0
        self._uses: dict[int, int] = {}

    def enter(self, block: int, access: Access) -> None:
        self._uses[block] = 0
        self.again(block, access)

    def again(self, block: int, access: Access) -> None:
        self._uses[block] += 1
        self.value[block] = self._floor + self._uses[block] * (1 + self._depth_cost * access.depth)

    def victim(self) -> int:
        block = self.pop(0)
        self._floor = self.value[block]
        return block

    def left(self, block: int) -> None:
        del self._uses[block]


class S3Fifo(PlainPolicy):
    """New blocks pass a small queue; only those used while in it reach the main queue.

    The main queue sends a used block to its back, once per use. A block evicted from the small queue
    is remembered for a while, and enters the main one if it returns. As in the authors' simulator,
    blocks go to the main queue while the small one is full and nothing has been evicted yet.
    """

    def __init__(
        self, capacity: int, *, small: float, ghost: float, threshold: int, leaf: bool = False
    ) -> None:
        super().__init__(capacity, leaf=leaf, num_queues=2)
        self._limits = s3fifo_limits(capacity, small)
        self._most_ghosts = int(ghost * capacity)
        self._threshold = threshold
        self._sizes = [0, 0]
        self._uses: dict[int, int] = {}
        self._ghosts: dict[int, None] = {}  # oldest first
        self._returns = False
        self._has_evicted = False

    def miss(self, block: int, access: Access) -> None:
        self._returns = block in self._ghosts
        self._ghosts.pop(block, None)

    def enter(self, block: int, access: Access) -> None:
        filling = not self._has_evicted and self._sizes[SMALL] >= self._limits[SMALL]
        self.queue[block] = MAIN if self._returns or filling else SMALL
        self._sizes[self.queue[block]] += 1
        self._uses[block] = 0

    def again(self, block: int, access: Access) -> None:
        self._uses[block] = min(self._uses[block] + 1, MOST_USES)

    def released(self, block: int) -> None:
        pass  # the stamp is that of entry

    def victim(self) -> int:
        self._has_evicted = True
        if self.first(MAIN) is None or self._sizes[MAIN] <= self._limits[MAIN]:
            while self.first(SMALL) is not None:
                block = self.pop(SMALL)
                if self._uses[block] < self._threshold:
                    self._remember(block)
                    return block
                self._to_main(block, 0)
        while True:
            block = self.pop(MAIN)
            if not self._uses[block]:
                return block
            self._to_main(block, self._uses[block] - 1)

    def left(self, block: int) -> None:
        self._sizes[self.queue[block]] -= 1
        del self._uses[block]

    def _to_main(self, block: int, uses: int) -> None:
        self._sizes[self.queue[block]] -= 1
        self._sizes[MAIN] += 1
        self.queue[block], self.stamp[block], self._uses[block] = MAIN, self.tick(), uses
        self.offer(block)

    def _remember(self, block: int) -> None:
        if len(self._ghosts) == self._most_ghosts and self._ghosts:
            del self._ghosts[next(iter(self._ghosts))]
        if self._most_ghosts:
            self._ghosts[block] = None


class Sieve(PlainPolicy):
    """The hand moves from old to new and evicts the first block not used since it last passed."""

    def __init__(self, capacity: int, *, leaf: bool = False) -> None:
        super().__init__(capacity, leaf=leaf)
        self._order: list[int] = []  # oldest first
        self._hand = 0
        self._used: set[int] = set()

    def enter(self, block: int, access: Access) -> None:
        self._order.append(block)

    def again(self, block: int, access: Access) -> None:
        self._used.add(block)

    def victim(self) -> int:
        for _ in range(2 * len(self._order)):  # in the second round, none is marked as used
            block = self._order[self._hand]
            if self.is_evictable(block):
                if block not in self._used:
                    return block
                self._used.discard(block)
            self._hand = (self._hand + 1) % len(self._order)
        raise NothingEvictable

    def left(self, block: int) -> None:
        at = self._order.index(block)
        del self._order[at]
        self._hand -= at < self._hand
        if self._hand == len(self._order):
            self._hand = 0
        self._used.discard(block)


class Arc(PlainPolicy):
    """Implements the paper's cases I to IV."""

    def __init__(self, capacity: int, *, leaf: bool = False) -> None:
        super().__init__(capacity, leaf=leaf, num_queues=2)
        self._target = 0.0
        self._sizes = [0, 0]
        self._ghosts: tuple[dict[int, None], dict[int, None]] = ({}, {})  # oldest first
        self._returning_to: int | None = None  # the queue whose ghost the missed block was

    def miss(self, block: int, access: Access) -> None:
        self._returning_to = None
        for which in (ONCE, OFTEN):
            own, others = self._ghosts[which], self._ghosts[1 - which]
            if block in own:
                step = max(1.0, len(others) / len(own))
                change = step if which == ONCE else -step
                self._target = min(max(self._target + change, 0.0), float(self.capacity))
                del own[block]
                self._returning_to = which

    def enter(self, block: int, access: Access) -> None:
        self.queue[block] = ONCE if self._returning_to is None else OFTEN
        self._sizes[self.queue[block]] += 1
        self._returning_to = None

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


class ByWorkload(PlainPolicy):
    """Evicts the lowest worth first, by the rule of `workload_aware.ByWorkloadState`."""

    def __init__(
        self, capacity: int, *, worth: Sequence[float], since_s: float = 0.0, leaf: bool = False
    ) -> None:
        super().__init__(capacity, leaf=leaf)
        self._worth = worth
        self._since_s = since_s

    def enter(self, block: int, access: Access) -> None:
        known = access.time >= self._since_s
        self.value[block] = float(self._worth[access.workload] if known else max(self._worth))

    def again(self, block: int, access: Access) -> None:
        before = self.value[block]
        self.enter(block, access)
        self.value[block] = max(self.value[block], before)


class TailFirst(PlainPolicy):
    """Evicts the ends of requests, by the rule of `workload_aware.TailFirstState`."""

    def __init__(self, capacity: int, *, slack_blocks: int, leaf: bool = False) -> None:
        super().__init__(capacity, leaf=leaf)
        self._slack = slack_blocks

    def enter(self, block: int, access: Access) -> None:
        self.value[block] = float(access.from_end >= self._slack)

    again = enter


class ReuseProbability(PlainPolicy):
    """Evicts the block least likely to be reused, by the rule of `workload_aware.ReuseProbabilityState`."""

    def __init__(
        self,
        capacity: int,
        *,
        reuse_probability: Sequence[float],
        mean_reuse_s: Sequence[float],
        since_s: float = 0.0,
        leaf: bool = False,
    ) -> None:
        super().__init__(capacity, leaf=leaf, num_queues=len(reuse_probability))
        self._probability = reuse_probability
        self._mean = mean_reuse_s
        self._since_s = since_s
        self._used_at: dict[int, float] = {}
        self._depth: dict[int, int] = {}
        self._now = 0.0
        self._lifespan = 0.0

    def miss(self, block: int, access: Access) -> None:
        self._now = access.time

    def enter(self, block: int, access: Access) -> None:
        self.queue[block] = access.workload
        self._now = self._used_at[block] = access.time
        self._depth[block] = access.depth
        self.stamp[block] = self.tick()

    again = enter

    def released(self, block: int) -> None:
        pass  # the stamp stays that of the last use, like the age

    def victim(self) -> int:
        heads = [(workload, self.first(workload)) for workload in range(len(self._probability))]
        candidates = [(workload, block) for workload, block in heads if block is not None]
        if not candidates:
            raise NothingEvictable
        block = min(candidates, key=lambda c: (self._score(*c), -self._depth[c[1]]))[1]
        age = self._now - self._used_at[block]
        self._lifespan += (age - self._lifespan) * AGE_WEIGHT
        return block

    def left(self, block: int) -> None:
        del self._used_at[block], self._depth[block]

    def _score(self, workload: int, block: int) -> float:
        mean, probability = self._mean[workload], self._probability[workload]
        if self._now < self._since_s:
            return self._used_at[block] - self._now
        still = probability * math.exp((self._used_at[block] - self._now) / mean)
        return still * (1 - math.exp(-self._lifespan / mean)) / (1 - probability + still)


class Optimal(PlainPolicy):
    """Evicts the block with the farthest next use; of those never used again, the least recent."""

    def enter(self, block: int, access: Access) -> None:
        self.value[block] = -float(access.next_use)

    again = enter


def _ordered(by_recency: bool, newest_first: bool) -> Callable[..., PlainPolicy]:
    return partial(Ordered, by_recency=by_recency, newest_first=newest_first)


PLAIN: Mapping[str, Callable[..., PlainPolicy]] = {
    "lru": _ordered(by_recency=True, newest_first=False),
    "fifo": _ordered(by_recency=False, newest_first=False),
    "mru": _ordered(by_recency=True, newest_first=True),
    "filo": _ordered(by_recency=False, newest_first=True),
    "lfu": Lfu,
    "slru": Slru,
    "priority": ByWorkload,
    "s3-fifo": S3Fifo,
    "sieve": Sieve,
    "arc": Arc,
    "gdsf": Gdsf,
    "t-lru": TailFirst,
    "wa-lru": ByWorkload,
    "wa-prob": ReuseProbability,
    "random": Uniform,
    "opt": Optimal,
}


def make_policy(
    name: str,
    capacity: int,
    *,
    leaf: bool = False,
    workload_names: tuple[str, ...] = ("all",),
    **params: Any,
) -> PlainPolicy:
    """`Access.workload` is an index of `workload_names`."""
    settings = policy_info(name).settings(params, Workloads(workload_names, None))
    return PLAIN[name](capacity, leaf=leaf, **settings)
