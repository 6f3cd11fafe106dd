"""Whether a run's files are still those that were written: the manifest's digests.

They find what no derivation can, such as a score changed to another one, and do not say where in the
file. They tell of integrity, not of origin: who rewrites the manifest too is not found. Standard
library only; knows no record.

    digests = Digests(run)           # starts to read: beside the derivations, which name the place
    digests.note                     # of a run without digests
    digests.check()                  # waits; raises Mismatch naming the file that has changed
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from typing import Any

from dsatrace.schema import (
    FILE_FIELDS,
    MANIFEST_FILE,
    REQUESTS_FILE,
    STEPS_FILE,
    STEPS_FOLDER,
    STEPS_PARQUET_FILE,
    SUMMARY_FILE,
    problems,
)
from dsatrace.verify.files import PlainRun
from dsatrace.verify.mismatch import Mismatch, compare, require
from dsatrace.verify.rules import require_schema

_FILES = (STEPS_FILE, STEPS_PARQUET_FILE, REQUESTS_FILE, SUMMARY_FILE)
_UNSEALED = "unsealed: the manifest has no digests; the run has not ended, was killed or failed, or is older"
_PART = re.compile(rf"{STEPS_FOLDER}/\d{{6}}\.parquet")
_SHA256 = re.compile("[0-9a-f]{64}")
_READ_BYTES = 1 << 18  # a thread that waits for the interpreter after each part must have large ones


class Digests(threading.Thread):
    """Hashes a run's files; a manifest that contradicts itself raises `Mismatch` at once."""

    def __init__(self, run: PlainRun) -> None:
        super().__init__(name="digests", daemon=True)  # a daemon, so that Ctrl-C does not wait for it
        self._run = run
        self._known = _said(run.manifest, "files")
        self._error: BaseException | None = None
        sources = _said(run.manifest, "source_files")
        for name in self._known.keys() & sources.keys():  # an export copies it or restores it
            compare(self._known[name], sources[name], f"files.{name}")
        if run.manifest.get("files") is not None:
            steps = STEPS_FILE if run.parquet_steps is None else STEPS_PARQUET_FILE
            for name in (steps, REQUESTS_FILE, SUMMARY_FILE):
                require(name in self._known or not run.size(name), f"files.{name}", None, "missing")
        if self._known:
            self.start()

    @property
    def note(self) -> str | None:
        """What cannot be checked without digests."""
        return None if self._known else _UNSEALED

    def check(self) -> None:
        if self._known:
            self.join()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        try:
            for name, known in self._known.items():
                _check(self._run, name, known)
        except BaseException as error:  # raised where `check` is called
            self._error = error


def _said(manifest: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A block of digests, valid; {} where there is none."""
    said: dict[str, Any] = manifest.get(field) or {}
    for name, known in said.items():
        path = f"{field}.{name}"
        require(name in _FILES or _PART.fullmatch(name) is not None, path, known, "no file of a run")
        require(isinstance(known, dict), path, known, "not object")
        require_schema(problems(known, "full", FILE_FIELDS, f"{path}."))
        require(known["bytes"] >= 0, f"{path}.bytes", known["bytes"], "below 0")
        is_digest = _SHA256.fullmatch(known["sha256"]) is not None
        require(is_digest, f"{path}.sha256", known["sha256"], "not 64 hex digits")
    return said


def _check(run: PlainRun, name: str, known: Mapping[str, Any]) -> None:
    since = f"when the run ended, says {MANIFEST_FILE}; nothing derived from the records tells what changed"
    path = run.folder / name
    if not path.exists():
        raise Mismatch("file", f"missing, {known['bytes']} bytes {since}").at(name)
    size = path.stat().st_size
    if size != known["bytes"]:
        raise Mismatch("bytes", f"{size} now, {known['bytes']} {since}").at(name)
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            sha256.update(data)
    if sha256.hexdigest() != known["sha256"]:
        found, was = sha256.hexdigest()[:16], known["sha256"][:16]
        raise Mismatch("sha256", f"{found}... now, {was}... {since}").at(name)
