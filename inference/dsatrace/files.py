"""Files that a full disk or a kill leaves whole: lines that are appended, records that are replaced.

Standard library only. Knows no record. Every `OSError` that leaves here names its file.

    steps = LineFile(folder / "trace_steps.jsonl")            # or, to go on: LineFile.reopen(...)
    steps.lock()                          # held until the process ends, in whatever way
    steps.append(b'{"event":"dsa_topk"}\\n')
    write_json(folder / "manifest.json", {"state": "running"})
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems without locks; there a killed run stays `running`."""

SYNC_INTERVAL_S = 1.0
"""A power cut loses at most this much; a kill loses at most the line being written."""


class LineFile:
    """A new file of lines, unbuffered: what `append` wrote survives the process."""

    def __init__(self, path: Path) -> None:
        with _naming(path):
            try:
                self._take(path, FileIO(path, "xb"))
            except FileExistsError:
                raise UserError(
                    f"{path}: exists already and is never overwritten; name another folder"
                ) from None

    @classmethod
    def reopen(cls, path: Path) -> LineFile:
        """Opens the file to append to it; makes it if there is none."""
        lines = cls.__new__(cls)
        with _naming(path):
            lines._take(path, FileIO(path, "ab"))
        return lines

    def _take(self, path: Path, file: FileIO) -> None:
        self.path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._synced = time.monotonic()
        self._is_locked = False

    def lock(self) -> None:
        """Marks the file as being written until it is closed or the process ends.

        Raises `BlockingIOError` if another process holds the lock, or has replaced the file since it was
        opened here.
        """
        with _naming(self.path):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            if not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        self._is_locked = True

    def append(self, data: bytes | memoryview) -> None:
        """Writes all of `data`; on failure the file ends where it ended before."""
        with _naming(self.path):
            try:
                write_all(self._file, data)
            except OSError:
                # Truncating works on a full disk; if it fails, the reader skips the torn line.
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                    self._file.seek(self._size)
                raise
            self._size += len(data)
            if time.monotonic() >= self._synced + SYNC_INTERVAL_S:
                self._sync()

    def truncate(self, size: int) -> None:
        """Drops what follows the first `size` bytes."""
        with _naming(self.path):
            self._file.truncate(size)
            self._file.seek(size)
            self._size = size
            self._sync()

    def replace(self, chunks: Iterable[bytes]) -> None:
        """Replaces the file with one of these bytes, and goes on with that; a lock is kept.

        After a kill or an error the old contents stand. `chunks` may be read from them.
        """
        temporary = _temporary(self.path)
        with _naming(self.path), _removed_on_failure(temporary), contextlib.ExitStack() as on_failure:
            temporary.unlink(missing_ok=True)  # left by a kill
            new = LineFile(temporary)
            on_failure.callback(new.close)
            if self._is_locked:
                new.lock()  # before it gets the name
            for chunk in chunks:
                new.append(chunk)
            new._sync()
            temporary.replace(self.path)
            sync(self.path.parent)
            on_failure.pop_all()
        self._file.close()
        self._file, self._size, self._is_locked = new._file, new._size, new._is_locked

    def close(self) -> None:
        if not self._file.closed:
            with _naming(self.path):
                try:
                    self._sync()
                finally:
                    self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the file whole: a reader sees the old contents or the new ones, never a part."""
    temporary = _temporary(path)
    with _naming(path), _removed_on_failure(temporary):
        with FileIO(temporary, "wb") as file:
            write_all(file, data)
        temporary.replace(path)


def write_json(path: Path, record: Mapping[str, Any], indent: int = 1) -> None:
    """Replaces the file with the record as JSON for people to read.

    Half of a surrogate pair, as in the path of a file whose name is not UTF-8, becomes a question mark.
    """
    text = json.dumps(record, indent=indent, ensure_ascii=False)
    write_atomically(path, text.encode("utf-8", "replace") + b"\n")


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """One write, unless the system takes only part of it."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to see
            path.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Writes a file, or the names in a folder, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the name in an `OSError`: the system does so only when it opens a file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
