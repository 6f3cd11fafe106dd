"""The block pool as a scheduler uses it: by request, with its shared prefix found first.

The rules are those of vLLM's KVCacheManager with one full-attention group; the tests compare with
its recorded answers. Only full blocks are cached. A lookup stops at the first miss and leaves at
least the last token to compute, even if a whole block must be computed again for it. Equal blocks
computed twice are both kept. A block gets its key when the slots that fill it are handed out, so work
that runs later can hit it before it is computed. Knows no token: keys come from `KeyChain` (live) or
`BlockTrace` (offline).

    pool = PrefixPool(BlockPool(64, 16, free_order="new"))
    chain = KeyChain(16, secret); chain.extend(prompt)
    held = pool.admit(chain.keys, len(prompt))        # OutOfBlocks: nothing changed, wait
    held.num_hit_tokens                               # these need no prefill
    held.block_ids                                    # the block table
    chain.extend([token]); pool.grow(held, len(prompt) + 1)      # before each step, in the steps' order
    pool.release(held)                                # finished, or preempted
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dsatrace.kv.blocks import BlockPool, Key, OutOfBlocks, blocks_needed


@dataclasses.dataclass(eq=False)
class HeldBlocks:
    """The blocks of one live request."""

    keys: Sequence[Key]  # the caller's list, which grows with the request
    block_ids: list[int]  # in logical order
    num_hit_blocks: int
    num_hit_tokens: int
    num_keyed: int  # leading blocks whose key has been given to the pool


class PrefixPool:
    """Gives requests their blocks, shared where a prefix is cached."""

    def __init__(self, blocks: BlockPool, *, prefix_caching: bool = True) -> None:
        self.blocks = blocks
        self.prefix_caching = prefix_caching

    def match(self, keys: Sequence[Key], num_tokens: int) -> list[int]:
        """The cached blocks that a request of `num_tokens` tokens would share."""
        if not self.prefix_caching:
            return []
        return self.blocks.lookup(keys[: (num_tokens - 1) // self.blocks.block_size])

    def admit(
        self,
        keys: Sequence[Key],
        num_tokens: int,
        num_filled: int | None = None,
        *,
        num_slots: int | None = None,
    ) -> HeldBlocks:
        """Blocks for a request of `num_tokens` known tokens: shared ones, and new ones for the rest.

        `num_filled`: tokens, counted from the request's start, that are filled once the coming step
        has run (default: all; less for a chunk of prefill). Their blocks get their keys.
        `num_slots` reserves room for more tokens. Raises `OutOfBlocks` and changes nothing if too
        few blocks are free.
        """
        hits = self.match(keys, num_tokens)
        num_hit_tokens = len(hits) * self.blocks.block_size
        num_filled = max(num_hit_tokens, num_tokens if num_filled is None else num_filled)
        needed = blocks_needed(max(num_filled, num_slots or 0), self.blocks.block_size) - len(hits)
        num_free = self.blocks.num_free - sum(not self.blocks.num_users(block_id) for block_id in hits)
        if needed > num_free:
            raise OutOfBlocks(
                f"a request of {num_tokens} tokens needs {needed} blocks beside {len(hits)} cached ones, "
                f"{num_free} of {self.blocks.num_usable} are free"
            )
        self.blocks.share(hits)
        block_ids = hits + self.blocks.allocate(needed)
        held = HeldBlocks(keys, block_ids, len(hits), num_hit_tokens, num_keyed=len(hits))
        self._set_keys(held, num_filled)
        return held

    def grow(self, held: HeldBlocks, num_tokens: int, num_filled: int | None = None) -> None:
        """Slots for the first `num_tokens` tokens of a live request, which the coming step fills.

        `num_filled`: how many of them are filled (default: all); only full blocks of these get keys.
        A caller whose steps may fail passes 0, and calls again once the tokens are computed. Raises
        `OutOfBlocks` and changes nothing if too few blocks are free.
        """
        missing = blocks_needed(num_tokens, self.blocks.block_size) - len(held.block_ids)
        if missing > 0:
            held.block_ids += self.blocks.allocate(missing)
        self._set_keys(held, num_tokens if num_filled is None else num_filled)

    def release(self, held: HeldBlocks) -> None:
        """The request is finished or preempted; its cached blocks can still be hit."""
        self.blocks.free(held.block_ids)
        held.block_ids = []

    def _set_keys(self, held: HeldBlocks, num_tokens: int) -> None:
        if not self.prefix_caching:
            return
        first, end = held.num_keyed, min(num_tokens // self.blocks.block_size, len(held.keys))
        if first < end:
            self.blocks.set_keys(held.block_ids[first:end], held.keys[first:end])
            held.num_keyed = end

    def check_integrity(self, live: Sequence[HeldBlocks]) -> None:
        """Asserts that exactly the live requests use blocks, under their own keys; for tests."""
        self.blocks.check_integrity()
        uses: dict[int, int] = {}
        for held in live:
            for i, block_id in enumerate(held.block_ids):
                uses[block_id] = uses.get(block_id, 0) + 1
                key = held.keys[i] if i < held.num_keyed else None
                assert self.blocks.key_of(block_id) == key, f"block {block_id} has another's key"
        for block_id in range(self.blocks.num_blocks):
            assert self.blocks.num_users(block_id) == uses.get(block_id, 0), f"block {block_id}: users"
