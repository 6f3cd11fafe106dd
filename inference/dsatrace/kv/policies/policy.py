"""What an eviction policy is told and what it is asked: the interface of the block pool and the replay.

A policy orders cached blocks for eviction. Knows no token, no tensor and no capacity limit:
whoever owns the cache decides when a block must go and calls `evict`.

    policy = make_policy("lru", capacity=2)          # from dsatrace.kv.policies.registry
    policy.insert(7, Access(time=0.0, parent=NO_PARENT))
    policy.insert(8, Access(time=0.0, parent=7))
    policy.evict()                                    # 7; with leaf=True it would be 8
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

NO_PARENT = -1
NEVER = 2**62
"""`next_use` of a block that is not used again."""


class Access(NamedTuple):
    """One use of one block by one request; every field has a neutral default.

    `depth` counts the blocks before it in its request, `from_end` those after it;
    `next_use` is the position of its next access in the stream, for OPT alone.
    """

    time: float = 0.0  # seconds
    workload: int = 0  # the request's class
    parent: int = NO_PARENT  # the block before it in the chain
    depth: int = 0
    from_end: int = 0
    next_use: int = NEVER


class Policy(Protocol):
    """The order in which cached blocks are given up.

    Blocks are named by ids of the caller's choice. Insert the blocks of a request tail
    first and unpin them tail first: the head is then the more recent, which is what
    keeps recency policies from evicting a parent before its child.
    """

    def insert(self, block: int, access: Access) -> None:
        """`block` became cached; it was not before."""

    def hit(self, block: int, access: Access) -> None:
        """A cached block was used again."""

    def pin(self, block: int) -> None:
        """A request holds the block: it is not evictable until as many `unpin` have come."""

    def unpin(self, block: int) -> None:
        """A request lets go of the block; recency counts from the last of them."""

    def evict(self) -> int:
        """Chooses an evictable block, forgets it and returns it.

        Evictable is what no request pins and, with the leaf constraint, no cached child
        hangs on. Raises `LookupError` when there is none.
        """

    def forget(self, block: int) -> None:
        """`block` is no longer cached, by the caller's decision; it must not be pinned."""
