"""The block pool hands out every block once, and notices what must not happen."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.kv.blocks import EVICT, BlockPool, Key, OutOfBlocks, blocks_needed
from dsatrace.kv.policies.simulate import simulate
from dsatrace.kv.policies.stream import AccessStream
from helpers.policy_streams import prefixes
from helpers.power import examples


def test_blocks_needed_rounds_up() -> None:
    assert [blocks_needed(n, 16) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_all_or_nothing() -> None:
    pool = BlockPool(4, 16)
    taken = pool.allocate(3)
    with pytest.raises(OutOfBlocks, match="2 blocks asked for, 1 of 4 are free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.free(taken)
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


def test_the_freed_tail_is_reused_first() -> None:
    pool = BlockPool(3, 16)
    pool.free(pool.allocate(3))
    assert pool.allocate(3) == [2, 1, 0]


@pytest.mark.parametrize("ids", [[0], [1, 1], [7], [-1]])
def test_a_bad_free_is_caught_and_changes_nothing(ids: list[int]) -> None:
    pool = BlockPool(4, 16)
    pool.free(pool.allocate(1))
    held = pool.allocate(4)
    pool.free([block for block in held if block == 0])
    with pytest.raises(ValueError, match="block"):
        pool.free(ids)
    assert pool.num_free == 1
    pool.check_integrity()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 80)), max_size=40))
def test_any_sequence_keeps_every_block_in_one_place(moves: list[tuple[int, int]]) -> None:
    pool = BlockPool(12, 8)
    tables: list[list[int]] = [[] for _ in range(4)]
    for which, num_tokens in moves:
        table = tables[which]
        if num_tokens == 0:
            pool.free(table)
            table.clear()
        else:
            before = list(table)
            try:
                new = pool.allocate(max(0, blocks_needed(num_tokens, 8) - len(table)))
            except OutOfBlocks:
                assert table == before
            else:
                table += new
                assert table == before + new
                assert len(table) * pool.block_size >= num_tokens
        held = [block for table in tables for block in table]
        assert len(set(held)) == len(held)
        assert pool.num_free == 12 - len(held)
        pool.check_integrity()


def test_a_pool_has_at_least_one_usable_block() -> None:
    with pytest.raises(ValueError, match="not 0 of 16"):
        BlockPool(0, 16)
    with pytest.raises(ValueError, match="not 1 of 16, block 0 kept back"):
        BlockPool(1, 16, null_block=True)


PREFIX_TREES = st.lists(st.lists(st.integers(0, 1), max_size=5), min_size=1, max_size=30)


@settings(max_examples=examples(20), deadline=None)
@given(PREFIX_TREES, st.integers(6, 14), st.integers(1, 3), st.booleans())
def test_the_pool_evicts_what_an_lru_policy_evicts(
    words: list[list[int]], num_blocks: int, concurrency: int, leaf: bool
) -> None:
    """The same hits, and the same blocks given up in the same order: parents go after their children."""
    stream = AccessStream.of(prefixes(words), concurrency=concurrency)
    policy = simulate(stream, "lru", num_blocks, leaf=leaf, log_evictions=True)
    hits: list[int] = []  # of each request so far
    evicted: list[tuple[int, Key]] = []

    def note(kind: int, key: Key, _block: int) -> None:
        if kind == EVICT:
            evicted.append((len(hits), key))

    pool = BlockPool(num_blocks, 1, on_event=note)
    live: deque[list[int]] = deque()
    for begin, end in zip(stream.starts[:-1], stream.starts[1:], strict=True):
        keys = stream.blocks[begin:end].tolist()
        if len(live) == concurrency:
            pool.free(live.popleft())
        while True:
            shared = pool.lookup(keys)
            num_free = pool.num_free - sum(not pool.num_users(block) for block in shared)
            if len(keys) - len(shared) <= num_free:
                break
            pool.free(live.popleft())
        pool.share(shared)
        new = pool.allocate(len(keys) - len(shared))
        pool.set_keys(new, keys[len(shared) :])
        live.append(shared + new)
        hits.append(len(shared))
    assert hits == policy.hits.tolist()
    assert evicted == [tuple(one) for one in policy.evictions.tolist()]
