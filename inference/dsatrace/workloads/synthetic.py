"""The study's four workloads, made of synthetic conversations or real chats, and several logs as one.

    chat_single     the first turns of conversations
    chat_multi      their turns with history, which grows; nothing shared between conversations
    qa              short questions, each behind one of a few contexts, some asked for more often
    summarization   long documents behind one instruction; a few are asked for again

Synthetic text is drawn from word lists of our own: sentences that say nothing, the same for
the same seed. They show how a cache reacts to a pattern of sharing, and support no claim about
what people ask. Chats may be real; the other two are always synthetic. Knows no tokenizer and
no cache.

    conversations = qa_conversations(QaSettings(num_requests=100, num_contexts=5), seed=42)
    conversations = synthetic_conversations("qa", 100, seed=42)
    rows = interleave([questions, chats])                        # rows of a RequestGenerator, by arrival
    rows = interleave([questions, chats], ("qa", "qa", "chat_multi"))
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from dsatrace.errors import UserError
from dsatrace.workloads.encoding import Message
from dsatrace.workloads.ruler.texts import ADJECTIVES, NOUNS
from dsatrace.workloads.sharegpt import Conversation
from dsatrace.workloads.trace_rows import TraceRow

CHAT_SINGLE, CHAT_MULTI, QA, SUMMARIZATION = "chat_single", "chat_multi", "qa", "summarization"
WORKLOADS = (CHAT_SINGLE, CHAT_MULTI, QA, SUMMARIZATION)

INSTRUCTION = "Summarize the following document in one short paragraph. Keep names and order.\n\n"

_VERBS = """\
follows carries mends hides paints borrows counts forgets visits sketches lifts guards trades washes
describes measures answers gathers repairs signals weighs crosses admires collects drops opens closes turns
watches builds sells finds loses keeps sends reads stores cleans moves lights
"""
_LINKS = "near beside behind above under beyond inside around against towards before after"
_PATTERNS = (
    "The {a} {n} {v} the {b} {m}.",
    "A {a} {n} {v} every {m} {l} the {o}.",
    "{L} the {n}, one {a} {m} {v} the {o}.",
    "Each {n} {l} the {a} {m} {v} some {b} {o}.",
    "No {n} {v} the {m}, but the {a} {o} does.",
    "When the {n} {v} the {a} {m}, the {b} {o} waits {l} it.",
)
_QUESTIONS = (
    "Why does the {a} {n} stand {l} the {m}?",
    "Which {n} {v} the {b} {m}?",
    "How many of the {a} {n}s lie {l} the {b} {m}, and what {v} them?",
    "What would change if the {n} were not {a}, given that it {v} the {m} {l} the {o}?",
)
VERBS, LINKS = tuple(_VERBS.split()), tuple(_LINKS.split())
_SENTENCES_PER_PARAGRAPH = 6


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """Lengths, in words, and the number of human turns are means, with an exponential tail."""

    num_conversations: int = 1000
    turns: float = 4.0
    question_words: float = 40.0
    answer_words: float = 150.0

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_conversations", "turns", "question_words", "answer_words")


@dataclasses.dataclass(frozen=True)
class QaSettings:
    """A question is about the k-th context with a probability proportional to k ** -zipf_exponent."""

    num_requests: int = 1000
    num_contexts: int = 20
    zipf_exponent: float = 1.0
    context_words: float = 200.0
    answer_words: float = 30.0

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_requests", "num_contexts", "context_words", "answer_words")
        _at_least(self, 0, "zipf_exponent")


@dataclasses.dataclass(frozen=True)
class SummarizationSettings:
    """`again_share` of the requests ask for a document of an earlier one, each equally likely."""

    num_requests: int = 1000
    document_words: float = 800.0
    summary_words: float = 60.0
    again_share: float = 0.1

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_requests", "document_words", "summary_words")
        if not 0 <= self.again_share <= 1:
            raise UserError(f"again_share must lie between 0 and 1, not {self.again_share}")


def chat_conversations(settings: ChatSettings, seed: int) -> list[Conversation]:
    """Conversations `chat0`, `chat1`, ... of alternating turns, each one answered."""

    def turn(draw: random.Random) -> tuple[Message, Message]:
        asked = f"{_text(draw, _length(draw, settings.question_words))} {_filled(draw, _QUESTIONS)}"
        return Message("user", asked), Message("assistant", _text(draw, _length(draw, settings.answer_words)))

    def messages(draw: random.Random) -> tuple[Message, ...]:
        return tuple(itertools.chain.from_iterable(turn(draw) for _ in range(_length(draw, settings.turns))))

    return _conversations("chat", settings.num_conversations, seed, messages)


def qa_conversations(settings: QaSettings, seed: int) -> list[Conversation]:
    """Conversations `qa0`, ... of one question: the context first, then the question."""
    weights = list(
        itertools.accumulate((k + 1) ** -settings.zipf_exponent for k in range(settings.num_contexts))
    )
    library = random.Random(f"{seed} qa contexts")
    contexts = [_text(library, _length(library, settings.context_words)) for _ in weights]

    def messages(draw: random.Random) -> tuple[Message, ...]:
        (context,) = draw.choices(contexts, cum_weights=weights)
        answer = _text(draw, _length(draw, settings.answer_words))
        return Message("user", f"{context}\n\nQuestion: {_filled(draw, _QUESTIONS)}"), Message(
            "assistant", answer
        )

    return _conversations("qa", settings.num_requests, seed, messages)


def summarization_conversations(settings: SummarizationSettings, seed: int) -> list[Conversation]:
    """Conversations `summarization0`, ... of one request: the instruction, then the document."""
    documents: list[str] = []

    def messages(draw: random.Random) -> tuple[Message, ...]:
        if documents and draw.random() < settings.again_share:
            document = draw.choice(documents)
        else:
            document = _text(draw, _length(draw, settings.document_words))
            documents.append(document)
        summary = _text(draw, _length(draw, settings.summary_words))
        return Message("user", INSTRUCTION + document), Message("assistant", summary)

    return _conversations("summarization", settings.num_requests, seed, messages)


def _conversations(
    name: str, count: int, seed: int, messages: Callable[[random.Random], tuple[Message, ...]]
) -> list[Conversation]:
    draw = random.Random(f"{seed} {name}")
    return [Conversation(f"{name}{i}", i, messages(draw)) for i in range(count)]


def _at_least(settings: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not least <= value < math.inf:
            raise UserError(f"{name} of a synthetic workload must be at least {least}, not {value}")


def _text(draw: random.Random, num_words: int) -> str:
    """Whole sentences in paragraphs, until there are `num_words` words."""
    sentences, count = [_filled(draw, _PATTERNS)], 0
    while (count := count + sentences[-1].count(" ") + 1) < num_words:
        sentences.append(_filled(draw, _PATTERNS))
    starts = range(0, len(sentences), _SENTENCES_PER_PARAGRAPH)
    return "\n\n".join(" ".join(sentences[at : at + _SENTENCES_PER_PARAGRAPH]) for at in starts)


def _length(draw: random.Random, mean: float, least: int = 1) -> int:
    """A length of at least `least` with an exponential tail, as prompts have, and the given mean."""
    return least + round(draw.expovariate(1 / max(mean - least, 1e-9)))


def _filled(draw: random.Random, patterns: Sequence[str]) -> str:
    """One of the patterns with words in its gaps."""
    pattern, link = draw.choice(patterns), draw.choice(LINKS)
    return pattern.format(
        a=draw.choice(ADJECTIVES),
        b=draw.choice(ADJECTIVES),
        n=draw.choice(NOUNS),
        m=draw.choice(NOUNS),
        o=draw.choice(NOUNS),
        v=draw.choice(VERBS),
        l=link,
        L=link.capitalize(),
    )


def synthetic_conversations(workload: str, count: int, seed: int) -> list[Conversation]:
    """`count` conversations of one of `WORKLOADS`, with the default settings."""
    if workload == QA:
        return qa_conversations(QaSettings(num_requests=count), seed)
    if workload == SUMMARIZATION:
        return summarization_conversations(SummarizationSettings(num_requests=count), seed)
    return chat_conversations(ChatSettings(num_conversations=count), seed)


def interleave(
    logs: Sequence[Iterable[TraceRow]], pattern: Sequence[str] | None = None
) -> Iterator[TraceRow]:
    """One log of several, each sorted by time.

    Without a pattern, by arrival; at the same time, the earlier log's row comes first. A pattern
    is a round of workload names: each takes its workload's next row, if there is one. The rows
    then get the logs' arrival times in the new order, so that time still runs forwards; the
    delays between turns change.
    """
    if pattern is None:
        yield from heapq.merge(*logs, key=lambda row: row.timestamp)
        return
    rows = [row for log in logs for row in log]
    waiting: dict[str, collections.deque[TraceRow]] = collections.defaultdict(collections.deque)
    for row in rows:
        waiting[row.workload].append(row)
    missing = sorted(set(waiting).symmetric_difference(pattern))
    if missing:
        raise UserError(
            f"the pattern and the workloads differ in {', '.join(map(repr, missing))}; "
            "name each workload of the traces at least once, and no other"
        )
    times = iter(sorted(row.timestamp for row in rows))
    for name in itertools.cycle(pattern):
        if waiting[name]:
            yield dataclasses.replace(waiting[name].popleft(), timestamp=next(times))
        elif not any(waiting.values()):
            return
