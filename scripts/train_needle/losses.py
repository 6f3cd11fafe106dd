"""What training minimises: the answers' cross-entropy, and the indexer's divergence from attention.

The indexer learns from the attention it serves and teaches nothing back: its inputs and its
target are detached (DeepSeek-V3.2, section 2.1.1). Knows no optimiser.

    loss = answer_loss(logits, targets, weights)
    loss = loss + index_loss(attention, rows, row_weights)       # for every layer's `Attention`
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from train_needle.forward import Attention, index_parts, take_rows, visible


def answer_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of `logits (B, M, V)` against `targets (B, M)`, by `weights (B, M)`."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum().clamp_min(1e-9)


def index_loss(attention: Attention, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """KL of the index scores' softmax from the head-summed attention, at `rows (B, M)`, by `weights`.

    Over everything visible, or, where attention was sparse, over what was selected. Its
    gradient reaches the indexer's weights and nothing else.
    """
    x, q_latent = attention.x.detach(), attention.q_latent.detach()
    seen = visible(rows, x.shape[1])  # (B, M, T)
    if attention.selected is not None:
        selected = attention.selected
        seen = seen & (selected if attention.rows is not None else take_rows(selected, rows))
    target = _attention_target(attention, rows, seen)

    query, head_weights, key = index_parts(attention.module, x, q_latent, attention.rope)
    query, head_weights = take_rows(query, rows), take_rows(head_weights, rows)  # (B, M, H, D), (B, M, H)
    dots = torch.matmul(query.flatten(1, 2), key.transpose(1, 2)).relu()  # (B, M x H, T)
    dots = dots.unflatten(1, query.shape[1:3])  # (B, M, H, T)
    scores = torch.matmul(head_weights.unsqueeze(2), dots).squeeze(2)  # (B, M, T)
    log_share = scores.masked_fill(~seen, float("-inf")).log_softmax(dim=-1).masked_fill(~seen, 0.0)
    divergence = (torch.xlogy(target, target) - target * log_share).sum(-1)  # (B, M)
    return (divergence * weights).sum() / weights.sum().clamp_min(1e-9)


@torch.no_grad()
def _attention_target(attention: Attention, rows: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """(B, M, T): attention at `rows`, averaged over the heads, 0 where not `seen`; each row sums to 1."""
    query = attention.query
    if attention.rows is None:
        query = take_rows(query.transpose(1, 2), rows).transpose(1, 2)  # (B, H, M, qk)
    scores = torch.matmul(query, attention.key.transpose(2, 3)) * attention.module.scale
    return scores.masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(dim=-1).mean(1)
