"""scripts/run_trace_*.sh: offline on the tiny model with nothing set, and what the environment sets."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dsatrace.model.convert import convert_checkpoint
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify
from helpers.checkouts import copied_checkout, environment_in
from helpers.warm_python import warm_python

CONFIG = "inference/config_tiny.json"
SCRIPTS = ("ruler", "longbenchv2", "sharegpt", "burstgpt")
SHORT = ("--ruler-length", "700", "--max-new-tokens", "4")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied_checkout(tmp_path_factory.mktemp("checkout"))


def call(checkout: Path, name: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    with warm_python() as path:
        return subprocess.run(
            ["bash", f"scripts/run_trace_{name}.sh", *flags],
            cwd=checkout,
            env=environment_in(checkout) | {"PATH": path} | variables,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


@pytest.mark.parametrize("name", SCRIPTS)
def test_with_nothing_set_it_runs_offline_and_says_so(checkout: Path, name: str) -> None:
    done = call(checkout, name)
    assert done.returncode == 0, done.stderr
    assert "needle-2k" in done.stdout
    assert ("generator" if name == "ruler" else "embedded") in done.stdout
    (folder,) = (checkout / "outputs").glob(f"{name}_*")
    assert verify(folder).state == "complete"
    assert RunReader(folder).manifest["selections"] == "model"
    if name in ("sharegpt", "burstgpt"):  # the samples show what the tool is for
        summary = RunReader(folder).summary()
        assert summary["counts"]["sparse_records"] > 0
        assert summary["prefix_hot_blocks"]
    if name == "sharegpt":
        assert summary["workload"]["turn_mode"] == "full"


def test_ranks_and_config_come_from_the_checkpoint(checkout: Path, tiny_hf: Path, tiny_args) -> None:
    convert_checkpoint(tiny_hf, checkout / "mp2", tiny_args.n_routed_experts, model_parallel=2)
    out = str(checkout / "outputs" / "two")
    done = call(checkout, "ruler", *SHORT, CKPT_PATH="mp2", LIMIT="1", OUT=out)
    assert done.returncode == 0, done.stderr
    manifest = RunReader(out).manifest
    assert manifest["world_size"] == 2
    assert manifest["model_config"]["dtype"] == "bf16"  # as its config.json says, not config_tiny.json
    assert verify(Path(out)).state == "complete"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CKPT_PATH": "nowhere"}, "nowhere"),
        ({"CKPT_PATH": "ckpt", "MP": "4"}, "model0-mp4.safetensors"),
        ({"MP": "4"}, "MP=4 without CKPT_PATH"),
        ({"CONFIG": CONFIG}, "without CKPT_PATH"),
        ({"CKPT_PATH": "ckpt", "CONFIG": "inference/config_671B_v3.2.json"}, "ckpt"),
    ],
)
def test_a_mismatch_is_one_clear_line(
    checkout: Path, tiny_checkpoint: Path, variables: dict[str, str], said: str
) -> None:
    if not (checkout / "ckpt").exists():
        shutil.copytree(tiny_checkpoint, checkout / "ckpt")
    done = call(checkout, "burstgpt", **variables)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
