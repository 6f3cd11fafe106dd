"""The source of a study's requests: conversations, a trace file, generators, or the embedded sample.

Conversations become requests of text (`prepare`), which can be written. A trace file is taken as it
is, and filtered. Every verb gets its requests here, so a workload is the same in all of them.
Knows no cache and writes nothing.

    client = Client(Source((Path("chats.json"),)), ClientSettings(min_turns=2), open_vocabulary(None))
    client.rows("multi_turn")             # rows of text
    client.requests("multi_turn")         # the same as StudyRequests; several workloads share one trace
    client.each()                         # a trace for each workload
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.files import read_json
from dsatrace.study.accesses import ACCESSES_FILE
from dsatrace.study.kept_requests import KeptRequests, Made, rows_sha256
from dsatrace.study.logs import Log, read_log
from dsatrace.study.output_folder import MANIFEST_FILE
from dsatrace.study.prepare import ClientSettings, PreparedTraces, limit_requests, prepare_traces
from dsatrace.study.request_files import holds_text, read_requests
from dsatrace.study.requests import UNKNOWN, Progress, StudyRequests, by_workload, conversation_groups
from dsatrace.study.tokenization import NamedVocabulary, tokenize_rows
from dsatrace.workloads.digests import file_sha256, folder_sha256
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.samples import sample_file
from dsatrace.workloads.sharegpt import ODDITIES, Conversation, ShareGPTLoader
from dsatrace.workloads.synthetic import (
    CHAT_MULTI,
    CHAT_SINGLE,
    WORKLOADS,
    interleave,
    synthetic_conversations,
)
from dsatrace.workloads.trace_rows import MULTI_TURN, SINGLE_TURN, TraceRow, times_text

CHATS = (CHAT_SINGLE, CHAT_MULTI)
MATCHING_FACTOR = 8  # times as many synthetic conversations, for --match-requests
SYNTHETIC = "synthetic"
_SEED_STEP = 1_000_003  # between the workloads of a mix, which would all arrive at the same times


@dataclasses.dataclass(frozen=True)
class Source:
    """Where requests come from; without anything, the embedded conversations.

    A trace file excludes the rest. Of the workloads, the chats are made of the conversations of
    `data_paths` if there are some, and the others by seeded generators. `pattern` is the order in
    which the workloads of a mix take turns; without it they mix by arrival. A workload of `rates` has
    that arrival rate; the others share the common one.
    """

    data_paths: tuple[Path, ...] = ()  # ShareGPT conversations
    trace_file: Path | None = None  # requests, in any layout that `read_requests` knows
    log: Log | None = None  # requests, in any layout of `log_layouts` but ShareGPT's
    workloads: tuple[str, ...] = ()
    pattern: tuple[str, ...] | None = None
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)  # conversations per second

    def __post_init__(self) -> None:
        strange = [name for name in self.rates if name not in self.workloads]
        if strange:
            raise UserError(f"--rates {strange[0]}=...: name it with --workloads too")
        unknown = [name for name in self.workloads if name not in WORKLOADS]
        if unknown:
            raise UserError(f"unknown workload {unknown[0]!r}; use one of {', '.join(WORKLOADS)}")
        if len(set(self.workloads)) != len(self.workloads):
            raise UserError(f"name each workload once: {', '.join(self.workloads)}")
        if self.log is not None and self.trace_file is not None:
            raise UserError("--log and --trace-file are a source each; give one")
        if self.has_requests and (self.data_paths or self.workloads):
            flag = "--trace-file" if self.log is None else "--log"
            raise UserError(f"{flag} is a source by itself; leave out --data-path and --workloads")
        if self.data_paths and self.workloads and not set(CHATS) & set(self.workloads):
            raise UserError(f"--data-path holds chats; name one of {', '.join(CHATS)}, or leave it out")
        if self.pattern is not None and self.has_requests:
            raise UserError("--pattern interleaves the workloads; a trace file has its order already")
        if self.pattern is not None and len(self.workloads) < 2:
            raise UserError("--pattern interleaves workloads; name two or more with --workloads")

    @property
    def has_requests(self) -> bool:
        """Whether it holds requests, with times of their own, and no conversations."""
        return self.trace_file is not None or self.log is not None

    def is_real(self, workload: str) -> bool:
        """Whether the workload is made of conversations that people had."""
        return workload in CHATS and bool(self.data_paths or not self.workloads)

    @property
    def kind(self) -> str:
        if self.log is not None:
            return "log"
        if self.trace_file is not None:
            return "trace file"
        if self.data_paths:
            return "conversations"
        return SYNTHETIC if self.workloads else "embedded sample"

    @property
    def path(self) -> Path | None:
        """The file that is read, None without one; of several the first."""
        return next(iter(self.files), None)

    @property
    def files(self) -> tuple[Path, ...]:
        """All that are read."""
        if self.log is not None:
            return self.log.paths
        if self.kind == SYNTHETIC:
            return ()
        return (self.trace_file,) if self.trace_file else self.data_paths or (sample_file("sharegpt"),)

    def text(self) -> str:
        """Kind, file and workloads in a line."""
        if self.log is not None:
            return f"{self.kind} {self.log.text()}"
        more = [f"and {len(self.files) - 3} more"] if len(self.files) > 3 else []
        named = [*map(str, self.files[:3]), *more]
        return " ".join((self.kind, *named, *self.workloads))

    @property
    def is_seeded(self) -> bool:
        """Whether a generator makes some of the requests, so that another seed gives others."""
        return any(not self.is_real(name) for name in self.workloads)

    @functools.cached_property
    def digests(self) -> tuple[str, ...]:
        """The sha256 of each file or folder that is read."""
        return tuple(folder_sha256(path) if path.is_dir() else file_sha256(path) for path in self.files)

    def stamps(self) -> tuple[tuple[int, int], ...]:
        """Size and time of each file: they change when it is written to."""
        return tuple((found.st_size, found.st_mtime_ns) for found in map(Path.stat, self.files))

    def describe(self) -> dict[str, Any]:
        """For the manifest: the kind of source, the workloads if named, a file's path and digest."""
        record: dict[str, Any] = {"kind": self.kind}
        if self.workloads:
            record["workloads"] = list(self.workloads)
        if self.rates:
            record["rates"] = dict(self.rates)
        if self.pattern is not None:
            record["pattern"] = list(self.pattern)
        both = zip(self.files, self.digests, strict=True)
        files = [{"path": str(path), "sha256": digest} for path, digest in both]
        if self.log is not None:
            record["layout"] = self.log.layout
            if self.log.is_named:
                record["workloads_of_files"] = list(self.log.workloads.values())
        if self.log is not None or len(files) > 1:
            record["files"] = files
        elif files:
            record |= files[0]
        return record

    def origin(self, workload: str) -> str:
        """Where one workload's requests come from, in a few words."""
        real = self.has_requests or self.is_real(workload)
        return str(self.path) if real else SYNTHETIC


class Client:
    """Reads a source once and gives its traces; `counts` then says what was read and dropped."""

    def __init__(
        self,
        source: Source,
        settings: ClientSettings,
        vocabulary: NamedVocabulary,
        bad_rows: BadRows | None = None,
        progress: Progress | None = None,
        keep_tokens: bool = False,
    ) -> None:
        """`keep_tokens` keeps requests of files for the next run, and takes what an earlier one kept."""
        self.source, self.settings, self.vocabulary = source, settings, vocabulary
        self.kept = KeptRequests(vocabulary.label) if keep_tokens else None
        self.bad_rows = bad_rows or BadRows()
        self.counts: dict[str, int] = {}
        self._progress = progress
        self._loader: ShareGPTLoader | None = None
        self._kept: dict[str, PreparedTraces] = {}
        if source.has_requests and settings.match_requests:
            raise UserError("--match-requests draws more conversations; it needs --data-path, not a trace")

    def reseeded(self, seed: int) -> Client:
        """The same client with another seed of arrivals and generators; it shares the vocabulary."""
        settings = dataclasses.replace(self.settings, seed=seed)
        bad_rows, keeps = BadRows(self.bad_rows.policy), self.kept is not None
        return Client(self.source, settings, self.vocabulary, bad_rows, self._progress, keeps)

    @property
    def has_text(self) -> bool:
        """Whether the source gives rows of text, which can be written."""
        return not self.source.has_requests

    @property
    def times(self) -> str:
        """Whether arrivals, and so the gaps between uses, are those of a file."""
        return times_text(not self.has_text and self._trace.times_recorded)

    def rows(self, mode: str | None = None) -> list[TraceRow]:
        """All requests as text. A trace file raises a `UserError`.

        Each workload gives the requests of `mode`, or by default of its own: first turns for
        `chat_single`, every turn for the others. Several workloads share the arrival rate, and the
        chats share the conversations: otherwise one would hit what the other has cached.
        """
        if not self.has_text:
            raise UserError(f"{self.source.path}: is a trace already; give conversations (--data-path)")
        names = self.source.workloads or (CHAT_SINGLE if mode == SINGLE_TURN else CHAT_MULTI,)
        logs = []
        for name in names:
            if name not in self._kept:
                self._kept[name] = self._prepare(name, names)
            logs.append(_side(self._kept[name], name, mode))
        return logs[0] if len(logs) == 1 else list(interleave(logs, self.source.pattern))

    def requests(self, mode: str | None = None) -> StudyRequests:
        """The same as ids, in the order of the replay; `single_turn` of a trace file is its turns 0."""
        if self.has_text:
            return self._tokenized(self.rows(mode))
        requests = _first_turns(self._trace) if mode == SINGLE_TURN else self._trace
        return requests.ordered(self.settings.order)

    def each(self) -> dict[str, StudyRequests]:
        """A trace for each workload, by its name; what has no workload goes by its file's name."""
        path = self.source.path
        if path is None or self.has_text:
            return {
                name: self._tokenized(_side(self._prepare(name, (name,)), name, None))
                for name in self.source.workloads or (CHAT_MULTI,)
            }
        folder = path if path.is_dir() else path.parent
        unnamed = folder.resolve().name if path.is_dir() or path.name == ACCESSES_FILE else path.stem
        if self.source.log is not None and self.source.log.given != (str(path),):
            unnamed = self.source.kind
        return by_workload(self._trace.ordered(self.settings.order), unnamed)

    def describe(self) -> dict[str, Any]:
        """For the manifest, once the traces are read."""
        return {
            "source": self.source.describe(),
            "tokenizer": self.vocabulary.label,
            "times": self.times,
            "client": dataclasses.asdict(self.settings),
            "counts": self.counts,
            "bad_rows": self.bad_rows.summary(),
        }

    def _tokenized(self, rows: list[TraceRow]) -> StudyRequests:
        def make() -> Made:
            return tokenize_rows(rows, self.vocabulary.vocabulary, self._progress), {}

        if self.kept is None or not self.source.data_paths:
            requests, _ = make()
        else:
            requests, _ = self.kept.get(rows_sha256(rows), make)
        return requests.ordered(self.settings.order)

    def _prepare(self, name: str, together: Sequence[str]) -> PreparedTraces:
        """Both traces of one workload, which shares a cache with the others of `together`."""
        settings, real = self.settings, self.source.is_real(name)
        limit = settings.max_conversations if real else settings.num_requests or settings.max_conversations
        split = set(CHATS) <= set(together)
        conversations: Iterable[Conversation]
        if real:
            conversations = self._chats
        elif limit is None:
            raise UserError(f"workload {name} has no end; say how many with --max-conversations")
        else:
            count = limit * (MATCHING_FACTOR if settings.match_requests else 1) * (2 if split else 1)
            conversations = synthetic_conversations(name, count, settings.seed)
        if split and name in CHATS:
            place = CHATS.index(name)
            conversations = itertools.islice(conversations, place, None, 2)
            if real and limit is not None:
                limit = max(1, (limit + 1 - place) // 2)
        rate = self.source.rates.get(name, settings.arrival_rate / len(together))
        seed = settings.seed + (WORKLOADS.index(name) * _SEED_STEP if len(together) > 1 else 0)
        settings = dataclasses.replace(settings, seed=seed, arrival_rate=rate)
        min_turns = settings.min_turns if name in CHATS else 1  # the others have one turn each
        settings = dataclasses.replace(settings, max_conversations=limit, min_turns=min_turns)
        chosen = self.vocabulary
        prepared = prepare_traces(conversations, settings, chosen.vocabulary, chosen.formatter)
        several = len(self.source.workloads) > 1
        self.counts |= {f"{name}, {what}" if several else what: n for what, n in prepared.counts.items()}
        self.counts |= self._oddities()
        return prepared

    @functools.cached_property
    def _chats(self) -> Iterable[Conversation]:
        """The conversations of the file; kept if two workloads take some."""
        several = set(CHATS) <= set(self.source.workloads)
        limit = self.settings.max_conversations if several and not self.settings.match_requests else None
        self._loader = ShareGPTLoader(self.source.files, limit, bad_rows=self.bad_rows)
        return list(self._loader) if several else self._loader

    @functools.cached_property
    def _trace(self) -> StudyRequests:
        source = self.source
        is_one = all(file.is_file() and file.name != ACCESSES_FILE for file in source.files)
        if self.kept is None or not is_one:
            requests, facts = self._read()
        else:
            stamps, log = source.stamps(), source.log
            told = (
                ()
                if log is None
                else (log.layout, log.time_unit, log.block_size, list(log.workloads.values()))
            )
            made_of = [source.digests, told, self.bad_rows.policy]
            requests, facts = self.kept.get(made_of, self._read, lambda: source.stamps() == stamps)
            self.bad_rows.counts = Counter(facts["bad_rows"])
        requests = _first_conversations(requests, self.settings.max_conversations)
        if not facts["holds_text"]:
            unit = "tokens" if requests.tokens_per_id == 1 else f"blocks of {requests.tokens_per_id} tokens"
            label = {"name": f"none: the trace holds ids of {unit}", **_unit_of(source.path)}
            self.vocabulary = dataclasses.replace(self.vocabulary, label=label)
        kept, dropped = limit_requests(requests, self.settings.max_tokens, self.settings.min_turns)
        self.counts |= {**facts["counts"], **dropped}
        return kept

    def _read(self) -> Made:
        """The requests of a log or trace file, and what is known of them."""
        source, counts = self.source, Counter[str]()
        if source.log is not None:
            requests, has_text = read_log(source.log, self.vocabulary, self.bad_rows, counts, self._progress)
        else:
            assert source.trace_file is not None
            requests = read_requests(
                source.trace_file, self.vocabulary.vocabulary, self.bad_rows, counts, self._progress
            )
            has_text = holds_text(source.trace_file)
        return requests, {"counts": +counts, "bad_rows": self.bad_rows.counts, "holds_text": has_text}

    def _oddities(self) -> dict[str, int]:
        """Oddities in the rows that the loader read, and how many rows have them; see `sharegpt.ODDITIES`."""
        found = {} if self._loader is None else self._loader.summary()
        return {f"source rows, {name}": found[name] for name in ODDITIES if found.get(name)}


def _unit_of(path: Path | None) -> dict[str, str]:
    """`unit`, where the manifest of a study's folder says that its tokens were words."""
    if path is None or not (path.is_dir() or path.name == ACCESSES_FILE):
        return {}
    try:
        manifest = read_json((path if path.is_dir() else path.parent) / MANIFEST_FILE)
        return {"unit": str(manifest["tokenizer"]["unit"])}
    except (UserError, LookupError, TypeError):  # there is none, or tokens were tokens
        return {}


def trace_name(requests: StudyRequests) -> str:
    """`single_turn` or `multi_turn` where all requests are of that mode, else `trace`."""
    modes = {requests.mode_names[i] for i in np.unique(requests.mode)}
    return modes.pop() if modes in ({SINGLE_TURN}, {MULTI_TURN}) else "trace"


def _side(prepared: PreparedTraces, workload: str, mode: str | None) -> list[TraceRow]:
    """One of the two traces, labelled with the workload; a chat's label says which one it is."""
    single = mode == SINGLE_TURN or (mode is None and workload == CHAT_SINGLE)
    label = CHATS[not single] if workload in CHATS else workload
    rows = prepared.single if single else prepared.multi
    return [dataclasses.replace(row, workload=label) for row in rows]


def _first_conversations(requests: StudyRequests, limit: int | None) -> StudyRequests:
    """The requests of the first `limit` conversations by arrival; without an id, each request is one."""
    group = conversation_groups(requests.conversation)
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
