"""The summary equals the plain one re-derived from the records, and its parts merge by addition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.kv.tiers.account import default_tiers
from dsatrace.schema import SUMMARY_FIELDS, problems
from dsatrace.trace.histogram import Histogram, ValueCounts
from dsatrace.trace.records import RecordDeriver
from dsatrace.trace.summary import Summary, TracingCost, uniform_blocks
from dsatrace.verify.plain_summary import summarize
from helpers.trace_samples import LAYOUT, config_for, plain_records, sample_capture, sample_needles

SIZES = (16, 24, 64)


def steps(rng: np.random.Generator, num_steps: int, first: list[int], k: int, cached: list[int]) -> list[Any]:
    """A prefill record, then decode steps; every step one token longer."""
    needles = sample_needles(rng, first)
    return [
        sample_capture(
            rng,
            [n + step + 1 for n in first],
            num_layers=3,
            k=k,
            step_idx=step,
            cached_blocks=cached,
            phase="prefill" if step < 0 else "decode",
            needles=needles,
        )
        for step in range(-1, num_steps - 1)
    ]


def request_line(request_id: str) -> dict[str, Any]:
    """All of a line of requests.jsonl that a summary without `serving` reads."""
    score = {"r0": 50.0, "r1": None}.get(request_id, 1 / 3)
    return {"request_id": request_id, "score": score, "labels": {"task": request_id, "half": "first"}}


def summed(captures: list[Any], block_size: int = 16, finish: bool = True) -> Summary:
    config = config_for(block_size=block_size)
    deriver = RecordDeriver(config, LAYOUT, default_tiers(LAYOUT))
    summary = Summary(SIZES, "synthetic")
    for capture in captures:
        summary.add_step(deriver.derive(capture))
    if finish:
        for request_id in sorted({name for capture in captures for name in capture.request_ids}):
            summary.finish_request(request_line(request_id))
    return summary


def close(left: Any, right: Any) -> bool:
    """Equal, floats to rounding; the two sides add in another order."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(close(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(close, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return left == pytest.approx(right, rel=1e-12, abs=1e-12)
    return left == right


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    first=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    k=st.integers(1, 30),
    block_size=st.sampled_from([1, 3, 8, 16, 40]),
)
def test_summary_equals_plain(seed: int, first: list[int], k: int, block_size: int) -> None:
    rng = np.random.default_rng(seed)
    captures = steps(rng, 4, first, k, [n // (2 * block_size) for n in first])
    fast = summed(captures, block_size).to_json("complete")
    records = [r for capture in captures for r in plain_records(capture, config_for(block_size=block_size))]
    requests = [request_line(name) for name in captures[0].request_ids]
    plain = summarize(records, requests=requests, top_k=k, block_sizes=SIZES)
    assert list(fast) == list(plain)
    for name in plain:
        assert close(fast[name], plain[name]), (name, fast[name], plain[name])
    assert problems(fast, "full", SUMMARY_FIELDS) == []


def test_parts_merge_to_the_whole() -> None:
    rng = np.random.default_rng(5)
    captures = steps(rng, 6, [100, 40], 16, [2, 0])
    whole = summed(captures, finish=False).to_json("complete")
    head, tail = summed(captures[:3], finish=False), summed(captures[3:], finish=False)
    head.merge(tail)
    merged = head.to_json("complete")
    # The pair across the cut is seen by neither part.
    assert whole.pop("step_overlap")["pairs"] == merged.pop("step_overlap")["pairs"] + 2
    assert close(merged, whole)


def test_hot_blocks_are_prefix_blocks_in_order() -> None:
    captures = [
        sample_capture(np.random.default_rng(0), [200], 1, 4, step_idx=i, cached_blocks=[3]) for i in range(3)
    ]
    captures[0].positions[0, 0] = [0, 1, 40, 190]
    captures[1].positions[0, 0] = [0, 17, 41, 190]
    captures[2].positions[0, 0] = [44, 45, 60, 199]
    hot = summed(captures).to_json("complete")["prefix_hot_blocks"]
    assert hot == {
        "r0": [{"block_id": 2, "touches": 3}, {"block_id": 0, "touches": 2}, {"block_id": 1, "touches": 1}]
    }


def test_requests_without_a_shared_prefix_have_no_hot_blocks() -> None:
    assert (
        summed([sample_capture(np.random.default_rng(0), [200])]).to_json("complete")["prefix_hot_blocks"]
        == {}
    )


def test_overlap_counts_consecutive_sparse_steps_only() -> None:
    captures = [sample_capture(np.random.default_rng(0), [50 + i], 1, 4, step_idx=i) for i in (0, 1, 3)]
    captures[0].positions[0, 0] = [1, 2, 3, 4]
    captures[1].positions[0, 0] = [4, 3, 2, 10]
    captures[2].positions[0, 0] = [4, 3, 2, 10]
    overlap = summed(captures).to_json("complete")["step_overlap"]
    assert overlap == {"pairs": 1, "mean": 0.75, "random_mean": 4 / 51, "per_layer": [0.75]}


def test_needle_recall_by_hand() -> None:
    """Dense and prefill records say nothing, nor do requests without an answer."""
    needles = {"needles": ((3, 4), ())}
    rng = np.random.default_rng(0)
    captures = [
        sample_capture(rng, [4, 50], 2, 4, step_idx=0, **needles),
        sample_capture(rng, [50, 50], 2, 4, step_idx=-1, phase="prefill", **needles),
        sample_capture(rng, [50, 50], 2, 4, step_idx=1, **needles),
        sample_capture(rng, [51, 50], 2, 4, step_idx=2, **needles),
    ]
    captures[2].positions[:, 0] = [[4, 9, 8, 3], [1, 2, 5, 6]]
    captures[3].positions[:, 0] = [[4, 9, 8, 7], [40, 3, 5, 6]]
    record = summed(captures).to_json("complete")["needle_recall"]
    assert record == {
        "records": 4,
        "mean": 0.5,
        "random_mean": pytest.approx((4 / 50 + 4 / 51) / 2),
        "per_layer": [0.75, 0.25],
    }
    assert summed(captures[:2]).to_json("complete")["needle_recall"] is None


def test_a_random_selector_recalls_k_of_n() -> None:
    rng = np.random.default_rng(1)
    captures = [
        sample_capture(rng, [200], 3, 50, step_idx=i, needles=(tuple(range(90, 97)),)) for i in range(400)
    ]
    recall = summed(captures).to_json("complete")["needle_recall"]
    assert recall["random_mean"] == 0.25
    assert recall["mean"] == pytest.approx(0.25, abs=0.02)


def test_memory_of_a_request_ends_with_it() -> None:
    summary = summed([sample_capture(np.random.default_rng(0), [50, 60])], finish=False)
    assert set(summary.overlap._last) == {"r0", "r1"}
    summary.finish_request(request_line("r0"))
    assert set(summary.overlap._last) == {"r1"}


def test_an_empty_run_has_a_summary() -> None:
    summary = Summary((16,))
    summary.cost = TracingCost()
    record = summary.to_json("complete")
    assert problems(record, "full", SUMMARY_FIELDS) == []
    assert record["offsets"]["mean"] is None


def test_the_uniform_baseline_is_the_expectation() -> None:
    rng = np.random.default_rng(1)
    n, k, size = 70, 9, 16
    drawn = [len(np.unique(rng.choice(n, k, replace=False) // size)) for _ in range(20000)]
    assert uniform_blocks(np.array([n]), k, size)[0] == pytest.approx(np.mean(drawn), abs=0.03)
    assert uniform_blocks(np.array([n]), n, size)[0] == 5.0  # all tokens: all blocks


@given(st.lists(st.integers(0, 300), min_size=1), st.lists(st.integers(0, 300), min_size=1))
def test_histograms_are_exact_and_add(left: list[int], right: list[int]) -> None:
    one, two, both = Histogram(), Histogram(), ValueCounts()
    one.add(np.array(left))
    two.add(np.array(right))
    one.merge(two)
    both.add(left + right)
    values = sorted(left + right)
    expected = {
        "min": values[0],
        "p50": values[max(1, -(-len(values) * 50 // 100)) - 1],
        "p95": values[max(1, -(-len(values) * 95 // 100)) - 1],
        "max": values[-1],
        "mean": pytest.approx(sum(values) / len(values)),
    }
    assert one.distribution() == both.distribution() == expected
