"""Our model against transformers', a user's way: save_pretrained, convert.py, the file's own config, fp32.

transformers writes a checkpoint in several shards, our command converts it, and `ModelArgs` comes
from the `config.json` that lies beside the weights, with the released model's roundings off, which
transformers does not have. Our prefill runs in chunks, transformers' in one piece. Ties (equal
scores at the k-th place, common with few index heads) are broken differently by transformers. So
that one tie cannot hide behind the next, our model attends to transformers' selection in every
layer, while its own choice is compared: each difference must be a tie within 1e-6, and is counted.

    pytest -s tests/test_model_oracle.py        # prints the table of docs/accuracy.md
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsatrace.commands.convert import main as convert
from dsatrace.model.batch import Batch, Span
from dsatrace.model.checkpoint import dequantise, load_checkpoint
from dsatrace.model.config import PLAIN_NUMERICS, ModelArgs
from dsatrace.model.tiny import quantise
from dsatrace.model.transformer import Transformer
from helpers.models import new_cache

transformers = pytest.importorskip("transformers")

TIE = 1e-6
PROMPT, DECODE_STEPS, CHUNK = 300, 64, 128

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 24,
    "max_position_embeddings": 4096,
    "rope_parameters": YARN,
    "pad_token_id": None,
}
GLM: dict[str, Any] = {
    **SMALL,
    "model_type": "glm_moe_dsa",
    "num_hidden_layers": 6,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {**PLAIN_ROPE, "rope_theta": 8e6},
}


def without_mscale(**changes: float) -> dict[str, Any]:
    kept = {key: value for key, value in YARN.items() if not key.startswith("mscale")}
    return {"rope_parameters": {**kept, **changes}}


CONFIGS: dict[str, dict[str, Any]] = {
    "grouped experts, YaRN": SMALL,
    "odd head counts": SMALL | {"num_attention_heads": 3, "index_n_heads": 5, "hidden_size": 72},
    "many index heads, two dense layers": SMALL
    | {"num_hidden_layers": 4, "first_k_dense_replace": 2, "num_attention_heads": 8, "index_n_heads": 16}
    | {"index_topk": 48, "q_lora_rank": 48},
    "no dense layer, one group, two shared experts, no YaRN": SMALL
    | {"hidden_size": 128, "num_hidden_layers": 2, "first_k_dense_replace": 0, "num_attention_heads": 2}
    | {"kv_lora_rank": 48, "v_head_dim": 24, "n_routed_experts": 6, "n_group": 1, "topk_group": 1}
    | {"num_experts_per_tok": 3, "n_shared_experts": 2, "index_n_heads": 2, "index_head_dim": 32}
    | {"index_topk": 7, "rope_parameters": PLAIN_ROPE},
    "all dense": SMALL | {"first_k_dense_replace": 3},
    "YaRN, mscale unlike mscale_all_dim": SMALL
    | {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.6}},
    "YaRN without mscale": SMALL | without_mscale(),
    "YaRN, attention_factor": SMALL | without_mscale(attention_factor=1.3),
    "top-k above the context": SMALL | {"index_topk": 512},
    "expert weights not normalised": SMALL | {"norm_topk_prob": False},
    "no shared expert": SMALL | {"n_shared_experts": 0},
    "tied embeddings": SMALL | {"tie_word_embeddings": True},
    "bf16 weights": SMALL | {"dtype": "bfloat16"},
    "GLM-5": GLM,
    "GLM-5, indexers by a list": GLM
    | {"indexer_types": ["full", "shared", "full", "full", "shared", "shared"], "index_topk_freq": 2},
    "GLM-5, indexers by a pattern": GLM | {"index_topk_pattern": "FSFSSF", "index_topk_freq": 3},
    "GLM-5, every second indexer": GLM | {"index_topk_freq": 2, "index_skip_topk_offset": 3},
    "GLM-5, YaRN": GLM | {"rope_parameters": YARN, "index_topk_freq": 4},
}


def reference_model(config: dict[str, Any], seed: int):
    """transformers' model with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    family = {"glm_moe_dsa": "GlmMoeDsa"}.get(config.get("model_type", ""), "DeepseekV32")
    kwargs = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    kwargs["num_key_value_heads"] = kwargs["num_attention_heads"]
    settings = getattr(transformers, f"{family}Config")(**kwargs, attn_implementation="eager")
    reference = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
    with torch.no_grad():
        for name, param in reference.named_parameters():
            if "norm" in name:
                param.copy_(0.1 * torch.randn_like(param) + (0 if name.endswith("bias") else 1))
            elif "embed" in name:
                param.normal_()
            else:
                param.normal_(std=max(param.shape[-1], 1) ** -0.5)
        for name, buffer in reference.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return reference


class Comparison:
    """Feeds transformers' selections to our model and compares them with our own choice."""

    def __init__(self, reference, ours: Transformer, cache) -> None:
        self.theirs: dict[int, torch.Tensor] = {}
        self.theirs_from = 0  # position of their first row
        self.compared = self.ties = 0
        for layer, block in enumerate(reference.model.layers):
            if block.self_attn.indexer is not None:
                block.self_attn.indexer.register_forward_hook(
                    lambda module, inputs, output, layer=layer: self.theirs.__setitem__(
                        layer, output[0].long()
                    )
                )
        self.sources = ours.args.source_layers
        assert sorted(set(self.sources)) == [
            layer for layer, b in enumerate(reference.model.layers) if b.self_attn.indexer is not None
        ]
        for indexer in ours.indexers:
            indexer.on_select = self._compare
        cache.select_override = self._override
        self.first_pos = 0

    def _rows(self, layer: int, num_rows: int) -> torch.Tensor:
        first = self.first_pos - self.theirs_from
        return self.theirs[self.sources[layer]][first : first + num_rows]

    def _override(self, layer: int, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        theirs = self._rows(layer, len(positions))
        return theirs.masked_fill(theirs > batch.positions.unsqueeze(1), -1)  # it pads with the future

    def _compare(self, layer: int, selection) -> None:
        theirs = self._rows(layer, len(selection.positions)).tolist()
        for row, ours in enumerate(selection.positions.tolist()):
            mine = {p for p in ours if p >= 0}
            hers = {p for p in theirs[row] if p <= self.first_pos + row}
            self.compared += 1
            if mine != hers:
                assert len(mine) == len(hers)
                assert selection.margin[row] <= TIE, f"layer {layer}, row {row}: not a tie"
                self.ties += 1


def converted(hf: Path, out: Path) -> ModelArgs:
    """By the command, and the model from the file it leaves; computed in fp32 whatever is stored."""
    assert convert(["--hf-ckpt-path", str(hf), "--save-path", str(out), "--model-parallel", "1"]) == 0
    return ModelArgs.from_json(out / "config.json", dtype="fp32", **PLAIN_NUMERICS)


def assert_equal(name: str, reference, args: ModelArgs, folder: Path) -> None:
    """Logits of prefill and of every decode step, and every selection."""
    ours = Transformer(args)
    load_checkpoint(ours, folder)
    cache = new_cache(ours, PROMPT + DECODE_STEPS)
    blocks = list(range(cache.num_blocks))
    comparison = Comparison(reference, ours, cache)
    generator = torch.Generator().manual_seed(len(name))
    tokens = torch.randint(0, args.vocab_size, (PROMPT + DECODE_STEPS,), generator=generator).tolist()

    def both(first: int, end: int, past) -> tuple[float, object]:
        with torch.inference_mode():
            out = reference(torch.tensor([tokens[first:end]]), past_key_values=past, use_cache=True)
        comparison.theirs_from = first
        for start in range(first, end, CHUNK):
            comparison.first_pos = start
            span = Span(blocks, start, tokens[start : min(start + CHUNK, end)])
            logits = ours(Batch.build([span], cache.block_size), cache)
        return (logits[0] - out.logits[0, -1]).abs().max().item(), out.past_key_values

    worst, past = both(0, PROMPT, None)
    for step in range(DECODE_STEPS):
        difference, past = both(PROMPT + step, PROMPT + step + 1, past)
        worst = max(worst, difference)
    print(f"\n| {name} | {worst:.1e} | 0 of {comparison.compared} | {comparison.ties} |")
    assert comparison.compared == args.n_layers * (PROMPT + DECODE_STEPS)
    assert worst < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_same_logits_and_selections(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    reference = reference_model(config, seed=len(name))
    reference.to(getattr(torch, config.get("dtype", "float32")))
    reference.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    args = converted(tmp_path / "hf", tmp_path / "ours")
    if "dtype" in config:
        reference = from_pretrained(tmp_path / "hf")
    assert_equal(name, reference, args, tmp_path / "ours")


def from_pretrained(folder: Path):
    """What transformers itself reads, in fp32."""
    model = transformers.DeepseekV32ForCausalLM
    return model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def in_transformers_4_spelling(file: Path) -> None:
    """As released checkpoints have it: `rope_theta` and `rope_scaling`, `torch_dtype`, no lists of layers."""
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope["type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    for key in ("mlp_layer_types", "layer_types", "indexer_types"):
        config.pop(key, None)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["YaRN, mscale unlike mscale_all_dim", "GLM-5, every second indexer"])
def test_both_spellings_of_a_config(name: str, tmp_path: Path) -> None:
    reference = reference_model(CONFIGS[name], seed=len(name))
    reference.save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    args = converted(tmp_path / "hf", tmp_path / "ours")
    in_transformers_4_spelling(tmp_path / "hf" / "config.json")
    assert "rope_parameters" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert converted(tmp_path / "hf", tmp_path / "again") == args
    assert_equal(f"{name}, transformers 4's spelling", reference, args, tmp_path / "again")


def test_fp8_weights_and_a_next_token_module(tmp_path: Path) -> None:
    """A bf16 save, quantised here; transformers computes with the dequantised weights."""
    name = "fp8 weights, a next-token module"
    config = SMALL | {"hidden_size": 192, "q_lora_rank": 160, "dtype": "bfloat16"}
    reference = reference_model(config, seed=7).bfloat16()
    hf = tmp_path / "hf"
    reference.save_pretrained(hf)
    state = reference.state_dict()
    stored = load_file(hf / "model.safetensors")
    for key, weight in list(stored.items()):
        kept = any(part in key for part in ("embed", "head", "mlp.gate.", "weights_proj"))
        if weight.dim() == 2 and not kept:
            stored[key], stored[f"{key}_scale_inv"] = quantise(weight.float(), "ue8m0")
    num_fp8 = sum(weight.dtype is torch.float8_e4m3fn for weight in stored.values())
    assert num_fp8 > 50
    save_file({**stored, "model.layers.3.eh_proj.weight": torch.ones(192, 384)}, hf / "model.safetensors")
    settings = json.loads((hf / "config.json").read_text())
    settings["num_nextn_predict_layers"] = 1
    settings["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }
    (hf / "config.json").write_text(json.dumps(settings))
    args = converted(hf, tmp_path / "ours")
    assert ModelArgs.from_json(hf / "config.json").dtype == "fp8"

    # transformers reads the dequantised checkpoint back, in fp32.
    plain = {
        key: dequantise(weight, stored[f"{key}_scale_inv"])
        if f"{key}_scale_inv" in stored
        else weight.float()
        for key, weight in stored.items()
        if not key.endswith("_scale_inv")
    }
    shutil.copytree(hf, tmp_path / "plain")
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    del settings["quantization_config"], settings["num_nextn_predict_layers"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(settings))
    dequantised = from_pretrained(tmp_path / "plain")
    changed = dequantised.state_dict()["model.layers.1.self_attn.o_proj.weight"]
    assert not torch.equal(changed, state["model.layers.1.self_attn.o_proj.weight"].float())
    assert_equal(name, dequantised, args, tmp_path / "ours")


def test_the_configurations_reach_the_sparse_part() -> None:
    """The oracle would prove little if nothing were left out."""
    sparse = [name for name, config in CONFIGS.items() if config["index_topk"] < PROMPT / 4]
    assert len(sparse) == len(CONFIGS) - 1
    for key in ("index_topk", "rope_parameters", "index_topk_freq", "norm_topk_prob", "n_shared_experts"):
        assert len({str(config.get(key)) for config in CONFIGS.values()}) > 1, key
