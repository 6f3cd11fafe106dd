"""Which requests a study has, and the two traces that it compares.

    loader = ShareGPTLoader("chats.json")                  # no limit here: the settings have one
    prepared = prepare_traces(loader, ClientSettings(min_turns=2, max_tokens=4096), tokenizer)
    prepared.single, prepared.multi, prepared.counts

The multi-turn trace has all turns of the conversations, the single-turn trace only their first
turns; in both, a conversation begins at the same time. Whatever is dropped is counted. Knows no
cache.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from dsatrace.errors import UserError
from dsatrace.study.requests import UNKNOWN, Order, StudyRequests, conversation_groups
from dsatrace.study.tokenization import PieceEncoder
from dsatrace.text import counted
from dsatrace.workloads.chat_format import ChatTemplateFormatter
from dsatrace.workloads.encoding import Vocabulary
from dsatrace.workloads.request_generator import (
    DEFAULT_ARRIVAL_RATE,
    DEFAULT_SEED,
    FASTEST_RATE,
    MAX_TURN_DELAY_S,
    SLOWEST_RATE,
    RequestGenerator,
    ThinkTime,
    num_turns,
)
from dsatrace.workloads.rows import check_limit
from dsatrace.workloads.sharegpt import Conversation
from dsatrace.workloads.trace_rows import TraceRow

DEFAULT_MAX_CONVERSATIONS = 1000

CONVERSATIONS = "conversations"
ALONE = "requests of no known conversation"
TOO_FEW_TURNS = "conversations dropped: fewer than min_turns"
TOO_LONG = "conversations dropped: a request over max_tokens"
SHORT = "single-turn requests missing to match: no more conversations"


@dataclasses.dataclass(frozen=True)
class ClientSettings:
    """Which conversations are taken, and when their requests arrive.

    The first `max_conversations` are read (None: all); a seeded generator makes `num_requests`
    conversations (None: as many). A conversation is dropped whole if it has
    fewer human turns than `min_turns`, or a request of more than `max_tokens` tokens, prompt and
    recorded answer together. `match_requests` lengthens the single-turn trace to the number of
    requests of the multi-turn one: with the conversations that were dropped, and then with those that
    follow in the file, of any number of turns, as far as their first request is short enough. `order` is
    that of the replay, see `StudyRequests.ordered`. Turns follow after a `ThinkTime` of median `think_time`
    seconds, or after the constant `turn_delay`.
    """

    max_conversations: int | None = DEFAULT_MAX_CONVERSATIONS
    num_requests: int | None = None
    max_tokens: int | None = None
    min_turns: int = 1
    match_requests: bool = False
    order: Order = "arrival"
    arrival_rate: float = DEFAULT_ARRIVAL_RATE
    use_poisson: bool = True
    turn_delay: float | None = None
    think_time: float = ThinkTime.median_s
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        check_limit("--max-conversations", self.max_conversations)
        check_limit("--num-requests", self.num_requests)
        check_limit("--max-tokens", self.max_tokens)
        if self.min_turns < 1:
            raise UserError(f"--min-turns must be at least 1, not {self.min_turns}")
        if not SLOWEST_RATE <= self.arrival_rate <= FASTEST_RATE:
            raise UserError(
                f"--arrival-rate must be conversations per second from {SLOWEST_RATE:g} to {FASTEST_RATE:g}, "
                f"not {self.arrival_rate}"
            )
        ThinkTime(self.think_time)  # refuses what is no time
        if self.turn_delay is not None and not 0 <= self.turn_delay <= MAX_TURN_DELAY_S:
            raise UserError(
                f"--turn-delay must be seconds from 0 to {MAX_TURN_DELAY_S:g}, not {self.turn_delay}"
            )

    @property
    def delay(self) -> float | ThinkTime:
        """From turn to turn."""
        return ThinkTime(self.think_time) if self.turn_delay is None else self.turn_delay

    def times(self) -> str:
        """What is assumed of arrivals, in a line."""
        kind = "Poisson" if self.use_poisson else "evenly spaced"
        rate = f"{counted(self.arrival_rate, 'conversation')} a second, {kind}"
        delay = self.delay
        if not isinstance(delay, ThinkTime):
            return f"{rate}; {delay:g} s from turn to turn"
        return (
            f"{rate}; from turn to turn the answer at {delay.words_per_s:g} words a second and a log-normal "
            f"think time of median {delay.median_s:g} s, sigma {delay.sigma:g}"
        )


@dataclasses.dataclass(frozen=True)
class PreparedTraces:
    """Both traces by arrival; `counts` has the conversations that were kept and dropped, by reason."""

    single: list[TraceRow]
    multi: list[TraceRow]
    counts: dict[str, int]


def prepare_traces(
    conversations: Iterable[Conversation],
    settings: ClientSettings,
    vocabulary: Vocabulary,
    formatter: ChatTemplateFormatter | None = None,
) -> PreparedTraces:
    """Makes both traces. Reads `conversations` once, and only as far as needed.

    `vocabulary` counts the tokens for `max_tokens`. Prompts have its chat form, unless there is
    a `formatter`. Raises a `UserError` if no conversation is left.
    """
    formatter = formatter or ChatTemplateFormatter(vocabulary)
    source, filters = iter(conversations), _Filters(settings, vocabulary, formatter)
    kept = list(filters.passed(itertools.islice(source, settings.max_conversations)))
    if not kept:
        dropped = ", ".join(f"{reason}: {count:,}" for reason, count in filters.counts.items())
        raise UserError(f"no conversation is left ({dropped or 'there was none'}); loosen the filters")
    counts = Counter({CONVERSATIONS: len(kept)}) + filters.counts

    def generator(chosen: list[Conversation]) -> RequestGenerator:
        return RequestGenerator(chosen, settings.arrival_rate, settings.use_poisson, settings.seed)

    multi = generator(kept).generate_multi_turn_traces(formatter, settings.delay)
    singles = kept
    if settings.match_requests:
        more = filters.first_requests(itertools.chain(filters.dropped, source))
        singles = kept + list(itertools.islice(more, len(multi) - len(kept)))
        counts[SHORT] = len(multi) - len(singles)
    return PreparedTraces(generator(singles).generate_single_turn_traces(formatter), multi, dict(counts))


class _Filters:
    """Passes on the conversations that the settings allow, and counts the others by reason."""

    def __init__(
        self, settings: ClientSettings, vocabulary: Vocabulary, formatter: ChatTemplateFormatter
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.dropped: list[Conversation] = []  # kept where their first requests may serve
        self._settings = settings
        self._encoder = PieceEncoder(vocabulary)
        self._formatter = formatter

    def passed(self, conversations: Iterable[Conversation]) -> Iterator[Conversation]:
        settings = self._settings
        for conversation in conversations:
            if num_turns(conversation) < settings.min_turns:
                self.counts[TOO_FEW_TURNS] += 1
            elif settings.max_tokens is not None and self._longest(conversation) > settings.max_tokens:
                self.counts[TOO_LONG] += 1
            else:
                yield conversation
                continue
            if settings.match_requests:
                self.dropped.append(conversation)

    def first_requests(self, conversations: Iterable[Conversation]) -> Iterator[Conversation]:
        """The conversations whose first request is short enough."""
        for conversation in conversations:
            most = self._settings.max_tokens
            if most is None or self._longest(conversation, 1) <= most:
                yield conversation

    def _longest(self, conversation: Conversation, num_turns: int | None = None) -> int:
        longest = 0
        for prompt in itertools.islice(conversation.prompts("per_user_turn"), num_turns):
            text = self._formatter.format_conversation(prompt.messages)
            num_tokens = len(self._encoder.prompt(text)) + len(self._encoder.response(text, prompt.answer))
            longest = max(longest, num_tokens)
        return longest


def limit_requests(
    requests: StudyRequests, max_tokens: int | None = None, min_turns: int = 1
) -> tuple[StudyRequests, dict[str, int]]:
    """The same filters for requests that were read from a file, and what they kept and dropped.

    Each request of a conversation counts as a turn; a request of no known conversation is a
    conversation by itself. Arrival times stay. Raises a `UserError` if no request is left.
    """
    group = conversation_groups(requests.conversation)
    short = np.bincount(group) < min_turns
    num_tokens = requests.num_prompt_tokens.astype(np.int64) + requests.num_response_tokens
    long = np.zeros(len(short), dtype=bool)
    if max_tokens is not None:
        long[group[num_tokens > max_tokens]] = True
    long &= ~short
    kept = requests.take(np.flatnonzero(~(short | long)[group]))
    num_alone = int(np.sum(kept.conversation == UNKNOWN))
    counts = {CONVERSATIONS: int(np.sum(~(short | long))) - num_alone, ALONE: num_alone}
    counts = {what: n for what, n in counts.items() if n}
    counts |= {TOO_FEW_TURNS: int(np.sum(short)), TOO_LONG: int(np.sum(long))}
    if not len(kept):
        raise UserError(
            f"no request is left: {counted(counts[TOO_FEW_TURNS], 'conversation')} of fewer turns than "
            f"--min-turns {min_turns}, {counts[TOO_LONG]:,} with a request over --max-tokens {max_tokens}; "
            "loosen the filters"
        )
    return kept, counts
