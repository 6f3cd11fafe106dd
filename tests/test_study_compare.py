"""Single turn beside multi turn: the same conversations, every metric, points and ratios."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from matplotlib.figure import Figure

from dsatrace.report import study_figures
from dsatrace.report.grid import Grid
from dsatrace.report.study_figures import draw_comparison
from dsatrace.report.study_tables import HEADLINES, about_text, compare_grids, run_grids, shown, sweep_grids
from dsatrace.study.compare import Comparison, Difference, compare, over_all_conversations, over_all_seeds
from dsatrace.study.measure import measure
from dsatrace.study.metrics import UNITS
from dsatrace.study.prepare import ClientSettings
from dsatrace.study.results import statistics
from dsatrace.study.run import Replayed, StudySettings, run_study
from dsatrace.study.sources import Client, Source
from dsatrace.study.sweep_cells import Cell
from dsatrace.study.tokenization import open_vocabulary
from helpers.study_samples import ROWS, requests_of, three_turns

SETTINGS = StudySettings(block_size=4)
SEEDS = {"over": "seeds", "seeds": [*range(8)]}


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


def generated(seed: int, num_requests: int = 24) -> Client:
    settings = ClientSettings(num_requests=num_requests, min_turns=2, seed=seed)
    return Client(Source(workloads=("chat_multi",)), settings, open_vocabulary("words"))


@pytest.fixture(scope="module")
def of_seeds() -> list[dict[str, Replayed]]:
    """Both traces of four seeds, in a small cache."""
    cache = StudySettings(num_blocks=200)
    clients = [generated(seed) for seed in range(4)]
    modes = ("single_turn", "multi_turn")
    return [{mode: run_study(one.requests(mode), cache) for mode in modes} for one in clients]


def test_intervals_over_seeds_are_of_the_means_and_paired(of_seeds: list[dict[str, Replayed]]) -> None:
    each = [compare(**both) for both in of_seeds]
    compared = over_all_seeds(each, range(4))
    name = "hit_rate_first_prefill"
    rates = [one.metrics[name].multi for one in each]
    mean, low, high = compared.ranged(name, "multi_turn")
    assert mean == pytest.approx(np.mean(rates))
    half = 3.182 * np.std(rates, ddof=1) / 2  # Student's t of three degrees of freedom, over the root of four
    assert (low, high) == pytest.approx((mean - half, mean + half))
    assert compared.metrics == each[0].metrics  # the first seed's stay what they were
    same = over_all_seeds([dataclasses.replace(one, metrics=_same(one)) for one in each], range(4))
    assert same.ranged(name, "difference") == (0, 0, 0)  # what moves both sides is not in their difference
    assert compared.intervals["hit_rate_by_turn"]["multi_turn"]["1"]["low"] >= 0
    text = next(iter(compare_grids(compared, dataclasses.asdict(SETTINGS)))).markdown()
    assert "over 4 seeds with 95 % intervals" in text
    assert f"{100 * mean:.2f} ± {100 * half:.2f} %" in text
    assert json.loads(json.dumps(compared.record()))["intervals"]["seeds"] == [0, 1, 2, 3]
    assert over_all_seeds(each[:1], range(1)).ranged(name, "multi_turn") == (rates[0], None, None)


def _same(compared: Comparison) -> dict[str, Difference]:
    return {name: Difference(name, both.multi, both.multi) for name, both in compared.metrics.items()}


def test_conversations_are_drawn_alike_for_both_traces(of_seeds: list[dict[str, Replayed]]) -> None:
    both = of_seeds[0]
    twice = dict.fromkeys(both, both["multi_turn"])
    same = over_all_conversations(compare(**twice), **twice)
    assert same.ranged("hit_rate_blocks", "difference") == (0, 0, 0)
    compared, again = (over_all_conversations(compare(**both), **both) for _ in range(2))
    assert compared.intervals == again.intervals
    for side in ("multi_turn", "difference"):
        rate, low, high = compared.ranged("hit_rate_first_prefill", side)
        assert low < rate < high < low + 0.5
    low, high = compared.intervals["hit_rate_by_turn"]["multi_turn"]["1"].values()
    assert low <= compared.per_turn["multi_turn"][1]["hit_rate_first_prefill"] <= high
    one = {mode: run_study(generated(7, 3).requests(mode).take(np.array([0])), SETTINGS) for mode in both}
    assert not over_all_conversations(compare(**one), **one).intervals["metrics"]["difference"]


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Any, *given: Any) -> Any:
    """The figure that a function draws."""
    kept = []

    @contextlib.contextmanager
    def keep(path: Path, size: Any, *, columns: int = 1, share_y: bool = False) -> Iterator[Any]:
        figure = Figure(figsize=size)
        kept.append(figure)
        yield figure, list(figure.subplots(1, columns, squeeze=False, sharey=share_y).flat)

    monkeypatch.setattr(study_figures, "_picture", keep)
    draw(Path("none.png"), *given)
    return kept[0]


def test_a_comparison_shows_its_intervals(
    of_seeds: list[dict[str, Replayed]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = over_all_seeds([compare(**both) for both in of_seeds], range(4))
    bars, turns = drawn(monkeypatch, draw_comparison, "about", compared).axes
    mean, low, high = compared.ranged("hit_rate_first_prefill", "multi_turn")
    (lines,) = bars.containers[-1].errorbar.lines[2]
    assert lines.get_segments()[1][:, 1].tolist() == pytest.approx([low, high])
    assert bars.containers[-1].patches[1].get_height() == pytest.approx(mean)
    assert len(turns.collections) > 0
    bars, turns = drawn(monkeypatch, draw_comparison, "about", compare(**of_seeds[0])).axes
    assert all(one.errorbar is None for one in bars.containers) and not turns.collections


def cell(size: int, capacity: int, policy: str) -> Cell:
    hits = 30 if capacity == 64 else 50
    counts = (9, 0, 100, hits, 100 - hits, hits, 0, 0)
    return Cell("qa", size, capacity, policy, *counts, hits / 100 - 0.05, hits / 100 + 0.07)


def test_pictures_of_sweeps_say_what_they_are_of_and_show_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    about = about_text("synthetic qa", {"tokenizer": {"name": "mine"}, "times": "assumed"}, intervals=SEEDS)
    assert about.splitlines()[1] == "tokens: mine; times are assumed; over 8 seeds with 95 % intervals"
    policies = ("lru", "opt", "vllm")
    cells = [cell(*place) for place in itertools.product((16, 32), (64, 128), policies)]
    figure = drawn(monkeypatch, study_figures.draw_capacities, about, "qa", "lru", cells)
    begin = "qa under lru, blocks of 16, 32 tokens, 64 to 128 blocks\nsynthetic qa\ntokens: mine;"
    assert figure.get_suptitle().startswith(begin)
    (band, _), top = figure.axes[0].collections, figure.axes[0].get_ylim()[1]
    ends = band.get_paths()[0].vertices[:, 1]
    assert (ends.min(), ends.max()) == pytest.approx((0.25, 0.57)) and top > 0.57
    here = [cell(16, 128, policy) for policy in policies]
    figure = drawn(monkeypatch, study_figures.draw_mixed, about, here)
    assert "128 blocks of 16 tokens" in figure.get_suptitle()
    assert "synthetic qa\n" in figure.get_suptitle() and "tokens: mine;" in figure.get_suptitle()
    (lines,) = figure.axes[0].containers[-1].errorbar.lines[2]
    assert lines.get_segments()[0][:, 0].tolist() == pytest.approx([0.45, 0.57])


def test_gaps_tell_minimum_median_mean_and_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, study_figures.draw_gaps, "about", {"qa": np.array([5.0, 1, 2, 1200])})
    (text,) = figure.legends[0].get_texts()
    assert text.get_text() == "qa: 4 gaps, mean 302, min 1, median 2, max 1,200"
    for family in ("reuse_gap_s", "hit_gap_s"):
        assert {f"{family}_{name}" for name in ("min", "median", "mean", "max")} <= set(HEADLINES)


def test_a_sweep_tells_gains_with_their_interval() -> None:
    lru, other = cell(16, 64, "lru"), cell(16, 64, "s3-fifo")
    other = dataclasses.replace(other, gain=0.0312, gain_low=0.0212, gain_high=0.0412)
    cells = [lru, other, cell(16, 64, "opt")]
    rates, gains = sweep_grids(cells)
    assert rates.title == "qa, blocks of 16 tokens: hit rate in % of prompt blocks"
    assert (gains.title, gains.rows) == (
        "qa, blocks of 16 tokens: gain over lru in points", [("s3-fifo", "+3.12 ± 1.00")],
    )  # fmt: skip
    assert len([*sweep_grids([lru, cell(16, 64, "opt")])]) == 1
