"""Commands in processes forked from a server that has imported everything, so that a run is short.

process = start(["--dataset", "sharegpt", ...], tmp_path / "said.txt")
process.join(0.3)
process.kill()                    # SIGKILL: process.exitcode is -9
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from dsatrace.trace.kernels import compile_kernels

TESTS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join((str(TESTS.parent / "inference"), str(TESTS))),
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"),
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""Of the server: a process with threads cannot be forked."""

LATE = (
    "tokenizers",
    *(
        f"dsatrace.commands.{name}"
        for name in ("generate", "layerwise", "run_burstgpt", "run_dataset", "serving")
    ),
    "dsatrace.report.workload_tables",
    "dsatrace.runner.setup",
    "dsatrace.trace.parquet.sink",
    "pandas",  # pyarrow's, to look at an array
)
"""What a run imports when it needs it."""

compile_kernels()
for name in (*LATE, "dsatrace.runner.offload.opening"):
    importlib.import_module(name)
os.register_at_fork(before=gc.freeze)  # else a collection copies every page that modules lie on
_context = multiprocessing.get_context("forkserver")
# Also what test modules import, in which the functions stand that the forks call.
_context.set_forkserver_preload([__name__, "pytest", "helpers.stores"])


def start(
    argv: Sequence[object],
    said: Path,
    environment: Mapping[str, object] | None = None,
    *,
    command: str = "run_dataset",
    errors: Path | None = None,
    stdin: Path = Path(os.devnull),
) -> BaseProcess:
    """A started process; what it says goes to a file, its errors too unless they have one of their own."""
    variables = {name: str(value) for name, value in (environment or {}).items()}
    return call(run_command, command, [str(arg) for arg in argv], (stdin, said, errors or said), variables)


def call(function: Callable[..., object], *args: object) -> BaseProcess:
    """A started process that calls the function of a test."""
    process = _context.Process(target=_call, args=(function, args))
    with mock.patch.dict(os.environ, ENVIRONMENT):
        process.start()
    return process


class Started:
    """A command under way, with what `subprocess.Popen` has for it; it says what it says in files."""

    def __init__(self, argv: Sequence[object], folder: Path, command: str = "run_dataset") -> None:
        """The files lie in `folder`, a new one."""
        folder.mkdir()
        self._said = folder / "out", folder / "err"
        self._process = start(argv, self._said[0], command=command, errors=self._said[1])

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid or 0, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, ...]:
        """What it said until its end."""
        self._process.join(timeout)
        assert self.returncode is not None, "it goes on"
        return tuple(file.read_text() for file in self._said)


def call_on_ranks(num_ranks: int, function: Callable[..., object], *args: object) -> None:
    """Calls `function(rank, *args)` in a process per rank, and waits for all of them to end well."""
    processes = [call(function, rank, *args) for rank in range(num_ranks)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * num_ranks


def _call(function: Callable[..., object], args: tuple[object, ...]) -> None:
    assert len(list(Path(f"/proc/{os.getppid()}/task").iterdir())) == 1, "the server has threads"
    function(*args)


def run_command(
    command: str, argv: list[str], files: tuple[Path, Path, Path], environment: dict[str, str]
) -> None:
    """Ends this process as the command does; `files` become its stdin, stdout and stderr."""
    os.environ.update(environment)
    _take(files)
    sys.exit(importlib.import_module(f"dsatrace.commands.{command}").main(argv))


def finished(script: str | Path, *argv: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A script, run to its end as `python3 SCRIPT` would run it in `cwd`."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(os.devnull), Path(folder, "out"), Path(folder, "err")
        process = call(run_script, cwd or Path.cwd(), [str(script), *map(str, argv)], files)
        process.join()
        out, err = (file.read_text() for file in files[1:])
    return subprocess.CompletedProcess([str(script), *argv], process.exitcode or 0, out, err)


def run_script(cwd: Path, argv: list[str], files: tuple[Path, Path, Path]) -> None:
    os.chdir(cwd)
    _take(files)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    runpy.run_path(argv[0], run_name="__main__")


def _take(files: tuple[Path, Path, Path]) -> None:
    """Makes them stdin, stdout and stderr."""
    for fd, file in enumerate(files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND if fd else os.O_RDONLY), fd)
    # The server's own know whether its files can seek; these may be pipes.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
