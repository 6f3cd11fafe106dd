"""Reads a run's folder, whole or torn: the one door for all that read a run, but `verify`.

The manifest, the summary and the requests are held against the schema's tables, and the first field
that is missing or of another type is named. Step records are not, since that would take as long as
parsing them; `commands/damage.py` looks for the bad one once a command has stumbled. Unknown keys pass
through; a last line that a kill cut short is reported, not raised. Derives nothing.

    run = RunReader("outputs/generate_20260101_120000")
    for record in run.steps(): ...
    run.state           # "incomplete" after a kill
    run.torn_lines      # {"trace_steps.jsonl": "line 812: 403 bytes, cut short"}
"""

from __future__ import annotations

import fcntl
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from dsatrace.errors import UserError, not_a_run
from dsatrace.files import NO_LOCKS
from dsatrace.schema import (
    LEVELS,
    LOST_RECORDS,
    MANIFEST_FIELDS,
    MANIFEST_FILE,
    REQUEST_FIELDS,
    REQUESTS_FILE,
    RUN_STATES,
    SCHEMA_VERSION,
    STEPS_FILE,
    STEPS_FOLDER,
    STEPS_PARQUET_FILE,
    SUMMARY_FIELDS,
    SUMMARY_FILE,
    Field,
    locked_file,
    problems,
    project,
)
from dsatrace.trace.url import run_path

REQUEST_ID = re.compile(rb'"request_id":\s*("(?:[^"\\]|\\.)*")')
"""Finds a line's request id, as JSON: parsing the line would take longer than reading it."""


class RunReader:
    """A run's files, in a folder or at a URL; one that is missing or broken raises `UserError` naming it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = run_path(folder) if isinstance(folder, str) else folder
        self.torn_lines: dict[str, str] = {}
        self.manifest = self._manifest()
        if self.is_parquet and self.state == "incomplete" and not (self.folder / STEPS_PARQUET_FILE).exists():
            self.torn_lines[STEPS_FOLDER] = (
                f"what was not in a part yet is lost: less than {LOST_RECORDS:,} records and a step's"
            )

    def _manifest(self) -> dict[str, Any]:
        manifest, path = self._read_json(MANIFEST_FILE), self.folder / MANIFEST_FILE
        version = manifest.get("schema_version")
        if type(version) is not int or version < 1:
            raise UserError(f"{path}: no schema_version, so not a run of dsatrace")
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{self.folder}: schema {version} is newer than this one, {SCHEMA_VERSION}; update dsatrace"
            )
        _require_fields(manifest, MANIFEST_FIELDS, str(path))
        state, level = manifest["state"], manifest["trace"]["level"]
        for name, value, known in (("state", state, RUN_STATES), ("trace.level", level, LEVELS)):
            if value not in known:
                raise UserError(f"{path}: {name}: {value!r} is not one of {', '.join(known)}")
        return manifest

    @property
    def state(self) -> str:
        """`running | complete | incomplete`; a run whose process is gone is incomplete, not running."""
        state: str = self.manifest["state"]
        if state == "running" and not _is_locked(self.folder / locked_file(self.manifest)):
            # It may have ended between the two looks.
            state = self._manifest()["state"]
            return "incomplete" if state == "running" else state
        return state

    @property
    def is_parquet(self) -> bool:
        """Whether the step records are Parquet, as such a run or an export writes them."""
        if (self.folder / STEPS_FILE).exists():
            return False
        if self.is_for_replay:
            return True
        was_recorded_so = self.manifest["trace"].get("format") == "parquet"
        return was_recorded_so or (self.folder / STEPS_PARQUET_FILE).exists()

    @property
    def is_for_replay(self) -> bool:
        """Whether the records stand by request, layer and step, in several files."""
        return bool(self.manifest.get("layout") == "replay")

    def require_order_of_steps(self, verb: str) -> None:
        """Raises `UserError` unless records stand step by step; `verb` is what needs that."""
        if self.is_for_replay:
            raise UserError(f"{self.folder}: is laid out for replay; {verb} the run that it was made from")

    @property
    def step_paths(self) -> list[Path]:
        """The files of the step records, in the order of the records."""
        if not self.is_parquet:
            return [self.folder / STEPS_FILE]
        if self.is_for_replay:
            names = self.manifest.get("files") or {}
            return [self.folder / name for name in names if Path(name).parent == Path(STEPS_FOLDER)]
        whole = self.folder / STEPS_PARQUET_FILE
        if whole.exists() or self.state == "complete":
            return [whole]
        return part_paths(self.folder)

    def steps(self, fields: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """The step records, in the order they were written, or by request where they are laid out for replay.

        With `fields` (dotted paths of `schema.STEP_FIELDS`; a parent's path takes all below it) a record
        holds only those, and of a Parquet run only their columns are read.
        """
        if self.is_parquet:
            # pyarrow takes long to import, and most runs are not read with it.
            from dsatrace.trace.parquet.file import read_records

            return itertools.chain.from_iterable(read_records(path, fields) for path in self.step_paths)
        records = (record for _, record in self.lines(STEPS_FILE))
        return records if fields is None else (project(record, fields) for record in records)

    def numbers(self, fields: Sequence[str]) -> Iterator[Mapping[str, np.ndarray]] | None:
        """(R,) arrays of the records' numbers, batch by batch; None where records must be built for them."""
        if not self.is_parquet:
            return None
        from dsatrace.trace.parquet.file import read_numbers

        return itertools.chain.from_iterable(read_numbers(path, fields) for path in self.step_paths)

    def requests(self) -> Iterator[dict[str, Any]]:
        """The records of requests.jsonl, in the order the requests finished."""
        for number, (_, record) in enumerate(self.lines(REQUESTS_FILE), 1):
            _require_fields(record, REQUEST_FIELDS, f"{self.folder / REQUESTS_FILE}: line {number}")
            yield record

    def summary(self) -> dict[str, Any]:
        """The last summary.json that was written."""
        summary = self._read_json(SUMMARY_FILE)
        _require_fields(summary, SUMMARY_FIELDS, str(self.folder / SUMMARY_FILE))
        return summary

    def lines(self, name: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """The complete lines of a JSONL file, newlines included, each with its record."""
        path = self.folder / name
        self.torn_lines.pop(name, None)
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    try:
                        record = orjson.loads(line)
                    except orjson.JSONDecodeError as error:
                        if line.endswith(b"\n"):
                            raise UserError(f"{path}: line {number} is not JSON: {error}") from error
                        self.torn_lines[name] = f"line {number}: {len(line)} bytes, cut short"
                        return
                    if not isinstance(record, dict):
                        raise UserError(f"{path}: line {number} is not a JSON object")
                    yield line, record
        except FileNotFoundError as error:
            if self.state != "incomplete":  # else killed before the file was made
                raise UserError(f"{path}: cannot read it: {error.strerror}") from error
        except OSError as error:
            raise UserError(f"{path}: cannot read it: {error.strerror}") from error

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            record = orjson.loads(path.read_bytes())
        except OSError as error:
            raise not_a_run(path, error) from error
        except orjson.JSONDecodeError as error:
            raise UserError(f"{path}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}: not a JSON object")
        return record


def _require_fields(record: Mapping[str, Any], fields: tuple[Field, ...], place: str) -> None:
    """Raises `UserError` naming the first field that is missing or of another type, wherever it stands."""
    if found := problems(record, fields=fields, in_order=False):
        raise UserError(f"{place}: {found[0]}; restore the file, or make the run again")


def part_paths(folder: Path) -> list[Path]:
    """The files of `schema.STEPS_FOLDER`, in the order of the records."""
    return sorted((folder / STEPS_FOLDER).glob("[0-9]*.parquet"))


def _is_locked(path: Path) -> bool:
    """Whether a live process writes the file (see `JsonlSink`); nobody can tell of one at a URL."""
    if not isinstance(path, Path):
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:  # killed between the manifest and the first file
        return False
    except OSError as error:
        if isinstance(error, BlockingIOError) or error.errno in NO_LOCKS:
            return True
        raise
    return False
