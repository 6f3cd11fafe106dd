"""Prefix caching on the model: the same tokens and selections, and a trace that says what was really hit."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.commands.run_burstgpt import main as run_burstgpt
from dsatrace.commands.run_dataset import main as run_dataset
from dsatrace.engine.block_tables import new_pool
from dsatrace.engine.clock import VirtualClock
from dsatrace.engine.engine import Engine
from dsatrace.engine.scheduler import Scheduler
from dsatrace.engine.settings import RunSettings
from dsatrace.errors import UserError
from dsatrace.files import write_json
from dsatrace.kv.layout import CacheLayout
from dsatrace.model.transformer import Transformer
from dsatrace.runner.model_runner import ModelRunner
from dsatrace.runner.sampler import Sampler
from dsatrace.schema import (
    MANIFEST_FILE,
    REQUEST_FIELDS,
    REQUESTS_FILE,
    SUMMARY_FIELDS,
    SUMMARY_FILE,
    problems,
)
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.export import export_run
from dsatrace.trace.manifest import PrefixSource, RunInfo
from dsatrace.trace.reader import RunReader
from dsatrace.trace.summarize import summarize_runs
from dsatrace.trace.tracer import Tracer
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.run import verify
from dsatrace.workloads.request import Request
from helpers.checkpoints import tiny_config
from helpers.golden_run import read_lines, write_lines
from helpers.models import SMALL, random_model, random_tokens
from helpers.power import examples
from helpers.trace_samples import SECRET

STATISTICS_BLOCK = 8


@pytest.fixture(scope="module")
def exact_model() -> Transformer:
    return random_model(dataclasses.replace(SMALL, dtype="fp64"))


@dataclasses.dataclass(frozen=True)
class Setting:
    """How an engine is set up."""

    num_tokens: int = 512
    block_size: int = 16
    batch_size: int = 4
    chunk: int = 32

    def serve(
        self, model: Transformer, requests: list[Request], folder: Path, source: PrefixSource
    ) -> dict[str, list[int]]:
        """Serves the requests into the run `folder`; returns their answers."""
        run = RunInfo(
            model_config=dataclasses.asdict(model.args),
            layouts=[CacheLayout("test", 64, 20)],
            device="cpu",
            prefix_source=source,
        )
        config = TraceConfig(out=folder, block_size=STATISTICS_BLOCK, prefill="last")
        with Tracer(config, run, secret=SECRET) as tracer:
            pool = new_pool(-(-self.num_tokens // self.block_size), self.block_size, source == "cache")
            cache = model.new_cache(pool.blocks.num_blocks, self.block_size)
            runner = ModelRunner(model, cache, Sampler(seed=3), tracer=tracer)
            scheduler = Scheduler(pool, self.batch_size, self.chunk)
            engine = Engine(scheduler, runner, tracer, RunSettings(clock=VirtualClock()))
            live = [engine.submit(request) for request in requests]
            for _ in engine.run():
                pool.check_integrity([live.held for live in scheduler.running if live.held])
        return {one.request_id: one.answer for one in live}


def selections(folder: Path) -> dict[tuple[str, int, int], list[int]]:
    found = {}
    for record in read_lines(folder):
        key = record["request_id"], record["step_idx"], record["layer_id"]
        assert key not in found, "a step stands in the trace once, however often it was computed"
        found[key] = record["selected_token_pos"]
    return found


def of_heads(heads: list[int], parts: list[tuple[int, int, int]], temperature: float) -> list[Request]:
    """Requests of (head, tokens of its own, new tokens); `heads` are lengths."""
    return [
        Request(
            f"r{i}",
            (
                *random_tokens(heads[head % len(heads)], SMALL, seed=100 + head % len(heads)),
                *random_tokens(own, SMALL, seed=i),
            ),
            new,
            temperature,
        )
        for i, (head, own, new) in enumerate(parts)
    ]


@settings(max_examples=examples(5), deadline=None)
@given(
    heads=st.lists(st.integers(1, 90), min_size=1, max_size=2),
    parts=st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 20), st.integers(1, 24)), min_size=2, max_size=5
    ),
    setting=st.builds(
        Setting,
        num_tokens=st.integers(140, 400),
        block_size=st.sampled_from([1, 4, 7, 16]),
        batch_size=st.integers(1, 4),
        chunk=st.sampled_from([5, 16, 64]),
    ),
    temperature=st.sampled_from([0.0, 0.9]),
)
def test_the_same_tokens_and_selections_as_without_it(
    exact_model: Transformer,
    heads: list[int],
    parts: list[tuple[int, int, int]],
    setting: Setting,
    temperature: float,
) -> None:
    """In float64, nothing forgiven: shared heads, any chunks and blocks, evictions and preemptions."""
    requests = of_heads(heads, parts, temperature)
    with tempfile.TemporaryDirectory() as name:
        plain, cached = Path(name, "plain"), Path(name, "cached")
        answers = setting.serve(exact_model, requests, plain, "analysis")
        assert setting.serve(exact_model, requests, cached, "cache") == answers
        assert selections(cached) == selections(plain)
        verify(cached)


def run_of(model: Transformer, folder: Path, setting: Setting = Setting(), heads: int = 50) -> Path:
    """Two requests that begin alike, and one that does not."""
    parts = [(0, 10, 3), (0, 7, 4), (1, 9, 2)]
    setting.serve(model, of_heads([heads, 30], parts, 0.0), folder, "cache")
    return folder


@pytest.fixture(scope="module")
def whole(exact_model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a run, to be read only."""
    return run_of(exact_model, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def test_the_trace_says_what_was_hit(exact_model: Transformer, whole: Path, tmp_path: Path) -> None:
    """Physical blocks of 12 and statistics' blocks of 8: 50 common tokens are 4 of the first, 48 tokens
    and so 6 of the second."""
    folder = run_of(exact_model, tmp_path / "run", Setting(block_size=12))
    lines = {line["request_id"]: line for line in read_lines(folder, REQUESTS_FILE)}
    assert all(problems(line, "full", REQUEST_FIELDS) == [] for line in lines.values())
    assert {name: line["prefix_hit_tokens"] for name, line in lines.items()} == {"r0": 0, "r1": 48, "r2": 0}
    assert {name: line["num_prefill_tokens"] for name, line in lines.items()} == {"r0": 60, "r1": 9, "r2": 39}
    assert all(line["prefill_s"] > 0 for line in lines.values())
    for record in read_lines(folder):
        expected = 6 if record["request_id"] == "r1" else 0
        assert record["prefix"]["prefix_cached_blocks"] == expected
        assert record["prefix"]["prefix_cache_hit"] == (expected > 0)
    manifest, summary = RunReader(folder).manifest, RunReader(folder).summary()
    assert manifest["prefix_source"] == "cache"
    saved = summary["prefix_cache"]
    assert problems(summary, "full", SUMMARY_FIELDS) == []
    assert (saved["prompt_tokens"], saved["hit_tokens"], saved["computed_tokens"]) == (156, 48, 108)
    assert saved["hit_rate"] == 48 / 156
    assert saved["prefill_s"] == pytest.approx(sum(line["prefill_s"] for line in lines.values()), abs=1e-5)
    assert saved["saved_s"] == pytest.approx(48 * saved["prefill_s"] / 108)
    assert saved["saved_kind"] == "modelled"
    assert verify(folder).state == "complete"
    assert summarize_runs([folder])["prefix_cache"] == saved
    both = summarize_runs([folder, whole])["prefix_cache"]
    assert both["prompt_tokens"] == 2 * 156


def test_without_a_cache_the_trace_says_what_could_be_hit(
    exact_model: Transformer, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    Setting().serve(exact_model, of_heads([50], [(0, 10, 3), (0, 7, 4)], 0.0), folder, "analysis")
    assert {r["prefix"]["prefix_cached_blocks"] for r in read_lines(folder) if r["request_id"] == "r1"} == {6}
    assert not {"prefix_hit_tokens", "prefill_s"} & read_lines(folder, REQUESTS_FILE)[0].keys()
    assert RunReader(folder).manifest["prefix_source"] == "analysis"
    assert RunReader(folder).summary()["prefix_cache"] is None
    with pytest.raises(UserError, match="prefix source analysis, but cache in"):
        summarize_runs([whole, folder])


def test_an_exported_run_says_the_same(whole: Path, tmp_path: Path) -> None:
    export_run(RunReader(whole), "parquet", tmp_path / "parquet")
    export_run(RunReader(tmp_path / "parquet"), "jsonl", tmp_path / "back")
    for name in (REQUESTS_FILE, "trace_steps.jsonl", SUMMARY_FILE):
        assert (tmp_path / "back" / name).read_bytes() == (whole / name).read_bytes()
    assert verify(tmp_path / "back").state == "complete"
    expected = RunReader(whole).summary()["prefix_cache"]
    assert summarize_runs([tmp_path / "parquet"])["prefix_cache"] == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prefix_hit_tokens": 32}, "num_prefill_tokens|prefix.prefix_cached_blocks"),
        ({"prefix_hit_tokens": 57}, "prefix_hit_tokens: .*derived 0 to 56"),
        ({"prefix_hit_tokens": None}, "state length|num_prefill_tokens"),
        ({"num_prefill_tokens": 10}, "57 prompt tokens, 48 of them cached"),
        ({"prefill_s": -1.0}, "below 0"),
        ({"prefill_s": 1000.0}, "prefix_cache"),
        ({"prefill_s": ...}, "prefill_s: .*prefix_source is cache"),
    ],
)
def test_an_edited_hit_is_found(copied: Path, change: dict[str, Any], said: str) -> None:
    changed = [
        line | (change if line["request_id"] == "r1" else {}) for line in read_lines(copied, REQUESTS_FILE)
    ]
    lines = [{name: value for name, value in line.items() if value is not ...} for line in changed]
    write_lines(copied, lines, REQUESTS_FILE)
    with pytest.raises(Mismatch, match=said):
        verify(copied)


@pytest.mark.parametrize(
    ("source", "said"),
    [("analysis", "prefix_hit_tokens: .*without a prefix cache"), ("guessed", "not analysis or cache")],
)
def test_another_source_in_the_manifest_is_found(copied: Path, source: str, said: str) -> None:
    manifest = json.loads((copied / MANIFEST_FILE).read_text())
    write_json(copied / MANIFEST_FILE, manifest | {"prefix_source": source})
    with pytest.raises(Mismatch, match=said):
        verify(copied)


def test_conversations_prefill_less_and_are_answered_alike(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Every user turn of some of ShareGPT's sample is a request that begins with the turns before it."""
    flags = [
        *("--ckpt-path", tiny_checkpoint, "--config", tiny_config(tmp_path, index_topk=32), "--no-hub"),
        *("--dataset", "sharegpt", "--sharegpt-turn-mode", "per_user_turn", "--max-new-tokens", 4),
        *("--cache-block-size", 16, "--save-text", "--limit", 8),
    ]
    runs = {}
    for name, more in (("plain", []), ("cached", ["--prefix-caching"])):
        runs[name] = tmp_path / name
        assert run_dataset([str(flag) for flag in (*flags, *more, "--trace-out", runs[name])]) == 0
        assert verify(runs[name]).state == "complete"
    plain, cached = (
        {line["request_id"]: line for line in read_lines(folder, REQUESTS_FILE)} for folder in runs.values()
    )
    assert {name: line["text"] for name, line in plain.items()} == {
        name: line["text"] for name, line in cached.items()
    }
    assert cached["row0.turn0"]["prefix_hit_tokens"] == 0
    assert cached["row0.turn1"]["prefix_hit_tokens"] > 0
    saved = RunReader(runs["cached"]).summary()["prefix_cache"]
    assert saved["computed_tokens"] + saved["hit_tokens"] == saved["prompt_tokens"]
    assert saved["prompt_tokens"] == sum(line["num_prompt_tokens"] for line in plain.values())
    assert saved["hit_rate"] > 0.2


def test_a_resumed_run_goes_on_with_a_cold_cache(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Its hits are the engine's own, so they are fewer than those of a run in one go; the rest is as good."""
    folder = tmp_path / "run"
    flags = [
        *("--ckpt-path", tiny_checkpoint, "--config", tiny_config(tmp_path, index_topk=32), "--no-hub"),
        *("--dataset", "sharegpt", "--sharegpt-turn-mode", "per_user_turn", "--max-new-tokens", 4),
        *("--cache-block-size", 16, "--batch-size", 1, "--prefix-caching", "--limit", 6),
        *("--trace-out", folder),
    ]
    assert run_dataset([str(flag) for flag in flags]) == 0
    whole, lines = RunReader(folder).summary()["prefix_cache"], read_lines(folder, REQUESTS_FILE)
    assert [line["request_id"] for line in lines[:2]] == ["row0.turn0", "row0.turn1"]
    write_lines(folder, lines[:1], REQUESTS_FILE)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    write_json(folder / MANIFEST_FILE, manifest | {"state": "incomplete"})
    assert run_dataset(["--resume", str(folder)]) == 0
    assert verify(folder).state == "complete"
    resumed = {line["request_id"]: line for line in read_lines(folder, REQUESTS_FILE)}
    assert resumed["row0.turn1"]["prefix_hit_tokens"] == 0 < lines[1]["prefix_hit_tokens"]
    saved = RunReader(folder).summary()["prefix_cache"]
    assert saved["prompt_tokens"] == whole["prompt_tokens"]
    assert 0 < saved["hit_tokens"] < whole["hit_tokens"]
    assert summarize_runs([folder])["prefix_cache"] == saved


def test_simulated_arrivals_share_their_prefix(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = [
        *("--runner", "simulator", "--tokenizer", tiny_checkpoint, "--burstgpt-generate", "--limit", 200),
        *("--api-share", 0.0, "--cache-block-size", 16),
        *("--shared-prefix-share", 0.8, "--prefix-caching", "--trace-out", folder),
    ]
    assert run_burstgpt([str(flag) for flag in flags]) == 0
    assert verify(folder).state == "complete"
    assert RunReader(folder).manifest["prefix_source"] == "cache"
    assert RunReader(folder).summary()["prefix_cache"]["hit_rate"] > 0.1
