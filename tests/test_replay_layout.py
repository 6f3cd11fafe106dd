"""The layout for replay holds the same records, whole requests per file, however the source was cut up."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dsatrace import cli
from dsatrace.errors import UserError
from dsatrace.files import digest_of
from dsatrace.schema import MANIFEST_FILE, REQUESTS_FILE, STEPS_FILE, STEPS_FOLDER, SUMMARY_FILE
from dsatrace.trace.export import export_run
from dsatrace.trace.parquet import file as parquet
from dsatrace.trace.parquet import replay_layout
from dsatrace.trace.reader import RunReader, part_paths
from dsatrace.trace.selection_parts import selection_parts
from dsatrace.trace.selections import read_selections
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.run import verify
from helpers.golden_run import NUM_LAYERS, GoldenRequest, write_golden
from test_selections import as_read, plainly

REQUESTS = tuple(GoldenRequest(f"r{i}", 12 + i, 3 + i % 4) for i in range(7))
KEY = ("layer_id", "step_idx")
SOURCES = ("jsonl", "parquet")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layout")
    for name in SOURCES:
        write_golden(folder / name, REQUESTS, format=name, sealed=True)
    return folder


def laid_out(run: Path, out: Path, run_bytes: int = 1 << 28, file_bytes: int = 1 << 26) -> RunReader:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay_layout, "RUN_BYTES", run_bytes)
        patch.setattr(replay_layout, "FILE_BYTES", file_bytes)
        patch.setattr(parquet, "GROUP_RECORDS", 10)
        export_run(RunReader(run), "replay", out)
    return RunReader(out)


@contextlib.contextmanager
def changed(path: Path) -> Iterator[dict[str, Any]]:
    record = json.loads(path.read_text())
    yield record
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("run_bytes", "file_bytes"), [(1, 30_000), (20_000, 1), (1 << 28, 1 << 26)])
def test_the_same_records_in_whole_requests(
    runs: Path, tmp_path: Path, source: str, run_bytes: int, file_bytes: int
) -> None:
    run = laid_out(runs / source, tmp_path / "out", run_bytes, file_bytes)
    by_request: dict[str, list[Any]] = {request.request_id: [] for request in REQUESTS}
    for record in RunReader(runs / source).steps():
        by_request[record["request_id"]].append(record)
    expected = [
        record
        for records in by_request.values()
        for record in sorted(records, key=lambda record: [record[name] for name in KEY])
    ]
    assert list(run.steps()) == expected
    assert sorted(path.name for path in run.folder.iterdir()) == sorted(
        (MANIFEST_FILE, REQUESTS_FILE, SUMMARY_FILE, STEPS_FOLDER)
    )
    files = {name: known for name, known in run.manifest["files"].items() if name.startswith(STEPS_FOLDER)}
    assert list(files) == [f"{STEPS_FOLDER}/{path.name}" for path in part_paths(run.folder)]
    assert sum(known["requests"] for known in files.values()) == len(REQUESTS)
    assert (len(files) == len(REQUESTS)) == (file_bytes == 1)
    verified = verify(run.folder)
    assert (verified.num_records, verified.num_requests) == (len(expected), len(REQUESTS))
    assert as_read(run) == plainly(RunReader(runs / source))


def test_a_row_group_is_of_one_request_and_says_so(runs: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay_layout, "GROUP_RECORDS", (4, 5))
        run = laid_out(runs / "jsonl", tmp_path / "out")
    (path,) = run.step_paths
    with pq.ParquetFile(path) as file:
        columns = file.schema.names[:3]
        assert columns[1:] == ["request_id", "layer_id"]
        for index in range(file.metadata.num_row_groups):
            group, rows = file.metadata.row_group(index), file.read_row_group(index)
            assert 1 <= len(rows) <= 5
            for i, name in enumerate(columns[1:], 1):
                told, values = group.column(i).statistics, rows[name].to_pylist()
                assert (told.min, told.max) == (min(values), max(values))
            assert len(set(rows["request_id"].to_pylist())) == 1
            (ids,) = (
                group.column(i)
                for i in range(group.num_columns)
                if group.column(i).path_in_schema == "selected_token_pos.list.element"
            )
            assert "DELTA_BINARY_PACKED" in ids.encodings
            assert ids.compression == "ZSTD"


def test_its_parts_read_nothing_of_others(runs: Path, tmp_path: Path) -> None:
    run = laid_out(runs / "parquet", tmp_path / "out", file_bytes=30_000)
    parts = selection_parts(run, 1)
    assert [part.request_ids for part in parts] == [(request.request_id,) for request in REQUESTS]
    taken = [(span.path, index) for part in parts for span in part.spans for index in range(*span[1:])]
    assert len(taken) == len(set(taken))
    (second,) = read_selections(run, parts[1:2])
    assert (second.request_id, len(second.layers)) == ("r1", NUM_LAYERS)


def test_a_killed_run_is_laid_out_as_far_as_it_goes(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "jsonl", tmp_path / "run")
    steps = tmp_path / "run" / STEPS_FILE
    steps.write_bytes(steps.read_bytes()[:-9])
    with changed(tmp_path / "run" / MANIFEST_FILE) as manifest:
        manifest.update(state="running", files=None)
    run = laid_out(tmp_path / "run", tmp_path / "out")
    assert run.state == "incomplete"
    assert as_read(run) == plainly(RunReader(tmp_path / "run"))


def test_a_run_without_records_is_laid_out_too(tmp_path: Path) -> None:
    write_golden(tmp_path / "run", REQUESTS[:1], prefill="off", sample_rate=0.0)
    laid_out(tmp_path / "run", tmp_path / "out")
    found = verify(tmp_path / "out")
    assert (found.is_for_replay, found.num_records) == (True, 0)


def test_what_needs_the_order_of_writing_says_so(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(runs / "jsonl"), "--to", "replay", "--out", str(tmp_path / "out")]) == 0
    for command in (["summarize"], ["report"], ["export", "--to", "jsonl"]):
        assert cli.main([command[0], str(tmp_path / "out"), *command[1:]]) == 2
        error = capsys.readouterr().err
        assert "is laid out for replay" in error
        assert "the run that it was made from" in error
        assert error.count("\n") == 1
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    assert "laid out for replay" in capsys.readouterr().out


def test_verify_names_what_is_wrong_with_a_layout(runs: Path, tmp_path: Path) -> None:
    run = laid_out(runs / "jsonl", tmp_path / "out", file_bytes=1)
    first, second = run.step_paths[:2]

    def sealed_anew() -> None:
        with changed(run.folder / MANIFEST_FILE) as manifest:
            for path in (first, second):
                manifest["files"][f"{STEPS_FOLDER}/{path.name}"] |= digest_of(path)

    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises((Mismatch, UserError), match=first.name):
        verify(run.folder)
    table = pq.read_table(second)
    pq.write_table(table.take(list(reversed(range(len(table))))), first)
    sealed_anew()
    with pytest.raises(Mismatch, match=r"records|after layer"):
        verify(run.folder)
    pq.write_table(table, first)
    sealed_anew()
    with changed(run.folder / MANIFEST_FILE) as manifest:
        names = [f"{STEPS_FOLDER}/{path.name}" for path in (first, second)]
        manifest["files"][names[0]]["records"] = manifest["files"][names[1]]["records"]
    with pytest.raises(Mismatch, match="stands elsewhere too"):
        verify(run.folder)
