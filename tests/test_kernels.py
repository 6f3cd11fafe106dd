"""The torch kernels against definitions written out: loops, exact fractions, float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dsatrace.model.kernels import get_kernels, torch_kernels
from dsatrace.model.kernels.interface import ScaleFormat
from helpers.power import examples

FP8 = torch.float8_e4m3fn
KERNELS = get_kernels("torch")
FINITE = [
    (code, Fraction(v))
    for code in range(127)
    for v in [(2.0 ** max((code >> 3) - 7, -6)) * ((code & 7) / 8 + (code > 7))]
]
"""The non-negative e4m3 values by code, from the format: 4 bits of exponent (bias 7), 3 of mantissa."""


def nearest_e4m3(x: float) -> float:
    """Ties go to the even code; what lies beyond 448 becomes 448."""
    _, value = min(FINITE, key=lambda entry: (abs(entry[1] - abs(Fraction(x))), entry[0] % 2))
    return float(value) * (-1.0 if x < 0 else 1.0)


def quantise_plainly(
    values: list[float], scale_fmt: ScaleFormat, group: int, dtype: type[np.floating]
) -> tuple[list[float], list[float]]:
    """Value by value; `dtype` is numpy's type of the arithmetic."""
    quantised: list[float] = []
    scales: list[float] = []
    for start in range(0, len(values), group):
        members = [dtype(v) for v in values[start : start + group]]
        amax = max(*(abs(v) for v in members), dtype(1e-4))
        scale = np.float32(amax / dtype(448))
        if scale_fmt == "ue8m0":
            exponent = -30
            while Fraction(2) ** exponent < Fraction(float(amax)) / 448:
                exponent += 1
            scale = np.float32(2.0**exponent)
        scales.append(float(scale))
        quantised += [nearest_e4m3(float(v / dtype(scale))) for v in members]
    return quantised, scales


@st.composite
def rows(draw: st.DrawFn, width: int) -> list[float]:
    """Values whose magnitudes spread over the whole range that fp8 groups meet."""
    magnitude = draw(st.sampled_from([1e-6, 1e-3, 1.0, 448.0, 1e6]))
    value = (
        st.floats(-magnitude, magnitude)
        if width == 64
        else st.floats(-1, 1, width=32).map(lambda v: v * magnitude)
    )
    return draw(st.lists(value, min_size=1, max_size=24))


@settings(max_examples=examples(40), deadline=None)
@given(values=rows(32), group=st.sampled_from([4, 16]), scale_fmt=st.sampled_from(["ue8m0", None]))
def test_act_quant_is_the_loop_in_float32(values: list[float], group: int, scale_fmt: ScaleFormat) -> None:
    y, scale = KERNELS.act_quant(torch.tensor(values, dtype=torch.float32), scale_fmt, group)
    expected, scales = quantise_plainly(values, scale_fmt, group, np.float32)
    assert y.dtype == FP8 and scale.dtype == torch.float32
    assert y.float().tolist() == expected
    assert scale.tolist() == scales


@settings(max_examples=examples(40), deadline=None)
@given(values=rows(64), group=st.sampled_from([4, 16]), scale_fmt=st.sampled_from(["ue8m0", None]))
def test_fake_quant_is_the_loop_in_float64(values: list[float], group: int, scale_fmt: ScaleFormat) -> None:
    y, scale = KERNELS.fake_quant(torch.tensor(values, dtype=torch.float64), scale_fmt, group)
    expected, scales = quantise_plainly(values, scale_fmt, group, np.float64)
    assert y.dtype == torch.float64 and scale.dtype == torch.float32
    assert y.tolist() == expected
    assert scale.tolist() == scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_of_two_scales_step_exactly_at_448(dtype: torch.dtype) -> None:
    exponents = torch.arange(-22, 110)
    amax = (448.0 * 2.0 ** exponents.double()).to(dtype)
    above = torch.nextafter(amax, torch.full_like(amax, torch.inf))
    below = torch.nextafter(amax, torch.zeros_like(amax))
    for edge, shift in ((amax, 0), (above, 1), (below, 0)):
        _, scale = KERNELS.act_quant(edge.unsqueeze(1), "ue8m0")
        assert torch.equal(scale.squeeze(1).double(), 2.0 ** (exponents + shift).double())


def test_partial_last_group_has_a_scale_of_its_own() -> None:
    x = torch.full((2, 3, 300), 448.0)
    x[..., 256:] = 7.0
    y, scale = KERNELS.act_quant(x, "ue8m0")
    assert y.shape == x.shape and scale.shape == (2, 3, 3)
    assert torch.equal(scale, torch.tensor([1.0, 1.0, 1 / 64]).expand(2, 3, 3))
    assert torch.equal(y.float(), torch.full_like(x, 448.0))


def test_zero_stays_zero_under_the_floor() -> None:
    y, scale = KERNELS.act_quant(torch.zeros(4, 128), "ue8m0")
    assert not y.float().any()
    assert scale.tolist() == [[2.0**-22]] * 4  # the power of two above 1e-4 / 448
    assert KERNELS.act_quant(torch.zeros(1, 128), None)[1].item() == np.float32(1e-4) / np.float32(448)


@pytest.mark.parametrize("scale_fmt", ["ue8m0", None])
def test_huge_values_saturate_and_stay_finite(scale_fmt: ScaleFormat) -> None:
    x = torch.tensor([[3.4e38, -3.4e38, 1e30, 0.0]])
    y, scale = KERNELS.act_quant(x, scale_fmt)
    assert y.float().isfinite().all() and scale.isfinite().all()
    assert y.float().abs().max() <= 448
    if scale_fmt is None:
        assert y.float()[0, :2].tolist() == [448.0, -448.0]


def test_float64_rounds_once() -> None:
    # 1.0625 lies halfway between 1 and 1.125; by way of float32 the tiny rest would be lost.
    x = torch.tensor([448.0, 1.0625 + 2.0**-40, 1.0625, 1.1875 - 2.0**-40], dtype=torch.float64)
    for quantise in (KERNELS.act_quant, KERNELS.fake_quant):
        assert quantise(x, "ue8m0")[0].double().tolist() == [448.0, 1.125, 1.0, 1.125]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_fmt", ["ue8m0", None])
def test_fake_quant_holds_the_values_of_act_quant(dtype: torch.dtype, scale_fmt: ScaleFormat) -> None:
    x = (torch.randn(5, 7, 200, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    y, scale = KERNELS.act_quant(x, scale_fmt)
    fake, fake_scale = KERNELS.fake_quant(x, scale_fmt)
    assert fake.dtype == dtype
    assert torch.equal(fake.double(), y.double())
    assert torch.equal(scale, fake_scale)
    restored = fake.double() * scale.double().repeat_interleave(128, -1)[..., :200]
    assert torch.equal(KERNELS.through_fp8(x, scale_fmt), restored.to(dtype))
    assert ((restored - x.double()).abs() <= x.double().abs() / 16 + scale.double().max() * 2.0**-10).all()


def test_every_fp8_code_widens_to_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(8).view(FP8)
    assert len(codes) > torch_kernels.FEW_VALUES
    assert torch.equal(
        torch_kernels._widen(codes, torch.float64).nan_to_num(1e9), codes.double().nan_to_num(1e9)
    )
    assert [float(v) for _, v in FINITE] == codes[:127].double().tolist()


def test_unknown_scale_format_is_refused() -> None:
    with pytest.raises(ValueError, match="scale_fmt must be 'ue8m0' or None"):
        KERNELS.act_quant(torch.ones(1, 4), "e8m0")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "columns", "inner"), [(1, 128, 128), (3, 200, 300), (17, 64, 32), (2, 257, 129)]
)
def test_fp8_gemm_is_the_product_of_dequantised_operands(rows: int, columns: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, rows, inner, generator=generator)
    b = torch.randn(columns, inner, generator=generator).to(FP8)
    b_scale = torch.rand(-(-columns // 128), -(-inner // 128), generator=generator) + 0.1
    a, a_scale = KERNELS.act_quant(x, "ue8m0")
    wide_a = a.double() * a_scale.double().repeat_interleave(128, -1)[..., :inner]
    wide_b = torch.empty(columns, inner, dtype=torch.float64)
    for i in range(columns):
        for j in range(inner):
            wide_b[i, j] = float(b[i, j]) * float(b_scale[i // 128, j // 128])
    expected = wide_a @ wide_b.T
    assert torch.equal(KERNELS.dequantise_weight(b, b_scale, torch.float64), wide_b)
    out = KERNELS.fp8_gemm(a, a_scale, b, b_scale, torch.float32)
    assert out.shape == (2, rows, columns)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    fake = KERNELS.fp8_gemm(KERNELS.fake_quant(x, "ue8m0")[0], a_scale, b, b_scale, torch.float32)
    assert torch.equal(fake, out)
    assert torch.equal(KERNELS.fp8_gemm(a, a_scale, b, b_scale, torch.bfloat16), out.bfloat16())


def test_dequantised_bf16_weight_rounds_once_and_checks_its_scales() -> None:
    b = torch.randn(130, 140, generator=torch.Generator().manual_seed(2)).to(FP8)
    b_scale = torch.rand(2, 2, generator=torch.Generator().manual_seed(3))
    wide = KERNELS.dequantise_weight(b, b_scale, torch.float32)
    assert torch.equal(KERNELS.dequantise_weight(b, b_scale, torch.bfloat16), wide.bfloat16())
    with pytest.raises(ValueError, match=r"\(130, 140\) has scales of shape \(2, 2\), not \(1, 2\)"):
        KERNELS.dequantise_weight(b, b_scale[:1], torch.float32)


def index_inputs(
    num_rows: int, num_heads: int, dim: int, num_keys: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows * num_keys)
    q = torch.randn(num_rows, num_heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.randn(num_rows, num_heads, generator=generator, dtype=torch.float64)
    k = torch.randn(num_keys, dim, generator=generator, dtype=torch.float64).to(dtype)
    k_scale = torch.rand(num_keys, generator=generator, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return q, weights.to(wide), k, k_scale.to(wide)


def plain_scores(
    q: torch.Tensor, weights: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor | None
) -> torch.Tensor:
    dots = torch.einsum("nhd,ld->nhl", q.double(), k.double())
    scores = torch.einsum("nh,nhl->nl", weights.double(), dots.clamp_min(0))
    return scores if k_scale is None else scores * k_scale.double()


SHAPES = [
    (1, 8, 32, 1),
    (1, 4, 64, 1000),
    (1, 64, 128, 9000),
    (256, 8, 32, 700),
    (5, 3, 16, 33),
    (40, 64, 128, 1030),
]


@pytest.mark.parametrize("tiles", ["default", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, FP8])
@pytest.mark.parametrize("shape", SHAPES)
def test_index_scores_are_the_sum_over_heads(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiles == "tiny":  # many tiles, ragged at both ends
        monkeypatch.setitem(torch_kernels._TILE_ELEMENTS, "cpu", 13 * 100 * shape[1])
        monkeypatch.setitem(torch_kernels._TILE_HEAD_ROWS, "cpu", 13 * shape[1])
    q, weights, k, k_scale = index_inputs(*shape, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for scale in (k_scale, None):
        scores = KERNELS.index_scores(q, weights, k, scale)
        expected = plain_scores(q, weights, k, scale)
        assert scores.dtype == weights.dtype and scores.shape == expected.shape
        largest = max(float(expected.abs().max()), 1.0)
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=tolerance * largest)


def test_index_scores_fill_the_given_buffer() -> None:
    q, weights, k, k_scale = index_inputs(6, 4, 32, 50, torch.float32)
    buffer = torch.full((10, 80), 7.0)
    out = buffer[2:8, 5:55]
    assert KERNELS.index_scores(q, weights, k, k_scale, out=out) is out
    assert torch.equal(out, KERNELS.index_scores(q, weights, k, k_scale))
    assert (buffer == 7).sum() == 10 * 80 - 6 * 50


def test_index_scores_of_a_key_nobody_likes_are_zero() -> None:
    q, weights, k, _ = index_inputs(3, 4, 32, 20, torch.float32)
    assert not KERNELS.index_scores(q.abs(), weights, -k.abs()).any()
    assert KERNELS.index_scores(q, weights, k[:0]).shape == (3, 0)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest memory that any operation inside it gave back."""

    num_bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, FP8])
def test_index_scores_never_hold_a_row_head_key_product(dtype: torch.dtype) -> None:
    q, weights, k, k_scale = index_inputs(64, 64, 16, 4096, dtype)
    out = torch.empty(64, 4096)
    with LargestTensor() as largest:
        KERNELS.index_scores(q, weights, k, k_scale, out)
    assert out.nbytes <= largest.num_bytes <= 4 * 2**20  # the whole product is 64 MiB
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dim", [1, 2, 16, 32, 64, 128])
def test_hadamard_follows_its_recursion(dim: int) -> None:
    def transform(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] == 1:
            return x
        first, second = x.chunk(2, dim=-1)
        return torch.cat([transform(first + second), transform(first - second)], dim=-1)

    x = torch.randn(3, 2, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(KERNELS.hadamard(x), transform(x) * dim**-0.5, rtol=1e-13, atol=1e-13)
    matrix = KERNELS.hadamard(torch.eye(dim, dtype=torch.float64))
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-14)


def test_hadamard_keeps_the_dtype_and_rounds_half_precision_once() -> None:
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert torch.equal(KERNELS.hadamard(x), KERNELS.hadamard(x.float()).bfloat16())
    with pytest.raises(ValueError, match="power of two, not 24 channels"):
        KERNELS.hadamard(torch.ones(2, 24))


def test_hadamard_cached_in_inference_mode_still_serves_autograd() -> None:
    torch_kernels._hadamard_matrix.cache_clear()
    with torch.inference_mode():
        KERNELS.hadamard(torch.ones(1, 8))
    x = torch.ones(1, 8, requires_grad=True)
    KERNELS.hadamard(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_backends_are_named_and_refused_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_kernels().name == "torch"
    with pytest.raises(ValueError, match="must be one of torch, tilelang, not 'triton'"):
        get_kernels("triton")
    with pytest.raises(ValueError, match=r"the device is 'cpu'.*pip install 'dsatrace\[gpu\]'"):
        get_kernels("tilelang", "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError, match=r"cannot run: tilelang is not installed;.*pip install 'dsatrace\[gpu\]'"
    ):
        get_kernels("tilelang", "cuda")
