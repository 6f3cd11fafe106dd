"""The reference backend: the interface's arithmetic in plain torch, on any device.

Knows nothing of where its tensors come from. What the other backends compute is tested
against this file, so it is written to be read; only `index_scores`, the hot spot of
prefill and decode on a CPU, is also written to be fast.

    y, scale = TorchKernels().fake_quant(torch.randn(4, 256), "ue8m0")
    assert scale.shape == (4, 2)
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from dsatrace.model.kernels.interface import ScaleFormat

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK = 128
"""Channels of an activation under one scale, and the side of a weight's scale block."""
AMAX_FLOOR = 1e-4
FEW_VALUES = 1024
"""Below, a cast from fp8 takes less than the steps of the way through a table."""

# One tile of (rows x heads, keys) products. On a CPU it stays in the L2 cache (2 MiB of fp32), shaped
# so that both sides of the matrix product are long; on a GPU it only has to bound the memory (256 MiB).
_TILE_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
_TILE_HEAD_ROWS = {"cpu": 1024, "cuda": 2**14}

# Weights dequantised at a time, at least 128 rows. On a CPU a band (1 MiB of fp32) is still in the cache when
# it is multiplied, and its memory is used again for the next: that of a whole weight comes from the system
# page by page, which costs more than all the rest. On a GPU, where each band starts some kernels, 256 MiB.
_BAND_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}


class TorchKernels:
    """`Kernels` in torch. The interface says what each method promises."""

    @property
    def name(self) -> str:
        return "torch"

    def act_quant(
        self, x: torch.Tensor, scale_fmt: ScaleFormat, group: int = BLOCK
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ratio, scale = _scaled(x, scale_fmt, group)
        # torch casts fp64 to fp8 by way of fp32, which can round twice.
        y = (_round_to_e4m3(ratio) if ratio.dtype == torch.float64 else ratio).to(FP8)
        return _ungrouped(y, scale, x)

    def fake_quant(
        self, x: torch.Tensor, scale_fmt: ScaleFormat, group: int = BLOCK
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ratio, scale = _scaled(x, scale_fmt, group)
        return _ungrouped(_rounded(ratio, x.dtype), scale, x)

    def through_fp8(self, x: torch.Tensor, scale_fmt: ScaleFormat) -> torch.Tensor:
        ratio, scale = _scaled(x, scale_fmt, BLOCK)
        return _widen(_ungrouped(_rounded(ratio, ratio.dtype).mul_(scale), scale, x)[0], x.dtype)

    def dequantise_weight(self, b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(b.shape, dtype=dtype, device=b.device)
        for rows, band in _dequantised_bands(b, b_scale, torch.promote_types(dtype, torch.float32)):
            out[rows] = band
        return out

    def fp8_gemm(
        self,
        a: torch.Tensor,
        a_scale: torch.Tensor,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        dtype = _compute_dtype(a, b)
        spread = a_scale.to(dtype).repeat_interleave(BLOCK, dim=-1)[..., : a.shape[-1]]  # (..., K)
        a = _widen(a, dtype) * spread
        out = torch.empty(*a.shape[:-1], b.shape[0], dtype=out_dtype, device=a.device)
        for rows, band in _dequantised_bands(b, b_scale, dtype):
            out[..., rows] = F.linear(a, band)
        return out

    def index_scores(
        self,
        q: torch.Tensor,
        weights: torch.Tensor,
        k: torch.Tensor,
        k_scale: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        num_rows, num_heads, _ = q.shape
        num_keys = k.shape[0]
        dtype = _compute_dtype(q, weights, k)
        q, weights = _widen(q, dtype), _widen(weights, dtype)
        rows, keys = _tile_shape(num_rows, num_heads, num_keys, q.device)
        if out is None and rows >= num_rows and keys >= num_keys:  # decode, mostly
            return _tile_scores(q, weights, _widen(k, dtype), k_scale)
        if out is None:
            out = torch.empty(num_rows, num_keys, dtype=dtype, device=q.device)
        for key in range(0, num_keys, keys):
            span = slice(key, key + keys)
            tile_k = _widen(k[span], dtype)
            tile_scale = None if k_scale is None else k_scale[span]
            for row in range(0, num_rows, rows):
                part = slice(row, row + rows)
                out[part, span] = _tile_scores(q[part], weights[part], tile_k, tile_scale)
        return out

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        dim = x.shape[-1]
        if dim < 1 or dim & (dim - 1):
            raise ValueError(f"a Hadamard transform needs a power of two, not {dim} channels")
        if x.is_cuda and x.dtype != torch.float64 and _has_fast_hadamard():
            fast = importlib.import_module("fast_hadamard_transform")
            transformed: torch.Tensor = fast.hadamard_transform(x, dim**-0.5)
            return transformed
        # Half precision is transformed in fp32, as the CUDA kernel does, so that it rounds once.
        wide = _compute_dtype(x)
        return _widen(_widen(x, wide) @ _hadamard_matrix(dim, wide, x.device), x.dtype)


def _compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _dequantised_bands(
    b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The weight b (N, K) with its scales in `dtype`, some of its rows at a time: which, and (rows, K)."""
    num_rows, columns = b.shape
    expected = (-(-num_rows // BLOCK), -(-columns // BLOCK))
    if tuple(b_scale.shape) != expected:
        raise ValueError(
            f"a weight of shape ({num_rows}, {columns}) has scales of shape {expected}, not "
            f"{tuple(b_scale.shape)}"
        )
    by_column = b_scale.to(dtype).repeat_interleave(BLOCK, dim=1)[:, :columns]  # (ceil(N / 128), K)
    blocks = max(1, _BAND_ELEMENTS["cuda" if b.is_cuda else "cpu"] // (BLOCK * columns))
    for first in range(0, len(by_column), blocks):
        rows = slice(first * BLOCK, min((first + blocks) * BLOCK, num_rows))
        scale = by_column[first : first + blocks].unsqueeze(1).expand(-1, BLOCK, -1).flatten(0, 1)
        yield rows, _widen(b[rows], dtype) * scale[: rows.stop - rows.start]


def _tile_shape(num_rows: int, num_heads: int, num_keys: int, device: torch.device) -> tuple[int, int]:
    """Query rows and keys of one tile, each at least 1."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    rows = max(1, min(num_rows, _TILE_HEAD_ROWS[kind] // num_heads))
    keys = max(1, min(num_keys, _TILE_ELEMENTS[kind] // (rows * num_heads)))
    return rows, keys


def _tile_scores(
    q: torch.Tensor, weights: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor | None
) -> torch.Tensor:
    """`index_scores` of one tile, all of it in memory, one dtype throughout.

    Folding |weights| into q is no faster, and would round q . k where fp8 operands leave it
    exact in fp32. Head by head is up to twice as slow; so is keys first at 8 heads of 32,
    though at 4 heads of 64 it is a quarter faster.
    """
    num_rows, num_heads, dim = q.shape
    dots = F.linear(q.reshape(num_rows * num_heads, dim), k).relu_()  # (N x H, L)
    if num_rows == 1:
        scores = torch.mm(weights, dots)
    else:
        scores = torch.bmm(weights.unsqueeze(1), dots.view(num_rows, num_heads, -1)).squeeze(1)
    return scores if k_scale is None else scores.mul_(k_scale)


def _scaled(x: torch.Tensor, scale_fmt: ScaleFormat, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x / scale in at least fp32, not yet rounded, and the scales: (..., G, group) and (..., G, 1).

    One group that is all of x (..., K) stays (..., K), with scales (..., 1). A quotient exceeds 448 by
    a rounding error at most, so that e4m3 rounds it to 448.
    """
    if scale_fmt not in ("ue8m0", None):
        raise ValueError(f"scale_fmt must be 'ue8m0' or None, not {scale_fmt!r}")
    channels = x.shape[-1]
    grouped = _widen(x, _compute_dtype(x))
    if channels % group and channels > group:
        grouped = F.pad(grouped, (0, -channels % group))  # zeros leave a partial group's maximum alone
    if channels > group:
        grouped = grouped.unflatten(-1, (-1, group))
    amax = grouped.abs().amax(dim=-1, keepdim=True).clamp_min_(AMAX_FLOOR)
    scale = _power_of_two_scale(amax) if scale_fmt == "ue8m0" else (amax / FP8_MAX).float()
    return grouped / scale, scale


def _ungrouped(
    grouped: torch.Tensor, scale: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_scaled` has grouped in x's shape (..., K), and its scales (..., G)."""
    if grouped.dim() == x.dim():
        return grouped, scale
    return grouped.flatten(-2)[..., : x.shape[-1]], scale.squeeze(-1)


def _power_of_two_scale(amax: torch.Tensor) -> torch.Tensor:
    """2^ceil(log2(amax / 448)) in fp32, exactly: on the bits of amax, with neither logarithm nor division.

    448 is 1.75 * 2^8. The carry reaches amax's exponent just where its mantissa exceeds 1.75; what is left
    of the mantissa is cut off.
    """
    bits, integer = (52, torch.int64) if amax.dtype == torch.float64 else (23, torch.int32)
    carry = (1 << (bits - 2)) - 1 - (8 << bits)
    scale: torch.Tensor = (amax.view(integer) + carry).bitwise_and_(-(1 << bits)).view(amax.dtype)
    return scale if scale.dtype == torch.float32 else scale.float()


def _rounded(ratio: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest e4m3 values of `ratio`, in `dtype`; fp64 stays in fp64."""
    return _round_to_e4m3(ratio) if ratio.dtype == torch.float64 else _widen(ratio.to(FP8), dtype)


def _round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """fp64 of at most 448 to the nearest e4m3 value, ties to even, left in fp64.

    Three mantissa bits make steps of 1/8 of the power of two below x; under the least
    normal, 2^-6, the steps stay 2^-9.
    """
    _, exponent = torch.frexp(x)  # |x| in [2^(exponent - 1), 2^exponent)
    step_exponent = (exponent - 4).clamp_min(-9).to(torch.int64)
    step = ((step_exponent + 1023) << 52).view(torch.float64)
    return torch.round(x / step) * step


@functools.cache
def _e4m3_values() -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8).view(FP8).to(torch.float32)


def _widen(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in `dtype`. Much fp8 on a CPU goes through a table of its 256 values: 5x faster than torch's cast."""
    if x.dtype == dtype:
        return x
    if x.dtype != FP8 or x.device.type != "cpu" or x.numel() < FEW_VALUES:
        return x.to(dtype)
    codes = x.view(torch.uint8).to(torch.int32).flatten()
    return _widen(_e4m3_values().index_select(0, codes).view(x.shape), dtype)


@functools.cache
def _has_fast_hadamard() -> bool:
    return importlib.util.find_spec("fast_hadamard_transform") is not None


@functools.cache
def _hadamard_matrix(dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix over sqrt(dim): entry (i, j) is negative where i & j has an odd number of ones."""
    with torch.inference_mode(False):  # a cached tensor outlives the caller's mode
        matrix: torch.Tensor = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < dim:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        scaled: torch.Tensor = matrix * dim**-0.5
        return scaled.to(device=device, dtype=dtype)
