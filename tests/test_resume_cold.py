"""A resumed run's prefix cache is empty, and the summary says so."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from dsatrace.commands.run_dataset import main
from dsatrace.engine.engine import Engine
from dsatrace.schema import SUMMARY_FIELDS, problems
from dsatrace.trace.reader import RunReader
from dsatrace.trace.summarize import summarize_runs
from dsatrace.verify.run import verify

FLAGS = (
    "--dataset",
    "sharegpt",
    "--sharegpt-turn-mode",
    "per_user_turn",
    "--runner",
    "simulator",
    "--no-hub",
)
FEW = ("--no-hub", "--limit", 12, "--max-new-tokens", 4, "--max-batch-size", 1, "--cache-block-size", 16)


def run(*flags: object) -> int:
    return main([str(flag) for flag in flags])


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    step, left = Engine.step, iter(range(num_steps))

    def counted(self: Engine, next_arrival_ns: int | None = None) -> Any:
        if next(left, None) is None:
            monkeypatch.setattr(Engine, "step", step)
            signal.raise_signal(signal.SIGTERM)
        return step(self, next_arrival_ns)

    monkeypatch.setattr(Engine, "step", counted)


@pytest.mark.parametrize("caching", [True, False])
def test_the_summary_says_so(caching: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    flags = (*FLAGS, *FEW, *(("--prefix-caching",) if caching else ()))
    assert run(*flags, "--trace-out", whole) == 0
    for number, num_steps in enumerate((7, 3)):
        interrupt_after(monkeypatch, num_steps)
        again = ("--resume", folder) if number else (*flags, "--trace-out", folder)
        assert run(*again) == 130
    assert run("--resume", folder) == 0
    assert len(RunReader(folder).manifest["resumed_at_forward"]) == 2
    summary, expected = RunReader(folder).summary(), RunReader(whole).summary()
    assert summary.get("prefix_cache_cold_starts") == (2 if caching else None)
    assert "prefix_cache_cold_starts" not in expected
    assert problems(summary, fields=SUMMARY_FIELDS) == []
    assert verify(folder).state == verify(whole).state == "complete"
    assert summarize_runs([folder]).get("prefix_cache_cold_starts") == (2 if caching else None)
    if caching:  # and it matters: hits are missing
        assert 0 < summary["prefix_cache"]["hit_tokens"] < expected["prefix_cache"]["hit_tokens"]
        assert summarize_runs([folder, whole])["prefix_cache_cold_starts"] == 2
