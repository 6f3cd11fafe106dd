"""`trace_steps.parquet`: the records of a run as columns, losslessly.

Written in row groups of bounded size, zstd 1, ints delta-encoded. Every line is turned into columns
and back before it is stored; if that does not give its bytes again (an unusual text, a corrupt
field), its text is kept in the column `line`, so nothing is lost and `verify` finds the same. At the
end the whole file is read back. `columns.py` lists the columns. Knows no run and no folder.

    written = write_parquet(path, ((line, orjson.loads(line)) for line in lines))
    for record in read_records(path, fields=("layer_id", "unique_blocks")): ...
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from dsatrace.errors import UserError
from dsatrace.schema import SCHEMA_VERSION, project, value_at
from dsatrace.trace.parquet.columns import (
    EXTRA,
    LEAVES,
    LINE,
    NOT_REPRESENTABLE,
    NULLS,
    POSITIONS,
    arrow_schema,
    columns_for,
    to_batch,
    to_lines,
    to_records,
    without_tiers,
)

GROUP_BYTES = 8 << 20
"""Most text in a row group: about 600 records of 2,048 positions."""
GROUP_RECORDS = 1 << 14
BATCH_RECORDS = 1 << 10  # read at a time
OBJECT_BYTES = 1 << 20
"""Of text or columns that are Python objects at a time, which take about ten times as much."""

Line = tuple[bytes, dict[str, Any]]  # without its newline; the record it holds
Advance = Callable[[int], None]  # bytes of text done since the last call


@dataclasses.dataclass(frozen=True)
class Written:
    """What went into a file."""

    num_records: int
    num_kept_as_text: int  # records whose line cannot be restored from their columns


def write_parquet(
    path: Path,
    lines: Iterable[Line],
    advance: Advance = lambda num_bytes: None,
    keep_order: bool = False,
    has_tiers: bool = True,
) -> Written:
    """Writes the file and reads it back; a difference raises `UserError`.

    `keep_order`: most positions do not ascend. `has_tiers`: the run's manifest has `tiers`.
    """
    digest, num_kept = hashlib.blake2b(), 0

    def batches() -> Iterator[tuple[pa.RecordBatch, int]]:
        nonlocal num_kept
        for group, batch in lossless_batches(lines, has_tiers):
            num_bytes = 0
            for line, _ in group:
                digest.update(line + b"\n")
                num_bytes += len(line) + 1
            num_kept += len(batch) - batch.column(LINE).null_count
            yield batch, num_bytes
            advance(num_bytes)

    tables = _row_groups(batches())
    first = next(tables, arrow_schema(pa.float32()).empty_table())
    num_records = len(first)
    with open_writer(path, first.schema, keep_order) as writer:
        if num_records:
            writer.write_table(first, row_group_size=num_records)
        for table in tables:
            writer.write_table(table, row_group_size=len(table))
            num_records += len(table)
    _check_written(path, digest.digest())
    return Written(num_records, num_kept)


def _row_groups(batches: Iterable[tuple[pa.RecordBatch, int]]) -> Iterator[pa.Table]:
    """Batches, each with the bytes of its text, put together up to a row group's size."""
    waiting: list[pa.RecordBatch] = []
    num_waiting = 0
    for batch, num_bytes in batches:
        waiting.append(batch)
        num_waiting += num_bytes
        if num_waiting >= GROUP_BYTES or sum(map(len, waiting)) >= GROUP_RECORDS:
            yield pa.Table.from_batches(waiting)
            waiting, num_waiting = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting)


def read_records(path: Path, fields: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """The records in the order they were written; with `fields`, only those and their columns are read."""
    for batch in _batches(path, None if fields is None else columns_for(fields)):
        for part in _parts(batch):
            records = to_records(part, fields)
            for row, text in _kept_lines(part):
                record = orjson.loads(text)
                records[row] = record if fields is None else project(record, fields)
            yield from records


def read_numbers(path: Path, fields: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """(R,) arrays of the records' numbers, by dotted path, batch by batch; nan where a record has none.

    Builds no records, except for those kept as text.
    """
    names = {leaf.path: leaf.column for leaf in LEAVES}
    for batch in _batches(path, columns_for(fields)):
        numbers = {field: _numbers(batch, names[field]) for field in fields}
        if kept := [(row, orjson.loads(text)) for row, text in _kept_lines(batch)]:
            for field, column in numbers.items():
                values = column.tolist()
                for row, record in kept:
                    values[row] = value_at(record, field)
                numbers[field] = np.array(values)
        yield numbers


def read_batches(path: Path, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    """These columns as they are stored, as far as the file has them, those of records kept as text too."""
    for batch in _batches(path, sorted({*columns, EXTRA, NULLS, LINE})):
        kept = dict(_kept_lines(batch))
        if not kept:
            yield batch
            continue
        records = to_records(batch)
        for row, text in kept.items():
            records[row] = orjson.loads(text)
        try:
            yield to_batch(records, pa.float32(), columns)
        except NOT_REPRESENTABLE as error:
            raise UserError(f"{path}: a record kept as text fits no column: {error}") from error


def _numbers(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """(R,); nan where the file is older than the field and lacks the column."""
    if column not in batch.schema.names:
        return np.full(len(batch), np.nan)
    return np.asarray(batch.column(column).to_numpy(zero_copy_only=False))


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of trace_steps.jsonl that the file was made from, without newlines."""
    for batch in _batches(path, None):
        for part in _parts(batch):
            lines = to_lines(part)
            for row, text in _kept_lines(part):
                lines[row] = text.encode()
            yield from lines


def count_records(path: Path) -> int:
    """From the file's footer."""
    with open_file(path) as file:
        return int(file.metadata.num_rows)


def lossless_batches(lines: Iterable[Line], has_tiers: bool) -> Iterator[tuple[list[Line], pa.RecordBatch]]:
    """Lines in groups of at most `OBJECT_BYTES` or so, and their columns, which give each line back."""
    schema: pa.Schema | None = None
    for group in _groups(lines):
        batch = _first_batch(group, has_tiers) if schema is None else _lossless_batch(group, schema)
        schema = batch.schema
        yield group, batch


def _groups(lines: Iterable[Line]) -> Iterator[list[Line]]:
    group: list[Line] = []
    num_bytes = 0
    for line in lines:
        group.append(line)
        num_bytes += len(line[0])
        if num_bytes >= min(OBJECT_BYTES, GROUP_BYTES) or len(group) == GROUP_RECORDS:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _first_batch(group: Sequence[Line], has_tiers: bool) -> pa.RecordBatch:
    """Decides how scores are stored: as float32 if that gives their text back, as for the tracer's lines."""
    narrow, wide = arrow_schema(pa.float32()), arrow_schema(pa.float64())
    if not has_tiers:
        narrow, wide = without_tiers(narrow), without_tiers(wide)
    batch = _lossless_batch(group, narrow)
    if batch.column(LINE).null_count == len(batch):
        return batch
    return max(batch, _lossless_batch(group, wide), key=lambda batch: int(batch.column(LINE).null_count))


def _lossless_batch(group: Sequence[Line], schema: pa.Schema) -> pa.RecordBatch:
    """Columns that give every line back; the text is kept beside them where they would not."""
    score_type = schema.field("kth_margin").type
    records = [record for _, record in group]
    try:
        batch = to_batch(records, score_type, schema.names)
    except NOT_REPRESENTABLE:
        batch = to_batch(
            [record if _fits(record, score_type) else {} for record in records], score_type, schema.names
        )
    again = to_lines(batch)
    kept = [None if line == back else line.decode() for (line, _), back in zip(group, again, strict=True)]
    index = batch.schema.get_field_index(LINE)
    return batch.set_column(index, LINE, pa.array(kept, pa.string()))


def _fits(record: dict[str, Any], score_type: pa.DataType) -> bool:
    try:
        to_batch([record], score_type)
    except NOT_REPRESENTABLE:
        return False
    return True


def open_writer(
    where: Path | IO[bytes], schema: pa.Schema, keep_order: bool = False, statistics: Sequence[str] = ()
) -> pq.ParquetWriter:
    """Delta-encoded ints, dictionaries for strings and doubles, byte planes for floats, and for positions
    that do not ascend (`keep_order`). Statistics of all columns, or of those named."""
    dictionary: list[str] = []
    encodings: dict[str, str] = {}
    for field in schema:
        is_list = pa.types.is_list(field.type)
        inner = field.type.value_type if is_list else field.type
        name = f"{field.name}.list.element" if is_list else field.name
        if keep_order and field.name == POSITIONS:
            encodings[name] = "BYTE_STREAM_SPLIT"
        elif pa.types.is_integer(inner):
            encodings[name] = "DELTA_BINARY_PACKED"
        elif pa.types.is_float32(inner) or (is_list and pa.types.is_float64(inner)):
            encodings[name] = "BYTE_STREAM_SPLIT"
        elif not pa.types.is_boolean(inner) and field.name not in (EXTRA, LINE):
            dictionary.append(name)
    return pq.ParquetWriter(
        where,
        schema.with_metadata({"dsatrace.schema_version": str(SCHEMA_VERSION)}),
        compression="zstd",
        compression_level=1,
        use_dictionary=dictionary,
        column_encoding=encodings,
        write_statistics=list(statistics) or True,
    )


def _check_written(path: Path, digest: bytes) -> None:
    back = hashlib.blake2b()
    for line in read_lines(path):
        back.update(line + b"\n")
    if back.digest() != digest:
        raise UserError(f"{path.name}: what was written does not read back the same; check the disk")


def open_file(path: Path) -> pq.ParquetFile:
    """The file; raises `UserError` for one that cannot be read or is not whole."""
    try:
        if isinstance(path, Path):
            return pq.ParquetFile(path, pre_buffer=False)
        return pq.ParquetFile(path.open("rb"), pre_buffer=True)  # at a URL: columns in few requests
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror or error}") from error
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a whole Parquet file: {error}; export the run again") from error


def _batches(path: Path, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """At most `BATCH_RECORDS` records at a time, so that memory stays bounded."""
    with open_file(path) as file:
        present = set(file.schema_arrow.names)
        wanted = None if columns is None else [name for name in columns if name in present]
        try:
            for group in range(file.num_row_groups):  # a pre-buffer keeps all that one iterator has read
                yield from file.iter_batches(BATCH_RECORDS, row_groups=[group], columns=wanted)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot read it: {error}; export the run again") from error


def read_group(file: pq.ParquetFile, path: Path, group: int, fields: Sequence[str]) -> pa.Table:
    """These columns of a row group, each in one piece; records that are kept as text among them."""
    present = set(file.schema_arrow.names)
    wanted = [name for name in (*fields, LINE) if name in present]
    try:
        table = file.read_row_group(group, wanted).combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot read it: {error}; export the run again") from error
    if LINE not in present or table[LINE].null_count == len(table):
        return table
    rows = table.to_pylist()
    for row in rows:
        if (text := row.pop(LINE)) is not None:
            record = orjson.loads(text)
            row.update({name: record.get(name) for name in fields})
    schema = pa.schema([field for field in table.schema if field.name != LINE])
    return pa.Table.from_pylist(rows, schema).combine_chunks()


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Slices that are small as Python objects, too."""
    rows = max(1, len(batch) * OBJECT_BYTES // max(batch.nbytes, 1))
    for start in range(0, len(batch), rows):
        yield batch.slice(start, rows)


def _kept_lines(batch: pa.RecordBatch) -> Iterator[tuple[int, str]]:
    if LINE not in batch.schema.names or batch.column(LINE).null_count == len(batch):
        return
    for row, text in enumerate(batch.column(LINE).to_pylist()):
        if text is not None:
            yield row, text
