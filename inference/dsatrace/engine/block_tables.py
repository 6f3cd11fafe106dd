"""Gives running requests their blocks: promised when they are admitted, taken when their prefill begins.

A request's prefix is looked up as late as possible, so that it finds what earlier requests of
the same batch have computed; until then the pool only keeps as many blocks free as the request
may need. A block is keyed only after the forward that fills it, so a request that is preempted,
aborted or fails never leaves a key that points at garbage. Knows no order among requests; that
is the scheduler's.

    tables = BlockTables(new_pool(num_blocks=64, block_size=16, prefix_caching=True))
    tables.welcome(live)                    # it will be looked up by its tokens' keys
    tables.promise(live, 3)                 # False: no room
    num_hit_tokens = tables.take(live, 3)   # its prefill begins there
    tables.extend(live, 41)                 # slots for its first 41 tokens
    tables.mark_computed(live)              # others may hit what it holds
    tables.release(live)
"""

from __future__ import annotations

import os

from dsatrace.engine.live import LiveRequest
from dsatrace.kv.blocks import BlockPool, blocks_needed
from dsatrace.kv.prefix import KeyChain
from dsatrace.kv.prefix_pool import PrefixPool


def new_pool(num_blocks: int, block_size: int, prefix_caching: bool) -> PrefixPool:
    """An engine's pool. Where it caches, it evicts nothing while a block without content is left."""
    blocks = BlockPool(num_blocks, block_size, free_order="new" if prefix_caching else "old")
    return PrefixPool(blocks, prefix_caching=prefix_caching)


class BlockTables:
    """The block tables of live requests over one pool. Keys are hashed with a secret of this object."""

    def __init__(self, pool: PrefixPool) -> None:
        self.pool = pool
        self.block_size = pool.blocks.block_size
        self._num_promised = 0
        self._secret = os.urandom(32)

    @property
    def num_free(self) -> int:
        """Blocks that no request holds or was promised."""
        return self.pool.blocks.num_free - self._num_promised

    def welcome(self, live: LiveRequest) -> None:
        """Hashes the request's tokens into keys; called first."""
        if self.pool.prefix_caching:
            live.key_chain = KeyChain(self.block_size, self._secret)
            live.key_chain.extend(live.tokens)

    def promise(self, live: LiveRequest, num_blocks: int) -> bool:
        """Keeps `num_blocks` free for `take`, which needs no more; False if there are too few."""
        if num_blocks > self.num_free:
            return False
        live.num_promised_blocks = num_blocks
        self._num_promised += num_blocks
        return True

    def take(self, live: LiveRequest, num_blocks: int) -> int:
        """Gives it a table of `num_blocks`, of which the first are shared where its prefix is cached.

        Returns the number of tokens that need no prefill: at most all but the last. Raises
        `OutOfBlocks` and changes nothing; never for a request that was promised as many.
        """
        assert live.num_promised_blocks or not self._num_promised, "others were promised those blocks"
        keys = live.key_chain.keys if live.key_chain else ()
        live.held = held = self.pool.admit(
            keys, len(live.tokens), num_filled=0, num_slots=num_blocks * self.block_size
        )
        self._forget_promise(live)
        # New blocks are alike, and ascending they are often one stretch of memory.
        held.block_ids[held.num_hit_blocks :] = sorted(held.block_ids[held.num_hit_blocks :])
        return held.num_hit_tokens

    def missing(self, live: LiveRequest, num_tokens: int) -> int:
        """Blocks that its table lacks for the first `num_tokens` tokens."""
        return max(0, blocks_needed(num_tokens, self.block_size) - len(live.block_ids))

    def extend(self, live: LiveRequest, num_tokens: int) -> None:
        """Adds blocks for the first `num_tokens` tokens, which coming forwards compute."""
        assert live.held is not None
        self.pool.grow(live.held, num_tokens, num_filled=0)

    def mark_computed(self, live: LiveRequest) -> None:
        """Lets others find the full blocks of what is computed."""
        held = live.held
        assert held is not None
        if live.num_computed // self.block_size > held.num_keyed:
            self.pool.grow(held, live.num_computed)  # adds no block: they are all there

    def release(self, live: LiveRequest) -> None:
        """Frees its blocks; others find what was computed in them until it is evicted."""
        self._forget_promise(live)
        if live.held is not None:
            self.pool.release(live.held)
            live.held = None

    def _forget_promise(self, live: LiveRequest) -> None:
        self._num_promised -= live.num_promised_blocks
        live.num_promised_blocks = 0
