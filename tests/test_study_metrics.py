"""The study's numbers: by hand, against plain recounts, and never outside what their names allow."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import INFERENCE
from dsatrace.kv.blocks import EVICT, HIT, MISS
from dsatrace.schema import quantile_sorted
from dsatrace.study.measure import (
    block_counts,
    measure,
    of_workload,
    per_turn,
    recounted_by_chunk,
    reuse_gaps,
)
from dsatrace.study.metrics import METRICS, UNITS, check_values, markdown_table
from dsatrace.study.results import BLOCK_COLUMNS, block_rows
from dsatrace.study.run import StudySettings, host_hit_blocks, run_study
from helpers.study_samples import ROWS, requests_of, three_turns

SETTINGS = st.builds(
    StudySettings,
    block_size=st.integers(1, 4),
    num_blocks=st.one_of(st.none(), st.integers(1, 24)),
    concurrency=st.integers(1, 4),
    schedule=st.sampled_from(["in_order", "continuous"]),
    chunk_tokens=st.integers(1, 6),
    decode=st.booleans(),
    prefix_caching=st.booleans(),
    host_blocks=st.integers(1, 12),
)


def test_three_turns_by_hand() -> None:
    """Blocks of 4: turn 0 finds nothing, turn 1 two blocks, turn 2 four.

    turn 0 asks 6 tokens, 3 are answered: 9, so 2 full blocks are cached
    turn 1 asks 14: 3 blocks may be hit (a token is left to compute), 2 are; with the answer 16, 4 blocks
    turn 2 asks 20: 4 blocks may be hit, 4 are; with the answer 22, 5 full blocks and a part of one
    """
    replayed = run_study(three_turns(), StudySettings(block_size=4))
    assert replayed.result.hit_tokens.tolist() == [0, 8, 16]
    assert [row["hit_rate_first_prefill"] for row in per_turn(replayed)] == [0, 8 / 14, 16 / 20]
    expected = {
        "num_requests": 3,
        "num_rejected": 0,
        "prompt_tokens": 40,
        "sharing_fraction_mean": (0 + 8 / 14 + 16 / 20) / 3,
        "sharing_fraction_median": 8 / 14,
        "sharing_fraction_min": 0,
        "sharing_fraction_max": 0.8,
        "sharing_above_0": 2 / 3,
        "hit_rate_first_prefill": 24 / 40,
        "hit_rate_with_preempted": 24 / 40,
        "hit_rate_blocks": 6 / 9,  # full prompt blocks: 1, 3, 5
        "hit_rate_infinite": 24 / 40,
        "blocks_allocated": 3 + 2 + 2,  # the parts of blocks too
        "blocks_reused": 6,
        "block_reuse_rate": 6 / 13,
        "blocks_unique": 5,
        "blocks_evicted": 0,
        "blocks_hit": 4 / 5,
        "accesses_per_block_mean": 11 / 5,
        "hits_per_block_mean": 6 / 5,
        "hits_per_hit_block_mean": 6 / 4,
        "reuse_gap_s_mean": (2 * (10 + 20) + 2 * 20) / 6,
        "hit_gap_s_mean": 20,
    }
    values = measure(replayed)
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_three_turns_do_not_fit_a_small_cache() -> None:
    """Five blocks hold turns 0 and 1; the 20 tokens of turn 2 fit exactly, its answer does not."""
    replayed = run_study(three_turns(), StudySettings(block_size=4, num_blocks=5))
    assert replayed.result.rejections() == {"output_cut": 1, "prompt_too_long": 0, "request_too_long": 0}
    replayed = run_study(three_turns(), StudySettings(block_size=4, num_blocks=4))
    assert replayed.result.rejections() == {"output_cut": 0, "prompt_too_long": 1, "request_too_long": 0}
    values = measure(replayed)
    assert (values["num_served"], values["num_rejected"]) == (2, 1)
    assert values["hit_rate_first_prefill"] == 8 / 40  # the rejected one finds nothing
    assert values["hit_rate_served"] == 8 / 20  # and here it is in neither side


@settings(deadline=None)  # the first call loads compiled code
@given(ROWS, SETTINGS)
def test_every_value_is_what_its_name_allows(rows: Any, settings: StudySettings) -> None:
    replayed = run_study(requests_of(rows), settings)
    values = measure(replayed)
    check_values(values)
    assert set(values) == set(UNITS)
    assert values["hit_rate_first_prefill"] is None or (
        values["hit_rate_first_prefill"] <= values["hit_rate_with_host"]
    )
    served = replayed.result.served
    if served.all() and replayed.settings.schedule == "in_order" and replayed.settings.prefix_caching:
        assert np.all(replayed.result.hit_tokens <= replayed.unlimited.hit_tokens)


@settings(deadline=None)  # the first call loads compiled code
@given(ROWS, SETTINGS)
def test_workloads_and_turns_add_up_to_the_whole(rows: Any, settings: StudySettings) -> None:
    replayed = run_study(requests_of(rows), settings)
    whole = measure(replayed)
    names = replayed.requests.workload_names
    parts = [measure(replayed, of_workload(replayed, name)) for name in names]
    for name in (
        "num_requests", "num_served", "num_rejected", "prompt_tokens", "host_hit_blocks", "blocks_allocated",
        "blocks_reused", "blocks_evicted",
    ):  # fmt: skip
        assert sum(part[name] for part in parts) == whole[name], name
    counted = Counter[str]()
    for name in names:
        counted.update(replayed.result.rejections(of_workload(replayed, name)))
    assert dict(counted) == replayed.result.rejections()
    (turn,) = per_turn(replayed)  # no conversation: one row, of no turn
    assert turn["turn"] is None
    assert turn["num_requests"] == len(rows)


@settings(deadline=None)  # the first call loads compiled code
@given(ROWS, SETTINGS)
def test_blocks_against_a_plain_recount(rows: Any, settings: StudySettings) -> None:
    """Accesses, hits and gaps from the events one by one."""
    replayed = run_study(requests_of(rows, gap_s=0.5), settings)
    accesses: dict[int, list[tuple[int, float]]] = {}
    evictions = Counter[int]()
    for kind, key, _, clock in replayed.result.events.tolist():
        if kind == EVICT:
            evictions[key] += 1
        else:
            accesses.setdefault(key, []).append((kind, 0.5 * clock))
    counts = block_counts(replayed)
    assert counts.keys.tolist() == sorted(accesses)
    assert counts.accesses.tolist() == [len(accesses[key]) for key in sorted(accesses)]
    hits = {key: [time for kind, time in times if kind == HIT] for key, times in accesses.items()}
    assert counts.hits.tolist() == [len(hits[key]) for key in sorted(hits)]
    every = {key: [time for _, time in times] for key, times in accesses.items()}
    for hits_only, times in ((False, every), (True, hits)):
        expected = [b - a for key in sorted(times) for a, b in itertools.pairwise(times[key])]
        assert reuse_gaps(replayed, hits_only=hits_only).tolist() == expected
    written = [dict(zip(BLOCK_COLUMNS, row, strict=True)) for row in block_rows(replayed)]
    assert [row["block"] for row in written] == sorted(accesses)
    for row in written:
        key, times = row["block"], every[row["block"]]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert (row["accesses"], row["hits"], row["evictions"]) == (
            len(times),
            len(hits[key]),
            evictions[key],
        )
        assert (row["first_access_s"], row["last_access_s"]) == (times[0], times[-1])
        for name, known in (("max", max), ("min", min), ("median", statistics.median_low)):
            assert row[f"reuse_gap_s_{name}"] == (known(gaps) if gaps else None)
        assert row["reuse_gap_s_mean"] == (pytest.approx(sum(gaps) / len(gaps)) if gaps else None)
        assert row["depth"] == 0 or row["parent"] >= 0


@settings(deadline=None)  # the first call loads compiled code
@given(ROWS, SETTINGS)
def test_host_hits_against_a_plain_recount(rows: Any, settings: StudySettings) -> None:
    """The host pool as a list, the device's contents from the events, looked up before each request's own."""
    replayed = run_study(requests_of(rows), settings)
    trace, result, size = replayed.trace, replayed.result, settings.host_blocks
    assert size is not None
    host: list[int] = []
    device = Counter[int]()
    expected = [0] * trace.num_requests
    seen = set()
    for kind, key, request, _ in result.events.tolist():
        if request not in seen:
            seen.add(request)
            found = int(result.hit_tokens[request]) // trace.block_size
            may_hit = trace.keys_of(request)[
                found : (int(trace.prompt_tokens[request]) - 1) // trace.block_size
            ]
            for wanted in may_hit:
                if wanted in host and not device[wanted]:
                    expected[request] += 1
                    host.remove(wanted)
                    host.append(wanted)
                elif not device[wanted]:
                    break
        if kind == EVICT:
            device[key] -= 1
            host = [other for other in host if other != key][-(size - 1) :] if size > 1 else []
            host.append(key)
        device[key] += kind == MISS
    assert replayed.host_hits is not None
    assert replayed.host_hits.tolist() == expected


def test_an_endless_host_pool_makes_up_for_a_small_cache() -> None:
    """Two conversations take turns in a cache of one; what each left behind is in host memory."""
    rows = [([which] * 12 + [turn], [], "") for turn in range(4) for which in (7, 8)]
    replayed = run_study(requests_of(rows), StudySettings(block_size=4, num_blocks=4, host_blocks=100))
    assert not replayed.result.hit_tokens.any()
    assert replayed.host_hits is not None
    assert replayed.host_hits.tolist() == [0, 0, 3, 3, 3, 3, 3, 3]
    values = measure(replayed)
    assert values["hit_rate_with_host"] == values["hit_rate_infinite"] == 6 * 12 / (8 * 13)
    with pytest.raises(ValueError, match="at least 1 block, not 0"):
        host_hit_blocks(replayed.trace, replayed.result, 0)


@settings(deadline=None)  # the first call loads compiled code
@given(ROWS, SETTINGS, st.integers(1, 7))
def test_chunks_recounted_one_by_one(rows: Any, settings: StudySettings, chunk: int) -> None:
    replayed = run_study(requests_of(rows), settings)
    found = prompts = ends = 0
    for prompt, hit in zip(
        replayed.trace.prompt_tokens.tolist(), replayed.result.hit_tokens.tolist(), strict=True
    ):
        at = hit
        while at < prompt:
            found += at // settings.block_size * settings.block_size * settings.prefix_caching
            prompts += prompt
            ends += min(at + chunk, prompt)
            at += chunk
    everyone = np.ones(len(rows), bool)
    assert recounted_by_chunk(replayed, chunk, everyone).sum(axis=1).tolist() == [found, prompts, ends]


def test_a_prompt_of_one_chunk_recounts_nothing() -> None:
    replayed = run_study(three_turns(), StudySettings(block_size=4, chunk_tokens=1000))
    values = measure(replayed)
    assert values["hit_rate_chunks_recounted"] == values["hit_rate_first_prefill"]


def test_preempted_work_is_counted_apart() -> None:
    """Two requests that grow out of a cache for one and a half: the newer comes back and finds its prefix."""
    rows = [([1] * 8, [2] * 9, ""), ([3] * 8, [4] * 9, "")]
    settings = StudySettings(
        block_size=2, num_blocks=10, concurrency=2, schedule="continuous", chunk_tokens=64
    )
    replayed = run_study(requests_of(rows), settings)
    assert replayed.result.num_preemptions.sum() > 0
    values = measure(replayed)
    assert values["hit_rate_first_prefill"] == 0
    hit, looked_up = replayed.result.resumed_hit_tokens.sum(), replayed.result.resumed_tokens.sum()
    assert hit > 0
    assert values["hit_rate_with_preempted"] == hit / (16 + looked_up)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hit_rate_blocks": 1.01}, "between 0 and 1"),
        ({"hit_rate_blocks": -0.01}, "at least 0"),
        ({"block_reuse_rate": float("nan")}, "must be a number"),
        ({"blocks_reused": -1}, "at least 0"),
        ({"reuse_gap_s_max": float("inf")}, "must be a number"),
        ({"hit_rate": 0.5}, "no metric of the study"),
    ],
)
def test_a_value_that_cannot_be_raises(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_values(values)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.sampled_from([50, 90, 99]))
def test_a_quantile_is_the_nearest_rank(values: list[int], percent: int) -> None:
    enough = percent / 100 * len(values) - 1e-9
    expected = min(value for value in values if sum(other <= value for other in values) >= enough)
    assert quantile_sorted(sorted(values), percent) == expected


def test_the_list_of_metrics_prints_itself() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "dsatrace.study.metrics"],
        cwd=INFERENCE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.strip() == markdown_table()
    for metric in METRICS:
        assert f"`{metric.name}`" in printed or f"`{metric.name}_`" in printed
        assert metric.formula, metric.name
        assert metric.denominator or metric.unit != "share", f"{metric.name} is a share of nothing"
