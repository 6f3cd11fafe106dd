"""Every policy, compiled against plain Python, and by hand on streams small enough to follow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.kv.policies.registry import POLICIES
from dsatrace.kv.policies.simulate import Oversize, held_blocks, simulate
from dsatrace.kv.policies.stream import AccessStream
from helpers.plain_cache import plain_simulate
from helpers.plain_policies import make_policy
from helpers.policy_streams import EACH_BY_ALL, NAMES, PARAMS, WORKLOADS, prefixes, streams


def check_against_plain(
    stream: AccessStream,
    name: str,
    capacity: int,
    leaf: bool,
    oversize: Oversize,
    admitted: np.ndarray | None = None,
):
    params = PARAMS.get(name, {}) | {"log_evictions": True, "admitted": admitted}
    result = simulate(stream, name, capacity, leaf=leaf, oversize=oversize, **params)
    policy = make_policy(name, capacity, leaf=leaf, workload_names=WORKLOADS, **PARAMS.get(name, {}))
    held = held_blocks(stream, capacity, oversize)
    hits, found, evicted = plain_simulate(
        stream, policy, held, None if admitted is None else admitted.tolist()
    )
    assert result.hits.tolist() == hits, (name, leaf)
    assert result.hits_any.tolist() == found, (name, leaf)
    assert list(map(tuple, result.evictions.tolist())) == evicted, (name, leaf)
    assert result.num_evictions == len(evicted), (name, leaf)


@EACH_BY_ALL
@given(stream=streams(), capacity=st.integers(1, 14), oversize=st.sampled_from(["truncate", "reject"]))
def test_the_compiled_replay_equals_the_plain_one(stream, capacity, oversize):
    for name in NAMES:
        for leaf in (False, True):
            check_against_plain(stream, name, capacity, leaf, oversize)


@EACH_BY_ALL
@given(
    stream=streams(),
    capacity=st.integers(1, 14),
    oversize=st.sampled_from(["truncate", "reject"]),
    data=st.data(),
)
def test_who_is_not_admitted_inserts_nothing(stream, capacity, oversize, data):
    size = stream.num_requests
    admitted = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), bool)
    for name in NAMES:
        for leaf in (False, True):
            check_against_plain(stream, name, capacity, leaf, oversize, admitted)
    nobody = simulate(stream, "lru", capacity, admitted=np.zeros(size, bool))
    assert (nobody.hits.sum(), nobody.num_evictions) == (0, 0)
    everyone = simulate(stream, "lru", capacity, admitted=np.ones(size, bool))
    assert everyone.hits.tolist() == simulate(stream, "lru", capacity).hits.tolist()


def test_a_guest_hits_what_others_left_and_pushes_nothing_out():
    stream = AccessStream.of([["a"], ["x", "y"], ["a", "z"], ["a"]])
    guests = np.array([True, False, False, True])
    assert simulate(stream, "lru", 2).hits.tolist() == [0, 0, 0, 1]
    assert simulate(stream, "lru", 2, admitted=guests).hits.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "params", "most"),
    [
        ("wa-lru", {"admit": ["chat"]}, 19),
        ("wa-prob", {"reuse": {"chat": (0.9, 5.0), "batch": (0.1, 9.0)}}, 18),  # its first victim is a guess
    ],
    ids=["wa-lru", "wa-prob"],
)
def test_what_was_learned_is_applied_from_its_time_on(name, params, most):
    """Before it the policy is LRU; after it, it keeps the chat that LRU loses."""
    kinds = ["chat", "batch", "batch"] * 20
    chains = [["chat"] if kind == "chat" else [f"batch {i}"] for i, kind in enumerate(kinds)]
    stream = AccessStream.of(chains, workloads=kinds)
    hits = {
        since_s: simulate(stream, name, 2, since_s=since_s, **params).hits.tolist()
        for since_s in (0.0, 30.0, 60.0)
    }
    assert hits[60.0] == simulate(stream, "lru", 2).hits.tolist() == [0] * 60
    assert sum(hits[0.0]) == most
    assert sum(hits[30.0][:31]) == 0 and sum(hits[30.0]) >= 8


@pytest.fixture(scope="module")
def long_stream():
    rng = np.random.default_rng(7)
    families = rng.zipf(1.3, 1500) % 90
    words = [[family, *rng.integers(0, 2, rng.integers(0, 12)).tolist()] for family in families.tolist()]
    return AccessStream.of(
        prefixes(words),
        times=rng.exponential(1.0, len(words)).cumsum().tolist(),
        workloads=[*WORKLOADS, *rng.choice(WORKLOADS, len(words) - len(WORKLOADS)).tolist()],
        concurrency=6,
    )


@pytest.mark.parametrize("leaf", [False, True], ids=["flat", "leaf"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_with_hundreds_of_blocks(long_stream, name, leaf):
    check_against_plain(long_stream, name, 250, leaf, "truncate")


@EACH_BY_ALL
@given(stream=streams(), capacity=st.integers(1, 14))
def test_the_leaf_constraint_keeps_parents(stream, capacity):
    for name in NAMES:
        check_parents_stay(stream, name, capacity)


def check_parents_stay(stream: AccessStream, name: str, capacity: int) -> None:
    result = simulate(stream, name, capacity, leaf=True, log_evictions=True, **PARAMS.get(name, {}))
    assert result.hits.tolist() == result.hits_any.tolist(), name
    cached: set[int] = set()
    evictions = iter(result.evictions.tolist())
    upcoming = next(evictions, None)
    parents = stream.parents.tolist()
    for request in range(stream.num_requests):
        while upcoming is not None and upcoming[0] == request:
            assert upcoming[1] not in {parents[block] for block in cached}, name
            cached.discard(upcoming[1])
            upcoming = next(evictions, None)
        begin = stream.starts[request]
        cached |= set(stream.blocks[begin : min(begin + capacity, stream.starts[request + 1])].tolist())


@EACH_BY_ALL
@given(stream=streams(), capacity=st.integers(1, 14))
def test_policies_that_are_leaf_first_need_no_constraint(stream, capacity):
    for name in (name for name in NAMES if POLICIES[name].leaf_first):
        params = {} if name == "gdsf" else PARAMS.get(name, {})
        flat = simulate(stream, name, capacity, **params)
        leaf = simulate(stream, name, capacity, leaf=True, **params)
        assert flat.hits.tolist() == leaf.hits.tolist(), name
        assert flat.hits.tolist() == flat.hits_any.tolist(), name


def singles(text: str) -> AccessStream:
    """Requests of one block each, as other simulators have them."""
    return AccessStream.of([[letter] for letter in text])


def victims(text: str, name: str, capacity: int, **params: object) -> str:
    """The letters evicted, in order; ids are given in order of first appearance."""
    letters = "".join(dict.fromkeys(text))
    log = simulate(singles(text), name, capacity, log_evictions=True, **params).evictions
    assert log is not None
    return "".join(letters[block] for block in log[:, 1])


@pytest.mark.parametrize(
    ("name", "text", "capacity", "expected"),
    [
        ("lru", "abacd", 2, "ba"),  # c finds a used since b; d finds a, then c
        ("fifo", "abacd", 2, "ab"),
        ("mru", "abcad", 3, "a"),  # a is the last one used
        ("filo", "abcad", 3, "c"),  # c is the last one to come
        ("lfu", "aabbcd", 3, "c"),
        ("lfu", "aabcbd", 3, "c"),  # c once, a and b twice
        ("slru", "aabcd", 3, "b"),  # a is protected; b is older than c
        ("s3-fifo", "abcdefghijaak", 10, "b"),  # a, alone in the small queue, is used twice: on to main
        ("sieve", "abcabde", 3, "ca"),  # the hand spares a and b once, and is back at a when e comes
        ("arc", "abbca", 2, "a"),  # b is used often; a is remembered, and comes back
        ("arc", "abacb", 2, "ba"),  # b returns: those used once deserve more room
        ("gdsf", "aabcd", 3, "b"),  # 2 for a; b is older than c
        ("opt", "abcab", 2, "b"),  # when c comes, a is used sooner than b
    ],
)
def test_victims_by_hand(name, text, capacity, expected):
    assert victims(text, name, capacity).startswith(expected)


def test_priority_keeps_the_workload_that_matters():
    stream = AccessStream.of([["a"], ["b"], ["c"], ["a"]], workloads=["vip", "bulk", "bulk", "vip"])
    assert simulate(stream, "lru", 2).hits.tolist() == [0, 0, 0, 0]
    assert simulate(stream, "priority", 2, priorities={"vip": 1}).hits.tolist() == [0, 0, 0, 1]


def test_workload_aware_lru_learns_whom_to_admit():
    kinds = ["chat", "chat", "batch"] * 20
    chains = [
        [f"batch {i}"] if kind == "batch" else [f"chat {i - i // 3 & 3}"] for i, kind in enumerate(kinds)
    ]
    stream = AccessStream.of(chains, workloads=kinds)
    learned, given_ = simulate(stream, "wa-lru", 5), simulate(stream, "wa-lru", 5, admit=["chat"])
    assert learned.hits.tolist() == given_.hits.tolist()
    assert learned.hits.sum() == 36  # all but the first of each of four
    assert simulate(stream, "lru", 5).hits.sum() == 0  # five others in between
    batch = stream.workload_names.index("batch")
    counts = (learned.accesses, learned.hits, learned.hits_any)
    assert [stream.by_workload(count)[batch] for count in counts] == [20, 0, 0]


def test_t_lru_gives_up_the_end_a_next_turn_can_spare():
    stream = AccessStream.of([["a", "b"], ["a", "b", "c"], ["x", "y"], ["z", "v"]])
    lru = simulate(stream, "lru", 5, log_evictions=True).evictions.tolist()
    assert lru == [[3, 2], [3, 1]]  # c, then b
    spared = simulate(stream, "t-lru", 5, slack_blocks=1, log_evictions=True).evictions.tolist()
    assert spared == [[3, 2], [3, 4]]  # c, then y: both ends of requests, though y is the newer


def test_reuse_probability_prefers_who_comes_back_soon():
    soon = {"slow": (0.1, 100.0), "fast": (0.9, 5.0)}
    late = {"slow": (0.9, 100.0), "fast": (0.9, 0.01)}
    kinds = ["slow", "slow", "fast", "slow"]
    stream = AccessStream.of([["w"], ["a"], ["b"], ["c"]], times=[0, 3, 9, 10], workloads=kinds)
    evicted = simulate(stream, "wa-prob", 2, reuse=soon, log_evictions=True).evictions
    assert evicted.tolist() == [[2, 0], [3, 1]]  # w, then a: the slow ones
    evicted = simulate(stream, "wa-prob", 2, reuse=late, log_evictions=True).evictions
    assert evicted.tolist() == [[2, 0], [3, 2]]  # b has missed its time


def test_random_repeats_with_its_seed_and_spreads_evenly():
    stream = singles("".join(chr(200 + i) for i in range(4000)))
    first, again, other = (
        simulate(stream, "random", 10, seed=seed, log_evictions=True).evictions[:, 1] for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert not (first == other).all()
    ages = np.arange(10, 4000) - first  # geometric with mean 10
    assert 9 < ages.mean() < 11
    assert 0.08 < (ages == 1).mean() < 0.12


def test_requests_in_flight_keep_their_blocks():
    together = AccessStream.of([["a"], ["b"], ["c"], ["a"]], concurrency=2)
    result = simulate(together, "mru", 2, log_evictions=True)
    assert result.evictions.tolist() == [[2, 0], [3, 1]]  # b is in flight when c comes; c when a comes
    alone = AccessStream.of([["a"], ["b"], ["c"], ["a"]])
    assert simulate(alone, "mru", 2, log_evictions=True).evictions.tolist() == [[2, 1]]


def test_a_request_waits_for_those_in_flight_if_it_must():
    stream = AccessStream.of([["a", "b"], ["c", "d"], ["a", "b"]], concurrency=3)
    result = simulate(stream, "lru", 3)
    assert result.num_waited == 2
    assert result.hits.tolist() == [0, 0, 1]
    assert simulate(stream, "lru", 4).num_waited == 0


def test_a_request_longer_than_the_cache():
    stream = AccessStream.of([["a", "b", "c"], ["a", "b", "c"]])
    cut = simulate(stream, "lru", 2)
    assert (cut.hits.tolist(), cut.accesses.tolist()) == ([0, 2], [3, 3])
    rejected = simulate(stream, "lru", 2, oversize="reject")
    assert (rejected.hits.tolist(), rejected.accesses.tolist()) == ([0, 0], [0, 0])
    assert rejected.hit_rate == 0


def test_hits_and_hits_any_differ_behind_a_gap():
    stream = AccessStream.of([["a", "b"], ["a", "c"], ["d"], ["a", "c"]])
    result = simulate(stream, "fifo", 3)  # d evicts b, then nothing of a: a stays
    assert result.hits.tolist() == [0, 1, 0, 2]
    newest = simulate(stream, "mru", 3)
    assert newest.hits.tolist() == [0, 1, 0, 0]
    assert newest.hits_any.tolist() == [0, 1, 0, 1]  # a was evicted; c is there, out of reach
