"""The source of a study's requests: conversations, a trace file, a generator, or the embedded sample.

Conversations become two traces (`prepare`), whose rows hold text and can be written. A trace file
is taken as it is, and filtered. Knows no cache and writes nothing.

    source = Source(data_path=Path("chats.json"))
    client = Client(source, ClientSettings(min_turns=2), open_vocabulary(None))
    client.prepared().multi               # rows of text
    client.requests("multi_turn")         # the same as StudyRequests
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.study.prepare import ClientSettings, PreparedTraces, limit_requests, prepare_traces
from dsatrace.study.request_files import read_requests
from dsatrace.study.requests import UNKNOWN, StudyRequests, conversation_groups
from dsatrace.study.tokenization import NamedVocabulary, Progress, tokenize_rows
from dsatrace.workloads.digests import file_sha256
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.samples import sample_file
from dsatrace.workloads.sharegpt import ODDITIES, Conversation, ShareGPTLoader
from dsatrace.workloads.synthetic import (
    CHAT_MULTI,
    CHAT_SINGLE,
    QA,
    SUMMARIZATION,
    WORKLOADS,
    synthetic_conversations,
)
from dsatrace.workloads.trace_rows import MULTI_TURN, SINGLE_TURN, TraceRow

MATCHING_FACTOR = 8  # times as many synthetic conversations, for --match-requests


@dataclasses.dataclass(frozen=True)
class Source:
    """At most one of the three; none of them stands for the embedded sample."""

    data_path: Path | None = None  # ShareGPT conversations
    trace_file: Path | None = None  # requests, in any layout that `read_requests` knows
    workload: str | None = None  # a seeded generator's name

    def __post_init__(self) -> None:
        flags = {"--data-path": self.data_path, "--trace-file": self.trace_file, "--workload": self.workload}
        given = [flag for flag, value in flags.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other; give one source")
        if self.workload is not None and self.workload not in WORKLOADS:
            raise UserError(f"unknown workload {self.workload!r}; use one of {', '.join(WORKLOADS)}")

    def describe(self) -> dict[str, str]:
        """For the manifest: the kind of source, and the file's path and digest."""
        if self.workload is not None:
            return {"kind": "synthetic", "workload": self.workload}
        if self.trace_file is not None:
            kind, path = "trace file", self.trace_file
        elif self.data_path is not None:
            kind, path = "conversations", self.data_path
        else:
            kind, path = "embedded sample", sample_file("sharegpt")
        return {"kind": kind, "path": str(path), "sha256": file_sha256(path)}


class Client:
    """Reads a source once and gives its traces; `counts` then says what was read and dropped."""

    def __init__(
        self,
        source: Source,
        settings: ClientSettings,
        vocabulary: NamedVocabulary,
        bad_rows: BadRows | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.source, self.settings, self.vocabulary = source, settings, vocabulary
        self.bad_rows = bad_rows or BadRows()
        self.counts: dict[str, int] = {}
        self._progress = progress
        self._loader: ShareGPTLoader | None = None
        if source.trace_file is not None and settings.match_requests:
            raise UserError("--match-requests draws more conversations; it needs --data-path, not a trace")

    @property
    def has_text(self) -> bool:
        """Whether the source gives rows of text, which can be written."""
        return self.source.trace_file is None

    @functools.cached_property
    def _prepared(self) -> PreparedTraces:
        chosen = self.vocabulary
        prepared = prepare_traces(self._conversations(), self.settings, chosen.vocabulary, chosen.formatter)
        self.counts |= prepared.counts | self._oddities()
        label = self.source.workload if self.source.workload in (QA, SUMMARIZATION) else None
        return PreparedTraces(
            _labelled(prepared.single, label or CHAT_SINGLE),
            _labelled(prepared.multi, label or CHAT_MULTI),
            prepared.counts,
        )

    def prepared(self) -> PreparedTraces:
        """Both traces as rows of text, labelled with their workload. A trace file raises a `UserError`."""
        if not self.has_text:
            raise UserError(f"{self.source.trace_file}: is a trace already; give conversations (--data-path)")
        return self._prepared

    def rows(self, mode: str) -> list[TraceRow]:
        """The rows of one trace, `single_turn` or `multi_turn`."""
        prepared = self.prepared()
        return prepared.single if mode == SINGLE_TURN else prepared.multi

    def requests(self, mode: str) -> StudyRequests:
        """The requests of `mode` in the order of the replay; `single_turn` of a trace file is its turns 0."""
        if self.has_text:
            requests = tokenize_rows(self.rows(mode), self.vocabulary.vocabulary, self._progress)
        else:
            requests = self._trace if mode == MULTI_TURN else _first_turns(self._trace)
        return requests.ordered(self.settings.order)

    @functools.cached_property
    def _trace(self) -> StudyRequests:
        assert self.source.trace_file is not None
        counts: Counter[str] = Counter()
        requests = read_requests(
            self.source.trace_file, self.vocabulary.vocabulary, self.bad_rows, counts, self._progress
        )
        requests = _first_conversations(requests, self.settings.max_conversations)
        kept, dropped = limit_requests(requests, self.settings.max_tokens, self.settings.min_turns)
        self.counts |= {**counts, **dropped}
        return kept

    def _conversations(self) -> Iterable[Conversation]:
        if self.source.workload is not None:
            return _synthetic(self.source.workload, self.settings)
        self._loader = ShareGPTLoader(
            self.source.data_path or sample_file("sharegpt"), bad_rows=self.bad_rows
        )
        return self._loader

    def _oddities(self) -> dict[str, int]:
        """Oddities in the rows that the loader read, and how many rows have them; see `sharegpt.ODDITIES`."""
        found = {} if self._loader is None else self._loader.summary()
        return {f"source rows, {name}": found[name] for name in ODDITIES if found.get(name)}

    def describe(self) -> dict[str, Any]:
        """For the manifest, once the traces are read."""
        return {
            "source": self.source.describe(),
            "tokenizer": self.vocabulary.label,
            "client": dataclasses.asdict(self.settings),
            "counts": self.counts,
            "bad_rows": self.bad_rows.summary(),
        }


def trace_name(requests: StudyRequests) -> str:
    """`single_turn` or `multi_turn` where all requests are of that mode, else `trace`."""
    modes = {requests.mode_names[i] for i in np.unique(requests.mode)}
    return modes.pop() if modes in ({SINGLE_TURN}, {MULTI_TURN}) else "trace"


def _labelled(rows: list[TraceRow], workload: str) -> list[TraceRow]:
    return [dataclasses.replace(row, workload=workload) for row in rows]


def _synthetic(workload: str, settings: ClientSettings) -> list[Conversation]:
    count = settings.max_conversations
    if count is None:
        raise UserError(f"workload {workload} has no end; say how many with --max-conversations")
    count *= MATCHING_FACTOR if settings.match_requests else 1
    return synthetic_conversations(workload, count, settings.seed)


def _first_conversations(requests: StudyRequests, limit: int | None) -> StudyRequests:
    """The requests of the first `limit` conversations by arrival; without an id, each request is one."""
    group = conversation_groups(requests)
    first = np.full(len(requests), len(requests))
    np.minimum.at(first, group, np.arange(len(requests)))
    starts = np.sort(first[first < len(requests)])
    if limit is None or limit >= len(starts):
        return requests
    return requests.take(np.flatnonzero(first[group] < starts[limit]))


def _first_turns(requests: StudyRequests) -> StudyRequests:
    rows = np.flatnonzero((requests.turn == 0) & (requests.conversation != UNKNOWN))
    if not len(rows):
        raise UserError(
            "the trace names no conversation's turn 0, so there is no single-turn part to compare with; "
            "give a trace with conversations and turns, or --data-path"
        )
    return requests.take(rows)
