"""When a run did what: its steps and requests in time, and sums of what the records of each step tell.

A step lasts as long as was measured, and lies between the first token and the end of its requests on the
run's clock. Where nothing was timed, a step takes 1 ms. Streams: holds five bytes per forward pass, some
numbers per request, and the sums of at most `MOST_STEPS` stretches of passes. Knows no file to be written.

    timeline = Timeline(Run("outputs/mine"))
    timeline.start, timeline.end           # (F,) us, of each forward pass
    timeline.sums["context"]               # by stretch of `sums.per_stretch` passes
    timeline.spans()                       # each request, from when to when
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dsatrace.errors import UserError
from dsatrace.schema import STEPS_FILE, TIER_NAMES
from dsatrace.trace.kind import SelectionKind
from dsatrace.trace.load import Run

MOST_STEPS = 1 << 13
"""Stretches of passes that sums are kept of."""
MOST_FORWARDS = 1 << 26
MOST_GROUPS = 8
"""Of layers, whose sums are apart."""
MODELLED_US = 1000.0
"""What a step takes where nothing was timed."""

BYTES = {**{tier: f"kv_fetch_{tier}_bytes_read" for tier in TIER_NAMES}, "indexer": "indexer_scan_bytes_read"}
"""Who reads, and the column that says how much."""
_HBM = {"missed": "kv_fetch_hbm_missed_tokens", "resident": "kv_fetch_hbm_hit_tokens"}
_COLUMNS = (
    *("forward_idx", "step_wall_us", "request_id", "step_idx", "layer_id", "kv_head", "seq_len_current"),
    *("num_selected_ids", "unique_token_pos_count", *_HBM.values(), *BYTES.values()),
)


class Buffered(NamedTuple):
    """What a hot buffer missed of one layer's steps of one request, and how many ids it held after each."""

    layer_id: int
    forward_idx: np.ndarray  # (T,) int64
    missed: np.ndarray  # (T,) int64; a step that only warms the buffer up has 0
    resident: np.ndarray  # (T,) int64


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Hot buffers that a run without tiers was replayed through: `each` request's and layer's."""

    name: str
    each: Iterable[Buffered]


class Sums:
    """Sums by forward pass; by stretches of them, each twice as long, whenever there are too many."""

    def __init__(self) -> None:
        self.per_stretch = 1
        self._sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(MOST_STEPS))

    def __getitem__(self, name: str) -> np.ndarray:
        """(MOST_STEPS,); zeros if nothing was added under the name."""
        return self._sums.get(name, np.zeros(MOST_STEPS))

    def add(self, name: str, forward: np.ndarray, values: np.ndarray) -> None:
        """Adds the values (R,) of the passes (R,)."""
        while len(forward) and int(forward.max()) // self.per_stretch >= MOST_STEPS:
            self.per_stretch *= 2
            for sums in self._sums.values():
                half = sums.reshape(-1, 2).sum(axis=1)
                sums[: len(half)], sums[len(half) :] = half, 0
        np.add.at(self._sums[name], forward // self.per_stretch, values)


class Seen(NamedTuple):
    """The records of a request in its prompt, or behind it."""

    first: int  # forward pass
    last: int
    first_step: int  # `step_idx`
    last_step: int


class Request(NamedTuple):
    """A line of requests.jsonl, or what stands for it after a kill; times in us."""

    request_id: str
    arrival: float | None
    admitted: float | None
    first_token: float | None
    finish: float | None
    facts: Mapping[str, Any]


class Span(NamedTuple):
    """A request from when it was taken up to its end, us; `phases` lie within."""

    start: float
    end: float
    request: Request
    phases: list[tuple[str, float, float]]


class Timeline:
    """A run in time. `notes` say what of it is not told as it was recorded."""

    def __init__(
        self,
        run: Run,
        buffers: Buffers | None = None,
        advance: Callable[[int], None] = lambda records: None,
    ) -> None:
        """Reads all records; `advance` is told how many more. Raises `UserError` for what cannot be read."""
        self.run, self.buffers = run, buffers
        kind = run.kind
        self.groups = _groups(kind)
        self.decode = "layerwise" if kind is not None and kind.door == "layerwise" else "decode"
        self.has_tiers = bool(run.manifest.get("tiers"))
        self.sums = Sums()
        self.notes: list[str] = []
        self._wall_us = np.full(1024, np.nan, np.float32)  # by forward pass; NaN: unknown
        self._is_recorded = np.zeros(1024, bool)
        self._seen: dict[str, dict[bool, Seen]] = {}  # by request, and whether the record is of its prompt
        for batch in run.records.batches(_COLUMNS):
            self._add(batch)
            advance(len(batch))
        group_of = {layer: name for name, layers in self.groups.items() for layer in layers}
        for one in buffers.each if buffers else ():
            for name, values in (("missed", one.missed), ("resident", one.resident)):
                self.sums.add(f"{name} {group_of[one.layer_id]}", one.forward_idx, values)
        requests = {line["request_id"]: _request(line) for line in run.reader.requests()}
        for name in self._seen.keys() - requests.keys():
            requests[name] = Request(name, None, None, None, None, {"state": "unfinished"})
        self.requests = list(requests.values())
        self.notes += [f"left out: {name}: {torn}" for name, torn in run.reader.torn_lines.items()]
        self.recorded = np.flatnonzero(self._is_recorded)  # forward passes, ascending
        self.wall_us = self._wall_us[self.recorded]  # NaN: not timed
        self.start, self.end = self._place()

    @property
    def is_timed(self) -> bool:
        if len(self.recorded):
            return not bool(np.isnan(self.wall_us).all())
        return any(request.finish is not None for request in self.requests)

    @property
    def time(self) -> str:
        """What the times are."""
        if not self.is_timed:
            return "modelled time: 1 step = 1 ms"
        serving = self.run.manifest.get("serving")
        return f"the run's clock, {serving['clock']}" if serving else "the run's clock"

    def spans(self) -> list[Span]:
        """Each request that was taken up, in the order of time."""
        spans = []
        for request in self.requests:
            passes = self._seen.get(request.request_id, {})
            times = [self.start[seen.first] for seen in passes.values()]
            times += [self.end[seen.last] for seen in passes.values()]
            if self.is_timed:
                told = request.admitted, request.first_token, request.finish
                times += [time for time in told if time is not None]
            if times:
                spans.append(Span(min(times), max(times), request, self._phases(request, passes)))
        if len(spans) < len(self.requests):
            self.notes.append(
                f"not drawn: {len(self.requests) - len(spans):,} requests that were never taken up"
            )
        return sorted(spans, key=lambda span: (span.start, -span.end, span.request.request_id))

    def _phases(self, request: Request, passes: Mapping[bool, Seen]) -> list[tuple[str, float, float]]:
        if self.is_timed and request.first_token is not None:
            times = request.admitted, request.first_token, request.finish
            told = zip(("prefill", "decode"), times, times[1:], strict=False)
            return [(name, a, b) for name, a, b in told if a is not None and b is not None]
        seen = [
            (name, passes[part]) for name, part in (("prefill", True), (self.decode, False)) if part in passes
        ]
        return [(name, self.start[one.first], self.end[one.last]) for name, one in seen]

    def _add(self, batch: pa.RecordBatch) -> None:
        """Takes some records in."""
        forward, layer = _int64(batch, "forward_idx"), _int64(batch, "layer_id")
        if not len(forward):
            return
        last = int(forward.max())
        if last >= MOST_FORWARDS or int(forward.min()) < 0:
            raise UserError(
                f"{self.run.folder / STEPS_FILE}: forward_idx {last}: no step of a run; see `dsatrace verify`"
            )
        if last >= len(self._wall_us):
            more = 2 * last - len(self._wall_us)
            self._wall_us = np.pad(self._wall_us, (0, more), constant_values=np.nan)
            self._is_recorded = np.pad(self._is_recorded, (0, more))
        self._is_recorded[forward] = True
        self._wall_us[forward] = batch.column("step_wall_us").to_numpy(zero_copy_only=False)
        self._see(batch, forward)
        ids = pc.coalesce(batch.column("num_selected_ids"), batch.column("unique_token_pos_count"))
        values = {"selected": pc.fill_null(ids, 0).to_numpy(zero_copy_only=False)}
        if self.has_tiers:
            values |= {name: _int64(batch, column) for name, column in _HBM.items()}
        for group, layers in self.groups.items():
            of_group = np.isin(layer, layers)
            for name, value in values.items():
                self.sums.add(f"{name} {group}", forward[of_group], value[of_group])
        for name, column in BYTES.items():
            self.sums.add(f"bytes {name}", forward, _int64(batch, column))
        # Once per request: in the first layer that selects, and there in the first of its sets.
        first_layer = next(iter(self.groups.values()), [0])[0]
        is_first = (layer == first_layer) & (_int64(batch, "kv_head") == 0)
        rows = forward[is_first]
        self.sums.add("context", rows, _int64(batch, "seq_len_current")[is_first])
        self.sums.add("rows", rows, np.ones(len(rows)))
        self.sums.add("prompt rows", rows, _int64(batch, "step_idx")[is_first] < 0)

    def _see(self, batch: pa.RecordBatch, forward: np.ndarray) -> None:
        """Notes where each request of the batch begins and ends."""
        names, step = batch.column("request_id").dictionary_encode(), _int64(batch, "step_idx")
        kinds = 2 * names.indices.to_numpy() + (step < 0)
        for kind in np.unique(kinds).tolist():
            rows = np.flatnonzero(kinds == kind)
            first, last = rows[forward[rows].argmin()], rows[forward[rows].argmax()]
            found = Seen(*(int(value) for value in (forward[first], forward[last], step[first], step[last])))
            of_request = self._seen.setdefault(names.dictionary[kind // 2].as_py(), {})
            known = of_request.get(kind % 2 == 1, found)
            begin, end = min(known, found), max(known, found, key=lambda seen: seen.last)
            of_request[kind % 2 == 1] = Seen(begin.first, end.last, begin.first_step, end.last_step)

    def _place(self) -> tuple[np.ndarray, np.ndarray]:
        """Begin and end of each forward pass, (F,) us each."""
        num = int(self.recorded.max(initial=-1)) + 1
        if not self.is_timed or not num:
            begin = np.arange(num) * MODELLED_US
            return begin, begin + MODELLED_US
        wall = self._wall_us[:num].astype(np.float64)
        wall = np.where(np.isnan(wall), np.nanmean(wall), wall)  # an unrecorded step is as long as the others
        busy = np.concatenate(([0.0], np.cumsum(wall)))
        known = dict[float, float]()
        for spent, time in self._known_times(busy):
            known[spent] = max(known.get(spent, 0.0), time)
        at, times = np.array(sorted(known.items()) or [(0.0, 0.0)]).T
        times = np.maximum.accumulate(times)
        at, times = (
            np.concatenate(([0.0], at, [busy[-1]])),
            np.concatenate(([max(0.0, times[0] - at[0])], times, [times[-1] + busy[-1] - at[-1]])),
        )
        placed = np.interp(busy, at, times)
        return np.maximum(placed[1:] - wall, placed[:-1]), placed[1:]

    def _known_times(self, busy: np.ndarray) -> Iterator[tuple[float, float]]:
        """(time spent in forward passes, the run's clock) where requests tell the one of the other, in us."""
        for request in self.requests:
            passes = self._seen.get(request.request_id, {})
            prompt, answer = passes.get(True), passes.get(False)
            if request.first_token is not None:
                if prompt is not None and prompt.last_step == -1:
                    yield float(busy[prompt.last + 1]), request.first_token
                elif answer is not None and answer.first_step == 0:
                    yield float(busy[answer.first]), request.first_token
            is_whole = answer is not None and answer.last_step == request.facts.get("output_tokens", 0) - 2
            if answer is not None and is_whole and request.finish is not None:
                yield float(busy[answer.last + 1]), request.finish


def _groups(kind: SelectionKind | None) -> dict[str, list[int]]:
    """Layers that select, by the name of their group: adjacent ones, at most `MOST_GROUPS`."""
    layers = [i for i, layer in enumerate(kind.layers) if layer.heads] if kind else []
    parts = [part.tolist() for part in np.array_split(layers, min(MOST_GROUPS, len(layers)) or 1)]
    names = [
        f"layer {part[0]}" if len(part) == 1 else f"layers {part[0]}-{part[-1]}" for part in parts if part
    ]
    return dict(zip(names, filter(None, parts), strict=True))


def _request(line: Mapping[str, Any]) -> Request:
    arrival, admitted, first_token, finish = (
        None if line[name] is None else line[name] * 1e6
        for name in ("arrival_s", "admitted_s", "first_token_s", "finish_s")
    )
    facts = {
        "state": line["state"],
        "prompt_tokens": line["num_prompt_tokens"],
        "output_tokens": line["num_output_tokens"],
    }
    return Request(line["request_id"], arrival, admitted, first_token, finish, facts)


def _int64(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """(R,) int64; 0 where it is null."""
    values: np.ndarray = pc.fill_null(batch.column(name), 0).to_numpy(zero_copy_only=False)
    return values
