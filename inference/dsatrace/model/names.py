"""The tensors of a checkpoint, DeepSeek-V3.2's or GLM-5's: Hugging Face's name, ours, shape and split.

Knows names and shapes only. Our names are those of DeepSeek's demo.

    checkpoint_tensors(ModelArgs())["lm_head.weight"]
    # Target(name="head.weight", dim=0, shape=(129280, 7168), expert=None)
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .config import ModelArgs
from .hf_config import FP8_GROUP

EMBEDDING, HEAD = "embed.weight", "head.weight"

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

UNQUANTISED = (EMBEDDING, HEAD, "ffn.gate.weight", "attn.indexer.weights_proj.weight")
"""Ends of the names of matrices that stay in bf16 when the rest is fp8 (as the norms and biases do)."""


class Target(NamedTuple):
    """What a tensor becomes: split along `dim`, or whole on the rank of `expert`, or whole on every rank."""

    name: str
    dim: int | None
    shape: tuple[int, ...]  # of the whole tensor
    expert: int | None = None


def checkpoint_tensors(args: ModelArgs) -> dict[str, Target]:
    """Every tensor that a checkpoint of this model must hold, by its Hugging Face name.

    The scales of fp8 weights come on top. A layer that shares a selection has no indexer, and a
    model with tied embeddings no head.
    """
    shapes = _shapes(args)
    tensors: dict[str, Target] = {}

    def add(hf: str, name: str, dim: int | None, prefix: str = "", expert: int | None = None) -> None:
        shape = shapes[re.sub(r"\.\d+\.", ".", name)]
        tensors[hf] = Target(f"{prefix}{name}", dim, shape, expert)

    for hf, (name, dim) in MODEL.items():
        if not (args.tie_word_embeddings and name == HEAD):
            add(hf, name, dim)
    for layer, source in enumerate(args.source_layers):
        is_moe = layer >= args.n_dense_layers
        for hf, (name, dim) in {**ATTENTION, **(MOE if is_moe else DENSE)}.items():
            left_out = (source != layer and ".indexer." in name) or (
                args.n_shared_experts == 0 and ".shared_experts." in name
            )
            if not left_out:
                add(f"model.layers.{layer}.{hf}", name, dim, f"layers.{layer}.")
        for expert in range(args.n_routed_experts if is_moe else 0):
            experts = f"model.layers.{layer}.mlp.experts.{expert}"
            for hf, name in EXPERT.items():
                add(f"{experts}.{hf}", f"ffn.experts.{expert}.{name}", None, f"layers.{layer}.", expert)
    return tensors


def scale_of(hf_name: str, target: Target) -> tuple[str, Target]:
    """The fp8 scale that lies beside a weight: same split, since one scale serves a block of the weight."""
    blocks = tuple(-(-length // FP8_GROUP) for length in target.shape)
    name = f"{target.name.removesuffix('weight')}scale"
    return f"{hf_name}_scale_inv", target._replace(name=name, shape=blocks)


def _shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Of every kind of tensor, by our name without the numbers of layer and expert."""
    shared_dim = args.n_shared_experts * args.moe_inter_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (args.vocab_size, args.dim),
        "norm.weight": (args.dim,),
        "head.weight": (args.vocab_size, args.dim),
        "attn_norm.weight": (args.dim,),
        "ffn_norm.weight": (args.dim,),
        "attn.wq_a.weight": (args.q_lora_rank, args.dim),
        "attn.q_norm.weight": (args.q_lora_rank,),
        "attn.wq_b.weight": (args.n_heads * args.qk_head_dim, args.q_lora_rank),
        "attn.wkv_a.weight": (args.latent_dim, args.dim),
        "attn.kv_norm.weight": (args.kv_lora_rank,),
        "attn.wkv_b.weight": (args.n_heads * (args.qk_nope_head_dim + args.v_head_dim), args.kv_lora_rank),
        "attn.wo.weight": (args.dim, args.n_heads * args.v_head_dim),
        "attn.indexer.wq_b.weight": (args.index_n_heads * args.index_head_dim, args.q_lora_rank),
        "attn.indexer.wk.weight": (args.index_head_dim, args.dim),
        "attn.indexer.k_norm.weight": (args.index_head_dim,),
        "attn.indexer.k_norm.bias": (args.index_head_dim,),
        "attn.indexer.weights_proj.weight": (args.index_n_heads, args.dim),
        "ffn.gate.weight": (args.n_routed_experts, args.dim),
        "ffn.gate.bias": (args.n_routed_experts,),
    }
    for mlp, inter_dim in (
        ("ffn", args.inter_dim),
        ("ffn.experts", args.moe_inter_dim),
        ("ffn.shared_experts", shared_dim),
    ):
        shapes[f"{mlp}.w1.weight"] = shapes[f"{mlp}.w3.weight"] = (inter_dim, args.dim)
        shapes[f"{mlp}.w2.weight"] = (args.dim, inter_dim)
    return shapes
