"""A conversation as the text of a prompt: in DeepSeek's chat form, or as a plain transcript.

The chat form is that of `encode_chat` with its special tokens written out. Read back by
`split_chat_text`, it gives the very ids of `encode_chat`, so a log can hold text and lose
nothing. Knows no conversation's source and encodes nothing.

    formatter = ChatTemplateFormatter(tokenizer)       # <bos><User>Hi<Assistant></think>Hello<eos>
    formatter = ChatTemplateFormatter()                # Human: Hi\\n\\nAssistant: Hello
    formatter.format_conversation([{"from": "human", "value": "Hi"}])
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from dsatrace.errors import UserError
from dsatrace.workloads.chat import JinjaForm
from dsatrace.workloads.encoding import SPECIAL_TOKENS, Message, Role, deepseek_pieces
from dsatrace.workloads.sharegpt import ROLES, Conversation
from dsatrace.workloads.tokenizer import BOS, END_THINK

SPEAKERS: dict[Role, str] = {"system": "System", "user": "Human", "assistant": "Assistant"}
CUE = f"{SPEAKERS['assistant']}:"  # a transcript's prompt ends on it; the answer follows after a space

_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_SPEAKER = re.compile(rf"\n\n(?=(?:{'|'.join(SPEAKERS.values())}):)")

Turns = Conversation | Sequence[Message | Mapping[str, str]]


@runtime_checkable
class _DeepSeekVocabulary(Protocol):
    def special_id(self, name: str) -> int: ...


@runtime_checkable
class _TemplateTokenizer(Protocol):
    """As `transformers` has it."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: object) -> object: ...


class ChatTemplateFormatter:
    """Writes turns as one text, up to where the next answer begins if the user spoke last.

    Without a tokenizer: a transcript of `Human: ...` and `Assistant: ...` paragraphs. With one of
    ours: DeepSeek's chat form, thinking closed at once; a special token's name inside a message
    gets a space after its `<`, so that no message can contain one. With a `JinjaForm` that, so too.
    With a `transformers` tokenizer: its chat template.
    """

    def __init__(self, tokenizer: object | None = None) -> None:
        self._template: _TemplateTokenizer | None = None
        self._deepseek = False
        self._form = tokenizer if isinstance(tokenizer, JinjaForm) else None
        if self._form is not None:
            return
        if isinstance(tokenizer, _DeepSeekVocabulary):
            for name in SPECIAL_TOKENS:
                tokenizer.special_id(name)  # raises a UserError for a vocabulary of another family
            self._deepseek = True
        elif isinstance(tokenizer, _TemplateTokenizer) and getattr(tokenizer, "chat_template", None):
            self._template = tokenizer
        elif tokenizer is not None:
            raise UserError(
                f"a {type(tokenizer).__name__} has no chat form; give a tokenizer of DeepSeek-V3.1 or V3.2, "
                "one with a chat template, or none for a plain transcript"
            )

    def format_conversation(self, turns: Turns) -> str:
        """The text of `turns`: messages, mappings of `role` and `content`, or ShareGPT's `from` and `value`.

        Raises a `UserError` if there are none, if one has no text, or if its speaker is unknown.
        """
        messages = _messages(turns)
        if self._form is not None:
            return self._form.text(messages, is_open=messages[-1].role != "assistant")
        if self._template is not None:
            rows = [{"role": message.role, "content": message.content} for message in messages]
            open_end = messages[-1].role == "user"
            return str(
                self._template.apply_chat_template(rows, tokenize=False, add_generation_prompt=open_end)
            )
        return _deepseek(messages) if self._deepseek else _transcript(messages)


def split_chat_text(text: str, special: re.Pattern[str] | None = None) -> Iterator[tuple[str, bool]]:
    """Pieces of a prompt that can each be encoded alone, and whether a piece is a special token.

    Those that `special` finds are, if it is given. Else a text that begins with DeepSeek's
    beginning-of-sentence token is in its chat form, and in any other text special tokens' names are
    text. Such a transcript is cut where a speaker's name begins a line: byte-level vocabularies never
    join a line's end with the letter behind it, so the pieces' ids are those of the whole. No piece is
    empty.
    """
    if special is None and text.startswith(BOS):
        special = _SPECIAL
    if special is not None:
        at = 0
        for match in special.finditer(text):
            if match.start() > at:
                yield text[at : match.start()], False
            yield match.group(), True
            at = match.end()
    else:
        at = 0
        for match in _SPEAKER.finditer(text):
            yield text[at : match.end()], False
            at = match.end()
    if at < len(text):
        yield text[at:], False


def _deepseek(messages: Sequence[Message]) -> str:
    """A special token's name in a message gets a space after its `<`."""
    text = "".join(
        piece if special else _SPECIAL.sub(lambda match: f"< {match.group()[1:]}", piece)
        for piece, special in deepseek_pieces(messages)
    )
    return text + END_THINK if messages[-1].role == "user" else text


def _transcript(messages: Sequence[Message]) -> str:
    parts = [f"{SPEAKERS[message.role]}: {message.content}" for message in messages]
    if messages[-1].role == "user":
        parts.append(CUE)
    return "\n\n".join(parts)


def _messages(turns: Turns) -> list[Message]:
    given = turns.messages if isinstance(turns, Conversation) else turns
    messages = [_message(i, turn) for i, turn in enumerate(given)]
    if not messages:
        raise UserError("a conversation without turns cannot be formatted; leave it out")
    return messages


def _message(number: int, turn: Message | Mapping[str, str]) -> Message:
    if isinstance(turn, Message):
        return turn
    speaker, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if speaker not in ROLES or not isinstance(text, str):
        what = "no text" if speaker in ROLES else f"the speaker {speaker!r}"
        raise UserError(f"turn {number} has {what}; known speakers are {', '.join(ROLES)}")
    return Message(ROLES[speaker], text)
