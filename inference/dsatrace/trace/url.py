"""A run at a URL: as much of `pathlib.Path` as reading it needs, through fsspec.

Credentials come from where fsspec's packages look for them: the environment, their own files. What is
shown of a URL, and of an error, is without secrets.

    folder = run_path("s3://bucket/run")        # run_path("outputs/run") is a Path
    (folder / "manifest.json").read_bytes()
    str(run_path("ftp://me:secret@host/run"))   # ftp://host/run
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fnmatch
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast
from urllib.parse import urlsplit

from dsatrace.errors import UserError

READ_BYTES = 1 << 18
"""Least that is asked for at a time where lines are read; Parquet asks for whole columns."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASS|CREDENTIAL", re.IGNORECASE)


def is_url(text: str | Path) -> bool:
    """Also of a `Path` that was made from one."""
    return _URL.match(str(text)) is not None


def run_path(text: str) -> Path:
    """A path; of a URL a `UrlPath`, which readers of runs take for one."""
    return cast(Path, UrlPath(text.rstrip("/"))) if "://" in text and is_url(text) else Path(text)


@dataclasses.dataclass(frozen=True, order=True, repr=False)
class UrlPath:
    """A file or folder at a URL. Methods are those of `pathlib.Path`, and raise `OSError` like them."""

    url: str

    def __str__(self) -> str:
        return without_secrets(self.url)

    __repr__ = __str__

    def __truediv__(self, name: str) -> UrlPath:
        path, query = self._split()
        return UrlPath(f"{path}/{name}{query}")

    @property
    def name(self) -> str:
        return self._split()[0].rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def absolute(self) -> UrlPath:
        return self

    resolve = absolute

    def exists(self) -> bool:
        with self._naming() as (system, path):
            return bool(system.exists(path))

    def stat(self) -> Any:
        with self._naming() as (system, path):
            return SimpleNamespace(st_size=int(system.info(path)["size"]))

    def glob(self, pattern: str) -> Iterator[UrlPath]:
        """Files of the folder."""
        with self._naming() as (system, path):
            found = system.ls(path, detail=False) if system.exists(path) else []
        names = (one.rstrip("/").rpartition("/")[2] for one in found)
        return (self / name for name in names if fnmatch.fnmatchcase(name, pattern))

    def open(self, mode: str) -> IO[bytes]:
        with self._naming() as (system, path):
            return io.BufferedReader(_Reading(self, system.open(path, mode)), READ_BYTES)

    def read_bytes(self) -> bytes:
        with self.open("rb") as file:
            return file.read()

    def _split(self) -> tuple[str, str]:
        """The URL without its query, and that."""
        if not self.url.startswith("http"):  # a key in a bucket may hold a question mark
            return self.url, ""
        path, mark, query = self.url.partition("?")
        return path, mark + query

    @contextlib.contextmanager
    def _naming(self) -> Iterator[tuple[Any, str]]:
        """The file system and the path there; its errors are named and without secrets."""
        try:
            import fsspec
        except ImportError as error:
            raise UserError(f"{self}: needs the package fsspec; pip install fsspec") from error
        try:
            yield fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise UserError(f"{self}: {without_secrets(str(error))}") from None
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from None
        except UserError:
            raise
        except Exception as error:
            scheme = urlsplit(self.url).scheme
            if isinstance(error, ValueError) and "rotocol" in str(error):
                raise UserError(
                    f"{self}: fsspec knows no {scheme}://; see fsspec.available_protocols()"
                ) from None
            said = without_secrets(" ".join(f"{type(error).__name__} {error}".split()))[:300]
            raise OSError(errno.EIO, said, str(self)) from None


class _Reading(io.RawIOBase):
    """An open file of fsspec's whose errors are told as `UrlPath` tells them."""

    def __init__(self, path: UrlPath, file: Any) -> None:
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._path._naming():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def without_secrets(text: str) -> str:
    """The text without users and passwords, queries, and what the environment holds under a secret's name."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    text = re.sub(r"://[^/\s@]*@", "://", text)
    return re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)
