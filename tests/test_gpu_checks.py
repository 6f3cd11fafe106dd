"""`scripts/gpu_checks.sh` here: one line without a device, and all of its code at small shapes."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch

from conftest import ROOT

SCRIPT = ROOT / "scripts" / "gpu_checks.sh"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    ran = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "no CUDA device: nothing was checked\n"


def test_its_checks_run_at_small_shapes() -> None:
    command = ["bash", str(SCRIPT), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = ran.stdout.splitlines()[2:]
    assert [row[25:32].strip() for row in rows] == ["passed", "skipped", "passed", "passed", "passed"]
    assert "layer 0 100.00%" in rows[0]
