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
import hashlib
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import IO, Any

from dsatrace.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems without locks; there a killed run stays `running`."""

SYNC_INTERVAL_S = 1.0
"""A power cut loses at most this much; a kill loses at most the line being written."""


_READ_BYTES = 1 << 16


def digest(data: bytes) -> dict[str, Any]:
    """What a manifest says of a file with these bytes: `schema.FILE_FIELDS`."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def digest_of(path: Path) -> dict[str, Any]:
    """The same of a file that is there."""
    return {"bytes": path.stat().st_size, "sha256": _hashed(path).hexdigest()}


def _hashed(path: Path) -> hashlib._Hash:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            sha256.update(data)
    return sha256


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
        # None: what stands there is hashed when the first line follows, or at the end.
        self._sha256 = None if self._size else hashlib.sha256()
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
            if not _is_at(self._file.fileno(), self.path):
                raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        self._is_locked = True

    def append(self, data: bytes | memoryview) -> None:
        """Writes all of `data`; on failure the file ends where it ended before.

        Raises `UserError` when the file no longer has its name: what is written would be lost.
        """
        with _naming(self.path):
            self.check_place()
            sha256 = self._hash()
            try:
                write_all(self._file, data)
            except OSError:
                # Truncating works on a full disk; if it fails, the reader skips the torn line.
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                    self._file.seek(self._size)
                raise
            sha256.update(data)
            self._size += len(data)
            if time.monotonic() >= self._synced + SYNC_INTERVAL_S:
                self._sync()

    def truncate(self, size: int) -> None:
        """Drops what follows the first `size` bytes."""
        with _naming(self.path):
            self._file.truncate(size)
            self._file.seek(size)
            self._size, self._sha256 = size, None
            self._sync()

    def replace(self, chunks: Iterable[bytes]) -> None:
        """Replaces the file with one of these bytes, and goes on with that; a lock is kept.

        After a kill or an error the old contents stand. `chunks` may be read from them.
        """
        temporary = temporary_of(self.path)
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
        self._file, self._size, self._sha256 = new._file, new._size, new._sha256
        self._is_locked = new._is_locked

    def digest(self) -> dict[str, Any]:
        """`digest` of all that the file holds, hashed as it was written; may be asked after `close`."""
        with _naming(self.path):
            return {"bytes": self._size, "sha256": self._hash().hexdigest()}

    def _hash(self) -> hashlib._Hash:
        if self._sha256 is None:
            self._sha256 = _hashed(self.path)
        return self._sha256

    def close(self) -> None:
        """Writes through to the disk and closes; raises as `append` does."""
        if not self._file.closed:
            with _naming(self.path):
                try:
                    self._sync()
                    self.check_place()
                finally:
                    self._file.close()

    def check_place(self) -> None:
        """Raises `UserError` when the file no longer has its name."""
        _check_place(self._file.fileno(), self.path)

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


class HeldFolder:
    """A folder that files are replaced in: `check` raises `UserError` once its path leads elsewhere.

    Kept open, so that no new folder can be taken for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def check(self) -> None:
        _check_place(self._descriptor, self.path)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _check_place(descriptor: int, path: Path) -> None:
    if not _is_at(descriptor, path):
        raise UserError(
            f"{path}: was deleted, moved or replaced while the run wrote it; start the run again, and leave "
            "its folder alone until it ends"
        )


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path leads to the open file or folder: the same device and inode."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_atomically(path: Path, data: bytes, durable: bool = False) -> None:
    """Replaces the file whole: a reader sees the old contents or the new ones, never a part.

    With `durable` the new ones survive a power cut once this returns.
    """
    with _replacing(path, durable) as file:
        write_all(file, data)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which becomes `path`, durably, when the block ends without an error."""
    with _replacing(path, durable=True) as file:
        buffered = io.BufferedWriter(file)  # writes all that it is given, or raises
        yield buffered
        buffered.flush()
        buffered.detach()


@contextlib.contextmanager
def _replacing(path: Path, durable: bool) -> Iterator[FileIO]:
    temporary = temporary_of(path)
    with _naming(path), _removed_on_failure(temporary):
        with FileIO(temporary, "wb") as file:
            yield file
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync(path.parent)


def read_json(path: Path, name: str = "", *, unreadable: str = "", broken: str = "") -> Any:
    """The JSON of a file. Raises `UserError`, which begins with `name`, or the path.

    It ends with `unreadable` where the system refuses the file, with `broken` where the text is no JSON.
    """
    name = name or f"{path}"
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{name}: cannot read it: {error.strerror}{unreadable}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON: {error}{broken}") from error


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


def temporary_of(path: Path) -> Path:
    """Where the new contents of a file stand until they replace it; a kill may leave them there."""
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
