"""Requests that were read and tokenised once, kept for the next study of the same text.

A file is named by what it was made of: the digests of the text, what was asked of it, the tokenizer, and the
code that reads and tokenises. It holds arrays, never a pickle, and their digest; one that does not agree is
made anew. It lies in the user's cache folder, readable by its owner only: token ids are the text. A study
never fails for want of it. Small ones are not kept.

    kept = KeptRequests(open_vocabulary(None).label)
    requests, facts = kept.get({"file": digest}, lambda: (tokenize_rows(rows, vocabulary), {}))
    kept.said                                   # ["read and tokenised by an earlier run, FILE"]
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.jit import private_folder
from dsatrace.study.requests import StudyRequests
from dsatrace.workloads.private_file import private_file
from dsatrace.workloads.trace_rows import TraceRow

FEWEST_IDS = 100_000
"""Of prompts; fewer are read in a moment."""
MOST_BYTES = 32 << 30
"""Of all files; those go first that were not used for longest."""

Made = tuple[StudyRequests, Mapping[str, Any]]
"""Requests, and what their reader counted, as JSON has it."""

_STALE_S = 86_400  # no study writes a file for a day
_PACKAGE = Path(__file__).parents[1]
_NAMES = ("conversation_ids", "workload_names", "mode_names")
_SCALARS = ("tokens_per_id", "times_recorded")
_ARRAYS = tuple(
    field.name for field in dataclasses.fields(StudyRequests) if field.name not in (*_NAMES, *_SCALARS)
)
_ABOUT = "about"


class KeptRequests:
    """`said` tells a person what came of each `get`, a line each; a small or unknown one needs none."""

    def __init__(self, tokenizer: Mapping[str, str]) -> None:
        self.said: list[str] = []
        self._tokenizer = {key: value for key, value in tokenizer.items() if key != "name"}

    def get(
        self,
        made_of: Any,
        make: Callable[[], Made],
        is_current: Callable[[], bool] = lambda: True,
    ) -> Made:
        """What was kept of `made_of`, which is JSON; else what `make` gives, which is then kept.

        Not if afterwards `is_current` says that `made_of` no longer describes it.
        """
        folder = private_folder("requests")
        if folder is None:
            return make()
        text = json.dumps([made_of, self._tokenizer, _code_digest()], sort_keys=True)
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.npz"
        damage = ""
        if path.exists():
            try:
                found = _read(path)
            except Exception:  # whatever a parser makes of a damaged file: it is not needed
                damage = "; what an earlier run kept was damaged"
            else:
                self.said.append(f"read and tokenised by an earlier run, {path}")
                with contextlib.suppress(OSError):
                    path.touch()
                return found
        requests, facts = make()
        if len(requests.prompt_ids) >= FEWEST_IDS and is_current():
            try:
                _write(path, requests, facts)
                self.said.append(f"kept for the next run in {path}{damage}")
                _make_room(path)
            except (OSError, UserError) as error:
                self.said.append(f"not kept for the next run: {error}")
        return requests, facts


def rows_sha256(rows: Iterable[TraceRow]) -> str:
    sha256 = hashlib.sha256()
    for row in rows:
        sha256.update(json.dumps(dataclasses.astuple(row)).encode())
    return sha256.hexdigest()


def _write(path: Path, requests: StudyRequests, facts: Mapping[str, Any]) -> None:
    arrays: dict[str, Any] = {name: np.ascontiguousarray(getattr(requests, name)) for name in _ARRAYS}
    about = {name: getattr(requests, name) for name in (*_NAMES, *_SCALARS)} | {"facts": facts}
    arrays[_ABOUT] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with private_file(path) as file:
        np.savez(file, digest=_digest(arrays), **arrays)


def _read(path: Path) -> Made:
    """Raises anything for a file that is damaged."""
    with np.load(path, allow_pickle=False) as file:
        arrays: dict[str, Any] = {name: file[name] for name in (*_ARRAYS, _ABOUT)}
        if not np.array_equal(file["digest"], _digest(arrays)):
            raise ValueError("its digest is another")
    about = json.loads(arrays.pop(_ABOUT).tobytes())
    arrays |= {name: tuple(about[name]) for name in _NAMES} | {name: about[name] for name in _SCALARS}
    return StudyRequests(**arrays), about["facts"]


def _digest(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The sha256 of names, types, and contents."""
    sha256 = hashlib.sha256()
    for name, values in arrays.items():
        sha256.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        sha256.update(values.data)
    return np.frombuffer(sha256.digest(), np.uint8)


def _make_room(newest: Path) -> None:
    """Deletes what killed studies left, then what was not used for longest, down to `MOST_BYTES`."""
    for left in newest.parent.glob(".*.tmp"):
        if time.time() - left.stat().st_mtime > _STALE_S:
            left.unlink()
    files = sorted(newest.parent.glob("*.npz"), key=lambda file: file.stat().st_mtime, reverse=True)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > MOST_BYTES and file != newest:
            file.unlink()


@functools.cache
def _code_digest() -> str:
    """Of all code that reads or tokenises, so that no version finds what another one made."""
    sha256 = hashlib.sha256()
    for folder in ("study", "workloads"):
        for file in sorted((_PACKAGE / folder).glob("*.py")):
            sha256.update(file.read_bytes())
    return sha256.hexdigest()
