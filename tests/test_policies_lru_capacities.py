"""LRU at all capacities from one pass equals one simulation per capacity, exactly."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.kv.policies.simulate import simulate
from dsatrace.kv.policies.stack_distance import lru_hits_at
from dsatrace.kv.policies.stream import AccessStream
from helpers.policy_streams import EACH_BY_ALL, streams

CAPACITIES = [9, 1, 2, 3, 4, 6, 13, 1000]


def check(stream: AccessStream, leaf: bool) -> int:
    swept = lru_hits_at(stream, CAPACITIES)
    for row, capacity in enumerate(CAPACITIES):
        result = simulate(stream, "lru", capacity, leaf=leaf)
        for field in ("hits", "hits_any"):
            expected = stream.by_workload(getattr(result, field))
            assert getattr(swept, field)[row].tolist() == expected.tolist()
    return swept.num_simulated


@EACH_BY_ALL
@given(stream=streams())
def test_one_pass_equals_simulation(stream):
    for leaf in (False, True):
        check(stream, leaf)


def test_empty_requests_keep_the_order_of_release():
    """Request 2 outlives 3 by many empty ones; left out, both would end at the same moment."""
    chains = [[], [], ["a"], ["b", "c"], *[[]] * 11, ["b", "d"], ["a"]]
    stream = AccessStream.of(chains)
    release = stream.release.copy()
    release[2] = 15
    check(dataclasses.replace(stream, release=release), leaf=True)


@given(stream=streams(in_flight=False))
def test_one_at_a_time_nothing_is_simulated(stream):
    assert check(stream, leaf=False) == 0


@given(
    sets=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True), min_size=1, max_size=30)
)
def test_also_where_ids_are_no_prefixes(sets):
    """Then unbroken and single hits differ, and the leaf constraint has no meaning."""
    assert check(AccessStream.of(sets), leaf=False) == 0


def test_a_long_stream_through_many_compactions():
    rng = np.random.default_rng(0)
    chains = [
        [(family, depth) for depth in range(rng.integers(1, 9))] for family in rng.zipf(1.3, 5000) % 700
    ]
    stream = AccessStream.of(chains)
    capacities = [1, 7, 50, 51, 300, 2000]
    swept = lru_hits_at(stream, capacities)
    assert swept.hits[:, 0].tolist() == [int(simulate(stream, "lru", c).hits.sum()) for c in capacities]
    assert swept.hits[-1, 0] > swept.hits[0, 0] > 0


def test_with_waiting_lru_is_no_stack_algorithm():
    """Why capacities below what is in flight are simulated: more room can mean fewer hits. With
    room for 3, the last request makes the first leave early, and finds its own block."""
    chains = [["a1", "a2", "a3"], ["b1"], ["c1", "c2"], ["b1", "b2", "b3"]]
    once = AccessStream.of(chains)
    stream = AccessStream(once.blocks, once.starts, once.times, once.workloads, np.array([4, 2, 4, 4]))
    capacities = range(1, 9)
    assert [int(simulate(stream, "lru", c).hits.sum()) for c in capacities] == [0, 0, 1, 0, 0, 1, 1, 1]
    swept = lru_hits_at(stream, capacities)
    assert swept.hits[:, 0].tolist() == [0, 0, 1, 0, 0, 1, 1, 1]
    assert swept.num_simulated == 7  # with room for 8, no request waits
