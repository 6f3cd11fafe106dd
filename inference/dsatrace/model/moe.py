"""Feed-forward layers: the dense MLP, and the mixture of experts with its gate.

Sigmoid gate with a correction bias that steers the choice but not the weight, experts
limited to the best groups, shared experts as one MLP (DeepSeek-V3, section 2.1.2).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from .layers import ColumnParallelLinear, ModelSetup, RowParallelLinear, cast, new_weight
from .parallel import ParallelGroup


def swiglu(gate: torch.Tensor, up: torch.Tensor, precise_dtype: torch.dtype) -> torch.Tensor:
    """`silu(gate) * up`, in `precise_dtype` and rounded once, to the operands' dtype."""
    return cast(F.silu(cast(gate, precise_dtype)) * cast(up, precise_dtype), gate.dtype)


class MLP(nn.Module):
    """`w2(silu(w1 x) * w3 x)`, split over the ranks; `reduce=False` leaves the sum to the caller.

    Gives the precise dtype: its output is a term of a sum.
    """

    def __init__(self, setup: ModelSetup, inter_dim: int, reduce: bool = True):
        super().__init__()
        self.precise_dtype = setup.precise_dtype
        dim = setup.args.dim
        self.w1 = ColumnParallelLinear(setup, dim, inter_dim)
        self.w2 = RowParallelLinear(setup, inter_dim, dim, reduce)
        self.w3 = ColumnParallelLinear(setup, dim, inter_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.w2(swiglu(self.w1(x), self.w3(x), self.precise_dtype))
        return y


class Gate(nn.Module):
    """Chooses `n_activated_experts` of the routed experts for each row."""

    def __init__(self, setup: ModelSetup):
        super().__init__()
        self.args = setup.args
        self.weight = new_weight(self.args.n_routed_experts, self.args.dim, dtype=setup.precise_dtype)
        self.bias = new_weight(self.args.n_routed_experts, dtype=setup.precise_dtype)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert weights `(N, A)` and ids `(N, A)`."""
        args = self.args
        logits = F.linear(cast(x, self.weight.dtype), self.weight)
        scores = logits.sigmoid() if args.score_func == "sigmoid" else logits.softmax(dim=-1)  # (N, E)
        choice = scores + self.bias
        if args.n_limited_groups < args.n_expert_groups:
            grouped = choice.view(-1, args.n_expert_groups, args.n_routed_experts // args.n_expert_groups)
            strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)  # (N, G)
            kept = strength.topk(args.n_limited_groups, dim=-1).indices
            dropped = torch.ones_like(strength, dtype=torch.bool).scatter_(1, kept, False)
            choice = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
        experts = choice.topk(args.n_activated_experts, dim=-1).indices
        weights = scores.gather(1, experts)
        if args.norm_topk_prob and args.score_func == "sigmoid":
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * args.route_scale, experts


class MoE(nn.Module):
    """Routed experts, split over the ranks by id range, and the shared experts, if there are any.

    Gives their sum, in the precise dtype.
    """

    def __init__(self, setup: ModelSetup):
        super().__init__()
        args = setup.args
        self.group = setup.group
        self.precise_dtype = setup.precise_dtype
        self.num_experts = args.n_routed_experts
        self.gate = Gate(setup)
        whole = dataclasses.replace(setup, group=ParallelGroup())  # an expert lies on one rank
        self.experts = nn.ModuleDict(
            {str(i): MLP(whole, args.moe_inter_dim) for i in setup.group.shard(args.n_routed_experts)}
        )
        shared_dim = args.n_shared_experts * args.moe_inter_dim
        self.shared_experts = MLP(setup, shared_dim, reduce=False) if shared_dim else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, dim) -> (N, dim)
        weights, chosen = self.gate(x)
        y = self.common(x)
        if len(x) == 1:  # a decode step of one request: nothing to gather
            shares = dict(zip(chosen.tolist()[0], weights.split(1, dim=1), strict=True))
            for expert_id in sorted(shares):
                if (name := str(expert_id)) in self.experts:
                    y += self.experts[name](x) * shares[expert_id]
            return self.group.all_reduce(y)
        for expert_id, (rows, share) in enumerate(rows_by_expert(weights, chosen, self.num_experts)):
            if len(rows) and (name := str(expert_id)) in self.experts:
                y.index_add_(0, rows, self.experts[name](x.index_select(0, rows)) * share)
        return self.group.all_reduce(y)

    def common(self, x: torch.Tensor) -> torch.Tensor:
        """What every row gets, whatever it chose: `(N, dim)`, to which the experts' shares are added."""
        if self.shared_experts is None:
            return torch.zeros_like(x, dtype=self.precise_dtype)
        shared: torch.Tensor = self.shared_experts(x)
        return shared


def rows_by_expert(
    weights: torch.Tensor, chosen: torch.Tensor, num_experts: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of what `Gate` gave, each expert's rows `(n,)`, ascending, and its weight in each `(n, 1)`.

    The counts are the one thing read back from a device.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    rows = order // chosen.shape[1]
    shares = weights.flatten().index_select(0, order).unsqueeze(1)
    return list(zip(rows.split(counts), shares.split(counts), strict=True))
