"""Model hyperparameters, with the field names of DeepSeek's demo.

Knows numbers only: no tensors, no files but the one JSON it reads.

    args = ModelArgs.from_json("config_tiny.json")
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

FP8_GROUP = 128
"""Channels that share one fp8 scale, and the side of a weight's scale block."""

WeightDtype = Literal["fp8", "bf16", "fp32", "fp64"]


@dataclasses.dataclass(frozen=True)
class ModelArgs:
    """Shape and numerics of one DeepSeek-V3.2 model.

    The first group is what `config_671B_v3.2.json` holds; the demo's dataclass
    defaults complete it. `max_seq_len` bounds the KV cache and nothing else: YaRN
    follows `original_seq_len` and `rope_factor`, so a shorter cache is the same model.
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
    beta_fast: int = 32
    beta_slow: int = 1
    mscale: float = 1.0
    norm_eps: float = 1e-6

    # Numerics that the released model has on, and an oracle without them needs off.
    index_fp8: bool = True
    index_hadamard: bool = True
    latent_fp8: bool = True
    # DeepSeek's first demo rotated the indexer in interleaved pairs, a bug fixed on 17 Nov 2025.
    index_rope: Literal["half_split", "interleaved"] = "half_split"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 0):
                raise ValueError(f"{field.name} must be an integer >= 0, not {value!r}")
        if self.dtype not in ("fp8", "bf16", "fp32", "fp64"):
            raise ValueError(f"dtype must be fp8, bf16, fp32 or fp64, not {self.dtype!r}")
        if self.scale_fmt not in ("ue8m0", None):
            raise ValueError(f"scale_fmt must be 'ue8m0' or null, not {self.scale_fmt!r}")
        if self.score_func not in ("sigmoid", "softmax"):
            raise ValueError(f"score_func must be sigmoid or softmax, not {self.score_func!r}")
        if self.index_rope not in ("half_split", "interleaved"):
            raise ValueError(f"index_rope must be half_split or interleaved, not {self.index_rope!r}")
        if self.n_layers < 1 or self.index_topk < 1 or self.max_seq_len < 1:
            raise ValueError("n_layers, index_topk and max_seq_len must be at least 1")
        if self.n_dense_layers > self.n_layers:
            raise ValueError(f"n_dense_layers {self.n_dense_layers} exceeds n_layers {self.n_layers}")
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > self.index_head_dim:
            raise ValueError(
                f"qk_rope_head_dim {self.qk_rope_head_dim} must be even and at most "
                f"index_head_dim {self.index_head_dim}"
            )
        if self.index_hadamard and self.index_head_dim & (self.index_head_dim - 1):
            raise ValueError(f"index_head_dim {self.index_head_dim} must be a power of two for the Hadamard")
        if self.n_layers > self.n_dense_layers:
            self._check_experts()

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
    def from_json(cls, path: str | Path, **overrides: object) -> ModelArgs:
        """Reads a config file, the demo's or a Hugging Face `config.json`; what is wrong with it
        raises `ValueError` naming the file, unknown keys of the demo's included."""
        from .hf_config import fields_of, is_hf_config

        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: cannot read the model config: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: a model config is a JSON object, not {type(values).__name__}")
        if is_hf_config(values):
            try:
                values = fields_of(values)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{path}: unknown model config keys {', '.join(unknown)}; remove them")
        try:
            return cls(**{**values, **overrides})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one cached latent row: the compressed KV and the shared rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def uses_yarn(self) -> bool:
        return self.rope_factor > 1.0
