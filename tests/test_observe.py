"""What the ring holds after a forward is what the layers selected, padded rows and picked rows included."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dsatrace.kv.layout import CacheLayout
from dsatrace.model.selection import Selection, select_topk
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.manifest import RunInfo
from dsatrace.trace.observe import ForwardRecorder, ForwardRow, OnSelect, SelectionRing
from dsatrace.trace.tracer import Tracer
from dsatrace.workloads.request import Request

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


class Foreign(NamedTuple):
    """A selection of some other model, which has one rank and knows nothing of ranks."""

    positions: torch.Tensor
    scores: torch.Tensor
    margin: torch.Tensor


def test_any_model_can_be_recorded(tmp_path: Path) -> None:
    """Two requests and three rows a forward; a forward that fails leaves no record, and its room is free."""
    listening: list[OnSelect] = []

    @contextlib.contextmanager
    def hook(*callbacks: OnSelect) -> Iterator[None]:
        listening.extend(callbacks)
        try:
            yield
        finally:
            listening.clear()

    run = RunInfo(model_config={"n_layers": LAYERS}, layouts=(CacheLayout("other", 64, 20),), device="cpu")
    rows = [ForwardRow("r0", row=0, seq_len=31, step_idx=0), ForwardRow("r1", row=2, seq_len=33, step_idx=4)]
    made = selections(3, first_pos=30)
    with Tracer(TraceConfig(out=tmp_path / "run", queue_steps=1), run, secret=bytes(32)) as tracer:
        recorder = ForwardRecorder(hook, LAYERS, max_rows=2, top_k=TOP_K, tracer=tracer)
        for row in rows:
            tracer.add_request(Request(row.request_id, (1, 2, 3), 9))
        for _ in range(4):  # more often than there is room for
            with pytest.raises(ZeroDivisionError), recorder.recording("decode", rows, 3, batch_size=2):
                raise ZeroDivisionError
        with recorder.recording("prefill", rows, num_rows=3, batch_size=2):
            assert not listening, "prefill is off"
        with recorder.recording("decode", rows, num_rows=3, batch_size=2):
            for layer, selection in enumerate(made):
                for on_select in listening:
                    on_select(layer, Foreign(*selection[:3]))
    lines = (tmp_path / "run" / "trace_steps.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(record["request_id"], record["layer_id"]) for record in records] == [
        (row.request_id, layer) for row in rows for layer in range(LAYERS)
    ]
    for record, (row, selection) in zip(records, ((row, one) for row in rows for one in made), strict=True):
        assert record["selected_token_pos"] == sorted(selection.positions[row.row].tolist())
        assert (record["step_idx"], record["seq_len_current"]) == (row.step_idx, row.seq_len)
        assert record["forward_idx"] == 1
