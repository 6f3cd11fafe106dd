"""Rows of text to token ids, with a tokenizer or with the built-in vocabulary of whole words.

A message is encoded once, even if many prompts repeat it: a prompt is cut where cutting changes
no id (`split_chat_text`), and the ids of the pieces are kept while the conversation goes on. New
pieces are encoded on all cores, which is the tokenizer's own work.
The ids of a prompt in DeepSeek's chat form are those of `encode_chat`. Knows no cache.

    vocabulary = open_vocabulary(Path("tokenizer.json")).vocabulary
    requests = tokenize_rows(read_trace_rows("trace.jsonl"), vocabulary)
"""

from __future__ import annotations

import dataclasses
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from dsatrace.errors import UserError
from dsatrace.study.requests import Progress, RequestsBuilder, StudyRequests
from dsatrace.workloads.chat import JinjaForm, form_of
from dsatrace.workloads.chat_format import CUE, ChatTemplateFormatter, split_chat_text
from dsatrace.workloads.encoding import SPECIAL_TOKENS, Vocabulary
from dsatrace.workloads.tokenizer import BOS, PACKAGE, Tokenizer, choose_tokenizer, packaged_file
from dsatrace.workloads.trace_rows import TraceRow

WORDS = "words"
Piece = tuple[str, bool]
"""A text that is encoded by itself, and whether it is a special token."""
Item = TypeVar("Item")
_MAX_KEPT_CHARS = 1 << 25
_BATCH_CHARS = 1 << 20
_WORD = re.compile(r" ?\w+|\s+(?!\w)|[^\w\s]|\s")


class WordVocabulary:
    """A token per word or mark, where there is no tokenizer. It grows with what it encodes.

    Ids are given in order of first use, so they mean nothing outside one process. On the English
    of the seeded workloads it counts as many tokens as DeepSeek's vocabulary, within a few per
    cent; on code or Chinese it is far off. (One byte per token would count five times as many.)
    """

    source = "the built-in vocabulary of whole words"

    def __init__(self) -> None:
        self._special = {name: token_id for token_id, name in enumerate(SPECIAL_TOKENS)}
        self._words: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens in it are text like any other."""
        words, first = self._words, len(self._special)
        return [first + words.setdefault(word, len(words)) for word in _WORD.findall(text)]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return list(map(self.encode, texts))

    def special_id(self, name: str) -> int:
        """The id of a special token of DeepSeek's chat form, by its text."""
        return self._special[name]


@dataclasses.dataclass(frozen=True)
class NamedVocabulary:
    """A tokenizer, its prompt formatter, and its entry in the manifest."""

    vocabulary: Vocabulary
    formatter: ChatTemplateFormatter
    label: dict[str, str]


def open_vocabulary(spec: str | Path | None = None, template: Path | None = None) -> NamedVocabulary:
    """As the runners take it: a `tokenizer.json`, its folder, or a hub name `owner/name[@revision]`.

    `PACKAGE` stands for the vocabulary of that package, `WORDS` for the built-in one of whole words;
    None for the package's if it is installed, else for words. Prompts have the form that `form_of`
    chooses; without any, they are plain transcripts.
    """
    spec = spec or (WORDS if packaged_file() is None else PACKAGE)
    if spec == WORDS:
        if template is not None:
            raise UserError(f"--chat-template {template}: needs a real tokenizer; give one with --tokenizer")
        words = WordVocabulary()
        label = {"name": "built-in words: a token per word or mark", "unit": "word"}
        return NamedVocabulary(words, ChatTemplateFormatter(words), label)
    tokenizer = choose_tokenizer(str(spec))
    label = {"name": str(spec), "sha256": tokenizer.digest}
    form = form_of(tokenizer, template)
    if isinstance(form, JinjaForm):
        formatter = ChatTemplateFormatter(form)
        return NamedVocabulary(TemplateVocabulary(tokenizer), formatter, label | {"form": form.name})
    if form is not None:
        return NamedVocabulary(
            tokenizer, ChatTemplateFormatter(tokenizer), label | {"form": "DeepSeek's chat form"}
        )
    lines = "no chat template: Human: and Assistant: lines"
    return NamedVocabulary(tokenizer, ChatTemplateFormatter(), label | {"form": lines})


class TemplateVocabulary:
    """A vocabulary whose prompts its own chat template wrote: names of its added tokens are tokens there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode, self.encode_all = tokenizer.encode, tokenizer.encode_all
        self.special_id, self.names = tokenizer.special_id, tokenizer.added_names


class PieceEncoder:
    """Encodes prompts and responses, a piece that is used again once.

    Forgets a piece when `_MAX_KEPT_CHARS` characters of other pieces came after it, or twice as many.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._names = vocabulary.names if isinstance(vocabulary, TemplateVocabulary) else None
        self._kept: dict[str, array[int]] = {}
        self._older: dict[str, array[int]] = {}
        self._num_kept_chars = 0

    def prompt(self, text: str) -> array[int]:
        """Token ids. Special tokens are recognized only in a text that begins with DeepSeek's first one."""
        pieces = list(split_chat_text(text, self._names))
        self._encode(pieces)
        return self._joined(pieces)

    def response(self, prompt: str, text: str) -> array[int]:
        """Token ids of an answer as they continue the prompt. In a transcript a space comes before it."""
        pieces = _answer(prompt, text)
        self._encode(pieces)
        return self._joined(pieces)

    def encoded(
        self, texts: Iterable[tuple[Item, str, str]]
    ) -> Iterator[tuple[Item, array[int], array[int]]]:
        """Of each (item, prompt, response) the item and both ids; pieces are encoded many at a time."""
        batch: list[tuple[Item, list[Piece], list[Piece]]] = []
        num_chars = 0
        for item, prompt, response in texts:
            batch.append((item, list(split_chat_text(prompt, self._names)), _answer(prompt, response)))
            num_chars += len(prompt) + len(response)
            if num_chars > _BATCH_CHARS:
                yield from self._encoded(batch)
                batch, num_chars = [], 0
        yield from self._encoded(batch)

    def _encoded(
        self, batch: list[tuple[Item, list[Piece], list[Piece]]]
    ) -> list[tuple[Item, array[int], array[int]]]:
        self._encode(piece for _, *both in batch for pieces in both for piece in pieces)
        return [(item, self._joined(prompt), self._joined(response)) for item, prompt, response in batch]

    def _encode(self, pieces: Iterable[Piece]) -> None:
        """Puts the ids of all these pieces into `_kept`."""
        if self._num_kept_chars > _MAX_KEPT_CHARS:
            self._older, self._kept, self._num_kept_chars = self._kept, {}, 0
        texts = {text: None for text, special in pieces if not special and text not in self._kept}
        new = [text for text in texts if text not in self._older]
        self._kept.update((text, self._older[text]) for text in texts if text in self._older)
        if new:
            ids = self._vocabulary.encode_all(new)
            self._kept.update(zip(new, (array("i", each) for each in ids), strict=True))
        self._num_kept_chars += sum(map(len, texts))

    def _joined(self, pieces: Iterable[Piece]) -> array[int]:
        ids = array("i")
        for text, special in pieces:
            if special:
                ids.append(self._vocabulary.special_id(text))
            else:
                ids.extend(self._kept[text])
        return ids


def _answer(prompt: str, text: str) -> list[Piece]:
    in_transcript = prompt.endswith(CUE) and not prompt.startswith(BOS)
    return [(f" {text}" if in_transcript else text, False)] if text else []


def tokenize_rows(
    rows: Iterable[TraceRow], vocabulary: Vocabulary, progress: Progress | None = None
) -> StudyRequests:
    """Every row as a request. An id under another workload or mode is another conversation.

    Raises a `UserError` for a prompt without a token.
    """
    builder = RequestsBuilder(progress=progress)
    texts = ((row, row.prompt, row.response) for row in rows)
    for row, prompt, response in PieceEncoder(vocabulary).encoded(texts):
        conversation = (row.workload, row.mode, row.conversation_id) if row.conversation_id else ()
        builder.add(
            row.timestamp,
            prompt,
            response,
            conversation=conversation,
            turn=row.turn_index,
            workload=row.workload,
            mode=row.mode,
            recorded=row.recorded,
        )
    if not len(builder):
        raise UserError("the trace holds no request; check what its filters left")
    return builder.build()
