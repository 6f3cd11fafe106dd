"""`trace_steps/`: Parquet files of whole steps, since one without its footer cannot be read.

Each part gets its name when it is whole and on the disk, so a kill loses what is not in a part yet. At
the run's end the parts become `trace_steps.parquet`; while that stands, parts are leftovers. Knows
records as tables; no step and no manifest.

    parts = StepParts(folder)
    parts.add(table)                     # trace_steps/000001.parquet
    parts.join()                         # -> its digest
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from dsatrace.files import HeldFolder, digest_of, sync, temporary_of, write_atomically, written_atomically
from dsatrace.schema import PART_RECORDS, STEPS_FOLDER, STEPS_PARQUET_FILE
from dsatrace.trace.parquet.columns import OF_TIERS, without_tiers
from dsatrace.trace.parquet.concatenation import Concatenation
from dsatrace.trace.parquet.file import GROUP_BYTES, GROUP_RECORDS, open_file, open_writer
from dsatrace.trace.parquet.steps import SCHEMA
from dsatrace.trace.reader import part_paths

LEAST_RECORDS = PART_RECORDS // 4
"""Of a part that keeps its row groups when the parts are joined."""


class StepParts:
    """A run's step records as they are written. Every `OSError` that leaves here names its file."""

    def __init__(self, folder: Path, keep_order: bool = False) -> None:
        """`keep_order`: ids do not ascend."""
        self._folder = HeldFolder(folder)
        self._whole = folder / STEPS_PARQUET_FILE
        self._keep_order = keep_order

    def add(self, table: pa.Table) -> None:
        """Writes a part; when it returns, a power cut does not lose it either."""
        self._folder.check()
        folder = self._folder.path / STEPS_FOLDER
        if not folder.exists():
            folder.mkdir()
            sync(folder.parent)
        if all(table[name].null_count == len(table) for name in OF_TIERS):
            table = table.select(without_tiers(table.schema).names)
        write_atomically(self._new_path(), self._encoded(table.schema, [table]).getvalue(), durable=True)

    def join(self) -> dict[str, Any]:
        """Makes the whole file of the parts, removes them, and returns its digest.

        Parts of a good size are copied as they are; of small ones, larger row groups are made.
        """
        self._folder.check()
        parts = part_paths(self._folder.path)
        if len(parts) == 1:
            parts[0].replace(self._whole)
            sync(self._folder.path)
        else:
            schema = schema_of(parts)
            with written_atomically(self._whole) as file, Concatenation(file) as whole:
                whole.append(self._encoded(schema, []))  # its footer is the model
                for is_small, paths in itertools.groupby(parts, partial(_is_small, schema)):
                    self._append(whole, schema, paths, is_small)
        self._remove_parts()
        return digest_of(self._whole)

    def cut(self, request_ids: Collection[str]) -> None:
        """Drops the records of all other requests. A file is replaced whole, so a kill leaves records of
        those at most; when it returns, what stays is in parts."""
        kept = pa.array(list(request_ids), pa.string())
        temporary_of(self._whole).unlink(missing_ok=True)
        if self._whole.exists():
            self._remove_parts()
            (self._folder.path / STEPS_FOLDER).mkdir(exist_ok=True)
            self._cut(self._whole, self._new_path(), kept)
            self._whole.unlink(missing_ok=True)
        for path in part_paths(self._folder.path):
            temporary_of(path).unlink(missing_ok=True)
            self._cut(path, path, kept)

    def close(self) -> None:
        self._folder.close()

    def _cut(self, path: Path, target: Path, kept: pa.Array) -> None:
        """Writes what stays of a file to `target`, in its place or not."""
        requests = _requests_of(path)
        if not any(pc.is_in(requests, kept).to_pylist()):
            path.unlink()
        elif all(pc.is_in(requests, kept).to_pylist()):
            path.replace(target)
        else:
            schema = schema_of([path])
            tables = _row_groups([path], schema)
            chosen = (table.filter(pc.is_in(table["request_id"], kept)) for table in tables)
            with written_atomically(target) as file:
                self._write(file, schema, _regrouped(chosen))

    def _append(
        self, whole: Concatenation, schema: pa.Schema, paths: Iterable[Path], are_small: bool
    ) -> None:
        if are_small:
            for table in _regrouped(_row_groups(paths, schema)):
                whole.append(self._encoded(schema, [table]))
            return
        for path in paths:
            with path.open("rb") as file:
                whole.append(file)

    def _encoded(self, schema: pa.Schema, tables: Iterable[pa.Table]) -> io.BytesIO:
        """A Parquet file."""
        data = io.BytesIO()
        self._write(data, schema, tables)
        return data

    def _write(self, file: IO[bytes], schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
        with open_writer(file, schema, self._keep_order) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=len(table))

    def _new_path(self) -> Path:
        last = max((int(path.stem) for path in part_paths(self._folder.path)), default=0)
        return self._folder.path / STEPS_FOLDER / f"{last + 1:06}.parquet"

    def _remove_parts(self) -> None:
        folder = self._folder.path / STEPS_FOLDER
        for path in (*part_paths(self._folder.path), *folder.glob(".*.tmp")):  # half written before a kill
            path.unlink()
        with contextlib.suppress(OSError):  # there is none, or somebody else's file is in it
            folder.rmdir()


def schema_of(paths: Iterable[Path]) -> pa.Schema:
    """The columns of files together: all that there are now, but those of tiers only if a file has them."""
    for path in paths:
        with open_file(path) as file:
            if not OF_TIERS.isdisjoint(file.schema_arrow.names):
                return SCHEMA
    return without_tiers(SCHEMA)


def filled(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """All columns of `schema`; those that the table lacks (it is older, or knows no tiers) are null."""
    for field in schema:
        if field.name not in table.schema.names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names)


def _is_small(schema: pa.Schema, path: Path) -> bool:
    """Whether the part is not worth a row group, or has other columns."""
    with open_file(path) as file:
        return bool(file.metadata.num_rows < LEAST_RECORDS or not file.schema_arrow.equals(schema))


def _requests_of(path: Path) -> pa.Array:
    """The distinct request ids."""
    with open_file(path) as file:
        return file.read(["request_id"])["request_id"].unique()


def _row_groups(paths: Iterable[Path], schema: pa.Schema) -> Iterator[pa.Table]:
    for path in paths:
        with open_file(path) as file:
            for index in range(file.metadata.num_row_groups):
                yield filled(file.read_row_group(index), schema)


def _regrouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in larger tables, where those are small."""
    waiting: list[pa.Table] = []
    for table in tables:
        if waiting and (
            sum(map(len, waiting)) + len(table) > GROUP_RECORDS
            or sum(one.nbytes for one in waiting) + table.nbytes > GROUP_BYTES
        ):
            yield pa.concat_tables(waiting)
            waiting = []
        waiting.append(table)
    if waiting:
        yield pa.concat_tables(waiting)
