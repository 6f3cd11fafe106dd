"""Linear layers, norms and embeddings, whole or as one rank's shard.

Parameter names and shard dimensions are those of DeepSeek's demo. Knows no
attention, cache or request.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from .config import ModelArgs
from .hf_config import FP8_GROUP
from .kernels.interface import Kernels
from .parallel import ParallelGroup

STORED_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@dataclasses.dataclass(frozen=True)
class ModelSetup:
    """What every module is built from: hyperparameters, kernels and the ranks."""

    args: ModelArgs
    kernels: Kernels
    group: ParallelGroup

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the quantisable linear weights."""
        return STORED_DTYPES[self.args.dtype]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of activations and of the latent cache."""
        return torch.bfloat16 if self.args.dtype == "fp8" else self.weight_dtype

    @property
    def precise_dtype(self) -> torch.dtype:
        """Dtype of what is never rounded to bf16: norms, gates, head weights, logits, scores, softmax, and
        the sums over experts, over ranks and into the residual."""
        return torch.float64 if self.args.dtype == "fp64" else torch.float32


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in `dtype`. A step asks for so many casts that change nothing that their calls alone would cost."""
    return x if x.dtype == dtype else x.to(dtype)


def new_weight(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """`y = x W^T` with `weight (out, in)`, and fp8 `scale` blocks of 128 x 128 when W is fp8.

    `precise` keeps the weight, and computes, in `ModelSetup.precise_dtype`.
    """

    def __init__(self, setup: ModelSetup, in_features: int, out_features: int, precise: bool = False):
        super().__init__()
        self.setup = setup
        dtype = setup.precise_dtype if precise else setup.weight_dtype
        self.weight = new_weight(out_features, in_features, dtype=dtype)
        if dtype is torch.float8_e4m3fn:
            blocks = (-(-out_features // FP8_GROUP), -(-in_features // FP8_GROUP))
            self.scale: nn.Parameter | None = new_weight(*blocks, dtype=torch.float32)
        else:
            self.scale = None

    def forward(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """`x (N, in)` to `(N, out)`, in `out_dtype` where that is given.

        If `out_dtype` is wider than the weight's dtype, an fp8 product comes unrounded; a bf16 one is
        rounded first, as in the released code.
        """
        if self.scale is None:
            y = F.linear(cast(x, self.weight.dtype), self.weight)
            return y if out_dtype is None else cast(y, out_dtype)
        kernels = self.setup.kernels
        quantised, x_scale = kernels.act_quant(x, self.setup.args.scale_fmt)
        return kernels.fp8_gemm(quantised, x_scale, self.weight, self.scale, out_dtype or x.dtype)

    def leave_unquantised(self) -> None:
        """Holds the weight in the compute dtype without scales, as the checkpoint does."""
        weight = torch.empty_like(self.weight, dtype=self.setup.compute_dtype)
        self.weight, self.scale = nn.Parameter(weight, requires_grad=False), None

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in `dtype`, for the products that absorb it."""
        if self.scale is None:
            return cast(self.weight, dtype)
        return self.setup.kernels.dequantise_weight(self.weight, self.scale, dtype)


class ColumnParallelLinear(Linear):
    """Each rank holds a share of the outputs."""

    def __init__(self, setup: ModelSetup, in_features: int, out_features: int, precise: bool = False):
        super().__init__(setup, in_features, out_features // setup.group.size, precise)


class RowParallelLinear(Linear):
    """Each rank holds a share of the inputs; the partial outputs are summed unless the caller sums later.

    Gives the precise dtype: what comes out is summed, over the ranks and into the residual.
    """

    def __init__(self, setup: ModelSetup, in_features: int, out_features: int, reduce: bool = True):
        super().__init__(setup, in_features // setup.group.size, out_features)
        self.reduce = reduce

    def forward(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        y = super().forward(x, out_dtype or self.setup.precise_dtype)
        return self.setup.group.all_reduce(y) if self.reduce else y


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in the precise dtype and rounded to the compute dtype."""

    def __init__(self, setup: ModelSetup, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.out_dtype = setup.compute_dtype
        self.weight = new_weight(dim, dtype=setup.precise_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.rms_norm(cast(x, self.weight.dtype), self.weight.shape, self.weight, self.eps)
        return cast(y, self.out_dtype)


class LayerNorm(nn.Module):
    """The indexer's key norm, with bias, computed in the precise dtype."""

    def __init__(self, setup: ModelSetup, dim: int):
        super().__init__()
        self.weight = new_weight(dim, dtype=setup.precise_dtype)
        self.bias = new_weight(dim, dtype=setup.precise_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.layer_norm(cast(x, self.weight.dtype), self.weight.shape, self.weight, self.bias, eps=1e-6)
        return cast(y, x.dtype)


class ParallelEmbedding(nn.Module):
    """Token embedding; each rank holds a range of the vocabulary."""

    def __init__(self, setup: ModelSetup):
        super().__init__()
        self.group = setup.group
        self.vocab = setup.group.shard(setup.args.vocab_size)
        self.weight = new_weight(len(self.vocab), setup.args.dim, dtype=setup.compute_dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # (N,) -> (N, dim)
        if self.group.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.vocab.start
        foreign = (local < 0) | (local >= len(self.vocab))
        y = F.embedding(local.masked_fill(foreign, 0), self.weight)
        return self.group.all_reduce(y.masked_fill(foreign.unsqueeze(-1), 0))
