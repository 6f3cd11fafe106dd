"""Bytes a token and layer, for the real model and any other."""

from __future__ import annotations

from dsatrace.kv.layout import named_layouts


def test_the_real_models_bytes() -> None:
    layouts = named_layouts(kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128)
    assert {name: layout.bytes_per_token for name, layout in layouts.items()} == {
        "demo": 1284,
        "serving_fp8": 788,
        "hf_bf16": 1408,
    }
    assert [layouts[name].latent_bytes_per_token for name in layouts] == [1152, 656, 1152]
    assert [layouts[name].index_bytes_per_token for name in layouts] == [132, 132, 256]


def test_other_dimensions() -> None:
    layouts = named_layouts(kv_lora_rank=64, qk_rope_head_dim=16, index_head_dim=160)
    assert layouts["demo"].latent_bytes_per_token == 160
    assert layouts["demo"].index_bytes_per_token == 160 + 2 * 4  # two groups of at most 128 channels
    assert layouts["serving_fp8"].latent_bytes_per_token == 64 + 4 + 32
    assert layouts["hf_bf16"].index_bytes_per_token == 320
