"""Hands out the blocks of a paged KV cache; a request's block table is the list it was given.

Pure accounting: knows no tensor, no token and no eviction. Every block is either
free or in use exactly once; a prefix cache can later take over `free`.

    pool = BlockPool(num_blocks=64, block_size=16)
    table = pool.allocate(blocks_needed(40, pool.block_size))     # [0, 1, 2]
    pool.free(table)              # all three are free again, the tail first in line
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class OutOfBlocks(RuntimeError):
    """The pool cannot serve an allocation; nothing was allocated."""


def blocks_needed(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class BlockPool:
    """`num_blocks` blocks with ids 0..num_blocks-1, of `block_size` tokens each.

    The block that has been free longest is handed out first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"a block pool needs at least 1 block of 1 token, not {num_blocks} of {block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))
        self._in_use = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, n: int) -> list[int]:
        """Takes `n` blocks out of the pool, all or none: raises `OutOfBlocks`."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} blocks")
        if n > len(self._free):
            raise OutOfBlocks(f"{n} blocks asked for, {len(self._free)} of {self.num_blocks} are free")
        ids = [self._free.popleft() for _ in range(n)]
        for block_id in ids:
            self._in_use[block_id] = 1
        return ids

    def free(self, ids: Sequence[int]) -> None:
        """Gives blocks back, given in logical order: the tail is first in line to be reused,
        because a later request shares a head more often than a tail.

        A block that is free already, named twice, or unknown raises `ValueError` and changes nothing.
        """
        for block_id in ids:
            if not 0 <= block_id < self.num_blocks or not self._in_use[block_id]:
                raise ValueError(f"block {block_id} is not in use: freed twice, or never allocated")
        if len(set(ids)) != len(ids):
            raise ValueError("the same block was freed twice in one call")
        for block_id in reversed(ids):
            self._in_use[block_id] = 0
            self._free.append(block_id)

    def check_integrity(self) -> None:
        """Asserts that every block is free exactly once or in use; for tests and idle moments."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block stands twice in the free queue"
        for block_id in range(self.num_blocks):
            assert (block_id in free) != bool(self._in_use[block_id]), f"block {block_id} is both or neither"
