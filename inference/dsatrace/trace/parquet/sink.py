"""Writes a run's step records as Parquet while it runs: the other form of `writer.JsonlSink`.

Records wait until they fill a part, and a request's line until its records are in one: what is on the
disk is always a beginning of the run. A kill loses what waits: at most `schema.PART_RECORDS` records and
a step's, for `summary_interval_s` at most, since a summary is written only of what is in parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from dsatrace.files import LineFile
from dsatrace.schema import PART_RECORDS, REQUESTS_FILE, STEPS_PARQUET_FILE
from dsatrace.trace.parquet.parts import StepParts
from dsatrace.trace.parquet.steps import step_batch
from dsatrace.trace.records import StepRecords


class ParquetSink:
    """The parts, and `requests.jsonl`, which carries the lock that a JSON run's steps carry."""

    def __init__(self, parts: StepParts, requests: LineFile) -> None:
        """`requests` is locked already."""
        self._parts, self._requests = parts, requests
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0
        self._ended: list[bytes] = []

    @classmethod
    def new(cls, folder: Path, keep_order: bool) -> ParquetSink:
        requests = LineFile(folder / REQUESTS_FILE)
        requests.lock()
        return cls(StepParts(folder, keep_order), requests)

    def write_step(self, step: StepRecords) -> None:
        self._requests.check_place()
        batch = step_batch(step)
        self._waiting.append(batch)
        self._num_waiting += len(batch)
        if self._num_waiting >= PART_RECORDS:
            self.flush()

    def write_request(self, record: Mapping[str, Any]) -> None:
        self._ended.append(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
        if not self._waiting:
            self.flush()

    def flush(self) -> None:
        """Writes what waits; what could not be written goes on waiting."""
        if self._waiting:
            self._parts.add(pa.Table.from_batches(self._waiting))
            self._waiting, self._num_waiting = [], 0
        if self._ended:
            self._requests.append(b"".join(self._ended))
            self._ended = []

    def close(self, state: str) -> dict[str, dict[str, Any]]:
        try:
            self.flush()
            steps = self._parts.join()
        finally:
            self._parts.close()
            self._requests.close()
        return {STEPS_PARQUET_FILE: steps, REQUESTS_FILE: self._requests.digest()}
