"""GLM-5 a user's way: layers that share selections, converted, served on one rank and on two."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dsatrace.cli import main as dsatrace
from dsatrace.commands.convert import main as convert
from dsatrace.model.config import ModelArgs
from dsatrace.model.tiny import write_checkpoint
from dsatrace.workloads.tokenizer import write_byte_tokenizer
from test_tensor_parallel import PROMPTS, answers, generate

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def glm_args(tiny_args: ModelArgs) -> ModelArgs:
    return dataclasses.replace(
        tiny_args,
        model_type="glm_moe_dsa",
        index_rope="interleaved",
        n_layers=6,
        indexer_types=("full", "full", "shared", "shared", "full", "shared"),
        n_expert_groups=1,
        n_limited_groups=1,
        norm_eps=1e-5,
        rope_theta=8e6,
        rope_factor=1.0,
        original_seq_len=65536,
    )


@pytest.fixture(scope="module")
def glm_hf(glm_args: ModelArgs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glm") / "hf"
    write_checkpoint(folder, glm_args, seed=3, weights="bf16", num_shards=2)
    write_byte_tokenizer(folder)
    return folder


def converted(hf: Path, out: Path, num_ranks: int) -> Path:
    ranks = ["--model-parallel", str(num_ranks)]
    assert convert(["--hf-ckpt-path", str(hf), "--save-path", str(out), *ranks]) == 0
    return out


def selections(run: Path) -> list[tuple]:
    records = [json.loads(line) for line in (run / "trace_steps.jsonl").read_text().splitlines()]
    keys = ("request_id", "layer_id", "step_idx", "selected_token_pos", "source_layer", "indexer_scan")
    return [tuple(str(record.get(key)) for key in keys) for record in records]


def test_one_rank_and_two_whole_and_in_chunks(glm_hf: Path, glm_args: ModelArgs, tmp_path: Path) -> None:
    """In fp64 nothing is forgiven: same answers, same selections, and `verify` derives every record."""
    config = tmp_path / "fp64.json"
    config.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(glm_args, dtype="fp64"))))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS)
    flags = ("--input-file", str(prompts), "--max-new-tokens", str(NEW_TOKENS))
    runs = {}
    folders = {ranks: converted(glm_hf, tmp_path / f"mp{ranks}", ranks) for ranks in (1, 2)}
    for name, num_ranks, chunk in (("one", 1, 4096), ("chunks", 1, 48), ("two", 2, 256)):
        out = tmp_path / name
        run = generate(num_ranks, folders[num_ranks], config, out, "", *flags, "--prefill-chunk", str(chunk))
        assert run.returncode == 0, run.stderr
        assert dsatrace(["verify", str(out)]) == 0
        runs[name] = answers(run.stdout), selections(out)
    assert runs["chunks"] == runs["one"]
    assert runs["two"] == runs["one"]
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and manifest["model_config"]["model_type"] == "glm_moe_dsa"
    assert [layer["source_layer"] for layer in manifest["selection"]["layers"]] == [None, None, 1, 1, None, 4]
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert summary["counts"]["sparse_records"] > NEW_TOKENS * glm_args.n_layers / 2
    assert [share is None for share in summary["layer_overlap"]["per_layer"]] == [
        True, False, True, True, False, True,
    ]  # fmt: skip


def test_the_checkpoints_own_config_serves_it(glm_hf: Path, tmp_path: Path) -> None:
    """Without --config; a byte tokenizer is no GLM's, so that the chat form is ours."""
    folder = converted(glm_hf, tmp_path / "mp1", 1)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS)
    run = generate(1, folder, folder / "config.json", tmp_path / "run", "", "--input-file", str(prompts))
    assert run.returncode == 0, run.stderr
    assert dsatrace(["verify", str(tmp_path / "run")]) == 0
    layers = {json.loads(line)["layer_id"]: json.loads(line).get("source_layer")
              for line in (tmp_path / "run" / "trace_steps.jsonl").read_text().splitlines()}  # fmt: skip
    assert layers == {0: None, 1: None, 2: 1, 3: 1, 4: None, 5: 4}
