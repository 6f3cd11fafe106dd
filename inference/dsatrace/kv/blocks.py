"""Hands out the blocks of a paged KV cache, and keeps what they hold findable until they are reused.

Pure accounting: knows no tensor, no token and no request. A block is in use (by one or more users)
or free. A block that was given a key stays cached after its last user is gone: `lookup` finds it and
`share` takes it back. Its key goes when the block is handed out again, or by `forget` when its
content is lost. A pool whose blocks never get a key is a plain free list.

    pool = BlockPool(num_blocks=64, block_size=16)
    table = pool.allocate(blocks_needed(40, pool.block_size))     # [0, 1, 2]
    pool.set_keys(table[:2], [b"first block", b"first two"])
    pool.free(table)              # all three are free again, the tail first in line
    pool.lookup([b"first block", b"first two", b"first three"])   # [0, 1]
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

Key: TypeAlias = "int | bytes"
"""Stands for a block's content and its whole prefix: an id of a `BlockTrace`, a digest of a `KeyChain`."""

FreeOrder = Literal["old", "new"]
"""Where a freed block without a key is queued, as in vLLM. `old` (up to 2026-04): at the back, like
any other. `new` (since pull request 42656 of 2026-05, released in 0.32): at the front, so that nothing
cached is evicted while a block without content is left."""

MISS, HIT, EVICT = range(3)
"""What happened to cached content: it was computed, a cached block was shared, a block's key went."""

OnEvent = Callable[[int, Key, int], None]
"""Called with the kind of an event, the key and the block."""

OnVoid = Callable[[list[int]], None]
"""Called with free blocks whose content can never be read again, in no order: blocks freed without a
key, cached blocks about to be handed out, free blocks that were forgotten. Called once per block
before the block is used again."""


class OutOfBlocks(RuntimeError):
    """The pool cannot serve an allocation; nothing was allocated."""


def blocks_needed(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


class BlockPool:
    """`num_blocks` blocks with ids 0..num_blocks-1, of `block_size` tokens each.

    The block that has been free longest is handed out first (LRU); of one request, the tail before
    the head. With `null_block`, block 0 is never handed out: vLLM points unused table entries at it.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        null_block: bool = False,
        free_order: FreeOrder = "old",
        on_event: OnEvent | None = None,
        on_void: OnVoid | None = None,
    ) -> None:
        if num_blocks < 1 + null_block or block_size < 1:
            kept = ", block 0 kept back" if null_block else ""
            raise ValueError(
                f"a block pool needs at least 1 block of 1 token, not {num_blocks} of {block_size}{kept}"
            )
        self.num_blocks = num_blocks
        self.num_usable = num_blocks - null_block
        self.block_size = block_size
        self.free_order = free_order
        self.on_void = on_void  # may be set later
        self._on_event = on_event
        self._queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(int(null_block), num_blocks))
        self._num_users = [0] * num_blocks
        self._key_of: dict[int, Key] = {}
        self._blocks_of: dict[Key, dict[int, None]] = {}  # oldest first; more than one: duplicates

    @property
    def num_free(self) -> int:
        """Blocks without a user, cached or not."""
        return len(self._queue)

    def allocate(self, n: int) -> list[int]:
        """Takes `n` blocks, which lose their keys; raises `OutOfBlocks` and takes none if fewer are free."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} blocks")
        if n > self.num_free:
            raise OutOfBlocks(f"{n} blocks asked for, {self.num_free} of {self.num_usable} are free")
        ids = [self._queue.popitem(last=False)[0] for _ in range(n)]
        evicted = [block_id for block_id in ids if block_id in self._key_of]
        for block_id in evicted:
            self._drop_key(block_id)
        if evicted:
            self._void(evicted)
        for block_id in ids:
            self._num_users[block_id] = 1
        return ids

    def free(self, ids: Sequence[int]) -> None:
        """Gives back one use of each block. `ids` are in logical order: the tail is reused first,
        because a later request shares a head more often than a tail.

        A block that is free already, named twice, or unknown raises `ValueError` and changes nothing.
        """
        for block_id in ids:
            if not 0 <= block_id < self.num_blocks or not self._num_users[block_id]:
                raise ValueError(f"block {block_id} is not in use: freed twice, or never allocated")
        if len(set(ids)) != len(ids):
            raise ValueError("the same block was freed twice in one call")
        void = []
        for block_id in reversed(ids):
            self._num_users[block_id] -= 1
            if self._num_users[block_id]:
                continue
            key = self._key_of.get(block_id)
            if key is None:
                void.append(block_id)
            if key is not None or self.free_order == "old":
                self._queue[block_id] = None
        if void:
            if self.free_order == "new":
                self._to_front(void)
            self._void(void)

    def forget(self, ids: Iterable[int]) -> int:
        """Removes the keys of blocks whose content is lost; returns how many had one.

        A free block of these is handed out before those that have content. A block in use stays in
        use; release every request that holds one, for what it computed behind a lost block can no
        longer be read. Blocks that followed a lost one keep their keys: a lookup stops before them
        until the lost block is computed again, and then they are right again. An unknown block
        raises `ValueError` and changes nothing.
        """
        ids = sorted(set(ids))
        if ids and not 0 <= ids[0] <= ids[-1] < self.num_blocks:
            raise ValueError(f"blocks {ids[0]} to {ids[-1]}: the pool has 0 to {self.num_blocks - 1}")
        keyed = [block_id for block_id in ids if block_id in self._key_of]
        for block_id in keyed:
            self._drop_key(block_id)
        void = [block_id for block_id in keyed if not self._num_users[block_id]]
        if void:
            self._to_front(void)
            self._void(void)
        return len(keyed)

    def lookup(self, keys: Iterable[Key]) -> list[int]:
        """The cached blocks of the leading keys, up to the first that is not cached."""
        found = []
        for key in keys:
            blocks = self._blocks_of.get(key)
            if blocks is None:
                break
            found.append(next(iter(blocks)))
        return found

    def share(self, ids: Sequence[int]) -> None:
        """Adds one use to each of these cached blocks; `free` gives it back."""
        for block_id in ids:
            if not self._num_users[block_id]:
                del self._queue[block_id]
            self._num_users[block_id] += 1
            self._tell(HIT, self._key_of[block_id], block_id)

    def set_keys(self, ids: Sequence[int], keys: Sequence[Key]) -> None:
        """Makes blocks in use findable. Older blocks with the same key stay and are found first."""
        for block_id, key in zip(ids, keys, strict=True):
            assert self._num_users[block_id] == 1 and block_id not in self._key_of, f"block {block_id}"
            self._tell(MISS, key, block_id)
            self._key_of[block_id] = key
            self._blocks_of.setdefault(key, {})[block_id] = None

    def _drop_key(self, block_id: int) -> None:
        key = self._key_of.pop(block_id)
        blocks = self._blocks_of[key]
        del blocks[block_id]
        if not blocks:
            del self._blocks_of[key]
        self._tell(EVICT, key, block_id)

    def _to_front(self, ids: Sequence[int]) -> None:
        """Puts blocks before all others in the queue, the first of them first."""
        for block_id in reversed(ids):
            self._queue[block_id] = None
            self._queue.move_to_end(block_id, last=False)

    def _tell(self, kind: int, key: Key, block_id: int) -> None:
        if self._on_event is not None:
            self._on_event(kind, key, block_id)

    def _void(self, ids: list[int]) -> None:
        if self.on_void is not None:
            self.on_void(ids)

    # What tests and schedulers look at.

    def key_of(self, block_id: int) -> Key | None:
        return self._key_of.get(block_id)

    def num_users(self, block_id: int) -> int:
        return self._num_users[block_id]

    def free_queue(self) -> list[int]:
        """Free blocks in the order they will be handed out."""
        return list(self._queue)

    def check_integrity(self) -> None:
        """Asserts that every block is either free or in use, and that keys and blocks match; for tests."""
        free = self._queue.keys()
        for block_id in range(self.num_blocks - self.num_usable, self.num_blocks):
            used = self._num_users[block_id]
            assert used >= 0 and (block_id in free) != bool(used), f"block {block_id} is both or neither"
        for kept_back in range(self.num_blocks - self.num_usable):
            assert kept_back not in free and not self._num_users[kept_back], "the null block was handed out"
        named = {block_id: key for key, blocks in self._blocks_of.items() for block_id in blocks}
        assert named == self._key_of, "keys and blocks disagree"
        assert all(self._blocks_of.values()), "a key without a block"
        if self.free_order == "new":
            keyed = [block_id in self._key_of for block_id in self._queue]
            assert keyed == sorted(keyed), "a cached block would go before one without content"
