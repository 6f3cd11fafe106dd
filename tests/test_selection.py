"""Top-k with ties: higher score first, then the lower position, and never the future."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dsatrace.model.selection import mask_future, select_topk
from helpers.power import examples


def plain_topk(row: list[float], k: int) -> set[int]:
    """The definition: sort by score descending, then position ascending, take k."""
    return set(sorted(range(len(row)), key=lambda t: (-row[t], t))[:k])


@settings(max_examples=examples(100), deadline=None)
@given(data=st.data(), first_pos=st.integers(0, 40), num_rows=st.integers(1, 9), k=st.integers(1, 20))
def test_equals_the_definition_with_many_ties(data, first_pos, num_rows, k):
    length = first_pos + num_rows
    levels = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0])
    rows = data.draw(
        st.lists(st.lists(levels, min_size=length, max_size=length), min_size=num_rows, max_size=num_rows)
    )
    positions, values, margin = select_topk(mask_future(torch.tensor(rows), first_pos), k, first_pos)

    for i, row in enumerate(rows):
        visible = row[: first_pos + i + 1]
        chosen = [p for p in positions[i].tolist() if p >= 0]
        assert set(chosen) == plain_topk(visible, k)
        assert len(chosen) == min(k, len(visible))
        assert positions[i, : len(chosen)].min() >= 0, "padding stands last"
        scores = sorted((visible[p] for p in chosen), reverse=True)
        assert values[i, : len(chosen)].tolist() == scores
        if len(visible) > k:
            ranked = sorted(visible, reverse=True)
            assert margin[i].item() == ranked[k - 1] - ranked[k]
        else:
            assert margin[i].item() == float("inf")


def test_equal_infinities_are_a_tie():
    """Their margin is nan, which is not 0; the lower positions are chosen all the same."""
    scores = mask_future(torch.randn(3, 203, generator=torch.Generator().manual_seed(2)), 200)
    scores[0, 5:195:10] = float("inf")
    scores[2, 7:200:20] = 9.0
    for k in range(1, 19):
        positions, values, margin = select_topk(scores, k, 200)
        assert positions[0].sort().values.tolist() == list(range(5, 195, 10))[:k]
        assert set(positions[2].tolist()) == plain_topk(scores[2].tolist(), k)
        assert torch.equal(scores.gather(1, positions), values)
        assert margin[0].isnan() and not margin[1:].isnan().any()


@pytest.mark.parametrize(("num_rows", "length"), [(9, 4099), (1, 40003)])
@pytest.mark.parametrize("decimals", [1, 6])
def test_columns_left_out_change_nothing(num_rows, length, decimals):
    k, first_pos = 40, length - num_rows
    generator = torch.Generator().manual_seed(length)
    scores = mask_future(
        torch.randn(num_rows, length, generator=generator).round(decimals=decimals), first_pos
    )
    with LargestTopk() as seen:
        positions, values, margin = select_topk(scores, k, first_pos)
    assert 0 < seen.columns <= length // 4, "most columns were left out"
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(positions.sort().values, order[:, :k].sort().values)
    assert torch.equal(values, ranked[:, :k])
    assert torch.equal(margin, ranked[:, k - 1] - ranked[:, k])
    assert bool((margin == 0).any()) == (decimals == 1), "ties at the k-th place"


class LargestTopk(TorchDispatchMode):
    """Remembers the most columns that any top-k inside it looked through."""

    columns = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.topk.default:
            self.columns = max(self.columns, args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def test_scores_belong_to_their_positions():
    scores = torch.randn(5, 60, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    masked = mask_future(scores.clone(), 55)
    positions, values, _ = select_topk(masked, 7, 55)
    assert torch.equal(masked.gather(1, positions), values)


def test_torch_topk_alone_breaks_the_rule():
    """The reason this file exists: the plain call picks other tied positions as the row grows."""
    row = torch.zeros(1, 400)
    row[0, :3] = 1.0
    choices = {tuple(sorted(row[:, :width].topk(8).indices[0].tolist())) for width in range(20, 400, 20)}
    ours = {
        tuple(sorted(select_topk(row[:, :width], 8, width - 1)[0][0].tolist()))
        for width in range(20, 400, 20)
    }
    assert ours == {tuple(range(8))}
    assert choices != ours
