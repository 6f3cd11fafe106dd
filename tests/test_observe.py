"""What the ring holds after a forward is what the layers selected, padded rows and picked rows included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsatrace.model.selection import Selection, select_topk
from dsatrace.trace.observe import SelectionRing

LAYERS, TOP_K = 3, 8


def selections(num_rows: int, first_pos: int) -> list[Selection]:
    """One forward's, of the real selection: rows see `first_pos + 1`, `first_pos + 2`, ... positions."""
    generator = torch.Generator().manual_seed(first_pos)
    made = []
    for _ in range(LAYERS):
        scores = torch.randn(num_rows, first_pos + num_rows, generator=generator)
        for row in range(num_rows):
            scores[row, first_pos + row + 1 :] = float("-inf")
        positions, values, margin = select_topk(scores, TOP_K, first_pos)
        made.append(Selection(positions, values, margin, positions))
    return made


@pytest.mark.parametrize("first_pos", [0, 3, 6, 30])
@pytest.mark.parametrize("rows", [None, [2], [0, 3]])
def test_the_ring_holds_what_was_selected(first_pos: int, rows: list[int] | None) -> None:
    ring = SelectionRing(LAYERS, max_rows=5, topk=TOP_K, with_scores=True, num_slots=1)
    for again in range(2):  # the slot is used again, and holds nothing of the step before
        made = selections(4, first_pos + 5 * (1 - again))
        picked = list(range(4)) if rows is None else rows
        recording = ring.record(len(picked), rows)
        assert recording is not None
        for layer, selection in enumerate(made):
            recording.on_select(layer, selection)
        recording.finish()
        recording.wait()
        positions, stats, scores = recording.arrays()
        assert scores is not None
        assert positions.shape == (LAYERS, len(picked), TOP_K)
        for layer, selection in enumerate(made):
            for i, row in enumerate(picked):
                expected = [p for p in selection.positions[row].tolist() if p >= 0]
                assert positions[layer, i].tolist() == expected + [-1] * (TOP_K - len(expected))
                values = selection.scores[row, : len(expected)].numpy()
                np.testing.assert_array_equal(scores[layer, i, : len(expected)], values)
                summed = [values.min(), values.mean(dtype=np.float64), values.max()]
                np.testing.assert_allclose(stats[layer, i, :3], summed, rtol=1e-6, atol=1e-6)
                assert stats[layer, i, 3] == selection.margin[row]
        recording.release()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_shows(bad: float) -> None:
    ring = SelectionRing(1, max_rows=1, topk=4)
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    scores[0, 3 if bad == float("-inf") else 0] = bad
    recording = ring.record(1)
    assert recording is not None
    recording.on_select(0, Selection(torch.tensor([[5, 4, 3, 2]]), scores, torch.zeros(1), torch.zeros(1)))
    recording.wait()
    assert not np.isfinite(recording.arrays()[1][..., :3]).all()


def test_a_full_ring_waits_or_says_so() -> None:
    ring = SelectionRing(1, max_rows=1, topk=4, num_slots=1)
    first = ring.record(1)
    assert first is not None
    assert ring.record(1, wait=False) is None
    first.release()
    assert ring.record(1, wait=False) is not None
