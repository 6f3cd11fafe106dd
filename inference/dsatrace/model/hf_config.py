"""`config.json` of a Hugging Face checkpoint and `ModelArgs`, each from the other.

    ModelArgs.from_json("DeepSeek-V3.2/config.json")      # comes here by itself
    hf_config(args, weights="bf16")

Only what both name; numerics that `config.json` does not speak of keep their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from .config import FP8_GROUP, ModelArgs, WeightDtype

Weights = Literal["bf16", "fp8", "fp32"]

_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "inter_dim",
    "moe_intermediate_size": "moe_inter_dim",
    "num_hidden_layers": "n_layers",
    "first_k_dense_replace": "n_dense_layers",
    "num_attention_heads": "n_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "num_experts_per_tok": "n_activated_experts",
    "n_group": "n_expert_groups",
    "topk_group": "n_limited_groups",
    "routed_scaling_factor": "route_scale",
    "scoring_func": "score_func",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
}
"""Hugging Face's name of each field, in the order of its own files."""

_ROPE_NAMES = {
    "factor": "rope_factor",
    "original_max_position_embeddings": "original_seq_len",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
}
_DTYPES: dict[str, WeightDtype] = {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


def is_hf_config(values: Mapping[str, Any]) -> bool:
    """Whether a JSON object is Hugging Face's config and not the demo's."""
    return "model_type" in values or "hidden_size" in values


def fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """`ModelArgs` fields of a DeepseekV32 `config.json`; raises `ValueError` for another model's."""
    model_type = values.get("model_type")
    if model_type != "deepseek_v32":
        raise ValueError(f"model_type {model_type!r} is not deepseek_v32: a model without this indexer")
    missing = sorted(set(_NAMES) - set(values))
    if missing:
        raise ValueError(f"no {', '.join(missing)}; restore the checkpoint's own config.json")
    fields = {ours: values[theirs] for theirs, ours in _NAMES.items()}
    quantisation = values.get("quantization_config")
    if quantisation is None:
        dtype = values.get("torch_dtype", values.get("dtype", "bfloat16"))
        if dtype not in _DTYPES:
            raise ValueError(f"torch_dtype {dtype!r}: use one of {', '.join(_DTYPES)}")
        fields["dtype"] = _DTYPES[dtype]
    else:
        fields["dtype"], fields["scale_fmt"] = "fp8", quantisation.get("scale_fmt")
    fields["max_seq_len"] = values.get("max_position_embeddings", ModelArgs.max_seq_len)
    return fields | _rope_fields(values)


def _rope_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN's, or those of plain rotary embeddings."""
    scaling = values.get("rope_scaling")
    if scaling is None:
        return {"rope_factor": 1.0, "original_seq_len": values.get("max_position_embeddings", 0)}
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        raise ValueError(f"rope_scaling of type {kind!r}: only yarn is known")
    return {ours: scaling[theirs] for theirs, ours in _ROPE_NAMES.items() if theirs in scaling}


def hf_config(args: ModelArgs, weights: Weights) -> dict[str, object]:
    """`config.json` of the same model, with the field names of Hugging Face's DeepseekV32."""
    config: dict[str, object] = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        **{theirs: getattr(args, ours) for theirs, ours in _NAMES.items()},
        "moe_layer_freq": 1,
        "num_key_value_heads": args.n_heads,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "max_position_embeddings": int(args.original_seq_len * args.rope_factor),
        "rope_scaling": _rope_scaling(args),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32" if weights == "fp32" else "bfloat16",
    }
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
    return {
        "type": "yarn",
        **{theirs: getattr(args, ours) for theirs, ours in _ROPE_NAMES.items()},
        "mscale_all_dim": args.mscale,
    }
