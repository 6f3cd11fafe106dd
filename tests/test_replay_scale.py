"""The generator behind the figures of replay-scale.md: what it writes is the trace that it describes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench import replay_scale
from dsatrace.selection_replay.replay import replay_all
from dsatrace.selection_replay.settings import ReplaySettings
from dsatrace.selection_replay.work import find_work
from dsatrace.trace.reader import RunReader
from dsatrace.trace.selections import read_selections


def test_the_trace_is_as_described(tmp_path: Path) -> None:
    assert replay_scale.write_trace(tmp_path / "run", 1200) == 2 * replay_scale.NUM_STEPS
    (request,) = read_selections(RunReader(tmp_path / "run"))
    (first, second) = request.layers.values()
    for t in range(replay_scale.NUM_STEPS):
        ids = first.ids[first.ptr[t] : first.ptr[t + 1]]
        assert len(ids) == replay_scale.TOP_K and np.all(np.diff(ids) > 0)
        assert ids[0] >= 0 and ids[-1] < first.seq_len[t] == replay_scale.CONTEXT + t + 1
    assert not np.array_equal(first.ids, second.ids)


def test_it_is_replayed(tmp_path: Path) -> None:
    replay_scale.write_trace(tmp_path / "run", replay_scale.NUM_STEPS)
    settings = ReplaySettings(policies=("lru",))
    result = replay_all(find_work([tmp_path / "run"], settings), settings)
    cell = result.buffers["0"]["run"]["policies"]["lru"]["1k"]
    assert 0.08 < cell.missed / cell.selected < 0.1, "a tenth changes per step, some of it to what was held"
