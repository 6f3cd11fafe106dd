"""A run as a file that ui.perfetto.dev and chrome://tracing open: `trace.json.gz`.

Google's Trace Event Format, its JSON object form: slices (ph X), counters (C) and names (M), times in us.
Requests lie in lanes, as many as were under way at once; steps lie in one, with counters below. More steps
than `MOST_STEPS` are drawn several to a slice; of more than `MOST_REQUESTS` requests only the counter of
them is drawn. The file and `Written.notes` say so.

    write_perfetto(Timeline(Run("outputs/mine")), Path("outputs/mine_trace.json.gz")).num_events
"""

from __future__ import annotations

import dataclasses
import gzip
import heapq
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from dsatrace.errors import UserError
from dsatrace.files import write_atomically
from dsatrace.text import plain
from dsatrace.trace.timeline import BYTES, Span, Timeline
from dsatrace.version import __version__

MOST_EVENTS = 100_000
"""About what Perfetto's page shows without stutter: `MOST_STEPS` slices with six counters each, and
`MOST_REQUESTS` requests of three slices, each in a lane of its own, stay below."""
MOST_REQUESTS = 5_000
MOST_POINTS = 1 << 10
"""Of the counter of requests."""

REQUESTS, STEPS = 1, 2  # processes of the format: each is a group of tracks

Event = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Written:
    path: Path
    num_events: int
    num_bytes: int
    notes: tuple[str, ...]  # what was pooled, left out or modelled


def write_perfetto(timeline: Timeline, out: Path) -> Written:
    """Raises `UserError` for a file that cannot be written, and for a run without a step or request."""
    notes = list[str]()
    events = [*_request_events(timeline, notes), *_step_events(timeline, notes)]
    if not events:
        folder = timeline.run.folder
        raise UserError(f"{folder}: no step and no request was recorded, so there is nothing to draw")
    assert len(events) <= MOST_EVENTS, f"{len(events)} events"
    if not timeline.is_timed:
        notes.append(f"nothing was timed: {timeline.time}")
    notes = [*timeline.notes, *notes]
    told = {
        "tool": f"dsatrace {__version__}",
        "run": plain(timeline.run.folder.absolute().name),
        "time": timeline.time,
        "notes": [plain(note) for note in notes],
    }
    lines = b",\n".join(map(orjson.dumps, events))
    text = b'{"displayTimeUnit":"ms","otherData":%b,"traceEvents":[\n%b\n]}\n' % (orjson.dumps(told), lines)
    data = gzip.compress(text, mtime=0)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, data)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot write it: {error.strerror}") from error
    return Written(out, len(events), len(data), tuple(notes))


def _request_events(timeline: Timeline, notes: list[str]) -> Iterator[Event]:
    """Names first; then each lane in the order of time."""
    spans = timeline.spans()
    if not spans:
        return
    yield from _named(REQUESTS, "requests" if timeline.is_timed else f"requests; {timeline.time}")
    yield from _counter(REQUESTS, "requests", *_under_way(timeline, spans, notes))
    if len(spans) > MOST_REQUESTS:
        notes.append(f"{len(spans):,} requests, more than {MOST_REQUESTS:,}: only their counter is drawn")
        return
    lanes: list[list[Event]] = []
    free: list[tuple[float, int]] = []  # (from when, lane)
    for span in spans:
        if free and free[0][0] <= span.start:
            lane = heapq.heappop(free)[1]
        else:
            lane = len(lanes) + 1
            lanes.append([])
        heapq.heappush(free, (span.end, lane))
        request = span.request
        lanes[lane - 1].append(
            _slice(REQUESTS, lane, request.request_id, span.start, span.end, request.facts)
        )
        lanes[lane - 1] += [_slice(REQUESTS, lane, name, begin, end) for name, begin, end in span.phases]
    for lane, slices in enumerate(lanes, 1):
        yield from _named(REQUESTS, f"lane {lane}", lane)
        yield from slices


def _under_way(
    timeline: Timeline, spans: Sequence[Span], notes: list[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Times (P,), and how many requests run and wait from each on."""
    start, end = (np.sort([span[at] for span in spans]) for at in (0, 1))
    known = [span.request.arrival if timeline.is_timed else None for span in spans]
    arrival = np.sort(
        [span.start if at is None else min(at, span.start) for at, span in zip(known, spans, strict=True)]
    )
    at = np.unique(np.concatenate([arrival, start, end]))
    if len(at) > MOST_POINTS:
        notes.append(f"requests under way: {len(at):,} changes, shown {MOST_POINTS:,} times, evenly apart")
        at = np.linspace(at[0], at[-1], MOST_POINTS)
    arrived, begun, ended = (np.searchsorted(times, at, side="right") for times in (arrival, start, end))
    return at, {"running": begun - ended, "waiting": arrived - begun}


def _step_events(timeline: Timeline, notes: list[str]) -> Iterator[Event]:
    """A slice per step, or per stretch of them; then counter by counter, each a mean over the stretch."""
    recorded, per_slice = timeline.recorded, timeline.sums.per_stretch
    if not len(recorded):
        return
    name = "steps; counters are per step"
    yield from _named(STEPS, name if timeline.is_timed else f"{name}; {timeline.time}")
    yield from _named(STEPS, "steps", 1)
    if per_slice > 1:
        notes.append(f"{len(recorded):,} steps: drawn {per_slice} to a slice, counters as their means")
    places, at, counts = np.unique(recorded // per_slice, return_index=True, return_counts=True)
    first, last = recorded[at], recorded[at + counts - 1]
    start, end = timeline.start[first], timeline.end[last]
    rows, prompt_rows = timeline.sums["rows"][places], timeline.sums["prompt rows"][places]
    busy_us = np.add.reduceat(np.nan_to_num(timeline.wall_us), at)
    for i in range(len(places)):
        args: dict[str, Any] = {"forward_idx": int(first[i]), "rows": int(rows[i])}
        if per_slice > 1:
            args |= {"last_forward_idx": int(last[i]), "steps": int(counts[i])}
        if timeline.is_timed:
            args["busy_us"] = round(float(busy_us[i]), 1)
        phases = ["prefill"] * bool(prompt_rows[i]) + [timeline.decode] * bool(rows[i] - prompt_rows[i])
        yield _slice(STEPS, 1, " and ".join(phases), start[i], end[i], args)
    for name, lines in _counters(timeline, places).items():
        means = {line: np.append(sums / counts, 0) for line, sums in lines.items()}
        yield from _counter(STEPS, name, np.append(start, end[-1]), means)


def _counters(timeline: Timeline, places: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Sums (P,) of these stretches by counter and line, without lines that are 0 throughout."""
    sums = timeline.sums

    def of_groups(name: str) -> dict[str, np.ndarray]:
        return {group: sums[f"{name} {group}"] for group in timeline.groups}

    found = {
        "selected ids": of_groups("selected"),
        "bytes read": {name: sums[f"bytes {name}"] for name in BYTES},
        "context": {"tokens": sums["context"]},
        "rows": {"rows": sums["rows"]},
    }
    if timeline.has_tiers:
        found["missed in HBM (measured)"] = of_groups("missed")
        found["found in HBM (measured)"] = of_groups("resident")
    elif timeline.buffers is not None:
        found[f"missed ({timeline.buffers.name})"] = of_groups("missed")
        found[f"resident ({timeline.buffers.name})"] = of_groups("resident")
    taken = {name: {line: all_[places] for line, all_ in lines.items()} for name, lines in found.items()}
    shown = {
        name: {line: values for line, values in lines.items() if values.any()}
        for name, lines in taken.items()
    }
    return {name: lines for name, lines in shown.items() if lines}


def _named(process: int, name: str, track: int | None = None) -> Iterator[Event]:
    """Names a process, or a track of it; they are shown in the order of their numbers."""
    of, number = ("process", process) if track is None else ("thread", track)
    for what, args in ((f"{of}_name", {"name": name}), (f"{of}_sort_index", {"sort_index": number})):
        yield {"ph": "M", "name": what, "pid": process, "tid": track or 0, "args": args}


def _slice(
    process: int, track: int, name: str, start: float, end: float, args: Mapping[str, Any] | None = None
) -> Event:
    begin, stop = _us(start), max(_us(start), _us(end))
    event = {"ph": "X", "name": plain(name), "pid": process, "tid": track, "ts": begin}
    return event | {"dur": round(stop - begin, 3)} | ({"args": args} if args else {})


def _counter(process: int, name: str, at: np.ndarray, lines: Mapping[str, np.ndarray]) -> Iterator[Event]:
    for i, time in enumerate(at.tolist()):
        args = {line: round(float(values[i]), 3) for line, values in lines.items()}
        yield {"ph": "C", "name": name, "pid": process, "tid": 0, "ts": _us(time), "args": args}


def _us(time: float) -> float:
    """In whole nanoseconds, so that what begins and ends together does so in the file."""
    return round(float(time), 3)
