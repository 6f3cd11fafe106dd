"""The tilelang kernels: that they compile for Hopper without a GPU, and on one agree with torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsatrace.model.kernels import get_kernels
from dsatrace.model.kernels.interface import Kernels, ScaleFormat

pytest.importorskip("tilelang", reason="tilelang is not installed: pip install 'dsatrace[gpu]'")

from tilelang.contrib import nvcc

from dsatrace.model.kernels import tilelang_kernels as tk

FP8 = torch.float8_e4m3fn
TORCH = get_kernels("torch")
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def cuda_source(factory: Callable[..., Any], *args: object) -> str:
    try:
        nvcc.find_cuda_path()
    except RuntimeError as error:
        pytest.skip(f"no CUDA compiler: {error}")
    source: str = tk.compiled(factory, *args, arch="sm_90a").get_kernel_source()
    return source[source.index('extern "C"') :]


def assert_fragments_are_filled(source: str) -> None:
    """TileLang 0.1.15 can load a fragment in the producer warps and read its empty twin in the consumers."""
    assert "_producer_ws" not in source
    for name in re.findall(r"^  float (\w+)\[\d+\];", source, flags=re.MULTILINE):
        store = rf"\*\(float\d\*\)\({name} [^=;]*\) = |\b{name}\[[^=;]*\] = |\(uint32_t\*\)\({name} "
        assert re.search(store, source), f"{name} is read and never written"


@pytest.mark.parametrize(("group", "dtype", "ue8m0"), [(128, "bfloat16", True), (64, "float32", False)])
def test_act_quant_compiles_for_sm_90(group: int, dtype: str, ue8m0: bool) -> None:
    source = cuda_source(tk.act_quant_kernel, group, dtype, ue8m0)
    assert "fp8_e4_t* __restrict__ Y" in source
    assert "__NV_E4M3" in source
    assert ("<< 23" in source) == ue8m0
    assert_fragments_are_filled(source)


@pytest.mark.parametrize(("columns", "block_m", "dtype"), [(576, 128, "bfloat16"), (1536, 64, "float32")])
def test_fp8_gemm_compiles_for_sm_90(columns: int, block_m: int, dtype: str) -> None:
    source = cuda_source(tk.fp8_gemm_kernel, columns, 2048, block_m, dtype)
    assert "wgmma_ss<tl::DataType::kFloat8_e4m3, tl::DataType::kFloat8_e4m3, tl::DataType::kFloat32" in source
    assert "tma_load" in source
    assert_fragments_are_filled(source)


@pytest.mark.parametrize(("num_heads", "dim"), [(64, 128), (8, 32)])
def test_fp8_index_compiles_for_sm_90(num_heads: int, dim: int) -> None:
    source = cuda_source(tk.fp8_index_kernel, num_heads, dim)
    assert "wgmma_ss<tl::DataType::kFloat8_e4m3, tl::DataType::kFloat8_e4m3, tl::DataType::kFloat32" in source
    assert "fp8_e4_t*)k" in source
    assert_fragments_are_filled(source)


@pytest.fixture(scope="module")
def on_gpu() -> Kernels:
    return get_kernels("tilelang", "cuda")


@pytest.mark.parametrize("scale_fmt", ["ue8m0", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 128), (33, 7168), (5, 3, 64), (3, 300), (0, 128)])
class TestActQuant:
    pytestmark = needs_gpu

    def test_matches_torch(
        self, on_gpu: Kernels, shape: tuple[int, ...], dtype: torch.dtype, scale_fmt: ScaleFormat
    ) -> None:
        x = (torch.randn(shape, device="cuda") * 20).to(dtype)
        x.view(-1)[:4] = 0
        y, scale = on_gpu.act_quant(x, scale_fmt)
        expected, expected_scale = TORCH.act_quant(x, scale_fmt)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(y.float(), expected.float())


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 576, 7168), (65, 200, 256), (300, 1536, 2048)])
class TestFp8Gemm:
    pytestmark = needs_gpu

    def test_matches_torch(
        self, on_gpu: Kernels, rows: int, columns: int, inner: int, out_dtype: torch.dtype
    ) -> None:
        a, a_scale = TORCH.act_quant(torch.randn(rows, inner, device="cuda"), "ue8m0")
        b = torch.randn(columns, inner, device="cuda").to(FP8)
        b_scale = torch.rand(-(-columns // 128), inner // 128, device="cuda") + 0.1
        out = on_gpu.fp8_gemm(a, a_scale, b, b_scale, out_dtype)
        expected = TORCH.fp8_gemm(a, a_scale, b, b_scale, torch.float32)
        # fp8 tensor cores keep some 14 bits inside one product of 128 channels.
        error = (out.float() - expected).abs().max() / expected.abs().max()
        assert error < (4e-3 if out_dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    ("rows", "num_heads", "dim", "num_keys"),
    [(1, 64, 128, 1), (1, 64, 128, 5000), (9, 8, 32, 129), (17, 4, 64, 300), (250, 64, 128, 2049)],
)
class TestIndexScores:
    pytestmark = needs_gpu

    def test_matches_torch(
        self, on_gpu: Kernels, rows: int, num_heads: int, dim: int, num_keys: int, scaled: bool
    ) -> None:
        q = torch.randn(rows, num_heads, dim, device="cuda").to(FP8)
        k = torch.randn(num_keys, dim, device="cuda").to(FP8)
        weights = torch.randn(rows, num_heads, device="cuda")
        k_scale = torch.rand(num_keys, device="cuda") if scaled else None
        scores = on_gpu.index_scores(q, weights, k, k_scale)
        expected = TORCH.index_scores(q, weights, k, k_scale)
        assert (scores - expected).abs().max() < 5e-4 * expected.abs().max().clamp_min(1.0) * num_heads**0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_hadamard_on_a_gpu_is_the_matmul(on_gpu: Kernels) -> None:
    x = torch.randn(40, 128, device="cuda")
    torch.testing.assert_close(on_gpu.hadamard(x).cpu(), TORCH.hadamard(x.cpu()), rtol=1e-4, atol=1e-4)
