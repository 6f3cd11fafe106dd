"""Hands out the blocks of a paged KV cache, and keeps what they hold findable until they are reused.

Pure accounting: knows no tensor, no token and no request. A block is in use (by one user
or more) or free. A block given a key stays cached after its last user is gone: `lookup`
finds it, `share` takes it back, and only handing it out again forgets the key, or `forget`,
for content that is lost. A pool whose blocks never get a key is a plain free list.

    pool = BlockPool(num_blocks=64, block_size=16)
    table = pool.allocate(blocks_needed(40, pool.block_size))     # [0, 1, 2]
    pool.set_keys(table[:2], [b"first block", b"first two"])
    pool.free(table)              # all three are free again, the tail first in line
    pool.lookup([b"first block", b"first two", b"first three"])   # [0, 1]
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from dsatrace.kv.policies.policy import Access, Policy

Key: TypeAlias = "int | bytes"
"""Names a block's content and its whole prefix: an id of a `BlockTrace`, a digest of a `KeyChain`."""

FreeOrder = Literal["old", "new"]
"""Where a freed block without a key stands in line, as vLLM has it: `old` (up to 2026-04) at the
back like any other; `new` (since pull request 42656 of 2026-05, thus in 0.32) at the front, so
that nothing cached is evicted while a block without content is left."""

MISS, HIT, EVICT = range(3)
"""What happens to cached content: it is computed, a cached block is shared, a block is forgotten."""

OnEvent = Callable[[int, Key, int], None]
"""Is told the kind of an event, the key and the block."""

OnVoid = Callable[[list[int]], None]
"""Is told blocks that nobody uses and whose content nobody can ever read again, in no order: they
were freed without a key, are about to be handed out anew, or were forgotten while free. Each is
named once until it is used again, and always before it is."""


class OutOfBlocks(RuntimeError):
    """The pool cannot serve an allocation; nothing was allocated."""


def blocks_needed(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class BlockPool:
    """`num_blocks` blocks with ids 0..num_blocks-1, of `block_size` tokens each.

    The block that has been free longest is handed out first: least recently used, the tail of
    a request before its head. With `null_block`, block 0 is never handed out, as in vLLM,
    which points unused table entries at it.

    With a `policy`, blocks without content go first, then the policy chooses among the cached
    ones that nobody uses. It names blocks by what they hold, so that it can remember what it
    gave up; therefore content is cached once only: a block that holds the same gets no key.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        null_block: bool = False,
        free_order: FreeOrder = "old",
        policy: Policy | None = None,
        on_event: OnEvent | None = None,
        on_void: OnVoid | None = None,
    ) -> None:
        """`on_void` may also be set later: it is asked for at each call."""
        if num_blocks < 1 + null_block or block_size < 1:
            kept = ", block 0 kept back" if null_block else ""
            raise ValueError(
                f"a block pool needs at least 1 block of 1 token, not {num_blocks} of {block_size}{kept}"
            )
        self.num_blocks = num_blocks
        self.num_usable = num_blocks - null_block
        self.block_size = block_size
        self.free_order = free_order
        self.policy = policy
        self.on_void = on_void
        self._on_event = on_event
        self._queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(int(null_block), num_blocks))
        self._evictable: dict[int, int] = {}  # free blocks that stand with the policy, by their name there
        self._evicted: list[int] = []  # by the allocation under way, while somebody listens
        self._num_users = [0] * num_blocks
        self._key_of: dict[int, Key] = {}
        self._blocks_of: dict[Key, dict[int, None]] = {}  # oldest first; more than one: duplicates

    @property
    def num_free(self) -> int:
        """Blocks nobody uses, cached or not."""
        return len(self._queue) + len(self._evictable)

    def allocate(self, n: int) -> list[int]:
        """Takes `n` blocks out of the pool, all or none: raises `OutOfBlocks`. Forgets what they held.

        A leaf-constrained policy may be unable to give up every free block; what it gave up in
        vain is forgotten all the same.
        """
        if n < 0:
            raise ValueError(f"cannot allocate {n} blocks")
        if n > self.num_free:
            raise OutOfBlocks(f"{n} blocks asked for, {self.num_free} of {self.num_usable} are free")
        ids: list[int] = []
        try:
            while len(ids) < n:
                ids.append(self._take())
        except LookupError as error:
            self._to_front(ids)
            raise OutOfBlocks(f"{n} blocks asked for, the policy gives up {len(ids)} only") from error
        finally:
            if self._evicted:
                evicted, self._evicted = self._evicted, []
                self._void(evicted)
        for block_id in ids:
            self._num_users[block_id] = 1
        return ids

    def free(self, ids: Sequence[int]) -> None:
        """Gives blocks back, given in logical order: the tail is first in line to be reused,
        because a later request shares a head more often than a tail. A shared block stays in use.

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
            if key is not None and self.policy is not None:
                self._evictable[policy_name(key)] = block_id
                self.policy.unpin(policy_name(key))
            elif key is not None or self.free_order == "old":
                self._queue[block_id] = None
        if void:
            if self.free_order == "new":
                self._to_front(void)
            self._void(void)

    def forget(self, ids: Iterable[int]) -> int:
        """Takes the keys of blocks whose content is lost; nobody finds it from now on.

        Returns how many had one. A free block is then one without content, and handed out before
        those that have some; one in use stays in use, and its users know what is lost. An unknown
        block raises `ValueError` and changes nothing.
        """
        ids = sorted(set(ids))
        if ids and not 0 <= ids[0] <= ids[-1] < self.num_blocks:
            raise ValueError(f"blocks {ids[0]} to {ids[-1]}: the pool has 0 to {self.num_blocks - 1}")
        keyed = [block_id for block_id in ids if block_id in self._key_of]
        for block_id in keyed:
            if self.policy is not None:
                name = policy_name(self._key_of[block_id])
                if self._num_users[block_id]:
                    self.policy.unpin(name)
                else:
                    del self._evictable[name]
                self.policy.forget(name)
            self._drop_key(block_id)
        void = [block_id for block_id in keyed if not self._num_users[block_id]]
        if void:
            self._to_front(void)
            self._void(void)
        return len(keyed)

    def lookup(self, keys: Iterable[Key]) -> list[int]:
        """The cached blocks of the leading keys, up to the first that is not cached. Changes nothing."""
        found = []
        for key in keys:
            blocks = self._blocks_of.get(key)
            if blocks is None:
                break
            found.append(next(iter(blocks)))
        return found

    def share(self, ids: Sequence[int], accesses: Sequence[Access] = ()) -> None:
        """Takes cached blocks into use, once more if they are already; given back by `free`.

        A policy wants an `Access` for each.
        """
        for block_id in ids:
            key = self._key_of[block_id]
            if not self._num_users[block_id]:
                if self.policy is None:
                    del self._queue[block_id]
                else:
                    del self._evictable[policy_name(key)]
                    self.policy.pin(policy_name(key))
            self._num_users[block_id] += 1
            self._tell(HIT, key, block_id)
        if self.policy is not None:
            for block_id, access in reversed(list(zip(ids, accesses, strict=True))):
                self.policy.hit(policy_name(self._key_of[block_id]), access)

    def set_keys(self, ids: Sequence[int], keys: Sequence[Key], accesses: Sequence[Access] = ()) -> None:
        """Makes blocks in use findable. Older blocks with the same key stay, and are found first.

        A policy wants an `Access` for each, and has each content once.
        """
        for block_id, key in zip(ids, keys, strict=True):
            assert self._num_users[block_id] == 1 and block_id not in self._key_of, f"block {block_id}"
            self._tell(MISS, key, block_id)
            if self.policy is None:
                self._key_of[block_id] = key
                self._blocks_of.setdefault(key, {})[block_id] = None
        if self.policy is not None:
            for block_id, key, access in reversed(list(zip(ids, keys, accesses, strict=True))):
                if key in self._blocks_of:
                    self.policy.hit(policy_name(key), access)
                    continue
                self._key_of[block_id] = key
                self._blocks_of[key] = {block_id: None}
                self.policy.insert(policy_name(key), access)
                self.policy.pin(policy_name(key))

    def _take(self) -> int:
        """The next free block, without a key; evicts one if need be. `LookupError`: the policy has none."""
        if self._queue:
            block_id, _ = self._queue.popitem(last=False)
        else:
            assert self.policy is not None
            block_id = self._evictable.pop(self.policy.evict())
        if block_id in self._key_of:
            self._drop_key(block_id)
            if self.on_void is not None:
                self._evicted.append(block_id)
        return block_id

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

    def is_cached(self, key: Key) -> bool:
        return key in self._blocks_of

    def key_of(self, block_id: int) -> Key | None:
        return self._key_of.get(block_id)

    def num_users(self, block_id: int) -> int:
        return self._num_users[block_id]

    def free_queue(self) -> list[int]:
        """Free blocks in the order they will be handed out, less those a policy chooses among."""
        return list(self._queue)

    def check_integrity(self) -> None:
        """Asserts that every block is free exactly once or in use, and that keys and blocks name
        each other; for tests and idle moments."""
        free = self._queue.keys() | set(self._evictable.values())
        assert len(free) == self.num_free, "a block is free twice"
        for block_id in range(self.num_blocks - self.num_usable, self.num_blocks):
            used = self._num_users[block_id]
            assert used >= 0 and (block_id in free) != bool(used), f"block {block_id} is both or neither"
        for kept_back in range(self.num_blocks - self.num_usable):
            assert kept_back not in free and not self._num_users[kept_back], "the null block was handed out"
        named = {block_id: key for key, blocks in self._blocks_of.items() for block_id in blocks}
        assert named == self._key_of, "keys and blocks disagree"
        assert all(self._blocks_of.values()), "a key without a block"
        keyed = [block_id in self._key_of for block_id in self._queue]
        if self.policy is not None:
            assert not any(keyed), "a cached block waits where the policy cannot see it"
            for name, block_id in self._evictable.items():
                assert policy_name(self._key_of[block_id]) == name, f"block {block_id} has another's name"
        elif self.free_order == "new":
            assert keyed == sorted(keyed), "a cached block would go before one without content"


def policy_name(key: Key) -> int:
    """What a policy calls the block that holds `key`."""
    return key if isinstance(key, int) else int.from_bytes(key, "little")
