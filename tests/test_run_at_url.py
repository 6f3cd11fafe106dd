"""Runs at a URL: replayed and summarized like the same run in a folder; errors without secrets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dsatrace.commands.replay import main
from dsatrace.commands.summarize import main as summarize
from dsatrace.errors import UserError
from dsatrace.trace.export import export_run
from dsatrace.trace.reader import RunReader
from dsatrace.trace.url import UrlPath, run_path, without_secrets
from helpers.command_runs import told_error
from helpers.golden_run import GoldenRequest, write_golden

REQUESTS = [GoldenRequest(f"r{i}", 30 + 5 * i, 9 + i % 3) for i in range(4)]
FORMATS = ("jsonl", "parquet", "replay")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in each format, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    write_golden(folder / "jsonl" / "run", REQUESTS, sealed=True)
    for to in ("parquet", "replay"):
        export_run(RunReader(folder / "jsonl" / "run"), to, folder / to / "run")
    return folder


@pytest.fixture
def bucket(runs: Path) -> Iterator[str]:
    """The runs in the memory of this process."""
    memory = fsspec.filesystem("memory")
    for path in (path for path in runs.rglob("*") if path.is_file()):
        memory.pipe_file(f"/bucket/{path.relative_to(runs)}", path.read_bytes())
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def replayed(run: str, out: Path, *flags: str) -> dict[str, Any]:
    assert main([run, "--policy", "lru,opt", "--no-figure", "--out", str(out), *flags]) == 0
    record: dict[str, Any] = json.loads((out / "replay.json").read_bytes())
    return record


@pytest.mark.parametrize("form", FORMATS)
def test_a_replay_is_that_of_the_folder(runs: Path, bucket: str, form: str, tmp_path: Path) -> None:
    there = replayed(f"{bucket}/{form}/run/", tmp_path / "url")
    assert there == replayed(str(runs / form / "run"), tmp_path / "folder")
    assert there["num_requests"] == len(REQUESTS)


def test_processes_and_shards_read_urls(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsatrace.trace.selection_parts.MIN_PART_BYTES", 1)
    url = f"file://{runs}/parquet/run"
    whole = replayed(url, tmp_path / "whole", "--jobs", "2")
    assert len(list((tmp_path / "whole" / "parts").iterdir())) == len(REQUESTS)
    for shard in range(2):
        replayed(url, tmp_path / f"{shard}", "--shard", f"{shard}/2")
    assert main(["merge", f"{tmp_path}/0", f"{tmp_path}/1", "--no-figure", "--out", f"{tmp_path}/sum"]) == 0
    assert json.loads((tmp_path / "sum" / "replay.json").read_bytes()) == whole


def test_the_result_of_a_url_lies_here(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([f"{bucket}/replay/run", "--policy", "lru", "--no-figure"]) == 0
    assert (tmp_path / "run_replay" / "replay.json").exists()


@pytest.mark.parametrize("form", FORMATS[:2])
def test_a_summary_is_that_of_the_folder(runs: Path, bucket: str, form: str, tmp_path: Path) -> None:
    for name, run in (("url", f"{bucket}/{form}/run"), ("folder", str(runs / form / "run"))):
        assert summarize([run, "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "url").read_bytes() == (tmp_path / "folder").read_bytes()


def test_a_killed_run_at_a_url_is_incomplete(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run", REQUESTS, state="running")
    assert RunReader(f"file://{folder}").state == "incomplete"


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("memory://bucket/nothing", "memory://bucket/nothing/manifest.json: cannot read it: No such file"),
        ("gopher://bucket/run", "fsspec knows no gopher://"),
        ("dropbox://bucket/run", "dropbox://bucket/run/manifest.json: "),  # its package is not installed
    ],
)
def test_what_cannot_be_read_is_named(
    run: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in told_error(capsys, lambda: main([run, "--out", str(tmp_path / "out")]))


def test_fsspec_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(UserError, match=r"s3://bucket/run/manifest\.json: needs the package fsspec"):
        RunReader("s3://bucket/run")


@pytest.mark.parametrize("fails", ["open", "read"])
def test_a_server_that_fails_tells_no_secret(
    bucket: str,
    fails: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fired = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        fired.append(1)
        raise RuntimeError("403 for https://me:pass@host/f?sig=abc with hunter2hunter2")

    monkeypatch.setenv("STORE_SECRET", "hunter2hunter2")
    if fails == "open":
        monkeypatch.setattr(type(fsspec.filesystem("memory")), "_open", fail)
    else:
        monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fail)
    said = told_error(capsys, lambda: main([f"{bucket}/replay/run", "--out", str(tmp_path / "out")]))
    assert fired
    assert "403 for https://host/f with ***" in said and "pass" not in said and "abc" not in said


def test_a_column_that_cannot_be_read_is_named(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = fsspec.filesystem("memory")
    (path,) = memory.glob("/bucket/replay/run/trace_steps/*.parquet")
    data = bytearray(memory.cat_file(path))
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    memory.pipe_file(path, bytes(data))
    said = told_error(capsys, lambda: main([f"{bucket}/replay/run", "--out", str(tmp_path / "out")]))
    assert "000001.parquet: cannot read it" in said


def test_paths_of_urls() -> None:
    assert isinstance(run_path("outputs/a"), Path) and isinstance(run_path("s3://b/run"), UrlPath)
    signed = UrlPath("https://me:secret@host/run?token=abc")
    assert str(signed) == repr(signed) == "https://host/run"
    assert (signed / "manifest.json").url == "https://me:secret@host/run/manifest.json?token=abc"
    assert signed.name == "run"
    assert UrlPath("s3://b/what?/a.parquet").suffix == ".parquet"
    assert without_secrets("s3://b/run") == "s3://b/run"
