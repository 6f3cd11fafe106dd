"""A pool of processes: results as they are done, mistakes as they were raised, and nobody left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from conftest import INFERENCE, ROOT
from dsatrace.errors import UserError
from dsatrace.processes import call_in_processes, in_order
from helpers.called import after, refuse
from helpers.waiting import until


def test_results_come_as_they_are_done() -> None:
    found = list(call_in_processes(after, [3.0, 0.0], jobs=2))
    assert sorted(found) == [(0, 3.0), (1, 0.0)]
    assert list(in_order(found)) == [3.0, 0.0]


def test_one_job_stays_in_this_process() -> None:
    found = list(call_in_processes(lambda number: (number, os.getpid()), [1, 2], jobs=1))
    assert found == [(0, (1, os.getpid())), (1, (2, os.getpid()))]
    assert list(call_in_processes(after, [], jobs=2)) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_mistake_is_told_as_it_was(jobs: int) -> None:
    with pytest.raises(UserError, match=r"^[12]: is no number to use$"):
        list(call_in_processes(refuse, [1, 2], jobs))


def test_a_killed_process_is_said_to_be() -> None:
    with pytest.raises(UserError, match="a process of --jobs was killed"):
        list(call_in_processes(os._exit, [9, 9], jobs=2))


def test_processes_end_with_the_one_that_was_killed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    program = (
        "from dsatrace.processes import call_in_processes; from helpers.called import leave_pid_and_stay\n"
        f"if __name__ == '__main__': list(call_in_processes(leave_pid_and_stay, {list(map(str, paths))}, 2))"
    )
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": f"{INFERENCE}:{ROOT / 'tests'}"}
    head = subprocess.Popen([sys.executable, tmp_path / "program.py"], env=environment)
    try:
        until(lambda: all(path.exists() and path.read_text() for path in paths))
        workers = [int(path.read_text()) for path in paths]
        assert all(map(psutil.pid_exists, workers))
    finally:
        head.kill()
        head.wait()
    until(lambda: not any(map(psutil.pid_exists, workers)))
