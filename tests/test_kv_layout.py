"""Bytes a token and layer, for the real model and any other."""

from __future__ import annotations

from dsatrace.kv.layout import named_layouts

REAL = named_layouts(kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128)


def test_the_real_models_bytes() -> None:
    assert list(REAL) == ["demo", "serving_fp8", "plain_fp8", "hf_bf16"]
    assert [layout.bytes_per_token for layout in REAL.values()] == [1284, 788, 708, 1408]
    assert [layout.latent_bytes_per_token for layout in REAL.values()] == [1152, 656, 576, 1152]
    assert [layout.index_bytes_per_token for layout in REAL.values()] == [132, 132, 132, 256]


def test_published_totals() -> None:
    """Bytes per token over all layers: DeepSeek-V3.2's 61, and GLM-5.2's 78 of the same dimensions."""
    latents = [61 * layout.latent_bytes_per_token for layout in REAL.values()]
    assert latents == [70_272, 40_016, 35_136, 70_272]
    assert 61 * REAL["serving_fp8"].index_bytes_per_token == 8_052
    assert 61 * REAL["hf_bf16"].index_bytes_per_token == 15_616
    serving = REAL["serving_fp8"]
    share = serving.index_bytes_per_token / serving.bytes_per_token
    assert round(share, 3) == 0.168  # what ESS (arXiv 2512.10576) reports
    assert abs(78 * REAL["plain_fp8"].bytes_per_token - 55_225) <= 1  # sgl-project/sglang #30531


def test_other_dimensions() -> None:
    layouts = named_layouts(kv_lora_rank=64, qk_rope_head_dim=16, index_head_dim=160)
    assert layouts["demo"].latent_bytes_per_token == 160
    assert layouts["demo"].index_bytes_per_token == 160 + 2 * 4  # two groups of at most 128 channels
    assert layouts["serving_fp8"].latent_bytes_per_token == 64 + 4 + 32
    assert layouts["hf_bf16"].index_bytes_per_token == 320
