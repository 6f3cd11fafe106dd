"""`dsatrace.load`: data frames and arrays hold what the records hold, whatever the format and the kind."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dsatrace
from conftest import ROOT
from dsatrace.captures.diff import diff
from dsatrace.errors import UserError
from dsatrace.schema import REQUESTS_FILE, STEP_FIELDS, STEPS_FILE, STEPS_PARQUET_FILE, value_at
from dsatrace.trace import load as loading
from dsatrace.trace.export import export_run
from dsatrace.trace.load import RECORD_SCHEMA, Run, load
from dsatrace.trace.parquet import file as parquet
from dsatrace.trace.parquet import replay_layout
from dsatrace.trace.parquet.columns import LEAVES
from dsatrace.trace.reader import RunReader
from helpers.golden_run import write_golden
from helpers.kind_runs import KINDS, write_kind
from helpers.resume_samples import serve

OPEN = ROOT / "data" / "traces" / "needle-2k" / "2k"
FORMATS = ("jsonl", "parquet", "replay")
WAYS = ("golden", "blocks", *KINDS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every kind, each in every format, in row groups of 5 records; `blocks` has no positions."""
    folder = tmp_path_factory.mktemp("load")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "GROUP_RECORDS", 5)
        patch.setattr(replay_layout, "GROUP_RECORDS", (4, 8))
        for name in WAYS:
            jsonl = folder / name / "jsonl"
            if name in KINDS:
                write_kind(jsonl, name)
            else:
                write_golden(jsonl, level="blocks" if name == "blocks" else "full")
            for format_ in FORMATS[1:]:
                export_run(RunReader(jsonl), format_, folder / name / format_)
    return folder


@pytest.fixture(params=[(name, format_) for name in WAYS for format_ in FORMATS], ids="-".join)
def run(request: pytest.FixtureRequest, runs: Path) -> Run:
    return dsatrace.load(runs.joinpath(*request.param))


def records_of(run: Run) -> list[dict[str, Any]]:
    """As its lines say, read once per folder; nobody changes them."""
    return _records_in(run.reader.folder)


@functools.cache
def _records_in(folder: Path) -> list[dict[str, Any]]:
    return list(RunReader(folder).steps())


def ids_of(record: dict[str, Any]) -> list[int]:
    names = ("selected_token_pos", "selected_ids", "selected_block_ids")
    return next(record[name] for name in names if record.get(name) is not None)


def expected(record: dict[str, Any], path: str) -> Any:
    """A field as the frame has it."""
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if path == "prefix.intersection_blocks":
        return None if value is None else len(value)
    return value


def test_records_are_the_runs(run: Run) -> None:
    table = run.records.to_arrow()
    assert table.schema == RECORD_SCHEMA
    rows, records = table.to_pylist(), records_of(run)
    assert len(rows) == len(records) > 0
    for row, record in zip(rows, records, strict=True):
        for leaf in LEAVES:
            want = expected(record, leaf.path)
            assert row[leaf.column] == (pytest.approx(want) if leaf.is_score else want), leaf.path


def test_columns_are_read_alone(run: Run) -> None:
    whole = run.records.to_arrow()
    for names in (["unique_blocks", "layer_id"], ["selected_block_ids"], ["kv_fetch_hbm_bytes_read"]):
        assert run.records.to_arrow(names) == whole.select(names)


def test_selections_are_the_records(run: Run) -> None:
    by_set: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for record in records_of(run):
        name = (record["request_id"], record["layer_id"], record.get("kv_head", 0))
        by_set.setdefault(name, []).append(record)
    assert run.request_ids == tuple(dict.fromkeys(request_id for request_id, _, _ in by_set))
    for name, records in by_set.items():
        records.sort(key=lambda record: record["step_idx"])
        found = run.selections(*name)
        assert [row.tolist() for row in found.rows()] == [ids_of(record) for record in records]
        array = found.array()
        assert array.dtype == np.int32 and array.shape == (len(records), max(map(len, found.rows())))
        assert [[i for i in row if i != -1] for row in array.tolist()] == [ids_of(r) for r in records]
        assert found.seq_len.tolist() == [record["seq_len_current"] for record in records]
    assert sum(len(one) for request in run.all_selections() for one in request.layers.values()) == len(
        records_of(run)
    )


@pytest.mark.parametrize("factor", [1, 3])
def test_block_ids_are_the_touched_blocks(run: Run, factor: int) -> None:
    size = run.manifest["trace"]["block_size_tokens"] * factor
    assert run.kind is not None
    if not run.kind.holds("selected_block_ids"):
        with pytest.raises(UserError, match=r"its ids \(.*\) are no positions"):
            run.block_ids(size)
        return
    records = {
        (r["request_id"], r["layer_id"], r.get("kv_head", 0), r["step_idx"]): r for r in records_of(run)
    }
    seen = 0
    for request in run.block_ids(size):
        for (layer, head), touched in request.layers.items():
            for step, blocks in zip(touched.step_idx.tolist(), touched.rows(), strict=True):
                record = records[request.request_id, layer, head, step]
                assert blocks.tolist() == sorted({b // factor for b in record["selected_block_ids"]})
                seen += 1
    assert seen == len(records)


def test_requests_are_the_lines(run: Run) -> None:
    rows, lines = run.requests.to_arrow().to_pylist(), list(run.reader.requests())
    assert len(rows) == len(lines) > 0
    for row, line in zip(rows, lines, strict=True):
        labels = {f"labels_{name}": value for name, value in line.pop("labels").items()}
        assert {name: value for name, value in row.items() if value is not None} == {
            name: value for name, value in (line | labels).items() if value is not None
        }


def test_pandas_sums_as_the_summary(runs: Path) -> None:
    run = load(runs / "golden" / "parquet")
    frame, summary = run.records.to_pandas(["phase", "unique_blocks"]), run.reader.summary()
    assert frame.unique_blocks.mean() == pytest.approx(summary["unique_blocks"]["mean"])
    assert len(frame) == summary["counts"]["records"]
    assert len(run.requests.to_pandas()) == 3


def test_arrow_streams_batch_by_batch(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that stops after a batch has not had the others read."""
    for format_ in FORMATS:
        run, read = load(runs / "golden" / format_), []
        monkeypatch.setattr(parquet, "BATCH_RECORDS", 7)
        monkeypatch.setattr(loading, "BATCH_RECORDS", 7)
        lines = run.reader.lines

        def counted(name: str, lines: Any = lines, read: list[int] = read) -> Iterator[Any]:
            for line in lines(name):
                read.append(1)
                yield line

        monkeypatch.setattr(run.reader, "lines", counted)
        batches = run.records.batches(["layer_id", "selected_block_ids"])
        assert 0 < len(next(batches)) <= 7
        assert len(read) == (7 if format_ == "jsonl" else 0)
        assert pa.table(run.records) == run.records.to_arrow()


def test_a_large_run_is_read_in_little_memory(tmp_path: Path) -> None:
    """The open trace thirty times over, 113 MB as a table: batches and one layer hold a small part of it."""
    shutil.copytree(OPEN, tmp_path / "run")
    path = tmp_path / "run" / STEPS_PARQUET_FILE
    table = pq.read_table(path)
    with parquet.open_writer(path, table.schema, keep_order=True) as writer:
        for i in range(30):
            names = pa.array([f"{i}.{name}" for name in table["request_id"].to_pylist()])
            writer.write_table(table.set_column(1, "request_id", names), row_group_size=520)
    code = """
import sys, pyarrow as pa, dsatrace
pa.set_memory_pool(pa.system_memory_pool())  # which gives back at once
pool, run, told = pa.default_memory_pool(), dsatrace.load(sys.argv[1]), []
start = pool.max_memory()
assert sum(len(batch) for batch in run.records.batches()) == 30 * 2080
told.append(pool.max_memory() - start)
assert run.selections(run.request_ids[-1], 3).array().shape == (65, 192)
told.append(pool.max_memory() - start)
told.append(run.records.to_arrow().nbytes)
print(*told)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    streamed, one_layer, whole = map(int, done.stdout.split())
    assert whole > 100_000_000
    assert 0 < streamed <= one_layer < whole / 10


def test_one_layer_is_read_alone(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out for replay, a layer's selections are a few row groups; of JSON lines its lines are parsed."""
    run = load(runs / "golden" / "replay")
    request = run.request_ids[-1]
    read: list[int] = []
    read_row_group = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, index: int, *args: Any, **kwargs: Any) -> pa.Table:
        read.append(index)
        return read_row_group(self, index, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    selected = run.selections(request, 2)
    groups = sum(pq.ParquetFile(path).num_row_groups for path in run.reader.step_paths)
    assert 1 <= len(read) <= 2 < groups and len(selected) == 6
    run = load(runs / "golden" / "jsonl")
    assert request in run.request_ids
    parsed: list[bytes] = []
    loads = orjson.loads

    def counted_loads(text: bytes) -> Any:
        parsed.append(text)
        return loads(text)

    monkeypatch.setattr("dsatrace.trace.selections.orjson.loads", counted_loads)
    assert len(run.selections(request, 2)) == 6
    assert sum(b"dsa_topk" in text for text in parsed) == 6


def test_a_run_at_a_url_is_the_same(runs: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(runs / "golden"), "/loaded", recursive=True)
    try:
        for format_ in FORMATS:
            there, here = load(f"memory://loaded/{format_}"), load(runs / "golden" / format_)
            assert there.records.to_arrow() == here.records.to_arrow()
            assert there.selections("r1", 2).array().tolist() == here.selections("r1", 2).array().tolist()
        assert diff(load("memory://loaded/replay"), load(runs / "golden" / "jsonl")).num_differing == 0
        assert list(dsatrace.tables("memory://loaded/jsonl")) == list(
            dsatrace.tables(runs / "golden" / "jsonl")
        )
    finally:
        memory.rm("/loaded", recursive=True)


def test_a_killed_run_gives_its_whole_lines(tmp_path: Path) -> None:
    folder = serve(tmp_path / "run", stop_at=6)
    steps = folder / STEPS_FILE
    steps.write_bytes(steps.read_bytes()[:-10])
    (folder / REQUESTS_FILE).unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"state": "running", "files": None}))
    run = load(folder)
    whole = steps.read_bytes().count(b"\n")
    assert len(run.records.to_arrow()) == whole > 0
    assert len(run.requests.to_arrow()) == 0
    assert "cut short" in run.reader.torn_lines[STEPS_FILE]
    assert len(run.selections(run.request_ids[0], 0)) > 0
    assert "incomplete" in repr(run)


def test_a_killed_parquet_run_gives_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsatrace.trace.parquet.sink.PART_RECORDS", 8)
    folder = serve(tmp_path / "run", stop_at=6, format="parquet")
    run = load(folder)
    assert run.reader.is_parquet
    assert len(run.records.to_arrow(["layer_id"])) == len(list(run.reader.steps())) > 0
    assert sum(len(run.selections(name, 0)) for name in run.request_ids) > 0


def test_records_kept_as_text_are_there(runs: Path, tmp_path: Path) -> None:
    lines = (runs / "golden" / "jsonl" / STEPS_FILE).read_bytes().splitlines()
    first = orjson.loads(lines[0])
    lines[0] = orjson.dumps(dict(reversed(first.items())))
    lines[1] = orjson.dumps(orjson.loads(lines[1]) | {"mine": [1]})
    written = parquet.write_parquet(tmp_path / STEPS_PARQUET_FILE, [(x, orjson.loads(x)) for x in lines])
    assert written.num_kept_as_text == 1
    for name in ("manifest.json", REQUESTS_FILE):
        (tmp_path / name).write_bytes((runs / "golden" / "jsonl" / name).read_bytes())
    table = load(tmp_path).records.to_arrow()
    assert table["extra"].to_pylist()[:3] == [None, '{"mine":[1]}', None]
    assert table.drop(["extra"]) == load(runs / "golden" / "jsonl").records.to_arrow().drop(["extra"])


def test_what_is_not_there_is_named(runs: Path, tmp_path: Path) -> None:
    run = load(runs / "golden" / "jsonl")
    for ask, said in (
        (lambda: run.selections("r9", 0), r"no request 'r9' with records; it has 'r0', 'r1', 'r2'"),
        (lambda: run.selections("r0", 7), r"request 'r0': no selections of layer 7, KV head 0$"),
        (
            lambda: run.selections("r0", 1, 2),
            r"layer 1, KV head 2; its KV heads are 0 to 0",
        ),
        (lambda: run.records.to_arrow(["blocks"]), r"no column 'blocks'; `columns` lists them"),
        (lambda: run.block_ids(0), r"block size 0: use at least 1"),
        (
            lambda: load(runs / "blocks" / "jsonl").block_ids(6),
            r"size 6: it recorded blocks of 4 tokens; use a",
        ),
        (lambda: load(tmp_path), r"manifest\.json: cannot read it: .* is this a run's folder\?"),
    ):
        with pytest.raises(UserError, match=said):
            ask()
    write_golden(tmp_path / "stats", level="stats")
    with pytest.raises(UserError, match="of level stats, hold no selections"):
        load(tmp_path / "stats").selections("r0", 0)
    write_golden(tmp_path / "bad")
    steps = tmp_path / "bad" / STEPS_FILE
    lines = steps.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"layer_id":0', b'"layer_id":"x"')
    steps.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"trace_steps\.jsonl: line 4: .*'x'.*dsatrace verify"):
        load(tmp_path / "bad").records.to_arrow()


def test_a_library_that_is_missing_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(runs / "golden" / "jsonl")
    for library in ("pandas", "polars"):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(UserError, match=f"{library} is not installed; install it"):
            getattr(run.records, f"to_{library}")()


def test_polars_is_handed_arrow(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[pa.Table] = []
    stand_in = types.ModuleType("polars")
    stand_in.from_arrow = given.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "polars", stand_in)
    run = load(runs / "golden" / "jsonl")
    run.records.to_polars(["layer_id"])
    assert given == [run.records.to_arrow(["layer_id"])]


def test_importing_the_package_loads_nothing() -> None:
    heavy = ("numpy", "pyarrow", "pandas", "torch")
    code = f"import sys, dsatrace; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_field_is_a_column() -> None:
    assert value_at({"a": {"b": 1}}, "a.b") == 1
    names = set(RECORD_SCHEMA.names)
    assert {field.name for field in STEP_FIELDS if not (field.children or field.keys)} <= names
