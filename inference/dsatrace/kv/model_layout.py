"""How many bytes of KV cache one token takes on one device, over all layers of a model.

The model is told by its `config.json`: sparse attention with an indexer (a latent and an index key per
layer), latent attention without one, or grouped queries (keys and values of each KV head). Where tensor
parallel ranks serve a model, KV heads are split over them, and latents and index keys are not: each rank
holds all of them. Layers that predict further tokens are left out. Knows no file and no block.

    layout = model_layout("deepseek-v3.2", MODELS["deepseek-v3.2"])
    layout.bytes_per_token      # 61 x (656 + 132)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsatrace.errors import UserError
from dsatrace.kv.layout import named_layouts

DTYPE_BYTES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
_CONFIG_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

MAX_LAYERS = 10_000

INDEXED = ("deepseek_v32", "glm_moe_dsa")
LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite")
GROUPED = (
    *("cohere", "gemma", "glm", "glm4", "glm4_moe", "granite", "llama", "mistral", "mixtral", "olmo2"),
    *("phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
)
"""Values of `model_type` by what a layer keeps. Others may keep less in some layers, and are refused."""

_DSA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek-v3.2": {"model_type": "deepseek_v32", "num_hidden_layers": 61, **_DSA},
    "glm-5": {"model_type": "glm_moe_dsa", "num_hidden_layers": 78, **_DSA},
}
"""Models with a name: what their `config.json` says of the cache."""

INDEXED_LAYOUTS = {"fp8": "serving_fp8", "bf16": "demo"}
"""Of `kv.layout`, by the latent's number format: the index key is fp8 in both."""


class CacheRow(NamedTuple):
    """What a token leaves in some of the layers, on one device."""

    what: str
    num_bytes: int  # per layer
    layers: int


@dataclasses.dataclass(frozen=True)
class ModelLayout:
    """What a token leaves on one device."""

    name: str
    dtype: str
    rows: tuple[CacheRow, ...]
    is_split: bool  # over tensor parallel ranks
    tensor_parallel: int = 1

    @property
    def has_index(self) -> bool:
        return len(self.rows) > 1

    @property
    def bytes_per_token(self) -> int:
        return sum(row.num_bytes * row.layers for row in self.rows)

    def text(self) -> str:
        """The sum, and what a GiB per device means if there are several."""
        parts = " + ".join(f"{row.layers} layers x {row.num_bytes} ({row.what})" for row in self.rows)
        text = f"{self.name}, {self.dtype}: {self.bytes_per_token:,} bytes per token and device = {parts}"
        if not self.is_split:
            return f"{text}; every tensor parallel rank holds all of it"
        return f"{text}; KV heads split over {self.tensor_parallel} tensor parallel rank(s)"

    def describe(self) -> dict[str, Any]:
        """For the record."""
        rows = [row._asdict() for row in self.rows]
        return dataclasses.asdict(self) | {"rows": rows, "bytes_per_token": self.bytes_per_token}


def model_layout(
    name: str,
    values: Mapping[str, Any],
    dtype: str | None = None,
    tensor_parallel: int = 1,
    num_index_layers: int | None = None,
) -> ModelLayout:
    """Of a config's values; `num_index_layers` of them have an indexer's keys, by default all.

    The number format is by default the config's own, with an indexer fp8. Raises a `UserError` that
    begins with the flag for what is not understood.
    """
    where, kind = f"--kv-layout {name}", values.get("model_type")
    if kind not in (*INDEXED, *LATENT, *GROUPED):
        known = ", ".join((*INDEXED, *LATENT, *GROUPED))
        raise UserError(f"{where}: model_type {kind!r} is not known here; known are {known}")
    layers = _whole(where, values, "num_hidden_layers")
    if layers > MAX_LAYERS:
        raise UserError(f"{where}: num_hidden_layers {layers}: at most {MAX_LAYERS} are taken for a model's")
    if kind in GROUPED:
        dtype = dtype or _own_dtype(where, values)
        row = _grouped(where, values, layers, dtype, tensor_parallel)
        return ModelLayout(name, dtype, (row,), True, tensor_parallel)
    latent, rope = (_whole(where, values, key) for key in ("kv_lora_rank", "qk_rope_head_dim"))
    if kind in LATENT:
        dtype = dtype or _own_dtype(where, values)
        row = CacheRow("latent and rope key", (latent + rope) * DTYPE_BYTES[dtype], layers)
        return ModelLayout(name, dtype, (row,), False, tensor_parallel)
    dtype = dtype or "fp8"
    if dtype not in INDEXED_LAYOUTS:
        raise UserError(f"--kv-dtype {dtype}: with an indexer use {' or '.join(INDEXED_LAYOUTS)}")
    layout = named_layouts(latent, rope, _whole(where, values, "index_head_dim"))[INDEXED_LAYOUTS[dtype]]
    scales = ", scales" if dtype == "fp8" else ""
    rows = (
        CacheRow(f"latent, rope key{scales}", layout.latent_bytes_per_token, layers),
        CacheRow(
            "index key, scale",
            layout.index_bytes_per_token,
            layers if num_index_layers is None else num_index_layers,
        ),
    )
    return ModelLayout(name, dtype, rows, False, tensor_parallel)


def _grouped(where: str, values: Mapping[str, Any], layers: int, dtype: str, ranks: int) -> CacheRow:
    """Keys and values of the KV heads that one rank holds, a whole number of them, at least one."""
    window = values.get("sliding_window")
    if window is not None and values.get("use_sliding_window", True):
        raise UserError(
            f"{where}: sliding_window {window}: layers that keep a window only are not known here"
        )
    kinds = values.get("layer_types") or []
    strange = [kind for kind in kinds if kind != "full_attention"] if isinstance(kinds, list) else [kinds]
    if strange:
        raise UserError(f"{where}: layer_types {strange[0]!r}: only full_attention is known here")
    heads = _whole(where, values, "num_attention_heads")
    kv_heads = (
        heads if values.get("num_key_value_heads") is None else _whole(where, values, "num_key_value_heads")
    )
    if values.get("head_dim") is None:
        head_dim, rest = divmod(_whole(where, values, "hidden_size"), heads)
        if rest:
            raise UserError(
                f"{where}: hidden_size is no multiple of num_attention_heads, and there is no head_dim"
            )
    else:
        head_dim = _whole(where, values, "head_dim")
    if kv_heads % ranks and ranks % kv_heads:
        raise UserError(f"--tensor-parallel {ranks}: does not split {kv_heads} KV heads evenly")
    own = max(1, kv_heads // ranks)
    return CacheRow(f"2 x {own} KV heads x {head_dim}", 2 * own * head_dim * DTYPE_BYTES[dtype], layers)


def _own_dtype(where: str, values: Mapping[str, Any]) -> str:
    """The config's number format, which an engine takes for the cache unless it is told another."""
    quantization = values.get("quantization_config") or {}
    if isinstance(quantization, Mapping) and quantization.get("kv_cache_scheme") is not None:
        raise UserError(f"{where}: quantization_config.kv_cache_scheme is not read; say --kv-dtype")
    given = values.get("dtype") or values.get("torch_dtype")
    if given not in _CONFIG_DTYPES:
        raise UserError(f"{where}: dtype {given!r} is not known; say --kv-dtype {', '.join(DTYPE_BYTES)}")
    return _CONFIG_DTYPES[given]


def _whole(where: str, values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {key} must be a whole number of at least 1, not {value!r}")
    return value
