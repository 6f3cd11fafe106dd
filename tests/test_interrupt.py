"""Signals outside and inside of the serving loop: how a command ends, and that no half-written file stays."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from dsatrace.commands.interrupt import ends_by_signal, on_ending, on_interrupt
from dsatrace.errors import exits_cleanly
from dsatrace.schema import MANIFEST_FILE, STEPS_FILE, SUMMARY_FILE
from dsatrace.trace.reader import RunReader
from helpers.forked import call, run_script
from helpers.waiting import LIMIT_S, until

ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
SLOW = """
import sys, time
from pathlib import Path
import numpy as np
from dsatrace.commands.interrupt import ends_by_signal
from dsatrace.errors import exits_cleanly
from dsatrace.trace.resume import prepare_resume
from helpers import resume_samples

folder, slow_file, resumes = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume"
if resumes:
    resume_samples.serve(folder, stop_at=6)
replace, seen = Path.replace, []

def replaced(path, target):
    seen.append(path.name)
    is_last = slow_file != "manifest.json" or seen.count(path.name) == 2
    if target.name == slow_file and is_last:
        print("slow", flush=True)
        while not Path(f"{folder}.go").exists():
            time.sleep(0.01)
    return replace(path, target)

@exits_cleanly
@ends_by_signal
def main():
    Path.replace = replaced
    (resume_samples.resume if resumes else resume_samples.serve)(folder)

sys.exit(main())
"""


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("slow_file", "how"), [(MANIFEST_FILE, "start"), (SUMMARY_FILE, "start"), (STEPS_FILE, "resume")]
)
def test_no_temporary_file_stays(slow_file: str, how: str, number: signal.Signals, tmp_path: Path) -> None:
    """The signal comes while a file is being replaced, by the main thread or the writer's."""
    folder, script, out, err = (tmp_path / name for name in ("run", "slow.py", "out", "err"))
    script.write_text(SLOW)
    out.touch()
    argv = [str(script), str(folder), slow_file, how]
    process = call(run_script, tmp_path, argv, (Path(os.devnull), out, err))
    until(lambda: out.read_text() == "slow\n" or process.exitcode is not None)
    assert process.exitcode is None, err.read_text()
    assert (folder / f".{slow_file}.tmp").exists()
    os.kill(process.pid, number)
    time.sleep(0.2)  # it is handled meanwhile
    (tmp_path / "run.go").touch()
    process.join(LIMIT_S)
    assert (process.exitcode, err.read_text()) == (130, "interrupted\n")
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert RunReader(folder).state == "incomplete"


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_a_command_ends_as_by_ctrl_c(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    @exits_cleanly
    @ends_by_signal
    def main() -> int:
        signal.raise_signal(number)
        time.sleep(10)
        return 0

    before = signal.getsignal(number)
    assert main() == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_only_asked_inside(number: signal.Signals) -> None:
    asked: list[int] = []
    with on_interrupt(lambda: asked.append(1)):
        signal.raise_signal(number)
    assert asked == [1]


def test_another_rank_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun ends it by SIGTERM, also where it waits for the others and no Python runs."""
    monkeypatch.setenv("RANK", "1")
    handler = ends_by_signal(lambda: signal.getsignal(signal.SIGTERM))()
    assert handler is signal.getsignal(signal.SIGTERM)


def test_nohup_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_ending(lambda: pytest.fail("heard")):
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
