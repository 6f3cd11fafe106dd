"""Export both ways gives every byte back, at every level, and leaves nothing behind when it cannot."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import INFERENCE, ROOT
from dsatrace import cli
from dsatrace.commands.generate import main as generate
from dsatrace.errors import UserError
from dsatrace.schema import LEVELS, STEP_FIELDS, STEPS_PARQUET_FILE, field_paths, project, value_at
from dsatrace.trace import export
from dsatrace.trace.estimate import SyntheticSelections
from dsatrace.trace.export import export_run
from dsatrace.trace.manifest import TierSettings
from dsatrace.trace.parquet import file as parquet
from dsatrace.trace.parquet.columns import LEAVES, OF_TIERS, to_batch
from dsatrace.trace.parquet.file import read_lines, read_numbers, read_records, write_parquet
from dsatrace.trace.parquet.parts import StepParts
from dsatrace.trace.reader import RunReader, part_paths
from dsatrace.trace.records import RecordDeriver, StepLines
from dsatrace.trace.tracer import tiers_of
from helpers.json_edits import changed
from helpers.power import examples
from helpers.tier_samples import SETUPS, SimulatedTiers
from helpers.trace_samples import LAYOUT, RUN, WAYS, config_for, sample_capture, sample_needles

FILES = ("manifest.json", "requests.jsonl", "summary.json", "trace_steps.jsonl")
HOWS: list[dict[str, Any]] = [
    *WAYS,
    {"tiers": SETUPS["half a block"]},
    {"shared_layers": {1: 0}},
    {"tiers": SETUPS["row"], "level": "stats"},
]


def lines_of(
    capture: Any, tiers: TierSettings | None = None, shared_layers: dict[int, int] | None = None, **how: Any
) -> list[bytes]:
    accounts = tiers_of(dataclasses.replace(RUN, tiers=tiers))
    deriver = RecordDeriver(config_for(**how), LAYOUT, accounts, shared_layers=shared_layers)
    if tiers is not None:
        capture = SimulatedTiers(tiers).fetched(capture)
    return bytes(StepLines().encode(deriver.derive(capture))).splitlines()


def sample_lines(seed: int = 0, **how: Any) -> list[bytes]:
    capture = sample_capture(
        np.random.default_rng(seed),
        [5, 40, 90],
        k=8,
        cached_blocks=[0, 1, 3],
        needles=((0, 2), (), (4, 50, 51)),
    )
    return lines_of(capture, **how)


def there_and_back(lines: list[bytes], path: Path) -> int:
    """Asserts that the lines, and the records read in full, come back; returns how many were kept as text."""
    written = write_parquet(path, [(line, orjson.loads(line)) for line in lines])
    assert list(read_lines(path)) == lines
    assert list(read_records(path)) == [json.loads(line) for line in lines]
    assert written.num_records == len(lines)
    return written.num_kept_as_text


def test_only_runs_with_tiers_have_their_columns(tmp_path: Path) -> None:
    """A record that has such fields though its run has no tiers is kept as text, not cut."""
    steps, with_tiers = tmp_path / "steps.parquet", sample_lines(tiers=SETUPS["half a block"])
    for lines, num_kept in ((sample_lines(), 0), (with_tiers, len(with_tiers))):
        written = write_parquet(steps, [(line, orjson.loads(line)) for line in lines], has_tiers=False)
        assert OF_TIERS.isdisjoint(pq.read_schema(steps).names)
        assert list(read_lines(steps)) == lines
        assert written.num_kept_as_text == num_kept
    parts = StepParts(tmp_path)
    both = []
    for how in ({}, {"tiers": SETUPS["half a block"]}):
        records = [orjson.loads(line) for line in sample_lines(**how)]
        both += records
        parts.add(pa.Table.from_batches([to_batch(records, pa.float32())]))
    without, whole = (set(pq.read_schema(path).names) for path in part_paths(tmp_path))
    assert whole - without == OF_TIERS
    parts.join()
    assert list(read_records(tmp_path / STEPS_PARQUET_FILE)) == both
    parts.close()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export") / "steps.parquet"


@settings(max_examples=examples(25), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    seq_lens=st.lists(st.integers(1, 120), min_size=1, max_size=3),
    k=st.integers(1, 40),
    block_size=st.integers(1, 50),
    clustered=st.booleans(),
    cached=st.integers(0, 6),
    how=st.sampled_from(HOWS),
    scale=st.sampled_from([1.0, 1e-6, 1e-30, 1e13, 1e30, -0.0]),
)
@example(seed=0, seq_lens=[3], k=8, block_size=16, clustered=False, cached=0, how=HOWS[4], scale=-0.0)
def test_every_line_comes_back(
    scratch: Path,
    seed: int,
    seq_lens: list[int],
    k: int,
    block_size: int,
    clustered: bool,
    cached: int,
    how: dict[str, Any],
    scale: float,
) -> None:
    rng = np.random.default_rng(seed)
    cached_blocks = [min(cached, n // block_size) for n in seq_lens]
    capture = sample_capture(
        rng,
        seq_lens,
        k=k,
        clustered=clustered,
        cached_blocks=cached_blocks,
        needles=sample_needles(rng, seq_lens),
    )
    assert capture.scores is not None
    capture.scores[:] *= np.float32(scale)
    capture.score_stats[:] *= np.float32(scale)
    lines = lines_of(capture, block_size=block_size, **how)
    assert there_and_back(lines, scratch) == 0


def test_several_row_groups(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "GROUP_RECORDS", 5)
    lines = [line for seed in range(4) for line in sample_lines(seed)]
    assert there_and_back(lines, scratch) == 0
    assert pq.ParquetFile(scratch).num_row_groups == -(-len(lines) // 5)
    monkeypatch.setattr(parquet, "GROUP_BYTES", 1)
    assert there_and_back(lines, scratch) == 0
    assert pq.ParquetFile(scratch).num_row_groups == len(lines)


def test_memory_does_not_grow_with_the_run(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with the row group: lines become Python objects, and come back, a few at a time."""
    monkeypatch.setattr(parquet, "OBJECT_BYTES", 1 << 14)
    lines = sample_lines()

    def repeated(num: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
        for _ in range(num):
            for line in lines:
                yield line, orjson.loads(line)

    write_parquet(scratch, repeated(1))  # what is made once
    peaks = []
    for num in (5, 25):
        tracemalloc.start()
        write_parquet(scratch, repeated(num))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert pq.ParquetFile(scratch).num_row_groups == 1
    assert peaks[1] < 2 * peaks[0], peaks


def test_no_record_at_all(scratch: Path) -> None:
    assert there_and_back([], scratch) == 0


def with_value(line: bytes, path: str, value: object) -> bytes:
    """The line with another value at the dotted path; `...` deletes the field."""
    return orjson.dumps(changed(json.loads(line), path.split("."), value))


LEAF_PATHS = [leaf.path for leaf in LEAVES if leaf.path != "scores_topk"]


@pytest.mark.parametrize("value", [None, True, -7, 0.1, "x", [], [3, 1], [-2, 5], {}, {"a": 1}, 2**63, 1e300])
def test_a_corrupt_field_comes_back_as_corrupt(scratch: Path, value: object) -> None:
    """Nothing is mended on the way: each field in turn holds what it should not."""
    first, *others = sample_lines()
    lines = [first, *(with_value(others[0], path, value) for path in LEAF_PATHS), *others]
    there_and_back(lines, scratch)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text("aé,"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["hbm", "min"]), inner),
    max_leaves=4,
)
PATHS = sorted(
    {leaf.path for leaf in LEAVES} | {field.name for field in STEP_FIELDS} | {"new", "line", "extra"}
)


@settings(max_examples=examples(25), deadline=None)
@given(
    how=st.sampled_from(HOWS),
    changes=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(PATHS), JSON), max_size=4),
)
def test_whatever_is_in_a_record_comes_back(
    scratch: Path, how: dict[str, Any], changes: list[tuple[int, str, Any]]
) -> None:
    lines = sample_lines(**how)
    for i, path, value in changes:
        if path.rpartition(".")[0] == "" or value_at(json.loads(lines[i]), path) is not None:
            lines[i] = with_value(lines[i], path, value)
    there_and_back(lines, scratch)


OF_OTHER_DOORS = ("kv_head", "selected_ids", "num_selected_ids")
"""Fields that no record of the engine has; test_kinds.py exports them."""


@pytest.mark.parametrize("path", [path for path in LEAF_PATHS if path not in OF_OTHER_DOORS])
def test_a_missing_field_stays_missing(scratch: Path, path: str) -> None:
    first, line, *others = sample_lines(tiers=SETUPS["half a block"], shared_layers={1: 0})
    there_and_back([first, with_value(line, path, ...), *others], scratch)


def test_unknown_keys_and_unusual_texts_come_back(scratch: Path) -> None:
    line = sample_lines()[0]
    record = json.loads(line)
    assert (
        there_and_back([orjson.dumps(record | {"selection_source_layer": 3, "notes": ["a"]})], scratch) == 0
    )
    unusual = [
        orjson.dumps({"first": 1} | record),
        json.dumps(record).encode(),
        orjson.dumps(dict(reversed(record.items()))),
        orjson.dumps(record | {"prefix": record["prefix"] | {"depth": 2}}),
        orjson.dumps(record | {"request_id": "r\u00e9\U0001f600"}).replace(b"r\xc3\xa9", b"r\\u00e9"),
        b"{}",
        line[:-1] + b',"event":"again"}',
    ]
    assert there_and_back([line, *unusual], scratch) == len(unusual)


def test_scores_of_double_precision_take_double_columns(scratch: Path) -> None:
    lines = [
        with_value(line, "scores_stats.min", 0.1234567890123 + i) for i, line in enumerate(sample_lines())
    ]
    assert there_and_back(lines, scratch) == 0
    assert str(pq.read_schema(scratch).field("kth_margin").type) == "double"


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "fields",
    [
        ("layer_id", "unique_blocks"),
        ("prefix",),
        ("prefix.intersection_blocks", "kv_fetch.hbm"),
        ("selected_block_ids", "scores_topk", "kth_margin"),
    ],
)
def test_chosen_fields_are_those_of_the_lines(
    scratch: Path, how: dict[str, Any], fields: tuple[str, ...]
) -> None:
    lines = sample_lines(**how)
    lines.append(orjson.dumps(json.loads(lines[0]) | {"layer_id": "not a number"}))
    there_and_back(lines, scratch)
    expected = [project(json.loads(line), fields) for line in lines]
    assert list(read_records(scratch, fields)) == expected


def test_numbers_are_those_of_the_lines(scratch: Path) -> None:
    """Records that are kept as text included."""
    lines = sample_lines()
    lines.insert(1, orjson.dumps(json.loads(lines[0]) | {"layer_id": 1.5, "unique_blocks": 7}))
    assert there_and_back(lines, scratch) == 1
    fields = ("layer_id", "unique_blocks", "kv_fetch.hbm.read_ops", "prefix.intersection_ratio")
    (numbers,) = read_numbers(scratch, fields)
    for field in fields:
        assert numbers[field].tolist() == [value_at(json.loads(line), field) for line in lines]


def test_a_file_from_before_a_field_was_added_is_read(scratch: Path) -> None:
    lines = sample_lines()
    there_and_back(lines, scratch)
    fields = ("layer_id", "needle.tokens", "needle.selected")
    (numbers,) = read_numbers(scratch, fields)
    expected = [json.loads(line).get("needle", {}).get("tokens", np.nan) for line in lines]
    np.testing.assert_array_equal(numbers["needle.tokens"], expected)
    pq.write_table(pq.read_table(scratch).drop_columns(["needle_tokens", "needle_selected"]), scratch)
    (numbers,) = read_numbers(scratch, fields)
    assert np.isnan(numbers["needle.tokens"]).all()
    records = [json.loads(line) for line in lines]
    assert list(read_records(scratch)) == without(records, "needle")
    assert list(read_records(scratch, ["layer_id", "needle"])) == [
        {"layer_id": r["layer_id"]} for r in records
    ]


def without(records: list[dict[str, Any]], dropped: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != dropped} for record in records]


def test_an_unknown_field_is_refused(scratch: Path) -> None:
    there_and_back(sample_lines(), scratch)
    with pytest.raises(ValueError, match="no field unique_block in a step record"):
        list(read_records(scratch, ("unique_block",)))


def test_columns_are_flat_typed_and_named_after_the_schema(scratch: Path) -> None:
    lines = sample_lines()
    there_and_back(lines, scratch)
    records = [json.loads(line) for line in lines]
    table = pq.read_table(scratch, columns=["layer_id", "unique_blocks", "kv_fetch_hbm_bytes_read"])
    assert table.to_pylist() == [
        {
            "layer_id": record["layer_id"],
            "unique_blocks": record["unique_blocks"],
            "kv_fetch_hbm_bytes_read": record["kv_fetch"]["hbm"]["bytes_read"],
        }
        for record in records
    ]
    by_layer = table.group_by("layer_id").aggregate([("unique_blocks", "mean")])
    for row in by_layer.to_pylist():
        mine = [r["unique_blocks"] for r in records if r["layer_id"] == row["layer_id"]]
        assert row["unique_blocks_mean"] == pytest.approx(sum(mine) / len(mine))
    assert len({leaf.column for leaf in LEAVES}) == len(LEAVES)
    num_leaves = sum(not field.children for _, field in field_paths(STEP_FIELDS))
    assert len(LEAVES) == num_leaves + 2 * 15  # kv_fetch's fields stand once for three tiers


@pytest.mark.parametrize("context", [32_768, 131_072])
def test_bytes_a_record(scratch: Path, context: int) -> None:
    source = SyntheticSelections("clustered", num_layers=61, top_k=2048)
    captures = [source.capture([context + i], i) for i in range(5)]
    lines = [line for capture in captures for line in lines_of(capture, block_size=64)]
    assert there_and_back(lines, scratch) == 0
    assert sum(map(len, lines)) / len(lines) > 12_000
    assert scratch.stat().st_size / len(lines) < 1500


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real runs of the tiny model: one a way of tracing."""
    folder = tmp_path_factory.mktemp("runs")
    prompt = "The tide pulled back and left its usual collection of rope. " * 5
    (folder / "prompts.txt").write_text(f"{prompt}\n\n{prompt}And then?\n")
    flags = ["--ckpt-path", str(tiny_checkpoint), "--config", str(INFERENCE / "config_tiny.json")]
    flags += ["--input-file", str(folder / "prompts.txt"), "--max-new-tokens", "6", "--temperature", "0"]
    for name, how in {
        **{level: ["--trace-level", level] for level in LEVELS},
        "scores": ["--trace-store-scores", "--trace-keep-order", "--trace-prefill", "last"],
    }.items():
        assert generate([*flags, *how, "--trace-out", str(folder / name)]) == 0
    return folder


@pytest.mark.parametrize("name", [*LEVELS, "scores"])
def test_a_real_run_there_and_back(
    runs: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(runs / name), "--to", "parquet", "--out", str(tmp_path / "p")]) == 0
    assert cli.main(["export", str(tmp_path / "p"), "--to", "jsonl", "--out", str(tmp_path / "j")]) == 0
    out = capsys.readouterr().out
    assert "kept as text" not in out
    assert sorted(path.name for path in (tmp_path / "j").iterdir()) == sorted(FILES)
    for file in FILES[1:]:
        assert (tmp_path / "j" / file).read_bytes() == (runs / name / file).read_bytes(), file
    before, after = (RunReader(folder).manifest for folder in (runs / name, tmp_path / "j"))
    assert after == before | {"source_files": after["source_files"]}
    columns, text = RunReader(tmp_path / "p"), RunReader(runs / name)
    assert list(columns.steps()) == list(text.steps())
    fields = ("request_id", "unique_blocks", "prefix.intersection_ratio")
    assert list(columns.steps(fields)) == list(text.steps(fields))
    assert columns.state == "complete"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j", "p"]


def test_an_exported_run_reports_the_same(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_run(RunReader(runs / "full"), "parquet", tmp_path / "full")
    said = []
    for folder in (runs / "full", tmp_path / "full"):
        assert cli.main(["report", str(folder)]) == 0
        findings, _, costs = capsys.readouterr().out.partition("The trace itself")
        assert "bytes per record" in costs
        said.append(findings)
    assert said[0] == said[1]
    assert "tokens" in said[0]
    assert (tmp_path / "full" / "report.png").read_bytes() == (runs / "full" / "report.png").read_bytes()
    (runs / "full" / "report.png").unlink()


def test_the_folder_beside_the_run_is_the_default(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "stats", tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), "--to", "parquet"]) == 0
    assert (tmp_path / "run_parquet" / "trace_steps.parquet").exists()


def copy_of(runs: Path, tmp_path: Path) -> Path:
    shutil.copytree(runs / "full", tmp_path / "run")
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert cli.main(["export", *map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_torn_line_is_left_out_and_said(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(runs, tmp_path)
    steps, requests = run / "trace_steps.jsonl", run / "requests.jsonl"
    whole = steps.read_bytes()
    steps.write_bytes(whole[:-100])
    requests.write_bytes(requests.read_bytes()[:-10])
    manifest = json.dumps(RunReader(run).manifest | {"state": "running", "files": None})
    (run / "manifest.json").write_text(manifest)
    assert cli.main(["export", str(run), "--to", "parquet", "--out", str(tmp_path / "p")]) == 0
    out = capsys.readouterr().out
    num_lines = whole.count(b"\n")
    assert f"left out: {steps}: line {num_lines}: " in out
    assert f"left out: {requests}: line 2: " in out
    exported = RunReader(tmp_path / "p").manifest
    assert exported | {"files": None} == json.loads(manifest) | {"source_files": None}
    assert RunReader(tmp_path / "p").state == "incomplete"
    assert cli.main(["export", str(tmp_path / "p"), "--to", "jsonl", "--out", str(tmp_path / "j")]) == 0
    assert (tmp_path / "j" / "trace_steps.jsonl").read_bytes() == b"".join(whole.splitlines(True)[:-1])


@pytest.mark.parametrize("broken", [b"{broken\n", b"[1]\n", b"\n", b"\xff\n"])
def test_a_broken_line_is_named_and_nothing_stays(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: bytes
) -> None:
    run = copy_of(runs, tmp_path)
    steps = run / "trace_steps.jsonl"
    lines = steps.read_bytes().splitlines(keepends=True)
    steps.write_bytes(b"".join([*lines[:7], broken, *lines[7:]]))
    error = refused(capsys, run, "--to", "parquet", "--out", tmp_path / "p")
    assert f"{steps}: line 8 is not " in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_cannot_be_exported_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "full"
    assert "never overwritten" in refused(capsys, run, "--to", "parquet", "--out", runs / "stats")
    assert "already" in refused(capsys, run, "--to", "jsonl", "--out", tmp_path / "x")
    assert "cannot read it" in refused(capsys, tmp_path, "--to", "parquet", "--out", tmp_path / "x")
    (tmp_path / "a file").write_text("")
    error = refused(capsys, run, "--to", "parquet", "--out", tmp_path / "a file" / "below")
    assert "Not a directory" in error
    broken = tmp_path / "broken"
    export_run(RunReader(run), "parquet", broken)
    steps = broken / "trace_steps.parquet"
    steps.write_bytes(steps.read_bytes()[:-20])
    assert str(steps) in refused(capsys, broken, "--to", "jsonl", "--out", tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "broken"]


def test_a_run_under_way_is_refused(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunReader(copy_of(runs, tmp_path))
    monkeypatch.setattr(RunReader, "state", property(lambda self: "running"))
    with pytest.raises(UserError, match="still being written"):
        export_run(run, "parquet", tmp_path / "p")


def test_what_reads_back_differently_is_not_kept(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "read_lines", lambda path: iter([b"{}"]))
    with pytest.raises(UserError, match="does not read back the same"):
        export_run(RunReader(runs / "full"), "parquet", tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_line(runs: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk."""
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "from dsatrace import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "export", runs / "full", "--to", "parquet", "--out", tmp_path / "p"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "inference")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "cannot export there: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_folder(runs: Path, tmp_path: Path) -> None:
    program = f"""
import os, sys
sys.path[:0] = [{str(INFERENCE)!r}]
from pathlib import Path
from dsatrace.trace import export
from dsatrace.trace.reader import RunReader
def stop(run, folder):
    print("steps written", flush=True)
    import time; time.sleep(60)
export._copy_others = stop
export.export_run(RunReader({str(runs / "full")!r}), "parquet", Path({str(tmp_path / "p")!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "steps written\n"
    with pytest.raises(UserError, match="another export is writing there"):
        export_run(RunReader(runs / "full"), "parquet", tmp_path / "p")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == [".p.export"]
    done = export_run(RunReader(runs / "full"), "parquet", tmp_path / "p")
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    assert done.num_records == len(list(RunReader(tmp_path / "p").steps()))


def test_a_place_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "p"
    with pytest.raises(OSError, match="not empty"), export.new_folder(out) as folder:
        (folder / "mine").write_text("1")
        out.mkdir()
        (out / "theirs").write_text("2")
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
