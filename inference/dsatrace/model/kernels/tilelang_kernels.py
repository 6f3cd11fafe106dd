"""The tilelang backend: act_quant, fp8_gemm and fp8_index as Hopper kernels.

Knows the interface's shapes and the GPU's tiles. Imported only when asked for, by
`get_kernels("tilelang", "cuda")`. A shape or dtype that a kernel does not cover goes the
torch way, with the same result. Row counts, key counts and weight rows may be ragged.

    kernels = TilelangKernels("cuda")
    y, scale = kernels.act_quant(x, "ue8m0")

The kernels are written for TileLang 0.1.15. Two of its traps shape them: a
`{"kind": "cuda", "arch": ...}` target must be the accelerated `sm_90a`, and inside a
pipelined loop a copy from global memory into a fragment is moved to the producer warps,
where the consumer never sees it. So per-row operands pass through shared memory or are
read where they are used.
"""

# No `from __future__ import annotations`: TileLang reads the kernels' annotations as objects.

import functools
from collections.abc import Callable
from typing import Any

import tilelang
import tilelang.language as T
import torch
import torch.nn.functional as F

from dsatrace.model.kernels.interface import ScaleFormat
from dsatrace.model.kernels.torch_kernels import AMAX_FLOOR, BLOCK, FP8, FP8_MAX, TorchKernels

_FP8 = "float8_e4m3fn"
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_QUANT_ROWS = 32
_INDEX_KEYS = 128
_INDEX_ROWS = 8
_MAX_INDEX_HEADS = 128  # (keys, heads) fp32 products of one row must fit the registers of a warp group


class TilelangKernels(TorchKernels):
    """`Kernels` for one CUDA device. The interface says what each method promises."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            raise ValueError(
                f"kernel backend 'tilelang' needs a GPU with fp8 (compute capability 8.9 or newer), not "
                f"{major}.{minor}; use the backend 'torch'"
            )
        self._arch = f"sm_{major}{minor}" + ("a" if major >= 9 else "")

    @property
    def name(self) -> str:
        return "tilelang"

    def act_quant(
        self, x: torch.Tensor, scale_fmt: ScaleFormat, group: int = BLOCK
    ) -> tuple[torch.Tensor, torch.Tensor]:
        channels = x.shape[-1]
        group = min(group, channels)
        if x.dtype not in _DTYPES or group not in (32, 64, 128) or channels % group or not x.numel():
            return super().act_quant(x, scale_fmt, group)
        if scale_fmt not in ("ue8m0", None):
            raise ValueError(f"scale_fmt must be 'ue8m0' or None, not {scale_fmt!r}")
        rows = x.contiguous().view(-1, channels // group, group)  # (M, G, group)
        y = torch.empty_like(rows, dtype=FP8)
        scale = torch.empty(rows.shape[:2], dtype=torch.float32, device=x.device)
        compiled(act_quant_kernel, group, _DTYPES[x.dtype], scale_fmt == "ue8m0", arch=self._arch)(
            rows, y, scale
        )
        return y.view(x.shape), scale.view(*x.shape[:-1], -1)

    def fp8_gemm(
        self,
        a: torch.Tensor,
        a_scale: torch.Tensor,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        columns, inner = b.shape
        if (a.dtype, b.dtype) != (FP8, FP8) or inner % BLOCK or out_dtype not in _DTYPES or not a.numel():
            return super().fp8_gemm(a, a_scale, b, b_scale, out_dtype)
        rows = a.contiguous().view(-1, inner)
        out = torch.empty(rows.shape[0], columns, dtype=out_dtype, device=a.device)
        block_m = 64 if rows.shape[0] <= 64 else 128  # decode batches fit the least wgmma tile
        compiled(fp8_gemm_kernel, columns, inner, block_m, _DTYPES[out_dtype], arch=self._arch)(
            rows,
            a_scale.float().contiguous().view(-1, inner // BLOCK),
            b.contiguous(),
            b_scale.contiguous(),
            out,
        )
        return out.view(*a.shape[:-1], columns)

    def index_scores(
        self,
        q: torch.Tensor,
        weights: torch.Tensor,
        k: torch.Tensor,
        k_scale: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        num_rows, num_heads, dim = q.shape
        fits = dim in (32, 64, 128) and num_heads <= _MAX_INDEX_HEADS and num_rows * k.shape[0] > 0
        if (q.dtype, k.dtype) != (FP8, FP8) or weights.dtype == torch.float64 or not fits:
            return super().index_scores(q, weights, k, k_scale, out)
        padding = -num_heads % 8  # wgmma takes heads in eights; a head of weight zero adds nothing
        if padding:
            q = F.pad(q.view(torch.uint8), (0, 0, 0, padding)).view(FP8)
            weights = F.pad(weights, (0, padding))
        if k_scale is None:
            k_scale = torch.ones(k.shape[0], device=k.device)
        scores = torch.empty(num_rows, k.shape[0], dtype=torch.float32, device=q.device)
        compiled(fp8_index_kernel, num_heads + padding, dim, arch=self._arch)(
            q.contiguous(),
            weights.float().contiguous(),
            k.contiguous(),
            k_scale.float().contiguous(),
            scores,
        )
        return scores if out is None else out.copy_(scores)


@functools.cache
def compiled(factory: Callable[..., Any], *args: object, arch: str) -> Any:
    """The kernel that `factory(*args)` describes, compiled for a GPU such as `sm_90a`.

    Needs the CUDA compiler and no GPU. TileLang keeps the result on disk as well.
    """
    return tilelang.compile(factory(*args), target={"kind": "cuda", "arch": arch})


def act_quant_kernel(group: int, in_dtype: str, ue8m0: bool) -> Any:
    """X (M, G, group) to fp8 Y (M, G, group) and scales S (M, G); one block takes 32 rows of one group."""
    num_rows, num_groups = T.dynamic("num_rows"), T.dynamic("num_groups")

    @T.prim_func
    def act_quant(
        X: T.Tensor((num_rows, num_groups, group), in_dtype),  # type: ignore[valid-type]
        Y: T.Tensor((num_rows, num_groups, group), _FP8),  # type: ignore[valid-type]
        S: T.Tensor((num_rows, num_groups), "float32"),  # type: ignore[valid-type]
    ) -> None:
        with T.Kernel(num_groups, T.ceildiv(num_rows, _QUANT_ROWS), threads=128) as (column, block):
            x = T.alloc_fragment((_QUANT_ROWS, group), "float32")
            amax = T.alloc_fragment((_QUANT_ROWS,), "float32")
            scale = T.alloc_fragment((_QUANT_ROWS,), "float32")
            first = block * _QUANT_ROWS
            for i, j in T.Parallel(_QUANT_ROWS, group):
                x[i, j] = T.if_then_else(
                    first + i < num_rows, T.cast(X[first + i, column, j], "float32"), 0.0
                )
            T.reduce_absmax(x, amax, dim=1)
            for i in T.Parallel(_QUANT_ROWS):
                amax[i] = T.max(amax[i], AMAX_FLOOR)
                if ue8m0:
                    # 448 is 1.75 * 2^8: the carry reaches the exponent where amax's mantissa exceeds 1.75.
                    exponent = (T.reinterpret(amax[i], "int32") + 0x1FFFFF) >> 23
                    scale[i] = T.reinterpret((exponent - 8) << 23, "float32")
                else:
                    scale[i] = amax[i] / FP8_MAX
            for i, j in T.Parallel(_QUANT_ROWS, group):
                if first + i < num_rows:
                    Y[first + i, column, j] = T.cast(T.clamp(x[i, j] / scale[i], -FP8_MAX, FP8_MAX), _FP8)
            for i in T.Parallel(_QUANT_ROWS):
                if first + i < num_rows:
                    S[first + i, column] = scale[i]

    return act_quant


def fp8_gemm_kernel(columns: int, inner: int, block_m: int, out_dtype: str) -> Any:
    """A (M, K) times B (N, K) transposed, tiles of block_m x 128 x 128.

    Each 128 channels are summed on the tensor cores and then scaled into an fp32
    accumulator of their own: the cores' own sum keeps fewer bits than fp32.
    """
    num_rows = T.dynamic("num_rows")
    steps = inner // BLOCK
    row_blocks = -(-columns // BLOCK)

    @T.prim_func
    def fp8_gemm(
        A: T.Tensor((num_rows, inner), _FP8),  # type: ignore[valid-type]
        SA: T.Tensor((num_rows, steps), "float32"),  # type: ignore[valid-type]
        B: T.Tensor((columns, inner), _FP8),  # type: ignore[valid-type]
        SB: T.Tensor((row_blocks, steps), "float32"),  # type: ignore[valid-type]
        C: T.Tensor((num_rows, columns), out_dtype),  # type: ignore[valid-type]
    ) -> None:
        # Two warp groups share a tile of 128 rows; one has registers enough for 64.
        with T.Kernel(row_blocks, T.ceildiv(num_rows, block_m), threads=2 * block_m) as (column, block):
            a = T.alloc_shared((block_m, BLOCK), _FP8)
            b = T.alloc_shared((BLOCK, BLOCK), _FP8)
            part = T.alloc_fragment((block_m, BLOCK), "float32")
            total = T.alloc_fragment((block_m, BLOCK), "float32")
            scale = T.alloc_fragment((block_m,), "float32")
            first = block * block_m
            T.clear(total)
            for step in T.Pipelined(steps, num_stages=3):
                T.copy(A[first, step * BLOCK], a)
                T.copy(B[column * BLOCK, step * BLOCK], b)
                T.gemm(a, b, part, transpose_B=True, clear_accum=True)
                for i in T.Parallel(block_m):
                    scale[i] = (
                        T.if_then_else(first + i < num_rows, SA[first + i, step], 0.0) * SB[column, step]
                    )
                for i, j in T.Parallel(block_m, BLOCK):
                    total[i, j] += part[i, j] * scale[i]
            T.copy(total, C[first, column * BLOCK])

    return fp8_gemm


def fp8_index_kernel(num_heads: int, dim: int) -> Any:
    """Scores O (N, L) of Q (N, H, D), weights W (N, H), K (L, D), scales SK (L,).

    One block holds 128 keys in shared memory and streams 8 query rows past them; a row's
    heads are the short side of its matrix product, and summed where they lie.
    """
    num_rows, num_keys = T.dynamic("num_rows"), T.dynamic("num_keys")

    @T.prim_func
    def fp8_index(
        Q: T.Tensor((num_rows, num_heads, dim), _FP8),  # type: ignore[valid-type]
        W: T.Tensor((num_rows, num_heads), "float32"),  # type: ignore[valid-type]
        K: T.Tensor((num_keys, dim), _FP8),  # type: ignore[valid-type]
        SK: T.Tensor((num_keys,), "float32"),  # type: ignore[valid-type]
        O: T.Tensor((num_rows, num_keys), "float32"),  # type: ignore[valid-type]  # noqa: E741
    ) -> None:
        with T.Kernel(T.ceildiv(num_keys, _INDEX_KEYS), T.ceildiv(num_rows, _INDEX_ROWS), threads=128) as (
            column,
            block,
        ):
            k = T.alloc_shared((_INDEX_KEYS, dim), _FP8)
            q = T.alloc_shared((num_heads, dim), _FP8)
            w = T.alloc_shared((_INDEX_ROWS, num_heads), "float32")
            k_scale = T.alloc_fragment((_INDEX_KEYS,), "float32")
            dots = T.alloc_fragment((_INDEX_KEYS, num_heads), "float32")
            score = T.alloc_fragment((_INDEX_KEYS,), "float32")
            first_key, first_row = column * _INDEX_KEYS, block * _INDEX_ROWS
            T.copy(K[first_key, 0], k)
            T.copy(W[first_row, 0], w)
            T.copy(SK[first_key], k_scale)
            for r in T.Pipelined(T.min(_INDEX_ROWS, num_rows - first_row), num_stages=2):
                T.copy(Q[first_row + r, 0, 0], q)
                T.gemm(k, q, dots, transpose_B=True, clear_accum=True)
                for i, h in T.Parallel(_INDEX_KEYS, num_heads):
                    dots[i, h] = T.max(dots[i, h], 0.0) * w[r, h]
                T.reduce_sum(dots, score, dim=1)
                for i in T.Parallel(_INDEX_KEYS):
                    score[i] *= k_scale[i]
                T.copy(score, O[first_row + r, first_key])

    return fp8_index
