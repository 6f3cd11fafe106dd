"""The writer thread, which derives captures and feeds them to sinks: a run's lines, and its summary.

The model thread only puts. When the queue is full, policy `block` waits, so that no step is lost,
and policy `drop` loses the step and counts it. Each capture is released once it is written or given
up; its arrays may then be reused. Knows no model; `RecordDeriver` derives, a sink writes.

    sinks = open_sinks(folder, config, Summary(config.compared_block_sizes))
    writer = TraceWriter(deriver, sinks, queue_steps=8)
    writer.put(capture)
    writer.finish_request({"request_id": "r0", ...})
    writer.close()
"""

from __future__ import annotations

import functools
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import orjson

from dsatrace.errors import UserError
from dsatrace.files import HeldFolder, LineFile, digest, write_atomically
from dsatrace.schema import REQUESTS_FILE, STEPS_FILE, SUMMARY_FILE
from dsatrace.text import plain
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.records import RecordDeriver, StepLines, StepRecords
from dsatrace.trace.resume import Resumed
from dsatrace.trace.summary import SectionName, Sections, Summary, TracingCost


class _Section(NamedTuple):
    name: SectionName
    record: Mapping[str, Any]


# A step, a finished request, a section of the summary, or the end of the run.
_Item = StepCapture | Mapping[str, Any] | _Section | None


class TraceWriterError(RuntimeError):
    """The writer failed for a reason that is not the user's; the cause is chained."""


class TraceWriter:
    """Feeds sinks from its own thread, in the order of `put` and `finish_request`.

    When deriving or writing fails, nothing more is written; what was written before stays. With
    `on_error` stop, the next `put` or `close` raises `failure` in the caller's thread; with continue
    it warns once, and every later step is dropped and counted.
    """

    def __init__(
        self,
        deriver: RecordDeriver,
        sinks: Sequence[Sink],
        queue_steps: int,
        cost: TracingCost | None = None,
        policy: Literal["block", "drop"] = "block",
        on_error: Literal["stop", "continue"] = "stop",
        sections: Sections | None = None,
    ) -> None:
        """`cost` and `sections` are the summary's; the writer keeps them up to date."""
        self.cost = cost or TracingCost()
        self.error: BaseException | None = None
        self.files: dict[str, dict[str, Any]] = {}
        """After `stop`, of the files that the sinks have closed: name -> `files.digest`."""
        self._deriver = deriver
        self._sinks = sinks
        self._sections: Sections = {} if sections is None else sections
        self._policy = policy
        self._on_error = on_error
        # Only steps are counted: a request's line is small, and must be neither lost nor waited for.
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._places = threading.Semaphore(queue_steps)
        self._state = "incomplete"
        self._stopped = False
        self._warned = False
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trace-writer", daemon=True)
        self._thread.start()

    @property
    def accepts(self) -> bool:
        """Whether a step put now could be written; raises `failure` where that ends the run."""
        self.check()
        return self.error is None

    def check(self) -> None:
        """Raises `failure` if there is one that ends the run; warns once of any other."""
        if self.error is not None:
            self._report()

    def put(self, capture: StepCapture, handover_us: float = 0.0, sync_us: float = 0.0) -> None:
        """Hands one step over; waits or drops the step while the queue is full."""
        cost, start = self.cost, time.perf_counter()
        if self.error is not None or not self._places.acquire(blocking=self._policy == "block"):
            self.drop()
            capture.release()
            self.check()
            return
        self._queue.put(capture)
        cost.traced_steps += 1
        cost.handover_us += handover_us
        cost.sync_us += sync_us
        cost.blocked_us += (time.perf_counter() - start) * 1e6

    def drop(self) -> None:
        """Counts a step that will not be recorded."""
        self.cost.dropped_steps += 1

    def finish_request(self, record: Mapping[str, Any]) -> None:
        """Hands a record of requests.jsonl over, after every step of that request; never waits."""
        self._queue.put(record)

    def describe(self, name: SectionName, record: Mapping[str, Any]) -> None:
        """Hands a section of the summary over; it replaces one of the same name."""
        self._queue.put(_Section(name, record))

    def close(self, state: str = "complete") -> None:
        """Writes what waits, closes the sinks and reports the writer's error, if there was one."""
        self.stop(state)
        self.check()

    def stop(self, state: str) -> None:
        """`close` without the report: the writer's error stays in `error`."""
        if not self._stopped:
            self._stopped = True
            self._state = state
            self._queue.put(None)
            self._wait()

    @functools.cached_property
    def failure(self) -> Exception:
        """`error`, which must be set, as the caller sees it: a `UserError` for what the system refused
        (a full disk), else a `TraceWriterError`."""
        error = self.error
        assert error is not None
        if isinstance(error, UserError):
            return error
        failure: Exception = TraceWriterError(f"the trace writer failed: {error}")
        if isinstance(error, OSError):
            failure = cannot_write(error)
        failure.__cause__ = error
        return failure

    def _report(self) -> None:
        """Raises `failure`, or warns once that the run goes on without a trace."""
        if self._on_error == "stop":
            raise self.failure
        if not self._warned:
            self._warned = True
            print(f"warning: {plain(self.failure)}; the run goes on untraced", file=sys.stderr)

    def _wait(self) -> None:
        """Waits for the thread; a Ctrl-C only after that, since the thread would die in mid-file."""
        interrupt: KeyboardInterrupt | None = None
        while not self._has_ended.is_set():
            try:
                self._has_ended.wait()
            except KeyboardInterrupt as asked:
                interrupt = asked
        if interrupt is not None:
            raise interrupt

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self._take(item)
            for sink in self._sinks:
                self._guard(self._close, sink)
        finally:
            self._has_ended.set()

    def _take(self, item: StepCapture | Mapping[str, Any] | _Section) -> None:
        if isinstance(item, StepCapture):
            self._places.release()
            self._guard(self._write_step, item)
            item.release()  # after a failure too, or the model thread would wait forever
        elif isinstance(item, _Section):
            if self.error is None:
                self._sections[item.name] = item.record
        elif self.error is None:
            self._guard(self._write_request, item)

    def _write_step(self, capture: StepCapture) -> None:
        start, is_written = time.perf_counter(), False
        try:
            if self.error is None:
                capture.wait()
                step = self._deriver.derive(capture)
                for sink in self._sinks:
                    sink.write_step(step)
                    is_written = True  # the first sink holds the records
        finally:
            self.cost.lost_steps += not is_written
            self.cost.busy_us += (time.perf_counter() - start) * 1e6

    def _write_request(self, record: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        for sink in self._sinks:
            sink.write_request(record)
        self.cost.busy_us += (time.perf_counter() - start) * 1e6

    def _close(self, sink: Sink) -> None:
        self.files |= sink.close("incomplete" if self.error else self._state) or {}

    def _guard(self, work: Callable[[Any], None], argument: object) -> None:
        """Keeps the first exception for the model thread."""
        try:
            work(argument)
        except BaseException as error:  # handed over, see `failure`
            self.error = self.error or error


def cannot_write(error: OSError) -> UserError:
    """The error for a disk that is full or gone."""
    name = f"{error.filename}: " if error.filename else ""
    return UserError(f"cannot write the trace: {name}{error.strerror}; the steps written before are readable")


class Sink(Protocol):
    """Takes a run's steps and finished requests in order, from one thread.

    Each call is whole when it returns: a process that dies afterwards has not lost it, unless the
    sink says how much it may lose. `close` is called once, also after a failure, with the state the
    run ends in, and returns the digest of each file that the sink wrote, by name. Errors propagate
    to the caller.
    """

    def write_step(self, step: StepRecords) -> None: ...

    def write_request(self, record: Mapping[str, Any]) -> None: ...

    def close(self, state: str) -> dict[str, dict[str, Any]] | None: ...


class RecordSink(Sink, Protocol):
    """Writes the records and the requests; after `flush` a process that dies has lost none of them."""

    def flush(self) -> None: ...


class JsonlSink:
    """`trace_steps.jsonl` and `requests.jsonl`: one unbuffered write per step, so a killed run loses
    at most the line it was writing.

    Holds a lock on the steps file while it is open. The kernel drops it when the process ends, in
    whatever way, so a reader can tell a running run from a killed one.
    """

    def __init__(self, steps: LineFile, requests: LineFile) -> None:
        """`steps` is locked already."""
        self._lines = StepLines()
        self._steps, self._requests = steps, requests

    @classmethod
    def new(cls, folder: Path) -> JsonlSink:
        steps = LineFile(folder / STEPS_FILE)
        steps.lock()
        return cls(steps, LineFile(folder / REQUESTS_FILE))

    def write_step(self, step: StepRecords) -> None:
        self._steps.append(self._lines.encode(step))

    def write_request(self, record: Mapping[str, Any]) -> None:
        self._steps.check_place()  # a run without step records writes nothing else
        self._requests.append(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def flush(self) -> None:
        """Each line is written at once."""

    def close(self, state: str) -> dict[str, dict[str, Any]]:
        try:
            self._requests.close()
        finally:
            self._steps.close()
        return {STEPS_FILE: self._steps.digest(), REQUESTS_FILE: self._requests.digest()}


class SummarySink:
    """`summary.json`: there from the start, replaced whole every `interval_s` seconds and at the end.

    The records that it counts are flushed first, but for its first and last time. A folder that has
    taken the place of the run's is not written to.
    """

    def __init__(self, folder: Path, summary: Summary, interval_s: float, records: RecordSink) -> None:
        self._folder = HeldFolder(folder)
        self._summary = summary
        self._records = records
        self._dropped_before = summary.dropped_steps  # by the part of the run that this one resumes
        self._interval_s = interval_s
        self._write("running")
        self._due = time.monotonic() + interval_s

    def write_step(self, step: StepRecords) -> None:
        self._summary.add_step(step)
        self._refresh()

    def write_request(self, record: Mapping[str, Any]) -> None:
        self._summary.finish_request(record)
        self._refresh()

    def close(self, state: str) -> dict[str, dict[str, Any]]:
        try:
            return {SUMMARY_FILE: digest(self._write(state))}
        finally:
            self._folder.close()

    def _refresh(self) -> None:
        if time.monotonic() >= self._due:
            self._records.flush()
            self._write("running")
            # Counted from the end of the write, so that a large summary cannot fill the thread's time.
            self._due = time.monotonic() + self._interval_s

    def _write(self, state: str) -> bytes:
        self._folder.check()
        cost = self._summary.cost
        if cost is not None:
            self._summary.dropped_steps = self._dropped_before + cost.dropped_steps + cost.lost_steps
        record = self._summary.to_json(state)
        data = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        write_atomically(self._folder.path / SUMMARY_FILE, data)
        return data


def open_sinks(
    folder: Path, config: TraceConfig, summary: Summary, resumed: Resumed | None = None
) -> tuple[Sink, ...]:
    """The sinks of a run's folder; a resumed run goes on with its files."""
    records = _records_sink(folder, config, resumed)
    try:
        return (records, SummarySink(folder, summary, config.summary_interval_s, records))
    except OSError:
        records.close("incomplete")
        raise


def _records_sink(folder: Path, config: TraceConfig, resumed: Resumed | None) -> RecordSink:
    if resumed is not None and isinstance(resumed.steps, LineFile):
        return JsonlSink(resumed.steps, resumed.requests)
    if resumed is None and config.format == "jsonl":
        return JsonlSink.new(folder)
    # pyarrow takes long to import, and most runs are written without it.
    from dsatrace.trace.parquet.sink import ParquetSink

    if resumed is None:
        return ParquetSink.new(folder, config.keep_order)
    assert not isinstance(resumed.steps, LineFile)
    return ParquetSink(resumed.steps, resumed.requests)
