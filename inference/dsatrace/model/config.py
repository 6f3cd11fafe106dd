"""Model hyperparameters, with the field names of DeepSeek's demo.

Knows numbers only: no tensors, no files but the one JSON it reads.

    args = ModelArgs.from_json("config_tiny.json")
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from .hf_config import MAX_LAYERS, ModelType, WeightDtype, fields_of, is_hf_config, without_keys

IndexerType = Literal["full", "shared"]
"""Whether a layer has an indexer, or uses the selection of the layer before it."""

KernelBackend = Literal["torch", "tilelang"]
"""What the kernels are written in; `torch` is the reference and runs everywhere."""

MAX_SIZE = 2**31 - 1
"""Of any whole number in a config: tensors are indexed by no more."""
PLAIN_NUMERICS: dict[str, Any] = {"index_fp8": False, "index_hadamard": False, "latent_fp8": False}
"""Overrides that turn the released model's roundings off; transformers has none of them."""

_CHOICES: dict[str, tuple[object, ...]] = {
    "dtype": get_args(WeightDtype),
    "scale_fmt": ("ue8m0", None),
    "score_func": ("sigmoid", "softmax"),
    "index_rope": ("half_split", "interleaved"),
    "model_type": get_args(ModelType),
}


@dataclasses.dataclass(frozen=True)
class ModelArgs:
    """Shape and numerics of one model with DeepSeek-V3.2's indexer.

    The first group is what `config_671B_v3.2.json` holds; the defaults are the demo's. `max_seq_len`
    bounds the KV cache and nothing else: YaRN follows `original_seq_len` and `rope_factor`.
    """

    vocab_size: int = 129280
    dim: int = 7168
    inter_dim: int = 18432
    moe_inter_dim: int = 2048
    n_layers: int = 61
    n_dense_layers: int = 3
    n_heads: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    n_activated_experts: int = 8
    n_expert_groups: int = 8
    n_limited_groups: int = 4
    route_scale: float = 2.5
    score_func: Literal["sigmoid", "softmax"] = "sigmoid"
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    dtype: WeightDtype = "fp8"
    scale_fmt: Literal["ue8m0"] | None = "ue8m0"
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048

    max_batch_size: int = 8
    max_seq_len: int = 16384
    original_seq_len: int = 4096
    rope_theta: float = 10000.0
    rope_factor: float = 40.0
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0  # YaRN's temperature of attention's scores
    rope_attention_factor: float = 1.0  # multiplies cos and sin under YaRN
    norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6  # of the norms within attention: of the query's and the KV's latent

    model_type: ModelType = "deepseek_v32"
    norm_topk_prob: bool = True  # weights of the chosen experts add up to 1; with softmax they never do
    tie_word_embeddings: bool = False  # the head is the embedding; a converted checkpoint holds both
    indexer_types: tuple[IndexerType, ...] | None = None  # a layer each; None: every layer has an indexer
    ignored_config_keys: tuple[str, ...] = ()  # of the config file, though not understood

    # Numerics that the released model has on, and an oracle without them needs off.
    index_fp8: bool = True
    index_hadamard: bool = True
    latent_fp8: bool = True
    # DeepSeek's first demo rotated the indexer in interleaved pairs, a bug fixed on 17 Nov 2025.
    index_rope: Literal["half_split", "interleaved"] = "half_split"

    def __post_init__(self) -> None:
        for name in ("indexer_types", "ignored_config_keys"):  # JSON has lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_types()
        if self.n_layers < 1 or self.index_topk < 1 or self.max_seq_len < 1:
            raise ValueError("n_layers, index_topk and max_seq_len must be at least 1")
        if self.n_layers > MAX_LAYERS:
            raise ValueError(f"n_layers {self.n_layers}: a model has at most {MAX_LAYERS} layers here")
        if self.n_dense_layers > self.n_layers:
            raise ValueError(f"n_dense_layers {self.n_dense_layers} exceeds n_layers {self.n_layers}")
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > self.index_head_dim:
            raise ValueError(
                f"qk_rope_head_dim {self.qk_rope_head_dim} must be even and at most "
                f"index_head_dim {self.index_head_dim}"
            )
        if self.index_hadamard and self.index_head_dim & (self.index_head_dim - 1):
            raise ValueError(
                f"index_head_dim {self.index_head_dim} must be a power of two for the Hadamard; "
                "without it: --numerics plain"
            )
        if self.n_layers > self.n_dense_layers:
            self._check_experts()
        self._check_indexers()

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or not 0 <= value <= MAX_SIZE):
                raise ValueError(f"{field.name} must be an integer from 0 to {MAX_SIZE}, not {value!r}")
            if field.type == "float" and (type(value) not in (int, float) or not 0 <= value < math.inf):
                raise ValueError(f"{field.name} must be a number >= 0, not {value!r}")
            if field.type == "bool" and type(value) is not bool:
                raise ValueError(f"{field.name} must be true or false, not {value!r}")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")

    def _check_indexers(self) -> None:
        if self.indexer_types is None:
            return
        if len(self.indexer_types) != self.n_layers:
            raise ValueError(
                f"indexer_types names {len(self.indexer_types)} layers, n_layers is {self.n_layers}"
            )
        for layer, kind in enumerate(self.indexer_types):
            if kind not in ("full", "shared"):
                raise ValueError(f"indexer_types must hold full and shared, not {kind!r} (layer {layer})")
        if self.indexer_types[0] != "full":
            raise ValueError("indexer_types: layer 0 is shared, but there is no layer before it")

    def _check_experts(self) -> None:
        if self.n_expert_groups < 1 or self.n_routed_experts % self.n_expert_groups:
            raise ValueError(
                f"n_routed_experts {self.n_routed_experts} does not divide into "
                f"n_expert_groups {self.n_expert_groups}"
            )
        if not 1 <= self.n_limited_groups <= self.n_expert_groups:
            raise ValueError(
                f"n_limited_groups {self.n_limited_groups} must lie in 1..{self.n_expert_groups}"
            )
        candidates = self.n_routed_experts // self.n_expert_groups * self.n_limited_groups
        if not 1 <= self.n_activated_experts <= candidates:
            raise ValueError(
                f"n_activated_experts {self.n_activated_experts} must lie in 1..{candidates}, "
                f"the experts of {self.n_limited_groups} groups"
            )

    @classmethod
    def from_json(cls, path: str | Path, ignore_keys: Sequence[str] = (), **overrides: object) -> ModelArgs:
        """Reads a config file, the demo's or a Hugging Face `config.json`.

        `overrides` are fields that win over the file's, such as `**PLAIN_NUMERICS`. Raises `ValueError`
        naming the file, also for a key that is not understood, unless `ignore_keys` names it.
        """
        values = read_config(path)
        try:
            values = without_keys(values, ignore_keys)
            if is_hf_config(values):
                values = fields_of(values)
            unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
            if unknown:
                raise ValueError(f"unknown model config keys {', '.join(unknown)}; remove them")
            return cls(**{**values, "ignored_config_keys": tuple(ignore_keys), **overrides})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def differences(self, other: ModelArgs) -> dict[str, tuple[object, object]]:
        """The fields that make `other` another model, each with both values.

        A run may choose number formats, the roundings of `PLAIN_NUMERICS`, how many tokens are selected
        and the size of the cache.
        """
        free = {"dtype", "scale_fmt", "max_batch_size", "max_seq_len", "ignored_config_keys", *PLAIN_NUMERICS}
        free |= {"index_topk", "tie_word_embeddings"}  # the second: a converted checkpoint holds both
        if not self.uses_yarn and not other.uses_yarn:
            free |= {"rope_factor", "original_seq_len", "beta_fast", "beta_slow", "mscale"}
        if self.source_layers == other.source_layers:  # said in two ways
            free |= {"indexer_types"}
        both = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)}
        return {name: (a, b) for name, (a, b) in both.items() if a != b and name not in free}

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one cached latent row: the compressed KV and the shared rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def source_layers(self) -> tuple[int, ...]:
        """Per layer, the layer whose indexer chooses for it: itself, or the last one before that has one."""
        sources: list[int] = []
        for layer in range(self.n_layers):
            shared = self.indexer_types is not None and self.indexer_types[layer] == "shared"
            sources.append(sources[-1] if shared else layer)
        return tuple(sources)

    @property
    def uses_yarn(self) -> bool:
        return self.rope_factor > 1.0


def read_config(path: str | Path) -> dict[str, Any]:
    """The JSON object of a config file; raises `ValueError` naming the file."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read the model config: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a model config is a JSON object, not {type(values).__name__}")
    return values
