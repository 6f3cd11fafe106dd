"""Rotary embeddings with YaRN, in the two layouts DeepSeek-V3.2 uses.

MLA rotates interleaved pairs (x0, x1), (x2, x3), ...; the indexer rotates the
half-split pairs (x0, x_{R/2}), .... Mixing them up gives plausible, wrong selections.
Source: YaRN (arXiv 2309.00071) as DeepSeek applies it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch

from .config import ModelArgs
from .hf_config import yarn_temperature
from .layers import cast

Table = tuple[torch.Tensor, torch.Tensor]
"""Cosine of each channel's angle, and its sine with the sign of its partner in the sum, `(..., R)`."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """What rows turn by, laid out once per step for both rotations and all layers."""

    interleaved: Table
    half_split: Table

    @functools.cached_property
    def per_head(self) -> Rope:
        """To broadcast over the heads of `(..., H, R)`."""
        return self.each(lambda table: table.unsqueeze(-2))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Rope:
        """All tables changed alike, such as cut to some rows."""
        (a, b), (c, d) = self.interleaved, self.half_split
        return Rope((change(a), change(b)), (change(c), change(d)))


def rope_frequencies(args: ModelArgs, dtype: torch.dtype) -> torch.Tensor:
    """Angle per position of each rotated pair, YaRN-stretched by the model's own limits. `(R/2,)`."""
    dim = args.qk_rope_head_dim
    freqs = args.rope_theta ** -(torch.arange(0, dim, 2, dtype=dtype, device="cpu") / dim)
    if not args.uses_yarn:
        return freqs

    def pair_with_rotations(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times over the original context."""
        return (
            dim
            * math.log(args.original_seq_len / (rotations * 2 * math.pi))
            / (2 * math.log(args.rope_theta))
        )

    low = max(math.floor(pair_with_rotations(args.beta_fast)), 0)
    high = min(math.ceil(pair_with_rotations(args.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=dtype, device="cpu") - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)  # 0: a fast pair, kept; 1: a slow pair, slowed by the factor
    return freqs * (1 - interpolated) + freqs / args.rope_factor * interpolated


def rope_of(args: ModelArgs, positions: torch.Tensor, frequencies: torch.Tensor) -> Rope:
    """The tables `(..., R)` of every position, in the dtype of `frequencies (R/2,)`."""
    angles = positions.unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    factor = args.rope_attention_factor
    if factor != 1.0 and args.uses_yarn:
        cos, sin = cos * factor, sin * factor
    signed = torch.stack((-sin, sin), dim=-1)  # (..., R/2, 2)
    return Rope(
        interleaved=(cos.repeat_interleave(2, dim=-1), signed.flatten(-2)),
        half_split=(torch.cat((cos, cos), dim=-1), signed.transpose(-1, -2).flatten(-2)),
    )


def softmax_scale(args: ModelArgs) -> float:
    """Attention's score scale, with YaRN's temperature squared."""
    scale: float = args.qk_head_dim**-0.5 * yarn_temperature(args.rope_factor, args.mscale) ** 2
    return scale


def rotate_interleaved(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotates the pairs (x[2i], x[2i+1]) of `x (..., R)`, against which the tables broadcast."""
    return _rotate(x, x.index_select(-1, _neighbours(x.shape[-1], x.device)), rope.interleaved)


def rotate_half_split(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotates the pairs (x[i], x[i + R/2]) of `x (..., R)`, against which the tables broadcast."""
    return _rotate(x, x.roll(x.shape[-1] // 2, -1), rope.half_split)


def _rotate(x: torch.Tensor, partners: torch.Tensor, table: Table) -> torch.Tensor:
    """Two products and a sum, each rounded: one that is fused gives other bits where rows are few."""
    cos, sin = table
    return cast((x * cos).add_(partners * sin), x.dtype)


@functools.cache
def _neighbours(width: int, device: torch.device) -> torch.Tensor:
    """1, 0, 3, 2, ...: each channel's partner."""
    with torch.inference_mode(False):  # a cached tensor outlives the caller's mode
        return torch.arange(width, device=device) ^ 1
