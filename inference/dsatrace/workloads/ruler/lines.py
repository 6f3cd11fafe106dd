"""JSON lines from any stream, an archive's member too: one line in memory, and never a longer one.

A line of more than `MAX_LINE_BYTES` is passed over and reported; blank lines are no rows.
Knows no columns; what becomes of a bad row is decided in `workloads/rows.py`.

    read_rows(name, numbered_lines(stream, name), lambda row, line: decode(line), BadRows())
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from dsatrace.errors import UserError
from dsatrace.workloads.rows import UTF8_BOM, BadRow, json_object

MAX_LINE_BYTES = 64 << 20  # a prompt of a million tokens is about 5 MB


def numbered_lines(stream: IO[bytes], source: str) -> Iterator[tuple[str, bytes]]:
    """("line 3", its bytes) of every line that is not blank; of one too long only the beginning.

    Raises `UserError` where `source` cannot be read on, as when an archive is cut off.
    """
    number = 0
    try:
        line = stream.readline(MAX_LINE_BYTES + 1).removeprefix(UTF8_BOM)
        while line:
            number += 1
            if line.strip():
                yield f"line {number}", line
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE_BYTES + 1)
            line = stream.readline(MAX_LINE_BYTES + 1)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{source}: cannot read on after line {number}: {error}; fetch it again") from error


def decode(line: bytes) -> dict[str, Any]:
    """The JSON object of one line; raises `BadRow` for anything else."""
    if len(line) > MAX_LINE_BYTES:
        raise BadRow("too long", f"more than {MAX_LINE_BYTES >> 20} MiB")
    return json_object(line)
