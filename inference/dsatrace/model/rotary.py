"""Rotary embeddings with YaRN, in the two layouts DeepSeek-V3.2 uses.

MLA rotates interleaved pairs (x0, x1), (x2, x3), ...; the indexer rotates the
half-split pairs (x0, x_{R/2}), .... Mixing them up gives plausible, wrong selections.
Source: YaRN (arXiv 2309.00071) as DeepSeek applies it.
"""

from __future__ import annotations

import math

import torch

from .config import ModelArgs
from .hf_config import yarn_temperature

Rope = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine `(N, R/2)` of N rows' positions."""


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


def rope_angles(args: ModelArgs, positions: torch.Tensor, frequencies: torch.Tensor) -> Rope:
    """Cosine and sine of every position's angles, each `(..., R/2)`, in the frequencies' dtype."""
    angles = positions.unsqueeze(-1).to(frequencies.dtype) * frequencies
    factor = args.rope_attention_factor
    if factor == 1.0 or not args.uses_yarn:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def softmax_scale(args: ModelArgs) -> float:
    """Attention's score scale, with YaRN's temperature squared."""
    scale: float = args.qk_head_dim**-0.5 * yarn_temperature(args.rope_factor, args.mscale) ** 2
    return scale


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (x[2i], x[2i+1]) of `x (..., R)`; `cos`, `sin (..., R/2)` broadcast against it."""
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def rotate_half_split(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (x[i], x[i + R/2]) of `x (..., R)`; `cos`, `sin (..., R/2)` broadcast against it."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
