"""Writes a run's step records as Parquet while it runs: the other form of `writer.JsonlSink`.

Records wait until they fill a part, and a request's line until its records are in one: what is on the
disk is always a beginning of the run. A thread of its own encodes a part, without the GIL, while the next
one fills. A kill loses what waits: less than `schema.LOST_RECORDS` records and a step's, and none
that summary.json counts, since that is written only of what is in parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
        self._ended: list[bytes] = []
        self._encoder = ThreadPoolExecutor(1, "trace-encoder")
        self._handed_over: tuple[Future[None], list[pa.RecordBatch], list[bytes]] | None = None

    @classmethod
    def new(cls, folder: Path, keep_order: bool) -> ParquetSink:
        requests = LineFile(folder / REQUESTS_FILE)
        requests.lock()
        return cls(StepParts(folder, keep_order), requests)

    def write_step(self, step: StepRecords) -> None:
        self._requests.check_place()
        self._waiting.append(step_batch(step))
        if sum(map(len, self._waiting)) >= PART_RECORDS:
            self._hand_over()

    def write_request(self, record: Mapping[str, Any]) -> None:
        self._ended.append(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
        if not self._waiting and self._handed_over is None:
            self.flush()

    def flush(self) -> None:
        """Writes what waits; what could not be written goes on waiting."""
        self._hand_over()
        self._settle()

    def _hand_over(self) -> None:
        self._settle()
        if self._waiting or self._ended:
            work = self._encoder.submit(self._write, self._waiting, self._ended)
            self._handed_over = work, self._waiting, self._ended
            self._waiting, self._ended = [], []

    def _settle(self) -> None:
        """Waits for what was handed over, and raises its error."""
        if self._handed_over is None:
            return
        work, batches, ended = self._handed_over
        self._handed_over = None
        try:
            work.result()
        except BaseException:
            self._waiting, self._ended = batches + self._waiting, ended + self._ended
            raise

    def _write(self, batches: list[pa.RecordBatch], ended: list[bytes]) -> None:
        if batches:
            self._parts.add(pa.Table.from_batches(batches))
            batches.clear()  # a request's line that is refused does not bring its records back
        if ended:
            self._requests.append(b"".join(ended))

    def close(self, state: str) -> dict[str, dict[str, Any]]:
        try:
            self.flush()
            steps = self._parts.join()
        finally:
            self._encoder.shutdown()
            self._parts.close()
            self._requests.close()
        return {STEPS_PARQUET_FILE: steps, REQUESTS_FILE: self._requests.digest()}
