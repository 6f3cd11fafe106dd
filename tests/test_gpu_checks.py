"""`scripts/gpu_checks.sh` here: one line without a device, and all of its code at small shapes."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch

from conftest import ROOT
from helpers.warm_python import warm_python

SCRIPT = ROOT / "scripts" / "gpu_checks.sh"


def checked(*flags: str) -> subprocess.CompletedProcess[str]:
    with warm_python() as path:
        env = os.environ | {"PATH": path}
        return subprocess.run(
            ["bash", str(SCRIPT), *flags], capture_output=True, text=True, check=False, env=env
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    ran = checked()
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "no CUDA device: nothing was checked\n"


def test_its_checks_run_at_small_shapes() -> None:
    ran = checked("--device", "cpu")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = ran.stdout.splitlines()[2:]
    assert [row[25:32].strip() for row in rows] == ["passed", "skipped", "passed", "passed", "passed"]
    assert "layer 0 100.00%" in rows[0]
