"""Synthetic conversations that share context in the ways that matter to a prefix cache.

    chat            turns whose history grows; nothing shared between conversations
    qa              short questions, each behind one of a few contexts, some asked for more often
    summarization   long documents behind one instruction; a few are asked for again

All text is our own (`synthetic_text`), so these show how a cache reacts to a pattern of
sharing and support no claim about what people ask. Knows no arrival time: `RequestGenerator`
gives them one.

    conversations = qa_conversations(QaSettings(num_requests=100, num_contexts=5), seed=42)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable

from dsatrace.errors import UserError
from dsatrace.workloads.encoding import Message
from dsatrace.workloads.sharegpt import Conversation
from dsatrace.workloads.synthetic_text import length, question, text

INSTRUCTION = "Summarize the following document in one short paragraph. Keep names and order.\n\n"


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """Lengths are means, in words, with an exponential tail; so is the number of human turns."""

    num_conversations: int = 1000
    turns: float = 4.0
    question_words: float = 40.0
    answer_words: float = 150.0

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_conversations", "turns", "question_words", "answer_words")


@dataclasses.dataclass(frozen=True)
class QaSettings:
    """The k-th context is asked about with a probability proportional to k ** -zipf_exponent."""

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
    """`again_share` of the requests ask for a document that an earlier one had, any with equal chance."""

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
        asked = f"{text(draw, length(draw, settings.question_words))} {question(draw)}"
        return Message("user", asked), Message("assistant", text(draw, length(draw, settings.answer_words)))

    def messages(draw: random.Random) -> tuple[Message, ...]:
        return tuple(itertools.chain.from_iterable(turn(draw) for _ in range(length(draw, settings.turns))))

    return _conversations("chat", settings.num_conversations, seed, messages)


def qa_conversations(settings: QaSettings, seed: int) -> list[Conversation]:
    """Conversations `qa0`, ... of one question: the context first, then the question."""
    weights = list(
        itertools.accumulate((k + 1) ** -settings.zipf_exponent for k in range(settings.num_contexts))
    )
    library = random.Random(f"{seed} qa contexts")
    contexts = [text(library, length(library, settings.context_words)) for _ in weights]

    def messages(draw: random.Random) -> tuple[Message, ...]:
        (context,) = draw.choices(contexts, cum_weights=weights)
        answer = text(draw, length(draw, settings.answer_words))
        return Message("user", f"{context}\n\nQuestion: {question(draw)}"), Message("assistant", answer)

    return _conversations("qa", settings.num_requests, seed, messages)


def summarization_conversations(settings: SummarizationSettings, seed: int) -> list[Conversation]:
    """Conversations `summarization0`, ... of one request: the instruction, then the document."""
    documents: list[str] = []

    def messages(draw: random.Random) -> tuple[Message, ...]:
        if documents and draw.random() < settings.again_share:
            document = draw.choice(documents)
        else:
            document = text(draw, length(draw, settings.document_words))
            documents.append(document)
        summary = text(draw, length(draw, settings.summary_words))
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
