"""Why a resumed run's scores may differ in their last digits: sums depend on who shares the forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsatrace.engine.settings import RunSettings
from dsatrace.runner.settings import ModelSettings
from dsatrace.runner.setup import load_model, open_engine
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.reader import RunReader
from dsatrace.workloads.request import Request
from helpers.checkpoints import tiny_config
from test_resume_model import PROMPTS

Records = dict[tuple[int, int], dict[str, Any]]


def served(checkpoint: Path, folder: Path, dtype: str, *companies: tuple[int, ...]) -> list[Records]:
    """The first prompt's records, by step and layer, beside each of these other prompts."""
    folder.mkdir()
    device, config = torch.device("cpu"), tiny_config(folder, dtype=dtype)
    settings = ModelSettings(checkpoint, config, device="cpu", max_batch_size=4, prefill_chunk=64)
    model, found = load_model(settings, device), []
    for number, others in enumerate(companies):
        run = RunSettings(longest=256, trace=TraceConfig(out=folder / str(number)))
        with open_engine(model, settings, device, run) as engine:
            for r in (0, *others):
                engine.submit(Request(f"r{r}", tuple(PROMPTS[r]), max_new_tokens=8, stop_at_eos=False))
            list(engine.run())
        records = [x for x in RunReader(folder / str(number)).steps() if x["request_id"] == "r0"]
        assert {x["kv_fetch"]["hbm"]["batch_size"] for x in records} == {1 + len(others)}
        found.append({(x["step_idx"], x["layer_id"]): x for x in records})
    return found


def scores(records: Records) -> list[float]:
    return [value for record in records.values() for value in record["scores_stats"].values()]


def selections(records: Records) -> list[list[int]]:
    return [record["selected_token_pos"] for record in records.values()]


def test_the_same_company_gives_the_same_scores(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first, again = served(tiny_checkpoint, tmp_path / "run", "fp32", (1,), (1,))
    assert len(scores(first)) == 3 * 28
    assert scores(first) == scores(again)


def test_another_company_rounds_otherwise(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Not in fp64, whose rounding is far below the fp32 of the records: so nothing else is at work."""
    torch.manual_seed(0)
    rows, weight = torch.randn(2, 64), torch.randn(64, 64)
    if torch.equal(rows[:1] @ weight.T, (rows @ weight.T)[:1]):
        pytest.skip("this machine sums a row alike, alone and among others")
    alone, beside = served(tiny_checkpoint, tmp_path / "fp32", "fp32", (), (1,))
    assert scores(alone) != scores(beside)
    assert scores(alone) == pytest.approx(scores(beside), rel=1e-2)
    assert selections(alone) == selections(beside)
    alone, beside = served(tiny_checkpoint, tmp_path / "fp64", "fp64", (), (1,))
    assert scores(alone) == scores(beside)
