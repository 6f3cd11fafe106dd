"""How many bytes one token takes in one layer's KV cache, for each known cache layout.

Knows dimensions only: no tensor, no block. DSA keeps two rows per token and layer: the latent
(compressed KV and the shared rope key), read where selected, and the indexer's key, always read.

    layouts = named_layouts(kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128)
    layouts["serving_fp8"].bytes_per_token     # 788
"""

from __future__ import annotations

import dataclasses

BF16_BYTES = 2
FP8_BYTES = 1
SCALE_BYTES = 4
SCALE_GROUP = 128
"""Channels that share one fp32 scale."""


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Bytes of one token in one layer."""

    name: str
    latent_bytes_per_token: int
    index_bytes_per_token: int

    @property
    def bytes_per_token(self) -> int:
        return self.latent_bytes_per_token + self.index_bytes_per_token


def _fp8_row_bytes(channels: int) -> int:
    """An fp8 row with one fp32 scale per group of channels."""
    return channels * FP8_BYTES + -(-channels // SCALE_GROUP) * SCALE_BYTES


def named_layouts(kv_lora_rank: int, qk_rope_head_dim: int, index_head_dim: int) -> dict[str, CacheLayout]:
    """The layouts in use, by name, for a model of these dimensions.

    - `demo`: DeepSeek's demo, bf16 latent and rope key, fp8 indexer key;
    - `serving_fp8`: FlashMLA's sparse decode, fp8 latent with its scales, bf16 rope key, fp8 indexer key;
    - `plain_fp8`: latent and rope key fp8 with one scale per tensor, fp8 indexer key;
    - `hf_bf16`: transformers, everything bf16.
    """
    bf16_latent = (kv_lora_rank + qk_rope_head_dim) * BF16_BYTES
    fp8_latent = _fp8_row_bytes(kv_lora_rank) + qk_rope_head_dim * BF16_BYTES
    fp8_index = _fp8_row_bytes(index_head_dim)
    layouts = (
        CacheLayout("demo", bf16_latent, fp8_index),
        CacheLayout("serving_fp8", fp8_latent, fp8_index),
        CacheLayout("plain_fp8", (kv_lora_rank + qk_rope_head_dim) * FP8_BYTES, fp8_index),
        CacheLayout("hf_bf16", bf16_latent, index_head_dim * BF16_BYTES),
    )
    return {layout.name: layout for layout in layouts}
