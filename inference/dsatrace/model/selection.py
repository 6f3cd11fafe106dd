"""Top-k selection with one rule for ties: higher score first, then the lower position.

`torch.topk` breaks ties by its own internal order, which changes with the row's
width; that is what makes a naive prefill and decode disagree (exact zeros are common
after the indexer's relu). Knows scores and positions only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Selection(NamedTuple):
    """What the indexer chose for N query rows.

    `positions` are absolute token positions in score order, -1 past the visible ones.
    `own_positions` is this rank's choice before rank 0's replaced it; in a single process the same tensor.
    """

    positions: torch.Tensor  # (N, K) int64
    scores: torch.Tensor  # (N, K) float, -inf where positions is -1
    margin: torch.Tensor  # (N,) float, k-th minus (k+1)-th score; inf where everything visible is selected
    own_positions: torch.Tensor  # (N, K) int64


def mask_future(scores: torch.Tensor, first_pos: int) -> torch.Tensor:
    """Sets what row i, at position `first_pos + i`, may not see to -inf; in place. `scores (N, L)`."""
    num_rows = scores.shape[0]
    if num_rows > 1:
        corner = scores[:, first_pos:]
        future = torch.ones(num_rows, num_rows, dtype=torch.bool, device=scores.device).triu_(1)
        corner.masked_fill_(future, float("-inf"))
    return scores


def select_topk(
    scores: torch.Tensor, k: int, first_pos: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `min(k, visible)` best positions of each row of `scores (N, L)`, future already at -inf.

    Row i sits at position `first_pos + i`, so it sees the first `first_pos + i + 1`
    columns, and `L = first_pos + N`. Returns `(positions, scores, margin)` as in
    `Selection`, with K = min(k, L).
    """
    num_rows, length = scores.shape
    if length <= k:
        values, positions = scores.topk(length, dim=-1)
        margin = scores.new_full((num_rows,), float("inf"))
        return _pad_unseen(positions, first_pos), values, margin

    values, positions = scores.topk(k + 1, dim=-1)
    kth, next_best = values[:, k - 1], values[:, k]
    sparse = torch.arange(first_pos + 1, length + 1, device=scores.device) > k
    tied = (kth == next_best) & sparse
    if scores.is_cuda:  # asking whether any row is tied would stall the stream: mend all rows
        positions = _drop_late_ties(scores, kth, k).topk(k, dim=-1).indices
    elif tied.any():
        rows = tied.nonzero().squeeze(1)
        positions[rows, :k] = _drop_late_ties(scores[rows], kth[rows], k).topk(k, dim=-1).indices
    margin = (kth - next_best).masked_fill_(~sparse, float("inf"))
    positions = positions[:, :k]
    if first_pos < k:
        positions = _pad_unseen(positions, first_pos)
    return positions, values[:, :k], margin


def _drop_late_ties(scores: torch.Tensor, kth: torch.Tensor, k: int) -> torch.Tensor:
    """`scores` with -inf for those equal to the k-th that the lower positions leave no room for."""
    kth = kth.unsqueeze(1)
    equal = scores == kth
    room = k - (scores > kth).sum(1, keepdim=True)
    return scores.masked_fill(equal & (equal.cumsum(1) > room), float("-inf"))


def _pad_unseen(positions: torch.Tensor, first_pos: int) -> torch.Tensor:
    """-1 in the columns past each row's visible count, where only -inf was left to choose."""
    visible = torch.arange(first_pos + 1, first_pos + 1 + positions.shape[0], device=positions.device)
    column = torch.arange(positions.shape[1], device=positions.device)
    return positions.masked_fill(column >= visible.unsqueeze(1), -1)
