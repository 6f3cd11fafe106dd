"""A Hugging Face hub on this machine: files, revisions, ranges, and each way it may fail.

with FakeHub({"org/name": {"data.json": b"[]"}}) as hub:
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

SILENT_S = 300.0  # longer than anybody waits
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_URL = re.compile(r"/(?:datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclasses.dataclass
class FakeHub:
    """Serves `repos`, {repository: {file: bytes}}, each at `main` and at `COMMIT`.

    `gated` repositories want a token; `cut_after` breaks each of the next answers off after
    so many bytes; `status` answers everything with an error; `silent` never answers.
    `requests` are the method, path, Range and Authorization of each request.
    """

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = dataclasses.field(default_factory=set)
    cut_after: list[int] = dataclasses.field(default_factory=list)
    status: int | None = None
    silent: bool = False
    large: bool = True  # large files go by their sha256, as on the hub
    requests: list[tuple[str, str, str | None, str | None]] = dataclasses.field(default_factory=list)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *args: Any) -> None:
                """Nothing: tests look at what is printed."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._ended = threading.Event()
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted_range = request.headers.get("Range")
        token = request.headers.get("Authorization")
        self.requests.append((request.command, request.path, wanted_range, token))
        if self.silent:
            self._ended.wait(SILENT_S)
            return
        match = _URL.fullmatch(request.path)
        files = self.repos.get(match["repo"]) if match else None
        if self.status:
            self._refuse(request, self.status)
        elif match is None or files is None:
            self._refuse(request, 404, "RepoNotFound")
        elif match["repo"] in self.gated and token != "Bearer hf_accepted":
            self._refuse(request, 403 if token else 401, "GatedRepo")
        elif match["revision"] not in ("main", COMMIT):
            self._refuse(request, 404, "RevisionNotFound")
        elif match["file"] not in files:
            self._refuse(request, 404, "EntryNotFound")
        else:
            self._send(request, files[match["file"]], wanted_range)

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str | None = None) -> None:
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _send(self, request: BaseHTTPRequestHandler, content: bytes, wanted_range: str | None) -> None:
        begin = int(wanted_range.removeprefix("bytes=").partition("-")[0]) if wanted_range else 0
        sha = hashlib.sha256(content).hexdigest()
        request.send_response(206 if wanted_range else 200)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("ETag", f'"{sha if self.large else sha[:40]}"')
        request.send_header("Accept-Ranges", "bytes")
        if wanted_range:
            request.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - begin))
        request.end_headers()
        if request.command == "GET":
            cut = self.cut_after.pop(0) if self.cut_after else None
            request.wfile.write(content[begin:] if cut is None else content[begin : begin + cut])
            request.wfile.flush()
            if cut is not None:
                self._ended.wait(0.05)  # what was sent arrives before the connection ends
                request.connection.close()


@contextlib.contextmanager
def fake_hub(
    repos: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> Iterator[FakeHub]:
    """Makes it the hub of this process, with a cache and a login of its own below `folder`."""
    with FakeHub(repos) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        # What the library reads from the environment when it is imported.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # what of a break is lost at most
        huggingface_hub.close_session()
        yield hub
