"""Null streams: what they keep of a stream, and what chance makes of them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.selection_replay.locality import LagOverlap
from dsatrace.selection_replay.nulls import NULLS, chance, null_of, recency, seed_of, shuffled, uniform
from dsatrace.selection_replay.steps import Steps
from helpers.visible_steps import sets_of, visible_steps

SETTINGS = settings(max_examples=60, deadline=None)


def decode(num_steps: int, k: int, context: int) -> Steps:
    """A request's sizes: one more token is visible per step. It selects the first k."""
    ptr = np.arange(num_steps + 1, dtype=np.int64) * k
    ids = np.tile(np.arange(k, dtype=np.int32), num_steps)
    visible = context + np.arange(num_steps, dtype=np.int64)
    return Steps(ids, ptr, (visible - 1).astype(np.int32), visible, int(visible[-1]))


@SETTINGS
@given(steps=visible_steps(), seed=st.integers(0, 2**64 - 1))
def test_keep(steps: Steps, seed: int) -> None:
    """Sizes stay, ids are distinct, and each was visible."""
    for name in NULLS:
        null = null_of(steps, name, seed)
        assert null is not None
        assert null.num_warm == steps.num_warm and null.ids.dtype == np.int32
        if name != "shuffled":
            assert null.sizes.tolist() == steps.sizes.tolist()
        for ids, size, visible in zip(sets_of(null), null.sizes, null.visible, strict=True):
            assert len(ids) == size
            assert all(0 <= id_ < visible for id_ in ids)
            assert null.num_ids > max(ids, default=-1)


@SETTINGS
@given(steps=visible_steps(), seed=st.integers(0, 2**64 - 1))
def test_shuffled(steps: Steps, seed: int) -> None:
    """The same steps, each with its own ids in their order; warm ones among themselves."""
    newest = np.arange(steps.num_steps, dtype=np.int32)
    null = shuffled(dataclasses.replace(steps, newest=newest), seed)
    assert sorted(null.newest[: steps.num_warm]) == list(range(steps.num_warm))
    assert sorted(null.newest) == newest.tolist()
    for step, source in enumerate(null.newest.tolist()):
        assert null.of_step(step).tolist() == steps.of_step(source).tolist()
        assert null.visible[step] == steps.visible[source]


def test_shuffled_loses_order() -> None:
    """A window that moves on is local; in random order it is not, though its ids are as popular."""
    steps = recency(decode(400, 16, 64))
    local, lost = (LagOverlap.of(each).share()[0] for each in (steps, shuffled(steps, 3)))
    assert local == 15 / 16
    assert lost is not None and lost < 0.15


def test_every_order_is_as_likely() -> None:
    steps = Steps.of([[0], [1], [2]], visible=[3, 3, 3])
    orders = Counter(tuple(shuffled(steps, seed_of(seed)).ids.tolist()) for seed in range(6000))
    assert len(orders) == 6
    # 6 sd of a binomial count: fails once in 10^8 seeds, and these are fixed.
    assert all(abs(count - 1000) < 6 * math.sqrt(1000 * 5 / 6) for count in orders.values())


@pytest.mark.parametrize(("k", "visible"), [(1, 5), (3, 5), (4, 70), (60, 64), (64, 64), (5, 65)])
def test_every_id_is_as_likely(k: int, visible: int) -> None:
    steps = decode(4000, k, visible)
    steps = dataclasses.replace(steps, visible=np.full(4000, visible), num_ids=visible)
    counts = np.bincount(uniform(steps, 11).ids, minlength=visible)
    share = k / visible
    bound = 6 * math.sqrt(4000 * share * (1 - share))
    assert (abs(counts - 4000 * share) <= bound).all()
    if 1 < k < visible:  # pairs too: the number of steps that hold ids 0 and 1
        both = sum({0, 1} <= ids for ids in sets_of(uniform(steps, 11)))
        share = k * (k - 1) / (visible * (visible - 1))
        assert abs(both - 4000 * share) <= 6 * math.sqrt(4000 * share * (1 - share))


def test_uniform_overlaps_by_chance() -> None:
    """k / N, within 5 standard deviations of a hypergeometric count."""
    k, context, num_steps = 2048, 131_072, 40
    steps = decode(num_steps, k, context)
    lags = LagOverlap.of(uniform(steps, seed_of(1, "r0", 3)))
    p, pairs = k / context, num_steps - 1
    variance = k * p * (1 - p) * (context - k) / (context - 1)
    for counts in (lags.shared, lags.shifted):
        assert counts is not None
        assert abs(counts[0] - pairs * k * p) < 5 * math.sqrt(pairs * variance)
    assert chance(steps) == pytest.approx(p, rel=1e-3)
    assert lags.chance_share()[0] == pytest.approx(p, rel=1e-3)


def test_uniform_seeds() -> None:
    steps = decode(20, 100, 1000)
    assert uniform(steps, 5).ids.tolist() == uniform(steps, 5).ids.tolist()
    first, *others = (sets_of(uniform(steps, seed_of(0, "r0", layer))) for layer in range(20))
    shared = sum(len(a & b) for other in others for a, b in zip(first, other, strict=True))
    variance = 100 * 0.1 * 0.9 * 900 / 999
    assert abs(shared - 19 * 20 * 10) < 5 * math.sqrt(19 * 20 * variance)
    # Steps of one stream are as unrelated.
    assert len({tuple(ids) for ids in map(sorted, sets_of(uniform(steps, 5)))}) == 20


def test_seeds_stay() -> None:
    """A seed means the same stream on every machine and in every version."""
    assert seed_of(0, "r0", 3) == seed_of(0, "r0", 3) != seed_of(0, "r0", 4)
    assert len({seed_of(seed, name, layer) for seed in (0, 1) for name in "ab" for layer in (0, 1)}) == 8
    steps = decode(2, 5, 100)
    assert uniform(steps, 7).ids.tolist() == [13, 14, 19, 74, 97, 15, 24, 43, 46, 61]
    assert shuffled(Steps.of([[0], [1], [2], [3], [4], [5]]), 7).ids.tolist() == [5, 4, 1, 3, 0, 2]


def test_recency() -> None:
    steps = recency(decode(50, 8, 100))
    assert LagOverlap.of(steps).share()[:3] == (7 / 8, 6 / 8, 5 / 8)
    assert steps.of_step(0).tolist() == list(range(92, 100))


def test_unordered() -> None:
    """Experts and slots have no last ones."""
    steps = Steps.of([[200, 3], [3, 9]], visible=[8, 8])
    nulls = {name: null_of(steps, name, 0, ordered=False) for name in NULLS}
    assert nulls["recency"] is None
    assert nulls["uniform"] is not None and nulls["uniform"].ids.max() < 8
    assert nulls["shuffled"] is not None and nulls["shuffled"].num_ids == 201


def test_chance() -> None:
    steps = Steps.of([[0, 1], [0, 1, 2], [4]], visible=[4, 6, 10], num_warm=1)
    assert chance(steps) == pytest.approx((3 * 3 / 6 + 1 / 10) / 4)
    assert chance(Steps.of([[]])) is None


@pytest.mark.parametrize("null", [lambda steps: uniform(steps, 0), recency])
def test_too_many(null) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="step 1 selects 3 ids, but only 2 are visible"):
        null(Steps.of([[0], [0, 1, 2]], visible=[3, 2]))


def test_no_steps() -> None:
    steps = Steps.of([])
    for name in NULLS:
        null = null_of(steps, name, 0)
        assert null is not None and null.num_steps == 0
