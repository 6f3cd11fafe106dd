"""`dsatrace check` says what a capture or a run really is, and exits 1 where that is not what it claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsatrace import cli
from dsatrace.commands import progress
from dsatrace.errors import UserError
from dsatrace.trace.reader import RunReader
from dsatrace.verify.files import PlainRun
from helpers.captured import as_slots, position_rows, random_slots, response, write_responses
from helpers.golden_run import write_golden
from helpers.imports import imported
from helpers.kind_runs import KINDS, write_kind

FLAGS = ["--format", "sglang", "--layers", "2", "--top-k", "8"]


def checked(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["check", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def ids() -> np.ndarray:
    return position_rows(np.random.default_rng(0), 60)


def test_a_sound_capture(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    path = write_responses(tmp_path / "a.jsonl", response(ids, 5))
    code, out, err = checked(capsys, path, *FLAGS)
    assert (code, err) == (0, "")
    assert "decode rows: 55, positions (3 rows within top-k prove it)" in out
    assert "step overlap past top-k: " in out
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]


def test_captures_that_are_bad(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    stale = ids.copy()
    stale[30, 0, 0] = 55
    path = tmp_path / "a.jsonl"
    for changed, said in (
        (np.zeros_like(ids), "none of its 60 rows was captured"),
        (ids[:8], "sparse attention was never active"),
        (stale, "row of position 30, layer 0: id 55 lies beyond the 31"),
    ):
        write_responses(path, response(changed, 5))
        code, _, err = checked(capsys, path, *FLAGS)
        assert code == 1
        assert err.startswith(f"bad: {path}: ")
        assert said in err


def test_layers_that_are_equal_are_told(tmp_path: Path, capsys: Any) -> None:
    ids = position_rows(np.random.default_rng(0), 60, num_sets=3)
    ids[:, 1] = ids[:, 0]
    path = write_responses(tmp_path / "a.jsonl", response(ids, 5))
    code, out, _ = checked(capsys, path, "--format", "sglang", "--layers", "4,6,7", "--top-k", 8)
    assert code == 0
    assert "layers equal to the one before them in every row: 6=4\n" in out


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("block", "uneven layers")])
def test_runs_of_other_doors(tmp_path: Path, name: str, capsys: Any) -> None:
    code, out, _ = checked(capsys, write_kind(tmp_path / "run", name))
    assert f"door {KINDS[name].door}, {KINDS[name].unit} ids" in out
    assert code == 0, out


def test_the_engines_own_run(tmp_path: Path, capsys: Any) -> None:
    folder = write_golden(tmp_path / "run")
    code, out, err = checked(capsys, folder)
    assert (code, err) == (0, "")
    records = [record for record in RunReader(folder).steps() if record["kth_margin"] is not None]
    ties = sum(record["kth_margin"] == 0 for record in records)
    assert f"ties at the k-th score: {ties:,} of {len(records):,} records" in out
    assert f"sparse attention was active in {len(records):,} of them" in out


def test_runs_that_are_bad(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    path = write_responses(tmp_path / "a.jsonl", response(ids[:8], 5))
    run = imported(tmp_path, path, *FLAGS, "--allow-inactive")
    code, _, err = checked(capsys, run)
    assert code == 1
    assert "sparse attention was never active: no row chooses from more than 8 ids" in err
    slots = as_slots(ids, random_slots(np.random.default_rng(0), 60) + 60)
    run = imported(tmp_path, write_responses(path, response(slots, 5)), *FLAGS)
    assert checked(capsys, run)[0] == 0
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["selection"]["id_kind"] = "position"
    steps = (run / "trace_steps.jsonl").read_text()
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "trace_steps.jsonl").write_text(
        "".join(
            json.dumps({**record, "selected_token_pos": record.pop("selected_ids")}) + "\n"
            for record in map(json.loads, steps.splitlines())
        )
    )
    code, _, err = checked(capsys, run)
    assert code == 1
    assert "55 decode rows are no positions, the first of request" in err
    manifest["selection"]["layers"] = [{**layer, "top_k": 4} for layer in manifest["selection"]["layers"]]
    (run / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = checked(capsys, run)
    assert code == 2
    assert "a record of 6 ids, and top-k is 4; see `dsatrace verify`" in err


def test_what_is_neither(tmp_path: Path, capsys: Any) -> None:
    code, _, err = checked(capsys, tmp_path)
    assert code == 2
    assert "is this a run's folder?" in err
    file = tmp_path / "a"
    file.write_bytes(b"")
    assert "--format is missing" in checked(capsys, file)[2]
    assert "check runs and captures apart" in checked(capsys, file, tmp_path)[2]
    assert "a folder; with --format name the files in it" in checked(capsys, tmp_path, "--format", "npy")[2]


def test_what_stands_in_the_place_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"")
    for name in ("runs/mine/requests.jsonl", "replayed/replay.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    for name, said in (
        ("a.npz", "a file, where a run's folder belongs"),
        ("replayed", "a replay's folder, not a run's"),
        ("runs", "it holds runs, such as mine"),
        ("none", "cannot read it: No such file or directory"),
    ):
        for reader in (RunReader, PlainRun):
            with pytest.raises(UserError, match=said):
                reader(tmp_path / name)


def test_requests_are_told_off_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0)
    for total in (8, None):
        with progress.requests_bar(total, lambda: "1 running") as advance:
            advance(1)
    said = ["requests: 1 of 8 ended, 1 running", "requests: 1 ended, 1 running"]
    assert capsys.readouterr().err.splitlines() == said


def test_what_is_read_and_left_is_said(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    with progress.amount_bar("check", 3 << 20) as advance:
        advance(1 << 20)
        advance(2 << 20)
    assert capsys.readouterr().err.splitlines() == [
        "check: 1.0 MiB read, 2.0 MiB left",
        "check: 3.0 MiB read, 0.0 KiB left",
    ]
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 30.0)
    for size in (1 << 20, 2 << 30):
        with progress.amount_bar("look through", size) as advance:
            advance(0)
            advance(1)
    assert capsys.readouterr().err.splitlines() == ["look through: 0.0 KiB read, 2.0 GiB left"]
