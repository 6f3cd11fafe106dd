"""Where a run's selections lie: parts of whole requests, which processes can share.

A part's memory is bounded, and a request larger than the bound is a part of its own. Of JSON lines the
request ids are found, of Parquet the row groups' statistics are read; no selection is.

    parts = selection_parts(RunReader("outputs/mine"))
    read_selections(run, parts[:2])                 # see `selections`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import orjson

from dsatrace.errors import UserError
from dsatrace.trace.parquet.columns import POSITIONS
from dsatrace.trace.parquet.file import open_file, read_group
from dsatrace.trace.reader import REQUEST_ID, RunReader

PART_BYTES = 256 << 20
"""Selections held at a time, unless one request has more: bytes of int32 ids, or of JSON text."""
MIN_PARTS, MIN_PART_BYTES = 32, 4 << 20
"""A run of less than `MIN_PARTS` times `PART_BYTES` is cut finer, for many processes."""
URL_READERS = 16
"""Files at a URL whose footers are read at a time."""


class Span(NamedTuple):
    """A stretch of a file: bytes of lines, or row groups of Parquet."""

    path: Path
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class SelectionPart:
    """Whole requests, and the stretches that hold their records, among records of others."""

    request_ids: tuple[str, ...]
    spans: tuple[Span, ...]
    num_records: int
    num_bytes: int  # of ids, or of JSON text
    id_fields: tuple[str, ...]  # that hold the ids; a record has one of them


def selection_parts(
    run: RunReader,
    part_bytes: int | None = None,
    paths: Sequence[Path] | None = None,
    groups: Mapping[str, str] | None = None,
) -> list[SelectionPart]:
    """The run's requests in the order of their first records, in parts of about `part_bytes`.

    Of some of its step files only, where `paths` names them. Requests of one group, by name, stay in one
    part. Raises `UserError` for a run whose records hold no selections.
    """
    fields = _id_fields(run)
    requests: dict[str, _Extent] = {}
    for path, found in _found_in(run.step_paths if paths is None else paths, fields):
        for request_id, start, stop, num_records, num_bytes in found:
            extent = requests.get(request_id)
            if extent is None:
                extent = requests[request_id] = _Extent()
            extent.add(Span(path, start, stop), num_records, num_bytes)
    if part_bytes is None:
        of_all = sum(extent.num_bytes for extent in requests.values())
        part_bytes = min(PART_BYTES, max(of_all // MIN_PARTS, MIN_PART_BYTES))
    together: dict[str, list[str]] = {}
    for request_id in requests:
        together.setdefault((groups or {}).get(request_id, request_id), []).append(request_id)
    return list(_parts(requests, together.values(), part_bytes, fields))


def is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def _id_fields(run: RunReader) -> tuple[str, ...]:
    """Fields that hold the ids; a record has one of them."""
    level = run.manifest["trace"]["level"]
    if level == "stats":
        raise UserError(
            f"{run.folder}: its records, of level {level}, hold no selections; record with --trace-level full"
        )
    return ("selected_block_ids",) if level == "blocks" else (POSITIONS, "selected_ids")


class _Extent:
    """Where a request's records lie."""

    def __init__(self) -> None:
        self.spans: dict[Path, Span] = {}
        self.num_records = self.num_bytes = 0

    def add(self, span: Span, num_records: int, num_bytes: int) -> None:
        known = self.spans.get(span.path, span)
        self.spans[span.path] = Span(span.path, min(known.start, span.start), max(known.stop, span.stop))
        self.num_records += num_records
        self.num_bytes += num_bytes


def _parts(
    requests: Mapping[str, _Extent],
    groups: Iterable[Sequence[str]],
    part_bytes: int,
    fields: tuple[str, ...],
) -> Iterator[SelectionPart]:
    together, names = _Extent(), list[str]()
    for group in groups:
        num_bytes = sum(requests[request_id].num_bytes for request_id in group)
        if names and together.num_bytes + num_bytes > part_bytes:
            yield _part(names, together, fields)
            together, names = _Extent(), []
        for request_id in group:
            names.append(request_id)
            extent = requests[request_id]
            for span in extent.spans.values():
                together.add(span, 0, 0)
            together.num_records += extent.num_records
            together.num_bytes += extent.num_bytes
    if names:
        yield _part(names, together, fields)


def _part(names: Sequence[str], extent: _Extent, fields: tuple[str, ...]) -> SelectionPart:
    spans = tuple(extent.spans.values())
    return SelectionPart(tuple(names), spans, extent.num_records, extent.num_bytes, fields)


_Found = tuple[str, int, int, int, int]
"""A request id, where a stretch with its records starts and stops, its records there and their bytes."""


def _found_in(paths: Sequence[Path], fields: Sequence[str]) -> Iterator[tuple[Path, Iterable[_Found]]]:
    """Of each file; files at a URL are looked into side by side."""

    def found_in(path: Path) -> Iterator[_Found]:
        return _of_row_groups(path, fields) if is_parquet(path) else _of_lines(path)

    if not paths or isinstance(paths[0], Path) or not is_parquet(paths[0]):
        yield from ((path, found_in(path)) for path in paths)
        return
    with ThreadPoolExecutor(URL_READERS) as pool:
        yield from zip(paths, pool.map(lambda path: list(found_in(path)), paths), strict=True)


def _of_lines(path: Path) -> Iterator[_Found]:
    """One per line; a last line that was cut short is left out."""
    names: dict[bytes, str] = {}
    start = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                found = REQUEST_ID.search(line)
                if found is None:
                    raise UserError(f"{path}: line {number} has no request_id; restore the file")
                name = names.get(found[1])
                if name is None:
                    name = names[found[1]] = orjson.loads(found[1])
                yield name, start, start + len(line), 1, len(line)
                start += len(line)
    except FileNotFoundError:
        return  # killed before the file was made; otherwise `RunReader` has said so
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error


def _of_row_groups(path: Path, fields: Sequence[str]) -> Iterator[_Found]:
    """One per request and row group; reads request ids only where the statistics name more than one."""
    with open_file(path) as file:
        columns = {file.schema.column(i).path: i for i in range(file.metadata.num_columns)}
        ids = [i for name, i in columns.items() if name.partition(".")[0] in fields]
        for index in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            num_bytes = 4 * max((group.column(i).num_values for i in ids), default=0)
            told = group.column(columns["request_id"]).statistics
            if told is not None and told.has_min_max and told.min == told.max and not told.null_count:
                yield told.min, index, index + 1, group.num_rows, num_bytes
                continue
            counted = read_group(file, path, index, ("request_id",))["request_id"].value_counts()
            for name, count in zip(*(counted.field(i).to_pylist() for i in (0, 1)), strict=True):
                yield name, index, index + 1, count, num_bytes * count // group.num_rows
