"""Tiny random models of every family of transformers that has an indexer, in fp32 on the CPU.

model = tiny_model("deepseek_v4")
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

VOCABULARY = 96
TOP_K = 8
END = 2
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
_MLA = _IDS | {
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": TOP_K,
    "max_position_embeddings": 512,
}
_V4 = _IDS | {
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "q_lora_rank": 16,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "o_groups": 2,
    "o_lora_rank": 16,
    "num_hash_layers": 0,
    "sliding_window": 8,
    "max_position_embeddings": 512,
    "layer_types": ["heavily_compressed_attention", *["compressed_sparse_attention"] * 4],
}
_M3 = _IDS | {
    "hidden_size": 32,
    "intermediate_size": 16,
    "dense_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_block_size": 4,
    "index_topk_blocks": 3,
    "index_local_blocks": 1,
    "max_position_embeddings": 512,
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
}
_QWEN = _IDS | {
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": TOP_K,
    "indexer_compress_ratio": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "max_position_embeddings": 512,
    "layer_types": ["indexed_attention", "linear_attention", "indexed_attention", "linear_attention"],
}
_SLIDING = {  # of the layers without an indexer
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "out_hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


class Family(NamedTuple):
    config: str  # class of the text config
    model: str  # class of the model
    settings: Mapping[str, Any]
    whole: str = ""  # class of the config that holds text and vision, where only that model generates
    unit_tokens: int = 1


FAMILIES = {
    "deepseek_v32": Family("DeepseekV32Config", "DeepseekV32ForCausalLM", _MLA),
    "glm_moe_dsa": Family("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM", _MLA | {"index_topk_freq": 2}),
    "axk2": Family("AXK2Config", "AXK2ForCausalLM", _MLA | {"n_group": None, "topk_group": None}),
    "hy_v4": Family("HYV4Config", "HYV4ForCausalLM", _MLA),
    "hy_v4_vl": Family(
        "HYV4VLTextConfig",
        "HYV4VLForConditionalGeneration",
        _MLA | {"rope_parameters": _MROPE},
        "HYV4VLConfig",
    ),
    "dots3_note": Family("Dots3NoteTextConfig", "Dots3NoteForCausalLM", _MLA | _SLIDING),
    "mistral_large4": Family(
        "MistralLarge4TextConfig",
        "MistralLarge4ForConditionalGeneration",
        _MLA | {"index_topk_freq": 2, "kv_source_layers": [0, 1, 1, 3]},
        "MistralLarge4Config",
    ),
    "deepseek_v4": Family("DeepseekV4Config", "DeepseekV4ForCausalLM", _V4, unit_tokens=4),
    "glm5_next": Family(
        "Glm5NextTextConfig",
        "Glm5NextForConditionalGeneration",
        _MLA
        | {
            "index_kpool": 4,
            "qk_rope_head_dim": 0,
            "linear_num_heads": 2,
            "linear_head_dim": 8,
            "layer_types": ["linear_attention", *["indexed_attention"] * 3],
            "indexer_types": ["full", "full", "shared", "full"],
        },
        "Glm5NextConfig",
        unit_tokens=4,
    ),
    "minimax_m3_vl": Family("MiniMaxM3VLTextConfig", "MiniMaxM3VLForCausalLM", _M3, unit_tokens=4),
    "qwen4_exp": Family("Qwen4ExpTextConfig", "Qwen4ExpForCausalLM", _QWEN, unit_tokens=4),
}
TOKEN_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.unit_tokens == 1)


def tiny_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of the family; `changes` are of its text config."""
    family = FAMILIES[name]
    configs = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    models = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    torch.manual_seed(seed)
    config = getattr(configs, family.config)(**{**family.settings, **changes})
    if family.whole:
        config = getattr(configs, family.whole)(text_config=config.to_dict(), vision_config=_VISION)
    model = getattr(models, family.model)(config).eval()
    model.generation_config.eos_token_id = None  # an answer goes on, unless the caller names an end
    model.generation_config.pad_token_id = 0
    return model
