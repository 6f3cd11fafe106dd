"""What a bf16 model keeps in fp32: its error against fp64 is that of fp32 arithmetic, not that of bf16.

Each part is computed three times from the same bf16 inputs: by the model; plainly, in fp32
with one rounding to bf16 at the end; and with every step rounded to bf16. The model may err
as the plain one does, within MARGIN. That the third is clearly worse shows that the check can fail.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsatrace.model.attention import MLA
from dsatrace.model.kernels import get_kernels
from dsatrace.model.layers import ModelSetup, RMSNorm, RowParallelLinear
from dsatrace.model.moe import MoE, swiglu
from dsatrace.model.parallel import ParallelGroup
from dsatrace.model.rotary import rope_of
from dsatrace.model.transformer import Block
from helpers.models import SMALL, random_model

MARGIN = 1.15
CLEARLY = 1.3
BF16 = torch.bfloat16
ARGS = dataclasses.replace(
    SMALL,
    dtype="bf16",
    dim=256,
    n_heads=16,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    index_head_dim=64,
    n_activated_experts=8,  # all of them, and the shared one: nine outputs are summed
    n_limited_groups=4,
)


def setup_of(**changes: object) -> ModelSetup:
    return ModelSetup(dataclasses.replace(ARGS, **changes), get_kernels(), ParallelGroup())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, root mean square."""
    return float((found.double() - exact).norm() / exact.norm())


def check(ours: torch.Tensor, plain: torch.Tensor, rounded: torch.Tensor, exact: torch.Tensor) -> None:
    assert exact.dtype == torch.float64
    assert error(ours, exact) <= MARGIN * error(plain, exact)
    assert error(rounded, exact) >= CLEARLY * error(plain, exact)


@torch.inference_mode()
@pytest.mark.parametrize("std", [1, 3, 6])
def test_attention_never_rounds_its_scores(std: int) -> None:
    """16 heads over 2,048 latents, scores of standard deviation `std`; the last 100 are padding."""
    width, values = ARGS.latent_dim, ARGS.kv_lora_rank
    attention = MLA(setup_of(), 0)
    attention.scale = std * width**-0.5
    query, latents = normal(2, 16, width), normal(2, 2048, width, seed=1)
    padded = torch.zeros(2, 2048, dtype=torch.bool)
    padded[:, -100:] = True
    ours = attention._attend(query, padded, latents).to(BF16)

    def attend(scores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scores = scores * attention.scale
        weights = scores.masked_fill(padded.unsqueeze(1), float("-inf")).softmax(dim=-1)
        return weights.to(dtype) @ latents[..., :values].to(dtype)

    keys = latents.transpose(1, 2)
    exact = attend(query.double() @ keys.double(), torch.float64)
    plain = attend(query.float() @ keys.float(), BF16)  # rounds its weights, as the serving kernels do
    rounded = attend((query @ keys).float(), BF16)
    check(ours, plain, rounded, exact)


@torch.inference_mode()
def test_what_surrounds_attention_is_not_rounded_either() -> None:
    """The absorbed query enters the scores, and the attended latent the value projection, in fp32."""
    attention = random_model(dataclasses.replace(ARGS, n_layers=1)).layers[0].attn
    key_up, value_up = attention.absorbed()
    assert key_up.dtype == value_up.dtype == torch.float32
    latent = normal(5, ARGS.q_lora_rank)
    rope = rope_of(ARGS, torch.zeros(5, dtype=torch.int64), torch.zeros(ARGS.qk_rope_head_dim // 2))
    absorbed = attention._absorbed_query(latent, rope)[..., : ARGS.kv_lora_rank]
    query = attention.wq_b(latent).view(5, 16, -1)[..., : ARGS.qk_nope_head_dim]
    exact = torch.einsum("nhd,hdc->nhc", query.double(), key_up.double())
    assert error(absorbed, exact) < 1e-6
    assert error(absorbed.to(BF16), exact) > 1e-3


@torch.inference_mode()
def test_swiglu_is_rounded_once() -> None:
    gate, up = normal(64, 2048), normal(64, 2048, seed=1)
    exact = F.silu(gate.double()) * up.double()
    plain = (F.silu(gate.float()) * up.float()).to(BF16)
    check(swiglu(gate, up, torch.float32), plain, F.silu(gate) * up, exact)


class Terms(nn.Module):
    """Stands in for an MLP or expert: gives a fixed bf16 output as that gives it, in fp32."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normal(*x.shape, seed=self.seed).float()


@torch.inference_mode()
def test_experts_are_summed_in_fp32() -> None:
    """Eight routed experts, with weights of their own, and the shared one."""
    moe = MoE(setup_of())
    for name, param in moe.gate.named_parameters():
        param.copy_(0.1 * normal(*param.shape, seed=len(name)))
    for i in range(8):
        moe.experts[str(i)] = Terms(seed=10 + i)
    moe.shared_experts = Terms(seed=9)
    x = normal(64, ARGS.dim)
    weights, chosen = moe.gate(x)  # (64, 8), each expert once a row
    ours = moe(x)
    assert ours.dtype == torch.float32

    def add_up(dtype: torch.dtype) -> torch.Tensor:
        total = normal(64, ARGS.dim, seed=9).to(dtype)
        for i in range(8):
            weight = weights[chosen == i].unsqueeze(1)
            total += (normal(64, ARGS.dim, seed=10 + i).to(weight.dtype) * weight).to(dtype)
        return total

    weights = weights.double()
    exact, plain = add_up(torch.float64), add_up(torch.float32).to(BF16)
    check(ours.to(BF16), plain, add_up(BF16), exact)


class Attended(nn.Module):
    """Stands in for attention: a fixed output, and no selection."""

    def forward(self, *_: object) -> tuple[torch.Tensor, None]:
        return normal(64, ARGS.dim, seed=1).float() * 1.01, None


class Heard(nn.Module):
    """Stands in for a feed-forward layer: keeps what it is given, and gives a fixed output."""

    heard: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.heard = x
        return normal(64, ARGS.dim, seed=2).float() * 1.01


@torch.inference_mode()
def test_a_norm_sees_the_residual_before_it_is_rounded() -> None:
    block = Block(setup_of(), 0)
    for norm in (block.attn_norm, block.ffn_norm):
        norm.weight.fill_(1.0)
    block.attn, block.ffn = Attended(), Heard()
    x = normal(64, ARGS.dim)
    out, _ = block(x, None, None, None, None)
    attended, fed = Attended()()[0], Heard()(x)

    def norm(total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return F.rms_norm(total.to(dtype), (ARGS.dim,), eps=ARGS.norm_eps)

    exact = norm(x.double() + attended.double(), torch.float64)
    plain = norm(x + attended, torch.float32).to(BF16)
    rounded = norm(x + attended.to(BF16), torch.float32).to(BF16)
    check(block.ffn.heard, plain, rounded, exact)
    assert out.dtype == torch.float32, "the next layer's norm sees this sum before it is rounded"
    assert torch.equal(out, (x + attended).to(BF16) + fed), "the residual itself is kept in bf16"


class Recorded(ParallelGroup):
    """One rank that notes the dtype of what it is asked to sum."""

    seen: list[torch.dtype]

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.dtype)
        return x


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "summed"),
    [("fp8", torch.float32), ("bf16", torch.float32), ("fp32", torch.float32), ("fp64", torch.float64)],
)
def test_ranks_are_summed_in_the_precise_dtype(dtype: str, summed: torch.dtype) -> None:
    group = Recorded()
    object.__setattr__(group, "seen", [])
    args = dataclasses.replace(ARGS, dtype=dtype)
    setup = ModelSetup(args, get_kernels(), group)
    linear, moe = RowParallelLinear(setup, 128, 64), MoE(setup)
    for param in [*linear.parameters(), *moe.parameters()]:
        param.copy_(normal(*param.shape).to(param.dtype))
    assert linear(normal(3, 128).to(setup.compute_dtype)).dtype == summed
    assert moe(normal(3, ARGS.dim).to(setup.compute_dtype)).dtype == summed
    assert group.seen == [summed, summed]
    assert RMSNorm(setup, 64, 1e-6)(normal(3, 64).to(summed)).dtype == setup.compute_dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_a_gpu_multiplies_bf16_and_sums_fp32() -> None:
    attention = MLA(setup_of(), 0)
    a, b = normal(3, 16, 576).cuda(), normal(3, 576, 2048, seed=1).cuda()
    found = attention._product(a, b)
    assert found.dtype == torch.float32
    assert error(found.cpu(), (a.double() @ b.double()).cpu()) < 1e-5
