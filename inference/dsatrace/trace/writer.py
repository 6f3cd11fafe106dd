"""The writer thread: takes captures from the model thread, derives and writes them.

The model thread only puts; when the queue is full it waits, so no step is lost. Each
capture is released when it has been written, or given up, and its arrays may be reused.
Knows no model and no format: `RecordDeriver` derives, the sinks write.

    with TraceWriter(deriver, sinks, queue_steps=8) as writer:
        writer.put(capture)
        writer.finish_request({"request_id": "r0", ...})
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from dsatrace.errors import UserError
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.records import RecordDeriver
from dsatrace.trace.sinks import Sink
from dsatrace.trace.summary import TracingCost

_Item = StepCapture | Mapping[str, Any] | None  # a step, a finished request, or the end


class TraceWriterError(RuntimeError):
    """The writer failed for a reason that is not the user's; the cause is chained."""


class TraceWriter:
    """Feeds sinks from a thread of its own, in the order of `put` and `finish_request`.

    When deriving or writing fails, the next `put` or `close` raises in the caller's
    thread: a `UserError` for what the system refused (a full disk), else a
    `TraceWriterError`. What was written before stays; tokens are never touched.
    """

    def __init__(
        self, deriver: RecordDeriver, sinks: Sequence[Sink], queue_steps: int, cost: TracingCost | None = None
    ) -> None:
        self.cost = cost or TracingCost()
        self.error: BaseException | None = None
        self._deriver = deriver
        self._sinks = sinks
        self._queue: queue.Queue[_Item] = queue.Queue(maxsize=queue_steps)
        self._state = "incomplete"
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="trace-writer", daemon=True)
        self._thread.start()

    def put(self, capture: StepCapture, handover_us: float = 0.0, sync_us: float = 0.0) -> None:
        """Hands one step over; waits while the queue is full."""
        self._raise_error()
        cost, start = self.cost, time.perf_counter()
        self._queue.put(capture)
        cost.traced_steps += 1
        cost.handover_us += handover_us
        cost.sync_us += sync_us
        cost.blocked_us += (time.perf_counter() - start) * 1e6

    def finish_request(self, record: Mapping[str, Any]) -> None:
        """Hands a requests.jsonl record over, after every step of that request."""
        self._queue.put(record)

    def close(self, state: str = "complete") -> None:
        """Writes out what waits, closes the sinks and raises the writer's error, if it had one."""
        self.stop(state)
        self._raise_error()

    def stop(self, state: str) -> None:
        """`close` that leaves the writer's error in `error`: for when another error is under way."""
        if not self._stopped:
            self._stopped = True
            self._state = state
            self._queue.put(None)
            self._thread.join()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.stop("incomplete")

    def _raise_error(self) -> None:
        error = self.error
        if error is None:
            return
        if isinstance(error, OSError):
            name = f"{error.filename}: " if error.filename else ""
            raise UserError(
                f"cannot write the trace: {name}{error.strerror}; the steps written before are readable"
            ) from error
        if isinstance(error, UserError):
            raise error
        raise TraceWriterError(f"the trace writer failed: {error}") from error

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self.error is None:
                self._guard(self._write, item)
            if isinstance(item, StepCapture):  # after a failure too, so that nobody waits for ever
                item.release()
        for sink in self._sinks:
            self._guard(sink.close, "incomplete" if self.error else self._state)

    def _write(self, item: StepCapture | Mapping[str, Any]) -> None:
        start = time.perf_counter()
        if isinstance(item, StepCapture):
            item.wait()
            step = self._deriver.derive(item)
            for sink in self._sinks:
                sink.write_step(step)
        else:
            for sink in self._sinks:
                sink.write_request(item)
        self.cost.busy_us += (time.perf_counter() - start) * 1e6

    def _guard(self, work: Callable[[Any], None], argument: object) -> None:
        """Keeps the first exception for the model thread."""
        try:
            work(argument)
        except BaseException as error:  # handed over, see _raise_error
            self.error = self.error or error
