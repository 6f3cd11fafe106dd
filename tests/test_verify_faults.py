"""`dsatrace verify` of sound files of a run that is not: one without its records, one that broke."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsatrace.commands.run_burstgpt import main as run_burstgpt
from dsatrace.commands.verify import main
from dsatrace.files import write_json
from dsatrace.schema import MANIFEST_FILE
from dsatrace.trace.tracer import Tracer
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.run import verify
from helpers.golden_run import write_golden
from helpers.resume_samples import INFO, Server, config_of, serve
from helpers.trace_samples import SECRET


def said(folder: Path, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says on stderr."""
    capsys.readouterr()
    assert main([str(folder), "--jobs", "1"]) == code
    out, err = capsys.readouterr()
    assert out.startswith("verified: ")
    return err


@pytest.mark.parametrize("stop_at", [0, 1])
def test_none_of_its_records(stop_at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ended before its first forward, or before the first that is recorded."""
    folder = serve(tmp_path / "run", stop_at=stop_at, prefill="off")
    fault = "it should have records and has none (5 requests, incomplete)"
    assert said(folder, 1, capsys) == f"bad: {folder}: {fault}\n"


def test_ended_by_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyError), Tracer(config_of(folder), INFO, secret=SECRET) as tracer:
        Server(tracer, stop_at=5).run()
        raise KeyError
    assert said(folder, 1, capsys) == f"bad: {folder}: an error ended the run: ended by KeyError\n"
    assert verify(folder).num_records > 0


def test_interrupted_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), Tracer(config_of(folder), INFO, secret=SECRET) as tracer:
        Server(tracer, stop_at=5).run()
        raise KeyboardInterrupt
    assert said(folder, 0, capsys) == ""
    assert verify(folder).state == "incomplete"


def test_a_simulators_run_has_none_by_nature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--runner", "simulator", "--burstgpt-generate", "--limit", "5", "--trace-out", str(tmp_path))
    assert run_burstgpt([*flags, "--no-hub"]) == 0
    assert said(tmp_path, 0, capsys) == ""
    assert verify(tmp_path).num_records == 0


def test_a_run_without_steps_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = serve(tmp_path / "run", sample_rate=0.0, prefill="off")
    assert said(folder, 0, capsys) == ""


def test_the_failed_requests_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_golden(folder)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    fields = iter(manifest.items())
    first = [next(fields) for _ in range(5)]
    assert first[-1][0] == "error"
    write_json(folder / MANIFEST_FILE, dict([*first, ("failed_requests", 1), *fields]))
    with pytest.raises(Mismatch, match=r"manifest\.json.*failed_requests.*stored 1, derived 0"):
        verify(folder)
