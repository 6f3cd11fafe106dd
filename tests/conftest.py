"""Fixtures that many tests share: the tiny model's config and its checkpoints, made once a session.

The checkpoints are read-only by agreement; a test that changes one copies it first.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from dsatrace.model.config import ModelArgs
from dsatrace.model.convert import convert_checkpoint
from dsatrace.model.tiny import write_checkpoint
from dsatrace.workloads.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer
from helpers.browser import Browser, find_browser
from helpers.checkpoints import endless_letters
from helpers.power import examples

ROOT = Path(__file__).resolve().parents[1]
INFERENCE = ROOT / "inference"

torch.set_num_threads(1)
# As in the foreground: what a shell's background job or nohup starts ignores these.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: the workers share the cores

# In CI the same examples every time; elsewhere new ones, which is how the next bug is found.
# An example may take any time: how long says nothing but how busy the machine is.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("here"), derandomize=True, max_examples=examples(40))
settings.load_profile("ci" if os.environ.get("CI") else "here")

SLOWEST = (
    *("test_readme.py", "test_run_scripts.py", "test_offload.py"),
    *("test_long_run.py", "test_layerwise_runs.py", "test_exits.py", "test_gpu_checks.py"),
)
"""Files that begin first: a test of several seconds that begins last leaves the other workers idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOWEST)


def pytest_collection_finish() -> None:
    gc.freeze()  # the collector need not look again and again at a million objects that stay


@pytest.fixture(scope="session")
def tiny_args() -> ModelArgs:
    """`config_tiny.json` as it stands: fp32."""
    return ModelArgs.from_json(INFERENCE / "config_tiny.json")


@pytest.fixture(scope="session")
def tiny_hf(tiny_args: ModelArgs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in Hugging Face layout: bf16, three shards, byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "hf"
    write_checkpoint(folder, tiny_args, seed=0, weights="bf16", num_shards=3)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_hf: Path, tiny_args: ModelArgs) -> Path:
    """The same, converted for one rank: `model0-mp1.safetensors`, tokenizer and config."""
    folder = tiny_hf.parent / "mp1"
    convert_checkpoint(tiny_hf, folder, tiny_args.n_routed_experts, model_parallel=1)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Path) -> Path:
    """The same with greedy answers of letters and spaces that never end."""
    return endless_letters(tiny_checkpoint, tiny_checkpoint.parent / "letters")


@pytest.fixture(scope="session")
def byte_tokenizer(tiny_hf: Path) -> Tokenizer:
    return load_tokenizer(tiny_hf)


@pytest.fixture(scope="session")
def fp8_args() -> ModelArgs:
    """A small fp8 model whose scales divide over 1, 2 and 4 ranks: every split dimension is 4 x 128 x k."""
    return ModelArgs(
        vocab_size=384,
        dim=256,
        inter_dim=512,
        moe_inter_dim=512,
        n_layers=2,
        n_dense_layers=1,
        n_heads=16,
        n_routed_experts=4,
        n_activated_experts=2,
        n_expert_groups=2,
        n_limited_groups=1,
        q_lora_rank=160,  # not a multiple of 128: the last scale block is a part of one
        kv_lora_rank=64,
        qk_nope_head_dim=96,
        qk_rope_head_dim=32,
        v_head_dim=96,
        dtype="fp8",
        index_n_heads=4,
        index_head_dim=32,
        index_topk=32,
    )


@pytest.fixture(scope="session")
def fp8_hf(fp8_args: ModelArgs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `fp8_args` in Hugging Face layout: fp8 weights with `weight_scale_inv`."""
    folder = tmp_path_factory.mktemp("fp8") / "hf"
    write_checkpoint(folder, fp8_args, seed=1, weights="fp8", num_shards=2)
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium, started once a session."""
    if (program := find_browser()) is None:
        missing = "needs Chromium: apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with Browser(program) as started:
        yield started
