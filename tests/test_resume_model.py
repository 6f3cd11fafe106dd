"""A served run, killed with SIGKILL and resumed, records what an undisturbed one does."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conftest import INFERENCE
from dsatrace.engine.engine import Engine
from dsatrace.engine.settings import RunSettings
from dsatrace.runner.settings import ModelSettings
from dsatrace.runner.setup import load_model, open_engine
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.reader import RunReader
from dsatrace.trace.resume import Resumed, prepare_resume
from dsatrace.trace.summarize import summarize_runs
from dsatrace.verify.run import verify
from dsatrace.workloads.request import Request
from helpers.forked import call
from helpers.resume_samples import answers_of, check_summary, records_of

LENGTHS = (40, 70, 33, 90, 61)
SHARED = 32
PROMPTS = [
    [(7 * i) % 250 for i in range(SHARED)] + [(13 * r + 3 * i) % 250 for i in range(length)]
    for r, length in enumerate(LENGTHS)
]
CACHE_TOKENS = 256


@contextlib.contextmanager
def engine_over(checkpoint: Path, folder: Path, resumed: Resumed | None = None) -> Iterator[Engine]:
    """Two requests at a time."""
    settings = ModelSettings(
        checkpoint, INFERENCE / "config_tiny.json", device="cpu", max_batch_size=2, prefill_chunk=64
    )
    device = torch.device("cpu")
    run = RunSettings(
        longest=CACHE_TOKENS,
        trace=TraceConfig(out=folder, prefill="last", block_size=16),
        resumed=resumed,
        first_forward_idx=resumed.next_forward_idx if resumed else 0,
    )
    with open_engine(load_model(settings, device), settings, device, run) as engine:
        yield engine


def serve(engine: Engine, resumed: Resumed | None = None, die_after: int | None = None) -> None:
    """Serves what is not done; `die_after` so many tokens the process is killed."""
    for r, prompt in enumerate(PROMPTS):
        request = Request(f"r{r}", tuple(prompt), max_new_tokens=6 + r, source_row=r)
        if resumed is not None and request.request_id in resumed.done:
            engine.skip(request)
        else:
            engine.submit(request)
    for number, _ in enumerate(engine.run()):
        if number == die_after:
            os.kill(os.getpid(), signal.SIGKILL)


def serve_and_die(checkpoint: Path, folder: Path, die_after: int) -> None:
    """Serves until it is killed; resumes the run if there is one."""
    resumed = prepare_resume(folder) if folder.exists() else None
    with engine_over(checkpoint, folder, resumed) as engine:
        serve(engine, resumed, die_after)


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with engine_over(tiny_checkpoint, folder) as engine:
        serve(engine)
    return folder


@pytest.mark.parametrize("kills", [(3,), (21,), (14, 6)])
def test_killed_and_resumed(
    tiny_checkpoint: Path, undisturbed: Path, tmp_path: Path, kills: tuple[int, ...]
) -> None:
    folder = tmp_path / "run"
    for die_after in kills:
        process = call(serve_and_die, tiny_checkpoint, folder, die_after)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert RunReader(folder).state == "incomplete"
        assert verify(folder).state == "incomplete"
    resumed = prepare_resume(folder)
    assert len(resumed.done) < len(PROMPTS)
    with engine_over(tiny_checkpoint, folder, resumed) as engine:
        serve(engine, resumed)
    assert answers_of(folder) == answers_of(undisturbed)
    records, expected = records_of(folder), records_of(undisturbed)
    assert records.keys() == expected.keys()
    for key, record in expected.items():
        _check_alike(records[key], record)
    assert any(record["prefix"]["prefix_cache_hit"] for record in expected.values())
    verified = verify(folder)
    assert (verified.state, verified.notes) == ("complete", ())
    assert len(RunReader(folder).manifest["resumed_at_forward"]) == len(kills)
    check_summary(folder)
    assert summarize_runs([folder])["counts"]["requests"] == len(PROMPTS)


def _check_alike(record: dict[str, object], expected: dict[str, object]) -> None:
    """Equal, but that scores may round differently in another batch."""
    rounded = ("scores_stats", "kth_margin")
    for name in expected.keys() - set(rounded):
        assert record[name] == expected[name]
    assert record["scores_stats"] == pytest.approx(expected["scores_stats"], rel=1e-3)
