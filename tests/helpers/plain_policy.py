"""What every eviction policy is, in plain Python: pins, children, and queues of evictable blocks.

The compiled policies (`kv.policies`) are held equal to it. A policy orders cached blocks for eviction; who
owns the cache decides when a block must go and calls `evict`. A policy adds rules: in which queue a block
stands, its value and its stamp (smallest value first, then smallest stamp), and which queue gives up a
block. Without rules a policy is LRU.

    policy = make_policy("lru", capacity=2)          # from helpers.plain_policies
    policy.insert(7, Access(time=0.0, parent=NO_PARENT))
    policy.insert(8, Access(time=0.0, parent=7))
    policy.evict()                                    # 7; with leaf=True it would be 8

    class Lfu(PlainPolicy):
        def again(self, block, access):
            self.value[block] += 1
"""

from __future__ import annotations

import heapq
from collections import Counter

from dsatrace.kv.policies.compiled import Access


class NothingEvictable(LookupError):
    """Requests hold all cached blocks, or hold a child of each."""

    def __init__(self) -> None:
        super().__init__("no cached block may be evicted: requests hold all of them")


class PlainPolicy:
    """The order in which cached blocks are evicted; subclasses override the rules `miss` to `left`.

    Block ids are the caller's. Insert and unpin the blocks of a request tail first: its head is then
    the most recent, which keeps recency policies from evicting a parent before its child.
    """

    def __init__(self, capacity: int, *, leaf: bool = False, num_queues: int = 1) -> None:
        self.capacity = capacity
        self.leaf = leaf
        self.value: dict[int, float] = {}
        self.stamp: dict[int, int] = {}
        self.queue: dict[int, int] = {}
        self._pins: dict[int, int] = {}  # its keys are the cached blocks
        self._parent: dict[int, int] = {}
        self._children: Counter[int] = Counter()  # cached children of a block, cached or not
        self._heaps: list[list[tuple[float, int, int]]] = [[] for _ in range(num_queues)]
        self._clock = 0

    # The rules.

    def miss(self, block: int, access: Access) -> None:
        """`block` is not cached; evictions and its `insert` follow. Policies that remember evicted
        blocks look here."""

    def enter(self, block: int, access: Access) -> None:
        """A new block: in queue 0 with value 0 and a fresh stamp, unless changed here."""

    def again(self, block: int, access: Access) -> None:
        """A cached block was used again."""

    def released(self, block: int) -> None:
        """The block's last pin is gone."""
        self.stamp[block] = self.tick()

    def victim(self) -> int:
        """Chooses an evictable block, usually by `pop`; it is forgotten next."""
        return self.pop(0)

    def left(self, block: int) -> None:
        """`block` is about to be forgotten."""

    # What rules use.

    def tick(self) -> int:
        """A stamp later than all before."""
        self._clock += 1
        return self._clock

    def first(self, queue: int) -> int | None:
        """The first evictable block of a queue."""
        heap = self._heaps[queue]
        while heap and not self._is_current(queue, heap[0]):
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def pop(self, queue: int) -> int:
        """Takes the first evictable block out of a queue."""
        if self.first(queue) is None:
            raise NothingEvictable
        return heapq.heappop(self._heaps[queue])[2]

    def is_evictable(self, block: int) -> bool:
        return self._pins.get(block) == 0 and not (self.leaf and self._children[block])

    def offer(self, block: int) -> None:
        """Adds an evictable block to its queue, with its present value and stamp."""
        heap = self._heaps[self.queue[block]]
        heapq.heappush(heap, (self.value[block], self.stamp[block], block))
        if len(heap) > 64 + 4 * len(self._pins):  # entries that are out of date
            heap[:] = {entry for entry in heap if self._is_current(self.queue[block], entry)}
            heapq.heapify(heap)

    def withdraw(self, block: int) -> None:
        """The block is no longer evictable; its entry in the queue is now out of date."""

    def _is_current(self, queue: int, entry: tuple[float, int, int]) -> bool:
        value, stamp, block = entry
        return (
            self.is_evictable(block)
            and self.queue[block] == queue
            and (self.value[block], self.stamp[block]) == (value, stamp)
        )

    # The interface.

    def __len__(self) -> int:
        return len(self._pins)

    def __contains__(self, block: int) -> bool:
        return block in self._pins

    def insert(self, block: int, access: Access) -> None:
        """`block` became cached; it was not before."""
        assert block not in self._pins, f"block {block} is cached already"
        if self.leaf and self.is_evictable(access.parent):
            self.withdraw(access.parent)
        self._pins[block] = 0
        self._parent[block] = access.parent
        self._children[access.parent] += 1
        self.value[block], self.queue[block], self.stamp[block] = 0.0, 0, self.tick()
        self.enter(block, access)
        if self.is_evictable(block):
            self.offer(block)

    def hit(self, block: int, access: Access) -> None:
        """A cached block was used again."""
        if self.is_evictable(block):
            self.withdraw(block)
        self.again(block, access)
        self._refresh(block)

    def pin(self, block: int) -> None:
        """A request holds the block: it is not evictable until every `pin` has had its `unpin`."""
        if self.is_evictable(block):
            self.withdraw(block)
        self._pins[block] += 1

    def unpin(self, block: int) -> None:
        """A request no longer holds the block; recency counts from the last unpin."""
        assert self._pins[block] > 0, f"block {block} is not pinned"
        self._pins[block] -= 1
        self._refresh(block)

    def evict(self) -> int:
        """Chooses an evictable block, forgets it and returns it; raises `NothingEvictable`.

        A block is evictable if it is not pinned and, under the leaf constraint, has no cached child.
        """
        block = self.victim()
        self.forget(block)
        return block

    def forget(self, block: int) -> None:
        """`block`, which must not be pinned, is no longer cached."""
        assert self._pins[block] == 0, f"block {block} is pinned"
        if self.is_evictable(block):
            self.withdraw(block)
        self.left(block)
        for of_block in (self._pins, self.value, self.stamp, self.queue):
            del of_block[block]
        parent = self._parent.pop(block)
        self._children[parent] -= 1
        if not self._children[parent]:
            del self._children[parent]
            if self.leaf and self.is_evictable(parent):
                self.offer(parent)

    def _refresh(self, block: int) -> None:
        if self._pins[block] == 0:
            self.released(block)
            if self.is_evictable(block):
                self.offer(block)
