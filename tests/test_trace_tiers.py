"""Records of a run whose latents lie in tiers: fast and plain say the same, at every level, in every format
and after a resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.commands.export import main as export
from dsatrace.errors import UserError
from dsatrace.schema import LEVELS, MANIFEST_FIELDS, STEPS_FILE, SUMMARY_FIELDS, SUMMARY_FILE, problems
from dsatrace.trace.manifest import PoolSettings, RunInfo, TierSettings
from dsatrace.trace.reader import RunReader
from dsatrace.trace.records import RecordDeriver, StepLines
from dsatrace.trace.request_facts import RequestFacts
from dsatrace.trace.resume import check_resumable
from dsatrace.trace.summarize import summarize_runs
from dsatrace.trace.summary import Summary
from dsatrace.trace.tracer import Tracer, tiers_of
from dsatrace.verify.plain_summary import summarize
from dsatrace.verify.run import verify
from helpers import resume_samples
from helpers.golden_run import SERVING, read_lines, write_golden
from helpers.power import examples
from helpers.step_records import step_lines
from helpers.tier_samples import LATENT, SETUPS, SimulatedTiers, setup
from helpers.trace_samples import (
    LAYOUT,
    RUN,
    SECRET,
    WAYS,
    SampleRequest,
    config_for,
    plain_records,
    sample_capture,
)

LINES = StepLines()
NOTE = "which tier held a token: the engine's word, of which the accounts must add up"


@settings(max_examples=examples(75), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    seq_lens=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    num_layers=st.integers(1, 3),
    k=st.integers(1, 70),
    block_size=st.sampled_from([1, 3, 4, 8, 16, 64]),
    unit_tokens=st.sampled_from([1, 2, 4, 16, 64]),
    hbm_blocks=st.integers(1, 20),
    pools=st.sampled_from([(True, True), (True, False), (False, True)]),
    row=st.booleans(),
    how=st.sampled_from(WAYS),
)
def test_fast_equals_plain(
    seed: int,
    seq_lens: list[int],
    num_layers: int,
    k: int,
    block_size: int,
    unit_tokens: int,
    hbm_blocks: int,
    pools: tuple[bool, bool],
    row: bool,
    how: dict[str, Any],
) -> None:
    rng = np.random.default_rng(seed)
    tiers = setup(unit_tokens, hbm_blocks, *pools, row=row)
    config = config_for(block_size=block_size, **how)
    engine, deriver = SimulatedTiers(tiers, seed), RecordDeriver(config, LAYOUT, tiers_of(of(tiers)))
    summary = Summary((16, 24), "synthetic", offloaded=True)
    records = []
    for step in range(3):
        lengths = [n + step for n in seq_lens]
        capture = engine.fetched(
            sample_capture(rng, lengths, num_layers, k, step_idx=step, batch_size=len(lengths) + 1)
        )
        derived = deriver.derive(capture)
        summary.add_step(derived)
        lines = bytes(LINES.encode(derived))
        assert lines == step_lines(derived)
        plain = plain_records(capture, config, tiers)
        for line, expected in zip(lines.splitlines(), plain, strict=True):
            stored = orjson.loads(line)
            assert stored["kv_fetch"] == expected["kv_fetch"]
            assert list(stored["kv_fetch"]["hbm"]) == list(expected["kv_fetch"]["hbm"])
            assert problems(stored, config.level) == []
        records += plain
    if config.level == "full":
        again = summarize(records, requests=[], top_k=k, block_sizes=(16, 24), offloaded=True)
        assert summary.to_json("complete")["kv_fetch"] == again["kv_fetch"]


def of(tiers: TierSettings | None, **changes: Any) -> RunInfo:
    return dataclasses.replace(RUN, tiers=tiers, **changes)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SETUPS)
def test_a_run_verifies_and_summarizes(tmp_path: Path, name: str, level: str) -> None:
    folder = write_golden(tmp_path / "run", level=level, serving=SERVING, tiers=SETUPS[name])
    assert NOTE in verify(folder).notes
    stored = json.loads((folder / SUMMARY_FILE).read_text())
    assert problems(stored, "full", SUMMARY_FIELDS) == []
    assert problems(RunReader(folder).manifest, "full", MANIFEST_FIELDS) == []
    again = summarize_runs([folder])
    assert list(again) == list(stored)
    for part in ("kv_fetch", "tiers", "serving", "bytes_read"):
        assert again[part] == stored[part]
    records = read_lines(folder)
    for tier, totals in stored["kv_fetch"].items():
        for field, total in totals.items():
            assert total == sum(record["kv_fetch"][tier][field] for record in records)
    assert stored["kv_fetch"]["hbm"]["hit_tokens"] > 0
    assert stored["kv_fetch"]["hbm"]["missed_tokens"] > 0
    assert stored["serving"]["counts"]["recomputes"] == 6


@pytest.mark.parametrize("level", LEVELS)
def test_columns_hold_it_all(tmp_path: Path, level: str) -> None:
    folder = write_golden(tmp_path / "run", level=level, tiers=SETUPS["half a block"])
    columns, back = tmp_path / "columns", tmp_path / "back"
    assert export([str(folder), "--to", "parquet", "--out", str(columns)]) == 0
    assert summarize_runs([columns])["kv_fetch"] == summarize_runs([folder])["kv_fetch"]
    assert export([str(columns), "--to", "jsonl", "--out", str(back)]) == 0
    assert (back / STEPS_FILE).read_bytes() == (folder / STEPS_FILE).read_bytes()
    assert verify(back).num_records == 48


def test_runs_merge_without_their_stores(tmp_path: Path) -> None:
    folders = [write_golden(tmp_path / name, seed=i, tiers=SETUPS["row"]) for i, name in enumerate("ab")]
    merged = summarize_runs(folders)
    parts = [json.loads((folder / SUMMARY_FILE).read_text()) for folder in folders]
    assert merged["tiers"] is None
    for tier, totals in merged["kv_fetch"].items():
        assert totals == {name: sum(part["kv_fetch"][tier][name] for part in parts) for name in totals}
    for other, said in (
        (None, "tiers none"),
        (setup(hbm_blocks=4), "tiers blocks of 4 tokens, 4 blocks in HBM"),
    ):
        alone = write_golden(tmp_path / said[:11], tiers=other)
        with pytest.raises(UserError, match=said):
            summarize_runs([folders[0], alone])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("stop_at", [0, 3, 6, 9])
def test_a_resumed_run_is_whole(
    tmp_path: Path, stop_at: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = SETUPS["block"]
    monkeypatch.setattr(resume_samples, "INFO", dataclasses.replace(resume_samples.INFO, tiers=tiers))
    folder = resume_samples.serve(tmp_path / "run", stop_at, level=level)
    before = verify(folder)
    assert before.state == "incomplete"
    resumed = resume_samples.resume(folder, level=level)
    result = verify(folder)
    assert (result.state, result.num_requests) == ("complete", 5)
    assert not any("tiers" in note for note in result.notes)
    said = RunReader(folder).summary()["tiers"]
    assert said["since_forward"] == resumed.next_forward_idx
    again = summarize_runs([folder])
    assert (again["tiers"], again["kv_fetch"]) == (said, RunReader(folder).summary()["kv_fetch"])


def test_a_run_is_resumed_with_its_own_tiers_only() -> None:
    old, new = ({"seed": 0, "tiers": tiers.to_json()} for tiers in (setup(hbm_blocks=3), setup(hbm_blocks=4)))
    check_resumable(old, old)
    check_resumable({"seed": 0}, {"seed": 0, "tiers": None})  # from before there were any
    with pytest.raises(UserError, match=r"tiers\.hbm\.blocks was 3 and is 4 now; give the same tiers"):
        check_resumable(old, new)
    with pytest.raises(UserError, match="tiers was None"):
        check_resumable({"seed": 0}, new)


def test_the_tracer_writes_what_it_is_told(tmp_path: Path) -> None:
    tiers = SETUPS["block"]
    engine, info = SimulatedTiers(tiers), of(tiers, model_config={"n_layers": 2, "index_topk": 8})
    with Tracer(config_for(tmp_path, block_size=4, prefill="last"), info, secret=SECRET) as tracer:
        requests = [SampleRequest(f"r{i}", [i] * 20) for i in range(3)]
        for request in requests:
            tracer.add_request(request)
        capture = sample_capture(np.random.default_rng(0), [20], request_ids=("r0",), step_idx=-1)
        capture = dataclasses.replace(capture, phase="prefill", prefixes=tracer.prefixes(("r0",)))
        tracer.put(engine.fetched(capture))
        tracer.finish_request(
            requests[0],
            RequestFacts(num_output_tokens=1, state="failed", error="remote_pool", num_recomputes=2),
        )
        tracer.finish_request(requests[1], RequestFacts(num_output_tokens=0, state="aborted"))
        told = engine.described(num_recomputes=2) | {"failed_requests": 1}
        with pytest.raises(ValueError, match=r"not of the schema: tiers.lost_units: 1.5 is not int"):
            tracer.describe_tiers(told | {"lost_units": 1.5})
        tracer.describe_tiers(told)
    run = RunReader(tmp_path)
    assert run.manifest["tiers"]["remote_pool"] == {
        "store": "redis://***@10.0.0.7:6379",
        "blocks": None,
        "latency_kind": "modelled",
    }
    assert run.summary()["tiers"] == told
    failed, aborted, unfinished = run.requests()
    assert (failed["state"], failed["error"], failed["num_recomputes"]) == ("failed", "remote_pool", 2)
    assert (aborted["num_recomputes"], unfinished["num_recomputes"]) == (0, 0)
    assert verify(tmp_path).num_records == 2


def test_tiers_are_not_described_where_there_are_none(tmp_path: Path) -> None:
    with Tracer(config_for(tmp_path), RUN, secret=SECRET) as tracer:
        request = SampleRequest("r0", [1] * 20)
        tracer.add_request(request)
        with pytest.raises(ValueError, match="no tiers to describe"):
            tracer.describe_tiers({})
        tracer.finish_request(request, RequestFacts(num_output_tokens=0, state="aborted", num_recomputes=0))
    run = RunReader(tmp_path)
    assert "num_recomputes" not in next(run.requests())
    assert (run.manifest["tiers"], run.summary()["tiers"]) == (None, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"granularity": "page"}, "granularity page: not one of block, row"),
        ({"on_error": "stop"}, "on_error stop: not one of recompute, fail"),
        ({"index_keys": "cpu"}, "index_keys cpu"),
        ({"hbm_blocks": 0}, "0 blocks in HBM"),
        ({"granularity": "row"}, "a row is one token, not 4"),
        ({"local_pool": None, "remote_pool": None}, "without a pool"),
    ],
)
def test_a_setup_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(setup(), **change)


def test_a_unit_has_the_size_of_its_layout() -> None:
    with pytest.raises(ValueError, match="4000 bytes, 1152 bytes per token in layout demo"):
        of(dataclasses.replace(setup(), unit_bytes=4000))
    assert of(setup()).tiers == setup()
    assert setup().unit_bytes == 4 * LATENT
    with pytest.raises(ValueError, match="latency_kind none"):
        PoolSettings("ram", 4, "none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 blocks"):
        PoolSettings("ram", 0, "measured")


def test_a_broken_capture_names_its_forward() -> None:
    capture = sample_capture(np.random.default_rng(0), [20], forward_idx=7)
    deriver = RecordDeriver(config_for(), LAYOUT, tiers_of(of(setup())))
    with pytest.raises(ValueError, match="forward 7: the run's latents lie in tiers"):
        deriver.derive(capture)
