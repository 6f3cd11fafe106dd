"""The estimate holds against runs that were really made, and says what it is."""

from __future__ import annotations

import functools
import itertools
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conftest import INFERENCE
from dsatrace import cli
from dsatrace.commands.generate import main as generate
from dsatrace.schema import LEVELS, Level
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.estimate import (
    FORMATS,
    KINDS,
    Kind,
    SyntheticSelections,
    TraceLoad,
    draw_sample,
    estimate_sizes,
)
from dsatrace.trace.export import export_run
from dsatrace.trace.observe import ForwardRecorder, hooked
from dsatrace.trace.reader import RunReader

NEW_TOKENS = 12
CONFIG = INFERENCE / "config_tiny.json"
WAYS: dict[str, tuple[Level, list[str]]] = {
    **{level: (level, ["--trace-level", level]) for level in LEVELS},
    "scores": ("full", ["--trace-store-scores"]),
}


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts of one length, so that one context stands for both; JSONL and Parquet."""
    folder = tmp_path_factory.mktemp("estimate")
    words = "The tide pulled back and left its usual collection of rope. " * 12
    (folder / "prompts.txt").write_text(f"A{words}\n\nB{words}\n")
    flags = ["--ckpt-path", str(tiny_checkpoint), "--config", str(CONFIG), "--temperature", "0"]
    flags += ["--input-file", str(folder / "prompts.txt"), "--max-new-tokens", str(NEW_TOKENS)]
    for name, (_, how) in WAYS.items():
        assert generate([*flags, *how, "--trace-out", str(folder / name)]) == 0
        export_run(RunReader(folder / name), "parquet", folder / f"{name}_parquet")
        if name != "stats":
            export_run(RunReader(folder / name), "replay", folder / f"{name}_replay")
    how = [*WAYS["full"][1], "--trace-format", "parquet"]
    assert generate([*flags, *how, "--trace-out", str(folder / "full_direct")]) == 0
    return folder


@pytest.mark.parametrize("name", WAYS)
def test_within_15_percent_of_real_runs(runs: Path, name: str) -> None:
    """The tiny model's random weights select nearly uniformly."""
    run = RunReader(runs / name)
    requests = list(run.requests())
    load = TraceLoad(
        num_layers=4,
        top_k=128,
        context=requests[0]["num_prompt_tokens"],
        num_steps=NEW_TOKENS - 1,
        batch_size=len(requests),
        store_scores=name == "scores",
    )
    assert {request["num_output_tokens"] for request in requests} == {NEW_TOKENS}
    assert load.num_records == len(list(run.steps()))
    paths = {
        "jsonl": f"{name}/trace_steps.jsonl",
        "parquet": f"{name}_parquet/trace_steps.parquet",
        "parquet, direct": f"{name}_direct/trace_steps.parquet",
        "replay": f"{name}_replay/trace_steps",
    }
    sizes = estimate_sizes(load, WAYS[name][0])
    assert [size.format for size in sizes] == [one for one in FORMATS if name != "stats" or one != "replay"]
    for size in sizes:
        path = runs / paths[size.format]
        if not path.exists():
            assert size.format == "parquet, direct" and name != "full"
            continue
        real = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
        low, high = size.total_bytes
        assert low <= high
        assert real == pytest.approx(high, rel=0.15), size.format
        assert [total / load.num_records for total in size.total_bytes] == pytest.approx(
            size.bytes_per_record
        )


def test_levels_and_contexts_are_in_order() -> None:
    @functools.cache
    def bytes_a_record(context: int, level: Level) -> tuple[float, float]:
        load = TraceLoad(num_layers=8, top_k=256, context=context, num_steps=16, batch_size=1)
        jsonl, *_ = estimate_sizes(load, level)
        return jsonl.bytes_per_record

    for context in (1_000, 8_000):
        full, blocks, stats = (bytes_a_record(context, level) for level in LEVELS)
        assert full > blocks > stats
    assert bytes_a_record(8_000, "full") > bytes_a_record(1_000, "full") > bytes_a_record(100, "full")


def test_the_ring_is_the_recorders(tmp_path: Path) -> None:
    """Counted from the ring a recorder makes: every buffer of every slot."""
    for scores in (False, True):
        load = TraceLoad(
            num_layers=3, top_k=16, context=50, num_steps=5, batch_size=4, num_requests=9, store_scores=scores
        )
        config = TraceConfig(out=tmp_path, store_scores=scores, queue_steps=5)
        tracer: Any = SimpleNamespace(config=config)
        ring = ForwardRecorder(partial(hooked, []), num_layers=3, max_rows=4, top_k=16, tracer=tracer).ring
        assert ring is not None
        slots = [ring.free.get() for _ in range(ring.free.qsize())]
        buffers = [b for slot in slots for b in (slot.positions, slot.stats, slot.scores) if b is not None]
        assert load.ring_bytes(queue_steps=5) == sum(b.numel() * b.element_size() for b in buffers)


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_selections_are_what_they_say(kind: Kind) -> None:
    source = SyntheticSelections(kind, num_layers=2, top_k=2048, seed=1)
    steps = [source.capture([32_768 + i, 1_000 + i], i) for i in range(6)]
    overlaps = []
    for before, after in itertools.pairwise(steps):
        for layer in range(2):
            chosen = after.positions[layer, 0]
            assert len(np.unique(chosen)) == 2048
            assert (chosen.min() >= 0) & (chosen.max() < after.seq_len[0])
            overlaps.append(len(np.intersect1d(before.positions[layer, 0], chosen)) / 2048)
            short = after.positions[layer, 1]
            assert sorted(short[short >= 0]) == list(range(after.seq_len[1]))
    assert np.mean(overlaps) == pytest.approx(0.85 if kind == "clustered" else 2048 / 32_768, abs=0.05)
    again = SyntheticSelections(kind, num_layers=2, top_k=2048, seed=1).capture([32_768, 1_000], 0)
    assert (again.positions == steps[0].positions).all()


def test_a_sample_is_no_larger_than_the_load() -> None:
    load = TraceLoad(num_layers=2, top_k=8, context=4, num_steps=3, batch_size=1)
    assert len(draw_sample(load, "full", "uniform").lines) == load.num_records == 6
    assert TraceLoad(2, 8, 4, num_steps=10, batch_size=3, num_requests=7, sample_rate=0.5).num_records == 70


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", str(CONFIG), "--steps", "31", "--batch", "2", "--context", "500", "--requests", "6"]
    assert cli.main(["estimate", *flags]) == 0
    out = capsys.readouterr().out
    assert "744 records = 6 requests x 31 steps x 4 layers" in " ".join(out.split())
    assert "Modelled" in out
    assert "Measured here" in out
    for level in LEVELS:
        assert out.count(f" {level} ") >= 2
    assert cli.main(["estimate", *flags, "--level", "stats"]) == 0
    assert "blocks " not in capsys.readouterr().out.split("Modelled")[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "0", "--batch", "1"], "--steps 0: use at least 1"),
        (["--steps", "1", "--batch", "-1"], "--batch -1: use at least 1"),
        (["--steps", "1", "--batch", "1", "--trace-sample-rate", "0"], "--trace-sample-rate 0.0"),
        (["--steps", "1", "--batch", "1", "--level", "stats", "--trace-store-scores"], "--trace-level full"),
        (["--steps", "1", "--batch", "1", "--config", "absent.json"], "absent.json"),
    ],
)
def test_mistakes_are_named(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "--config", str(CONFIG), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
