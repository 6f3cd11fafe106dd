"""`dsatrace verify` finds what was spoilt, wherever it was spoilt, and names the line."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import INFERENCE
from dsatrace.commands.verify import main
from dsatrace.errors import UserError
from dsatrace.files import write_json
from dsatrace.schema import LEVELS, REQUESTS_FILE, STEP_FIELDS, STEPS_FILE, SUMMARY_FILE, Field
from dsatrace.trace.config import is_sampled
from dsatrace.trace.summarize import summarize_runs
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.rules import Rules
from dsatrace.verify.run import verify
from helpers.golden_run import REQUESTS, SERVING, read_lines, write_golden, write_lines
from helpers.json_edits import at, changed, key_paths, number_paths
from helpers.memory_run import MemoryRun

WITH_SCORES = {"store_scores": True, "keep_order": True}
SHARED = {1: 0, 3: 2}
VARIANTS = [*({"level": level} for level in LEVELS), WITH_SCORES]

# What comes from the model can be held against its own kind only: a score that stays between
# its neighbours, a margin that stays positive. Clock and prefix are caught by the other layers.
OF_THE_MODEL = {"scores_stats.min", "scores_stats.mean", "scores_stats.max", "scores_topk", "kth_margin"}
# Without positions a sparse record's quantiles have room: within a block, or as k tokens in n blocks allow.
WITHOUT_POSITIONS = {
    *("offset_min", "offset_p50", "offset_max", "tokens_per_touched_block.p95"),
    "needle.selected",  # 0 to k of them; a decode record's shows in the summary's recall
}
UNDERIVABLE: dict[str, set[str]] = {
    "full": OF_THE_MODEL,
    "blocks": OF_THE_MODEL | WITHOUT_POSITIONS,
    "stats": OF_THE_MODEL | WITHOUT_POSITIONS,
    # In score order, which position has which score is the model's word, except between equals.
    "with scores": OF_THE_MODEL | {"selected_token_pos"},
}
# The summary's totals notice these, but not in which record: without block ids there is room.
ONLY_IN_TOTAL = {
    "blocks": {"needle.selected"},
    "stats": {"kv_fetch.hbm.read_ops", "prefix.intersection_ratio", "needle.selected"},
}


def leaves(level: str, fields: tuple[Field, ...] = STEP_FIELDS, above: str = "") -> Iterator[str]:
    """Dotted paths of every leaf of a record at a level."""
    for field in fields:
        if level in field.levels:
            path = above + field.name
            inner = [f"{path}.{key}." for key in field.keys] or [f"{path}."] * bool(field.children)
            for prefix in inner:
                yield from leaves(level, field.children, prefix)
            if not inner:
                yield path


def wrong_values(value: Any) -> list[Any]:
    """Plausible values of the right type, and one of another."""
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int):
        return [value + 1, value - 1, value + 7, 0, -1, str(value)]
    if isinstance(value, float):
        return [value * 1.5 + 1, value / 2, value + 1e-9, -value, None]
    if isinstance(value, str):
        return ["", value + "x", "r1", 7]
    if value is None:
        return [0.25, 0, ""]
    last = value[-1] if value else 0
    ids = isinstance(last, int)
    return [
        value[:-1],
        [*value, last],
        value[::-1],
        [item + 1 for item in value],
        [*value[:-1], last - 1],
        [*value[:-1], 99999 if ids else "x"],
        None,
    ]


def spoilt(record: dict[str, Any], path: str) -> Iterator[dict[str, Any]]:
    """Copies of the record with another value at the path."""
    *parents, name = path.split(".")
    holder = record
    for parent in parents:
        holder = holder.get(parent, {})
    if name not in holder:
        return
    for value in wrong_values(holder[name]):
        if value != holder[name] or type(value) is not type(holder[name]):
            yield changed(record, (*parents, name), value)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda changes: changes.get("level", "with scores"))
def test_every_spoilt_field_is_found(tmp_path: Path, variant: dict[str, Any]) -> None:
    run = MemoryRun(write_golden(tmp_path / "run", **variant))
    kind = variant.get("level", "with scores")
    records = run.records
    caught, missed, misnamed = set(), set(), set()
    for i in (0, len(records) // 2, len(records) - 1):  # dense and sparse, prefill and decode
        for path in leaves(variant.get("level", "full")):
            for record in spoilt(records[i], path):
                said = run.found_in(i, record)
                if not said:
                    missed.add(path)
                else:
                    (caught if f"{STEPS_FILE} line {i + 1} " in said else misnamed).add(path)
    assert run.num_whole_way > 5
    assert misnamed == ONLY_IN_TOTAL.get(kind, set())
    assert missed <= UNDERIVABLE[kind]
    present = {path for path in leaves(variant.get("level", "full")) if any(spoilt(records[-1], path))}
    assert caught == present  # those too of which some values pass, such as a score out of order


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda changes: changes.get("level", "with scores"))
def test_a_shared_record_is_compared_with_its_source(tmp_path: Path, variant: dict[str, Any]) -> None:
    """What comes from the model is found there too, at any level; in the source the next layer shows it."""
    run = MemoryRun(write_golden(tmp_path / "run", num_layers=4, shared_layers=SHARED, **variant))
    records = run.records
    source, shared = len(records) // 2, len(records) // 2 + 1
    assert (records[source]["layer_id"], records[shared]["source_layer"]) == (0, 0)
    level = variant.get("level", "full")
    for i in (source, shared):
        for path in leaves(level):
            for record in spoilt(records[i], path):
                said = run.found_in(i, record)
                lines = [shared + 1] if i == shared else [source + 1, shared + 1]
                assert any(f"{STEPS_FILE} line {line} " in said for line in lines), path
    assert run.num_whole_way > 5


@pytest.mark.parametrize("level", LEVELS)
def test_source_layers_are_those_of_the_manifest(tmp_path: Path, level: str) -> None:
    folder = write_golden(tmp_path / "run", num_layers=4, shared_layers=SHARED, level=level)
    records = read_lines(folder)
    whole = (folder / "manifest.json").read_bytes()
    for i, change in ((1, None), (1, 1), (3, 0), (0, 0), (2, 0)):
        record = {name: value for name, value in records[i].items() if name != "source_layer"}
        if change is not None:
            needle = {"needle": record.pop("needle")} if "needle" in record else {}
            record |= {"source_layer": change, **needle}
        write_lines(folder, [*records[:i], record, *records[i + 1 :]])
        with pytest.raises(Mismatch, match=f"line {i + 1} .*source_layer"):
            verify(folder)
    # Another layer's selection, whole and sound, and an index scan that nobody made.
    other = records[2] | {"layer_id": 1, "source_layer": 0, "indexer_scan": records[1]["indexer_scan"]}
    scanned = records[1] | {"indexer_scan": records[0]["indexer_scan"]}
    for record, said in ((other, "as in layer 0, whose selection layer 1 uses"), (scanned, "indexer_scan")):
        write_lines(folder, [records[0], {name: record[name] for name in records[1]}, *records[2:]])
        with pytest.raises(Mismatch, match=f"line 2 .*{said}"):
            verify(folder)
    write_lines(folder, records)
    verify(folder)
    for path, value in (
        (("selection",), None),
        (("selection", "layers", 1, "source_layer"), None),
        (("selection", "layers", 1, "source_layer"), 1),
        (("selection", "layers", 2, "source_layer"), 1),
        (("selection", "layers", 2, "source_layer"), 0),
        (("selection", "layers", 3, "source_layer"), 0),
        (("selection", "layers", 3, "top_k"), 9),
        (("selection", "layers", 3, "heads"), 2),
        (("selection", "layers"), []),
        (("selection", "unit"), "block"),
    ):
        write_json(folder / "manifest.json", changed(json.loads(whole), path, value))
        with pytest.raises(Mismatch, match=r"source_layer|selection\.(layers|unit)"):
            verify(folder)


@pytest.mark.parametrize("level", LEVELS)
def test_a_line_missing_twice_or_elsewhere_is_named(tmp_path: Path, level: str) -> None:
    folder = write_golden(tmp_path / "run", level=level)
    lines = (folder / STEPS_FILE).read_bytes().splitlines(keepends=True)

    def found(*kept: bytes) -> str:
        (folder / STEPS_FILE).write_bytes(b"".join(kept))
        with pytest.raises(Mismatch) as mismatch:
            verify(folder)
        return str(mismatch.value)

    for i in range(len(lines)):
        # The gap shows at the next record, or at the end of the file.
        said = f"{STEPS_FILE} line {min(i + 1, len(lines) - 1)} "
        assert said in found(*lines[:i], *lines[i + 1 :])
        assert f"{STEPS_FILE} line {i + 2} " in found(*lines[: i + 1], *lines[i:])
    for i in range(len(lines) - 1):
        assert f"{STEPS_FILE} line {i + 1} " in found(*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :])


def test_a_missing_step_or_forward_is_found(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run")
    records = read_lines(folder)

    def without(drop: Callable[[dict[str, Any]], bool]) -> str:
        write_lines(folder, [record for record in records if not drop(record)])
        with pytest.raises(Mismatch) as found:
            verify(folder)
        return str(found.value)

    assert "sampled steps of the request are missing" in without(lambda r: r["step_idx"] == 1)
    assert "kv_fetch.hbm.batch_size: stored 3, derived 2" in without(
        lambda r: (r["request_id"], r["step_idx"]) == ("r1", 2)
    )
    assert "requests.jsonl line" in without(lambda r: r["step_idx"] == 4)  # the tail
    assert "missing, 0 were dropped" in without(lambda r: r["request_id"] == "r1" and r["step_idx"] < 0)


def test_dropped_steps_explain_what_is_missing(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run", queue_policy="drop")
    write_lines(folder, [record for record in read_lines(folder) if record["step_idx"] != 1])
    recomputed = summarize_runs([folder])
    for dropped_steps, said in ((0, "1 sampled steps"), (1, None), (4, "dropped_steps: stored 4")):
        write_json(folder / "summary.json", recomputed | {"dropped_steps": dropped_steps})
        if said is None:
            verify(folder)
        else:
            with pytest.raises(Mismatch, match=said):
                verify(folder)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_a_sampled_run_is_whole(tmp_path: Path, rate: float) -> None:
    folder = write_golden(tmp_path / "run", sample_rate=rate, seed=7)
    assert verify(folder).num_records == len(read_lines(folder))
    records = read_lines(folder)
    step = max(record["step_idx"] for record in records)
    write_lines(folder, [record for record in records if record["step_idx"] != step])
    with pytest.raises(Mismatch):
        verify(folder)


def test_the_sampling_rule_is_the_tracers(tmp_path: Path) -> None:
    manifest = json.loads((write_golden(tmp_path / "run", seed=12345) / "manifest.json").read_text())
    manifest["trace"]["sample_rate"] = 0.37
    rules = Rules.of(manifest)
    assert [rules.is_sampled(step) for step in range(5000)] == [
        is_sampled(step, 0.37, 12345) for step in range(5000)
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_every_number_of_the_summary_is_held(tmp_path: Path, level: str) -> None:
    run = MemoryRun(write_golden(tmp_path / "run", level=level, serving=SERVING))
    whole, missed = run.said, []
    for where in number_paths(whole):
        said = run.found(summary=changed(whole, where, at(whole, where) + 1))
        if not said:
            missed.append(where)
        else:
            assert said.startswith("summary.json: ")
    assert run.num_whole_way > 5
    # Below level full the records do not hold which tokens were shared; stats has no block ids either.
    allowed = {"full": (), "blocks": ("overlap",), "stats": ("overlap", "prefix_hot_blocks")}[level]
    assert [w for w in missed if not any(word in w[0] for word in allowed)] == []


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["manifest.json", "summary.json", REQUESTS_FILE, STEPS_FILE])
def test_nothing_broken_makes_a_traceback(tmp_path: Path, name: str, level: str) -> None:
    """Any key gone, and any value of another type, is named or harmless; it never raises anything else."""
    folder = write_golden(tmp_path / "run", level=level)
    run = MemoryRun(folder)
    first, *rest = (folder / name).read_bytes().splitlines(keepends=True)
    whole = json.loads((folder / name).read_bytes() if name.endswith(".json") else first)
    harmless = set()
    for where in key_paths(whole):
        for value in (..., None, [], {}, -1, 1.5, "x", [None]):
            if value == at(whole, where):
                continue
            if name == SUMMARY_FILE:
                said = run.found(summary=changed(whole, where, value))
                harmless |= set() if said else {where[0]}
                assert said.count("\n") == 0
                continue
            line = json.dumps(changed(whole, where, value)).encode() + b"\n"
            (folder / name).write_bytes(line if name.endswith(".json") else b"".join([line, *rest]))
            try:
                verify(folder)
                harmless.add(where[0])
            except (Mismatch, UserError) as found:
                assert str(found).count("\n") == 0
    # Free text, measurements, and what the level does not let one derive.
    allowed = {
        "manifest.json": {"tool", "tool_version", "error", "started_utc", "argv", "model_config", "tokenizer"}
        | {"chat", "data_source", "device", "hbm_stand_in", "world_size", "seed", "trace", "cache_layouts"}
        | {"serving", "resumed_at_forward", "prefix_source", "tiers"}  # absent as well as null, or analysis
        | {"selection"}  # without it every layer has an indexer, and so they have
        | {"files", "source_files"},  # absent as well as null
        "summary.json": {"tracing_cost", "workload", *({"prefix_hot_blocks"} if level == "stats" else ())}
        | {"serving", "prefix_cache", "tiers"}
        | ({"step_overlap", "layer_overlap"} if level != "full" else set()),
        REQUESTS_FILE: {"source_row", "first_token_s", "arrival_s", "finish_s", "admitted_s"}
        | {"num_preemptions", "needle_positions"},  # absent as well as empty
        STEPS_FILE: {"scores_stats", "kth_margin"},
    }[name]
    assert harmless <= allowed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_output_tokens": 5}, "after the request's last step"),
        ({"num_output_tokens": 7}, "num_output_tokens"),
        ({"num_prompt_tokens": 41}, "seq_len_current"),
        ({"request_id": "r9"}, "r1"),
        ({"request_id": "r0"}, "stands twice"),
        ({"state": "finished"}, "state"),
        ({"finish_s": 0.1}, "out of order"),
        ({"score": "good"}, "score"),
        ({"score": 33.0}, "scores"),
        ({"labels": {"task": "task 0"}}, "scores.by"),
        ({"labels": {"task": 1}}, "labels.task"),
        ({"admitted_s": 9.0}, "out of order"),
        ({"arrival_s": -1.0}, "before the run's start"),
        ({"num_preemptions": -1}, "num_preemptions"),
        ({"needle_positions": [3]}, "needle: .*its request has 1 needle positions"),
        ({"needle_positions": [4, 3]}, "not ascending"),
        ({"needle_positions": [40]}, "outside the prompt's 40 tokens"),
        ({"state": "rejected"}, "num_output_tokens"),
        ({"state": "rejected", "num_output_tokens": 0}, "after the request's last step"),
    ],
)
def test_an_edited_request_is_found(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = write_golden(tmp_path / "run")
    lines = read_lines(folder, REQUESTS_FILE)
    lines = [line | change if line["request_id"] == "r1" else line for line in lines]
    if "num_output_tokens" in change and change["num_output_tokens"] == 5:
        lines = [line | {"num_output_tokens": 3} if line["request_id"] == "r1" else line for line in lines]
    write_lines(folder, lines, REQUESTS_FILE)
    with pytest.raises(Mismatch, match=said):
        verify(folder)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("trace", "block_size_tokens"), 8, "trace_steps.jsonl line 1"),
        (("trace", "level"), "stats", "line 1 .*selected_token_pos: .*the level drops it"),
        (("model_config", "index_topk"), 9, "model_config_digest"),
        (("cache_layout",), "serving_fp8", "bytes"),
        (("cache_layout",), "none", "cache_layout"),
        (("state",), "incomplete", "state"),
        (("selections",), "model", "selections"),
        (("quantile",), "interpolated", "quantile"),
        (("seed",), "1", "seed"),
    ],
)
def test_an_edited_manifest_is_found(tmp_path: Path, path: tuple[str, ...], value: Any, said: str) -> None:
    folder = write_golden(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", changed(manifest, path, value))
    with pytest.raises(Mismatch, match=said):
        verify(folder)


def test_a_wrong_needle_is_found(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run", state="incomplete")
    lines, records = read_lines(folder, REQUESTS_FILE), read_lines(folder)
    write_lines(folder, [line for line in lines if line["request_id"] != "r2"], REQUESTS_FILE)
    assert verify(folder).num_requests == 2  # nobody says where r2's answer stands
    records[-1]["needle"]["tokens"] -= 1
    write_lines(folder, records)
    with pytest.raises(Mismatch, match=r"layer 2\): needle.tokens: stored 19, 20 in the other layers"):
        verify(folder)


@pytest.mark.parametrize("level", LEVELS)
def test_a_run_from_before_the_added_fields_is_as_good(tmp_path: Path, level: str) -> None:
    requests = [request._replace(needle_positions=(), score=None) for request in REQUESTS]
    folder = write_golden(tmp_path / "run", requests, level=level)
    later = {"admitted_s", "num_preemptions", "labels", "needle_positions"}
    lines = [
        {name: value for name, value in line.items() if name not in later}
        for line in read_lines(folder, REQUESTS_FILE)
    ]
    write_lines(folder, lines, REQUESTS_FILE)
    for name in ("summary.json", "manifest.json"):
        record = json.loads((folder / name).read_text())
        for field in (
            "needle_recall",
            "scores",
            "serving",
            "prefix_cache",
            "prefix_source",
            "selection",
            "tiers",
            "workload",
        ):
            record.pop(field, None)
        write_json(folder / name, record)
    assert verify(folder).num_records == 48
    assert summarize_runs([folder])["needle_recall"] is None


def test_a_torn_run_is_verified(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run", state="incomplete")
    path = folder / STEPS_FILE
    whole = path.read_bytes()
    num_lines = whole.count(b"\n")
    for cut in (0, 1, 2, 100, 5000, len(whole) // 2, len(whole) - 1, len(whole)):
        path.write_bytes(whole[: len(whole) - cut])
        result = verify(folder)
        left = whole[: len(whole) - cut].count(b"\n") + (cut == 1)
        assert (result.state, result.num_records) == ("incomplete", left)
        assert any("totals" in note for note in result.notes) == (left < num_lines)
    records = [json.loads(line) for line in whole.splitlines()]
    records[3]["unique_blocks"] += 1
    write_lines(folder, records[:10])
    with pytest.raises(Mismatch, match=r"line 4 .*unique_blocks"):
        verify(folder)


def test_a_complete_run_may_not_be_torn(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run")
    path = folder / STEPS_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(Mismatch, match=r"the file ends after layer 1 of 3|cut short"):
        verify(folder)
    path.unlink()
    with pytest.raises(Mismatch, match=r"trace_steps.jsonl: file: missing"):
        verify(folder)


def test_a_running_run_is_verified(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run", state="running")
    assert verify(folder).state == "incomplete"  # nobody writes it
    with (folder / STEPS_FILE).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert verify(folder).state == "running"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_golden(tmp_path / "run")
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.startswith("verified: 48 records, 3 requests (complete, level full)")
    records = read_lines(folder)
    records[7]["kv_fetch"]["hbm"]["bytes_read"] += 1152
    write_lines(folder, records)
    assert main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert f"{STEPS_FILE} line 8 (request 'r2', step -1, layer 1): kv_fetch.hbm.bytes_read: stored" in error
    assert error.count("\n") == 1
    assert main([str(tmp_path)]) == 2
    assert "is this a run's folder?" in capsys.readouterr().err


def test_it_needs_nothing_installed(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run")
    command = [sys.executable, "-S", "-m", "dsatrace.cli", "verify", str(folder)]
    done = subprocess.run(command, cwd=INFERENCE, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("verified: 48 records")


def test_it_shares_nothing_but_the_schema() -> None:
    own = {f"dsatrace.verify.{path.stem}" for path in (INFERENCE / "dsatrace" / "verify").glob("[a-z]*.py")}
    allowed = {
        "dsatrace",
        "dsatrace.version",
        "dsatrace.errors",
        "dsatrace.text",
        "dsatrace.schema",
        "dsatrace.verify",
    }
    in_numpy = {f"dsatrace.verify.{name}" for name in ("chosen", "fast", "fast_summary", "parquet_steps")}
    for modules, options, expected in (
        ("dsatrace.verify.run", ["-S"], own - in_numpy),  # without a single library
        (f"dsatrace.verify.run, {', '.join(in_numpy)}", [], own),
    ):
        program = f"import sys, {modules}; print(*(m for m in sys.modules if m[:8] == 'dsatrace'))"
        command = [sys.executable, *options, "-c", program]
        done = subprocess.run(command, cwd=INFERENCE, capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == allowed | expected
