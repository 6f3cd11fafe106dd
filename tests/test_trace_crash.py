"""A run that is killed, or cut at any byte, leaves a readable prefix and says that it is incomplete."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from dsatrace.trace.reader import RunReader
from dsatrace.trace.tracer import Tracer
from helpers.trace_samples import RUN, SECRET, SampleRequest, config_for, sample_capture

LINES_A_STEP = 4

ENDLESS_RUN = """
import sys
from pathlib import Path
import numpy as np
from dsatrace.trace.kernels import compile_kernels
from dsatrace.trace.request_facts import RequestFacts
from dsatrace.trace.tracer import Tracer
from helpers.trace_samples import RUN, SECRET, SampleRequest, config_for, sample_capture

compile_kernels()
rng = np.random.default_rng(0)
config = config_for(Path(sys.argv[1]), summary_interval_s=0.01)
print("begins", flush=True)
with Tracer(config, RUN, secret=SECRET) as tracer:
    for i in range(1_000_000):
        tracer.add_request(request := SampleRequest(f"r{i}", [i] * 40))
        tracer.put(sample_capture(rng, [400, 600], step_idx=i, k=64))
        tracer.finish_request(request, RequestFacts(num_output_tokens=1, state="stop"))
"""


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS_RUN, str(folder)],
        env={"PYTHONPATH": f"{ROOT / 'inference'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "begins\n"
        # From the opening, which takes milliseconds, to many summaries later.
        time.sleep(random.Random(seed).choice([0.002, 0.02, 0.2, 0.4]) * random.Random(seed + 99).random())
        assert process.poll() is None
        process.kill()
    if not (folder / "manifest.json").exists():
        return  # killed before the run had begun
    run = RunReader(folder)
    assert (run.manifest["state"], run.state) == ("running", "incomplete")
    steps = [line["step_idx"] for line in run.steps()]
    assert steps == [i // LINES_A_STEP for i in range(len(steps))]
    requests = [record["request_id"] for record in run.requests()]
    assert requests == [f"r{i}" for i in range(len(requests))]
    assert len(requests) * LINES_A_STEP <= len(steps)
    if (folder / "summary.json").exists():
        summary = run.summary()
        assert summary["state"] == "running"
        assert summary["counts"]["records"] <= len(steps)


def test_cut_at_every_byte(tmp_path: Path) -> None:
    with Tracer(config_for(tmp_path), RUN, secret=SECRET) as tracer:
        tracer.add_request(SampleRequest("r0", [1] * 40))
        tracer.put(sample_capture(np.random.default_rng(0), [40], k=5))
    path = tmp_path / "trace_steps.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    ends = np.cumsum([len(line) for line in lines]).tolist()
    run = RunReader(tmp_path)
    with path.open("r+b") as file:
        for size in reversed(range(len(whole))):
            file.truncate(size)
            # A line that has lost only its newline has lost nothing.
            num_whole = sum(end - 1 <= size for end in ends)
            assert list(run.steps()) == records[:num_whole]
            rest = size - (ends[num_whole - 1] if num_whole else 0)
            torn = {path.name: f"line {num_whole + 1}: {rest} bytes, cut short"} if rest > 0 else {}
            assert run.torn_lines == torn
