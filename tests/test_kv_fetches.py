"""Which row is charged for which fetched unit, against sets; and whole shares of a batch."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.kv.stores.interface import StoreStats
from dsatrace.kv.tiers.fetches import (
    HBM,
    LOCAL,
    NUM_TIERS,
    REMOTE,
    FetchCounters,
    LayerFetch,
    StepFetches,
    TierCounts,
    first_touches,
    layer_fetch,
    share_out,
)
from dsatrace.kv.tiers.stack import TierStack
from helpers.memory_store import MemoryStore
from helpers.power import examples

NUM_TOKENS = 32
TOKEN_BYTES = 10


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.integers(0, 20), max_size=60), st.integers(0, 2**32))
def test_first_touches_are_those_of_a_set(units: list[int], seed: int) -> None:
    scratch = np.random.default_rng(seed).integers(-5, 50, 21)  # whatever it held before
    distinct, first = first_touches(np.array(units, dtype=np.int64), scratch)
    assert distinct.tolist() == sorted(set(units))
    assert first.tolist() == [units.index(unit) for unit in sorted(set(units))]


@st.composite
def selections(draw: st.DrawFn) -> list[list[int]]:
    """Distinct tokens of each row; rows may share some."""
    tokens = st.lists(st.integers(0, NUM_TOKENS - 1), max_size=8, unique=True)
    return draw(st.lists(tokens, min_size=1, max_size=4))


def counts(rng: np.random.Generator) -> TierCounts:
    whole = [rng.integers(0, 40, NUM_TIERS) for _ in range(4)]
    return TierCounts(*whole, latency_us=rng.random(NUM_TIERS))


@settings(max_examples=examples(150), deadline=None)
@given(selections(), st.sampled_from([1, 4]), st.integers(0, 2**32), st.integers(0, 3))
def test_each_fetched_unit_is_charged_once(
    rows: list[list[int]], unit_tokens: int, seed: int, num_others: int
) -> None:
    rng = np.random.default_rng(seed)
    tier_of_unit = rng.integers(0, NUM_TIERS, NUM_TOKENS // unit_tokens).astype(np.int8)
    slots = np.full((len(rows), 8), -1)
    for slot, tokens in zip(slots, rows, strict=True):
        slot[: len(tokens)] = tokens
    fetched = {token // unit_tokens for tokens in rows for token in tokens}
    fetched = {unit for unit in fetched if tier_of_unit[unit] > HBM}
    moved = counts(rng)
    fetch = layer_fetch(
        slots // unit_tokens,
        tier_of_unit,
        np.zeros(len(tier_of_unit), dtype=np.int64),
        moved,
        num_fetched=len(fetched) + num_others,
        unit_bytes=unit_tokens * TOKEN_BYTES,
        token_bytes=TOKEN_BYTES,
    )
    charged: set[int] = set()
    for row, tokens in enumerate(rows):
        tiers = [int(tier_of_unit[token // unit_tokens]) for token in tokens]
        assert fetch.served_by[row].tolist() == tiers + [-1] * (8 - len(tokens))
        own = {token // unit_tokens for token in tokens} & fetched - charged
        charged |= own
        for tier in (LOCAL, REMOTE):
            here = [unit for unit in own if tier_of_unit[unit] == tier]
            useful = [token for token in tokens if token // unit_tokens in here]
            assert fetch.bytes_read[row, tier] == len(here) * unit_tokens * TOKEN_BYTES
            assert fetch.bytes_useful[row, tier] == len(useful) * TOKEN_BYTES
    assert charged == fetched
    assert (fetch.bytes_read[:, HBM] == 0).all() and (fetch.bytes_useful <= fetch.bytes_read).all()
    for name in ("read_ops", "evicted_units", "errors"):
        told, whole = getattr(fetch, name).sum(0), getattr(moved, name)
        assert (told == whole).all() if fetched and not num_others else (told <= whole).all()
    assert (fetch.bytes_written % (unit_tokens * TOKEN_BYTES) == 0).all()
    assert fetch.latency_us is moved.latency_us


def test_without_a_batch_a_row_is_charged_nothing() -> None:
    fetch = layer_fetch(
        np.array([[0, 1, -1]]),
        np.array([HBM, REMOTE], dtype=np.int8),
        np.zeros(2, dtype=np.int64),
        None,
        num_fetched=0,
        unit_bytes=8,
        token_bytes=8,
    )
    assert fetch.served_by.tolist() == [[HBM, REMOTE, -1]]
    assert fetch.bytes_read.sum() == fetch.bytes_written.sum() == 0


@settings(max_examples=examples(150), deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=3, max_size=3),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(0, 9),
)
def test_shares_are_whole_and_near_their_weights(totals: list[int], weights: list[int], rest: int) -> None:
    shares = share_out(np.array(totals), np.array(weights), rest)
    whole = sum(weights) + rest
    for tier, total in enumerate(totals):
        for share, weight in zip(shares[:, tier].tolist(), weights, strict=True):
            assert whole == 0 or abs(share - total * weight / whole) < 1
        if rest == 0 and whole:
            assert shares[:, tier].sum() == total


def test_a_step_keeps_the_recorded_rows() -> None:
    rng = np.random.default_rng(0)

    def layer() -> LayerFetch:
        parts = [rng.integers(0, 9, (3, NUM_TIERS)) for _ in range(6)]
        return LayerFetch(
            rng.integers(0, 3, (3, 4)).astype(np.int8), *parts, latency_us=rng.random(NUM_TIERS)
        )

    layers = [layer(), layer()]
    step = StepFetches.of(layers, rows=[0, 2], top_k=6)
    assert step.served_by.shape == (2, 2, 6)
    assert (step.served_by[..., 4:] == -1).all()
    for i, one in enumerate(layers):
        assert (step.served_by[i, :, :4] == one.served_by[[0, 2]]).all()
        assert (step.read_ops[i] == one.read_ops[[0, 2]]).all()
        assert (step.latency_us[i] == one.latency_us).all()


def test_counts_of_tiers_and_of_layers_are_subtracted() -> None:
    stats = StoreStats(read_ops=5, stored_units=3, errors=1, corrupt_units=2, read_us=7.0, write_us=1.0)
    store = MemoryStore(unit_bytes=8)
    stack = TierStack(store, None, num_layers=1, units_per_layer=1)
    before = stack.counts(hbm_evicted=4, hbm_written=2)
    store.stats = lambda: stats
    moved = stack.counts(hbm_evicted=9, hbm_written=8) - before
    assert moved.evicted_units.tolist() == [5, 0, 0]
    assert moved.written_units.tolist() == [6, 3, 0]
    assert (moved.read_ops.tolist(), moved.errors.tolist()) == ([0, 5, 0], [0, 3, 0])
    assert moved.latency_us.tolist() == [0.0, 8.0, 0.0]
    once = FetchCounters(requested_units=5, missed_units=2)
    assert once + once - once == once
    assert (once + once).hit_units == 6
