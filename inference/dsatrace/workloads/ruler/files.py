"""RULER's row files, in one file, in a folder, or in an archive that is never unpacked; and their lines.

    <task>/validation_<length>.jsonl      NVIDIA's output (there often without the length)
    data/ruler/<task>/...                 allenai/ruler_data, unpacked or as its .tgz

An archive is read once, from front to back, and every member is looked at before its
bytes are: a name with `..`, an absolute one, a link or a device ends the run with one
line. One line is in memory; one of more than `MAX_LINE_BYTES` is passed over and reported,
blank lines are no rows. Knows no columns.

    for file, stream in row_files(Path("data_100_samples.tgz"), ["vt"], max_length=4096):
        read_rows(file.name, numbered_lines(stream, file.name), lambda row, line: decode(line), BadRows())
"""

from __future__ import annotations

import dataclasses
import re
import tarfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from dsatrace.errors import UserError
from dsatrace.workloads.rows import UTF8_BOM, BadRow, json_object
from dsatrace.workloads.ruler.example import TASKS, task_named

_ARCHIVES = (".tgz", ".tar.gz", ".tar")
_LENGTH = re.compile(r"_(\d{1,9})$")


@dataclasses.dataclass(frozen=True)
class RowFile:
    """One file of rows; `max_length` is None where its name gives none."""

    name: str
    task: str
    max_length: int | None


def row_files(
    source: Path, tasks: Collection[str] = (), max_length: int | None = None
) -> Iterator[tuple[RowFile, IO[bytes]]]:
    """Every wanted file with its bytes, to be read before the next is asked for.

    No `tasks` means all that are there. A single file whose path names no task needs
    exactly one. Files without a length in their name match every `max_length`.
    """
    for task in tasks:
        task_named(task)
    seen: list[RowFile] = []
    num_wanted = 0
    for file, stream in _all_files(Path(source), tasks):
        seen.append(file)
        if (not tasks or file.task in tasks) and max_length in (None, file.max_length or max_length):
            num_wanted += 1
            yield file, stream
    if not num_wanted:
        there = sorted({f"{file.task} at {file.max_length or 'any length'}" for file in seen})
        wanted = f"{' or '.join(tasks) or 'any task'} at {max_length or 'any length'}"
        has = f"it has {', '.join(there)}" if there else "it has no <task>/validation_<length>.jsonl at all"
        raise UserError(f"{source}: no RULER rows for {wanted}; {has}")


def _all_files(source: Path, tasks: Collection[str]) -> Iterator[tuple[RowFile, IO[bytes]]]:
    """All row files of the source; a folder's in order of task and length, an archive's as they come."""
    if source.name.endswith(_ARCHIVES) and not source.is_dir():
        yield from _members(source)
        return
    try:
        paths = [path for path in source.rglob("*.jsonl") if path.is_file()] if source.is_dir() else [source]
        found = [_described(path.absolute().as_posix(), str(path)) for path in paths]
        if not source.is_dir() and found == [None]:
            if len(tasks) != 1:
                raise UserError(f"{source}: its path names no RULER task; say which one it is")
            found = [RowFile(str(source), next(iter(tasks)), None)]
        for file in sorted(filter(None, found), key=_order):
            with Path(file.name).open("rb") as stream:
                yield file, stream
    except OSError as error:
        raise UserError(f"{error.filename or source}: cannot read: {error.strerror}") from error


def _open(archive: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(archive, "r|*")
    except TypeError as error:  # what tarfile makes of a gzip header that is cut off
        raise EOFError("its gzip header is cut off") from error


def _members(archive: Path) -> Iterator[tuple[RowFile, IO[bytes]]]:
    try:
        with _open(archive) as tar:
            for member in tar:
                _refuse_unsafe(archive, member)
                file = _described(member.name, f"{archive}: {member.name}") if member.isfile() else None
                stream = tar.extractfile(member) if file else None
                if file and stream:
                    yield file, stream
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{archive}: not a whole tar archive: {error}; fetch it again") from error


def _refuse_unsafe(archive: Path, member: tarfile.TarInfo) -> None:
    parts = re.split(r"[/\\]", member.name)
    if member.name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", member.name):
        problem = "has an absolute path"
    elif ".." in parts:
        problem = "leaves its folder"
    elif member.issym() or member.islnk():
        problem = "is a link"
    elif member.issparse() or not (member.isfile() or member.isdir()):
        problem = "is no plain file"
    else:
        return
    raise UserError(f"{archive}: member {member.name!r} {problem}; this is not RULER's archive, get another")


def _described(path: str, name: str) -> RowFile | None:
    """Task and length by the path: the folder nearest to the file that is called like a task, or the file."""
    pure = PurePosixPath(path)
    if pure.suffix != ".jsonl" or pure.name.startswith("."):
        return None
    length = _LENGTH.search(pure.stem)
    stem = pure.stem[: length.start()] if length else pure.stem
    for part in (pure.stem, stem, *reversed(pure.parts[:-1])):
        if part in TASKS:
            in_name = length if part != pure.stem else None  # qa_1.jsonl is a task, not a length of 1
            return RowFile(name, part, int(in_name[1]) if in_name else None)
    return None


def _order(file: RowFile) -> tuple[int, int, str]:
    return list(TASKS).index(file.task), file.max_length or 0, file.name


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
