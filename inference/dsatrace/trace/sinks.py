"""Where derived steps go: the lines of a run's files, and its summary.

A sink is fed by one thread, in order: the live writer's, or an offline replay's own.
Knows no queue and no model; does not derive anything.

    sinks = open_sinks(folder, config, selections="model")
    for sink in sinks: sink.write_step(step)
    for sink in sinks: sink.close("complete")
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson

from dsatrace.schema import REQUESTS_FILE, STEPS_FILE, SUMMARY_FILE
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.files import LineFile, write_atomically
from dsatrace.trace.records import StepLines, StepRecords
from dsatrace.trace.resume import Resumed
from dsatrace.trace.summary import Sections, Summary, TracingCost


class Sink(Protocol):
    """Takes a run's steps and finished requests in order.

    Each call is whole when it returns: a process that dies afterwards has not lost it,
    unless the sink says how much it may lose. `close` is called once, also after a
    failure, with the state the run ends in. Errors propagate to the caller.
    """

    def write_step(self, step: StepRecords) -> None: ...

    def write_request(self, record: Mapping[str, Any]) -> None: ...

    def close(self, state: str) -> None: ...


class JsonlSink:
    """`trace_steps.jsonl` and `requests.jsonl`: one unbuffered write a step, so a killed run
    loses at most the line it was writing.

    Holds a lock on the steps file while it is open; the kernel drops it when the process
    ends in any way, which is how a reader tells a running run from a killed one.
    """

    def __init__(self, folder: Path, resumed: Resumed | None = None) -> None:
        """New files, or those of a resumed run, which are locked already."""
        self._lines = StepLines()
        if resumed is not None:
            self._steps, self._requests = resumed.steps, resumed.requests
            return
        self._steps = LineFile(folder / STEPS_FILE)
        self._steps.lock()
        self._requests = LineFile(folder / REQUESTS_FILE)

    def write_step(self, step: StepRecords) -> None:
        self._steps.append(self._lines.encode(step))

    def write_request(self, record: Mapping[str, Any]) -> None:
        self._requests.append(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def close(self, state: str) -> None:
        try:
            self._requests.close()
        finally:
            self._steps.close()


class SummarySink:
    """`summary.json`: there from the start, replaced whole every few seconds and at the end."""

    def __init__(
        self,
        folder: Path,
        summary: Summary,
        interval_s: float,
        cost: TracingCost | None = None,
        sections: Sections | None = None,
    ) -> None:
        """`cost` and `sections` are others' to fill in, and are read at each write."""
        self._path = folder / SUMMARY_FILE
        self._summary = summary
        self._cost = cost
        self._sections: Sections = {} if sections is None else sections
        self._dropped_before = summary.dropped_steps  # by the part of the run that this one resumes
        self._interval_s = interval_s
        self._write("running")
        self._due = time.monotonic() + interval_s

    def write_step(self, step: StepRecords) -> None:
        self._summary.add_step(step)
        if time.monotonic() >= self._due:
            self._write("running")
            # Counted from the end of the write, so that a large summary cannot fill the thread's time.
            self._due = time.monotonic() + self._interval_s

    def write_request(self, record: Mapping[str, Any]) -> None:
        self._summary.finish_request(record)

    def close(self, state: str) -> None:
        self._write(state)

    def _write(self, state: str) -> None:
        if self._cost is not None:
            dropped_steps = self._cost.dropped_steps + self._cost.lost_steps
            self._summary.dropped_steps = self._dropped_before + dropped_steps
        self._summary.sections |= self._sections
        record = self._summary.to_json(state, self._cost)
        write_atomically(self._path, orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))


def open_sinks(
    folder: Path,
    config: TraceConfig,
    selections: str = "model",
    cost: TracingCost | None = None,
    sections: Sections | None = None,
    serving: Mapping[str, Any] | None = None,
    resumed: Resumed | None = None,
    offloaded: bool = False,
) -> tuple[Sink, ...]:
    """The sinks of a run's folder, for a live run and an offline replay alike.

    A resumed run's go on with its files and its summary. `offloaded`: the manifest has `tiers`.
    """
    summary = (
        resumed.summary
        if resumed
        else Summary(config.compared_block_sizes, selections, serving, offloaded=offloaded)
    )
    lines = JsonlSink(folder, resumed)
    try:
        return (lines, SummarySink(folder, summary, config.summary_interval_s, cost, sections))
    except OSError:
        lines.close("incomplete")
        raise
