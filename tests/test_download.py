"""`dsatrace download`: exports that are whole or not there, and scripts that go online."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import file_download

from conftest import INFERENCE, ROOT
from dsatrace import cli
from dsatrace.errors import UserError
from dsatrace.workloads.catalog import DATA_SETS
from dsatrace.workloads.exports import export_data_set, read_export
from dsatrace.workloads.hub import Fetched
from dsatrace.workloads.longbench_v2 import LongBenchV2Loader
from dsatrace.workloads.ruler.reader import read_examples
from dsatrace.workloads.samples import sample_file
from dsatrace.workloads.sharegpt import ShareGPTLoader
from dsatrace.workloads.sources import find_source
from helpers.fake_hub import COMMIT, FakeHub, fake_hub
from helpers.ruler_samples import ROW, pack

ROWS = "".join(json.dumps({**ROW, "index": i}) + "\n" for i in range(3)).encode()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with all four data sets; they are exported to `tmp_path/data`."""
    files = [f"data/ruler/{task}/validation_{n}.jsonl" for task in ("vt", "cwe") for n in (4096, 8192)]
    archive = pack(tmp_path / "a.tgz", [(file, ROWS) for file in files])
    repos = {}
    for name, data_set in DATA_SETS.items():
        file = archive if name == "ruler" else sample(name)
        repos[data_set.hub.repo] = {data_set.hub.file: file.read_bytes()}
    monkeypatch.setenv("DSATRACE_DATA", str(tmp_path / "data"))
    with fake_hub(repos, monkeypatch, tmp_path) as hub:
        yield hub


def sample(name: str) -> Path:
    return sample_file(DATA_SETS[name].sample or "")


def fetched(name: str, path: Path) -> Fetched:
    return Fetched(DATA_SETS[name].hub, path, COMMIT, hashlib.sha256(path.read_bytes()).hexdigest())


def download(*argv: str) -> int:
    return cli.main(["download", *argv])


def test_ruler_keeps_its_layout(hub: FakeHub, tmp_path: Path, capsys: Any) -> None:
    assert download("ruler", "--revision", "main") == 0
    folder = tmp_path / "data" / "ruler"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    assert files == [
        "SOURCE.json",
        *(f"{task}/validation_{n}.jsonl" for task in ("cwe", "vt") for n in (4096, 8192)),
    ]
    assert (folder / "vt" / "validation_4096.jsonl").read_bytes() == ROWS
    assert len(list(read_examples(folder, ["vt"], 4096))) == 3
    printed = capsys.readouterr().out
    assert "terms: the generator is Apache-2.0" in printed and "12 rows of allenai/ruler_data@" in printed
    source = find_source(DATA_SETS["ruler"])
    assert source.description.startswith("folder ruler sha256:")
    assert f", exported from allenai/ruler_data@{COMMIT} data_100_samples.tgz sha256:" in source.description
    for limit in (1, 3, 4, 12, 13, 7):  # rows in all; an export may be replaced
        assert download("ruler", "--revision", "main", "--limit", str(limit)) == 0
        assert len(list(read_examples(folder))) == min(limit, 12)
        assert len(list(folder.rglob("*.jsonl"))) == -(-min(limit, 12) // 3)  # none without a row
    next(folder.rglob("*.jsonl")).write_bytes(ROWS * 2)
    assert (
        ", changed since its export from allenai/ruler_data@" in find_source(DATA_SETS["ruler"]).description
    )


@pytest.mark.parametrize(
    ("name", "loader"), [("longbenchv2", LongBenchV2Loader), ("sharegpt", ShareGPTLoader)]
)
def test_arrays_become_lines_with_the_same_rows(hub: FakeHub, tmp_path: Path, name: str, loader: Any) -> None:
    assert download(name, "--revision", "main") == 0
    file = tmp_path / "data" / name / f"{name}_train.jsonl"
    rows = json.loads(sample(name).read_bytes())
    assert [json.loads(line) for line in file.read_bytes().splitlines()] == rows
    assert list(loader(file)) == list(loader(sample(name)))
    export = read_export(file.parent)
    assert export is not None and export.num_rows == len(rows) and export.limit is None
    assert export.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert export.file_sha256 == hashlib.sha256(sample(name).read_bytes()).hexdigest()
    assert (export.repo, export.commit) == (DATA_SETS[name].hub.repo, COMMIT)
    assert download(name, "--revision", "main", "--limit", "2") == 0
    limited = tmp_path / "data" / name / f"{name}_train_limit2.jsonl"
    assert len(limited.read_bytes().splitlines()) == 2
    assert find_source(DATA_SETS[name]).path == limited  # the last export, not the only file


def test_burstgpt_is_a_csv_and_a_line_to_export(hub: FakeHub, tmp_path: Path, capsys: Any) -> None:
    assert download("burstgpt", "--revision", "main") == 0
    lines = sample("burstgpt").read_bytes().splitlines(keepends=True)
    file = tmp_path / "data" / "burstgpt" / "burstgpt_train_limit2000.csv"
    assert file.read_bytes() == b"".join(lines)
    assert capsys.readouterr().out.splitlines()[-1] == f"export BURSTGPT_CSV={file}"
    out = tmp_path / "with space"
    assert download("burstgpt", "--revision", "main", "--limit", "7", "--out", str(out)) == 0
    assert (out / "burstgpt_train_limit7.csv").read_bytes() == b"".join(lines[:8])
    assert (
        capsys.readouterr().out.splitlines()[-1] == f"export BURSTGPT_CSV='{out}/burstgpt_train_limit7.csv'"
    )


@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_offline_it_does_not_name_itself(
    hub: FakeHub, tmp_path: Path, capsys: Any, monkeypatch: Any, name: str
) -> None:
    hub.status = 500
    for switched_off in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", switched_off)
        assert download(name) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert "dsatrace download" not in error
        assert f"copy {tmp_path / 'data' / name} from there" in error


def test_the_pinned_bytes_are_checked(hub: FakeHub, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    assert download("burstgpt") == 2
    error = capsys.readouterr().err
    assert "its sha256 is" in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "data" / "burstgpt").exists()
    digest = hashlib.sha256(sample("burstgpt").read_bytes()).hexdigest()
    pinned = dataclasses.replace(DATA_SETS["burstgpt"].hub, sha256=digest)
    monkeypatch.setitem(DATA_SETS, "burstgpt", dataclasses.replace(DATA_SETS["burstgpt"], hub=pinned))
    assert download("burstgpt") == 0
    assert "was not known beforehand" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "num_bytes"), [("longbenchv2", -1), ("longbenchv2", -700), ("sharegpt", 900)]
)
def test_a_cut_source_leaves_no_export(tmp_path: Path, name: str, num_bytes: int) -> None:
    cut = tmp_path / "cut.json"
    cut.write_bytes(sample(name).read_bytes().rstrip()[:num_bytes])
    folder = tmp_path / name
    with pytest.raises(
        UserError, match=r"cut off: the file ends at byte \d+.*; the file is not whole: delete it"
    ):
        export_data_set(DATA_SETS[name], fetched(name, cut), folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["cut.json", name])
    whole = export_data_set(DATA_SETS[name], fetched(name, sample(name)), folder)
    before = (folder / whole.name).read_bytes()
    with pytest.raises(UserError, match="cut off"):
        export_data_set(DATA_SETS[name], fetched(name, cut), folder)
    assert (folder / whole.name).read_bytes() == before and read_export(folder) == whole


def test_a_cut_csv_and_a_cut_archive_leave_no_export(tmp_path: Path) -> None:
    cut = tmp_path / "cut.csv"
    cut.write_bytes(sample("burstgpt").read_bytes()[:-20])
    with pytest.raises(UserError, match="wrong number of columns"):
        export_data_set(DATA_SETS["burstgpt"], fetched("burstgpt", cut), tmp_path / "out")
    noise = os.urandom(50_000).hex().encode()
    archive = pack(tmp_path / "a.tgz", [("vt/validation_1.jsonl", ROWS), ("cwe/validation_1.jsonl", noise)])
    archive.write_bytes(archive.read_bytes()[:30_000])
    with pytest.raises(UserError, match="fetch it again"):
        export_data_set(DATA_SETS["ruler"], fetched("ruler", archive), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def linked(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("vt/validation_8192.jsonl")
    info.type, info.linkname = kind, "../../secret"
    return info


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        ("vt/../../validation_8192.jsonl", "leaves its folder"),
        ("/vt/validation_8192.jsonl", "has an absolute path"),
        (linked(tarfile.SYMTYPE), "is a link"),
        (linked(tarfile.CHRTYPE), "is no plain file"),
        ("other/vt/validation_4096.jsonl", "holds it twice"),
    ],
)
def test_an_unsafe_archive_leaves_nothing(tmp_path: Path, member: Any, problem: str) -> None:
    content = ROWS if isinstance(member, str) else b""
    archive = pack(tmp_path / "a.tgz", [("vt/validation_4096.jsonl", ROWS), (member, content)])
    with pytest.raises(UserError, match=problem):
        export_data_set(DATA_SETS["ruler"], fetched("ruler", archive), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tgz", "out"]


def test_what_the_user_put_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "sharegpt_train.jsonl").write_text("mine")
    with pytest.raises(
        UserError, match="is there and not from an export; move it away or name another --out"
    ):
        export_data_set(DATA_SETS["sharegpt"], fetched("sharegpt", sample("sharegpt")), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the export: "):
        export_data_set(DATA_SETS["sharegpt"], fetched("sharegpt", sample("sharegpt")), tmp_path / "file")
    with pytest.raises(UserError, match="limit must be at least 1, not 0"):
        export_data_set(DATA_SETS["sharegpt"], fetched("sharegpt", sample("sharegpt")), tmp_path, 0)


def test_half_a_surrogate_pair_survives(tmp_path: Path) -> None:
    source = tmp_path / "chats.json"
    source.write_bytes(b'[{"id": "a", "conversations": [{"from": "human", "value": "\\ud83d"}]}]')
    export = export_data_set(DATA_SETS["sharegpt"], fetched("sharegpt", source), tmp_path / "out")
    assert (tmp_path / "out" / export.name).read_bytes() == source.read_bytes()[1:-1] + b"\n"


def test_interrupted_it_continues(hub: FakeHub, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def stops(url: str, temp_file: Any, **rest: Any) -> None:
        temp_file.write(sample("sharegpt").read_bytes()[:500])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", stops)
        assert download("sharegpt", "--revision", "main") == 130
    assert not (tmp_path / "data" / "sharegpt").exists()
    assert download("sharegpt", "--revision", "main") == 0
    assert hub.requests[-1][2] == "bytes=500-"


def run_script(name: str, hub: FakeHub, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a download script as a user does, with the interpreter of the tests."""
    command = tmp_path / "bin" / "dsatrace"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dsatrace.cli "$@"\n')
    command.chmod(0o755)
    names = ("HF_ENDPOINT", "DSATRACE_DATA", "NO_PROXY", "HOME")
    kept = {key: os.environ[key] for key in names if key in os.environ}
    env = {"PATH": f"{command.parent}:/usr/bin:/bin", "VENV": "none", "PYTHONPATH": str(INFERENCE)}
    env |= {"HF_HOME": str(tmp_path / "hf"), **kept, **variables}
    script = ROOT / "scripts" / "datasets" / f"download_{name}.sh"
    return subprocess.run(
        [script, "--revision", "main"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_scripts_go_online_and_show_no_token(hub: FakeHub, tmp_path: Path) -> None:
    hub.gated = {DATA_SETS["burstgpt"].hub.repo}
    refused = run_script("burstgpt", hub, tmp_path, HF_TOKEN="hf_canaryCANARY")
    assert refused.returncode == 2
    error = refused.stderr.splitlines()[-1]
    assert error.startswith("error: lzzmm/BurstGPT@main wants its terms accepted; accept them at ")
    done = run_script("burstgpt", hub, tmp_path, HF_TOKEN="hf_accepted", LIMIT="5")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "data" / "burstgpt" / "burstgpt_train_limit5.csv"
    assert done.stdout.splitlines()[-1] == f"export BURSTGPT_CSV={file}"
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    printed = refused.stdout + refused.stderr + done.stdout + done.stderr
    for canary in ("hf_canaryCANARY", "hf_accepted"):
        assert canary not in printed and canary.encode() not in written


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("name", "export"),
    [
        ("ruler", "ruler/vt/validation_4096.jsonl"),
        ("longbench_v2", "longbenchv2/longbenchv2_train.jsonl"),
        ("sharegpt", "sharegpt/sharegpt_train.jsonl"),
    ],
)
def test_the_other_scripts(hub: FakeHub, tmp_path: Path, name: str, export: str) -> None:
    done = run_script(name, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / export).stat().st_size > 0
    assert "error" not in done.stderr.lower()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_switched_off_hub_stays_off(hub: FakeHub, tmp_path: Path) -> None:
    done = run_script("sharegpt", hub, tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "switched off by HF_HUB_OFFLINE; unset it" in done.stderr
    assert not hub.requests


def test_a_wrong_name_is_told(capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        download("wiki")
    assert caught.value.code == 2 and "invalid choice: 'wiki'" in capsys.readouterr().err
