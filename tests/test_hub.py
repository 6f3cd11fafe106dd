"""The hub: what it gives is checked and kept, what it refuses is one line, and it never hangs."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import file_download

from dsatrace.errors import UserError
from dsatrace.workloads.catalog import DATA_SETS
from dsatrace.workloads.hub import PROBE_S, HubError, HubFile, download, fetch, locate
from helpers.fake_hub import COMMIT, SILENT_S, FakeHub, fake_hub

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = HubFile("org/name", "folder/data.bin", sha256=SHA256)
TOKEN = "hf_canaryCANARYcanary"
REMEDY = "name a file"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub({"org/name": {"folder/data.bin": CONTENT}}, monkeypatch, tmp_path) as hub:
        yield hub


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_fetched_once_checked_and_kept(hub: FakeHub, tmp_path: Path) -> None:
    fetched = fetch(FILE, tmp_path, REMEDY)
    assert fetched.path == tmp_path / "org--name" / COMMIT / "folder" / "data.bin"
    assert fetched.path.read_bytes() == CONTENT
    assert fetched.text() == f"org/name@{COMMIT} folder/data.bin sha256:{SHA256}"
    assert [request[0] for request in hub.requests] == ["HEAD", "GET"]
    assert fetch(FILE, tmp_path, REMEDY) == fetched
    assert [request[0] for request in hub.requests] == ["HEAD", "GET", "HEAD"]  # a branch may have moved
    pinned = HubFile(FILE.repo, FILE.file, COMMIT, SHA256)
    assert fetch(pinned, tmp_path, REMEDY).path == fetched.path
    assert len(hub.requests) == 3  # a commit cannot
    assert [path.name for path in fetched.path.parent.iterdir()] == ["data.bin"]


@pytest.mark.parametrize("num_before", [1, 300_000, len(CONTENT)])
def test_an_interrupted_download_continues(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_before: int
) -> None:
    def stops(url: str, temp_file: Any, **rest: Any) -> None:
        temp_file.write(CONTENT[:num_before])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(file_download, "http_get", stops)
        fetch(FILE, tmp_path, REMEDY)
    assert fetch(FILE, tmp_path, REMEDY).path.read_bytes() == CONTENT
    ranges = [request[2] for request in hub.requests if request[0] == "GET"]
    assert ranges == ([] if num_before == len(CONTENT) else [f"bytes={num_before}-"])


def test_a_connection_that_breaks_is_taken_up_again(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.cut_after = [100_000, 200_000]
    assert fetch(FILE, tmp_path, REMEDY).path.read_bytes() == CONTENT
    assert len([request for request in hub.requests if request[2]]) == 2


def test_a_download_that_breaks_off_says_so(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.cut_after = [100_000, *[0] * 8]
    line = one_line(lambda: fetch(FILE, tmp_path, REMEDY))
    assert re.search(r"cannot be reached|broke off", line)
    hub.cut_after = []
    assert fetch(FILE, tmp_path, REMEDY).path.read_bytes() == CONTENT
    last = hub.requests[-1][2]
    assert last is not None and int(last.removeprefix("bytes=").removesuffix("-")) > 0


def test_a_partial_file_longer_than_the_whole_begins_anew(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "org--name" / COMMIT / "folder"
    folder.mkdir(parents=True)
    (folder / f"data.bin.{SHA256[:16]}.part").write_bytes(b"x" * (len(CONTENT) + 1))
    assert fetch(FILE, tmp_path, REMEDY).path.read_bytes() == CONTENT


def test_other_bytes_than_the_pinned_are_not_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    other = HubFile(FILE.repo, FILE.file, sha256="0" * 64)
    line = one_line(lambda: fetch(other, tmp_path, REMEDY))
    assert f"its sha256 is {SHA256}, not {'0' * 64}" in line and "--revision" in line
    assert [request[0] for request in hub.requests] == ["HEAD"]


def test_a_wrong_sha256_leaves_nothing(hub: FakeHub, tmp_path: Path) -> None:
    hub.large = False  # the hub names git's hash only, so the bytes decide
    other = HubFile(FILE.repo, FILE.file, sha256="0" * 64)
    assert "its sha256 is" in one_line(lambda: fetch(other, tmp_path, REMEDY))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    kept = fetch(HubFile(FILE.repo, FILE.file), tmp_path, REMEDY)
    assert kept.sha256 == SHA256  # not known beforehand: recorded
    kept.path.write_bytes(CONTENT[:-1])
    assert "delete it and fetch it again" in one_line(lambda: fetch(FILE, tmp_path, REMEDY))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (
            HubFile("org/other", "data.bin"),
            r"shows no repository org/other; .*/datasets/org/other\? If it is private, log in",
        ),
        (HubFile("org/name", "data.bin"), r"org/name@main has no file data.bin; see http.*/tree/main"),
        (HubFile("org/name", "folder/data.bin", "v9"), "has no revision v9 of org/name"),
        (HubFile("no name", "data.bin"), "'no name' is no name of a hub repository"),
    ],
)
def test_what_is_not_there_is_named(hub: FakeHub, tmp_path: Path, file: HubFile, reason: str) -> None:
    assert re.search(reason, one_line(lambda: fetch(file, tmp_path, REMEDY)))


@pytest.mark.parametrize("token", [None, TOKEN])
def test_terms_are_pointed_to_and_the_token_is_not_shown(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, token: str | None
) -> None:
    hub.gated = {"org/name"}
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    line = one_line(lambda: fetch(FILE, tmp_path / "data", REMEDY))
    assert f"wants its terms accepted; accept them at {hub.address}/datasets/org/name, then log in" in line
    assert "`hf auth login`" in line
    assert hub.requests[0][3] == (f"Bearer {token}" if token else None)
    printed = capfd.readouterr()
    assert TOKEN not in line + printed.out + printed.err
    monkeypatch.setenv("HF_TOKEN", "hf_accepted")
    assert fetch(FILE, tmp_path / "data", REMEDY).sha256 == SHA256
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or not re.search(rb"hf_accepted|canary", path.read_bytes())


def test_a_cached_login_is_used(hub: FakeHub, tmp_path: Path) -> None:
    hub.gated = {"org/name"}
    (tmp_path / "token").write_text("hf_accepted")
    assert fetch(FILE, tmp_path / "data", REMEDY).sha256 == SHA256


@pytest.mark.parametrize(
    ("status", "reason"),
    [(403, "refuses org/name@main; accept the terms"), (503, "error 503; try again later, or name a file")],
)
def test_other_refusals(hub: FakeHub, tmp_path: Path, status: int, reason: str) -> None:
    hub.status = status
    assert reason in one_line(lambda: fetch(FILE, tmp_path, REMEDY))


def test_a_hub_that_never_answers_is_left_in_time(hub: FakeHub, tmp_path: Path) -> None:
    hub.silent = True
    began = time.monotonic()
    line = one_line(lambda: locate(FILE, tmp_path, REMEDY, 0.3))
    assert 0.2 < time.monotonic() - began < SILENT_S / 2
    assert line == "the hub did not answer within 0.3 s; name a file"
    assert PROBE_S == 5


def test_a_name_lookup_that_hangs_is_left_in_time(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: ended.wait(SILENT_S))
    began = time.monotonic()
    assert "did not answer within 0.3 s" in one_line(lambda: locate(FILE, tmp_path, REMEDY, 0.3))
    assert time.monotonic() - began < SILENT_S / 2
    ended.set()


def test_an_address_nobody_listens_at(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://name:secret@127.0.0.1:{unused.getsockname()[1]}")
        line = one_line(lambda: locate(FILE, tmp_path, REMEDY, 3))
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+ cannot be reached: .*refused.*; name a file", line)
    for address in ("hub", "ftp://hub", "http://[", "http://hub:99999999"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert "HF_ENDPOINT is no address of a hub" in one_line(lambda: locate(FILE, tmp_path, REMEDY, 3))


def test_a_page_that_is_no_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = file_download.HfFileMetadata("../../../etc", "etag", "http://x", 3, None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *args, **kwargs: answer)
    assert "answers, but not as a hub does" in one_line(lambda: locate(FILE, tmp_path, REMEDY, 3))


def test_switched_off_only_what_is_here_is_used(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "switched off by HF_HUB_OFFLINE; unset it" in one_line(lambda: fetch(FILE, tmp_path, REMEDY))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    fetched = fetch(FILE, tmp_path, REMEDY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    num_requests = len(hub.requests)
    assert fetch(FILE, tmp_path, REMEDY) == fetched
    assert len(hub.requests) == num_requests


def test_the_librarys_own_cache_is_used(hub: FakeHub, tmp_path: Path) -> None:
    path = huggingface_hub.hf_hub_download(
        FILE.repo, FILE.file, repo_type="dataset", revision=COMMIT, endpoint=hub.address
    )
    num_requests = len(hub.requests)
    fetched = fetch(HubFile(FILE.repo, FILE.file, COMMIT, SHA256), tmp_path / "data", REMEDY)
    assert (str(fetched.path), fetched.commit) == (path, COMMIT)
    assert len(hub.requests) == num_requests


def test_a_full_disk_is_one_line(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(url: str, temp_file: Any, **rest: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        line = one_line(lambda: fetch(FILE, tmp_path, REMEDY))
    assert "cannot write 1000.0 KiB: No space left on device; make room and start again" in line
    usage = os.statvfs(tmp_path)
    too_large = usage.f_bavail * usage.f_frsize * 2
    located = locate(FILE, tmp_path, REMEDY, 3)
    huge = dataclasses.replace(located, num_bytes=too_large)
    assert "No space left on device" in one_line(lambda: download(huge, REMEDY))
    (tmp_path / "file").write_bytes(b"")
    assert "cannot write" in one_line(lambda: fetch(FILE, tmp_path / "file", REMEDY))


def test_two_processes_do_not_write_one_file(hub: FakeHub, tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / "org--name" / COMMIT / "folder"
    folder.mkdir(parents=True)
    with (folder / f"data.bin.{SHA256[:16]}.part").open("ab") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        assert "another process is downloading it" in one_line(lambda: fetch(FILE, tmp_path, REMEDY))


def test_what_the_catalog_pins() -> None:
    for name, data_set in DATA_SETS.items():
        assert data_set.name == name
        assert data_set.hub_file() == data_set.hub
        assert re.fullmatch("[0-9a-f]{64}", data_set.hub.sha256 or "")
        assert data_set.file_flag in {flag.name for flag in data_set.flags}
        for other in ({"repo": "a/b"}, {"file": "c"}, {"revision": "d"}):
            assert data_set.hub_file(**other).sha256 is None
    assert DATA_SETS["ruler"].hub_file(repo="a/b").revision == "main"
    for name in ("", "/etc/passwd", "../x", "a//b"):
        with pytest.raises(UserError, match="no file of a hub repository"):
            HubFile("a/b", name)
    assert issubclass(HubError, UserError)
