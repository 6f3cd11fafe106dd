"""The prefix pool keeps vLLM's rules, one by one, and its own invariants under any sequence of moves."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dsatrace.kv.blocks import EVICT, HIT, MISS, BlockPool, FreeOrder, Key, OutOfBlocks
from dsatrace.kv.prefix import KeyChain
from dsatrace.kv.prefix_pool import HeldBlocks, PrefixPool
from helpers.trace_samples import SECRET


def keys_of(tokens: list[int], block_size: int = 4, extra: tuple[str, ...] = ()) -> list[bytes]:
    chain = KeyChain(block_size, SECRET, extra)
    chain.extend(tokens)
    return chain.keys


def admit(pool: PrefixPool, tokens: list[int], extra: tuple[str, ...] = ()) -> HeldBlocks:
    return pool.admit(keys_of(tokens, pool.blocks.block_size, extra), len(tokens))


def test_partial_blocks_go_first_and_tails_before_heads() -> None:
    """The order of vLLM's own first test: three shared blocks of four, eleven with the null block."""
    pool = PrefixPool(BlockPool(11, 4, null_block=True, free_order="new"))
    common = list(range(12))
    first, second = admit(pool, [*common, 1, 1]), admit(pool, [*common, 2])
    assert (first.block_ids, second.block_ids) == ([1, 2, 3, 4], [1, 2, 3, 5])
    assert (first.num_hit_tokens, second.num_hit_tokens, pool.blocks.num_free) == (0, 12, 5)
    pool.release(first)
    pool.release(second)
    assert pool.blocks.free_queue() == [5, 4, 6, 7, 8, 9, 10, 3, 2, 1]
    everything = admit(pool, [99] * 40)
    assert everything.block_ids == [5, 4, 6, 7, 8, 9, 10, 3, 2, 1]
    pool.check_integrity([everything])


def test_the_old_order_puts_partial_blocks_at_the_back() -> None:
    pool = PrefixPool(BlockPool(4, 4, free_order="old"))
    pool.release(admit(pool, [1] * 6))
    assert pool.blocks.free_queue() == [2, 3, 1, 0]


def test_the_last_token_is_always_computed() -> None:
    pool = PrefixPool(BlockPool(8, 4, free_order="new"))
    first = admit(pool, [1] * 8)
    again = admit(pool, [1] * 8)
    assert (again.num_hit_tokens, again.block_ids) == (4, [0, 2])  # block 2 repeats block 1
    assert admit(pool, [1] * 9).block_ids[:2] == [0, 1]  # of two equal blocks the older one is found
    assert pool.blocks.num_users(0) == 3
    pool.release(first)
    pool.blocks.check_integrity()


def test_a_duplicate_serves_when_the_older_block_is_gone() -> None:
    pool = PrefixPool(BlockPool(4, 2, free_order="new"))
    older, newer = admit(pool, [1, 1]), admit(pool, [1, 1])
    pool.release(older)
    filler = admit(pool, [7, 8, 9, 9, 5, 5])  # takes the two that are left, and the older block
    assert older.block_ids == [] and 0 in filler.block_ids
    assert pool.match(keys_of([1, 1], 2), 3) == newer.block_ids


def test_a_lookup_stops_at_the_first_miss() -> None:
    pool = PrefixPool(BlockPool(3, 2, free_order="new"))
    pool.release(admit(pool, [1, 2, 3, 4]))
    admit(pool, [9, 9, 9, 9])  # the empty block, then the tail of what was freed
    assert len(pool.match(keys_of([1, 2, 3, 4, 5], 2), 5)) == 1


def test_salt_and_adapter_keep_caches_apart() -> None:
    pool = PrefixPool(BlockPool(32, 4))
    tokens = [1] * 9
    admit(pool, tokens, ("salt", "adapter"))
    for extra in ((), ("salt",), ("saltadapter",), ("adapter", "salt")):
        assert admit(pool, tokens, extra).num_hit_tokens == 0
    assert admit(pool, tokens, ("salt", "adapter")).num_hit_tokens == 8


def test_a_block_is_found_once_it_is_full() -> None:
    pool = PrefixPool(BlockPool(8, 4))
    chain = KeyChain(4, SECRET)
    chain.extend([1, 2, 3])
    held = pool.admit(chain.keys, 3)
    longer = keys_of([1, 2, 3, 4, 5])
    assert pool.match(longer, 5) == []
    chain.extend([4])
    pool.grow(held, 4)
    assert pool.match(longer, 5) == held.block_ids == [0]
    chain.extend([5])
    pool.grow(held, 5)
    assert held.block_ids == [0, 1]


def test_chunks_are_found_as_they_are_handed_out() -> None:
    pool = PrefixPool(BlockPool(8, 4))
    tokens = list(range(13))
    held = pool.admit(keys_of(tokens), 13, num_filled=6)
    assert (len(held.block_ids), held.num_keyed) == (2, 1)
    pool.grow(held, 13)
    assert (len(held.block_ids), held.num_keyed) == (4, 3)


def test_reserved_slots_are_not_keyed() -> None:
    pool = PrefixPool(BlockPool(8, 4))
    held = pool.admit(keys_of([1] * 8), 8, num_filled=4, num_slots=20)
    assert (len(held.block_ids), held.num_keyed) == (5, 1)


def test_a_preempted_request_finds_what_it_left() -> None:
    pool = PrefixPool(BlockPool(4, 4, free_order="new"))
    tokens = list(range(11))
    held = admit(pool, tokens)
    pool.release(held)
    assert admit(pool, tokens).num_hit_tokens == 8


def test_what_does_not_fit_changes_nothing() -> None:
    pool = PrefixPool(BlockPool(4, 4, free_order="new"))
    held = admit(pool, [1] * 12)
    order = pool.blocks.free_queue()
    with pytest.raises(OutOfBlocks, match="needs 2 blocks beside 2 cached ones, 1 of 4 are free"):
        admit(pool, [1] * 8 + [2] * 8)
    with pytest.raises(OutOfBlocks, match="2 blocks asked for, 1 of 4 are free"):
        pool.grow(held, 17)
    assert pool.blocks.free_queue() == order
    pool.check_integrity([held])
    pool.release(held)
    with pytest.raises(OutOfBlocks, match="needs 3 blocks beside 2 cached ones, 2 of 4 are free"):
        admit(pool, [1] * 8 + [2] * 12)  # the cached ones are free, and would no longer be
    pool.check_integrity([])


def test_without_caching_nothing_is_shared() -> None:
    pool = PrefixPool(BlockPool(8, 4), prefix_caching=False)
    held = [admit(pool, [1] * 9), admit(pool, [1] * 9)]
    assert [h.num_hit_tokens for h in held] == [0, 0]
    assert not any(pool.blocks.lookup([key]) for key in held[0].keys)
    pool.blocks.check_integrity()


def test_a_listener_hears_of_hits_misses_and_evictions() -> None:
    heard: list[tuple[int, Key, int]] = []
    pool = PrefixPool(BlockPool(2, 4, on_event=lambda *event: heard.append(event)))
    one, other = keys_of([1] * 5)[0], keys_of([2] * 8)
    pool.release(admit(pool, [1] * 5))
    pool.release(admit(pool, [1] * 5))
    admit(pool, [2] * 8)
    assert heard == [(MISS, one, 0), (HIT, one, 0), (EVICT, one, 0), (MISS, other[0], 1), (MISS, other[1], 0)]


@pytest.mark.parametrize("free_order", ["old", "new"])
def test_a_forgotten_block_is_not_found_and_goes_first(free_order: FreeOrder) -> None:
    void: list[list[int]] = []
    pool = PrefixPool(BlockPool(4, 2, free_order=free_order, on_void=void.append))
    tokens = [1, 2, 3, 4, 5, 6, 7]
    held = admit(pool, tokens)
    pool.release(held)
    assert void == [[3]], "the partial block"
    assert pool.blocks.forget([1, 3]) == 1
    assert void == [[3], [1]]
    assert pool.match(keys_of(tokens, 2), 7) == [0]
    assert [pool.blocks.lookup([key]) for key in keys_of(tokens, 2)] == [[0], [], [2]]
    assert pool.blocks.free_queue()[0] == 1
    again = admit(pool, tokens[:4])
    assert again.block_ids == [0, 1]
    assert len(void) == 2, "no content was given up for it"
    pool.check_integrity([again])
    # What followed the lost block is right again behind the one that was computed anew.
    assert pool.match(keys_of(tokens, 2), 7) == [0, 1, 2]


def test_a_forgotten_block_is_void_after_its_last_user() -> None:
    void: list[list[int]] = []
    pool = PrefixPool(BlockPool(4, 2, on_void=void.append))
    first, second = admit(pool, [1, 1, 2]), admit(pool, [1, 1, 3])
    assert (first.block_ids, second.block_ids) == ([0, 1], [0, 2])
    assert pool.blocks.forget([0]) == 1
    assert pool.match(keys_of([1, 1, 2], 2), 3) == void == []
    pool.release(first)
    assert void == [[1]]
    pool.release(second)
    assert void == [[1], [2, 0]]
    pool.check_integrity([])


def test_evicted_content_is_void_before_reuse() -> None:
    void: list[list[int]] = []
    pool = PrefixPool(BlockPool(2, 2, free_order="new", on_void=void.append))
    pool.release(admit(pool, [1, 1, 2, 2]))
    assert void == []
    assert admit(pool, [3, 3, 3]).block_ids == [1, 0]
    assert void == [[1, 0]]


@pytest.mark.parametrize("ids", [[0, 4], [-1, 0]])
def test_forgetting_an_unknown_block_changes_nothing(ids: list[int]) -> None:
    pool = PrefixPool(BlockPool(4, 2))
    held = admit(pool, [1, 1, 1])
    with pytest.raises(ValueError, match=f"blocks {ids[0]} to {ids[1]}: the pool has 0 to 3"):
        pool.blocks.forget(ids)
    pool.check_integrity([held])


def test_a_block_that_is_still_being_computed_has_no_key() -> None:
    pool = PrefixPool(BlockPool(4, 2))
    held = pool.admit(keys_of([1, 1, 1, 1], 2), 4, num_filled=0, num_slots=2)
    pool.grow(held, 4, num_filled=0)
    assert (len(held.block_ids), held.num_keyed) == (2, 0)
    pool.grow(held, 4, num_filled=2)
    assert (len(held.block_ids), held.num_keyed) == (2, 1)


class PoolMachine(RuleBasedStateMachine):
    """Admits, grows, finishes, preempts and takes back, in any order; few tokens, so that much is shared."""

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.integers(1, 3),
        null_block=st.booleans(),
        free_order=st.sampled_from(["old", "new"]),
    )
    def start(self, num_blocks: int, block_size: int, null_block: bool, free_order: FreeOrder) -> None:
        self.pool = PrefixPool(
            BlockPool(num_blocks, block_size, null_block=null_block, free_order=free_order)
        )
        self.pool.blocks.on_void = self._void
        self.void = set(range(int(null_block), num_blocks))  # their content can no longer be read
        self.live: list[tuple[HeldBlocks, KeyChain, list[int]]] = []
        self.preempted: list[list[int]] = []
        self.seen: set[tuple[int, ...]] = set()  # prefixes that were ever cached

    def _void(self, block_ids: list[int]) -> None:
        assert block_ids and not self.void & set(block_ids), "named twice"
        assert not any(map(self.pool.blocks.num_users, block_ids)), "it is in use"
        self.void |= set(block_ids)

    def _admit(self, tokens: list[int], chunk: int) -> bool:
        chain = KeyChain(self.pool.blocks.block_size, SECRET)
        chain.extend(tokens)
        expected = self.pool.match(chain.keys, len(tokens))
        free = self.pool.blocks.num_free
        try:
            held = self.pool.admit(chain.keys, len(tokens), min(len(tokens), chunk))
        except OutOfBlocks:
            assert self.pool.blocks.num_free == free
            return False
        size = self.pool.blocks.block_size
        assert held.block_ids[: held.num_hit_blocks] == expected
        assert held.num_hit_tokens == size * len(expected) < len(tokens)
        assert not expected or tuple(tokens[: held.num_hit_tokens]) in self.seen
        self.live.append((held, chain, tokens))
        self._remember(held, tokens)
        return True

    def _remember(self, held: HeldBlocks, tokens: list[int]) -> None:
        size = self.pool.blocks.block_size
        self.seen |= {tuple(tokens[: n * size]) for n in range(1, held.num_keyed + 1)}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), chunk=st.integers(1, 12))
    def arrive(self, tokens: list[int], chunk: int) -> None:
        self._admit(tokens, chunk)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        held, chain, tokens = data.draw(st.sampled_from(self.live))
        table = list(held.block_ids)
        tokens.append(token)
        chain.extend([token])
        try:
            self.pool.grow(held, len(tokens))
        except OutOfBlocks:
            assert held.block_ids == table
            return
        assert held.block_ids[: len(table)] == table
        self._remember(held, tokens)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), comes_back=st.booleans())
    def leave(self, data: st.DataObject, comes_back: bool) -> None:
        entry = data.draw(st.sampled_from(self.live))
        self.live.remove(entry)
        self.pool.release(entry[0])
        if comes_back:
            self.preempted.append(entry[2])

    @rule(data=st.data(), comes_back=st.booleans())
    def lose(self, data: st.DataObject, comes_back: bool) -> None:
        blocks = self.pool.blocks
        lost = data.draw(st.sets(st.integers(0, blocks.num_blocks - 1), min_size=1, max_size=3))
        keyed = {block for block in lost if blocks.key_of(block) is not None}
        assert self.pool.blocks.forget(lost) == len(keyed)
        assert all(blocks.key_of(block) is None for block in lost)
        for entry in [entry for entry in self.live if lost & set(entry[0].block_ids)]:
            self.live.remove(entry)
            self.pool.release(entry[0])
            if comes_back:
                self.preempted.append(entry[2])
        assert {block for block in lost if not blocks.num_users(block)} <= self.void | {0}

    @precondition(lambda self: self.preempted)
    @rule(chunk=st.integers(1, 12))
    def resume(self, chunk: int) -> None:
        if self._admit(self.preempted[-1], chunk):
            self.preempted.pop()

    @invariant()
    def holds_together(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity([held for held, _, _ in self.live])
        used = {block for held, _, _ in self.live for block in held.block_ids}
        blocks = self.pool.blocks
        assert blocks.num_free == blocks.num_usable - len(used)
        self.void -= used
        usable = range(blocks.num_blocks - blocks.num_usable, blocks.num_blocks)
        free = [block for block in usable if not blocks.num_users(block)]
        assert self.void == {block for block in free if blocks.key_of(block) is None}


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
