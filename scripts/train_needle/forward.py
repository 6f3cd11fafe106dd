"""The served modules' arithmetic for whole sequences, differentiable: no cache, no gather.

Works on a `Transformer`'s own weights. Dense attention sees all the past; sparse attention
masks what the indexer did not select, by the serving kernels and the serving tie rule, so
that logits equal those served. The last block is computed where logits are asked for only.
Knows no text and no optimiser.

    logits = forward(model, Sequences(tokens, positions, rows), sparse=False)  # (B, M, vocabulary)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from operator import itemgetter

import torch
import torch.nn.functional as F

from dsatrace.model.attention import MLA
from dsatrace.model.indexer import Indexer
from dsatrace.model.rotary import Rope, rope_of, rotate_interleaved
from dsatrace.model.selection import mask_future, select_topk
from dsatrace.model.transformer import Block, Transformer


@dataclasses.dataclass(frozen=True)
class Sequences:
    """B sequences of T tokens; `rows` are the M places of each whose next token is asked for."""

    tokens: torch.Tensor  # (B, T) int64
    positions: torch.Tensor  # (B, T) int64, ascending: what the rotations see
    rows: torch.Tensor  # (B, M) int64


@dataclasses.dataclass(frozen=True)
class Attention:
    """What one layer's attention was computed from; `observe` gets it, for the indexer's loss."""

    layer_id: int
    module: MLA
    x: torch.Tensor  # (B, T, dim), normed
    q_latent: torch.Tensor  # (B, T, q_lora_rank), normed
    rope: Rope
    query: torch.Tensor  # (B, H, T or M, qk)
    key: torch.Tensor  # (B, H, T, qk)
    rows: torch.Tensor | None  # (B, M) when only these rows were computed
    selected: torch.Tensor | None  # (B, T or M, T) bool when sparse


Observe = Callable[[Attention], None]


def forward(
    model: Transformer,
    batch: Sequences,
    sparse: bool,
    observe: Observe | None = None,
) -> torch.Tensor:
    """Logits `(B, M, vocabulary)` at `batch.rows`, with gradients wherever the weights want them."""
    frequencies = model.frequencies.to(batch.positions.device)
    rope = rope_of(model.args, batch.positions, frequencies)
    x = F.embedding(batch.tokens, model.embed.weight)
    last = len(model.layers) - 1
    for layer_id, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        rows = batch.rows if layer_id == last else None
        attended = _attend(layer.attn, layer.attn_norm(x), rope, rows, sparse, observe)
        x = (x if rows is None else take_rows(x, rows)) + attended
        flat = x.flatten(0, 1)
        x = x + layer.ffn(layer.ffn_norm(flat)).view_as(x)
    logits: torch.Tensor = model.head(model.norm(x))
    return logits


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`x (B, T, ...)` at `rows (B, M)`: `(B, M, ...)`."""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), rows]


def _attend(
    attn: MLA, x: torch.Tensor, rope: Rope, rows: torch.Tensor | None, sparse: bool, observe: Observe | None
) -> torch.Tensor:
    """MLA with keys and values expanded; `(B, T, dim)`, or `(B, M, dim)` at `rows`."""
    args = attn.setup.args
    q_latent = attn.q_norm(attn.wq_a(x))
    key, value = _keys_and_values(attn, x, rope)
    query = _queries(attn, q_latent, rope, rows)
    selected = select(attn, x, q_latent, rope, rows) if sparse else None
    if observe is not None:
        observe(Attention(attn.layer_id, attn, x, q_latent, rope, query, key, rows, selected))
    mask = selected
    if mask is None and rows is not None:
        mask = visible(rows, x.shape[1])
    out = _scaled_dot_product(query, key, value, mask, attn.scale)  # (B, H, M, v)
    flat = out.transpose(1, 2).reshape(*out.shape[:1], out.shape[2], args.n_heads * args.v_head_dim)
    mixed: torch.Tensor = attn.wo(flat)
    return mixed


def visible(rows: torch.Tensor, length: int) -> torch.Tensor:
    """(B, M, T): which of `length` tokens each of `rows (B, M)` may see."""
    return torch.arange(length, device=rows.device) <= rows.unsqueeze(-1)


def _keys_and_values(attn: MLA, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, T, qk) and (B, H, T, v); fp8's rounding of the latent passes gradients straight through."""
    args = attn.setup.args
    latent, k_rope = attn.wkv_a(x).split((args.kv_lora_rank, args.qk_rope_head_dim), dim=-1)
    latent = attn.kv_norm(latent)
    if args.latent_fp8:
        plain = latent.detach()
        latent = latent + (attn.setup.kernels.through_fp8(plain, args.scale_fmt) - plain)
    expanded = attn.wkv_b(latent).unflatten(-1, (args.n_heads, -1)).transpose(1, 2)  # (B, H, T, nope + v)
    k_nope, value = expanded.split((args.qk_nope_head_dim, args.v_head_dim), dim=-1)
    k_rope = rotate_interleaved(k_rope, rope).unsqueeze(1).expand(-1, args.n_heads, -1, -1)
    return torch.cat((k_nope, k_rope), dim=-1), value


def _queries(attn: MLA, q_latent: torch.Tensor, rope: Rope, rows: torch.Tensor | None) -> torch.Tensor:
    """(B, H, T, qk), or (B, H, M, qk) at `rows`."""
    args = attn.setup.args
    if rows is not None:
        q_latent, rope = take_rows(q_latent, rows), rope.each(partial(take_rows, rows=rows))
    query = attn.wq_b(q_latent).unflatten(-1, (args.n_heads, args.qk_head_dim)).transpose(1, 2)
    q_nope, q_rope = query.split((args.qk_nope_head_dim, args.qk_rope_head_dim), dim=-1)
    q_rope = rotate_interleaved(q_rope, rope.each(lambda table: table.unsqueeze(1)))
    return torch.cat((q_nope, q_rope), dim=-1)


def _scaled_dot_product(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Causal where there is no `mask (B, M, T)`. Padded: torch's fast path wants heads of one width."""
    width = value.shape[-1]
    pad = query.shape[-1] - width
    if pad > 0:
        value = F.pad(value, (0, pad))
    elif pad < 0:
        query, key = F.pad(query, (0, -pad)), F.pad(key, (0, -pad))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else mask.unsqueeze(1),
        is_causal=mask is None,
        scale=scale,
    )
    return out[..., :width]


@torch.no_grad()
def select(
    attn: MLA, x: torch.Tensor, q_latent: torch.Tensor, rope: Rope, rows: torch.Tensor | None
) -> torch.Tensor:
    """(B, T or M, T) bool: what the indexer selects, with its rounding to fp8, as it serves."""
    masks = []
    for i in range(len(x)):
        query, weights, key, key_scale = _quantised(attn, x[i], q_latent[i], rope.each(itemgetter(i)))
        length = len(key)
        k = min(attn.setup.args.index_topk, length)
        score = attn.setup.kernels.index_scores
        chosen = torch.full((length if rows is None else rows.shape[1], k), -1, device=x.device)
        if rows is None:
            chosen = select_topk(mask_future(score(query, weights, key, key_scale), 0), k, 0)[0]
        else:  # few rows, anywhere: each on its own, among what it sees
            scores = score(query[rows[i]], weights[rows[i]], key, key_scale)
            for m, row in enumerate(rows[i].tolist()):
                best = select_topk(scores[m : m + 1, : row + 1], k, row)[0]
                chosen[m, : best.shape[1]] = best[0]
        mask = torch.zeros(len(chosen), length + 1, dtype=torch.bool, device=x.device)
        mask.scatter_(1, chosen.masked_fill(chosen < 0, length), True)  # the last column takes the padding
        masks.append(mask[:, :length])
    return torch.stack(masks)


def _quantised(
    attn: MLA, x: torch.Tensor, q_latent: torch.Tensor, rope: Rope
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`index_parts` of one sequence as the serving kernels take them, with the keys' scales (T,)."""
    args, fake_quant = attn.setup.args, attn.setup.kernels.fake_quant
    query, weights, key = index_parts(attn, x, q_latent, rope)
    if not args.index_fp8:
        return query, weights, key, None
    query, query_scale = fake_quant(query, args.scale_fmt, group=args.index_head_dim)
    key, key_scale = fake_quant(key, args.scale_fmt, group=args.index_head_dim)
    return query, weights * query_scale.squeeze(-1), key, key_scale.squeeze(-1)


def index_parts(
    attn: MLA, x: torch.Tensor, q_latent: torch.Tensor, rope: Rope
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The indexer's queries (..., T, H, D), head weights (..., T, H) and keys (..., T, D), not rounded."""
    indexer, args = attn.indexer, attn.setup.args
    assert isinstance(indexer, Indexer), "every layer that is trained has its own indexer"

    def rotated(part: torch.Tensor, rope: Rope) -> torch.Tensor:
        width = args.qk_rope_head_dim
        part = torch.cat((indexer.rotate(part[..., :width], rope), part[..., width:]), dim=-1)
        return attn.setup.kernels.hadamard(part) if args.index_hadamard else part

    query = indexer.wq_b(q_latent).unflatten(-1, (args.index_n_heads, args.index_head_dim))
    query = rotated(query, rope.per_head)
    key = rotated(indexer.k_norm(indexer.wk(x)), rope)
    weights = indexer.weights_proj(x) * indexer.score_scale
    return query, weights, key
