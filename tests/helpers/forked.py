"""`run_dataset` in processes forked from a server that has imported everything, so that a run is short.

process = start(["--dataset", "sharegpt", ...], tmp_path / "said.txt")
process.join(0.3)
process.kill()                    # SIGKILL: process.exitcode is -9
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from dsatrace.commands.run_dataset import main
from dsatrace.trace.kernels import compile_kernels

TESTS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join((str(TESTS.parent / "inference"), str(TESTS))),
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"),
}
"""Of the server: a process with threads cannot be forked."""

LATE = ("tokenizers", "dsatrace.commands.serving", "dsatrace.report.workload_tables", "dsatrace.runner.setup")
"""What a run imports when it needs it."""

compile_kernels()
for name in (*LATE, "dsatrace.runner.offload.opening"):
    importlib.import_module(name)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__, "pytest"])


def start(argv: Sequence[object], said: Path, environment: Mapping[str, object] | None = None) -> BaseProcess:
    """A started process; what it says goes to a file."""
    variables = {name: str(value) for name, value in (environment or {}).items()}
    process = _context.Process(target=_run, args=([str(arg) for arg in argv], said, variables))
    with mock.patch.dict(os.environ, ENVIRONMENT):
        process.start()
    return process


def _run(argv: list[str], said: Path, environment: dict[str, str]) -> None:
    assert len(list(Path(f"/proc/{os.getppid()}/task").iterdir())) == 1, "the server has threads"
    os.environ.update(environment)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(main(argv))
