"""Steps past the answer, where answers were kept from ending: told, or left out (`--steps answer`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsatrace.commands.replay import main
from dsatrace.files import write_json
from dsatrace.schema import MANIFEST_FILE, REQUESTS_FILE
from dsatrace.selection_replay.settings import ReplaySettings, parse_sizes
from dsatrace.selection_replay.work import find_work
from helpers.command_runs import told_error
from helpers.golden_run import GoldenRequest, read_lines, write_golden, write_lines

REQUESTS = [GoldenRequest(f"r{i}", 30 + 5 * i, 9 + i) for i in range(6)]
ANSWERS = {f"r{i}": [3, 20, 5, 1, 7, 4][i] for i in range(6)}
FLAGS = ("--policy", "lru,random,opt", "--sizes", "1k,2k,50%", "--no-figure")


def write_run(folder: Path, requests: list[GoldenRequest] = REQUESTS) -> Path:
    run = write_golden(folder, requests)
    lines = read_lines(run, REQUESTS_FILE)
    for line in lines:
        line["answer_tokens"] = min(ANSWERS[line["request_id"]], line["num_output_tokens"])
    write_lines(run, lines, REQUESTS_FILE)
    manifest = json.loads((run / MANIFEST_FILE).read_bytes())
    write_json(run / MANIFEST_FILE, manifest | {"answer_end": {"min_new_tokens": 0, "ignore_eos": True}})
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("long") / "run")


def replayed(run: Path, out: Path, *flags: str) -> dict[str, Any]:
    assert main([str(run), *FLAGS, "--out", str(out), *flags]) == 0
    record: dict[str, Any] = json.loads((out / "replay.json").read_bytes())
    return record


def test_all_steps_count_unless_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = replayed(run, tmp_path / "all")
    said = " ".join(capsys.readouterr().out.split())
    num_steps = sum(request.num_output_tokens - 1 for request in REQUESTS)
    past = sum(max(0, one.num_output_tokens - 1 - ANSWERS[one.request_id]) for one in REQUESTS)
    assert whole["past_answer"] == {"steps": num_steps, "past": past, "untold": 0}
    assert f"{past} of {num_steps} decode steps lie past the answers, counted with the rest" in said
    assert "`--steps answer` leaves them out" in said
    plain = replayed(write_golden(tmp_path / "plain" / "run", REQUESTS), tmp_path / "plain out")
    assert plain["past_answer"] is None and "past the answers" not in capsys.readouterr().out
    for tree in ("buffers", "locality", "between"):
        assert plain["sums"][tree] == whole["sums"][tree]


def test_without_them_the_replay_is_that_of_the_answers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nulls, OPT and figures of locality too: as of a run that ended there."""
    cut = write_run(tmp_path / "cut" / "run")
    records = [one for one in read_lines(cut) if one["step_idx"] < ANSWERS[one["request_id"]]]
    assert len(records) < len(read_lines(cut))
    write_lines(cut, records)
    of_cut = replayed(cut, tmp_path / "of cut")
    capsys.readouterr()
    answers = replayed(run, tmp_path / "answers", "--steps", "answer", "--jobs", "2")
    for tree in ("buffers", "locality", "between"):
        assert answers["sums"][tree] == of_cut["sums"][tree]
    assert answers["num_requests"] == 5, "an answer of one token has no step after the first set"
    assert "lie past the answers, left out" in " ".join(capsys.readouterr().out.split())


def test_results_with_and_without_them_do_not_add(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other" / "other")
    replayed(run, tmp_path / "a")
    replayed(other, tmp_path / "b", "--steps", "answer")
    merge = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "sum")]
    assert "its settings is" in told_error(capsys, lambda: main(merge))


def test_shards_add_up(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsatrace.trace.selection_parts.MIN_PARTS", 1 << 40)
    monkeypatch.setattr("dsatrace.trace.selection_parts.MIN_PART_BYTES", 1)
    whole = replayed(run, tmp_path / "whole", "--steps", "answer")
    outs = [tmp_path / f"{shard}" for shard in range(2)]
    for shard, out in enumerate(outs):
        replayed(run, out, "--steps", "answer", "--shard", f"{shard}/2")
    assert main(["merge", *map(str, outs), "--no-figure", "--out", str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged" / "replay.json").read_bytes()) == whole


def test_a_part_is_replayed_anew_if_its_answers_end_elsewhere(run: Path, tmp_path: Path) -> None:
    """The step files are the same, but a kept result is of other answers."""
    settings = ReplaySettings(policies=("lru",), sizes=parse_sizes("1k"), steps="answer")
    (before,) = find_work([run], settings)
    other = write_run(tmp_path / "run")
    lines = read_lines(other, REQUESTS_FILE)
    assert [one.key for one in find_work([other], settings)] == [before.key]
    lines[0]["answer_tokens"] += 1
    write_lines(other, lines, REQUESTS_FILE)
    assert [one.key for one in find_work([other], settings)] != [before.key]


def test_a_request_that_did_not_end_tells_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    lines = [line for line in read_lines(run, REQUESTS_FILE) if line["request_id"] != "r4"]
    write_lines(run, lines, REQUESTS_FILE)
    record = replayed(run, tmp_path / "all")
    assert record["past_answer"]["untold"] == REQUESTS[4].num_output_tokens - 1
    assert "more nothing says whether they do" in " ".join(capsys.readouterr().out.split())
    flags = [*FLAGS, "--steps", "answer", "--out", str(tmp_path / "out")]
    assert "request r4 did not end" in told_error(capsys, lambda: main([str(run), *flags]))


def test_a_run_that_ended_its_answers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_golden(tmp_path / "run", REQUESTS)
    flags = [*FLAGS, "--steps", "answer", "--out", str(tmp_path / "out")]
    said = told_error(capsys, lambda: main([str(run), *flags]))
    assert "--steps answer: nothing kept its answers from ending" in said
