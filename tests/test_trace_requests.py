"""What requests.jsonl adds up to: by hand, the fast way as the plain one, and in parts as in the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.schema import REQUESTS_FILE, SUMMARY_FIELDS, SUMMARY_FILE, Field, problems
from dsatrace.trace.manifest import RunInfo
from dsatrace.trace.reader import RunReader
from dsatrace.trace.request_facts import RequestFacts
from dsatrace.trace.request_totals import RequestTotals
from dsatrace.trace.summarize import summarize_runs
from dsatrace.trace.tracer import Tracer
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.requests import PlainRequests
from dsatrace.verify.run import verify
from helpers.golden_run import SERVING, read_lines, write_lines
from helpers.power import examples
from helpers.trace_samples import LAYOUT, SECRET, SampleRequest, config_for

SERVING_FIELDS: tuple[Field, ...] = next(f for f in SUMMARY_FIELDS if f.name == "serving").children


def line(state: str = "stop", num_output_tokens: int = 3, **changes: Any) -> dict[str, Any]:
    fields = {"request_id": "r", "arrival_s": 0.0, "score": None, "labels": {}, "num_preemptions": 0}
    times = dict.fromkeys(("admitted_s", "first_token_s", "finish_s"))
    return fields | times | {"state": state, "num_output_tokens": num_output_tokens} | changes


def added(lines: list[dict[str, Any]], serving: Any = SERVING) -> RequestTotals:
    totals = RequestTotals(serving)
    for one in lines:
        totals.add(one)
    return totals


def said(totals: RequestTotals) -> dict[str, Any]:
    fields, histograms = totals.to_json()
    return fields | histograms


def plain(lines: list[dict[str, Any]], serving: Any = SERVING) -> dict[str, Any]:
    totals = PlainRequests(serving)
    for one in lines:
        totals.add(one)
    return totals.to_json() | totals.histograms()


def test_serving_by_hand() -> None:
    served = [
        line(arrival_s=1.0, admitted_s=1.5, first_token_s=2.0, finish_s=4.0, num_output_tokens=5),
        line("length", 1, arrival_s=130.5, admitted_s=130.5, first_token_s=131.0, finish_s=131.0),
    ]
    lost = [
        line("rejected", 0, arrival_s=2.0),
        line("aborted", 2, arrival_s=3.0, admitted_s=3.1, first_token_s=3.5, finish_s=3.6, num_preemptions=2),
        line("unfinished", 0, arrival_s=3.5),
    ]
    serving = said(added(served + lost))["serving"]
    assert problems(serving, "full", SERVING_FIELDS) == []
    assert (serving["mode"], serving["clock"]) == ("continuous", "virtual")
    assert serving["counts"] == {"served": 2, "rejected": 1, "aborted": 1, "unfinished": 1, "preemptions": 2}
    assert serving["latency_ms"] == {"p50": 500.0, "p95": 3000.0, "p99": 3000.0, "max": 3000.0, "mean": 1750}
    assert serving["time_to_first_token_ms"]["max"] == 1000.0
    assert serving["time_per_output_token_ms"]["mean"] == 500.0  # the second request has no second token
    assert (serving["queue_ms"]["p50"], serving["queue_ms"]["max"]) == (0.0, 500.0)
    assert (serving["span_s"], serving["requests_per_s"]) == (130.0, 2 / 130)
    assert serving["output_tokens_per_s"] == 6 / 130
    buckets = serving["requests_over_time"]
    assert [bucket["start_s"] for bucket in buckets] == list(range(0, 132, 4))  # 64 of 2 seconds fall short
    assert (buckets[0]["arrived"], buckets[0]["finished"]) == (4, 0)
    assert (buckets[1]["arrived"], buckets[1]["finished"]) == (0, 1)
    assert (buckets[-1]["arrived"], buckets[-1]["finished"]) == (1, 1)


def test_lost_requests_are_counted_where_there_are_any() -> None:
    lines = [line("failed"), line("stop", num_recomputes=2), line("failed", num_recomputes=1)]
    counts = {"served": 1, "rejected": 0, "aborted": 0, "unfinished": 0, "preemptions": 0}
    whole = said(added(lines, SERVING))["serving"]["counts"]
    assert whole == plain(lines, SERVING)["serving"]["counts"] == counts | {"failed": 2, "recomputes": 3}
    none = [line("stop", num_recomputes=0)]
    assert said(added(none, SERVING))["serving"]["counts"] == counts


def test_scores_by_hand() -> None:
    lines = [
        line(score=100.0, labels={"task": "vt", "length": "4096"}),
        line(score=25.0, labels={"task": "cwe", "length": "4096"}),
        line(score=0.0, labels={"task": "vt"}),
        line("rejected", score=None, labels={"task": "fwe"}),
    ]
    assert said(added(lines, None))["scores"] == {
        "mean": 125 / 3,
        "num_scored": 3,
        "by": {
            "length": {"4096": {"mean": 62.5, "num_scored": 2}},
            "task": {"cwe": {"mean": 25.0, "num_scored": 1}, "vt": {"mean": 50.0, "num_scored": 2}},
        },
    }
    assert said(added([line()], None)) == {"scores": None, "serving": None, "prefix_cache": None}


@st.composite
def request_lines(draw: st.DrawFn) -> dict[str, Any]:
    """Any line that can be written, as JSON gives it back."""
    state = draw(st.sampled_from(["stop", "length", "rejected", "aborted", "unfinished", "failed"]))
    num_times = 4 if state in ("stop", "length") else draw(st.integers(1, 4))
    gaps = draw(st.lists(st.floats(0, 1000), min_size=num_times, max_size=num_times))
    times = [sum(gaps[: i + 1]) for i in range(num_times)] + [None] * (4 - num_times)
    names = ("arrival_s", "admitted_s", "first_token_s", "finish_s")
    changes: dict[str, Any] = dict(zip(names, times, strict=True))
    if draw(st.booleans()):
        changes["score"] = draw(st.floats(0, 100))
        changes["labels"] = draw(st.dictionaries(st.sampled_from("ab"), st.sampled_from("xy")))
    one = line(state, draw(st.integers(1, 9)), num_preemptions=draw(st.integers(0, 2)), **changes)
    if draw(st.booleans()):  # with tiers
        one["num_recomputes"] = draw(st.integers(0, 2))
    if draw(st.booleans()):  # with a prefix cache
        hit = draw(st.none() | st.integers(0, 9))
        one |= {"num_prompt_tokens": draw(st.integers(10, 20)), "prefix_hit_tokens": hit}
        one |= {"num_prefill_tokens": draw(st.integers(0, 20)), "prefill_s": draw(st.floats(0, 100))}
    if draw(st.booleans()):  # as a run wrote it before there was more
        for name in ("admitted_s", "num_preemptions", "labels"):
            del one[name]
    parsed: dict[str, Any] = json.loads(json.dumps(one))
    return parsed


@settings(max_examples=examples(75), deadline=None)
@given(lines=st.lists(request_lines(), max_size=20), cut=st.integers(0, 20), with_serving=st.booleans())
def test_fast_equals_plain_and_the_sum_of_its_parts(
    lines: list[dict[str, Any]], cut: int, with_serving: bool
) -> None:
    serving = SERVING if with_serving else None
    whole = said(added(lines, serving))
    assert json.dumps(whole) == json.dumps(plain(lines, serving))  # bit for bit, the order of keys too
    if whole["serving"] is not None:
        assert problems(whole["serving"], "full", SERVING_FIELDS) == []
        assert len(whole["serving"]["requests_over_time"]) <= 64
    tail = added(lines[cut:], serving)
    tail.merge(added(lines[:cut], serving))
    assert said(tail) == whole


def serve_without_steps(folder: Path, **changes: Any) -> None:
    """Three requests of a simulator: no model, so no step is recorded."""
    run = RunInfo(
        model_config={}, layouts=(LAYOUT,), device="none", selections="none", serving=SERVING, **changes
    )
    with Tracer(config_for(folder, prefill="last"), run, secret=SECRET) as tracer:
        tracer.describe_workload({"name": "demo", "counts": {"rows": 2}})
        for i in range(3):
            request = SampleRequest(f"r{i}", [7] * 40, arrival_s=float(i), needle_positions=(4, 3, 4))
            assert not tracer.add_request(request).hit
            assert not tracer.wants(i)
        tracer.finish_request(
            request,
            RequestFacts(num_output_tokens=0, state="rejected", error="needs 9 blocks, the pool has 8"),
        )
        tracer.finish_request(
            SampleRequest("r0", [7] * 40),
            RequestFacts(
                num_output_tokens=300, state="stop", admitted_s=0.5, first_token_s=1.0, finish_s=2.5
            ),
        )
        tracer.describe_workload({"name": "demo", "counts": {"rows": 3}})


def test_a_run_without_steps_verifies_and_summarizes(tmp_path: Path) -> None:
    serve_without_steps(tmp_path)
    run = RunReader(tmp_path)
    assert run.manifest["trace"]["sample_rate"] == 0
    assert run.manifest["serving"] == SERVING
    rejected, served, unfinished = run.requests()
    assert rejected["error"] == "needs 9 blocks, the pool has 8"
    assert rejected["needle_positions"] == [3, 4]
    assert "error" not in served
    assert unfinished["state"] == "unfinished"
    result = verify(tmp_path)
    assert (result.num_records, result.num_requests, result.notes) == (0, 3, ())
    summary = run.summary()
    assert summary["workload"] == {"name": "demo", "counts": {"rows": 3}}  # the last word
    assert summary["serving"]["latency_ms"]["max"] == 2500.0
    assert summarize_runs([tmp_path]) == summary | {"tracing_cost": None}


def test_a_record_of_a_run_without_a_model_is_found(tmp_path: Path) -> None:
    serve_without_steps(tmp_path)
    write_lines(tmp_path, [{"event": "dsa_topk"}])
    with pytest.raises(Mismatch):
        verify(tmp_path)


def test_a_workload_stays_as_the_run_said_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        serve_without_steps(tmp_path / name)
    assert summarize_runs([tmp_path / "a", tmp_path / "b"])["workload"]["name"] == "demo"
    path = tmp_path / "b" / SUMMARY_FILE
    path.write_text(path.read_text().replace('"rows":3', '"rows":4'))
    with pytest.raises(Mismatch, match=r"^summary\.json: sha256: "):  # the workload's own word, but sealed
        verify(tmp_path / "b")
    assert summarize_runs([tmp_path / "b"])["workload"]["counts"] == {"rows": 4}
    assert summarize_runs([tmp_path / "a", tmp_path / "b"])["workload"] is None


def test_an_edited_latency_is_found(tmp_path: Path) -> None:
    serve_without_steps(tmp_path)
    lines = read_lines(tmp_path, REQUESTS_FILE)
    lines[1]["finish_s"] = 2.6
    write_lines(tmp_path, lines, REQUESTS_FILE)
    with pytest.raises(Mismatch, match=r"summary\.json: serving\.latency_ms"):
        verify(tmp_path)


@pytest.mark.parametrize("serving", [{}, {"mode": "batch"}, {"mode": "batch", "clock": "sun dial"}])
def test_a_serving_without_mode_and_clock_is_refused(tmp_path: Path, serving: Any) -> None:
    with pytest.raises(ValueError, match="name a mode, and a clock of real, virtual"):
        RunInfo(model_config={}, layouts=(LAYOUT,), device="none", serving=serving)
