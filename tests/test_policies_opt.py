"""OPT is the bound it claims to be: against every other policy, and against all choices there are."""

from __future__ import annotations

import functools
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.kv.policies.bypass import bypassing_hits
from dsatrace.kv.policies.simulate import simulate
from dsatrace.kv.policies.stream import AccessStream
from helpers.policy_streams import EACH_BY_ALL, NAMES, PARAMS, streams


@EACH_BY_ALL
@given(stream=streams(), capacity=st.integers(1, 14), oversize=st.sampled_from(["truncate", "reject"]))
def test_no_policy_beats_opt(stream, capacity, oversize):
    flat = simulate(stream, "opt", capacity, oversize=oversize)
    leaf = simulate(stream, "opt", capacity, oversize=oversize, leaf=True)
    for name, constrained in itertools.product(NAMES, (False, True)):
        params = PARAMS.get(name, {})
        other = simulate(stream, name, capacity, oversize=oversize, leaf=constrained, **params)
        assert other.hits.sum() <= leaf.hits.sum(), name
        assert other.hits_any.sum() <= flat.hits_any.sum(), name


@given(stream=streams(), capacity=st.integers(1, 14))
def test_the_leaf_constraint_costs_opt_nothing(stream, capacity):
    flat, leaf = (simulate(stream, "opt", capacity, leaf=leaf) for leaf in (False, True))
    assert flat.hits.tolist() == flat.hits_any.tolist() == leaf.hits.tolist()


def most_hits(stream: AccessStream, capacity: int, leaf: bool, contiguous: bool) -> int:
    """The most hits any sequence of victims gives: all of them are tried."""
    chains = [
        tuple(stream.blocks[begin:end].tolist())[:capacity]
        for begin, end in zip(stream.starts[:-1], stream.starts[1:], strict=True)
    ]

    @functools.cache
    def best(request: int, cached: frozenset[int]) -> int:
        if request == len(chains):
            return 0
        chain = chains[request]
        found = [block in cached for block in chain]
        gained = found.index(False) if contiguous and False in found else sum(found)
        in_flight = _in_flight(request, stream, chains, capacity)
        pinned = frozenset().union(*(chains[other] for other in in_flight))
        return gained + max(best(request + 1, after) for after in shrunk(cached | set(chain), pinned))

    def shrunk(cached: frozenset[int], pinned: frozenset[int]) -> set[frozenset[int]]:
        sets = {cached}
        while len(next(iter(sets))) > capacity:
            sets = {
                each - {block}
                for each in sets
                for block in each - pinned
                if not (leaf and any(stream.parents[other] == block for other in each))
            }
        return sets

    return best(0, frozenset())


def _in_flight(request: int, stream: AccessStream, chains: list[tuple[int, ...]], capacity: int) -> list[int]:
    """Requests that hold blocks once `request` is admitted; those it waited for are gone."""
    live: list[int] = []
    for current in range(request + 1):
        live = [other for other in live if stream.release[other] > current]
        live.sort(key=lambda other: (stream.release[other], other))
        while len(set(chains[current]).union(*(chains[other] for other in live))) > capacity:
            live.pop(0)
        live.append(current)
    return live


@EACH_BY_ALL
@given(stream=streams(max_requests=8), capacity=st.integers(2, 6))
def test_opt_finds_what_trying_everything_finds(stream, capacity):
    for leaf in (False, True):
        result = simulate(stream, "opt", capacity, leaf=leaf)
        assert result.hits.sum() == most_hits(stream, capacity, leaf, contiguous=True)
        assert result.hits_any.sum() == most_hits(stream, capacity, leaf, contiguous=False)


@given(
    sets=st.lists(st.sets(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=7),
    capacity=st.integers(3, 5),
)
def test_opt_is_optimal_for_block_hits_of_any_sets(sets, capacity):
    stream = AccessStream.of([sorted(each) for each in sets])
    assert simulate(stream, "opt", capacity).hits_any.sum() == most_hits(stream, capacity, False, False)


def test_opt_does_not_bound_unbroken_hits_of_any_sets():
    """Keeping a block that follows a missing one is worth a block hit, but no unbroken one."""
    stream = AccessStream.of([["a", "c"], ["b"], ["c"], ["a", "c"]])
    opt = simulate(stream, "opt", 2)
    assert (opt.hits.sum(), opt.hits_any.sum()) == (1, 2)
    assert most_hits(stream, 2, False, contiguous=True) == 2
    assert most_hits(stream, 2, False, contiguous=False) == 2


@EACH_BY_ALL
@given(stream=streams(), capacity=st.integers(1, 14))
def test_no_policy_beats_the_opt_that_may_leave_blocks_out(stream, capacity):
    bound = bypassing_hits(stream, stream.lengths, capacity).sum()
    for name in NAMES:
        params = PARAMS.get(name, {})
        for oversize in ("truncate", "reject"):
            assert simulate(stream, name, capacity, oversize=oversize, **params).hits.sum() <= bound, name


def most_hits_of_an_outer_tier(stream: AccessStream, looked_up: list[int], capacity: int) -> int:
    """The most hits if after each request any blocks may stay: all choices are tried."""
    chains = [
        tuple(stream.blocks[begin:end].tolist())
        for begin, end in zip(stream.starts[:-1], stream.starts[1:], strict=True)
    ]

    @functools.cache
    def best(request: int, cached: frozenset[int]) -> int:
        if request == len(chains):
            return 0
        chain = chains[request]
        found = [block in cached for block in chain[: looked_up[request]]]
        gained = found.index(False) if False in found else len(found)
        there = sorted(cached | set(chain))
        kept = itertools.combinations(there, min(capacity, len(there)))
        return gained + max(best(request + 1, frozenset(blocks)) for blocks in kept)

    return best(0, frozenset())


@EACH_BY_ALL
@given(stream=streams(max_requests=6), capacity=st.integers(1, 4), data=st.data())
def test_the_opt_that_may_leave_blocks_out_is_optimal(stream, capacity, data):
    """Also where requests produce blocks that they do not look up."""
    looked_up = [data.draw(st.integers(0, length)) for length in stream.lengths.tolist()]
    hits = bypassing_hits(stream, np.array(looked_up), capacity)
    assert hits.sum() == most_hits_of_an_outer_tier(stream, looked_up, capacity)
    assert (hits <= looked_up).all()


def test_leaving_blocks_out_pays():
    """A request that comes once pushes out what returns, unless it may pass by."""
    stream = AccessStream.of([["a"], ["b", "c"], ["a"]])
    assert simulate(stream, "opt", 2).hits.sum() == 0
    assert bypassing_hits(stream, stream.lengths, 1).tolist() == [0, 0, 1]
