"""Tensor parallelism: a group object whose collectives do nothing in a single process.

Never starts a process group; knows no layer.

    group = ParallelGroup.current()
    y = group.all_reduce(partial)
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from .config import ModelArgs


@dataclasses.dataclass(frozen=True)
class ParallelGroup:
    """The ranks that share one model. `size` 1 means no process group is needed."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> ParallelGroup:
        """The initialised default process group, or the single-process group."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def check(self, args: ModelArgs) -> None:
        """Raises `ValueError` naming the first dimension that the ranks do not divide."""
        dims = {"n_heads": args.n_heads, "vocab_size": args.vocab_size, "inter_dim": args.inter_dim}
        if args.n_layers > args.n_dense_layers:
            dims["n_routed_experts"] = args.n_routed_experts
            dims["n_shared_experts * moe_inter_dim"] = args.n_shared_experts * args.moe_inter_dim
        for name, value in dims.items():
            if value % self.size:
                raise ValueError(
                    f"{name} {value} does not divide over {self.size} ranks; choose another number"
                )

    def shard(self, length: int) -> range:
        """This rank's contiguous share of `length` items."""
        share = length // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums `x` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenates the ranks' `x` along the last dimension."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrites `x` with rank 0's, in place."""
        if self.size > 1:
            dist.broadcast(x, src=0)
        return x
