"""The random checkpoint: reproducible, in Hugging Face layout, and one that transformers takes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from dsatrace.commands.make_tiny_checkpoint import main
from dsatrace.model.config import ModelArgs
from dsatrace.model.hf_config import FP8_GROUP
from dsatrace.model.tiny import quantise, random_tensor, write_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def load_hf(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_the_script_gives_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_tiny_checkpoint.py"
    subprocess.run([sys.executable, script, "--out", tmp_path / "a", "--seed", "3"], check=True)

    def make(out: str, seed: int) -> dict[str, bytes]:
        assert main(["--out", str(tmp_path / out), "--seed", str(seed)]) == 0
        return contents(tmp_path / out)

    first, second, other = contents(tmp_path / "a"), make("b", 3), make("c", 4)
    assert first == second
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"} < set(
        first
    )
    assert sum(name.endswith(".safetensors") for name in first) == 3
    assert all((first[name] == other[name]) != name.endswith(".safetensors") for name in first)


def test_index_names_every_tensor_in_its_shard(tiny_hf: Path) -> None:
    index = json.loads((tiny_hf / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in tiny_hf.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in load_hf(tiny_hf).values())


def test_number_of_shards_does_not_change_a_tensor(
    tiny_args: ModelArgs, tiny_hf: Path, tmp_path: Path
) -> None:
    assert len(write_checkpoint(tmp_path, tiny_args, seed=0, weights="bf16", num_shards=5)) == 5
    one, other = load_hf(tiny_hf), load_hf(tmp_path)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_keep_activations_of_order_one() -> None:
    assert random_tensor("model.layers.0.mlp.up_proj.weight", (64, 400), 0).std().item() == pytest.approx(
        1 / 20, rel=0.05
    )
    norm = random_tensor("model.norm.weight", (512,), 0)
    assert norm.mean().item() == pytest.approx(1.0, abs=0.02)
    assert norm.std().item() > 0.01


def test_fp8_checkpoint_dequantises_to_the_bf16_one(
    fp8_args: ModelArgs, fp8_hf: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, fp8_args, seed=1, weights="fp32")
    quantised, plain = load_hf(fp8_hf), load_hf(tmp_path)
    scales = [name for name in quantised if name.endswith("_scale_inv")]
    assert len(scales) == 7 * 2 + 3 + 3 * (fp8_args.n_routed_experts + 1)
    assert set(quantised) - set(scales) == set(plain)
    for scale_name in scales:
        name = scale_name.removesuffix("_scale_inv")
        rows, cols = plain[name].shape
        scale = quantised[scale_name].repeat_interleave(FP8_GROUP, 0).repeat_interleave(FP8_GROUP, 1)
        back = quantised[name].float() * scale[:rows, :cols]
        # e4m3 has a 3-bit mantissa: half a step is 1/16 of a value, and small values step by 2^-9.
        bound = plain[name].abs() / 16 + scale[:rows, :cols] * 2.0**-10
        assert ((back - plain[name]).abs() <= bound).all(), name


def test_scales_are_powers_of_two_only_under_ue8m0() -> None:
    weight = random_tensor("w", (130, 260), 0)
    _, powers = quantise(weight, "ue8m0")
    _, free = quantise(weight, None)
    assert powers.shape == free.shape == (2, 3)
    assert torch.equal(powers.log2(), powers.log2().round())
    assert not torch.equal(free.log2(), free.log2().round())
    assert (powers >= free).all()


def test_transformers_loads_it(tiny_hf: Path, tiny_args: ModelArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import DeepseekV32ForCausalLM

    model, info = DeepseekV32ForCausalLM.from_pretrained(
        tiny_hf, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    held = load_hf(tiny_hf)
    parameters = sum(value.numel() for value in held.values())
    assert sum(value.numel() for value in model.state_dict().values()) == parameters
    attention = model.model.layers[1].self_attn
    assert torch.equal(attention.q_b_proj.weight, held["model.layers.1.self_attn.q_b_proj.weight"].float())
    rope = model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == (
        "yarn", tiny_args.rope_factor, tiny_args.rope_theta
    )  # fmt: skip
    assert model.config.index_topk == tiny_args.index_topk
    tokens = torch.arange(32)[None] % tiny_args.vocab_size
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.shape == (1, 32, tiny_args.vocab_size)
    assert 0.1 < logits.std().item() < 10


def test_without_yarn_the_config_says_so(tiny_args: ModelArgs, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dataclasses.replace(tiny_args, rope_factor=1.0, n_layers=1))
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"] is None
