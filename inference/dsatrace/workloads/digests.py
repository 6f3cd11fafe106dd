"""The sha256 of files and folders, by which a run says what data it read.

folder_sha256(Path("data/ruler"))
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from dsatrace.errors import UserError

# (label, file) -> a progress bar over the file's bytes, such as `commands/progress.bytes_bar`.
Progress = Callable[[str, Path], AbstractContextManager[Callable[[int], None]]]


@contextlib.contextmanager
def no_progress(label: str, path: Path) -> Iterator[Callable[[int], None]]:
    """Shows nothing."""
    yield lambda num_bytes: None


def file_sha256(path: Path, progress: Progress = no_progress) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file, progress(f"sha256 of {path.name}", path) as advance:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                advance(len(chunk))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read the file: {reason}; give a regular, readable file") from error
    return digest.hexdigest()


def folder_sha256(folder: Path, progress: Progress = no_progress) -> str:
    """The sha256 of the lines `name sha256` of all `*.jsonl` below the folder, in the names' order."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jsonl") if path.is_file())
    lines = (f"{name} {file_sha256(folder / name, progress)}\n" for name in names)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
