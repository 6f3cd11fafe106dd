"""A run's files, read with the standard library.

Streams; a last line that was cut short is noted, any other broken line is a `Mismatch`. Derives
nothing.

    run = PlainRun(Path("outputs/mine"))
    for number, record in run.lines("trace_steps.jsonl"): ...
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsatrace.errors import UserError, not_a_run
from dsatrace.schema import (
    LOST_RECORDS,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    STEPS_FILE,
    STEPS_FOLDER,
    STEPS_PARQUET_FILE,
    SUMMARY_FILE,
    decode,
    locked_file,
)
from dsatrace.verify.mismatch import Mismatch

if TYPE_CHECKING:
    from dsatrace.verify.parquet_steps import ParquetSteps

_CHUNK_BYTES = 1 << 20
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class PlainRun:
    """One run's folder; raises `UserError` when it is not one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.torn_lines: dict[str, str] = {}
        path = folder / MANIFEST_FILE
        try:
            manifest = decode(path.read_bytes())
        except OSError as error:
            raise not_a_run(path, error) from error
        except ValueError as error:
            raise UserError(f"{path}: {error}; is this a run's folder?") from error
        version = manifest.get("schema_version")
        if type(version) is not int or version < 1:
            raise UserError(f"{path}: no schema_version, so not a run of dsatrace")
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{folder}: schema {version} is newer than this one, {SCHEMA_VERSION}; update dsatrace"
            )
        self.manifest = manifest

    @property
    def state(self) -> str:
        """The manifest's state, but `incomplete` for a running run that no process writes any more."""
        state: str = self.manifest["state"]
        return "incomplete" if state == "running" and not self._is_live else state

    @property
    def _is_live(self) -> bool:
        return _is_written(self.folder / locked_file(self.manifest))

    def summary(self) -> dict[str, Any] | None:
        """summary.json, or None when there is none."""
        path = self.folder / SUMMARY_FILE
        try:
            return decode(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise Mismatch("JSON", str(error)).at(SUMMARY_FILE) from error

    def size(self, name: str) -> int:
        """Bytes; 0 for a file that is missing."""
        path = self.folder / name
        return path.stat().st_size if path.exists() else 0

    @functools.cached_property
    def parquet_steps(self) -> ParquetSteps | None:
        """The step records, where they are Parquet."""
        whole = self.folder / STEPS_PARQUET_FILE
        parts = [] if whole.exists() else sorted((self.folder / STEPS_FOLDER).glob("[0-9]*.parquet"))
        if self.size(STEPS_FILE) or not (parts or whole.exists()):
            return None
        try:
            from dsatrace.verify.parquet_steps import ParquetSteps
        except ImportError as error:
            raise UserError(
                f"{self.folder}: holds Parquet, which pyarrow and numpy read; install them"
            ) from error
        if parts and self.state == "incomplete":
            self.torn_lines[STEPS_FOLDER] = (
                f"what was not in a part yet is lost: less than {LOST_RECORDS:,} records and a step's"
            )
        return ParquetSteps(parts or [whole])

    def steps(
        self,
        on_bytes: Callable[[int], object] | None = None,
        part: tuple[int, int | None] = (0, None),
        first_line: int = 1,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(1-based number, record) of the step records or a part: bytes of lines, or rows of Parquet."""
        steps = self.parquet_steps
        if steps is None:
            yield from self.lines(STEPS_FILE, on_bytes, part, first_line)
            return
        start, end = part
        chunk = (start, steps.num_records if end is None else end)
        for row, record in steps.records(chunk):
            yield first_line + row - start, record
        if on_bytes:
            on_bytes(steps.bytes_of(chunk))

    def lines(
        self,
        name: str,
        on_bytes: Callable[[int], object] | None = None,
        part: tuple[int, int | None] = (0, None),  # bytes, from and to
        first_line: int = 1,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line number, record) of a file or a part of it; `on_bytes` gets the bytes read, about every MiB.

        A missing file has no lines if the run is incomplete, and is a `Mismatch` otherwise.
        """
        path = self.folder / name
        if not path.exists():
            if self.state == "incomplete":
                return  # killed before the file was made
            raise Mismatch("file", "missing").at(name)
        pending = 0
        start, end = part
        left = math.inf if end is None else end - start
        with path.open("rb") as file:
            file.seek(start)
            for number, line in enumerate(file, first_line):
                left -= len(line)
                if left < 0:
                    break
                pending += len(line)
                if on_bytes and pending >= _CHUNK_BYTES:
                    on_bytes(pending)
                    pending = 0
                try:
                    record = json.loads(line, parse_constant=_refuse)
                    if not isinstance(record, dict):
                        raise ValueError("not a JSON object")
                except (ValueError, RecursionError) as error:
                    if line.endswith(b"\n"):
                        raise Mismatch("JSON", str(error)).at(name, number) from error
                    self.torn_lines[name] = f"line {number}: {len(line)} bytes, cut short"
                    break
                yield number, record
        if on_bytes:
            on_bytes(pending)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _is_written(path: Path) -> bool:
    """Whether a live process holds the writer's lock on the file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        if isinstance(error, BlockingIOError) or error.errno in _NO_LOCKS:
            return True
        raise
    return False
