"""How a program ends: a user's mistake, a fault of ours, Ctrl-C, a closed pipe; one line from two ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import INFERENCE, ROOT
from dsatrace import cli, errors
from dsatrace.commands import report
from dsatrace.commands.interrupt import on_interrupt
from dsatrace.errors import DEBUG, UserError, exits_cleanly
from helpers.golden_run import write_golden
from helpers.warm_python import warm_python


def raising(error: BaseException) -> Callable[[], int]:
    @exits_cleanly
    def main() -> int:
        raise error

    return main


def test_a_users_mistake_is_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(UserError("a.txt: is empty; write a line"))() == 2
    assert capsys.readouterr().err == "error: a.txt: is empty; write a line\n"


@pytest.mark.parametrize(
    "error", [KeyError("steps"), RuntimeError("two\nlines"), AssertionError(), OSError(5, "x")]
)
def test_a_fault_of_ours_is_one_line_that_says_how_to_see_more(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error)() == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: unforeseen, {type(error).__name__}")
    assert "test_exits.py:" in line
    assert f"{DEBUG}=1" in line


@pytest.mark.parametrize(("error", "code"), [(KeyError("steps"), 70), (UserError("mine"), 2)])
def test_the_traceback_is_shown_when_asked_for(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(DEBUG, "1")
    assert raising(error)() == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: ")


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt())() == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("words", "code"),
    [("report", 141), ("summarize", 141), ("verify", 141), ("verify --help", 0), ("--help", 141)],
)
def test_a_closed_pipe_is_quiet(words: str, code: int, tmp_path: Path) -> None:
    """The reader is gone before the first line is written."""
    run = write_golden(tmp_path / "run")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "dsatrace", *words.split(), str(run)]
    done = subprocess.run(
        command, cwd=INFERENCE, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=600, check=False
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == code


def test_a_full_disk_behind_stdout_is_one_line(tmp_path: Path) -> None:
    run = write_golden(tmp_path / "run")
    command = [sys.executable, "-m", "dsatrace", "verify", str(run)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=INFERENCE, stdout=full, stderr=subprocess.PIPE, text=True, timeout=600, check=False
        )
    assert done.returncode == 70
    (line,) = done.stderr.splitlines()
    assert "No space left on device" in line


def test_torchrun_gets_the_line_for_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert raising(UserError("mine"))() == 2
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "error: mine"
    with pytest.raises(SystemExit):
        report.main(["--no-such-flag", "run"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--no-such-flag" in said
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == said


@pytest.mark.parametrize(("rank", "is_told", "num_lines"), [(1, True, 0), (1, False, 1), (0, True, 1)])
def test_a_rank_that_was_told_to_end_does_not_say_what_it_lost(
    rank: int,
    is_told: bool,
    num_lines: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(errors, "GRACE_S", 0)
    monkeypatch.setattr(errors, "_TOLD_TO_END", [])
    asked = []

    @exits_cleanly
    def main() -> int:
        with on_interrupt(lambda: asked.append(True)):
            if is_told:
                os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("connection closed by peer")

    assert main() == 70
    assert len(asked) == is_told
    assert len(capsys.readouterr().err.splitlines()) == num_lines


def test_two_ranks_say_a_mistyped_file_once(tmp_path: Path) -> None:
    """Rank 0 looks for the file while rank 1 waits for its word; torchrun's own traceback is not ours."""
    model = tmp_path / "model"
    shutil.copytree(ROOT / "data" / "models" / "needle-2k", model)
    for rank in range(2):
        (model / f"model{rank}-mp2.safetensors").touch()  # never read: the file of rows is looked for first
    flags = ["--dataset", "sharegpt", "--sharegpt-json", "nowhere.json", "--device", "cpu"]
    where = [
        "--ckpt-path",
        str(model),
        "--config",
        str(model / "config.json"),
        "--trace-out",
        str(tmp_path / "r"),
    ]
    with warm_python() as path:
        done = subprocess.run(
            ["torchrun", "--nproc-per-node", "2", str(INFERENCE / "run_dataset.py"), *flags, *where],
            cwd=ROOT,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    said = "error: nowhere.json: cannot read the file"
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        line for line in done.stderr.splitlines() if line.startswith(said)
    ]
    ours, _, torchruns = done.stderr.partition("Traceback (most recent call last)")
    assert ours.count(said) == 1
    assert "inference/dsatrace/" not in torchruns
    assert done.stderr.count("Traceback") == 1  # torchrun's
    assert said in torchruns.splitlines()[-2]  # it is easily found: the last words but one rule


@pytest.mark.parametrize("words", [["verify", "run"], ["warmup"]])
@pytest.mark.parametrize("jobs", ["0", "-2", "many"])
def test_no_processes_are_refused_by_name(
    words: list[str], jobs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--jobs", jobs])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: argument --jobs: ") and jobs in line
