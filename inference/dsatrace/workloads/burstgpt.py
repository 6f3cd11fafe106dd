"""BurstGPT as requests: logged arrivals and lengths of a real service, with prompts made up to those lengths.

A request asks for as many tokens as the log's response had (at most `max_new_tokens`) and
runs to that length: the load is the log's, whatever the model says. Columns are found by
name, so both published layouts can be read: with and without `Session ID` and `Elapsed time`. So can
Azure's public traces, which hold the same under other names.

    arrivals = Arrivals(read_burstgpt("BurstGPT_1.csv"), max_requests=100, time_scale=0.01)
    for arrival in arrivals:
        arrival.arrival_s, arrival.row.request_tokens
    arrivals.counts["failures"]

    BurstGPTWorkload(arrivals, SyntheticPrompts(first_token_id=3, num_token_ids=256), bad_rows).requests()
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.workloads.burstgpt_synthetic import (
    API_LOG,
    BurstRow,
    BurstSettings,
    SyntheticPrompts,
    generate_burstgpt,
)
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.data_set import DataSet, Find, Flag, OpenedWorkload, Workload
from dsatrace.workloads.exports import WholeFile, write_lines
from dsatrace.workloads.hub import HubFile
from dsatrace.workloads.request import Request
from dsatrace.workloads.rows import (
    BadRow,
    BadRows,
    check_limit,
    in_order,
    numbered_lines,
    open_source,
    read_line,
    read_rows,
)
from dsatrace.workloads.trace_rows import MAX_TIMESTAMP_S

MAX_LINE_BYTES = 1 << 20
MAX_TOKENS = 10_000_000

TIMESTAMP, SESSION, ELAPSED = "Timestamp", "Session ID", "Elapsed time"
REQUEST_TOKENS, RESPONSE_TOKENS = "Request tokens", "Response tokens"
REQUIRED = (TIMESTAMP, REQUEST_TOKENS, RESPONSE_TOKENS)
AZURE = {"TIMESTAMP": TIMESTAMP, "ContextTokens": REQUEST_TOKENS, "GeneratedTokens": RESPONSE_TOKENS}
"""Columns of Azure's public traces, whose timestamps are dates."""

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def read_burstgpt(path: str | Path, bad_rows: BadRows | None = None) -> Iterator[BurstRow]:
    """Streams the rows of a CSV file. Row 0 follows the header; blank lines are no rows.

    Raises a `UserError` if a column of `REQUIRED` is missing. A row is bad if it has another
    number of columns than the header, or a number that is none, negative, too large, or
    fractional where tokens are counted.
    """
    with open_source(path) as file:
        try:
            header = _fields(read_line(file, MAX_LINE_BYTES))
        except BadRow as fault:
            raise UserError(f"{path}: line 1: {fault}; the header must name the columns") from fault
        columns = {AZURE.get(name.strip(), name.strip()): i for i, name in enumerate(header)}
        missing = [name for name in REQUIRED if name not in columns]
        if missing or len(columns) < len(header):
            what = f"no column {missing[0]!r}" if missing else "two columns of one name"
            raise UserError(f"{path}: {what} in line 1; the header must be that of a BurstGPT file")

        def parse(number: int, line: bytes | None) -> BurstRow:
            fields = _fields(line)
            if len(fields) != len(columns):
                raise BadRow("wrong number of columns", f"{len(fields)}, but the header has {len(columns)}")
            row = {name: fields[i].strip() for name, i in columns.items()}
            return BurstRow(
                source_row=number,
                timestamp_s=_seconds(row),
                request_tokens=_num_tokens(row, REQUEST_TOKENS),
                response_tokens=_num_tokens(row, RESPONSE_TOKENS),
                model=row.get("Model", ""),
                log_type=row.get("Log Type", ""),
                session_id=row.get(SESSION) or None,
                elapsed_s=_number(row, ELAPSED, MAX_TIMESTAMP_S) if row.get(ELAPSED) else None,
            )

        lines = numbered_lines(file, MAX_LINE_BYTES, first=2)
        yield from read_rows(str(path), lines, parse, bad_rows or BadRows())


def _fields(line: bytes | None) -> list[str]:
    if line is None:
        raise BadRow("line too long", f"over {MAX_LINE_BYTES} bytes")
    if b"\0" in line:
        raise BadRow("NUL byte", f"at byte {line.index(0)} of the line")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"at byte {error.start} of the line") from error
    try:
        (fields,) = csv.reader([text.rstrip("\r\n")], strict=True)
    except (csv.Error, ValueError) as error:
        raise BadRow("not CSV", str(error)) from error
    return fields


def _number(row: dict[str, str], column: str, largest: float) -> float:
    text = row[column]
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    if not _NUMBER.fullmatch(text):
        raise BadRow("not a number", repr(shown), column)
    value = float(text)
    if value < 0:
        raise BadRow("negative number", shown, column)
    if value > largest:
        raise BadRow("number too large", f"{shown} is over {largest:g}", column)
    return value


def _seconds(row: dict[str, str]) -> float:
    """Of a number of seconds, or of a date in UTC."""
    text = row[TIMESTAMP]
    if "-" not in text[1:] or ":" not in text:
        return _number(row, TIMESTAMP, MAX_TIMESTAMP_S)
    try:
        date = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise BadRow("not a date", repr(text[:40]), TIMESTAMP) from error
    seconds = (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()
    if seconds < 0:
        raise BadRow("date before 1970", repr(text[:40]), TIMESTAMP)
    return seconds


def _num_tokens(row: dict[str, str], column: str) -> int:
    value = _number(row, column, MAX_TOKENS)
    if not value.is_integer():
        raise BadRow("not a whole number", row[column][:40], column)
    return int(value)


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A row, and when it arrives: seconds since the first row served, times the scale."""

    arrival_s: float
    row: BurstRow


class Arrivals:
    """The earliest of `rows` arrives at 0, the others as far behind it as `time_scale` times the log.

    Rows are put in the order of their times by `in_order`, for which `source` names them. `time_scale` 0.1
    is ten times as fast, 0 sends all at once. Failures are dropped first unless kept. `counts`, of the rows
    so far: `rows`, `requests` (those served), `failures`, `ties` (at the same time as the row before),
    `api_log`, `without_session`, `moved` (before a row of a later time; of the rows ahead too).
    """

    COUNTS = ("rows", "requests", "failures", "ties", "api_log", "without_session", "moved")

    def __init__(
        self,
        rows: Iterable[BurstRow],
        max_requests: int | None = None,
        *,
        keep_failures: bool = False,
        time_scale: float = 1.0,
        source: str = "the log",
    ) -> None:
        check_limit("max_requests", max_requests)
        if not (time_scale >= 0 and math.isfinite(time_scale)):
            raise UserError(f"time_scale must be a number of at least 0, not {time_scale}")
        self._rows, self._source = rows, source
        self.max_requests = max_requests
        self.keep_failures = keep_failures
        self.time_scale = time_scale
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Arrival]:
        self.counts.clear()
        first_s = last_s = None
        timed = ((row.timestamp_s, row) for row in self._rows)
        for _, row in in_order(self._source, timed, self.counts, "moved"):
            self.counts["rows"] += 1
            self.counts["failures"] += row.failed
            self.counts["ties"] += row.timestamp_s == last_s
            self.counts["api_log"] += row.log_type == API_LOG
            self.counts["without_session"] += row.session_id is None
            last_s = row.timestamp_s
            if row.failed and not self.keep_failures:
                continue
            first_s = row.timestamp_s if first_s is None else first_s
            self.counts["requests"] += 1
            yield Arrival((row.timestamp_s - first_s) * self.time_scale, row)
            if self.counts["requests"] == self.max_requests:
                return

    def summary(self) -> dict[str, int]:
        """All counts, zeros included."""
        return {name: self.counts[name] for name in self.COUNTS}


class BurstGPTWorkload(Workload):
    name = "burstgpt"

    def __init__(
        self,
        arrivals: Arrivals,
        prompts: SyntheticPrompts,
        bad_rows: BadRows,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
    ) -> None:
        super().__init__(bad_rows)
        check_limit("--max-new-tokens-cap", max_new_tokens)
        self._arrivals = arrivals
        self._prompts = prompts
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._num_capped = 0

    def requests(self) -> Iterator[Request]:
        for arrival in self._arrivals:
            wanted = max(1, arrival.row.response_tokens)  # a failure, if kept, asks for one token
            granted = min(wanted, self._max_new_tokens or wanted)
            self._num_capped += granted < wanted
            yield Request(
                request_id=f"row{arrival.row.source_row}",
                prompt_token_ids=self._prompts.token_ids(arrival.row),
                max_new_tokens=granted,
                temperature=self._temperature,
                arrival_s=arrival.arrival_s,
                source_row=arrival.row.source_row,
                stop_at_eos=False,
            )

    def recorded(self, request: Request) -> tuple[int, ...]:
        """The log has lengths only: as many tokens, all of one id that means nothing."""
        return (self._prompts.first_token_id,) * request.max_new_tokens

    def details(self) -> dict[str, Any]:
        return {
            "prompts": "synthetic: random tokens of the logged lengths",
            "shared_prefix_share": self._prompts.shared_share,
            "time_scale": self._arrivals.time_scale,
        }

    def counts(self) -> dict[str, int]:
        return {**self._arrivals.summary(), "answers_capped": self._num_capped}


def open_burstgpt(args: argparse.Namespace, chat: Chat, find: Find) -> OpenedWorkload:
    """The log's arrivals, or generated ones, with prompts made up to their lengths."""
    bad_rows = BadRows(args.bad_rows)
    if args.burstgpt_generate:
        num_rows = {} if args.limit is None else {"num_rows": args.limit}
        drawn = {flag.attribute: getattr(args, flag.attribute) for flag in _GENERATOR_FLAGS}
        settings = BurstSettings(seed=args.seed, **num_rows, **drawn)
        rows, description = generate_burstgpt(settings), f"generator: {settings.text()}"
        terminal_line, name = f"BurstGPT-like arrivals from the {description}", "the generator"
    else:
        source = find()
        rows = read_burstgpt(source.file, bad_rows)
        description, terminal_line, name = source.description, source.text(), str(source.file)
    ordinary = chat.tokenizer.ordinary_ids
    workload = BurstGPTWorkload(
        Arrivals(rows, args.limit, keep_failures=args.keep_failures, time_scale=args.time_scale, source=name),
        SyntheticPrompts(ordinary.start, len(ordinary), args.shared_prefix_share, args.seed),
        bad_rows,
        args.max_new_tokens_cap,
        args.temperature,
    )
    return OpenedWorkload(workload, description, terminal_line, args.limit)


def _write_csv(source: Path, target: Path, limit: int | None) -> int:
    """The lines as they stand; the reader checks each."""
    with open_source(source) as file:
        lines = (line for line in file if line.strip())
        header = next(lines, b"")
        rows = zip(read_burstgpt(source, WholeFile()), lines, strict=True)
        wanted = itertools.islice(rows, limit)
        return write_lines(target, itertools.chain([header], (line for _, line in wanted))) - 1


def _generator_flag(name: str, help: str, default: float | None = None) -> Flag:
    """The flag of one of `BurstSettings`' fields."""
    value: Any = getattr(BurstSettings, name) if default is None else default
    return Flag(f"--{name.replace('_', '-')}", f"generated arrivals: {help}", type=type(value), default=value)


_GENERATOR_FLAGS = (
    _generator_flag("gap_shape", "shape of the Gamma distributed gaps; below 1 makes bursts"),
    _generator_flag("gap_scale_s", "scale of the gaps, s; their mean is shape x scale"),
    _generator_flag("zipf_exponent", "exponent of the lengths' law"),
    _generator_flag("max_request_tokens", "longest prompt"),
    _generator_flag("max_response_tokens", "longest answer"),
    _generator_flag("api_share", "share of rows without a session"),
    _generator_flag(  # 0, so that --limit is what is served
        "failure_share", "share of rows without a response; served with --keep-failures only", 0.0
    ),
)

BURSTGPT = DataSet(
    name="burstgpt",
    title="BurstGPT",
    help="logged arrivals and lengths; the prompts are made up",
    # No revision of the mirror is known to be kept; the bytes are pinned as the v2.0 release's.
    hub=HubFile(
        repo="lzzmm/BurstGPT",
        file="data/BurstGPT_1.csv",
        sha256="4bb3783693d0a435686fbfc885615d2349bd067239079fa4b749f2e679e12122",
    ),
    licence="CC-BY-4.0 (HPMLL/BurstGPT, arXiv:2401.17644)",
    flags=(
        Flag("--burstgpt-csv", "a BurstGPT file, of either layout", type=Path),
        Flag("--max-new-tokens-cap", "most tokens of an answer (default: as many as in the log)", type=int),
        Flag("--keep-failures", "serve logged failures too, for one token", action="store_true"),
        Flag("--time-scale", "multiplies every gap; 0 sends all at once", type=float, default=1.0),
        Flag(
            "--shared-prefix-share",
            "share of a prompt that all prompts of its session begin with",
            type=float,
            default=0.5,
        ),
        Flag(
            "--burstgpt-generate",
            f"generate --limit arrivals (default: {BurstSettings.num_rows})",
            action="store_true",
        ),
        *_GENERATOR_FLAGS,
    ),
    file_flag="--burstgpt-csv",
    open=open_burstgpt,
    write=_write_csv,
    export="burstgpt_train{}.csv",
    patterns=("*.csv",),
    sample="burstgpt",
    arrivals=True,
    download_limit=2000,
    variable="BURSTGPT_CSV",
)
