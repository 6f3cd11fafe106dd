"""Chat messages to token ids, in the form DeepSeek-V3.1 and V3.2 were trained on.

    <bos>{system}<User>{user}<Assistant></think>{answer}<eos><User>{user}<Assistant></think>

Text and special tokens meet as ids, so nothing a user writes can become a special token.
Knows no tool calls and no tokenizer of its own.

    encode_chat([Message("user", "Where is the needle?")], tokenizer, thinking=False)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

from dsatrace.errors import UserError
from dsatrace.workloads.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER

Role = Literal["system", "user", "assistant"]


class Vocabulary(Protocol):
    """What the encoder asks of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without special tokens."""

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

    `thinking` opens the answer with `<think>`, else thinking is closed at once. Earlier
    answers keep only what follows their thinking. `answer_prefix` is put into the model's
    mouth, as RULER asks, and goes with `thinking=False` only.
    """
    _check(messages)
    if thinking and answer_prefix:
        raise UserError("an answer prefix needs thinking off: the answer would start inside the thoughts")
    special = vocabulary.special_id
    ids = [special(BOS)]
    for message in messages:
        if message.role == "system":
            ids += vocabulary.encode(message.content)
        elif message.role == "user":
            ids += [special(USER), *vocabulary.encode(message.content), special(ASSISTANT)]
        else:
            thoughts, closed, answer = message.content.partition(END_THINK)
            answer = answer if closed else thoughts
            ids += [special(END_THINK), *vocabulary.encode(answer), special(EOS)]
    ids.append(special(THINK if thinking else END_THINK))
    if answer_prefix:
        ids += vocabulary.encode(answer_prefix)
    return ids


def _check(messages: Sequence[Message]) -> None:
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
