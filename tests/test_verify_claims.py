"""What a careful forger of a run misses: every claim here is derivable, and a true one raises no alarm."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dsatrace.files import write_json
from dsatrace.kv.layout import CacheLayout, named_layouts
from dsatrace.schema import MANIFEST_FILE, REQUESTS_FILE, STEPS_FILE, SUMMARY_FILE
from dsatrace.trace.manifest import config_digest
from dsatrace.trace.summarize import summarize_runs
from dsatrace.verify.facts import check_facts
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.run import verify
from helpers.golden_run import SERVING, GoldenRequest, read_lines, write_golden, write_lines
from helpers.json_edits import changed

RULER = {
    "name": "ruler",
    "metric": "string match, 0 to 100",
    "counts": {"examples": 3, "task 0": 2, "task 1": 1},
}


def rewrite(folder: Path, name: str, **changes: Any) -> None:
    record = json.loads((folder / name).read_text())
    write_json(folder / name, record | changes)


def reprefixed(
    folder: Path,
    prefixes: Mapping[str, tuple[int, str]],
    source: str = "analysis",
    keep: Sequence[str] = (),
) -> Path:
    """Gives every request (cached blocks, key), derives all that follows from them, and sums up anew."""
    records = read_lines(folder)
    for record in records:
        cached, key = prefixes[record["request_id"]]
        blocks = record["selected_block_ids"]
        shared = [block for block in blocks if block < cached]
        record["prefix"] = {
            "prefix_cache_hit": cached > 0,
            "prefix_cached_blocks": cached,
            "prefix_key": key,
            "intersection_ratio": len(shared) / len(blocks),
            "intersection_blocks": shared,
        }
    write_lines(folder, records)
    size = records[0]["block_size_tokens"]
    if source == "cache":
        rewrite(folder, MANIFEST_FILE, prefix_source="cache")
        lines = read_lines(folder, REQUESTS_FILE)
        for line in lines:
            hit = prefixes[line["request_id"]][0] * size
            computed = line["num_prompt_tokens"] - hit
            line |= {"prefix_hit_tokens": hit, "num_prefill_tokens": computed, "prefill_s": 0.1}
        write_lines(folder, lines, REQUESTS_FILE)
    write_json(folder / SUMMARY_FILE, summarize_runs([folder]))
    return folder


A, B, C = "a" * 16, "b" * 16, "c" * 16
KEY_TOKENS = {"prefix_key_tokens": 16}  # four blocks
LONG = (GoldenRequest("r0", 20, 3), GoldenRequest("r1", 40, 4), GoldenRequest("r2", 45, 4))


@pytest.mark.parametrize("source", ["analysis", "cache"])
@pytest.mark.parametrize(
    "prefixes",
    [
        {"r0": (0, A), "r1": (0, B), "r2": (0, C)},
        {"r0": (0, A), "r1": (0, B), "r2": (3, C)},  # less than a key is of
        {"r0": (0, A), "r1": (4, A), "r2": (10, A)},
        {"r0": (0, A), "r1": (0, B), "r2": (9, B)},
    ],
)
def test_prefixes_as_they_may_be(tmp_path: Path, prefixes: dict[str, tuple[int, str]], source: str) -> None:
    verify(reprefixed(write_golden(tmp_path / "run", LONG, **KEY_TOKENS), prefixes, source))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("source", ["analysis", "cache"])
@pytest.mark.parametrize(
    ("prefixes", "said"),
    [
        (
            {"r0": (1, A), "r1": (0, B), "r2": (0, C)},
            r"line 1 .*request 'r0'.*prefix_cached_blocks: stored 1, and nothing was there before",
        ),
        (
            {"r0": (0, A), "r1": (0, B), "r2": (5, C)},
            r"request 'r2'.*prefix_cached_blocks: stored 5, so an earlier request begins with 20 equal",
        ),
        ({"r0": (0, A), "r1": (0, "B" * 16), "r2": (0, C)}, "prefix_key: .*not 16 hex digits"),
        ({"r0": (0, A), "r1": (0, B[:-1]), "r2": (0, C)}, "prefix_key: .*not 16 hex digits"),
        ({"r0": (0, A), "r1": (0, B + "b"), "r2": (0, C)}, "prefix_key: .*not 16 hex digits"),
        ({"r0": (0, A), "r1": (0, ""), "r2": (0, C)}, "prefix_key: .*not 16 hex digits"),
    ],
)
def test_an_impossible_prefix_is_found(
    tmp_path: Path, prefixes: dict[str, tuple[int, str]], said: str, source: str, plain: bool
) -> None:
    folder = reprefixed(write_golden(tmp_path / "run", LONG, **KEY_TOKENS), prefixes, source)
    with pytest.raises(Mismatch, match=said):
        verify(folder, plain=plain)


def test_equal_beginnings_are_shared(tmp_path: Path) -> None:
    """Prompts are compared with all earlier ones; a cache may have given the blocks up."""
    prefixes = {"r0": (0, A), "r1": (0, B), "r2": (3, B)}
    folder = reprefixed(write_golden(tmp_path / "run", LONG, **KEY_TOKENS), prefixes)
    with pytest.raises(Mismatch, match=r"request 'r2'.*'r1' begins with the same 16 tokens: one shares 4"):
        verify(folder)
    verify(reprefixed(folder, prefixes, "cache"))


def test_one_key_is_of_one_length(tmp_path: Path) -> None:
    """A prompt shorter than the key is hashed whole."""
    folder = write_golden(tmp_path / "run", LONG, prefix_key_tokens=42)
    verify(reprefixed(folder, {"r0": (0, A), "r1": (0, B), "r2": (0, C)}))
    reprefixed(folder, {"r0": (0, A), "r1": (0, B), "r2": (10, B)})
    with pytest.raises(Mismatch, match=r"request 'r1' has it too, of its first 40 tokens and not 42"):
        verify(folder)


def test_the_first_to_arrive_shares_nothing(tmp_path: Path) -> None:
    """Where no prefill is recorded, the arrivals tell which request was first."""
    folder = write_golden(tmp_path / "run", LONG, prefill="off", **KEY_TOKENS)
    reprefixed(folder, {"r0": (1, A), "r1": (0, B), "r2": (0, C)})
    with pytest.raises(Mismatch, match=r"request 'r0'.*nothing was there before"):
        verify(folder)
    lines = [line | {"arrival_s": 0.0} for line in read_lines(folder, REQUESTS_FILE)]
    write_lines(folder, lines, REQUESTS_FILE)
    verify(folder)  # now nobody can know


def test_someone_was_first(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run", LONG, prefill="off", **KEY_TOKENS)
    lines = [line | {"arrival_s": 0.0} for line in read_lines(folder, REQUESTS_FILE)]
    write_lines(folder, lines, REQUESTS_FILE)
    reprefixed(folder, {"r0": (1, A), "r1": (1, B), "r2": (1, C)})
    with pytest.raises(Mismatch, match="the first of them cannot"):
        verify(folder)


def test_no_alarm_where_the_other_has_no_record(tmp_path: Path) -> None:
    """A rejected request was announced, and the first to run may begin like it."""
    folder = write_golden(tmp_path / "run", LONG, **KEY_TOKENS)
    rejected = read_lines(folder, REQUESTS_FILE)[0] | {
        **{"request_id": "too long", "state": "rejected", "num_output_tokens": 0, "score": None},
        **{"first_token_s": None, "finish_s": None, "admitted_s": None, "arrival_s": 0.0},
    }
    write_lines(folder, [rejected, *read_lines(folder, REQUESTS_FILE)], REQUESTS_FILE)
    reprefixed(folder, {"r0": (5, A), "r1": (0, B), "r2": (0, C)})
    verify(folder)


@pytest.mark.parametrize("plain", [False, True])
def test_a_request_takes_as_long_as_its_steps(tmp_path: Path, plain: bool) -> None:
    folder = write_golden(tmp_path / "run", serving=SERVING | {"clock": "real"})
    verify(folder)
    records, lines = read_lines(folder), read_lines(folder, REQUESTS_FILE)
    name = "r1"
    steps = {
        r["step_idx"]: r["step_wall_us"] for r in records if r["request_id"] == name and r["step_idx"] >= 0
    }
    least_s = sum(steps.values()) / 1e6
    for seconds, is_possible in ((least_s, True), (0.99 * least_s, False)):
        new = [
            line | {"finish_s": line["first_token_s"] + seconds} if line["request_id"] == name else line
            for line in lines
        ]
        write_lines(folder, new, REQUESTS_FILE)
        write_json(folder / SUMMARY_FILE, summarize_runs([folder]))
        if is_possible:
            verify(folder, plain=plain)
        else:
            with pytest.raises(Mismatch, match=rf"{REQUESTS_FILE} .*'r1'.*finish_s: .*recorded steps took"):
                verify(folder, plain=plain)
    rewrite(folder, MANIFEST_FILE, serving=SERVING)
    write_json(folder / SUMMARY_FILE, summarize_runs([folder]))
    verify(folder, plain=plain)  # a virtual clock may run as it likes


MODEL = {"n_layers": 2, "index_topk": 8, "n_heads": 16, "index_n_heads": 4}
DIMENSIONS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
LAYOUTS = [dataclasses.asdict(layout) for layout in named_layouts(**DIMENSIONS).values()]


def facts(**changes: Any) -> dict[str, Any]:
    layouts = [*LAYOUTS, {"name": "mine", "latent_bytes_per_token": 1, "index_bytes_per_token": 0}]
    return {
        "started_utc": "2026-01-31T12:00:00Z",
        "world_size": 8,
        "model_config": MODEL | DIMENSIONS,
        "cache_layouts": layouts,
    } | changes


def tomorrow(days: float) -> str:
    then = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=days)
    return then.strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"started_utc": "yesterday"}, "started_utc: .*no date"),
        ({"started_utc": "2026-02-30T12:00:00Z"}, "started_utc: .*no date"),
        ({"started_utc": "2026-01-31 12:00:00"}, "started_utc: .*no date"),
        ({"started_utc": tomorrow(3)}, "started_utc: .*in the future"),
        ({"world_size": 0}, "world_size: stored 0, not a count"),
        ({"world_size": -8}, "world_size"),
        ({"world_size": 3}, "world_size: stored 3, 16 heads cannot"),
        ({"world_size": 32}, "world_size: stored 32, 16 heads cannot"),
        *(
            ({"model_config": MODEL | DIMENSIONS | {name: value}}, rf"model_config\.{name}: .*not a count")
            for name in ("n_heads", "index_n_heads", "index_head_dim", "kv_lora_rank", "qk_rope_head_dim")
            for value in (0, -1, 1.5, "16", True)
        ),
        ({"model_config": MODEL | DIMENSIONS | {"kv_lora_rank": 256}}, r"cache_layouts\[0\]\.latent"),
        ({"model_config": MODEL | DIMENSIONS | {"qk_rope_head_dim": 32}}, r"cache_layouts\[0\]\.latent"),
        ({"model_config": MODEL | DIMENSIONS | {"index_head_dim": 64}}, r"cache_layouts\[0\]\.index"),
    ],
)
def test_an_impossible_fact_is_found(changes: dict[str, Any], said: str) -> None:
    check_facts(facts())
    with pytest.raises(Mismatch, match=said):
        check_facts(facts(**changes))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("field", ["latent_bytes_per_token", "index_bytes_per_token"])
def test_every_known_layout_is_derived(place: int, field: str) -> None:
    for change in (1, -4, 128):
        value = LAYOUTS[place][field] + change
        with pytest.raises(Mismatch, match=rf"cache_layouts\[{place}\]\.{field}: stored {value}, derived"):
            check_facts(facts(cache_layouts=changed(LAYOUTS, (place, field), value)))


@pytest.mark.parametrize(
    ("latent", "index", "index_fp8", "is_possible"),
    [
        (1152, 132, True, True),  # bf16 on a GPU
        (1152, 260, True, True),  # bf16 without fp8 arithmetic
        (2304, 516, True, True),  # fp32
        (4608, 1032, True, True),  # fp64
        (1152, 256, False, True),
        (1152, 132, False, False),
        (1152, 256, True, False),
        (1153, 132, True, False),
        (576, 132, True, False),
        (1152, 516, True, False),  # keys wider than the model's numbers
    ],
)
def test_a_runs_own_layout_is_rows_of_one_dtype(
    latent: int, index: int, index_fp8: bool, is_possible: bool
) -> None:
    own = dataclasses.asdict(CacheLayout("this_run", latent, index))
    manifest = facts(cache_layouts=[own], model_config=MODEL | DIMENSIONS | {"index_fp8": index_fp8})
    if is_possible:
        check_facts(manifest)
    else:
        with pytest.raises(Mismatch, match=r"cache_layouts\[0\]\.(latent|index)_bytes_per_token"):
            check_facts(manifest)


def test_facts_are_checked_of_a_run(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run")
    model = {"n_layers": 3, "index_topk": 8, **DIMENSIONS}
    rewrite(folder, MANIFEST_FILE, model_config=model, model_config_digest=config_digest(model))
    verify(folder)
    model["kv_lora_rank"] = 500
    rewrite(folder, MANIFEST_FILE, model_config=model, model_config_digest=config_digest(model))
    with pytest.raises(Mismatch, match=rf"{MANIFEST_FILE}: cache_layouts\[0\]\.latent_bytes_per_token"):
        verify(folder)


@pytest.mark.parametrize(
    ("metric", "score", "said"),
    [
        ("string match, 0 to 100", 100.0, None),
        ("string match, 0 to 100", 100.5, "stored 100.5, not 0 to 100"),
        ("string match, 0 to 100", -1.0, "not 0 to 100"),
        ("accuracy, 0 or 1; chance 0.25", 1.0, None),
        ("accuracy, 0 or 1; chance 0.25", 0.5, "not 0 or 1"),
        ("perplexity", 1e9, None),
        (None, 1.0, "the workload has no metric"),
        (None, None, None),
    ],
)
def test_a_score_is_one_of_its_metric(
    tmp_path: Path, metric: str | None, score: float | None, said: str | None
) -> None:
    folder = write_golden(tmp_path / "run")
    lines = [line | {"score": score} for line in read_lines(folder, REQUESTS_FILE)]
    write_lines(folder, lines, REQUESTS_FILE)
    workload = {"name": "mine", "metric": metric, "counts": {}}
    write_json(folder / SUMMARY_FILE, summarize_runs([folder]) | {"workload": workload})
    if said is None:
        verify(folder)
    else:
        with pytest.raises(Mismatch, match=rf"{REQUESTS_FILE} line 1 .*score: .*{said}"):
            verify(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"counts": RULER["counts"] | {"only_thoughts": 3}}, None),
        ({"name": "mine", "counts": {"rows": 9}}, None),
        ({"name": "burstgpt", "metric": None, "counts": {"rows": 4, "requests": 3}}, None),
        ({"name": ""}, "workload.name"),
        ({"name": None}, "workload.name"),
        ({"metric": 5}, "workload.metric"),
        ({"counts": [3]}, "workload.counts: .*not object"),
        ({"counts": RULER["counts"] | {"examples": 4}}, "counts.examples: stored 4, derived 3"),
        ({"counts": RULER["counts"] | {"task 0": 1, "task 1": 2}}, "counts.task 1: stored 2, derived 1"),
        ({"counts": RULER["counts"] | {"task 2": 1}}, "counts.task 2"),
        ({"counts": {"examples": 3, "task 0": 2}}, "counts.task 1"),
        ({"counts": RULER["counts"] | {"only_thoughts": 4}}, "counts.only_thoughts: stored 4, of 3 requests"),
        ({"counts": RULER["counts"] | {"examples": -3}}, "counts.examples: stored -3, not a count"),
        ({"counts": RULER["counts"] | {"examples": 3.0}}, "counts.examples: .*not a count"),
        ({"name": "burstgpt", "counts": {"rows": 4, "requests": 2}}, "counts.requests: stored 2, derived 3"),
        ({"name": "longbenchv2", "counts": {"rows": 2}}, "counts.rows: stored 2, derived 3"),
    ],
)
def test_an_invented_workload_is_found(tmp_path: Path, changes: dict[str, Any], said: str | None) -> None:
    folder = write_golden(tmp_path / "run")
    if (RULER | changes)["metric"] is None:
        lines = [line | {"score": None} for line in read_lines(folder, REQUESTS_FILE)]
        write_lines(folder, lines, REQUESTS_FILE)
    write_json(folder / SUMMARY_FILE, summarize_runs([folder]) | {"workload": RULER | changes})
    if said is None:
        verify(folder)
    else:
        with pytest.raises(Mismatch, match=rf"{SUMMARY_FILE}: .*{said}"):
            verify(folder)


@pytest.mark.parametrize("bad", ["", "r1\n", "r\x1b[31m1", "r1\x7f", "r1\x9b"])
def test_an_id_is_readable(tmp_path: Path, bad: str) -> None:
    folder = write_golden(tmp_path / "run")
    for name in (STEPS_FILE, REQUESTS_FILE):
        records = read_lines(folder, name)
        write_lines(
            folder, [r | {"request_id": bad} if r["request_id"] == "r1" else r for r in records], name
        )
    write_json(folder / SUMMARY_FILE, summarize_runs([folder]))
    with pytest.raises(Mismatch, match=r"request_id: .*empty, or has control characters") as found:
        verify(folder)
    assert str(found.value).isprintable()
