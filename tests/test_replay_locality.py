"""Locality's figures against plain sets, and that they add."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher

from dsatrace.commands import warmup
from dsatrace.selection_replay import layer_overlap, locality, nulls, predictors
from dsatrace.selection_replay.layer_overlap import LayerOverlap
from dsatrace.selection_replay.locality import (
    MAX_LAG,
    MEASURES,
    WINDOWS,
    Ages,
    Frequency,
    LagOverlap,
    Reuse,
    WorkingSets,
)
from dsatrace.selection_replay.nulls import CHANCE_BITS, CHANCE_UNIT, expected_shared
from dsatrace.selection_replay.predictors import predictions_of
from dsatrace.selection_replay.steps import Steps
from dsatrace.selection_replay.sums import quantile
from helpers.visible_steps import chance_of, sets_of, visible_steps

SETTINGS = settings(max_examples=60, deadline=None)
SLIDING = [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]


@SETTINGS
@given(visible_steps())
def test_lags(steps: Steps) -> None:
    found, sets = LagOverlap.of(steps), sets_of(steps)
    for lag in range(1, MAX_LAG + 1):
        later = range(max(lag, steps.num_warm), len(sets))
        shared = [len(sets[t] & sets[t - lag]) for t in later]
        moved = [int(steps.visible[t] - steps.visible[t - lag]) for t in later]
        assert found.pairs[lag - 1] == len(later)
        assert found.selected[lag - 1] == sum(len(sets[t]) for t in later)
        assert found.earlier[lag - 1] == sum(len(sets[t - lag]) for t in later)
        assert found.shared[lag - 1] == sum(shared)
        assert found.shifted is not None
        assert found.shifted[lag - 1] == sum(
            len(sets[t] & {id_ + by for id_ in sets[t - lag]}) for t, by in zip(later, moved, strict=True)
        )
        assert found.chance[lag - 1] == sum(
            chance_of(len(sets[t]), len(sets[t - lag]), int(steps.visible[t])) for t in later
        )
        unions = sum(len(sets[t] | sets[t - lag]) for t in later)
        assert found.jaccard()[lag - 1] == (sum(shared) / unions if unions else None)


def test_lags_of_many_ids() -> None:
    """More ids per step than a byte can count, and lags up to the last."""
    rng = np.random.default_rng(5)
    sets = [rng.choice(3000, 1100, replace=False).tolist() for _ in range(70)]
    found = LagOverlap.of(Steps.of(sets))
    for lag in (1, 2, 8, 9, 63, 64):
        pairs = zip(sets[lag:], sets, strict=False)
        assert found.shared[lag - 1] == sum(len({*a} & {*b}) for a, b in pairs)


@pytest.mark.parametrize("gap", [63, 64, 65])
def test_edges(gap: int) -> None:
    """An id that comes back after the longest lag is found, one later is not; likewise in windows."""
    steps = Steps.of([[5], *[[]] * (gap - 1), [5]])
    assert [lag + 1 for lag, shared in enumerate(LagOverlap.of(steps).shared) if shared] == [gap] * (
        gap <= 64
    )
    assert Reuse.of(steps).distances == Counter({gap: 1})
    ends, windows = sorted({0, gap}), gap + 1 - 63
    held = [sum(start <= end < start + 64 for end in ends) > 0 for start in range(windows)]
    assert WorkingSets.of(steps).distinct[6] == Counter(map(int, held))


def test_shares() -> None:
    found = LagOverlap.of(Steps.of(SLIDING, visible=[4, 5, 6, 7]))
    assert found.share()[:4] == (3 / 4, 2 / 4, 1 / 4, None)
    assert found.jaccard()[:4] == (3 / 5, 2 / 6, 1 / 7, None)
    shifted = found.shifted_share()
    assert shifted is not None and shifted[:4] == (1, 1, 1, None)
    assert found.chance_share()[0] == pytest.approx((4 / 5 + 4 / 6 + 4 / 7) / 3)
    assert found.chance_jaccard()[2] == pytest.approx((16 / 7) / (8 - 16 / 7))


def test_overlap_is_misses_at_k() -> None:
    """A buffer of exactly one set misses what the step before did not select."""
    sets = [[0, 1, 2], [1, 2, 5], [5, 7, 8], [5, 7, 8]]
    held: set[int] = set(sets[0])
    missed = 0
    for each in sets[1:]:
        missed += len({*each} - held)
        held = {*each}
    share = LagOverlap.of(Steps.of(sets)).share()[0]
    assert share is not None and missed / 9 == pytest.approx(1 - share)


@SETTINGS
@given(visible_steps())
def test_reuse(steps: Steps) -> None:
    distances: Counter[int] = Counter()
    last: dict[int, int] = {}
    never = 0
    for step, ids in enumerate(sets_of(steps)):
        for id_ in ids:
            if step >= steps.num_warm:
                if id_ in last:
                    distances[step - last[id_]] += 1
                else:
                    never += 1
            last[id_] = step
    assert Reuse.of(steps) == Reuse(distances, never)


@SETTINGS
@given(visible_steps())
def test_working_sets(steps: Steps) -> None:
    found, sets = WorkingSets.of(steps), sets_of(steps)[steps.num_warm :]
    for window, distinct in zip(WINDOWS, found.distinct, strict=True):
        starts = range(len(sets) - window + 1)
        sizes = [len(set().union(*sets[start : start + window])) for start in starts]
        assert distinct == Counter(sizes)
    sums = [sum(k * n for k, n in each.items()) for each in found.distinct]
    assert list(found.sums()) == sums


def test_working_set_means() -> None:
    found = WorkingSets.of(Steps.of(SLIDING))
    assert found.means()[:4] == (4, 5, 7, None)
    assert quantile(found.distinct[1], 50) == 5
    assert quantile(found.distinct[6], 50) is None


@SETTINGS
@given(visible_steps())
def test_frequency(steps: Steps) -> None:
    found, sets = Frequency.of(steps), sets_of(steps)[steps.num_warm :]
    counts = Counter(itertools.chain.from_iterable(sets))
    assert sum(found.ids) == len(counts) and sum(found.selected) == counts.total()
    for percent in range(101):
        of_percent = [
            n for n in counts.values() if percent * len(sets) <= 100 * n < (percent + 1) * len(sets)
        ]
        assert (found.ids[percent], found.selected[percent]) == (len(of_percent), sum(of_percent))


@SETTINGS
@given(visible_steps())
def test_ages(steps: Steps) -> None:
    ages = [0] * 33
    for step in range(steps.num_warm, steps.num_steps):
        for id_ in steps.of_step(step).tolist():
            ages[int(steps.visible[step] - 1 - id_).bit_length()] += 1
    assert Ages.of(steps).selected == tuple(ages)


def test_unordered() -> None:
    """Slots may lie anywhere: no distance is known, and none is invented."""
    steps = Steps.of([[90, 4], [4, 7]], visible=[5, 6])
    assert LagOverlap.of(steps, ordered=False).shifted is None
    assert Ages.of(steps, ordered=False).selected is None
    with pytest.raises(ValueError, match="could not see"):
        Ages.of(steps)


@pytest.mark.parametrize("name", MEASURES)
@SETTINGS
@given(one=visible_steps(), other=visible_steps())
def test_measures_add(name: str, one: Steps, other: Steps) -> None:
    """Element by element, in either order, and over JSON."""
    kind = MEASURES[name]
    a, b = kind.of(one), kind.of(other)
    assert a + b == b + a
    assert kind.from_json((a + b).to_json()) == a + b
    for field, both in vars(a + b).items():
        assert_sum(getattr(a, field), getattr(b, field), both)


def assert_sum(a: Any, b: Any, both: Any) -> None:
    if isinstance(both, Counter):
        assert all(both[key] == a[key] + b[key] for key in {*a, *b, *both})
    elif isinstance(both, tuple):
        for parts in zip(a, b, both, strict=True):
            assert_sum(*parts)
    else:
        assert both == a + b


@SETTINGS
@given(one=visible_steps(), other=visible_steps())
def test_joined(one: Steps, other: Steps) -> None:
    """One stream after another that has no id in common with it: nothing is found beyond what each has."""
    other = dataclasses.replace(other, num_warm=0)
    both = Steps(
        np.concatenate([one.ids, other.ids + one.num_ids]),
        np.concatenate([one.ptr, other.ptr[1:] + one.ptr[-1]]),
        np.concatenate([one.newest, other.newest]),
        np.concatenate([one.visible, other.visible + one.num_ids]),
        one.num_ids + other.num_ids,
        one.num_warm,
    )
    assert Reuse.of(both) == Reuse.of(one) + Reuse.of(other)
    assert Ages.of(both) == Ages.of(one) + Ages.of(other)
    assert LagOverlap.of(both).shared == (LagOverlap.of(one) + LagOverlap.of(other)).shared
    every_step = WorkingSets.of(one) + WorkingSets.of(other)
    assert WorkingSets.of(both).distinct[0] == every_step.distinct[0]


@SETTINGS
@given(steps=visible_steps(), cut=st.integers(0, 90))
def test_cut(steps: Steps, cut: int) -> None:
    """Counting the first steps and, with them as the past, the rest counts all, where windows allow it."""
    cut = min(max(cut, steps.num_warm), steps.num_steps)
    first = Steps(
        steps.ids[: steps.ptr[cut]], steps.ptr[: cut + 1], steps.newest[:cut], steps.visible[:cut],
        steps.num_ids, steps.num_warm,
    )  # fmt: skip
    rest = Steps(steps.ids, steps.ptr, steps.newest, steps.visible, steps.num_ids, cut)
    for kind in (LagOverlap, Reuse, Ages):
        assert kind.of(first) + kind.of(rest) == kind.of(steps)


def test_refused_sums() -> None:
    steps = Steps.of(SLIDING)
    with pytest.raises(ValueError, match="shifted is known of one part only"):
        LagOverlap.of(steps) + LagOverlap.of(steps, ordered=False)
    with pytest.raises(ValueError, match="layers differ"):
        LayerOverlap.of({0: steps}) + LayerOverlap.of({1: steps})
    with pytest.raises(TypeError):
        LagOverlap.of(steps) + Reuse.of(steps)  # type: ignore[operator]


def test_chance_does_not_overflow() -> None:
    """All of 131,072 ids in each of many steps: the sum goes beyond 64 bits and stays exact."""
    sizes = np.full(100_000, 131_072)
    assert expected_shared(sizes, sizes, sizes) == 100_000 * 131_072 << CHANCE_BITS
    assert expected_shared(sizes[:1], sizes[:1], sizes[:1] * 8) * CHANCE_UNIT == 131_072 / 8


def test_warmup() -> None:
    """What is compiled beforehand is all that a stream needs, under the types that it has."""
    modules = (layer_overlap, locality, nulls, predictors)
    kernels = [each for module in modules for each in vars(module).values() if isinstance(each, Dispatcher)]
    warmup._locality()
    compiled = [list(kernel.signatures) for kernel in kernels]
    # What only other kernels call is loaded within them.
    assert sum(map(bool, compiled)) >= 7
    steps = Steps.of(SLIDING * 30)
    for name in nulls.NULLS:
        null = nulls.null_of(steps, name, 1)
        assert null is not None
        predictions_of(null, steps)
        LayerOverlap.of({0: steps, 1: steps})
        for kind in MEASURES.values():
            kind.of(null)
    assert [list(kernel.signatures) for kernel in kernels] == compiled
