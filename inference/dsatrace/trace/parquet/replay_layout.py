"""`trace_steps/` laid out for replay: whole requests a file, by layer and step within a request.

A row group holds whole layers of one request, or a stretch of one layer, and its statistics name them,
so that a reader finds its part without reading. Files are closed at `FILE_BYTES`: some 64 to 256 MB with
requests of the usual size. The source's records are interleaved step by step; they are sorted in runs of
`RUN_BYTES` on the disk beside the files, so memory holds a few times one run, or the largest request.

    written = write_replay_layout(tables, folder, False)        # any order in, at most RUN_BYTES each
    written["trace_steps/000001.parquet"]                # Counts(records, requests)
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dsatrace.errors import UserError
from dsatrace.files import written_atomically
from dsatrace.schema import STEPS_FOLDER
from dsatrace.trace.parquet.file import open_file, open_writer

FILE_BYTES = 64 << 20
RUN_BYTES = 32 << 20
GROUP_RECORDS = (512, 1 << 12)
"""A row group has fewer only at a request's end, and more never."""

KEYS = ("request_id", "layer_id", "step_idx", "forward_idx")
"""Columns with statistics."""
_ORDER = ("layer_id", "kv_head", "step_idx", "forward_idx")
"""Of a request's records; only layers with several sets have a `kv_head`."""


class Counts(NamedTuple):
    """What a file holds."""

    records: int
    requests: int


def write_replay_layout(tables: Iterable[pa.Table], folder: Path, keep_order: bool) -> dict[str, Counts]:
    """Writes the files below `folder`, and returns what each holds, by its path there.

    Requests stand in the order of their first records. Raises `UserError` for a record without a
    request, layer, step or forward.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        runs = _SortedRuns(Path(scratch))
        for table in tables:
            runs.add(table)
        return write_requests(runs.requests(), folder, keep_order)


def write_requests(
    requests: Iterator[pa.Table],  # each a request's records, by layer and step
    folder: Path,
    keep_order: bool = False,
) -> dict[str, Counts]:
    """The same of requests that are sorted already."""
    written: dict[str, Counts] = {}
    (folder / STEPS_FOLDER).mkdir()
    following = next(requests, None)
    while following is not None:
        name = f"{STEPS_FOLDER}/{len(written) + 1:06}.parquet"
        num_records = num_requests = 0
        with (
            written_atomically(folder / name) as file,
            open_writer(file, following.schema, keep_order, KEYS) as writer,
        ):
            while following is not None and (not num_requests or file.tell() < FILE_BYTES):
                for group in _row_groups(following):
                    writer.write_table(group, row_group_size=len(group))
                num_records += len(following)
                num_requests += 1
                following = next(requests, None)
        written[name] = Counts(num_records, num_requests)
    return written


class _SortedRuns:
    """An external sort by request: files with a row group for each of their requests, and what waits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: defaultdict[str, list[tuple[Path, int]]] = defaultdict(list)  # row groups, in order
        self._waiting: list[pa.Table] = []
        self._num_bytes = self._num_runs = 0

    def add(self, table: pa.Table) -> None:
        for name in KEYS:
            if table[name].null_count:
                raise UserError(f"a record has no {name}: it cannot be laid out; see `dsatrace verify`")
        for name in table["request_id"].unique().to_pylist():
            self._places[name]  # in the order of first records
        self._waiting.append(table)
        self._num_bytes += table.nbytes
        if self._num_bytes >= RUN_BYTES:
            self._spill()

    def requests(self) -> Iterator[pa.Table]:
        """Each request's records, by layer and step."""
        rest = self._sorted_by_request()
        for name, places in self._places.items():
            pieces = [*map(_row_group, places), *([rest.pop(name)] if name in rest else [])]
            table = pa.concat_tables(pieces).combine_chunks()
            keys = [table[name] for name in reversed(_ORDER) if name in table.schema.names]
            order = np.lexsort([pc.fill_null(key, 0).to_numpy() for key in keys])
            del pieces
            table = table.take(pa.array(order))  # the unsorted one is no longer held
            yield table

    def _spill(self) -> None:
        path = self._folder / f"{self._num_runs:06}.parquet"
        self._num_runs += 1
        tables = self._sorted_by_request()
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("wb"))
            schema = next(iter(tables.values())).schema
            writer = stack.enter_context(open_writer(file, schema))
            for index, (name, table) in enumerate(tables.items()):
                writer.write_table(table, row_group_size=len(table))
                self._places[name].append((path, index))

    def _sorted_by_request(self) -> dict[str, pa.Table]:
        """What waits, in the order it came within a request."""
        if not self._waiting:
            return {}
        table = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting, self._num_bytes = [], 0
        names = list(self._places)
        which = pc.index_in(table["request_id"], pa.array(names, pa.string())).to_numpy()
        counts = np.bincount(which, minlength=len(names))
        table = table.take(pa.array(np.argsort(which, kind="stable")))
        ends = np.cumsum(counts)
        return {
            name: table.slice(end - count, count)
            for name, count, end in zip(names, counts.tolist(), ends.tolist(), strict=True)
            if count
        }


def _row_group(place: tuple[Path, int]) -> pa.Table:
    path, index = place
    with open_file(path) as file:
        return file.read_row_group(index)


def _row_groups(request: pa.Table) -> Iterator[pa.Table]:
    """Whole layers together while they are few records, a long layer in pieces."""
    least, most = GROUP_RECORDS
    layers = request["layer_id"].to_numpy()
    ends = [*(np.flatnonzero(np.diff(layers)) + 1).tolist(), len(layers)]
    start = 0
    for end in ends:
        if end - start >= least or end == len(layers):
            for first in range(start, end, most):
                yield request.slice(first, min(most, end - first))
            start = end
