"""Random streams for the policies' tests: prefix trees, times, workloads, requests in flight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from dsatrace.kv.policies.registry import POLICIES
from dsatrace.kv.policies.stream import AccessStream
from helpers.power import examples

EACH_BY_ALL = settings(max_examples=examples(50))
"""To draw a stream takes a hundred times as long as to simulate it: each goes through all policies."""

WORKLOADS = ("chat", "qa", "sum")
PARAMS = {
    "priority": {"priorities": {"qa": 2.0, "sum": -1.0}},
    "wa-lru": {"admit": ["qa"], "since_s": 5.0},
    "wa-prob": {"reuse": {"chat": (0.8, 2.0), "qa": (0.3, 9.0), "sum": (0.5, 0.7)}, "since_s": 5.0},
    "gdsf": {"depth_cost": 0.3},
    "t-lru": {"slack_blocks": 2},
    "slru": {"protected": 0.5},
    "s3-fifo": {"small": 0.3, "ghost": 0.6, "threshold": 1},
}
"""Parameters that bring small streams to where each policy differs from LRU."""

NAMES = sorted(POLICIES)


def prefixes(words: list[list[int]]) -> list[list[tuple[int, ...]]]:
    """Each word as the chain of its prefixes, so that ids stand for whole prefixes."""
    return [[tuple(word[: end + 1]) for end in range(len(word))] for word in words]


def release_by_duration(times: np.ndarray, durations: np.ndarray) -> np.ndarray:
    """`release` where request r ends `durations[r]` seconds after `times[r]`; times must not fall."""
    done = np.searchsorted(times, np.asarray(times) + np.asarray(durations), "left")
    return np.maximum(done, np.arange(len(times)) + 1).astype(np.int64)


@st.composite
def streams(draw: st.DrawFn, *, in_flight: bool = True, max_requests: int = 40) -> AccessStream:
    """Requests over a small prefix tree, so that they share, collide and come back."""
    words = draw(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=max_requests))

    def per_request(values: Sequence[Any]) -> list[Any]:
        return draw(st.lists(st.sampled_from(values), min_size=len(words), max_size=len(words)))

    times = np.cumsum(per_request([0.0, 0.5, 1.0, 4.0]))
    names = per_request(WORKLOADS)
    stream = AccessStream.of(prefixes(words), times=times.tolist(), concurrency=1)
    release = stream.release
    if in_flight and draw(st.booleans()):
        release = release_by_duration(times, np.array(per_request([0.0, 1.0, 3.0])))
    index = np.array([WORKLOADS.index(name) for name in names], np.int32)
    return AccessStream(stream.blocks, stream.starts, times, index, release, WORKLOADS)
