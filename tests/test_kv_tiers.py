"""What the tiers say they served, against counting block by block."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.kv.tiers.account import OffloadedTiers, ResidentTiers, StepReads, in_token_order
from dsatrace.kv.tiers.fetches import StepFetches
from helpers.trace_samples import LAYOUT

RECORDS = st.lists(
    st.tuples(st.sets(st.integers(0, 9), min_size=1), st.integers(1, 7)), min_size=1, max_size=5
)


def reads_of(records: list[tuple[set[int], int]], block_size: int) -> StepReads:
    """Each record: touched blocks, of each the first token, and tokens held by the request's last block,
    which is its highest."""
    blocks = [sorted(touched) for touched, _ in records]
    last_tokens = [min(tail, block_size) for _, tail in records]
    flat = np.array([block for ids in blocks for block in ids], dtype=np.int32)
    pointers = np.cumsum([0, *(len(ids) for ids in blocks)])
    return StepReads(
        seq_len=np.array(
            [ids[-1] * block_size + tail for ids, tail in zip(blocks, last_tokens, strict=True)]
        ),
        block_size=block_size,
        batch_size=len(records) + 1,
        block_ids=flat,
        block_ptr=pointers,
        tokens_selected=np.ones(len(flat), dtype=np.int64),
        tokens=flat * block_size,
        token_ptr=pointers,
        positions=np.zeros((1, len(records), 0), dtype=np.int32),  # of no matter in HBM
    )


@given(RECORDS, st.integers(1, 7))
def test_resident_tiers_read_every_touched_block_in_hbm(
    records: list[tuple[set[int], int]], block_size: int
) -> None:
    reads = reads_of(records, block_size)
    accounts = ResidentTiers(LAYOUT).accounts(reads)
    account = accounts["hbm"]
    for i, (touched, _) in enumerate(records):
        held = sum(min(block_size, int(reads.seq_len[i]) - block * block_size) for block in touched)
        assert account.hit_blocks[i] == len(touched)
        assert account.bytes_read[i] == held * LAYOUT.latent_bytes_per_token
        assert account.bytes_useful[i] == len(touched) * LAYOUT.latent_bytes_per_token
        assert account.read_ops[i] == sum(block - 1 not in touched for block in touched)
    assert (account.latency_us == 0).all()
    assert (account.batch_size, account.latency_kind) == (len(records) + 1, "none")
    for name in ("local_pool", "remote_pool"):
        nothing = accounts[name]
        for values in (nothing.hit_blocks, nothing.bytes_read, nothing.bytes_useful, nothing.read_ops):
            assert values.tolist() == [0] * len(records)
        assert (nothing.batch_size, nothing.latency_kind) == (0, "none")


def test_an_untouched_last_block_costs_nothing() -> None:
    reads = reads_of([({0, 2}, 3)], 4)
    longer = dataclasses.replace(reads, seq_len=np.array([30]))
    assert ResidentTiers(LAYOUT).accounts(longer)["hbm"].bytes_read.tolist() == [8 * 1152]


def fetches_of(served_by: list[int]) -> StepFetches:
    """One record in one layer, for which nothing was moved."""
    zeros = np.zeros((1, 1, 3), dtype=np.int64)
    tiers = np.array([[served_by]], dtype=np.int8)
    return StepFetches(tiers, zeros, zeros, zeros, zeros, zeros, zeros, np.zeros((1, 3)))


def found(positions: list[int], served_by: list[int], **kinds: str) -> dict[str, dict[str, int]]:
    """By tier, the account of one record with blocks of 4 tokens and 10 tokens held."""
    ascending = np.sort(np.array(positions, dtype=np.int32))
    blocks, tokens_selected = np.unique(ascending // 4, return_counts=True)
    reads = StepReads(
        seq_len=np.array([10]),
        block_size=4,
        batch_size=3,
        block_ids=blocks,
        block_ptr=np.array([0, len(blocks)]),
        tokens_selected=tokens_selected,
        tokens=ascending,
        token_ptr=np.array([0, len(positions)]),
        positions=np.array([[positions]], dtype=np.int32),
        fetches=fetches_of(served_by),
    )
    tiers = OffloadedTiers(100, "block", kinds or {"local_pool": "measured", "remote_pool": "modelled"})
    accounts = tiers.accounts(reads)
    return {
        name: {field: value.item() for field, value in account.columns().items() if hasattr(value, "item")}
        for name, account in accounts.items()
    }


def test_an_offloaded_step_by_hand() -> None:
    """Block 0 lies half in the remote pool, block 1 in the local one, block 2, half full, in HBM."""
    tiers = found([9, 1, 4, 0, 5, 8], [0, 2, 1, 0, 1, 0])
    asked = ("requested_tokens", "hit_tokens", "missed_tokens")
    assert [[tiers[name][field] for field in asked] for name in tiers] == [[6, 3, 3], [3, 2, 1], [1, 1, 0]]
    asked = ("requested_blocks", "hit_blocks", "missed_blocks")
    assert [[tiers[name][field] for field in asked] for name in tiers] == [[3, 1, 2], [2, 1, 1], [1, 1, 0]]
    assert (tiers["hbm"]["bytes_read"], tiers["hbm"]["bytes_useful"]) == (200, 300)  # 2 of 4 tokens are there
    assert tiers["hbm"]["read_ops"] == 1


def test_a_tier_that_is_not_there_is_asked_for_nothing() -> None:
    tiers = found([9, 1], [0, 2], remote_pool="measured")
    assert set(tiers["local_pool"].values()) == {0}
    assert (tiers["hbm"]["missed_tokens"], tiers["remote_pool"]["requested_tokens"]) == (1, 1)


@pytest.mark.parametrize(
    ("served_by", "said"),
    [
        ([0, 1], "served by local_pool, and the run has hbm, remote_pool"),
        ([-1, 0], "served by none, and the run has hbm, remote_pool"),
        ([0, 3], "served by tier 0 to 3"),
        ([0, -128], "served by tier -128 to 0"),
    ],
)
def test_a_token_of_no_known_tier_is_refused(served_by: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        found([9, 1], served_by, remote_pool="measured")


def test_positions_beyond_32_bits_keep_their_tiers() -> None:
    positions = np.array([[[2**31 - 1, 5, 2**30]]], dtype=np.int32)
    assert in_token_order(positions, np.array([[[2, 1, 0]]])).tolist() == [1, 0, 2]


def test_captures_of_another_run_are_refused() -> None:
    reads = reads_of([({0}, 1)], 4)
    with pytest.raises(ValueError, match="does not say which served it"):
        OffloadedTiers(100, "row", {"local_pool": "measured"}).accounts(reads)
    with pytest.raises(ValueError, match="the run has no tiers"):
        ResidentTiers(LAYOUT).accounts(dataclasses.replace(reads, fetches=fetches_of([0])))
    with pytest.raises(ValueError, match="positions of"):
        in_token_order(np.zeros((1, 1, 2), dtype=np.int32), np.zeros((1, 1, 3), dtype=np.int8))


@given(st.data())
def test_tiers_follow_their_positions(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, 4)) for _ in range(3))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    positions = rng.permuted(np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape), axis=2)
    positions[positions < data.draw(st.integers(0, shape[2] - 1))] = -1
    served_by = np.where(positions < 0, -1, positions * 7 % 3)
    expected = [
        position * 7 % 3
        for b in range(shape[1])
        for layer in range(shape[0])
        for position in sorted(positions[layer, b].tolist())
        if position >= 0
    ]
    assert in_token_order(positions, served_by).tolist() == expected
