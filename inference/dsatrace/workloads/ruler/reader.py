"""RULER rows to examples: files, folders and archives, NVIDIA's own rows and those of allenai's archive.

    <task>/validation_<length>.jsonl      NVIDIA's output (there often without the length)
    data/ruler/<task>/...                 allenai/ruler_data, unpacked or as its .tgz

An archive is read from front to back and never unpacked. A member with `..` or an absolute
path in its name, a link or a device ends the run with one line. Blank lines are no rows; a
line of more than `MAX_LINE_BYTES` is a bad row.

`input` is the prompt wherever it is there: the qa rows have a short `question` beside it,
which alone would ask eight tokens of an empty context. Without it the prompt is made of
`context` and `query` or `question`, in our own words (texts.py). `index` is not unique and
is not used: an example's row is its place in its file.

    bad_rows = BadRows("skip")
    for example in read_examples(Path("data/ruler"), ["vt"], max_length=4096, bad_rows=bad_rows): ...
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tarfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from dsatrace.errors import UserError
from dsatrace.units import size_text
from dsatrace.workloads.rows import (
    BadRow,
    BadRows,
    json_object,
    numbered_lines,
    optional_text,
    read_rows,
    unicode_text,
)
from dsatrace.workloads.ruler import texts
from dsatrace.workloads.ruler.example import TASKS, Example, Task, task_named

MAX_LINE_BYTES = 64 << 20  # a prompt of a million tokens is about 5 MB
_ARCHIVES = (".tgz", ".tar.gz", ".tar")
_LENGTH = re.compile(r"_(\d{1,9})$")


@dataclasses.dataclass(frozen=True)
class RowFile:
    name: str
    task: str
    max_length: int | None  # None: its name gives none


def row_files(
    source: Path, tasks: Collection[str] = (), max_length: int | None = None
) -> Iterator[tuple[RowFile, IO[bytes]]]:
    """Every wanted file with its bytes, which must be read before the next is asked for.

    Without `tasks` all are wanted. A single file whose path names no task needs exactly one.
    Files without a length in their name match every `max_length`.
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
    """Task and length by the path: the task is the file's name or that of the nearest folder."""
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


def lines_of(stream: IO[bytes], source: str) -> Iterator[tuple[str, bytes | None]]:
    """Its numbered lines. Raises `UserError` if `source` breaks off."""
    place = "line 0"
    try:
        for place, line in numbered_lines(stream, MAX_LINE_BYTES):
            yield place, line
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{source}: cannot read on after {place}: {error}; fetch it again") from error


def decode(line: bytes | None) -> dict[str, Any]:
    """The JSON object of one line; raises `BadRow` for anything else."""
    if line is None:
        raise BadRow("too long", f"more than {size_text(MAX_LINE_BYTES)}")
    return json_object(line)


def read_examples(
    source: Path,
    tasks: Collection[str] = (),
    max_length: int | None = None,
    bad_rows: BadRows | None = None,
) -> Iterator[Example]:
    """Examples of a JSONL file, a folder or an archive, line by line.

    Raises `UserError` where nothing fits, for a file without a usable row, and for a bad row
    unless `bad_rows` skips it.
    """
    for file, stream in row_files(source, tasks, max_length):
        parse = functools.partial(_example, file)
        yield from read_rows(file.name, lines_of(stream, file.name), parse, bad_rows or BadRows())


def _example(file: RowFile, row: int, line: bytes | None) -> Example:
    record = decode(line)
    prompt, answer_prefix = _given_prompt(record) or _composed_prompt(record, TASKS[file.task])
    return Example(
        task=file.task,
        row=row,
        prompt=prompt,
        answer_prefix=answer_prefix,
        references=_references(record),
        max_length=file.max_length,
        length=_count(record, "length"),
    )


def _given_prompt(record: dict[str, Any]) -> texts.Parts | None:
    """`input` without the prefix it may end in, and `answer_prefix`."""
    prompt, answer_prefix = optional_text(record, "input"), optional_text(record, "answer_prefix")
    if not prompt.strip():
        return None
    if answer_prefix.strip() and prompt.rstrip().endswith(answer_prefix.strip()):
        end = len(prompt.rstrip()) - len(answer_prefix.strip())
        prompt = prompt[:end].rstrip(" ")
        if not prompt.strip():
            raise BadRow("empty text", "it holds the answer prefix alone", "input")
    return prompt, answer_prefix


def _composed_prompt(record: dict[str, Any], task: Task) -> texts.Parts:
    """The prompt of a row whose context and question stand apart."""
    context, query, question = (optional_text(record, column) for column in ("context", "query", "question"))
    if not context.strip():
        raise BadRow("missing column", "and there is no input either", "context")
    if task.family in ("cwe", "fwe"):
        prompt, answer_prefix = texts.cwe(context) if task.family == "cwe" else texts.fwe(context)
    elif task.family == "qa" and (question or query):
        prompt, answer_prefix = texts.qa(context, question or query)
    elif task.family == "vt" and query:
        prompt, answer_prefix = texts.vt(context, query)
    elif task.family == "niah" and query:
        kind = optional_text(record, "type_needle_v").removesuffix("s") or task.value_kind
        plural = task.num_values * task.num_queries > 1
        prompt, answer_prefix = texts.niah(kind, context, query, plural)
    elif question:
        prompt, answer_prefix = f"{context}\n{question}", ""
    else:
        raise BadRow("missing column", "and there is no question either", "query")
    return optional_text(record, "example") + prompt, optional_text(record, "answer_prefix") or answer_prefix


def _references(record: dict[str, Any]) -> tuple[str, ...]:
    """`outputs`, or `answer`: one text or several, none of them empty, since "" is in every prediction."""
    column = "outputs" if record.get("outputs") is not None else "answer"
    value = record.get(column)
    if value is None:
        raise BadRow("missing column", "and there is no answer either", "outputs")
    items = value if isinstance(value, list) else [value]
    if not items or any(isinstance(item, bool) or not isinstance(item, str | int) for item in items):
        raise BadRow("not a text", "nor a list of at least one", column)
    references = tuple(unicode_text(str(item), column).strip() for item in items)
    if not all(references):
        raise BadRow("empty text", column=column)
    return references


def _count(record: dict[str, Any], column: str) -> int | None:
    value = record.get(column)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise BadRow("not a whole number", "or below 0", column)
    return value
