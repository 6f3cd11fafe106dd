"""The tensors of a DeepSeek-V3.2 checkpoint: Hugging Face's name, ours, and the split dimension.

Knows names only. Ours are those of DeepSeek's demo.

    checkpoint_tensors(num_layers=61, moe_layers=range(3, 61), num_experts=256)["lm_head.weight"]
    # Target(name="head.weight", dim=0, expert=None)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

MODEL = {
    "model.embed_tokens.weight": ("embed.weight", 0),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("head.weight", 0),
}
ATTENTION = {
    "input_layernorm.weight": ("attn_norm.weight", None),
    "self_attn.q_a_proj.weight": ("attn.wq_a.weight", None),
    "self_attn.q_a_layernorm.weight": ("attn.q_norm.weight", None),
    "self_attn.q_b_proj.weight": ("attn.wq_b.weight", 0),
    "self_attn.kv_a_proj_with_mqa.weight": ("attn.wkv_a.weight", None),
    "self_attn.kv_a_layernorm.weight": ("attn.kv_norm.weight", None),
    "self_attn.kv_b_proj.weight": ("attn.wkv_b.weight", 0),
    "self_attn.o_proj.weight": ("attn.wo.weight", 1),
    "self_attn.indexer.wq_b.weight": ("attn.indexer.wq_b.weight", None),
    "self_attn.indexer.wk.weight": ("attn.indexer.wk.weight", None),
    "self_attn.indexer.k_norm.weight": ("attn.indexer.k_norm.weight", None),
    "self_attn.indexer.k_norm.bias": ("attn.indexer.k_norm.bias", None),
    "self_attn.indexer.weights_proj.weight": ("attn.indexer.weights_proj.weight", None),
    "post_attention_layernorm.weight": ("ffn_norm.weight", None),
}
DENSE = {
    "mlp.gate_proj.weight": ("ffn.w1.weight", 0),
    "mlp.down_proj.weight": ("ffn.w2.weight", 1),
    "mlp.up_proj.weight": ("ffn.w3.weight", 0),
}
MOE = {
    "mlp.gate.weight": ("ffn.gate.weight", None),
    "mlp.gate.e_score_correction_bias": ("ffn.gate.bias", None),
    "mlp.shared_experts.gate_proj.weight": ("ffn.shared_experts.w1.weight", 0),
    "mlp.shared_experts.down_proj.weight": ("ffn.shared_experts.w2.weight", 1),
    "mlp.shared_experts.up_proj.weight": ("ffn.shared_experts.w3.weight", 0),
}
# A routed expert lies whole on one rank, so it has no split dimension.
EXPERT = {
    "gate_proj.weight": "w1.weight",
    "down_proj.weight": "w2.weight",
    "up_proj.weight": "w3.weight",
}

UNQUANTISED = {"embed.weight", "head.weight", "ffn.gate.weight", "attn.indexer.weights_proj.weight"}
"""Matrices that stay in bf16 when the rest of the checkpoint is fp8 (as the norms and biases do)."""


class Target(NamedTuple):
    """What a tensor becomes: split along `dim`, or whole on the rank of `expert`, or whole on every rank."""

    name: str
    dim: int | None
    expert: int | None = None


def checkpoint_tensors(num_layers: int, moe_layers: Collection[int], num_experts: int) -> dict[str, Target]:
    """Every tensor a checkpoint of this shape holds, by its Hugging Face name; fp8 scales come on top."""
    tensors = {hf: Target(*target) for hf, target in MODEL.items()}
    for layer in range(num_layers):
        is_moe = layer in moe_layers
        for hf, (name, dim) in {**ATTENTION, **(MOE if is_moe else DENSE)}.items():
            tensors[f"model.layers.{layer}.{hf}"] = Target(f"layers.{layer}.{name}", dim)
        for expert in range(num_experts if is_moe else 0):
            for hf, name in EXPERT.items():
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{hf}"] = Target(
                    f"layers.{layer}.ffn.experts.{expert}.{name}", None, expert
                )
    return tensors


def scale_of(hf_name: str, target: Target) -> tuple[str, Target]:
    """The fp8 scale that lies beside a weight: same split, since one scale serves a block of the weight."""
    return f"{hf_name}_scale_inv", target._replace(name=f"{target.name.removesuffix('weight')}scale")
