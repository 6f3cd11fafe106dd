"""The block pool hands out every block once, and notices what must not happen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.kv.blocks import BlockPool, OutOfBlocks, blocks_needed


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


def test_a_pool_has_at_least_one_block() -> None:
    with pytest.raises(ValueError, match="not 0 of 16"):
        BlockPool(0, 16)
