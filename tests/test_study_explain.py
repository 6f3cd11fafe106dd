"""One trace under every definition: each by hand or against another count, none past 1."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.study.explain import Definition, explain
from dsatrace.study.measure import measure
from dsatrace.study.request_files import read_requests
from dsatrace.study.requests import RequestsBuilder, StudyRequests
from dsatrace.study.run import StudySettings, run_study
from dsatrace.study.tokenization import WordVocabulary
from dsatrace.workloads.rows import BadRows
from helpers.real_data import real_file
from helpers.study_samples import ROWS, requests_of, study, three_turns


def explained(requests: StudyRequests, settings: StudySettings) -> dict[str, Definition]:
    return {line.name: line for line in explain(run_study(requests, settings))}


def test_three_turns_under_every_definition() -> None:
    lines = explained(three_turns(), StudySettings(block_size=4))
    fractions = {name: (line.numerator, line.denominator) for name, line in lines.items()}
    mean = pytest.approx(8 / 14 + 16 / 20)
    assert {name: fractions[name] for name in fractions if not name.startswith("chunks")} == {
        "token_weighted": (24, 40),
        "token_weighted_with_rejected": (24, 40),
        "token_weighted_with_outputs": (24, 47),
        "with_preempted": (24, 40),
        "second_half": (24, 34),  # requests 1 and 2
        "after_turn_0": (24, 34),
        "per_request_mean": (mean, 3),
        "per_request_mean_rejected_as_0": (mean, 3),
        "per_request_mean_of_hits": (mean, 2),
        "requests_with_a_hit": (2, 3),
        "blocks_full": (6, 9),
        "blocks_with_partial": (6, 2 + 4 + 5),
        "blocks_any_position": (6, 9),
        "block_reuse_rate": (6, 13),
        "repeated_accesses": (11 - 5, 11),
        "answers_not_cached": (4 + 12, 40),  # the prompts of 6 and 14 tokens leave 1 and 3 blocks
        "infinite_cache": (24, 40),
        "infinite_cache_per_request_mean": (mean, 3),
        "chained_hashes": (0 + 1 + 3, 9),
        "chained_hashes_with_partial": (0 + 1 + 3, 11),
        "unchained_hashes": (0 + 1 + 3, 9),
        "unchained_hashes_with_partial": (0 + 1 + 3, 11),
        **{f"prompts_{name}": (4 + 12, 34) for name in ("lru", "fifo", "optimal")},  # requests 1 and 2
    }


# What kvcache-simulator 0.1.3 (PyPI) says, with blocks of 4 tokens: hit tokens of the last six prompts, which
# have 80, by the cache's blocks under its lru, fifo and optimal. A prompt is its tokens and its block ids.
PROMPTS: tuple[tuple[int, list[int]], ...] = (
    (5, [0, 1]), (13, [2, 3, 4, 5]), (13, [0, 6, 7, 8]), (6, [9, 10]), (7, [11, 12]), (6, [9, 10]),
    (13, [0, 6, 7, 8]), (8, [0, 13]), (11, [0, 13, 14]), (13, [2, 3, 4, 5]),
    (28, [2, 15, 16, 17, 18, 19, 20]), (7, [21, 22]),
)  # fmt: skip
RECORDED = {1: (0, 0, 12), 2: (16, 8, 16), 3: (16, 8, 20), 5: (20, 16, 28), 8: (29, 16, 37), 13: (41, 21, 42)}
# The same of the first 500 requests of Mooncake's conversations, in their blocks of 512; of 3,590,818 tokens.
MOONCAKE = {
    195: (128_000, 112_640, 287_031),
    1562: (152_576, 150_528, 940_261),
    6250: (629_679, 627_119, 940_261),
}


def prompts_alone(requests: StudyRequests, num_blocks: int) -> list[tuple[Any, Any]]:
    settings = StudySettings(requests.tokens_per_id, num_blocks)
    lines = [line for line in explain(run_study(requests, settings)) if line.name.startswith("prompts_")]
    assert all("kvcache-simulator" in line.used_by for line in lines)
    return [(line.numerator, line.denominator) for line in lines]


@pytest.mark.parametrize("num_blocks", RECORDED)
def test_prompts_alone_are_another_simulators_numbers(num_blocks: int) -> None:
    builder = RequestsBuilder(tokens_per_id=4)
    for at, (num_tokens, ids) in enumerate(PROMPTS):
        builder.add(float(at), ids, num_prompt_tokens=num_tokens, num_response_tokens=3)
    assert prompts_alone(builder.build(), num_blocks) == [(hits, 80) for hits in RECORDED[num_blocks]]


def test_prompts_alone_are_its_numbers_on_a_published_log() -> None:
    trace = real_file("mooncake/conversation_trace_head500.jsonl")
    requests = read_requests(trace, WordVocabulary(), BadRows(), Counter())
    for num_blocks, hits in MOONCAKE.items():
        assert prompts_alone(requests, num_blocks) == [(number, 3_590_818) for number in hits]


def test_what_moves_the_chained_and_the_unchained_count() -> None:
    """The same block behind different ones counts unchained; the last part of a prompt only with parts."""
    rows = [([1, 1, 2, 2, 9], [], ""), ([3, 3, 2, 2, 9], [], "")]
    lines = explained(requests_of(rows), StudySettings(block_size=2))
    assert (lines["chained_hashes"].numerator, lines["chained_hashes_with_partial"].numerator) == (0, 0)
    assert (lines["unchained_hashes"].numerator, lines["unchained_hashes_with_partial"].numerator) == (1, 2)


def test_chunks_alone_move_the_number() -> None:
    """One prompt that shares nothing: looked up again before each of its chunks it `hits` itself."""
    lines = explained(requests_of([(range(1024), [], "")]), StudySettings(block_size=16))
    assert lines["token_weighted"].value == 0
    assert lines["chunks_of_256_recounted"].value == (256 + 512 + 768) / (4 * 1024)
    assert lines["chunks_of_256_recounted_to_their_end"].value == (256 + 512 + 768) / (256 + 512 + 768 + 1024)
    assert lines["chunks_of_2048_recounted"].value == 0


def test_rejected_requests_move_the_number() -> None:
    rows = [([1, 2, 3, 4, 5], [], ""), ([1, 2, 3, 4, 6], [], ""), (range(100, 200), [], "")]
    lines = explained(requests_of(rows), StudySettings(block_size=4, num_blocks=3))
    assert lines["token_weighted"].value == 4 / 10
    assert lines["token_weighted_with_rejected"].value == 4 / 110
    assert lines["per_request_mean"].value == pytest.approx((0 + 4 / 5) / 2)
    assert lines["per_request_mean_rejected_as_0"].value == pytest.approx((0 + 4 / 5) / 3)


def test_block_ids_have_no_unchained_count() -> None:
    builder = RequestsBuilder(tokens_per_id=16)
    builder.add(0.0, [0, 1, 2], num_prompt_tokens=40, num_response_tokens=3)
    builder.add(1.0, [0, 1, 3], num_prompt_tokens=40, num_response_tokens=3)
    lines = explained(builder.build(), StudySettings(block_size=16))
    assert lines["unchained_hashes"].value is None
    assert "unknown" in lines["unchained_hashes"].formula
    assert lines["chained_hashes_with_partial"].value == 2 / 6
    assert lines["token_weighted"].value == 32 / 80


@settings(deadline=None)  # the first call loads compiled code
@given(
    ROWS,
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 20)),
    st.integers(1, 4),
    st.sampled_from(["in_order", "continuous"]),
)
def test_definitions_hold_together(
    rows: Any, block_size: int, num_blocks: int | None, concurrency: int, schedule: Any
) -> None:
    settings = StudySettings(block_size, num_blocks, concurrency, schedule=schedule)
    replayed = run_study(requests_of(rows), settings)
    lines = {line.name: line for line in explain(replayed)}
    values = measure(replayed)
    of_all = (
        ("token_weighted", "hit_rate_served"),
        ("token_weighted_with_rejected", "hit_rate_first_prefill"),
        ("per_request_mean_rejected_as_0", "sharing_fraction_mean"),
        ("block_reuse_rate", "block_reuse_rate"),
        ("infinite_cache", "hit_rate_infinite"),
        ("chunks_of_64_recounted", "hit_rate_chunks_recounted"),
    )
    if_none_is_rejected = (
        ("with_preempted", "hit_rate_with_preempted"),
        ("per_request_mean", "sharing_fraction_mean"),
        ("requests_with_a_hit", "sharing_above_0"),
        ("blocks_full", "hit_rate_blocks"),
        ("blocks_any_position", "hit_rate_blocks_any"),
    )
    for name, metric in (*of_all, *(() if values["num_rejected"] else if_none_is_rejected)):
        assert lines[name].value == pytest.approx(values[metric]), name
    for line in lines.values():
        assert line.value is None or 0 <= line.value <= 1
        if line.by_request is not None:
            assert line.by_request.shape == (2, len(rows))
            assert line.by_request.sum(axis=1).tolist() == pytest.approx([line.numerator, line.denominator])
    assert _at_most(lines, "chained_hashes", "unchained_hashes")
    assert _at_most(lines, "token_weighted_with_rejected", "token_weighted")
    assert _at_most(lines, "token_weighted_with_outputs", "token_weighted")
    json.dumps([line.record() for line in lines.values()], allow_nan=False)


def _at_most(lines: dict[str, Definition], less: str, more: str) -> bool:
    low, high = lines[less].value, lines[more].value
    return low is None or high is None or low <= high + 1e-12


def test_a_rate_past_1_raises() -> None:
    replayed = run_study(three_turns(), StudySettings(block_size=4))
    broken = dataclasses.replace(replayed.result, hit_tokens=replayed.result.hit_tokens * 3)
    with pytest.raises(ValueError, match="a share lies between 0 and 1"):
        explain(dataclasses.replace(replayed, result=broken))


def test_every_rate_has_an_interval(tmp_path: Path, capsys: Any) -> None:
    """Over seeds about their mean, which stands beside the rate; over conversations about the rate."""
    flags = ("explain", "--num-requests", 12, "--num-blocks", 40, "--seeds", 3, "--tokenizer", "words")
    assert study(*flags, "--workload", "qa", "--markdown", "--output-dir", tmp_path / "seeds") == 0
    assert "| definition | rate | mean over 3 seeds | numerator |" in capsys.readouterr().out
    record = json.loads((tmp_path / "seeds" / "explain.json").read_text())
    assert record["intervals"] == {"over": "seeds", "seeds": [42, 43, 44]}
    line = record["definitions"]["blocks_full"]
    assert line["low"] < line["mean"] < line["high"] and line["value"] != line["mean"]
    assert study("explain", "--markdown", "--output-dir", tmp_path / "real") == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "real" / "explain.json").read_text())
    assert record["intervals"] == {"over": "conversations"}
    line = record["definitions"]["token_weighted"]
    assert line["low"] < line["value"] < line["high"] and line["mean"] is None
    assert f"{100 * line['value']:.2f} ({100 * line['low']:.2f} to {100 * line['high']:.2f}) %" in printed
    assert study("report", tmp_path / "real", "--markdown") == 0
    shown = capsys.readouterr().out
    assert [row for row in printed.splitlines() if "token_weighted" in row] == [
        row for row in shown.splitlines() if "token_weighted" in row
    ]
