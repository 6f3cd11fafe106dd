"""What the tiers say they served, against counting block by block."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.kv.tiers import NullTier, ResidentTier, StepReads
from trace_samples import LAYOUT

RECORDS = st.lists(
    st.tuples(st.sets(st.integers(0, 9), min_size=1), st.integers(1, 7)), min_size=1, max_size=5
)


def reads_of(records: list[tuple[set[int], int]], block_size: int) -> StepReads:
    """Each record: touched blocks, and tokens held by the request's last block, which is its highest."""
    blocks = [sorted(touched) for touched, _ in records]
    last_tokens = [min(tail, block_size) for _, tail in records]
    return StepReads(
        request_ids=tuple(f"r{i}" for i in range(len(records))),
        layer_ids=np.zeros(len(records), dtype=np.int64),
        step_idx=np.zeros(len(records), dtype=np.int64),
        seq_len=np.array(
            [ids[-1] * block_size + tail for ids, tail in zip(blocks, last_tokens, strict=True)]
        ),
        block_size=block_size,
        batch_size=len(records) + 1,
        block_ids=np.array([block for ids in blocks for block in ids], dtype=np.int32),
        block_ptr=np.cumsum([0, *(len(ids) for ids in blocks)]),
        tokens_selected=np.array([1 for ids in blocks for _ in ids]),
    )


@given(RECORDS, st.integers(1, 7))
def test_resident_tier_reads_every_touched_block(
    records: list[tuple[set[int], int]], block_size: int
) -> None:
    reads = reads_of(records, block_size)
    account = ResidentTier(LAYOUT).account(reads)
    for i, (touched, _) in enumerate(records):
        held = sum(min(block_size, int(reads.seq_len[i]) - block * block_size) for block in touched)
        assert account.hit_blocks[i] == len(touched)
        assert account.bytes_read[i] == held * LAYOUT.latent_bytes_per_token
        assert account.bytes_useful[i] == len(touched) * LAYOUT.latent_bytes_per_token
        assert account.read_ops[i] == sum(block - 1 not in touched for block in touched)
    assert (account.latency_us == 0).all()
    assert (account.batch_size, account.latency_kind) == (len(records) + 1, "none")


def test_an_untouched_last_block_costs_nothing() -> None:
    reads = reads_of([({0, 2}, 3)], 4)
    longer = StepReads(**{**vars(reads), "seq_len": np.array([30])})
    assert ResidentTier(LAYOUT).account(longer).bytes_read.tolist() == [8 * 1152]


@given(RECORDS)
def test_null_tier_serves_nothing(records: list[tuple[set[int], int]]) -> None:
    account = NullTier().account(reads_of(records, 4))
    for values in (account.hit_blocks, account.bytes_read, account.bytes_useful, account.read_ops):
        assert values.tolist() == [0] * len(records)
    assert (account.batch_size, account.latency_kind) == (0, "none")
