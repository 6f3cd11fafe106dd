"""The lightning indexer: scores every visible token for every query and keeps the top-k.

score[t] = sum_h w_h * relu(q_h . k_t), with one shared key head and signed head weights
(DeepSeek-V3.2, section 2.1). An observer sets the attribute `on_select`; None: nobody watches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .batch import Batch, Segment
from .cache import KVCache
from .layers import LayerNorm, Linear, ModelSetup
from .rotary import Rope, rotate_half_split, rotate_interleaved
from .selection import Selection, mask_future, select_topk

OnSelect = Callable[[int, Selection], None]
"""Called with `(layer_id, selection)` once per layer and forward, before attention reads anything."""


class SharedIndexer(nn.Module):
    """For a layer without an indexer, which uses what `source_layer`'s indexer chose. Has no weights."""

    def __init__(self, layer_id: int, source_layer: int):
        super().__init__()
        self.layer_id = layer_id
        self.source_layer = source_layer
        self.on_select: OnSelect | None = None

    def forward(self, selection: Selection) -> Selection:
        if self.on_select is not None:
            self.on_select(self.layer_id, selection)
        return selection


class Indexer(nn.Module):
    """Selects, for each of N query rows, at most `index_topk` positions it may attend to.

    Replicated on every rank; rank 0's choice is everyone's.
    """

    def __init__(self, setup: ModelSetup, layer_id: int):
        super().__init__()
        args = setup.args
        self.setup = setup
        self.layer_id = layer_id
        self.on_select: OnSelect | None = None
        self.wq_b = Linear(setup, args.q_lora_rank, args.index_n_heads * args.index_head_dim)
        self.wk = Linear(setup, args.dim, args.index_head_dim)
        self.k_norm = LayerNorm(setup, args.index_head_dim)
        self.weights_proj = Linear(setup, args.dim, args.index_n_heads, precise=True)
        self.score_scale = (args.index_n_heads * args.index_head_dim) ** -0.5
        self.rotate = rotate_half_split if args.index_rope == "half_split" else rotate_interleaved

    def forward(
        self,
        x: torch.Tensor,  # (N, dim), normed
        q_latent: torch.Tensor,  # (N, q_lora_rank), normed
        rope: Rope,
        batch: Batch,
        cache: KVCache,
    ) -> Selection:
        self.remember(x, rope, batch, cache)
        return self.select(x, q_latent, rope, batch, cache)

    def remember(self, x: torch.Tensor, rope: Rope, batch: Batch, cache: KVCache) -> None:
        """Puts the rows' keys into the cache."""
        key, key_scale = self._rotate_and_quantise(self.k_norm(self.wk(x)), rope)  # (N, D)
        cache.write_index(self.layer_id, batch, key, None if key_scale is None else key_scale.squeeze(-1))

    def select(
        self, x: torch.Tensor, q_latent: torch.Tensor, rope: Rope, batch: Batch, cache: KVCache
    ) -> Selection:
        """What the rows choose of the keys in the cache, theirs among them."""
        args = self.setup.args
        query = self.wq_b(q_latent).view(-1, args.index_n_heads, args.index_head_dim)  # (N, H, D)
        query, query_scale = self._rotate_and_quantise(query, rope.per_head)
        weights = self.weights_proj(x) * self.score_scale  # (N, H)
        if query_scale is not None:
            weights = weights * query_scale.squeeze(-1)
        selection = self._select(query, weights, batch, cache)
        if self.on_select is not None:
            self.on_select(self.layer_id, selection)
        return selection

    def _rotate_and_quantise(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor | None]:
        """RoPE on R channels, in place, then Hadamard, fp8: `(..., D)` and its scale `(..., 1)`, or None."""
        args, kernels = self.setup.args, self.setup.kernels
        part = x[..., : args.qk_rope_head_dim]
        part.copy_(self.rotate(part, rope))
        if args.index_hadamard:
            x = kernels.hadamard(x)
        if not args.index_fp8:
            return x, None
        quantise = kernels.act_quant if x.is_cuda else kernels.fake_quant
        return quantise(x, args.scale_fmt, group=args.index_head_dim)

    def _select(self, query: torch.Tensor, weights: torch.Tensor, batch: Batch, cache: KVCache) -> Selection:
        """Scores each segment against its request's keys; a row never sees a position past its own."""
        k = min(self.setup.args.index_topk, max(segment.context_len for segment in batch.segments))
        if len(batch.segments) == 1:
            positions, values, margin = self._select_segment(query, weights, batch.segments[0], k, cache)
        else:
            num_rows = query.shape[0]
            positions = query.new_full((num_rows, k), -1, dtype=torch.int64)
            values = weights.new_full((num_rows, k), float("-inf"))
            margin = weights.new_empty(num_rows)
            for segment in batch.segments:
                rows = segment.rows
                chosen, scores, margin[rows] = self._select_segment(
                    query[rows], weights[rows], segment, k, cache
                )
                positions[rows, : chosen.shape[1]] = chosen
                values[rows, : chosen.shape[1]] = scores
        if self.setup.group.size == 1:
            return Selection(positions, values, margin, positions)
        return Selection(self.setup.group.broadcast(positions.clone()), values, margin, positions)

    def _select_segment(
        self, query: torch.Tensor, weights: torch.Tensor, segment: Segment, k: int, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys, key_scale = cache.index_keys(self.layer_id, segment)
        scores = self.setup.kernels.index_scores(query, weights, keys, key_scale)
        return select_topk(mask_future(scores, segment.first_pos), k, segment.first_pos)
