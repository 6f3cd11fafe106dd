"""Top-k selection with one rule for ties: higher score first, then the lower position.

`torch.topk` breaks ties by its own internal order, which changes with the row's
width; that is what makes a naive prefill and decode disagree (exact zeros are common
after the indexer's relu). Knows scores and positions only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MANY_SCORES = 2**15
"""From so many on, leaving columns out before the top-k costs less than it saves."""


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

    values, positions = _topk(scores, k + 1)
    kth = values[:, k - 1]
    margin = kth - values[:, k]
    if first_pos < k:  # the first rows see at most k
        dense = torch.arange(first_pos + 1, length + 1, device=scores.device) <= k
        margin.masked_fill_(dense, float("inf"))
    if scores.is_cuda:  # asking whether any row is tied would stall the stream: mend all rows
        positions = _drop_late_ties(scores, kth, k).topk(k, dim=-1).indices
    elif not margin.min().item() > 0:  # so written, it catches the nan between equal infinities too
        rows = (~(margin > 0)).nonzero().squeeze(1)
        positions[rows, :k] = _topk(_drop_late_ties(scores[rows], kth[rows], k), k)[1]
    positions = positions[:, :k]
    if first_pos < k:
        positions = _pad_unseen(positions, first_pos)
    return positions, values[:, :k], margin


def _topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`scores.topk(k)`; where that is faster, on a CPU, most columns are left out first.

    The columns fall into groups of 4 or 8. The k best lie in the k groups whose own best are the highest,
    so only these are sorted. Which of several equal k-th is taken is open, as it is in torch.
    """
    num_rows, length = scores.shape
    if scores.device.type != "cpu" or length < 12 * k or num_rows * length < MANY_SCORES:
        values, positions = scores.topk(k, dim=-1)
        return values, positions
    size = 8 if length >= 64 * k else 4
    width = length // size  # of groups; group i holds columns i, i + width, ...
    end = width * size
    best = scores[:, :end].unflatten(1, (size, width)).amax(1)  # (N, width)
    groups = best.topk(k, dim=-1, sorted=False).indices.unsqueeze(1)  # (N, 1, k)
    columns = (groups + torch.arange(0, end, width).unsqueeze(1)).flatten(1)  # (N, size * k)
    rest = torch.arange(end, length).expand(num_rows, -1)
    columns = torch.cat((columns, rest), dim=1)
    values, chosen = scores.gather(1, columns).topk(k, dim=-1)
    return values, columns.gather(1, chosen)


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
