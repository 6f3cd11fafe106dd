"""Policies by name, their parameters, and the stream: what is refused, and with which words."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from dsatrace.errors import UserError
from dsatrace.kv.policies import batches
from dsatrace.kv.policies import simulate as simulate_module
from dsatrace.kv.policies.compiled import NEVER
from dsatrace.kv.policies.registry import POLICIES
from dsatrace.kv.policies.reuse import reuse_profile
from dsatrace.kv.policies.simulate import simulate
from dsatrace.kv.policies.stack_distance import lru_hits_at
from dsatrace.kv.policies.stream import AccessStream, release_by_concurrency
from helpers.policy_streams import release_by_duration

STREAM = AccessStream.of([["a", "b"], ["a", "c"], ["d"]])


def test_every_policy_names_its_meaning_and_source():
    for name, info in POLICIES.items():
        assert info.name == name
        assert info.meaning and re.search(r"\d{4}|SGLang|vLLM|measured", info.source)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: simulate(STREAM, "lrru", 3), "unknown policy 'lrru'; choose from lru, fifo"),
        (lambda: simulate(STREAM, "lru", 0), "holds at least 1 block, not 0"),
        (lambda: lru_hits_at(STREAM, [4, -1]), "holds at least 1 block, not -1"),
        (lambda: simulate(STREAM, "lru", 3, oversize="drop"), "'truncate' or 'reject', not 'drop'"),
        (lambda: simulate(STREAM, "lru", 3, seed=1), "lru has no parameter seed; it takes none"),
        (lambda: simulate(STREAM, "slru", 3, share=1), "no parameter share; it takes protected"),
        (lambda: simulate(STREAM, "slru", 3, protected=1.5), "protected is a share"),
        (lambda: simulate(STREAM, "random", 3, seed=-1), "seed must not be negative"),
        (lambda: simulate(STREAM, "priority", 3, priorities={"vip": 1}), "unknown: vip; there are all"),
        (lambda: batches.BatchOrder("wa-lru", 3, 3), "no stream to learn reuse from: give admit"),
        (lambda: simulate(STREAM, "wa-prob", 3, reuse={}), "reuse names workloads, missing: all"),
        (lambda: simulate(STREAM, "wa-prob", 3, reuse={"all": (1.0, 1.0)}), "from 0 to below 1"),
        (lambda: AccessStream.of([["a", "b", "a"]]), "request 0 names a block twice"),
        (lambda: AccessStream.of([["a"], ["b"]], times=[1, 0]), "request 1 comes before"),
        (lambda: AccessStream.of([["a"]], times=[0, 1]), "times has 2 entries for 1 requests"),
        (lambda: AccessStream.of([["a"]], concurrency=0), "concurrency must be at least 1, not 0"),
        (lambda: AccessStream.of([["a", "b"], ["b"]]).parents, "block 1 of request . also follows another"),
        (lambda: simulate(AccessStream.of([["a", "b"], ["b"]]), "fifo", 3, leaf=True), "whole prefixes"),
    ],
)
def test_mistakes_are_named(wrong, message):
    with pytest.raises(UserError, match=message):
        wrong()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("starts", [0, 2, 1, 3], "starts fall at request 1"),
        ("starts", [1, 2, 3, 3], "starts must run from 0"),
        ("blocks", [0, 1, -2], "must not be negative: -2"),
        ("release", [1, 1, 3], "release"),
        ("workloads", [0, 0, 1], "indices of workload_names"),
    ],
)
def test_arrays_that_contradict_each_other(field, value, message):
    arrays = {
        "blocks": [0, 1, 2],
        "starts": [0, 1, 2, 3],
        "times": [0, 1, 2],
        "workloads": [0, 0, 0],
        "release": [1, 2, 3],
    }
    with pytest.raises(UserError, match=message):
        AccessStream(**{name: np.array(array) for name, array in {**arrays, field: value}.items()})


def test_an_empty_stream_is_no_error():
    empty = AccessStream.of([])
    assert simulate(empty, "opt", 3, leaf=True).hit_rate == 0
    assert lru_hits_at(empty, [1, 2]).hits.sum(axis=1).tolist() == [0, 0]
    assert simulate(AccessStream.of([[], ["a"], []]), "arc", 3).accesses.tolist() == [0, 1, 0]


def test_release_times_and_next_uses():
    times = np.array([0.0, 1.0, 2.0, 2.0])
    assert release_by_duration(times, np.array([2.0, 0.0, 0.5, 9.0])).tolist() == [2, 2, 4, 4]
    assert release_by_concurrency(3, 2).tolist() == [2, 3, 4]
    stream = AccessStream.of([["a", "b"], ["a", "b"]])
    assert stream.next_use(np.array([2, 1])).tolist() == [2, NEVER, NEVER, NEVER]


def test_select_keeps_who_meets_whom():
    stream = AccessStream.of([["a"], ["b"], ["c"], ["d"]], concurrency=2)
    part = stream.select(np.array([True, False, True, True]))
    assert part.blocks.tolist() == [0, 2, 3]
    assert part.release.tolist() == [1, 3, 3]  # the first was done before the third came
    assert part.lengths.tolist() == [1, 1, 1]


def test_the_reuse_profile_by_hand():
    stream = AccessStream.of([["a", "b"], ["a"], ["a"]], times=[0, 2, 6], workloads=["chat", "qa", "chat"])
    profile = reuse_profile(stream)
    assert profile.probability.tolist() == [2 / 5, 2 / 3]  # chat: 1 of 3, qa: 1 of 1, and the prior
    assert profile.mean_s.tolist() == [2.0, 4.0]


def test_the_loops_are_cached_by_all_rules_sources():
    """Else an edited policy would run as compiled before, and a renamed one would break the cache."""
    folder = Path(simulate_module.__file__).parent
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()
    for loop in (simulate_module._loop, batches._admit, batches._forget):
        assert digest[:16] in str(loop._cache._cache_file._index_name)
