"""Multi-head latent attention over the selected tokens only.

Both projections of the latent are absorbed into query and output, so attention works on
the cached rows: gather K rows, one product for the scores, one for the values. Prefill and
decode are the same code. Every product is summed in fp32 and not rounded to bf16 in between:
a score of 30 would be off by 0.06, and its weight by 6 %.
"""

from __future__ import annotations

import torch
from torch import nn

from .batch import Batch
from .cache import KVCache
from .indexer import Indexer, SharedIndexer
from .layers import ColumnParallelLinear, Linear, ModelSetup, RMSNorm, RowParallelLinear, cast
from .rotary import Rope, rotate_interleaved, softmax_scale
from .selection import Selection

GATHER_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Bound on the latents multiplied at a time: rows of a long prefill chunk attend in slices.

On a CPU few rows stay in the cache, and the next slice reuses their memory; on a GPU many rows make up
for the time that starting a kernel takes.
"""


class MLA(nn.Module):
    """DeepSeek-V3.2 attention: N rows in, N rows out, KV in the paged cache."""

    def __init__(self, setup: ModelSetup, layer_id: int):
        super().__init__()
        args = setup.args
        self.setup = setup
        self.layer_id = layer_id
        self.num_heads = args.n_heads // setup.group.size
        self.wq_a = Linear(setup, args.dim, args.q_lora_rank)
        self.q_norm = RMSNorm(setup, args.q_lora_rank, args.latent_norm_eps)
        self.wq_b = ColumnParallelLinear(setup, args.q_lora_rank, args.n_heads * args.qk_head_dim)
        self.wkv_a = Linear(setup, args.dim, args.latent_dim)
        self.kv_norm = RMSNorm(setup, args.kv_lora_rank, args.latent_norm_eps)
        per_head = args.qk_nope_head_dim + args.v_head_dim
        self.wkv_b = ColumnParallelLinear(setup, args.kv_lora_rank, args.n_heads * per_head)
        self.wo = RowParallelLinear(setup, args.n_heads * args.v_head_dim, args.dim)
        source = args.source_layers[layer_id]
        self.indexer = Indexer(setup, layer_id) if source == layer_id else SharedIndexer(layer_id, source)
        self.scale = softmax_scale(args)
        self._absorbed: tuple[torch.Tensor, torch.Tensor] | None = None

    def absorbed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`wkv_b` split by head into key `(H, nope, C)` and value `(H, C, v)` projections; made once."""
        if self._absorbed is None:
            args = self.setup.args
            dtype = self._operand_dtype(self.wkv_b.weight)
            per_head = self.wkv_b.dequantised(dtype).view(self.num_heads, -1, args.kv_lora_rank)
            keys, values = per_head.split((args.qk_nope_head_dim, args.v_head_dim), dim=1)
            self._absorbed = keys, values.transpose(1, 2)
        return self._absorbed

    def forward(
        self,
        x: torch.Tensor,  # (N, dim), normed
        rope: Rope,
        batch: Batch,
        cache: KVCache,
        previous: Selection | None = None,
    ) -> tuple[torch.Tensor, Selection]:
        """The rows' output and selection; `previous` is the selection of the layer before."""
        self.remember(x, rope, batch, cache)
        q_latent, selection = self.select(x, rope, batch, cache, previous)
        slots = cache.resolve(self.layer_id, batch, selection.positions)  # (N, K)
        query = self._absorbed_query(q_latent, rope)  # (N, H, C + R)

        token_bytes = self.setup.args.latent_dim * self._operand_dtype(x).itemsize
        rows = max(1, GATHER_BYTES["cuda" if x.is_cuda else "cpu"] // (slots.shape[1] * token_bytes))
        if len(slots) <= rows:
            attended = self._attend(query, slots < 0, cache.read_latent(self.layer_id, slots))
        else:
            pieces = [
                self._attend(q, s < 0, cache.read_latent(self.layer_id, s))
                for q, s in zip(query.split(rows), slots.split(rows), strict=True)
            ]
            attended = torch.cat(pieces)
        _, value_up = self.absorbed()
        out = self._product(attended.transpose(0, 1), value_up).transpose(0, 1)  # (N, H, v)
        return self.wo(cast(out.flatten(1), self.setup.compute_dtype)), selection

    def remember(self, x: torch.Tensor, rope: Rope, batch: Batch, cache: KVCache) -> None:
        """Puts into the cache what later rows read of these: latents and the indexer's keys."""
        cache.write_latent(self.layer_id, batch, self._latent(x, rope))
        if isinstance(self.indexer, Indexer):
            self.indexer.remember(x, rope, batch, cache)

    def select(
        self, x: torch.Tensor, rope: Rope, batch: Batch, cache: KVCache, previous: Selection | None = None
    ) -> tuple[torch.Tensor, Selection]:
        """The latents of the rows' queries `(N, q_lora_rank)` and what they choose of the cache's keys."""
        q_latent = self.q_norm(self.wq_a(x))
        if isinstance(self.indexer, SharedIndexer):
            return q_latent, self.indexer(previous)
        return q_latent, self.indexer.select(x, q_latent, rope, batch, cache)

    def _latent(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """The row to cache: normed (and, as the released model does, fp8-rounded) KV, then the rope key."""
        args = self.setup.args
        kv, k_rope = self.wkv_a(x).split((args.kv_lora_rank, args.qk_rope_head_dim), dim=-1)
        kv = self.kv_norm(kv)
        if args.latent_fp8:
            kv = self.setup.kernels.through_fp8(kv, args.scale_fmt)
        return torch.cat((kv, rotate_interleaved(k_rope, rope)), dim=-1)

    def _absorbed_query(self, q_latent: torch.Tensor, rope: Rope) -> torch.Tensor:
        args = self.setup.args
        query = self.wq_b(q_latent).view(-1, self.num_heads, args.qk_head_dim)
        q_nope, q_rope = query.split((args.qk_nope_head_dim, args.qk_rope_head_dim), dim=-1)
        q_rope = rotate_interleaved(q_rope, rope.per_head)
        key_up, _ = self.absorbed()
        absorbed = self._product(q_nope.transpose(0, 1), key_up).transpose(0, 1)  # (N, H, C)
        return torch.cat((absorbed, q_rope), dim=-1)

    def _attend(self, query: torch.Tensor, padded: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """`query (n, H, C + R)` over its `latents (n, K, C + R)` but the `padded (n, K)`: `(n, H, C)`."""
        latents = cast(latents, self._operand_dtype(latents))
        unseen = torch.where(padded, float("-inf"), 0.0).unsqueeze(1)  # added: a mask would cost more
        scores = torch.add(unseen, self._product(query, latents.transpose(1, 2)), alpha=self.scale)
        return self._product(scores.softmax(dim=-1), latents[..., : self.setup.args.kv_lora_rank])

    def _operand_dtype(self, x: torch.Tensor) -> torch.dtype:
        """Dtype of attention's operands on `x`'s device: bf16 only where the product can give fp32."""
        return self.setup.compute_dtype if x.is_cuda else self.setup.precise_dtype

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`a @ b`, batched, in the precise dtype; `a` is cast to `b`'s dtype first."""
        precise = self.setup.precise_dtype
        a = cast(a, b.dtype)
        return torch.bmm(a, b) if b.dtype == precise else torch.bmm(a, b, out_dtype=precise)
