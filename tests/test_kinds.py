"""Runs of every kind of selection: written, verified, summarised, reported, exported, read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from conftest import INFERENCE
from dsatrace import cli
from dsatrace.errors import UserError
from dsatrace.kv.layout import CacheLayout
from dsatrace.report.figure import draw
from dsatrace.report.grid import Grid
from dsatrace.report.tables import run_tables
from dsatrace.schema import STEPS_FILE, SUMMARY_FILE, problems
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.estimate import TraceLoad, draw_sample, estimate_sizes
from dsatrace.trace.export import export_run
from dsatrace.trace.kind import Layer, SelectionKind
from dsatrace.trace.manifest import RunInfo
from dsatrace.trace.reader import RunReader
from dsatrace.trace.resume import prepare_resume
from dsatrace.trace.summarize import summarize_runs
from dsatrace.trace.tracer import Tracer
from dsatrace.trace.writer import TraceWriterError
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.run import verify
from helpers.golden_run import read_lines, write_golden, write_lines
from helpers.json_edits import changed
from helpers.kind_runs import KINDS, LAYOUT, NUM_STEPS, write_kind
from helpers.tier_samples import SETUPS
from helpers.trace_samples import SECRET, SampleRequest, config_for, sample_capture

NUM_REQUESTS = 2


def edit_json(path: Path, where: str, value: Any) -> None:
    keys = [int(key) if key.isdecimal() else key for key in where.split(".")]
    path.write_text(json.dumps(changed(json.loads(path.read_bytes()), keys, value)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    return {name: write_kind(folder / name, name) for name in KINDS}


@pytest.fixture(params=list(KINDS))
def run(request: pytest.FixtureRequest, runs: dict[str, Path]) -> tuple[str, Path]:
    return request.param, runs[request.param]


def records_of(folder: Path) -> list[dict[str, Any]]:
    return list(RunReader(folder).steps())


def test_a_run_is_as_its_table_says(run: tuple[str, Path]) -> None:
    name, folder = run
    kind = KINDS[name]
    records = records_of(folder)
    assert len(records) == NUM_REQUESTS * NUM_STEPS * len(kind.set_layers)
    assert [problems(record, "full", kind.fields) for record in records] == [[]] * len(records)
    held = {field.name for field in kind.fields if field.type != "null"}
    for record in records:
        for field, value in record.items():
            if field != "kth_margin":
                assert (value is not None) == (field in held), field
        assert ("selected_ids" in record) == (record["selected_token_pos"] is None)
    assert SelectionKind.of(RunReader(folder).manifest["selection"]) == kind
    found = verify(folder)
    assert (found.state, found.num_records, found.is_sealed) == ("complete", len(records), True)


def test_the_summary_is_that_of_its_records(run: tuple[str, Path]) -> None:
    _, folder = run
    stored = RunReader(folder).summary()
    counted = summarize_runs([folder])
    assert counted | {"tracing_cost": None} == stored | {"tracing_cost": None}
    assert stored["step_overlap"]["mean"] > 1.5 * stored["step_overlap"]["random_mean"]
    with_itself = summarize_runs([folder, folder])
    assert with_itself["step_overlap"]["pairs"] == 2 * stored["step_overlap"]["pairs"]


def test_what_is_not_known_is_null(runs: dict[str, Path]) -> None:
    summaries = {name: RunReader(folder).summary() for name, folder in runs.items()}
    for name in ("expert", "slots"):
        summary = summaries[name]
        assert summary["offsets"]["mean"] is None
        assert summary["unique_blocks"]["max"] is None
        assert {row["mean"] for row in summary["blocks_touched"]} == {None}
        assert summary["kv_fetch"] is None
        assert summary["sparse_active"] is None
        assert summary["needle_recall"] is None
    assert summaries["expert"]["bytes_read"]["indexer_scan"] is None
    assert summaries["expert"]["layer_overlap"]["pairs"] == 0
    assert summaries["expert"]["step_ms"]["p50"] is None
    assert summaries["slots"]["bytes_read"]["indexer_scan"] > 0
    assert summaries["slots"]["step_ms"]["p50"] > 0
    assert summaries["block"]["kv_fetch"] is None
    assert summaries["block"]["unique_blocks"]["mean"] > 0
    assert summaries["uneven layers"]["prefix_intersection_ratio"]["mean"] is None
    assert summaries["uneven layers"]["step_overlap"]["per_layer"][1] is None


def test_entries_cover_their_tokens(runs: dict[str, Path]) -> None:
    for record in records_of(runs["entry"]):
        tokens = {token for one in record["selected_ids"] for token in range(4 * one, 4 * one + 4)}
        assert record["unique_token_pos_count"] == len(tokens) == 4 * record["num_selected_ids"]
        assert record["selected_block_ids"] == sorted({token // 8 for token in tokens})
        assert record["offset_max"] == record["seq_len_current"] - 1 - min(tokens)
        assert record["kv_fetch"]["hbm"]["bytes_useful"] == len(tokens) * LAYOUT.latent_bytes_per_token
        assert record["indexer_scan"]["tokens"] == record["seq_len_current"] // 4
        assert (record["path"] == "sparse") == (record["seq_len_current"] // 4 > 5)


def test_a_last_block_that_is_not_full_covers_what_there_is(runs: dict[str, Path]) -> None:
    cut = 0
    for record in records_of(runs["block"]):
        seq_len = record["seq_len_current"]
        tokens = {t for one in record["selected_ids"] for t in range(12 * one, min(12 * one + 12, seq_len))}
        assert record["unique_token_pos_count"] == len(tokens)
        assert record["offset_min"] == seq_len - 1 - max(tokens)
        cut += len(tokens) % 12 > 0
    assert cut > 0


def test_heads_and_layers_stand_in_order(runs: dict[str, Path]) -> None:
    places = [(record["layer_id"], record.get("kv_head")) for record in records_of(runs["two heads"])[:6]]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    first = records_of(runs["two heads"])[:6]
    assert [record.get("source_layer") for record in first] == [None] * 4 + [1] * 2
    assert [record["selected_token_pos"] for record in first[4:]] == [
        record["selected_token_pos"] for record in first[2:4]
    ]
    assert [record["layer_id"] for record in records_of(runs["uneven layers"])[:4]] == [0, 2, 0, 2]
    assert "kv_head" not in records_of(runs["expert"])[0]
    for record in first:  # a layer's bytes are those of both heads
        of_head = record["unique_token_pos_count"] * LAYOUT.latent_bytes_per_token // 2
        assert record["kv_fetch"]["hbm"]["bytes_useful"] == of_head


SPOILT: list[tuple[str, str, Callable[[dict[str, Any]], object]]] = [
    ("two heads", "kv_head", lambda record: record.update(kv_head=0)),
    ("two heads", "offset_p50", lambda record: record.update(offset_p50=record["offset_p50"] + 1)),
    ("uneven layers", "phase", lambda record: record.update(phase="decode")),
    ("uneven layers", "step_wall_us", lambda record: record.update(step_wall_us=0.0)),
    ("entry", "unique_token_pos_count", lambda record: record.update(unique_token_pos_count=5)),
    ("entry", "selected_token_pos", lambda record: record.update(selected_token_pos=[0])),
    ("entry", "scores_stats", lambda record: record.update(scores_stats={"min": 0, "mean": 0, "max": 0})),
    ("entry", "kv_fetch.hbm.bytes_useful", lambda record: record["kv_fetch"]["hbm"].update(bytes_useful=7)),
    ("entry", "selected_ids", lambda record: record["selected_ids"].append(10_000)),
    ("entry", "selected_ids", lambda record: record.pop("selected_ids")),
    ("block", "kv_fetch", lambda record: record.update(kv_fetch={})),
    ("block", "unique_blocks", lambda record: record.update(unique_blocks=1)),
    ("block", "prefix.intersection_ratio", lambda record: record["prefix"].update(intersection_ratio=0.9)),
    ("expert", "num_selected_ids", lambda record: record.update(num_selected_ids=7)),
    ("expert", "selected_ids", lambda record: record.update(selected_ids=[0, 1, 2, 3, 4, 5, 6, 256])),
    ("expert", "offset_min", lambda record: record.update(offset_min=0)),
    ("expert", "path", lambda record: record.update(path="dense")),
    ("slots", "selected_ids", lambda record: record.update(selected_ids=[1, 1, 2, 3, 4, 5, 6, 7])),
    ("slots", "indexer_scan.tokens", lambda record: record["indexer_scan"].update(tokens=1)),
    ("slots", "needle", lambda record: record.update(needle={"tokens": 1, "selected": 1})),
    ("two heads", "selected_ids", lambda record: record.update(selected_ids=[1])),
    ("slots", "prefix", lambda record: record.update(prefix={})),
]


@pytest.mark.parametrize(
    ("name", "field", "spoil"),
    SPOILT,
    ids=[f"{name} {field} {i}" for i, (name, field, _) in enumerate(SPOILT)],
)
def test_verify_names_a_spoilt_field(
    runs: dict[str, Path], tmp_path: Path, name: str, field: str, spoil: Callable[[dict[str, Any]], object]
) -> None:
    records = read_lines(runs[name])
    spoil(records[-1])
    folder = copied(runs[name], tmp_path)
    write_lines(folder, records)
    with pytest.raises(Mismatch) as found:
        verify(folder)
    assert found.value.field.startswith(field)
    assert f"line {len(records)}" in found.value.where


def test_verify_names_a_spoilt_total(runs: dict[str, Path], tmp_path: Path) -> None:
    for name, path, value in (
        ("entry", "blocks_touched.1.uniform_mean", 4.0),
        ("block", "sparse_active", 1),
        ("expert", "step_overlap.random_mean", 0.05),
        ("slots", "kv_fetch", {}),
        ("block", "blocks_touched.1.block_size_tokens", 8),
    ):
        folder = copied(runs[name], tmp_path / name)
        edit_json(folder / "summary.json", path, value)
        with pytest.raises(Mismatch, match=path.split(".", maxsplit=1)[0]):
            verify(folder)
    for name in ("entry", "expert", "slots"):
        folder = copied(runs[name], tmp_path / f"manifest of {name}")
        edit_json(folder / "manifest.json", "selection.sparse_active", 3)
        with pytest.raises(Mismatch, match=r"selection\.sparse_active: stored 3"):
            verify(folder)


def test_verify_refuses_a_selection_that_contradicts_itself(runs: dict[str, Path], tmp_path: Path) -> None:
    for i, (name, path, value) in enumerate(
        (
            ("entry", "unit", "page"),
            ("entry", "unit_tokens", 0),
            ("entry", "missing", ["score"]),
            ("entry", "missing", ["scores", "scores"]),
            ("entry", "door", "serve"),
            ("expert", "num_ids", 4),
            ("two heads", "layers.2.source_layer", 2),
            ("slots", "id_kind", "place"),
        )
    ):
        folder = copied(runs[name], tmp_path / str(i))
        edit_json(folder / "manifest.json", f"selection.{path}", value)
        with pytest.raises(Mismatch) as found:
            verify(folder)
        assert found.value.where == "manifest.json", path


def copied(run: Path, folder: Path) -> Path:
    """Without digests, which would find everything."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in run.iterdir():
        if path.suffix != ".png":
            (folder / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": None}))
    return folder


def test_report_and_picture(run: tuple[str, Path]) -> None:
    name, folder = run
    parts = list(run_tables(RunReader(folder)))
    text = "\n".join(part if isinstance(part, str) else part.markdown() for part in parts)
    titles = [part.title for part in parts if isinstance(part, Grid)]
    assert f"door {KINDS[name].door}" in text
    assert "None" not in text
    assert any("already selected" in title for title in titles)
    is_located = name not in ("expert", "slots")
    assert any("KV blocks touched" in title for title in titles) == is_located
    assert ("these ids cannot tell" in text) == (name == "slots")
    assert "WARNING" not in text
    (picture,) = draw(RunReader(folder)).paths
    picture.unlink()


def test_export_there_and_back(run: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = run
    done = export_run(RunReader(folder), "parquet", tmp_path / "parquet")
    assert done.num_kept_as_text == 0
    verify(tmp_path / "parquet")
    export_run(RunReader(tmp_path / "parquet"), "jsonl", tmp_path / "jsonl")
    assert (tmp_path / "jsonl" / STEPS_FILE).read_bytes() == (folder / STEPS_FILE).read_bytes()
    assert summarize_runs([tmp_path / "parquet"]) == summarize_runs([folder])
    fields = ("layer_id", KINDS[name].ids_field, "prefix.intersection_ratio", "kv_fetch")
    columns = list(RunReader(tmp_path / "parquet").steps(fields))
    assert columns == list(RunReader(folder).steps(fields))


@pytest.mark.parametrize("field", ["kv_head", "selected_ids", "num_selected_ids", "prefix", "kv_fetch"])
def test_what_a_record_lacks_it_lacks_in_parquet_too(
    runs: dict[str, Path], tmp_path: Path, field: str
) -> None:
    """Absent, null and a value are three things, side by side in one file."""
    folder, values = copied(runs["block"], tmp_path / "run"), {"kv_fetch": {}, "prefix": None}
    records = read_lines(folder)
    del records[3][field]
    records[5][field] = values.get(field)
    data = b"".join(orjson.dumps(record) + b"\n" for record in records)
    (folder / STEPS_FILE).write_bytes(data)
    done = export_run(RunReader(folder), "parquet", tmp_path / "parquet")
    assert done.num_kept_as_text <= 1  # an object without any field
    export_run(RunReader(tmp_path / "parquet"), "jsonl", tmp_path / "jsonl")
    assert (tmp_path / "jsonl" / STEPS_FILE).read_bytes() == data


def only_newest(capture: StepCapture) -> StepCapture:
    ids = np.full_like(capture.positions, -1)
    for b, seq_len in enumerate(capture.seq_len.tolist()):
        newest = seq_len // 4
        ids[:, b] = np.arange(newest - ids.shape[2], newest)
    return dataclasses.replace(capture, positions=ids)


def test_a_run_that_was_never_sparse_says_so(tmp_path: Path) -> None:
    folder = write_kind(tmp_path / "run", "entry", only_newest)
    verify(folder)
    assert RunReader(folder).manifest["selection"]["sparse_active"] == 0
    assert RunReader(folder).summary()["sparse_active"] == 0
    assert any("WARNING: in none of" in str(part) for part in run_tables(RunReader(folder)))
    notes: list[str] = []
    summarize_runs([folder], on_note=notes.append)
    assert len(notes) == 1
    assert "sparse attention was not active" in notes[0]


def test_the_engine_says_so_too(tmp_path: Path) -> None:
    model = {"n_layers": 2, "index_topk": 8}
    run = RunInfo(model_config=model, layouts=(LAYOUT,), device="cpu", selections="synthetic")
    for name, positions, expected in (("newest", range(32, 40), 0), ("others", range(31, 39), 2)):
        with Tracer(config_for(tmp_path / name), run, secret=SECRET) as tracer:
            tracer.add_request(SampleRequest("r0", [1] * 39))
            capture = sample_capture(np.random.default_rng(0), [40], prefixes=tracer.prefixes(["r0"]))
            capture.positions[:] = np.array(positions)
            tracer.put(dataclasses.replace(capture, forward_idx=0))
        reader = RunReader(tmp_path / name)
        assert reader.manifest["selection"]["sparse_active"] == expected
        assert "sparse_active" not in reader.summary()
        warned = [part for part in run_tables(reader) if "WARNING" in str(part)]
        assert bool(warned) == (expected == 0)
        verify(tmp_path / name)


def test_scores_stand_beside_other_ids(tmp_path: Path) -> None:
    kind = dataclasses.replace(KINDS["entry"], missing=())
    ways: Iterator[dict[str, Any]] = iter(
        ({"store_scores": True}, {"store_scores": True, "keep_order": True})
    )
    for i, way in enumerate(ways):
        folder = write_kind(tmp_path / str(i), "entry", kind=kind, **way)
        verify(folder)
        for record in records_of(folder):
            assert len(record["scores_topk"]) == len(record["selected_ids"])
            if "keep_order" in way:
                assert record["scores_topk"] == sorted(record["scores_topk"], reverse=True)


def test_a_capture_of_another_kind_is_refused(tmp_path: Path) -> None:
    def without(name: str) -> Callable[[StepCapture], StepCapture]:
        return lambda capture: dataclasses.replace(capture, **{name: None})

    def with_ids(first: int, *others: int) -> Callable[[StepCapture], StepCapture]:
        def change(capture: StepCapture) -> StepCapture:
            ids = capture.positions.copy()
            ids[0, 1] = -1
            ids[0, 1, : 1 + len(others)] = (first, *others)
            return dataclasses.replace(capture, positions=ids)

        return change

    for i, (name, change, said) in enumerate(
        (
            ("two heads", without("score_stats"), "score_stats: is missing"),
            ("two heads", without("step_wall_us"), "step_wall_us: is missing"),
            ("two heads", with_ids(500), "layer 0, KV head 0: a selected position lies in the future"),
            ("entry", with_ids(36, 36), "an id was selected twice"),
            ("entry", with_ids(38), "a selected id lies in the future"),
            ("entry", with_ids(-1), "nothing is selected; leave the row out"),
            ("expert", with_ids(256), "an id beyond num_ids"),
        )
    ):
        with pytest.raises(TraceWriterError, match=said):
            write_kind(tmp_path / str(i), name, change)
        assert RunReader(tmp_path / str(i)).state == "incomplete"


def test_flags_that_a_door_cannot_follow_are_refused(tmp_path: Path) -> None:
    for changes, said in (
        ({"level": "stats"}, "--trace-level stats: selections of door attach are recorded whole"),
        ({"store_scores": True}, "--trace-store-scores: the door attach knows no scores"),
    ):
        with pytest.raises(UserError, match=said):
            write_kind(tmp_path / "run", "entry", **changes)
    assert not (tmp_path / "run").exists()


def test_kinds_that_contradict_themselves_are_refused() -> None:
    one = (Layer(8),)
    for said, changes in (
        ("unit page", {"unit": "page"}),
        ("missing clock", {"missing": ("clock",), "door": "attach"}),
        ("unit_tokens 4: no size of a token", {"unit_tokens": 4, "door": "attach"}),
        ("name the number of experts", {"unit": "expert", "door": "import"}),
        ("num_ids 4: fewer", {"unit": "expert", "num_ids": 4, "door": "import"}),
        ("the engine's selections", {"id_kind": "slot"}),
        ("layer 0: 2 sets of at most 0", {"layers": (Layer(0, heads=2),), "door": "attach"}),
        ("layer 1: source_layer 1", {"layers": (*one, Layer(8, source_layer=1)), "door": "attach"}),
    ):
        with pytest.raises(ValueError, match=said):
            SelectionKind(**({"layers": one} | changes))  # type: ignore[arg-type]


def test_layouts_that_a_kind_cannot_use_are_refused() -> None:
    three = SelectionKind((Layer(8, heads=5),), door="attach")
    for kind, layout, said in (
        (three, LAYOUT, "cannot be shared among 5 heads"),
        (KINDS["entry"], CacheLayout("none", 0, 0), "layout none has no bytes to count"),
        (SelectionKind((Layer(8),)), LAYOUT, "the engine alone serves"),
    ):
        with pytest.raises(ValueError, match=said):
            RunInfo(model_config={}, layouts=(layout,), device="cpu", kind=kind)
    RunInfo(model_config={}, layouts=(CacheLayout("none", 0, 0),), device="cpu", kind=KINDS["expert"])


def test_only_the_engines_runs_are_resumed(tmp_path: Path) -> None:
    folder = write_kind(tmp_path / "run", "entry")
    edit_json(folder / "manifest.json", "state", "incomplete")
    with pytest.raises(UserError, match="a run of door attach"):
        prepare_resume(folder)


@pytest.mark.parametrize("name", KINDS)
def test_the_estimate_draws_such_records(name: str) -> None:
    kind = KINDS[name]
    load = TraceLoad(1, 1, context=200, num_steps=24, batch_size=1, layout=LAYOUT, kind=kind)
    records = [json.loads(line) for line in draw_sample(load, "full", "clustered").lines]
    assert len(records) == load.num_records == 24 * len(kind.set_layers)
    assert [problems(record, "full", kind.fields) for record in records] == [[]] * len(records)
    jsonl, *columns = estimate_sizes(load, "full")
    assert all(0 < size.bytes_per_record[0] < jsonl.bytes_per_record[0] for size in columns)


def test_the_estimate_takes_a_unit(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["estimate", "--config", str(INFERENCE / "config_tiny.json"), "--steps", "4", "--batch", "1"]
    for flags, num_records in (
        (["--unit", "entry", "--unit-tokens", "4"], 16),
        (["--unit", "block", "--unit-tokens", "64", "--heads", "2"], 32),
        (["--unit", "expert"], 12),
        (["--unit", "expert", "--trace-store-scores"], 12),
    ):
        assert cli.main([*command, "--json", *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["num_records"] == num_records
        assert {size["level"] for size in found["sizes"]} == {"full"}
    for flags, said in (
        (["--unit-tokens", "4"], "give --unit entry or block"),
        (["--unit", "expert", "--heads", "2"], "experts are routed once per layer"),
        (["--unit", "block", "--heads", "0"], "--heads 0: use at least 1"),
        (["--heads", "2", "--level", "stats"], "recorded whole"),
    ):
        assert cli.main([*command, *flags]) == 2
        assert said in capsys.readouterr().err


GOLDEN = {
    "full": ({}, "d1ea231f047a0e8d", "49a72ae9c45d6676"),
    "blocks": ({"level": "blocks"}, "609f9a66df47e3ba", None),
    "stats": ({"level": "stats"}, "2fb24491632a9f22", None),
    "scores": ({"store_scores": True, "keep_order": True}, "d2179cd9ef137034", "49a72ae9c45d6676"),
    "shared layers": ({"shared_layers": {1: 0}}, "c6d654a8a88f0589", "70d8dae72620db93"),
    "tiers": ({"tiers": SETUPS["block"]}, "58651f4e3cfacd90", None),
}
"""Ways of a run of the engine's, and digests of its steps and its summary from before there were kinds."""


@pytest.mark.parametrize("name", GOLDEN)
def test_the_engines_files_are_what_they_were(tmp_path: Path, name: str) -> None:
    way, *digests = GOLDEN[name]
    folder = write_golden(tmp_path / "run", **way)
    for file, digest in zip((STEPS_FILE, SUMMARY_FILE), digests, strict=True):
        found = hashlib.sha256((folder / file).read_bytes()).hexdigest()[:16]
        assert digest in (found, None), file
