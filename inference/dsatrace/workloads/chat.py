"""How a checkpoint is talked to: messages to the ids of a prompt, generated ids to an answer.

A vocabulary with DeepSeek's special tokens gets DeepSeek-V3.2's own form (`encoding.py`). Any
other gets the Jinja template named by `--chat-template`, else the one beside it; without
either, a prompt is the plain text of its messages. Knows no data set and no model.

    chat = choose_chat(tokenizer, Path("converted"))
    ids = chat.encode([Message("user", "Hello")])
    chat.answer(generated)                   # the ids after the thoughts, without end tokens
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from dsatrace.errors import UserError
from dsatrace.workloads.encoding import (
    SPECIAL_TOKENS,
    Message,
    Part,
    check_prompt,
    deepseek_parts,
    join_parts,
)
from dsatrace.workloads.tokenizer import END_THINK, Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
PLAIN_TEXT = "plain text"
SAID_OF_PLAIN_TEXT = (
    "prompts are plain text: the tokenizer brings no chat template; --chat-template names one"
)


class ChatForm(Protocol):
    """How messages are put together."""

    @property
    def name(self) -> str:
        """For the manifest."""

    def parts(self, messages: Sequence[Message], thinking: bool) -> list[Part]:
        """The conversation up to where the model's answer begins."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """One form with one vocabulary."""

    tokenizer: Tokenizer
    form: ChatForm
    stop_tokens: frozenset[int]
    thinking: bool = False  # the model thinks before it answers

    def __post_init__(self) -> None:
        if self.thinking and (isinstance(self.form, PlainForm) or self._end_think is None):
            lacks = "chat template" if isinstance(self.form, PlainForm) else f"token {END_THINK}"
            raise UserError(f"--thinking: {self.tokenizer.source} has no {lacks}; leave the flag out")

    @classmethod
    def deepseek(cls, tokenizer: Tokenizer, thinking: bool = False) -> Chat:
        """DeepSeek-V3.2's form; a `UserError` where the vocabulary lacks a token of it."""
        for name in SPECIAL_TOKENS:
            tokenizer.special_id(name)
        return cls(tokenizer, DeepSeekForm(tokenizer), frozenset({tokenizer.eos_id}), thinking)

    def encode(
        self,
        messages: Sequence[Message],
        answer_prefix: str = "",
        encode_text: Callable[[str], list[int]] | None = None,
    ) -> list[int]:
        """Ids of a conversation up to where the model's answer begins; the last message is the user's.

        `answer_prefix` is put into the model's mouth, only with thinking off. `encode_text`
        replaces the tokenizer for the messages, so that a text can be cut.
        """
        check_prompt(messages, self.thinking, answer_prefix)
        parts = self.form.parts(messages, self.thinking)
        ids = join_parts(parts, encode_text or self.tokenizer.encode)
        return ids + self.tokenizer.encode(answer_prefix)

    def frame(self) -> tuple[int, int]:
        """How many tokens the form puts before and after a single message of the user."""
        parts = self.form.parts([Message("user", "")], self.thinking)
        at = next(i for i, part in enumerate(parts) if isinstance(part, str))
        return sum(map(len, parts[:at])), sum(map(len, parts[at + 1 :]))

    def answer(self, generated: Sequence[int]) -> list[int] | None:
        """What follows the thoughts, without end tokens; None if the thoughts never ended.

        They end at the token for it; text that looks like it is another token.
        """
        if self.thinking:
            if self._end_think not in generated:
                return None
            generated = generated[generated.index(self._end_think) + 1 :]
        return self._without_stops(generated)

    def text(self, generated: Sequence[int]) -> str:
        """All that was generated, thoughts written out, without end tokens."""
        return self.tokenizer.decode(self._without_stops(generated))

    def as_generated(self, answer: str) -> tuple[int, ...]:
        """The ids that a model without a thought generates to say `answer`, for runs without a model."""
        ids = self.tokenizer.encode(answer)
        return (self._end_think, *ids) if self.thinking and self._end_think is not None else tuple(ids)

    @property
    def _end_think(self) -> int | None:
        return self.tokenizer.added_id(END_THINK)

    def _without_stops(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token not in self.stop_tokens]


@dataclasses.dataclass(frozen=True)
class DeepSeekForm:
    tokenizer: Tokenizer
    name: str = "deepseek_v32"

    def parts(self, messages: Sequence[Message], thinking: bool) -> list[Part]:
        return deepseek_parts(messages, self.tokenizer, thinking)


class PlainForm:
    """The messages' texts, joined by line ends."""

    name = PLAIN_TEXT

    def parts(self, messages: Sequence[Message], thinking: bool) -> list[Part]:
        return ["\n".join(message.content for message in messages)]


class JinjaForm:
    """A chat template, rendered by `transformers` in a sandbox with a mark in place of each message.

    So a special token's name is one in the template's own text and never in a message. A
    template that looks into a message, to trim it or to cut thoughts out of it, sees the mark;
    the text stays as it was written. Each text is encoded by itself: no token spans it and the
    template's own text. `thinking` reaches the template as `enable_thinking` and as `thinking`.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, source: Path, names: dict[str, str]) -> None:
        """`source` is the template's file; `names` are its names of the special tokens."""
        self.name = f"jinja {source.name} sha256:{hashlib.sha256(template.encode()).hexdigest()}"
        self._tokenizer = tokenizer
        self._template = template
        self._source = source
        self._names = names
        self.parts([Message("user", "")], thinking=False)  # raises now for a template that cannot be used

    def parts(self, messages: Sequence[Message], thinking: bool) -> list[Part]:
        return [
            messages[int(piece)].content if i % 2 else tuple(self._tokenizer.encode_markup(piece))
            for i, piece in enumerate(self._pieces(messages, thinking, is_open=True))
        ]

    def text(self, messages: Sequence[Message], is_open: bool) -> str:
        """The same as one text, where it `is_open` up to where the model's answer begins; thinking is off.

        A special token's name in a message gets a space after its first character, and is none then.
        """
        names = self._tokenizer.added_names
        return "".join(
            names.sub(lambda name: f"{name[0][0]} {name[0][1:]}", messages[int(piece)].content)
            if i % 2
            else piece
            for i, piece in enumerate(self._pieces(messages, False, is_open))
        )

    def _pieces(self, messages: Sequence[Message], thinking: bool, is_open: bool) -> list[str]:
        """Markup, a message's number, markup, and so on."""
        rows = [{"role": message.role, "content": _mark(i)} for i, message in enumerate(messages)]
        pieces = _MARK.split(self._render(rows, thinking, is_open))
        shown = set(map(int, pieces[1::2]))
        left_out = next((message for i, message in enumerate(messages) if i not in shown), None)
        if left_out is not None:
            raise UserError(
                f"{self._source}: the chat template leaves out a message of the {left_out.role}; "
                "name another with --chat-template"
            )
        return pieces

    def _render(self, rows: list[dict[str, str]], thinking: bool, is_open: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {**self._names, "enable_thinking": thinking, "thinking": thinking}
        try:
            rendered: Any = render_jinja_template(
                [rows], chat_template=self._template, add_generation_prompt=is_open, **options
            )
        except Exception as error:  # a template is a program: it may raise anything
            line = f" (line {error.lineno})" if hasattr(error, "lineno") else ""
            cause = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"{self._source}: the chat template fails{line}: {cause}; mend it, or name another "
                "with --chat-template"
            ) from error
        return str(rendered[0][0])


def choose_chat(
    tokenizer: Tokenizer,
    ckpt_path: Path | None = None,
    *,
    template: Path | None = None,
    thinking: bool = False,
) -> Chat:
    """How to talk with `tokenizer` to the checkpoint in `ckpt_path`; `template` is `--chat-template`.

    A template belongs to the vocabulary, so it is looked for in the tokenizer's own folder before
    the checkpoint's; end tokens belong to the weights, so the checkpoint's folder comes first.
    """
    own = _folder_of(tokenizer)
    of_checkpoint = [ckpt_path] if ckpt_path is not None else []
    deepseek = all(tokenizer.added_id(name) is not None for name in SPECIAL_TOKENS)
    if deepseek and template is None:
        return Chat.deepseek(tokenizer, thinking)
    folders = [*own, *of_checkpoint]
    form = _jinja_form(tokenizer, folders, template) or PlainForm()
    stop_tokens = (
        frozenset({tokenizer.eos_id}) if deepseek else _stop_tokens(tokenizer, [*of_checkpoint, *own])
    )
    return Chat(tokenizer, form, stop_tokens, thinking)


def form_of(tokenizer: Tokenizer, template: Path | None = None) -> ChatForm | None:
    """`template` if given, else DeepSeek's form for its vocabulary or the template beside it, else None."""
    if template is None and all(tokenizer.added_id(name) is not None for name in SPECIAL_TOKENS):
        return DeepSeekForm(tokenizer)
    return _jinja_form(tokenizer, _folder_of(tokenizer), template)


def _folder_of(tokenizer: Tokenizer) -> list[Path]:
    file = Path(tokenizer.source)
    return [file.parent] if file.is_file() else []


def _jinja_form(tokenizer: Tokenizer, folders: Sequence[Path], template: Path | None) -> JinjaForm | None:
    """`template` if given, else the first one in a folder."""
    settings = [
        (folder / "tokenizer_config.json", _json(folder / "tokenizer_config.json")) for folder in folders
    ]
    names: dict[str, str] = {}
    for _, values in reversed(settings):
        names |= _token_names(values)
    if template is not None:
        return JinjaForm(tokenizer, _text(template), template, names)
    for folder, (file, values) in zip(folders, settings, strict=True):
        if (folder / TEMPLATE_FILE).exists():
            return JinjaForm(tokenizer, _text(folder / TEMPLATE_FILE), folder / TEMPLATE_FILE, names)
        own = values.get("chat_template")
        if isinstance(own, str):
            return JinjaForm(tokenizer, own, file, names)
        if own is not None:
            raise UserError(
                f"{file}: its chat_template is no text; write the template you want to a file and "
                "name it with --chat-template"
            )
    return None


def _token_names(settings: dict[str, Any]) -> dict[str, str]:
    """A template's names of the special tokens: `bos_token`, `eos_token` and such."""
    found = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _stop_tokens(tokenizer: Tokenizer, folders: Sequence[Path]) -> frozenset[int]:
    """The end tokens that the checkpoint names."""
    for folder in folders:
        for name in ("generation_config.json", "config.json"):
            ids = _json(folder / name).get("eos_token_id")
            if ids is None:
                continue
            listed = ids if isinstance(ids, list) else [ids]
            if not listed or not all(type(token) is int and token >= 0 for token in listed):
                raise UserError(
                    f"{folder / name}: eos_token_id is {ids!r}; give a token id or a list of them"
                )
            return frozenset(listed)
    where = " and ".join(map(str, folders)) or tokenizer.source
    raise UserError(
        f"{where}: nothing says which token ends an answer; copy the checkpoint's generation_config.json, "
        "with its eos_token_id, beside its tokenizer.json"
    )


def _mark(number: int) -> str:
    """Stands for a message while a template is rendered: characters of no language."""
    return f"\ue000{number}\ue001"


_MARK = re.compile("\ue000([0-9]+)\ue001")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the chat template: {error.strerror}; check --chat-template"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no chat template: byte {error.start} is not UTF-8") from error


def _json(path: Path) -> dict[str, Any]:
    """The file's object; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot read it: {error}; restore or remove it") from error
    return values if isinstance(values, dict) else {}
