"""Every policy against itself in plain Python, and what must hold between them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.kv.policies.compiled import Access
from dsatrace.kv.policies.simulate import simulate
from dsatrace.kv.policies.stream import AccessStream
from dsatrace.selection_replay.policies import POLICIES, misses
from dsatrace.selection_replay.replayed import Replayed
from dsatrace.selection_replay.steps import Start, Steps
from helpers.plain_policies import Uniform, make_policy
from helpers.replay import buffer_sizes, rows_of, set_traces

quickly = settings(max_examples=100, deadline=None)
STARTS = st.sampled_from(["empty", "first-b"])
FILLING = [name for name, policy in POLICIES.items() if policy.fills]

Counts = Iterable[tuple[int, int]]  # of each step its missed ids and its evictions


def first_ids(steps: Steps, size: int, start: Start) -> list[int]:
    return list(range(min(size, steps.num_ids))) if start == "first-b" else []


def plain_lru(steps: Steps, size: int, start: Start) -> Counts:
    held = first_ids(steps, size, start)  # most recent first
    for row in rows_of(steps):
        whole = sorted(row, reverse=True) + [id_ for id_ in held if id_ not in row]
        yield len(set(row) - set(held)), max(0, len(whole) - size)
        held = whole[:size]


def plain_sglang(steps: Steps, size: int, start: Start) -> Counts:
    held = first_ids(steps, size, start)  # oldest first
    for row, visible in zip(rows_of(steps), steps.visible, strict=True):
        if visible <= size:
            held = first_ids(steps, size, "first-b")
            yield 0, 0
            continue
        stale = [id_ for id_ in held if id_ not in row]
        missed = [id_ for id_ in row if id_ not in held]
        num_victims = max(0, len(held) + len(missed) - size)
        held = stale[num_victims:] + missed + [id_ for id_ in held if id_ in row]
        yield len(missed), num_victims


def plain_fifo(steps: Steps, size: int, start: Start) -> Counts:
    held = first_ids(steps, size, start)  # oldest first
    for row in rows_of(steps):
        missed = [id_ for id_ in row if id_ not in held]
        num_victims = max(0, len(held) + len(missed) - size)
        victims = [id_ for id_ in held if id_ not in row][:num_victims]
        held = [id_ for id_ in held if id_ not in victims] + missed
        yield len(missed), num_victims


def plain_lfu(steps: Steps, size: int, start: Start) -> Counts:
    key = {id_: (0, -1, id_) for id_ in first_ids(steps, size, start)}  # uses, last step, id
    for step, row in enumerate(rows_of(steps)):
        num_missed = len(set(row) - set(key))
        num_victims = max(0, len(key) + num_missed - size)
        for _, _, id_ in sorted(key[id_] for id_ in key if id_ not in row)[:num_victims]:
            del key[id_]
        for id_ in row:
            key[id_] = (key[id_][0] + 1 if id_ in key else 0, step, id_)
        yield num_missed, num_victims


def plain_random(steps: Steps, size: int, start: Start, seed: int) -> Counts:
    held = first_ids(steps, size, start)
    draws = Uniform(size, seed=seed)
    for row in rows_of(steps):
        missed = [id_ for id_ in row if id_ not in held]
        num_hits = 0
        for id_ in row:
            if id_ in held:  # the step's ids to the front
                at = held.index(id_)
                held[at], held[num_hits] = held[num_hits], id_
                num_hits += 1
        num_victims = max(0, len(held) + len(missed) - size)
        for _ in range(num_victims):
            at = num_hits + ((draws._random() >> 32) * (len(held) - num_hits) >> 32)
            held[at] = held[-1]
            held.pop()
        held += missed
        yield len(missed), num_victims


def plain_s3fifo(steps: Steps, size: int, start: Start) -> Counts:
    """Over the plain policy of `kv.policies`, whose pins are the step."""
    policy = make_policy("s3-fifo", size)
    for id_ in first_ids(steps, size, start):
        policy.insert(id_, Access())
    for row in rows_of(steps):
        missed = [id_ for id_ in row if id_ not in policy]
        for id_ in row:
            if id_ not in missed:
                policy.pin(id_)
                policy.hit(id_, Access())
        num_victims = 0
        for id_ in missed:
            policy.miss(id_, Access())
            if len(policy) == size:
                policy.evict()
                num_victims += 1
            policy.insert(id_, Access())
            policy.pin(id_)
        for id_ in row:
            policy.unpin(id_)
        yield len(missed), num_victims


def plain_opt(steps: Steps, size: int, start: Start) -> Counts:
    rows = rows_of(steps)
    held = set(first_ids(steps, size, start))

    def next_use(step: int, id_: int) -> int:
        return next((later for later in range(step + 1, len(rows)) if id_ in rows[later]), len(rows))

    for step, row in enumerate(rows):
        num_missed = len(set(row) - held)
        num_victims = max(0, len(held) + num_missed - size)
        held -= set(sorted(held - set(row), key=functools.partial(next_use, step))[::-1][:num_victims])
        held |= set(row)
        yield num_missed, num_victims


def plain_window(steps: Steps, size: int, sinks: int) -> Counts:
    before: set[int] | None = None
    for row, visible in zip(rows_of(steps), steps.visible.tolist(), strict=True):
        first = set(range(min(sinks, size)))
        held = first | set(range(max(0, visible - (size - len(first))), visible))
        yield len(set(row) - held), 0 if before is None else len(before - held)
        before = held


def plain_previous(steps: Steps, size: int, start: Start) -> Counts:
    held = set(first_ids(steps, size, start))
    for row in rows_of(steps):
        yield len(set(row) - held), len(held - set(row))
        held = set(row)


def plain_none(steps: Steps, size: int) -> Counts:
    return ((len(row), 0) for row in rows_of(steps))


PLAIN: dict[str, Callable[..., Counts]] = {
    "lru": plain_lru,
    "sglang": plain_sglang,
    "fifo": plain_fifo,
    "random": plain_random,
    "lfu": plain_lfu,
    "s3-fifo": plain_s3fifo,
    "window": plain_window,
    "previous": plain_previous,
    "none": plain_none,
    "opt": plain_opt,
}


@quickly
@given(set_traces(), STARTS, st.booleans(), st.integers(0, 2**64), st.integers(0, 5), st.data())
def test_plain(
    steps: Steps, start: Start, pin_newest: bool, seed: int, sinks: int, data: st.DataObject
) -> None:
    size = data.draw(buffer_sizes(steps))
    chosen = {"start": start, "seed": seed, "sinks": sinks}
    asked = rows_of(steps)
    if pin_newest:
        pinned = steps.newest.tolist()
        asked = [[id_ for id_ in row if id_ != newest] for row, newest in zip(asked, pinned, strict=True)]
    plain_steps = Steps.of(asked, steps.newest.tolist(), steps.visible.tolist(), steps.num_warm)
    for name, policy in POLICIES.items():
        got = misses(steps, name, size, pin_newest=pin_newest, **chosen)
        plain = list(PLAIN[name](plain_steps, size, **{key: chosen[key] for key in policy.takes}))
        assert got.misses.tolist() == [num_missed for num_missed, _ in plain], name
        assert got.evictions == sum(num_evicted for _, num_evicted in plain[steps.num_warm :]), name


@quickly
@given(set_traces(), st.data())
def test_block_simulator(steps: Steps, data: st.DataObject) -> None:
    """A step is a request that is done when the next comes; its blocks are used from the last to the
    first, and LRU and LFU count the last as the least recent."""
    size = data.draw(buffer_sizes(steps))
    assume(size <= steps.num_ids)
    for name in ("lru", "lfu", "fifo", "s3-fifo", "opt"):
        rows = rows_of(steps.ascending() if name in ("lru", "lfu") else steps)
        stream = AccessStream(
            np.array([id_ for row in rows for id_ in row[::-1]], np.int32),
            steps.ptr,
            np.arange(steps.num_steps),
            np.zeros(steps.num_steps),
            np.arange(steps.num_steps) + 1,
        )
        simulated = simulate(stream, name, size)
        got = misses(steps, name, size)
        assert got.misses.tolist() == (steps.sizes - simulated.hits_any).tolist(), name
        assert steps.num_warm or got.evictions == simulated.num_evictions, name


def fewest_misses(rows: list[list[int]], size: int) -> int:
    """Tries every way to keep ids beside each step's own."""
    least = {frozenset[int](): 0}
    for row in rows:
        after: dict[frozenset[int], int] = {}
        for held, so_far in least.items():
            total = so_far + len(set(row) - held)
            others = held - set(row)
            for num_kept in range(min(len(others), size - len(row)) + 1):
                for kept in itertools.combinations(others, num_kept):
                    state = frozenset(row) | frozenset(kept)
                    after[state] = min(total, after.get(state, total))
        least = after
    return min(least.values())


def test_opt_is_optimal() -> None:
    """1,000 tiny instances, some with sets of different sizes."""
    random = Random(0)
    for _ in range(1000):
        rows = [random.sample(range(6), random.randint(1, 3)) for _ in range(random.randint(2, 6))]
        size = random.randint(max(map(len, rows)), 4)
        assert misses(Steps.of(rows), "opt", size).misses.sum() == fewest_misses(rows, size)


@quickly
@given(set_traces(), STARTS, st.data())
def test_opt_is_least(steps: Steps, start: Start, data: st.DataObject) -> None:
    """No policy that fills on demand misses less, and none at all evicts its way around the bound."""
    size = data.draw(buffer_sizes(steps))
    bound = misses(steps, "opt", size, start=start).misses.sum()
    for name in set(FILLING) - {"sglang"}:  # which is not charged while the sequence fits
        assert misses(steps, name, size, start=start).misses.sum() >= bound, name


@quickly
@given(set_traces(equal=True))
def test_room_for_one_step(steps: Steps) -> None:
    """At B = k every policy that fills on demand misses what the step before did not ask for."""
    size = int(steps.sizes[0])
    longer = Steps.of(rows_of(steps), visible=[size + 1] * steps.num_steps)  # beyond SGLang's fast path
    overlaps = [len(set(a) & set(b)) for a, b in itertools.pairwise(rows_of(steps))]
    for name in FILLING:
        got = misses(longer, name, size).misses
        assert got[1:].tolist() == [size - overlap for overlap in overlaps], name


@quickly
@given(set_traces(), st.randoms(), st.data())
def test_renamed(steps: Steps, random: Random, data: st.DataObject) -> None:
    """From an empty buffer, and with the order inside each row kept, names say nothing; to LRU and LFU,
    whose ties go by id, only their order does. A window is made of names."""
    names = random.sample(range(3 * steps.num_ids), steps.num_ids)
    size = data.draw(buffer_sizes(steps))
    for name in set(POLICIES) - {"window", "sglang"}:
        chosen = sorted(names) if name in ("lru", "lfu") else names
        rows = [[chosen[id_] for id_ in row] for row in rows_of(steps)]
        renamed = Steps.of(rows, num_warm=steps.num_warm)
        assert_same(misses(renamed, name, size), misses(steps, name, size), name)
    rows = [[names[id_] for id_ in row] for row in rows_of(steps)]
    longer, renamed = (Steps.of(given, visible=[10**6] * len(rows)) for given in (rows_of(steps), rows))
    assert_same(misses(renamed, "sglang", size), misses(longer, "sglang", size), "sglang")


@quickly
@given(set_traces(), STARTS, st.randoms(), st.data())
def test_row_order(steps: Steps, start: Start, random: Random, data: st.DataObject) -> None:
    """These do not heed the order inside a row."""
    shuffled = [random.sample(row, len(row)) for row in rows_of(steps)]
    other = Steps.of(shuffled, visible=steps.visible.tolist(), num_warm=steps.num_warm)
    size = data.draw(buffer_sizes(steps))
    for name in ("lru", "lfu", "opt", "window", "previous", "none"):
        assert_same(misses(other, name, size, start=start), misses(steps, name, size, start=start), name)


def test_seeds() -> None:
    rng = np.random.default_rng(3)
    steps = Steps.of([rng.choice(60, 10, replace=False).tolist() for _ in range(50)])
    replays = [misses(steps, "random", 20, seed=seed).misses.tolist() for seed in (1, 1, 2)]
    assert replays[0] == replays[1] != replays[2]


def test_refused() -> None:
    steps = Steps.of([[0, 1, 2]])
    with pytest.raises(UserError, match="a buffer of 2 ids does not hold a step of 3"):
        misses(steps, "fifo", 2)
    with pytest.raises(UserError, match="unknown policy 'mru'; choose from lru, sglang, fifo"):
        misses(steps, "mru", 3)
    assert misses(steps, "none", 2).misses.tolist() == [3]


def assert_same(one: Replayed, other: Replayed, name: str) -> None:
    assert (one.misses.tolist(), one.evictions) == (other.misses.tolist(), other.evictions), name


def test_sglang_breaks_inclusion() -> None:
    """While the sequence fits a buffer of 4, nothing is noted there; one of 3 has learnt that 0 is in use."""
    steps = Steps.of([[0], [4], [0]], visible=[4, 5, 5])
    replays = {size: misses(steps, "sglang", size, start="first-b").misses.tolist() for size in (3, 4)}
    assert replays == {3: [0, 1, 0], 4: [0, 1, 1]}
