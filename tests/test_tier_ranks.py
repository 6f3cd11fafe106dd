"""Two ranks over gloo with KV in tiers of their own: the same answers, and an end when one loses its KV."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch.distributed.run

from conftest import INFERENCE, ROOT
from dsatrace.commands import generate, run_burstgpt, run_dataset
from dsatrace.model.convert import convert_checkpoint
from dsatrace.runner.offload.opening import open_tiers
from dsatrace.runner.settings import OffloadSettings
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify
from helpers.checkpoints import tiny_config
from helpers.command_runs import recording
from helpers.memory_store import MemoryStore
from helpers.ranks import Ranks, on_ranks
from helpers.stores import valkey
from helpers.waiting import LIMIT_S
from helpers.warm_python import warm_python

PROMPTS = "A ferry left the quay with hardly anyone on deck. " * 8 + "\n\nWhere to?\n"
COMPARED = ("request_id", "layer_id", "step_idx", "seq_len_current", "selected_token_pos")
ROWS = ("--cache-block-size", 16, "--hbm-blocks", 3, "--granularity", "row", "--max-batch-size", 2)
NAMESPACE_BYTES = 16


@pytest.fixture(scope="module")
def model(tiny_hf: Path, tiny_args, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """The flags of two ranks that select 16 tokens."""
    folder = tmp_path_factory.mktemp("tier_ranks")
    convert_checkpoint(tiny_hf, folder / "mp2", tiny_args.n_routed_experts, model_parallel=2)
    config = tiny_config(folder, dtype="fp64", index_topk=16)
    (folder / "prompts.txt").write_text(PROMPTS)
    flags = ("--ckpt-path", folder / "mp2", "--config", config, "--device", "cpu")
    return (*flags, "--input-file", folder / "prompts.txt", "--temperature", 0)


def many_tokens(folder: Path, *flags: object) -> tuple[object, ...]:
    """The flags of a run of many tokens."""
    return (*flags, "--max-new-tokens", 3000, "--max-seq-len", 4096, "--trace-out", folder)


def answers(folder: Path, *flags: object) -> list[str]:
    """Of a run that is recorded in `folder`."""
    said = folder.with_name(f"{folder.name}.said")
    done = on_ranks(2, "generate", (*flags, "--trace-out", folder), said)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("[r")]


def records(run: Path) -> list[dict]:
    return [{key: record[key] for key in COMPARED} for record in RunReader(run).steps()]


def test_two_ranks_with_tiers_answer_and_select_the_same(model: tuple[object, ...], tmp_path: Path) -> None:
    """A file of units each, under names of their own."""
    flags = (*model, "--max-new-tokens", 10)
    whole = answers(tmp_path / "whole", *flags, "--cache-block-size", 16)
    tiers = (*ROWS, "--local-pool", f"mmap:{tmp_path}/units", "--prefetch", "previous-layer")
    assert answers(tmp_path / "tiers", *flags, *tiers, "--offload-index-keys") == whole
    assert len(whole) == 2
    assert records(tmp_path / "tiers") == records(tmp_path / "whole")
    assert verify(tmp_path / "tiers").state == "complete"
    assert not list(tmp_path.glob("units*"))


@pytest.mark.parametrize(
    ("local", "remote", "opened"),
    [
        ("mmap:/x/kv", None, ["mmap:/x/kv.rank1"]),
        ("file:/x/kv", "sim:rdma-400g+mmap:/y/a+b", ["file:/x/kv.rank1", "sim:rdma-400g+mmap:/y/a+b.rank1"]),
        ("ram", "redis://10.0.0.7", ["ram", "redis://10.0.0.7"]),
    ],
)
def test_ranks_have_files_of_their_own(
    local: str, remote: str | None, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    specs: list[str] = []

    def open_memory(spec: str, unit_bytes: int, units: int | None, **unused: object) -> MemoryStore:
        specs.append(spec)
        return MemoryStore(unit_bytes, units)

    monkeypatch.setattr("dsatrace.runner.offload.opening.open_store", open_memory)
    offload = OffloadSettings(hbm_blocks=1, local=local, remote=remote)
    shape = {"num_layers": 2, "num_blocks": 4, "units_per_block": 1}
    open_tiers(offload, 64, **shape, suffix=".rank1").close()
    assert specs == opened


@pytest.mark.parametrize("lost", ["of one rank", "of both"])
def test_kv_that_is_lost_ends_all_ranks(model: tuple[object, ...], lost: str, tmp_path: Path) -> None:
    """The rank that lost it says so; the other does not wait for it forever."""
    redis = pytest.importorskip("redis", reason="redis-py plays the stranger at the server")
    folder = tmp_path / "run"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(valkey())
        client = stack.enter_context(redis.Redis.from_url(server.tcp))
        flags = many_tokens(folder, *model, *ROWS, "--remote", server.tcp)
        process = stack.enter_context(recording(Ranks(2, "generate", flags, tmp_path / "said"), folder))
        if lost == "of both":
            server.kill()
        else:
            one = client.randomkey()[:NAMESPACE_BYTES]
            for key in client.keys("*"):
                if key[:NAMESPACE_BYTES] == one:
                    client.delete(key)
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    told = [line for line in err.splitlines() if line.startswith("error: rank ")]
    assert told, err
    for line in told:
        assert "several ranks cannot compute it again: mend the store, then start again" in line
    assert RunReader(folder).state == "incomplete"
    assert verify(folder).state == "incomplete"


def test_sigterm_ends_all_ranks_and_leaves_no_key(model: tuple[object, ...], tmp_path: Path) -> None:
    """As a batch system ends a job: torchrun hands it on to its ranks."""
    redis = pytest.importorskip("redis", reason="redis-py counts the server's keys")
    folder = tmp_path / "run"
    with warm_python() as path, valkey() as server, redis.Redis.from_url(server.tcp) as client:
        flags = many_tokens(folder, *model, *ROWS, "--remote", server.tcp)
        process = subprocess.Popen(
            ["torchrun", "--nproc-per-node", "2", str(INFERENCE / "generate.py"), *map(str, flags)],
            cwd=ROOT,
            env=os.environ | {"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with recording(process, folder):
            assert client.dbsize() > 0
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode != 0
        assert client.dbsize() == 0, err
    assert RunReader(folder).state == "incomplete"
    assert verify(folder).state == "incomplete"


@pytest.mark.parametrize("command", [generate, run_dataset, run_burstgpt], ids=lambda module: module.__name__)
def test_torchrun_takes_no_flag_of_ours_for_its_own(command: ModuleType) -> None:
    """It looks for abbreviations of its flags behind the script's name, too."""
    launcher, refused = torch.distributed.run.get_args_parser(), set()
    for flag in command._parser()._option_string_actions:
        try:
            assert launcher.parse_args(["script.py", flag]).training_script_args == [flag]
        except SystemExit:
            refused.add(flag)
    assert refused == {"--local"}, "which has another name: --local-pool"
