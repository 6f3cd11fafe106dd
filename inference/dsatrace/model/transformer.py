"""The whole model: embedding, blocks, logits. One forward serves prefill and decode alike.

model = Transformer(args)
logits = model(batch, cache)        # (rows that want logits, vocabulary)
"""

from __future__ import annotations

import torch
from torch import nn

from .attention import MLA
from .batch import Batch
from .cache import KVCache
from .config import ModelArgs
from .indexer import Indexer, SharedIndexer
from .kernels import get_kernels
from .kernels.interface import Kernels
from .layers import ColumnParallelLinear, ModelSetup, ParallelEmbedding, RMSNorm, cast
from .moe import MLP, MoE
from .parallel import ParallelGroup
from .rotary import Rope, rope_frequencies, rope_of
from .selection import Selection


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and beside its residual.

    Both are added to the residual in the precise dtype. The next norm sees that sum; the residual
    goes on rounded to the compute dtype.
    """

    def __init__(self, setup: ModelSetup, layer_id: int):
        super().__init__()
        args = setup.args
        self.residual_dtype = setup.compute_dtype
        self.attn_norm = RMSNorm(setup, args.dim, args.norm_eps)
        self.attn = MLA(setup, layer_id)
        self.ffn_norm = RMSNorm(setup, args.dim, args.norm_eps)
        self.ffn = MLP(setup, args.inter_dim) if layer_id < args.n_dense_layers else MoE(setup)

    def forward(
        self, x: torch.Tensor, rope: Rope, batch: Batch, cache: KVCache, previous: Selection | None
    ) -> tuple[torch.Tensor, Selection]:
        """The layer's rows `(N, dim)`, not yet rounded, and its selection, which the next may share."""
        attended, selection = self.attn(self.attn_norm(x), rope, batch, cache, previous)
        x = self.add(x, attended)
        return self.add(x, self.ffn(self.ffn_norm(x))), selection

    def add(self, residual: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        """The sum of both `(N, dim)`, in the precise dtype of `term`."""
        return cast(residual, self.residual_dtype) + term


class Transformer(nn.Module):
    """DeepSeek-V3.2 or GLM-5, or this rank's shard of it.

    `state_dict()` names exactly a converted checkpoint's tensors.
    `indexers`, one per layer, is where an observer sets its `on_select`.
    """

    def __init__(self, args: ModelArgs, kernels: Kernels | None = None, group: ParallelGroup | None = None):
        super().__init__()
        group = group or ParallelGroup.current()
        group.check(args)
        self.args = args
        self.setup = setup = ModelSetup(args, kernels or get_kernels("torch"), group)
        self.embed = ParallelEmbedding(setup)
        blocks = [Block(setup, layer_id) for layer_id in range(args.n_layers)]
        self.layers = nn.ModuleList(blocks)
        self.indexers: tuple[Indexer | SharedIndexer, ...] = tuple(block.attn.indexer for block in blocks)
        self.norm = RMSNorm(setup, args.dim, args.norm_eps)
        self.head = ColumnParallelLinear(setup, args.dim, args.vocab_size, precise=True)
        self.frequencies = rope_frequencies(args, setup.precise_dtype)

    def new_cache(self, num_blocks: int, block_size: int, device: torch.device | str = "cpu") -> KVCache:
        return KVCache(self.setup, num_blocks, block_size, device)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Writes the batch's KV into `cache` and returns logits `(M, vocabulary)` of `batch.logit_rows`."""
        # Computed once per step, for every layer and both rotations.
        if self.frequencies.device != batch.positions.device:
            self.frequencies = self.frequencies.to(batch.positions.device)
        rope = rope_of(self.args, batch.positions, self.frequencies)
        x: torch.Tensor = self.embed(batch.tokens)
        selection: Selection | None = None
        for layer in self.layers:
            x, selection = layer(x, rope, batch, cache, selection)
        if batch.logit_rows.numel() == 0:
            return x.new_empty(0, self.args.vocab_size)
        if batch.logit_rows.numel() < len(x):
            x = x[batch.logit_rows]
        logits: torch.Tensor = self.head(self.norm(x))
        return self.setup.group.all_gather(logits)
