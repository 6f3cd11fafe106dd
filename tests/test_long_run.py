"""Writing, verifying and summarizing take no more memory for a run four times as long; nor does reading."""

from __future__ import annotations

import importlib.util
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest

from conftest import ROOT
from dsatrace.schema import LEVELS, STEPS_PARQUET_FILE
from dsatrace.trace.parquet.columns import POSITIONS, arrow_schema
from dsatrace.trace.parquet.file import open_writer, read_records
from dsatrace.trace.summarize import summarize_runs
from dsatrace.verify.parquet_steps import ParquetSteps
from dsatrace.verify.run import verify
from helpers.command_runs import bench

SLACK_BYTES = 300_000  # the summary keeps the hot blocks of each of twelve more requests
DIGEST_BYTES = 1 << 19  # two parts of a file that the hashing thread of verify holds, at the peak or not


@pytest.fixture(scope="module")
def growth() -> ModuleType:
    spec = importlib.util.spec_from_file_location("growth", ROOT / "scripts" / "bench" / "growth.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def peak_bytes(work: Callable[[], object]) -> tuple[int, object]:
    """Most memory that Python and numpy held at once, beyond what they hold now, and what came of it."""
    tracemalloc.start()
    try:
        done = work()
        return tracemalloc.get_traced_memory()[1], done
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("level", LEVELS)
def test_memory_does_not_grow_with_the_run(
    growth: ModuleType, tmp_path: Path, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsatrace.trace.summarize.CHUNK_RECORDS", 64)
    monkeypatch.setattr("dsatrace.verify.fast.CHUNK_BYTES", 1 << 16)  # else the whole run is one chunk
    shape = growth.Shape(num_layers=2, batch=2, top_k=64, num_prompt_tokens=1024, num_step_times=50)
    one_round = shape.records_a_step * growth.STEPS_A_REQUEST
    growth.write_run(tmp_path / "warm", 1, level, shape)
    peaks = []
    for rounds in (2, 8):
        folder = tmp_path / f"run{rounds}"
        stages = (
            lambda folder=folder, rounds=rounds: growth.write_run(folder, rounds * one_round, level, shape),
            lambda folder=folder: verify(folder),
            lambda folder=folder: summarize_runs([folder]),
        )
        found, (_, verified, _) = zip(*map(peak_bytes, stages), strict=True)
        peaks.append(found)
        assert verified.num_records == rounds * one_round
    for short, long in zip(*peaks, strict=True):
        assert long < short + SLACK_BYTES + DIGEST_BYTES


def test_nothing_stays_of_the_parquet_that_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsatrace.verify.parquet_steps._BATCH_RECORDS", 16)
    path, schema, rng = tmp_path / STEPS_PARQUET_FILE, arrow_schema(pa.float32()), np.random.default_rng(0)
    with open_writer(path, schema) as writer:
        for _ in range(20):
            drawn = pa.array(list(rng.integers(0, 1 << 30, (16, 2048), dtype=np.int32)))
            columns = [drawn if field.name == POSITIONS else pa.nulls(16, field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    for records in (read_records(path), ParquetSteps([path]).records((0, 320))):
        before = pa.total_allocated_bytes()
        held = [pa.total_allocated_bytes() - before for _ in records]
        assert len(held) == 320 and max(held) < path.stat().st_size / 2


def test_the_script_says_what_it_did(tmp_path: Path) -> None:
    flags = ("--counts", "1", "--layers", "4", "--top-k", "64", "--only", "verify")
    done = bench("growth.py", "verbs", *flags, "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "1024" in line]
    assert [row[:2] for row in rows] == [
        ["write", "jsonl"],
        ["verify", "jsonl"],
        ["export", "--to"],
        ["verify", "parquet"],
    ]
    assert all(float(row[-1]) > 10 for row in rows)  # MiB
    assert list(tmp_path.iterdir()) == []
