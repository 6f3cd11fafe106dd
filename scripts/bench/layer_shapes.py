"""One layer's parts at DeepSeek-V3.2's own shapes, each beside the way it was computed before.

Random weights, one part at a time, both ways in turn and the best time of each, so that ratios hold
on a busy machine. The old ways live here, as plain functions. What bf16 costs depends on
whether the CPU has units for it, which is printed. Peak memory is about 3 GiB.

    python3 scripts/bench/layer_shapes.py --threads 1
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python3 scripts/bench/layer_shapes.py  # as without
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from machine import Rows, announce, flag_parser

from dsatrace.errors import UserError, exits_cleanly
from dsatrace.model.attention import GATHER_BYTES, MLA
from dsatrace.model.config import ModelArgs
from dsatrace.model.kernels.torch_kernels import BLOCK, TorchKernels, _widen
from dsatrace.model.layers import Linear, ModelSetup
from dsatrace.model.moe import swiglu
from dsatrace.model.parallel import ParallelGroup
from dsatrace.model.tiny import quantise

ARGS = ModelArgs()  # DeepSeek-V3.2's
BF16, FP32 = torch.bfloat16, torch.float32
TOLERANCE = 0.02  # relative difference of the two ways: the old ones round to bf16
KERNELS = TorchKernels()

Way = Callable[[], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Part:
    """One piece of arithmetic for so many rows, the old way and the new."""

    name: str
    rows: int
    old: Way
    new: Way


# The old ways.


def attend_in_bf16(
    query: torch.Tensor, padded: torch.Tensor, latents: torch.Tensor, scale: float
) -> torch.Tensor:
    scores = torch.bmm(query, latents.transpose(1, 2)).float() * scale
    weights = scores.masked_fill_(padded.unsqueeze(1), float("-inf")).softmax(dim=-1).to(latents.dtype)
    return torch.bmm(weights, latents[..., : ARGS.kv_lora_rank])


def attend_in_slices(
    module: MLA, cache: torch.Tensor, slots: torch.Tensor, query: torch.Tensor, rows: int
) -> torch.Tensor:
    """`query (N, H, C + R)` over `slots (N, K)` of the `cache (S, C + R)`, `rows` at a time."""
    pieces = []
    for q, s in zip(query.split(rows), slots.split(rows), strict=True):
        latents = cache.index_select(0, s.view(-1)).view(*s.shape, -1)
        pieces.append(module._attend(q, s < 0, latents))
    return torch.cat(pieces)


def swiglu_in_bf16(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def product_of_whole_weight(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """An fp8 product, behind a loop over bands of 128 rows that writes the weight in fp32."""
    quantised, x_scale = KERNELS.act_quant(x, ARGS.scale_fmt)
    wide = torch.empty(weight.shape)
    for first, band_scale in zip(range(0, len(weight), BLOCK), scale, strict=True):
        band = _widen(weight[first : first + BLOCK], FP32)
        wide[first : first + BLOCK] = band * band_scale.repeat_interleave(BLOCK)[: weight.shape[1]]
    spread = x_scale.repeat_interleave(BLOCK, dim=-1)[..., : x.shape[-1]]
    return F.linear(_widen(quantised, FP32) * spread, wide).to(BF16)


def product_upcast(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x.float(), weight.float()).to(BF16)


# The parts.


def parts(rows: Sequence[int]) -> Iterator[Part]:
    setup = ModelSetup(dataclasses.replace(ARGS, dtype="bf16"), KERNELS, ParallelGroup())
    with torch.device("meta"):
        module = MLA(setup, 0)
    yield from slice_parts(module)
    for num_rows in rows:
        yield from attention_parts(module, num_rows)
        yield from linear_parts(num_rows)
        gate, up = normal(num_rows, ARGS.moe_inter_dim), normal(num_rows, ARGS.moe_inter_dim)
        yield Part("SwiGLU", num_rows, partial(swiglu_in_bf16, gate, up), partial(swiglu, gate, up, FP32))


def slice_parts(module: MLA) -> Iterator[Part]:
    """How many rows attend at a time: those that 16 MiB hold as they are multiplied, or others."""
    num_rows = 28
    held = GATHER_BYTES["cpu"] // (ARGS.index_topk * ARGS.latent_dim * FP32.itemsize)
    cache, slots = normal(4096, ARGS.latent_dim), torch.randint(4096, (num_rows, ARGS.index_topk))
    query = normal(num_rows, ARGS.n_heads, ARGS.latent_dim)
    for rows in (1, 7, 28):
        old = partial(attend_in_slices, module, cache, slots, query, rows)
        new = partial(attend_in_slices, module, cache, slots, query, held)
        yield Part(f"attention, {rows} rows a slice; new: {held}", num_rows, old, new)


def attention_parts(module: MLA, num_rows: int) -> Iterator[Part]:
    """A slice's scores and values, and the two projections around them, which a CPU now holds in fp32."""
    few = min(num_rows, 3)
    query, latents = normal(few, ARGS.n_heads, ARGS.latent_dim), normal(few, ARGS.index_topk, ARGS.latent_dim)
    padded = torch.zeros(few, ARGS.index_topk, dtype=torch.bool)
    old = partial(attend_in_bf16, query, padded, latents, module.scale)
    yield Part("scores, softmax, values", few, old, partial(module._attend, query, padded, latents))

    q_nope = normal(ARGS.n_heads, num_rows, ARGS.qk_nope_head_dim)
    key_up = normal(ARGS.n_heads, ARGS.qk_nope_head_dim, ARGS.kv_lora_rank)
    attended = normal(ARGS.n_heads, num_rows, ARGS.kv_lora_rank)
    value_up = normal(ARGS.n_heads, ARGS.v_head_dim, ARGS.kv_lora_rank).transpose(1, 2)
    for name, x, weight in (("absorbed query", q_nope, key_up), ("value projection", attended, value_up)):
        old, new = partial(torch.bmm, x, weight), partial(module._product, x, weight.float())
        yield Part(name, num_rows, old, new)


def linear_parts(num_rows: int) -> Iterator[Part]:
    """Two large weights, in fp8 and in bf16; upcasting the latter is measured and not what the model does."""
    for name, out_features, in_features in (
        ("wq_b", ARGS.n_heads * ARGS.qk_head_dim, ARGS.q_lora_rank),
        ("expert's w1", ARGS.moe_inter_dim, ARGS.dim),
    ):
        x, weight = normal(num_rows, in_features), normal(out_features, in_features)
        upcast = partial(product_upcast, x, weight)
        yield Part(f"{name}, bf16 or upcast (not taken)", num_rows, partial(F.linear, x, weight), upcast)
        linear = Linear(ModelSetup(ARGS, KERNELS, ParallelGroup()), in_features, out_features)
        assert linear.scale is not None
        linear.weight.data, linear.scale.data = quantise(weight.float(), ARGS.scale_fmt)
        old = partial(product_of_whole_weight, x, linear.weight, linear.scale)
        yield Part(f"{name}, fp8", num_rows, old, partial(linear, x))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(BF16)


def seconds_of(part: Part, turns: int) -> tuple[float, float]:
    """The best time of each way, in turn; raises where the two do not give the same numbers."""
    old, new = part.old(), part.new()  # and warms up
    difference = float((old.float() - new.float()).norm() / old.float().norm())
    if not difference < TOLERANCE:
        raise UserError(f"{part.name}: the two ways differ by {difference:.1%}")
    best = [float("inf"), float("inf")]
    for _ in range(turns):
        for i, way in enumerate((part.old, part.new)):
            start = time.perf_counter()
            way()
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0], best[1]


@exits_cleanly
@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, and prints the table."""
    flags = _parser().parse_args(argv)
    if min(flags.rows) < 1 or flags.turns < 1:
        raise UserError("--rows and --turns: use at least 1")
    if flags.threads:
        torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    announce("torch", threads=torch.get_num_threads())
    units = torch.backends.cpu.get_cpu_capability()
    table = Rows(
        f"one layer's parts at DeepSeek-V3.2's shapes, milliseconds, {units}",
        f"{'part':36} ",
        "rows",
        "old",
        "new",
        "old / new",
    )
    for part in parts(flags.rows):
        old, new = seconds_of(part, flags.turns)
        table.add(part.name, f"{part.rows}", f"{old * 1e3:.2f}", f"{new * 1e3:.2f}", f"{old / new:.2f}x")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = flag_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256], help="rows of a batch")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    parser.add_argument("--turns", type=int, default=5, help="runs of each way, of which the best counts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
