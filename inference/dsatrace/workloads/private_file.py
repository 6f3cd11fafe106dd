"""Writes files that hold people's text: readable by their owner only, and replaced whole.

with private_file("trace.jsonl") as file:    # gets its name when the block ends without an error
    file.write(b"...")
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dsatrace.errors import UserError

OWNER_ONLY = 0o600


@contextlib.contextmanager
def private_file(path: str | Path) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends; an error in the block leaves nothing.

    Until then it has a temporary name in the same folder, so a reader sees the old file or the
    new one. Raises a `UserError` if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _cannot_write(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _cannot_write(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path}: cannot write the file: {reason}; name a folder with room that is yours")
