"""The inputs of a sweep, as request logs: seeded workloads, conversations, a trace file, block accesses.

    words = open_vocabulary(None)
    logs = seeded_logs(("qa", "chat_multi"), SeededSettings(num_requests=500), words)
    logs = split_by_workload(read_log("outputs/study_run", words))
    logs[0].at(block_size=16, concurrency=1)           # a CacheInput

Knows no policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsatrace.errors import UserError
from dsatrace.study.accesses import ACCESSES_FILE, Accesses, read_accesses
from dsatrace.study.prepare import check_arrivals, limit_requests
from dsatrace.study.request_files import read_requests
from dsatrace.study.requests import Order, StudyRequests, block_trace
from dsatrace.study.sweep_streams import CacheInput
from dsatrace.study.tokenization import NamedVocabulary, tokenize_rows
from dsatrace.workloads.request_generator import (
    DEFAULT_ARRIVAL_RATE,
    DEFAULT_SEED,
    DEFAULT_TURN_DELAY_S,
    num_turns,
)
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.sharegpt import Conversation
from dsatrace.workloads.synthetic import CHAT_MULTI, CHAT_SINGLE, interleave, workload_rows
from dsatrace.workloads.trace_rows import TraceRow

SYNTHETIC, UNLABELLED = "synthetic", "(unlabelled)"
CHATS = (CHAT_SINGLE, CHAT_MULTI)


@dataclasses.dataclass(frozen=True)
class SeededSettings:
    """`num_requests` per seeded workload (of `chat_multi`, conversations). Real ones are all taken."""

    num_requests: int = 1000
    arrival_rate: float = DEFAULT_ARRIVAL_RATE
    turn_delay: float = DEFAULT_TURN_DELAY_S
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise UserError(f"--num-requests must be at least 1, not {self.num_requests}")
        check_arrivals(self.arrival_rate, self.turn_delay)


@dataclasses.dataclass(frozen=True, eq=False)
class RequestLog:
    """Requests under a name; `origin` says where they come from."""

    name: str
    origin: str
    content: StudyRequests | Accesses

    def __len__(self) -> int:
        return len(self.content)

    @property
    def labels(self) -> tuple[str, ...]:
        """(R,) each request's workload, "" if unknown."""
        if isinstance(self.content, Accesses):
            return self.content.workloads
        return tuple(self.content.workload_names[i] for i in self.content.workload)

    @property
    def block_size(self) -> int | None:
        """The block size it was recorded in; None for tokens."""
        if isinstance(self.content, Accesses):
            return self.content.block_size
        return self.content.tokens_per_id if self.content.tokens_per_id > 1 else None

    @property
    def num_prompt_tokens(self) -> int:
        content = self.content
        return int((content.num_tokens if isinstance(content, Accesses) else content.num_prompt_tokens).sum())

    def take(self, rows: NDArray[np.int64]) -> RequestLog:
        """The requests `rows`, in that order."""
        return dataclasses.replace(self, content=self.content.take(rows))

    def at(self, block_size: int, concurrency: int = 1) -> CacheInput:
        """The log in blocks; raises a `UserError` for a size that it cannot be cut into."""
        content = self.content
        if isinstance(content, StudyRequests):
            content = Accesses.of(content, block_trace(content, block_size))
        return CacheInput.of(content, block_size, concurrency)


def read_log(path: str | Path, vocabulary: NamedVocabulary, bad_rows: BadRows | None = None) -> RequestLog:
    """A trace file of any known kind, or the folder (or accesses.jsonl) of `study run --write-accesses`."""
    path = Path(path)
    if path.is_dir() or path.name == ACCESSES_FILE:
        folder = path if path.is_dir() else path.parent
        return RequestLog(folder.resolve().name, str(path), read_accesses(folder, bad_rows))
    return RequestLog(path.stem, str(path), read_requests(path, vocabulary.vocabulary, bad_rows))


def split_by_workload(log: RequestLog) -> list[RequestLog]:
    """One log per workload, named after it. A log without labels keeps its own name."""
    labels = np.array(log.labels)
    names = list(dict.fromkeys(log.labels))
    if len(names) <= 1:
        return [dataclasses.replace(log, name=names[0]) if names and names[0] else log]
    return [
        dataclasses.replace(log.take(np.flatnonzero(labels == name)), name=name or UNLABELLED)
        for name in names
    ]


def seeded_logs(
    names: Sequence[str],
    settings: SeededSettings,
    vocabulary: NamedVocabulary,
    conversations: Sequence[Conversation] | None = None,
    origin: str = SYNTHETIC,
) -> list[RequestLog]:
    """One log per workload. The chats are made of `conversations`, which come from `origin`, if given."""
    logs = []
    for name in names:
        real = conversations if name in CHATS else None
        rows = _rows(name, settings, vocabulary, real)
        logs.append(
            RequestLog(name, origin if real else SYNTHETIC, tokenize_rows(rows, vocabulary.vocabulary))
        )
    return logs


def mixed_log(
    names: Sequence[str],
    settings: SeededSettings,
    vocabulary: NamedVocabulary,
    conversations: Sequence[Conversation] | None = None,
    origin: str = SYNTHETIC,
    pattern: Sequence[str] | None = None,
) -> RequestLog:
    """The workloads as one log, by arrival or in rounds of `pattern`; they share the arrival rate.

    If both chats are asked for, each gets every second conversation, since otherwise one would
    hit what the other has cached.
    """
    if len(set(names)) < 2 or len(set(names)) != len(names):
        raise UserError(f"a mix needs two different workloads or more, each once: {', '.join(names)}")
    both = conversations is not None and set(CHATS) <= set(names)
    shared = dataclasses.replace(settings, arrival_rate=settings.arrival_rate / len(names))
    rows = []
    for name in names:
        real = conversations if name in CHATS else None
        if both and real is not None:
            real = real[CHATS.index(name) :: 2]
        rows.append(_rows(name, shared, vocabulary, real))
    mixed = tokenize_rows(interleave(rows, pattern), vocabulary.vocabulary)
    chats = f"chats: {origin}, the rest: {SYNTHETIC}"
    return RequestLog("mixed", chats if conversations is not None else SYNTHETIC, mixed)


def _rows(
    name: str, settings: SeededSettings, vocabulary: NamedVocabulary, real: Sequence[Conversation] | None
) -> list[TraceRow]:
    return list(
        workload_rows(
            name,
            vocabulary.formatter,
            real,
            num_requests=settings.num_requests,
            arrival_rate=settings.arrival_rate,
            turn_delay=settings.turn_delay,
            seed=settings.seed,
        )
    )


def first_conversations(loader: Iterable[Conversation], min_turns: int, origin: str) -> list[Conversation]:
    """The conversations of `min_turns` human turns or more; raises a `UserError` if there is none."""
    kept = [conversation for conversation in loader if num_turns(conversation) >= min_turns]
    if not kept:
        raise UserError(f"{origin}: no conversation has {min_turns} human turns; lower --min-turns")
    return kept


def limited(
    log: RequestLog, max_tokens: int | None, min_turns: int, order: Order = "arrival"
) -> tuple[RequestLog, dict[str, int]]:
    """The log in `order`, without conversations of too few turns or a request over `max_tokens`.

    Also returns how many conversations were kept and dropped, by reason.
    """
    if isinstance(log.content, Accesses):
        if max_tokens is not None or min_turns != 1 or order != "arrival":
            raise UserError(
                f"{log.origin}: recorded accesses are replayed as they are; filter and order in `study run`"
            )
        return log, {}
    kept, counts = limit_requests(log.content, max_tokens, min_turns)
    return dataclasses.replace(log, content=kept.ordered(order)), counts
