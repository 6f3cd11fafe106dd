"""Whichever write a full disk refuses: one clear line, and what was written before stays whole."""

from __future__ import annotations

import errno
import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsatrace import files
from dsatrace.errors import UserError
from dsatrace.trace.reader import RunReader
from dsatrace.trace.request_facts import RequestFacts
from dsatrace.trace.tracer import Tracer
from helpers.trace_samples import RUN, SECRET, SampleRequest, config_for, sample_capture

NUM_STEPS, LINES_A_STEP = 3, 4
NUM_WRITES = 1 + 1 + 2 * NUM_STEPS + 2 * 2 + 1 + 1
"""Manifest, summary; lines and summary of each step and of two requests; both at the end."""


class Disk:
    """Counts every write of a run's files, and refuses the `full_at`th, 1-based."""

    def __init__(self, full_at: int, stays_full: bool, takes_half: bool) -> None:
        self.num_writes = 0
        disk = self

        class File(FileIO):
            def write(self, data: Any) -> int:
                disk.num_writes += 1
                if disk.num_writes == full_at or (stays_full and disk.num_writes > full_at):
                    if takes_half:
                        super().write(data[: len(data) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(data)

        self.file = File


def write_a_run(folder: Path, **changes: Any) -> None:
    rng = np.random.default_rng(0)
    # So short an interval that every step replaces the summary.
    with Tracer(config_for(folder, summary_interval_s=1e-9, **changes), RUN, secret=SECRET) as tracer:
        requests = [SampleRequest(f"r{b}", [b] * 40) for b in range(2)]
        for request in requests:
            tracer.add_request(request)
        for i in range(NUM_STEPS):
            tracer.put(sample_capture(rng, [40 + i, 60 + i], step_idx=i))
        for request in requests:
            tracer.finish_request(request, RequestFacts(num_output_tokens=NUM_STEPS, state="stop"))


def check_what_is_left(folder: Path, all_steps_put: bool) -> None:
    left = {path.name: path for path in folder.iterdir()}
    assert not [name for name in left if name.startswith(".")]
    if "manifest.json" not in left:
        assert left == {}
        return
    run = RunReader(folder)
    assert run.state == "incomplete"
    steps = [line["step_idx"] for line in run.steps()]
    assert steps == [step for step in range(NUM_STEPS) for _ in range(LINES_A_STEP)][: len(steps)]
    assert len(steps) % LINES_A_STEP == 0
    requests = [record["request_id"] for record in run.requests()]
    assert requests == ["r0", "r1"][: len(requests)]
    assert run.torn_lines == {}
    if "summary.json" in left:
        summary = json.loads(left["summary.json"].read_bytes())
        written = (len(steps), len(requests))
        counted = (summary["counts"]["records"], summary["counts"]["requests"])
        if summary["state"] == "incomplete":
            assert counted == written
            handed_over = summary["counts"]["steps"] + summary["dropped_steps"]
            assert handed_over == NUM_STEPS if all_steps_put else handed_over <= NUM_STEPS
        else:  # the one before the disk was full
            assert counted <= written


def test_the_number_of_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(0, stays_full=False, takes_half=False)
    monkeypatch.setattr(files, "FileIO", disk.file)
    write_a_run(tmp_path)
    assert disk.num_writes == NUM_WRITES
    assert RunReader(tmp_path).state == "complete"


@pytest.mark.parametrize("full_at", range(1, NUM_WRITES + 1))
@pytest.mark.parametrize("takes_half", [False, True])
@pytest.mark.parametrize("stays_full", [False, True])
def test_a_full_disk_at_any_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: int, stays_full: bool, takes_half: bool
) -> None:
    monkeypatch.setattr(files, "FileIO", Disk(full_at, stays_full, takes_half).file)
    with pytest.raises(UserError) as caught:
        write_a_run(tmp_path)
    message = str(caught.value)
    assert message.startswith(("cannot write the trace: /", f"{tmp_path}: cannot write the trace there"))
    assert "No space left on device" in message
    assert "\n" not in message
    check_what_is_left(tmp_path, all_steps_put=False)  # the failure may end the run before


@pytest.mark.parametrize("full_at", range(3, NUM_WRITES + 1))
def test_the_run_goes_on_when_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full_at: int
) -> None:
    monkeypatch.setattr(files, "FileIO", Disk(full_at, stays_full=False, takes_half=True).file)
    write_a_run(tmp_path, on_error="continue")
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: cannot write the trace: /")
    check_what_is_left(tmp_path, all_steps_put=True)


@pytest.mark.parametrize("full_at", [1, 2])
def test_a_run_that_cannot_begin_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: int
) -> None:
    monkeypatch.setattr(files, "FileIO", Disk(full_at, stays_full=True, takes_half=True).file)
    with pytest.raises(UserError, match="name another --trace-out"):
        write_a_run(tmp_path, on_error="continue")
