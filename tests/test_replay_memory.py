"""A null is as large as the steps that it is of, so a replay holds one at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest

from dsatrace.selection_replay import replay
from dsatrace.selection_replay.nulls import NULLS
from dsatrace.selection_replay.replay import replay_all
from dsatrace.selection_replay.settings import ReplaySettings, Share, parse_sizes
from dsatrace.selection_replay.steps import Steps
from dsatrace.selection_replay.work import find_work
from helpers.golden_run import NUM_LAYERS, GoldenRequest, write_golden


@pytest.mark.parametrize(("share", "most"), [("none", 1), ("request", NUM_LAYERS)])
def test_nulls_go_before_the_next_ones_come(
    share: Share, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, alive, counts = replay.null_of, set[int](), list[int]()

    def null_of(*asked: Any) -> Steps | None:
        null = real(*asked)
        assert null is not None
        alive.add(id(null))
        weakref.finalize(null, alive.discard, id(null))
        counts.append(len(alive))
        return null

    monkeypatch.setattr(replay, "null_of", null_of)
    run = write_golden(tmp_path / "run", [GoldenRequest("r0", 40, 9), GoldenRequest("r1", 50, 9)])
    settings = ReplaySettings(policies=("lru",), sizes=parse_sizes("1k"), share=share)
    replay_all(find_work([run], settings), settings)
    assert len(counts) == 2 * NUM_LAYERS * len(NULLS)
    assert max(counts) == most and not alive
