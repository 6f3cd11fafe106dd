"""Logs of a service, as requests: any layout of `log_layouts`, from files, folders or standard input.

The layout is recognised from the first rows of the first file, or given. Rows are put in the order of
their times within `SORT_WINDOW` rows, and requests without a conversation's id are joined by common
prefix. Whatever is assumed, left out or moved is counted, and no prompt's text leaves this module.

    log = Log(("requests.jsonl.gz",))
    log.layout                                     # "messages"
    requests, holds_text = read_log(log, open_vocabulary(None), BadRows("skip"), counts)
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import heapq
import itertools
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dsatrace.errors import UserError
from dsatrace.study.accesses import ACCESSES_FILE
from dsatrace.study.log_conversations import continued, joined
from dsatrace.study.log_layouts import (
    LAYOUTS,
    VLLM,
    VLLM_LINE,
    Layout,
    LoggedRequest,
    layout_of,
    read_row,
    vllm_row,
)
from dsatrace.study.log_messages import answer_of
from dsatrace.study.log_times import UNITS_S, Times
from dsatrace.study.request_files import requests_from_hash_ids
from dsatrace.study.requests import UNKNOWN, Progress, RequestsBuilder, StudyRequests
from dsatrace.study.tokenization import NamedVocabulary, PieceEncoder
from dsatrace.workloads.id_logs import FORMATS, HashIdReader, HashIdRow, hash_id_format_in
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.rows import (
    SORT_WINDOW,
    BadRow,
    BadRows,
    in_order,
    numbered_lines,
    open_source,
    optional_text,
    read_rows,
)
from dsatrace.workloads.trace_rows import recorded_column

STANDARD_INPUT = "-"
MAX_LINE_BYTES = 256 << 20
_FIRST_BYTES = 1 << 16
_MOST_ROWS = 1 << 40
_PICKLE = b"\x80"
_NUM_FIRST_ROWS = 10
_NUM_FIRST_LINES = 1000

MOVED = f"rows moved to their place in time (at most {SORT_WINDOW:,} rows)"
NO_TIMES = "requests without a recorded time: one a second in the order of the file"
NO_ANSWERS = "requests without a recorded answer: taken for one of no tokens"
OTHER_MODELS = "rows of another model than the first: here they share its cache"
NO_PROMPTS = "lines without a prompt"

_LENGTH_ONLY = {"ContextTokens": "an Azure", "Request tokens": "a BurstGPT"}
"""A column of a CSV file that knows lengths only, and whose file it is."""

Timed = TypeVar("Timed")


@dataclasses.dataclass(frozen=True)
class Log:
    """Files, folders or `-`, with what is known of them. `time_unit` is one of `UNITS_S`.

    `NAME=FILE` says that the requests of a file, or of a folder's files, are the workload NAME.
    """

    given: tuple[str, ...]
    forced: str | None = None
    time_unit: str | None = None
    block_size: int | None = None  # tokens per block id

    def __post_init__(self) -> None:
        if self.forced is not None and self.forced not in LAYOUTS:
            raise UserError(f"--layout {self.forced!r} is unknown; use one of {', '.join(LAYOUTS)}")
        if self.time_unit is not None and self.time_unit not in UNITS_S:
            raise UserError(f"--time-unit {self.time_unit!r} is unknown; use one of {', '.join(UNITS_S)}")

    @functools.cached_property
    def workloads(self) -> dict[Path, str]:
        """The files, those of a folder by name, each with its workload, "" without one.

        Standard input becomes a file that only its owner reads.
        """
        found = [(path, name) for name, given in map(_named, self.given) for path in _files(given)]
        workloads = dict(found)
        if len(workloads) < len(found):
            raise UserError(f"--log {' '.join(self.given)}: names a file twice")
        return workloads

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.workloads)

    @property
    def is_named(self) -> bool:
        """Whether a file's workload is given."""
        return any(self.workloads.values())

    @functools.cached_property
    def layout(self) -> str:
        """Raises a `UserError` for a file that no layout fits, or that holds lengths only."""
        first = _first_line(self.paths[0])
        for column, whose in _LENGTH_ONLY.items():
            if column in first.split(","):
                raise UserError(
                    f"{self.paths[0]}: is {whose} log, which holds lengths, no prompts and so no prefixes; "
                    f"replay it with inference/run_burstgpt.py --burstgpt-csv {self.paths[0]}"
                )
        return self.forced or _recognised(self.paths[0], first)

    def text(self) -> str:
        """The files and their layout, in a line."""
        more = f" and {len(self.given) - 3} more" if len(self.given) > 3 else ""
        named = ", ".join(self.given[:3]) + more
        return f"{named} as layout {self.layout} ({'given' if self.forced else 'recognised'})"


class ReadLog(NamedTuple):
    requests: StudyRequests
    holds_text: bool  # so a tokenizer made its tokens


def read_log(
    log: Log,
    vocabulary: NamedVocabulary,
    bad_rows: BadRows,
    counts: Counter[str],
    progress: Progress | None = None,
) -> ReadLog:
    """The requests by time, from the first one on. A ShareGPT log has a reader of its own."""
    layout = LAYOUTS[log.layout]
    if log.layout in FORMATS:
        if log.is_named:
            raise UserError(
                f"{log.text()}: block ids of one file mean nothing in another; leave out the workloads' names"
            )
        return ReadLog(_by_blocks(log, bad_rows, counts), False)
    if log.block_size is not None:
        raise UserError(f"--log-block-size is for block ids; {log.text()} holds none")
    times = Times(log.time_unit, layout.time_unit, str(log.paths[0]))
    reader = _Reader(layout, times, log.workloads, bad_rows, counts)
    builder, turns = RequestsBuilder(progress=progress), Counter[tuple[str, str]]()
    start_s, parents = None, dict[int, int]()
    rows = continued(_merged(log.paths, reader.rows, counts), parents, counts)
    for (time_s, request), prompt, answer in _encoded(rows, vocabulary):
        start_s = time_s if start_s is None else start_s
        name = request.conversation_id
        key = (request.workload, name)
        turn = request.turn if request.turn != UNKNOWN else turns[key] if name else UNKNOWN
        turns[key] += 1
        counts[NO_ANSWERS] += not answer
        arrival_s = len(builder) if reader.column is None else time_s - start_s
        builder.add(
            arrival_s, prompt, answer,
            conversation=key if name else (),
            turn=turn,
            workload=request.workload,
            recorded=reader.recorded,
        )  # fmt: skip
    if not len(builder):
        raise UserError(f"{log.text()}: holds no request")
    requests = builder.build()
    if reader.column is None:
        if log.time_unit is not None:
            raise UserError(f"{log.text()}: its rows have no times; leave out --time-unit")
        counts[NO_TIMES] = len(requests)
    if not requests.conversation_ids:
        requests = joined(requests, parents, counts)
    return ReadLog(requests, not reader.has_ids)


def _encoded(
    rows: Iterator[tuple[float, LoggedRequest]], vocabulary: NamedVocabulary
) -> Iterator[tuple[tuple[float, LoggedRequest], array[int], array[int]]]:
    """Each row with the ids of prompt and answer. A log holds text or ids, never both."""
    for row in itertools.islice(rows, 1):
        rows = itertools.chain((row,), rows)
        if isinstance(row[1].prompt, array):
            yield from ((row, _ids(row[1].prompt), _ids(row[1].answer)) for row in rows)
    texts = ((row, _text(row[1], vocabulary), str(row[1].answer)) for row in rows)
    yield from PieceEncoder(vocabulary.vocabulary).encoded(texts)


def _text(request: LoggedRequest, vocabulary: NamedVocabulary) -> str:
    prompt = request.prompt
    assert not isinstance(prompt, array)
    return prompt if isinstance(prompt, str) else vocabulary.formatter.format_conversation(prompt)


def _ids(value: object) -> array[int]:
    """Of a log of ids; one without an answer has an empty text in its place."""
    return value if isinstance(value, array) else array("i")


class _Reader:
    """Rows of one layout. The first usable one says whether rows have times, and text or ids."""

    def __init__(
        self,
        layout: Layout,
        times: Times,
        workloads: Mapping[Path, str],
        bad_rows: BadRows,
        counts: Counter[str],
    ) -> None:
        self.layout, self.has_ids = layout, False
        self._workloads = workloads
        self.column: str | None = None  # of the times
        self._is_answers = False  # whether that column is the response object's
        self.recorded = True  # what every row so far says of its time, or its layout
        self._times, self._bad_rows, self._counts = times, bad_rows, counts
        self._model: object = None
        self._begun, self._num_files = False, 0

    def rows(self, path: Path) -> Iterator[tuple[float, LoggedRequest]]:
        """Seconds and request; without times, the place in this file and those before it."""
        for time_s, request in self._read(path):
            yield time_s, dataclasses.replace(request, workload=self._workloads[path] or request.workload)

    def _read(self, path: Path) -> Iterator[tuple[float, LoggedRequest]]:
        begin = self._num_files * _MOST_ROWS
        self._num_files += 1
        if self.layout.name != VLLM:
            found = read_json_rows(path, lambda i, row: self._parse(begin + i, row), self._bad_rows)
            yield from filter(None, found)
            return
        has_prompt = False
        with open_source(path) as file:
            lines = numbered_lines(file, MAX_LINE_BYTES)
            read = read_rows(
                str(path), lines, lambda i, line: self._parse_line(begin + i, line), self._bad_rows
            )
            for pair in filter(None, read):
                has_prompt = True
                yield pair
        if not has_prompt:
            raise UserError(
                f"{path}: no line of this {VLLM} log holds a prompt; serve with --enable-log-requests and "
                "VLLM_LOGGING_LEVEL=DEBUG"
            )

    def _parse_line(self, place: int, line: bytes | None) -> tuple[float, LoggedRequest] | None:
        if line is None:
            raise BadRow("line too long", f"over {MAX_LINE_BYTES} bytes")
        row = vllm_row(line.decode("utf-8", "replace"))
        if row is None:
            self._counts[NO_PROMPTS] += 1
            return None
        return self._parse(place, row)

    def _parse(self, place: int, row: Mapping[str, Any]) -> tuple[float, LoggedRequest] | None:
        try:
            request = read_row(self.layout, row, self._counts)
            if request is None:
                return None
            request = dataclasses.replace(request, workload=optional_text(row, "workload"))
            has_ids = isinstance(request.prompt, array)
            if not self._begun:
                self.has_ids = has_ids
                self.column, self._is_answers = next(
                    (
                        (name, source is not row)
                        for source in (row, answer_of(row))
                        for name in self.layout.times
                        if source.get(name) not in (None, "")
                    ),
                    (None, False),
                )
            elif has_ids != self.has_ids:
                kinds = ("text", "token ids")
                raise BadRow(
                    "another kind of prompt", f"{kinds[has_ids]}; the first row has {kinds[not has_ids]}"
                )
            time_s: float = place
            if self.column is not None:
                time_s = self._times.seconds(answer_of(row) if self._is_answers else row, self.column)
            self.recorded &= self.column is not None and recorded_column(row, self.layout.recorded)
        except BadRow as fault:
            assumed = f"read as layout {self.layout.name}, see --layout"
            detail = str(fault).removeprefix(fault.reason).removeprefix(": ")
            raise BadRow(fault.reason, f"{detail}; {assumed}" if detail else assumed, fault.column) from fault
        self._begun = True
        model = row.get("model") or (
            row["request"].get("model") if isinstance(row.get("request"), dict) else None
        )
        self._model = self._model or model
        self._counts[OTHER_MODELS] += model is not None and model != self._model
        return time_s, request


def _by_blocks(log: Log, bad_rows: BadRows, counts: Counter[str]) -> StudyRequests:
    """Of a log of block ids."""
    layout = hash_id_format_in(log.paths[0])
    layout = dataclasses.replace(
        layout,
        tokens_per_block=log.block_size or layout.tokens_per_block,
        timestamp_unit_s=UNITS_S[log.time_unit] if log.time_unit else layout.timestamp_unit_s,
    )
    reader = HashIdReader(layout, bad_rows, counts)

    def rows(path: Path) -> Iterator[tuple[float, HashIdRow]]:
        return ((row.arrival_s, row) for row in reader.rows(path))

    return requests_from_hash_ids((row for _, row in _merged(log.paths, rows, counts)), layout, counts)


def _merged(
    paths: Sequence[Path], rows: Callable[[Path], Iterator[tuple[float, Timed]]], counts: Counter[str]
) -> Iterator[tuple[float, Timed]]:
    """The rows of all files by time; those of one time in the order of the files."""
    return heapq.merge(
        *(in_order(str(path), rows(path), counts, MOVED) for path in paths), key=lambda pair: pair[0]
    )


def _named(given: str) -> tuple[str, str]:
    """The workload's name, "" without one, and the file. A file may have an equals sign in its name."""
    name, equals, file = given.partition("=")
    return (name, file) if name and equals and not Path(given).exists() else ("", given)


def _files(given: str) -> list[Path]:
    """A file, the files of a folder, or a private copy of standard input."""
    if given == STANDARD_INPUT:
        copy = tempfile.NamedTemporaryFile(prefix="standard_input_", delete=False)  # noqa: SIM115
        atexit.register(Path(copy.name).unlink, missing_ok=True)
        with copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
        return [Path(copy.name)]
    path = Path(given)
    if not path.is_dir():
        return [path]
    if (path / ACCESSES_FILE).exists():
        raise UserError(f"{path}: is the folder of a study; give it with --trace-file")
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    if not files:
        raise UserError(f"{path}: the folder holds no files")
    return files


def _first_line(path: Path) -> str:
    """The first that is not blank, as text; only its start if it is long."""
    with open_source(path) as file:
        for line in iter(lambda: file.readline(_FIRST_BYTES), b""):
            if line.startswith(_PICKLE):
                raise UserError(
                    f"{path}: is a pickle, which may run code when it is opened; write its requests as JSON "
                    "lines, SGLang's dumps with obj, out and created_time"
                )
            if line.strip():
                return line.decode("utf-8", "replace").strip()
    raise UserError(f"{path}: the file holds no rows")


def _recognised(path: Path, first_line: str) -> str:
    """The name of the layout of the first row that one fits."""
    if first_line.startswith(("{", "[")):
        rows = read_json_rows(path, lambda _, row: row, BadRows("skip"))
        with contextlib.suppress(UserError):  # no row is JSON: some text logs begin with a bracket
            for layout in map(layout_of, itertools.islice(rows, _NUM_FIRST_ROWS)):
                if layout is not None:
                    return layout.name
        what = f"none of its first {_NUM_FIRST_ROWS} rows has the columns of a known layout"
    else:
        what = (
            f"it is no JSON, and none of its first {_NUM_FIRST_LINES:,} lines is one of vLLM's with a prompt"
        )
    with open_source(path) as file:
        lines = itertools.islice(iter(lambda: file.readline(_FIRST_BYTES), b""), _NUM_FIRST_LINES)
        if any(VLLM_LINE.search(line.decode("utf-8", "replace")) for line in lines):
            return VLLM
    raise UserError(
        f"{path}: {what}; known are {', '.join(LAYOUTS)}, which --layout forces; see docs/study-logs.md"
    )
