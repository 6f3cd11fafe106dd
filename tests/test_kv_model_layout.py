"""Bytes of a token on one device against hand arithmetic; what is not understood is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsatrace.commands.study.size import layout_of
from dsatrace.errors import UserError
from dsatrace.kv.model_layout import MODELS, model_layout

GQA = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
    "sliding_window": None,
}
DSA = MODELS["deepseek-v3.2"]


@pytest.mark.parametrize(
    ("name", "dtype", "by_hand"),
    [
        ("deepseek-v3.2", None, 61 * (656 + 132)),  # fp8 latent 512, 4 scales, bf16 rope key; fp8 index key
        ("deepseek-v3.2", "bf16", 61 * (1152 + 132)),
        ("glm-5", "fp8", 78 * (512 + 4 * 4 + 64 * 2 + 128 + 4)),
    ],
)
def test_indexed_models(name: str, dtype: str | None, by_hand: int) -> None:
    assert layout_of(name, dtype, 1).bytes_per_token == by_hand


def test_latents_stand_on_every_rank_and_kv_heads_do_not() -> None:
    assert layout_of("deepseek-v3.2", None, 8).bytes_per_token == 61 * 788
    whole = 2 * 8 * 128 * 2 * 36
    for ranks, share in ((1, 1), (2, 2), (8, 8), (16, 8)):  # 16 ranks: each KV head stands on two
        assert model_layout("m", GQA, None, ranks).bytes_per_token * share == whole
    assert "every tensor parallel rank holds all of it" in layout_of("glm-5", None, 8).text()
    with pytest.raises(UserError, match="--tensor-parallel 3: does not split 8 KV heads"):
        model_layout("m", GQA, None, 3)


def test_number_formats_and_heads_of_a_config() -> None:
    assert model_layout("m", GQA, "fp8").bytes_per_token == 2 * 8 * 128 * 36
    assert model_layout("m", GQA | {"torch_dtype": "float32"}).bytes_per_token == 2 * 8 * 128 * 4 * 36
    of_hidden = {k: v for k, v in GQA.items() if k not in ("head_dim", "num_key_value_heads")}
    assert model_layout("m", of_hidden).bytes_per_token == 2 * 32 * (4096 // 32) * 2 * 36
    latent = {**DSA, "model_type": "deepseek_v3", "dtype": "bfloat16"}
    assert model_layout("m", latent).bytes_per_token == 61 * (512 + 64) * 2
    assert model_layout("m", latent, "fp8").bytes_per_token == 61 * (512 + 64)


def test_layers_that_share_a_selection_keep_no_index_key(tmp_path: Any) -> None:
    path = tmp_path / "config.json"
    kinds = ["full", "shared", "shared", "full"]
    path.write_text(json.dumps({**MODELS["glm-5"], "num_hidden_layers": 4, "indexer_types": kinds}))
    assert layout_of(str(path), None, 1).bytes_per_token == 4 * 656 + 2 * 132
    assert layout_of(str(tmp_path), None, 1).bytes_per_token == 4 * 656 + 2 * 132
    demo = {"dim": 7168, "n_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
    path.write_text(json.dumps(demo))
    assert layout_of(str(path), None, 1).bytes_per_token == 61 * 788


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_oss"}, "model_type 'gpt_oss' is not known"),
        ({"model_type": None}, "model_type None is not known"),
        ({"model_type": ["llama"]}, "model_type .'llama'. is not known"),
        ({"num_hidden_layers": "36"}, "num_hidden_layers must be a whole number of at least 1, not '36'"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number"),
        ({"sliding_window": 4096}, "sliding_window 4096: layers that keep a window"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types 'linear_attention'"),
        ({"head_dim": None, "hidden_size": 4097}, "hidden_size is no multiple of num_attention_heads"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not known; say --kv-dtype"),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, "kv_cache_scheme is not read"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_understood_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^--kv-layout m: .*{message}"):
        model_layout("m", GQA | change)


@pytest.mark.parametrize("kinds", [["full"] * 3, ["full", "half", "shared", "full"], "full"])
def test_indexers_that_are_told_wrongly_are_refused(tmp_path: Any, kinds: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**MODELS["glm-5"], "num_hidden_layers": 4, "indexer_types": kinds}))
    with pytest.raises(UserError, match=f"^--kv-layout {path}: indexer_types"):
        layout_of(str(path), None, 1)


def test_a_layer_count_that_no_model_has_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**DSA, "num_hidden_layers": 10**15}))
    with pytest.raises(UserError, match="num_hidden_layers 1000000000000000: at most 10000"):
        layout_of(str(path), None, 1)


def test_a_number_format_without_kernels_is_refused() -> None:
    with pytest.raises(UserError, match="--kv-dtype fp32: with an indexer use fp8 or bf16"):
        model_layout("m", DSA, "fp32")
