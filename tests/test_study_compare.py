"""Single turn beside multi turn: the same conversations, every metric, points and ratios."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from dsatrace.report.grid import Grid
from dsatrace.report.study_figures import draw_comparison
from dsatrace.report.study_tables import compare_grids, run_grids, shown
from dsatrace.study.compare import Difference, compare
from dsatrace.study.measure import measure
from dsatrace.study.metrics import UNITS
from dsatrace.study.prepare import ClientSettings
from dsatrace.study.results import statistics
from dsatrace.study.run import StudySettings, run_study
from dsatrace.study.sources import Client, Source
from dsatrace.study.tokenization import open_vocabulary
from helpers.study_samples import ROWS, requests_of, three_turns

SETTINGS = StudySettings(block_size=4)


def test_three_turns_against_the_first() -> None:
    multi = three_turns()
    compared = compare(run_study(multi.take(np.array([0])), SETTINGS), run_study(multi, SETTINGS))
    rate = compared.metrics["hit_rate_first_prefill"]
    assert (rate.single, rate.multi, rate.points, rate.ratio) == (0, 0.6, pytest.approx(60), None)
    blocks = compared.metrics["blocks_allocated"]
    assert (blocks.single, blocks.multi, blocks.difference, blocks.ratio) == (3, 7, 4, 7 / 3)
    assert blocks.points is None  # no share
    assert [row["turn"] for row in compared.per_turn["single_turn"]] == [0]
    assert [row["turn"] for row in compared.per_turn["multi_turn"]] == [0, 1, 2]
    assert compared.rejected["single_turn"] == {"output_cut": 0, "prompt_too_long": 0, "request_too_long": 0}


@settings(deadline=None)  # the first call loads compiled code
@given(ROWS, ROWS)
def test_every_metric_is_in_both(one: Any, other: Any) -> None:
    settings = StudySettings(block_size=2, num_blocks=9, host_blocks=4)
    single, multi = (run_study(requests_of(rows), settings) for rows in (one, other))
    compared = compare(single, multi)
    assert set(compared.metrics) == set(UNITS)
    assert {name: both.single for name, both in compared.metrics.items()} == measure(single)
    assert {name: both.multi for name, both in compared.metrics.items()} == measure(multi)
    json.dumps(compared.record(), allow_nan=False)


def test_missing_values_make_no_numbers() -> None:
    nothing = Difference("hit_rate_blocks", None, 0.5)
    assert (nothing.difference, nothing.points, nothing.ratio) == (None, None, None)
    assert Difference("hit_rate_blocks", 0.5, None).ratio is None


def test_different_caches_are_not_compared() -> None:
    requests = three_turns()
    with pytest.raises(ValueError, match="differ in their settings"):
        compare(run_study(requests, SETTINGS), run_study(requests, StudySettings(block_size=2)))


def test_both_traces_are_of_the_same_conversations() -> None:
    """Of the embedded sample: those of two turns or more; single-turn has each one's first prompt."""
    client = Client(Source(), ClientSettings(min_turns=2), open_vocabulary("words"))
    single, multi = client.requests("single_turn"), client.requests("multi_turn")
    turns = Counter(multi.conversation_ids[i] for i in multi.conversation)
    assert Counter(single.conversation_ids[i] for i in single.conversation) == dict.fromkeys(turns, 1)
    assert min(turns.values()) == 2
    first = {request.conversation: request for request in multi if request.turn == 0}
    for request in single:
        twin = first[multi.conversation_ids.index(single.conversation_ids[request.conversation])]
        assert request.prompt_ids.tolist() == twin.prompt_ids.tolist()
        assert request.arrival_s == twin.arrival_s
    compared = compare(run_study(single, SETTINGS), run_study(multi, SETTINGS))
    multi_rate, single_rate = (
        getattr(compared.metrics["hit_rate_first_prefill"], s) for s in ("multi", "single")
    )
    assert multi_rate > 0.5 > single_rate


def test_tables_show_every_headline_and_rejections() -> None:
    multi = three_turns()
    both = run_study(multi.take(np.array([0])), SETTINGS), run_study(multi, SETTINGS)
    text = "\n".join(grid.markdown() for grid in compare_grids(compare(*both), dataclasses.asdict(SETTINGS)))
    assert "| hit_rate_first_prefill | 0.00 % | 60.00 % | +60.00 points | - |" in text
    assert "| blocks_allocated | 3 | 7 | +4 | 2.33 x |" in text
    assert "| multi_turn | 0 | 0 | 0 |" in text
    assert "| 2 | 1 | 4 | 5 | 80.00 % | 100.00 % | 80.00 % | 80.00 % |" in text
    text = "\n".join(grid.markdown() for grid in run_grids("multi_turn", statistics(both[1])))
    assert "| block_reuse_rate | 46.15 % |" in text
    assert "no limit of 4 tokens, 1 live, in_order" in text


def test_a_trace_cannot_break_a_table() -> None:
    grid = Grid("t", ("a", "b"), [("x|y\nz", "[bold]1")])
    assert grid.markdown().splitlines()[-1] == r"| x\|y\nz | [bold]1 |"
    assert shown("hit_gap_s_mean", None) == "-"
    assert shown("hit_gap_s_mean", 1234.5) == "1,234.50 s"


def test_a_comparison_without_hits_can_be_drawn(tmp_path: Any) -> None:
    nothing = run_study(requests_of([([1], [], "")]), SETTINGS)
    draw_comparison(tmp_path / "comparison.png", "nothing", compare(nothing, nothing))
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
