"""Chat messages to token ids, in the form DeepSeek-V3.1 and V3.2 were trained on.

    <bos>{system}<User>{user}<Assistant></think>{answer}<eos><User>{user}<Assistant></think>

Text and special tokens meet as ids, so no message can contain a special token: `</think>` in
a recorded answer is text like any other. Knows no tool calls.

    encode_chat([Message("user", "Where is the needle?")], tokenizer, thinking=False)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

from dsatrace.errors import UserError
from dsatrace.workloads.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER

Role = Literal["system", "user", "assistant"]
SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK)

Part = tuple[int, ...] | str
"""A part of a prompt: the form's own markup as ids, or a message's text."""


class Vocabulary(Protocol):
    """What the encoder asks of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without special tokens."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of each text."""

    def special_id(self, name: str) -> int:
        """The id of a special token, by its text."""


@dataclasses.dataclass(frozen=True)
class Message:
    role: Role
    content: str


def encode_chat(
    messages: Sequence[Message], vocabulary: Vocabulary, thinking: bool = False, answer_prefix: str = ""
) -> list[int]:
    """Ids of a conversation up to where the model's answer begins; the last message is the user's.

    `thinking` opens the answer with `<think>`; without it thinking is closed at once.
    `answer_prefix` is put into the model's mouth, as RULER asks, only without `thinking`.
    """
    check_prompt(messages, thinking, answer_prefix)
    parts = deepseek_parts(messages, vocabulary, thinking)
    return join_parts([*parts, answer_prefix], vocabulary.encode)


def deepseek_pieces(messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
    """The conversation in DeepSeek's form: texts, and whether each is a special token."""
    yield BOS, True
    for message in messages:
        if message.role == "system":
            yield message.content, False
        elif message.role == "user":
            yield from ((USER, True), (message.content, False), (ASSISTANT, True))
        else:
            yield from ((END_THINK, True), (message.content, False), (EOS, True))


def deepseek_parts(messages: Sequence[Message], vocabulary: Vocabulary, thinking: bool) -> list[Part]:
    """The same as parts, open where the model's answer begins."""
    pieces = [*deepseek_pieces(messages), (THINK if thinking else END_THINK, True)]
    return [(vocabulary.special_id(text),) if special else text for text, special in pieces]


def join_parts(parts: Sequence[Part], encode_text: Callable[[str], list[int]]) -> list[int]:
    """The ids of all parts; each text is encoded by itself."""
    return [token for part in parts for token in (encode_text(part) if isinstance(part, str) else part)]


def check_prompt(messages: Sequence[Message], thinking: bool, answer_prefix: str) -> None:
    """Raises `UserError` unless a model can be asked for the next message."""
    expected = "user"
    for i, message in enumerate(messages):
        if message.role not in ("system", "user", "assistant"):
            raise UserError(f"message {i}: unknown role {message.role!r}; use system, user or assistant")
        if message.role == "system" and i == 0:
            continue
        if message.role != expected:
            raise UserError(
                f"message {i}: the {message.role}'s where the {expected}'s should be; "
                "give at most one system message, then user and assistant in turn"
            )
        expected = "assistant" if expected == "user" else "user"
    if expected == "user":
        raise UserError("the conversation must end with a message of the user")
    if thinking and answer_prefix:
        raise UserError("an answer prefix needs thinking off: the answer would start inside the thoughts")
