"""Flat policies against libCacheSim, request by request, on streams of single blocks.

Test-only (libCacheSim is GPL): skipped where it is not installed. Its requests hold one
object each and nothing is ever in flight, which is a stream of requests of one block here.
Where its definition differs from ours, the test says how.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest

from conftest import ROOT
from dsatrace.kv.policies.compiled import Access
from dsatrace.kv.policies.simulate import simulate
from dsatrace.kv.policies.stream import AccessStream, release_by_concurrency
from helpers.plain_policies import make_policy

sys.path.insert(0, str(ROOT / "scripts" / "bench"))

from peers import LIBCACHESIM

lcs = pytest.importorskip("libcachesim", reason="libCacheSim is not installed")


def zipf_stream(seed: int, num_requests: int = 20_000) -> AccessStream:
    """A skewed popularity that drifts, and a scan every now and then."""
    rng = np.random.default_rng(seed)
    popular = np.minimum(rng.zipf(1.2, num_requests), 2000) + np.arange(num_requests) // 400
    scan = 5000 + np.arange(num_requests)
    scanning = np.arange(num_requests) % 2500 < 250
    blocks = np.unique(np.where(scanning, scan, popular), return_inverse=True)[1]
    return AccessStream(
        blocks,
        np.arange(num_requests + 1),
        np.arange(num_requests),
        np.zeros(num_requests),
        release_by_concurrency(num_requests, 1),
    )


def their_hits(cache: object, stream: AccessStream) -> np.ndarray:
    next_use = stream.next_use(stream.lengths)
    hits = np.empty(stream.num_requests, bool)
    for at, block in enumerate(stream.blocks.tolist()):
        request = lcs.Request()
        request.obj_id, request.obj_size, request.clock_time = block + 1, 1, at
        request.next_access_vtime = int(next_use[at]) if next_use[at] < len(hits) else 2**63 - 1
        hits[at] = cache.get(request)  # type: ignore[attr-defined]
    return hits


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("capacity", [30, 200])
@pytest.mark.parametrize("name", sorted(LIBCACHESIM))
def test_the_same_hits_request_by_request(name, capacity, seed):
    stream = zipf_stream(seed)
    theirs = their_hits(getattr(lcs, LIBCACHESIM[name])(capacity, hashpower=16), stream)
    ours = simulate(stream, name, capacity).hits
    assert np.flatnonzero(ours != theirs).tolist()[:10] == []


@pytest.mark.parametrize("capacity", [30, 200])
def test_gdsf_where_theirs_may_evict_the_newcomer(capacity):
    """Theirs inserts, at the value of the last eviction but one, and evicts afterwards, perhaps
    what it just inserted. Ours makes room first, as in the paper: a request needs its blocks."""
    stream = zipf_stream(1)
    theirs = their_hits(lcs.GDSF(capacity, hashpower=16), stream)
    policy, ours = make_policy("gdsf", capacity), []
    for block in stream.blocks.tolist():
        ours.append(block in policy)
        if block in policy:
            policy.hit(block, Access())
            continue
        policy.insert(block, Access())
        if len(policy) > capacity:
            policy.evict()
    assert np.flatnonzero(np.array(ours) != theirs).tolist()[:10] == []
    assert simulate(stream, "gdsf", capacity).hit_rate == pytest.approx(theirs.mean(), abs=0.01)


@pytest.mark.parametrize("capacity", [30, 200])
def test_random_hits_about_as_often(capacity):
    """Another generator: only the rate can agree."""
    stream = zipf_stream(3)
    theirs = their_hits(lcs.Random(capacity, hashpower=16), stream).mean()
    assert simulate(stream, "random", capacity).hit_rate == pytest.approx(theirs, abs=0.01)


def test_segmented_lru_hits_about_as_often():
    """Theirs has four equal segments, promotes by one a hit, and fills the upper ones with new
    objects while there is room; ours has Karedla's two, and new blocks start in probation."""
    stream = zipf_stream(4)
    theirs = their_hits(lcs.SLRU(200, hashpower=16), stream).mean()
    assert simulate(stream, "slru", 200, protected=0.75).hit_rate == pytest.approx(theirs, abs=0.03)
