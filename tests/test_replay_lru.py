"""LRU over sets at every size: against a plain stack, its inclusion, and a flat simulator's wrong answer."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.selection_replay.lru import lru
from dsatrace.selection_replay.steps import NO_ID, Start, Steps
from helpers.replay import buffer_sizes, rows_of, set_traces

quickly = settings(max_examples=60, deadline=None)
STARTS = st.sampled_from(["empty", "first-b"])


def plain_lru(steps: Steps, size: int, start: Start, pin_newest: bool) -> list[tuple[list[int], int]]:
    """Of each step the missed ids and the number of evictions, with one buffer of this size."""
    buffer = list(range(min(size, steps.num_ids))) if start == "first-b" else []  # most recent first
    result = []
    for step in range(steps.num_steps):
        asked = set(steps.of_step(step).tolist())
        if pin_newest:
            asked -= {int(steps.newest[step])}
        missed = [id_ for id_ in asked if id_ not in buffer]
        whole = sorted(asked, reverse=True) + [id_ for id_ in buffer if id_ not in asked]
        result.append((missed, max(0, len(whole) - size)))
        buffer = whole[:size]
    return result


@quickly
@given(set_traces(), STARTS, st.booleans(), st.data())
def test_plain(steps: Steps, start: Start, pin_newest: bool, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(buffer_sizes(steps), max_size=4))
    result = lru(steps, sizes, start=start, pin_newest=pin_newest)
    warm = steps.num_warm
    for index, size in enumerate(sizes):
        plain = plain_lru(steps, size, start, pin_newest)
        counts = [len(missed) for missed, _ in plain]
        assert result.misses[:, index].tolist() == counts
        assert result.evictions[index] == sum(evicted for _, evicted in plain[warm:])
        assert result.depths[size:].sum() + result.never == sum(counts[warm:])
        assert result.deepest[size:].sum() + result.deepest_never == sum(map(bool, counts[warm:]))
        ages = np.zeros(steps.num_steps, int)
        last: dict[int, int] = {}
        for step, (missed, _) in enumerate(plain):
            for id_ in missed:
                ages[step - last[id_] if id_ in last else 0] += step >= warm
            asked = set(steps.of_step(step).tolist()) - ({int(steps.newest[step])} if pin_newest else set())
            last |= dict.fromkeys(asked, step)
        assert result.ages[index].tolist() == ages.tolist()
    asked_for = int(steps.sizes[warm:].sum())
    assert result.pinned + result.never + result.depths.sum() == asked_for
    chosen = [int(n) in steps.of_step(t) for t, n in enumerate(steps.newest) if t >= warm and n != NO_ID]
    assert result.pinned == (sum(chosen) if pin_newest else 0)


@quickly
@given(set_traces(), STARTS, st.data())
def test_inclusion(steps: Steps, start: Start, data: st.DataObject) -> None:
    """What hits in a buffer hits in every larger one, id by id: so depths say all."""
    sizes = sorted(data.draw(st.lists(buffer_sizes(steps), min_size=2, max_size=4)))
    replays = [plain_lru(steps, size, start, False) for size in sizes]
    for smaller, larger in itertools.pairwise(replays):
        for (missed_in_smaller, _), (missed_in_larger, _) in zip(smaller, larger, strict=True):
            assert set(missed_in_larger) <= set(missed_in_smaller)


@quickly
@given(set_traces(), STARTS, st.randoms())
def test_row_order(steps: Steps, start: Start, random: Random) -> None:
    """The order of ids inside a step says nothing."""
    shuffled = [random.sample(row, len(row)) for row in rows_of(steps)]
    other = Steps.of(shuffled, steps.newest.tolist(), num_warm=steps.num_warm)
    assert_equal(lru(steps, [9], start=start), lru(other, [9], start=start))


@quickly
@given(set_traces(), st.randoms())
def test_renamed(steps: Steps, random: Random) -> None:
    """From an empty buffer, names count only by their order."""
    names = sorted(random.sample(range(5000), steps.num_ids))
    renamed = Steps.of([[names[id_] for id_ in row] for row in rows_of(steps)], num_warm=steps.num_warm)
    got, wanted = lru(renamed, [9]), lru(steps, [9])
    assert not got.depths[steps.num_ids :].any()
    assert got.depths[: steps.num_ids].tolist() == wanted.depths.tolist()
    assert got.misses.tolist() == wanted.misses.tolist()
    assert got.ages.tolist() == wanted.ages.tolist()


@quickly
@given(set_traces(equal=True))
def test_overlap(steps: Steps) -> None:
    """With room for one step only, what hits is what the step before asked for."""
    size = int(steps.sizes[0])
    overlaps = [len(set(a) & set(b)) for a, b in itertools.pairwise(rows_of(steps))]
    assert lru(steps, [size]).misses[1:, 0].tolist() == [size - overlap for overlap in overlaps]


def test_flat_is_wrong() -> None:
    """An ordinary simulator takes ids one by one and evicts ids that the same step still needs."""
    rows_of_4 = [[0, 1, 2, 3], [4, 0, 1, 2]] * 50
    steps = Steps.of(rows_of_4)
    stack: list[int] = []
    flat_misses = 0
    for id_ in steps.ids.tolist():
        flat_misses += id_ not in stack[:4]
        stack = [id_, *(other for other in stack if other != id_)]
    result = lru(steps, [4])
    assert (int(result.misses.sum()), flat_misses) == (4 + 99, 4 + 50 * 4 + 49)


def test_many_compactions() -> None:
    """A time line that fills up again and again."""
    rng = np.random.default_rng(0)
    steps = Steps.of([rng.choice(90, 40, replace=False).tolist() for _ in range(60)])
    plain = plain_lru(steps, 64, "empty", False)
    assert lru(steps, [64]).misses[:, 0].tolist() == [len(missed) for missed, _ in plain]


def test_no_steps() -> None:
    result = lru(Steps.of([]), [1])
    assert (result.never, result.deepest_never, result.misses.shape, result.ages.sum()) == (0, 0, (0, 1), 0)


def assert_equal(one: object, other: object) -> None:
    for name, value in vars(one).items():
        assert np.array_equal(value, getattr(other, name)), name
