"""What the model asks of a kernel backend; knows tensors and fp8 numbers, no backend."""

from __future__ import annotations

from typing import Literal, Protocol

import torch

ScaleFormat = Literal["ue8m0"] | None
"""How a group's scale is stored: rounded up to a power of two, or as it is."""


class Kernels(Protocol):
    """What the model asks of a backend.

    fp8 is e4m3 (largest value 448) throughout. A tensor of K channels has one fp32 scale
    for each group of 128, ceil(K / 128) of them; a weight (N, K) one for each block of
    128 x 128. The value that a pair stands for is `y * scale`.
    """

    @property
    def name(self) -> str:
        """The backend's name, a `KernelBackend`."""

    def act_quant(
        self, x: torch.Tensor, scale_fmt: ScaleFormat, group: int = 128
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantises x (..., K) to fp8 (..., K) and fp32 scales (..., ceil(K / group)).

        A group's scale is amax / 448 with amax at least 1e-4; under `ue8m0` it is rounded
        up to a power of two, exactly: 2^ceil(log2(amax / 448)). Values round to nearest,
        ties to even, in x's precision (fp32 for narrower dtypes), with one rounding only.
        x is finite and within fp32's range: the reference passes NaN on, device kernels need not.
        """

    def fake_quant(
        self, x: torch.Tensor, scale_fmt: ScaleFormat, group: int = 128
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`act_quant` whose fp8 values are left in x's dtype, for devices without fp8 arithmetic.

        Every e4m3 value is exact in bf16, fp16, fp32 and fp64, so the numbers are the same.
        """

    def through_fp8(self, x: torch.Tensor, scale_fmt: ScaleFormat) -> torch.Tensor:
        """x (..., K) as `act_quant` leaves it: its values times their scales, rounded to x's dtype."""

    def dequantise_weight(self, b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight that b (N, K) and b_scale (ceil(N / 128), ceil(K / 128)) stand for, in `dtype`."""

    def fp8_gemm(
        self,
        a: torch.Tensor,
        a_scale: torch.Tensor,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """(a * a_scale) @ (b * b_scale).T as (..., N), accumulated in fp32.

        a (..., K) with a_scale (..., ceil(K / 128)) is what `act_quant` gives; b (N, K) is
        an fp8 weight with its block scales. Values of `fake_quant` serve as well as fp8.
        """

    def index_scores(
        self,
        q: torch.Tensor,
        weights: torch.Tensor,
        k: torch.Tensor,
        k_scale: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The lightning indexer: score[n, l] = k_scale[l] * sum_h weights[n, h] * relu(q[n, h] . k[l]).

        q (N, H, D) and k (L, D) are fp8 or any float; weights (N, H) already hold the
        queries' scales, the head scale and the softmax scale, and may be negative; k_scale
        is (L,). Gives (N, L) in fp32, in fp64 if q, weights or k is, and writes into `out`
        when that is given. Sees no mask: a caller cuts what a query may not see. Extra
        memory is bounded and does not grow with N x H x L. Not differentiable.
        """

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """The Walsh-Hadamard transform of x (..., D), scaled by D^-0.5; D is a power of two."""
