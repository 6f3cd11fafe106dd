"""Random checkpoints in Hugging Face layout, for tests and the demo: the same seed, the same bytes.

Each tensor is drawn from its name, so neither shard count nor order changes it, and only one is in
memory at a time. The weights mean nothing: their selections say nothing about locality.

    write_checkpoint("tiny", ModelArgs.from_json("config_tiny.json"), seed=0)
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch

from dsatrace.files import write_json

from .config import ModelArgs
from .hf_config import FAMILIES, FP8_GROUP, KEYS, ROPE_KEYS
from .names import UNQUANTISED, checkpoint_tensors, scale_of
from .shards import DTYPES, CheckpointError, Layout, ShardWriter, num_bytes

Weights = Literal["bf16", "fp8", "fp32"]

RANDOM_WEIGHTS = "random_weights"
"""Key of `config.json` that says so, for reports on a run of this model."""

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def write_checkpoint(
    folder: str | Path,
    args: ModelArgs,
    seed: int = 0,
    weights: Weights = "bf16",
    num_shards: int = 3,
) -> list[Path]:
    """Writes shards, index and `config.json` (no tokenizer) into `folder`; returns the shards.

    Tensors already there are overwritten. `weights` is the type of the linear weights:
    with fp8 the rest is bf16, as released; the gate's bias is always fp32.
    """
    if num_shards < 1:
        raise CheckpointError(f"num_shards must be at least 1, not {num_shards}")
    folder = Path(folder)
    shards = _split(layout_of(args, weights), num_shards)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, layout in zip(names, shards, strict=True):
            (folder / name).unlink(missing_ok=True)
            with ShardWriter(folder / name, layout) as writer:
                for tensor_name, tensor in layout.items():
                    _write_random(writer, tensor_name, tensor, seed, args)
        weight_map = {tensor: name for name, layout in zip(names, shards, strict=True) for tensor in layout}
        total = sum(num_bytes(*tensor) for layout in shards for tensor in layout.values())
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
            indent=2,
        )
        write_json(folder / "config.json", {**hf_config(args, weights), RANDOM_WEIGHTS: True}, indent=2)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write the checkpoint: {error.strerror}") from error
    return [folder / name for name in names]


def layout_of(args: ModelArgs, weights: Weights) -> Layout:
    """Container type and shape of every tensor, by Hugging Face name; a scale follows its weight."""
    plain = "F32" if weights == "fp32" else "BF16"
    layout: Layout = {}
    for name, target in checkpoint_tensors(args).items():
        if weights == "fp8" and len(target.shape) == 2 and not target.name.endswith(UNQUANTISED):
            layout[name] = ("F8_E4M3", target.shape)
            scale_name, scale = scale_of(name, target)
            layout[scale_name] = ("F32", scale.shape)
        else:
            layout[name] = ("F32" if target.name.endswith("ffn.gate.bias") else plain, target.shape)
    return layout


def _split(layout: Layout, num_shards: int) -> list[Layout]:
    """Cuts the checkpoint into at most `num_shards` runs of about equal bytes, a weight beside its scale."""
    total = sum(num_bytes(*tensor) for tensor in layout.values())
    shards: list[Layout] = [{} for _ in range(num_shards)]
    done = 0
    shard = 0
    for name, tensor in layout.items():
        if not name.endswith("_scale_inv"):
            shard = min(done * num_shards // total, num_shards - 1)
        shards[shard][name] = tensor
        done += num_bytes(*tensor)
    return [shard for shard in shards if shard]


def _write_random(
    writer: ShardWriter, name: str, tensor: tuple[str, tuple[int, ...]], seed: int, args: ModelArgs
) -> None:
    if name.endswith("_scale_inv"):
        return  # written with its weight
    dtype, shape = tensor
    values = random_tensor(name, shape, seed)
    if dtype == "F8_E4M3":
        values, scale = quantise(values, args.scale_fmt)
        writer.write(f"{name}_scale_inv", scale)
    writer.write(name, values.to(DTYPES[dtype]))


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """fp32 values that keep activations of order one: std 1/sqrt(fan in), norms near 1, small biases."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    values = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return values.mul_(0.05)
    if len(shape) == 1:
        return values.mul_(0.1).add_(1.0)
    if name == "model.embed_tokens.weight":
        return values
    return values.mul_(shape[-1] ** -0.5)


def quantise(weight: torch.Tensor, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 weight (out, in) and fp32 scales, one for each 128 x 128 block; a power of two under ue8m0."""
    rows, cols = (-(-n // FP8_GROUP) for n in weight.shape)
    padded = torch.zeros(rows * FP8_GROUP, cols * FP8_GROUP)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, FP8_GROUP, cols, FP8_GROUP)  # (R, 128, C, 128)
    scale = blocks.abs().amax(dim=(1, 3)).clamp_(min=1e-4) / _FP8_MAX  # (R, C)
    if scale_fmt == "ue8m0":
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scaled = (blocks / scale[:, None, :, None]).view(padded.shape)
    return scaled[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn), scale


def hf_config(args: ModelArgs, weights: Weights) -> dict[str, object]:
    """`config.json` of the same model, in transformers 4's spelling; `ValueError` where there is none."""
    family = FAMILIES[args.model_type]
    if args.score_func != "sigmoid" or args.index_rope != family.index_rope:
        raise ValueError(f"no config.json of {args.model_type} has this score_func and index_rope")
    config: dict[str, object] = {
        "architectures": [family.architecture],
        "model_type": args.model_type,
        **{key: getattr(args, row.field) for key, row in KEYS.items() if row.field and not row.optional},
        "first_k_dense_replace": args.n_dense_layers,
        "scoring_func": args.score_func,
        "moe_layer_freq": 1,
        "num_key_value_heads": args.n_heads,
        "topk_method": "noaux_tc",
        "max_position_embeddings": int(args.original_seq_len * args.rope_factor),
        "rope_theta": args.rope_theta,
        "rope_scaling": _rope_scaling(args),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": args.tie_word_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32" if weights == "fp32" else "bfloat16",
    }
    if args.indexer_types is not None:
        config["indexer_types"] = list(args.indexer_types)
    if args.latent_norm_eps != family.latent_norm_eps:
        config["latent_norm_eps"] = args.latent_norm_eps
    if weights == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_GROUP, FP8_GROUP],
            "scale_fmt": args.scale_fmt,
        }
    return config


def _rope_scaling(args: ModelArgs) -> dict[str, object] | None:
    if not args.uses_yarn:
        return None
    scaling: dict[str, object] = {
        "type": "yarn",
        **{key: getattr(args, row.field) for key, row in ROPE_KEYS.items() if row.field},
        "mscale": args.mscale,
        "mscale_all_dim": args.mscale,
    }
    del scaling["rope_theta"]
    if args.rope_attention_factor != 1.0 or not args.mscale:
        scaling["attention_factor"] = args.rope_attention_factor
    return scaling
