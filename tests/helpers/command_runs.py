"""Commands under test: the line that a mistake comes to, a process caught while it records, a run's sets."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from conftest import ROOT
from dsatrace.trace.reader import RunReader
from helpers.forked import Started, finished
from helpers.ranks import Ranks
from helpers.waiting import until

Process = TypeVar("Process", subprocess.Popen[str], Started, Ranks)


def told_error(capsys: pytest.CaptureFixture[str], run: Callable[[], int]) -> str:
    """The one error line of a run that exits with 2; argparse adds its usage before it."""
    capsys.readouterr()
    try:
        code = run()
    except SystemExit as exit_:  # argparse's own
        code = exit_.code
    err = capsys.readouterr().err
    assert code == 2, err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1, err
    assert errors[0] == err.splitlines()[-1]
    return errors[0]


def runs_below(folder: Path, main: Callable[[list[str]], int], *fixed: object) -> Callable[..., Path]:
    """Runs `main` with the fixed flags and more into a new folder below `folder`, which it returns."""
    numbers = itertools.count()

    def run(*flags: object, code: int = 0) -> Path:
        out = folder / f"run{next(numbers)}"
        assert main([str(flag) for flag in (*fixed, "--trace-out", out, *flags)]) == code
        return out

    return run


def until_lines(process: Process, file: Path, num_lines: int) -> None:
    """Waits until the process, which goes on, has written so many lines."""

    def has_written() -> bool:
        assert process.poll() is None, process.communicate()
        return file.exists() and file.read_bytes().count(b"\n") >= num_lines

    until(has_written)


@contextlib.contextmanager
def recording(process: Process, folder: Path) -> Iterator[Process]:
    """A process that has recorded a few steps into `folder`; it does not outlive the block."""
    try:
        until_lines(process, folder / "trace_steps.jsonl", 8)
        yield process
    finally:
        process.kill()
        process.communicate()


def bench(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """A finished run of `scripts/bench/<script>`."""
    return finished(ROOT / "scripts" / "bench" / script, *flags)


def selections(folder: Path) -> dict[tuple[str, int, int], list[int]]:
    """A run's selected positions, by request, step and layer."""
    return {
        (record["request_id"], record["step_idx"], record["layer_id"]): record["selected_token_pos"]
        for record in RunReader(folder).steps()
    }
