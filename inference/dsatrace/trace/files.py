"""A run's files: lines that are appended whole, records that are replaced whole.

Standard library only. Knows what a full disk and a killed process leave behind, and no
record. Every `OSError` that leaves here names its file.

    steps = LineFile(folder / "trace_steps.jsonl")
    steps.lock()                          # held until the process ends, in whatever way
    steps.append(b'{"event":"dsa_topk"}\\n')
    write_atomically(folder / "summary.json", b"{}\\n")
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from dsatrace.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems without locks answer; there a killed run goes on saying `running`."""

SYNC_INTERVAL_S = 1.0
"""How much a power cut may take; a kill takes at most the line being written."""


class LineFile:
    """A new file of lines. Unbuffered: what `append` wrote survives the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = 0
        self._synced = time.monotonic()
        with _naming(path):
            try:
                self._file = FileIO(path, "xb")
            except FileExistsError:
                raise UserError(
                    f"{path}: exists already and is never overwritten; name another folder"
                ) from None

    def lock(self) -> None:
        """Marks the file as being written; the kernel takes the mark away when the process ends."""
        with _naming(self._path):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise

    def append(self, data: bytes | memoryview) -> None:
        """All of `data`, or on failure none: the file then ends where it ended before."""
        with _naming(self._path):
            try:
                write_all(self._file, data)
            except OSError:
                # Giving space back works on a full disk; where it does not, the reader skips a torn line.
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                    self._file.seek(self._size)
                raise
            self._size += len(data)
            if time.monotonic() >= self._synced + SYNC_INTERVAL_S:
                self._sync()

    def close(self) -> None:
        if not self._file.closed:
            with _naming(self._path):
                try:
                    self._sync()
                finally:
                    self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the file whole: a reader sees the old contents or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with _naming(path):
        try:
            with FileIO(temporary, "wb") as file:
                write_all(file, data)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to see
                temporary.unlink(missing_ok=True)
            raise


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """One write, unless the system takes only part of it."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """The system names a file only when opening it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
