"""`dsatrace summarize` gives back what the live run wrote, at every level, for one run and for several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsatrace.commands.export import main as export
from dsatrace.commands.summarize import main
from dsatrace.errors import UserError
from dsatrace.schema import LEVELS, STEPS_FILE, SUMMARY_FIELDS, problems
from dsatrace.trace import summarize
from dsatrace.trace.overlap import SelectionOverlap
from dsatrace.trace.summarize import summarize_runs
from dsatrace.verify.run import verify
from helpers.golden_run import SERVING, GoldenRequest, write_golden
from test_trace_summary import close


def live(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return record


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("prefill", ["off", "last"])
def test_full_records_give_the_live_summary(tmp_path: Path, rate: float, prefill: str) -> None:
    folder = write_golden(tmp_path / "run", sample_rate=rate, prefill=prefill, seed=3, serving=SERVING)
    expected = live(folder)
    assert expected["needle_recall"]["records"] > 0
    assert expected["counts"]["requests"] == 3
    assert json.dumps(summarize_runs([folder])) == json.dumps(expected)  # the order of keys too
    (folder / "summary.json").unlink()
    assert summarize_runs([folder]) == expected


@pytest.mark.parametrize("level", ["blocks", "stats"])
@pytest.mark.parametrize("block_size", [4, 16, 24])
def test_thin_records_give_it_too(
    tmp_path: Path, level: str, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summarize, "CHUNK_RECORDS", 7)
    folder = write_golden(tmp_path / "run", level=level, block_size=block_size, serving=SERVING)
    expected, recomputed = live(folder), summarize_runs([folder])
    assert list(recomputed) == list(expected)
    for name in expected:
        assert close(recomputed[name], expected[name]), name
    for name in ("histograms", "needle_recall", "scores", "serving"):
        assert recomputed[name] == expected[name]


@pytest.mark.parametrize("level", LEVELS)
def test_an_exported_run_gives_the_same(tmp_path: Path, level: str) -> None:
    folder = write_golden(tmp_path / "run", level=level)
    # A line that its columns would not give back byte for byte is kept as text.
    lines = (folder / STEPS_FILE).read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b'"event":', b'"event" :')
    (folder / STEPS_FILE).write_bytes(b"".join(lines))
    assert export([str(folder), "--to", "parquet", "--out", str(tmp_path / "columns")]) == 0
    assert summarize_runs([tmp_path / "columns"]) == summarize_runs([folder])


def test_thin_records_need_the_stored_summary(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run", level="stats")
    (folder / "summary.json").unlink()
    with pytest.raises(UserError, match=r"no summary.json to take the rest from"):
        summarize_runs([folder])


@pytest.mark.parametrize("level", LEVELS)
def test_runs_merge_by_addition(tmp_path: Path, level: str) -> None:
    folders = [
        write_golden(tmp_path / name, level=level, seed=i, serving=SERVING) for i, name in enumerate("ab")
    ]
    merged = summarize_runs(folders)
    parts = [live(folder) for folder in folders]
    assert problems(merged, "full", SUMMARY_FIELDS) == []
    for name in parts[0]["counts"]:
        assert merged["counts"][name] == sum(part["counts"][name] for part in parts)
    for name, histogram in merged["histograms"].items():
        counts: dict[float, int] = {}
        for part in parts:
            stored = part["histograms"][name]
            for value, count in zip(stored["values"], stored["counts"], strict=True):
                counts[value] = counts.get(value, 0) + count
        assert dict(zip(histogram["values"], histogram["counts"], strict=True)) == counts
    assert merged["offsets"]["max"] == max(part["offsets"]["max"] for part in parts)
    assert sorted(merged["prefix_hot_blocks"]) == ["a/r2", "b/r2"]
    assert merged["prefix_hot_blocks"]["a/r2"] == parts[0]["prefix_hot_blocks"]["r2"]
    recalls = [part["needle_recall"] for part in parts]
    weighted = sum(recall["records"] * recall["mean"] for recall in recalls)
    assert merged["needle_recall"]["records"] == sum(recall["records"] for recall in recalls)
    assert merged["needle_recall"]["mean"] == pytest.approx(weighted / merged["needle_recall"]["records"])
    assert merged["scores"] == {
        "mean": parts[0]["scores"]["mean"],
        "num_scored": 4,
        "by": {
            "length": {"short": {"mean": parts[0]["scores"]["mean"], "num_scored": 4}},
            "task": {
                "task 0": {"mean": 100.0, "num_scored": 2},
                "task 1": {"mean": 100 / 3, "num_scored": 2},
            },
        },
    }
    assert merged["serving"]["latency_ms"] == parts[0]["serving"]["latency_ms"]
    assert merged["serving"]["counts"]["served"] == 6
    assert merged["serving"]["output_tokens_per_s"] == 2 * parts[0]["serving"]["output_tokens_per_s"]
    pairs = [part["step_overlap"]["pairs"] for part in parts]
    weighted = sum(p * part["step_overlap"]["mean"] for p, part in zip(pairs, parts, strict=True))
    assert merged["step_overlap"]["pairs"] == sum(pairs)
    assert merged["step_overlap"]["mean"] == pytest.approx(weighted / sum(pairs))


def test_runs_of_one_name_keep_their_requests_apart(tmp_path: Path) -> None:
    folders = [write_golden(tmp_path / name / "run") for name in ("a", "b")]
    assert len(summarize_runs(folders)["prefix_hot_blocks"]) == 2


def test_runs_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    folders = [write_golden(tmp_path / f"b{size}", block_size=size) for size in (4, 8)]
    with pytest.raises(UserError, match=r"b8: blocks 8, but 4 in .*b4"):
        summarize_runs(folders)
    folders = [write_golden(tmp_path / "batches", serving=SERVING), write_golden(tmp_path / "plain")]
    with pytest.raises(UserError, match=r"serving none, but continuous, virtual clock in .*batches"):
        summarize_runs(folders)


@pytest.mark.parametrize("level", LEVELS)
def test_a_killed_run_is_summarized(tmp_path: Path, level: str) -> None:
    folder = write_golden(tmp_path / "run", state="incomplete", level=level)
    path = folder / STEPS_FILE
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:20]) + lines[20][:50])  # six rows, and two records of the seventh
    notes: list[str] = []
    record = summarize_runs([folder], on_note=notes.append)
    assert record["state"] == "incomplete"
    assert any("line 21: 50 bytes, cut short" in note for note in notes)
    if level == "full":
        assert record["counts"]["records"] == 18
        path.write_bytes(b"".join(lines[:18]))
        assert record == summarize_runs([folder])
    else:
        assert record["counts"]["records"] == 20
        assert any("48 of 20 records" in note for note in notes)


def test_finished_requests_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests a run has, only those that may still get records are kept."""
    requests = [GoldenRequest(f"r{i}", 20 + i % 5, 2 + i // 4) for i in range(40)]
    folder = write_golden(tmp_path / "run", requests)
    kept: list[int] = []
    forget = SelectionOverlap.forget

    def counted(self: SelectionOverlap, request_id: str) -> None:
        forget(self, request_id)
        kept.append(len(self._last))

    monkeypatch.setattr(SelectionOverlap, "forget", counted)
    assert summarize_runs([folder]) == live(folder)
    assert kept == list(range(39, -1, -1))


def test_a_recomputed_summary_is_verified(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run")
    assert main([str(folder), "--out", str(folder / "summary.json")]) == 0
    assert [note.partition(":")[0] for note in verify(folder).notes] == ["unsealed"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_golden(tmp_path / "run")
    assert main([str(folder)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {name: value for name, value in live(folder).items() if name != "histograms"}
    assert main([str(folder), str(folder), "--out", str(tmp_path / "both.json")]) == 0
    assert "96 records of 2 runs" in capsys.readouterr().out
    assert main([str(folder), "--out", str(tmp_path / "none" / "x.json")]) == 2
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
