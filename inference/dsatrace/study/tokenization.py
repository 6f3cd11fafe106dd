"""Trace rows to token ids: each message is encoded once, however many prompts repeat it.

A prompt is cut where cutting changes no id (`split_chat_text`), and the pieces' ids are kept
while the conversation goes on. The ids of a prompt in DeepSeek's chat form are those of
`encode_chat`. Knows no cache.

    requests = tokenize_rows(read_trace_rows("trace.jsonl"), load_tokenizer("tokenizer.json"))
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

from dsatrace.errors import UserError
from dsatrace.study.requests import StudyRequests
from dsatrace.study.requests_builder import RequestsBuilder
from dsatrace.workloads.chat_format import CUE, split_chat_text
from dsatrace.workloads.encoding import Vocabulary
from dsatrace.workloads.tokenizer import BOS
from dsatrace.workloads.trace_rows import TraceRow

Progress = Callable[[int, int], None]
PROGRESS_EVERY_REQUESTS = 100
_MAX_KEPT_CHARS = 1 << 24


class PieceEncoder:
    """Encodes prompts and responses; keeps pieces up to `_MAX_KEPT_CHARS` characters, then begins anew."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._kept: dict[str, array[int]] = {}
        self._num_kept_chars = 0

    def prompt(self, text: str) -> array[int]:
        """Token ids; names of special tokens count as such only in a text that begins with DeepSeek's."""
        ids = array("i")
        for piece, special in split_chat_text(text):
            if special:
                ids.append(self._vocabulary.special_id(piece))
            else:
                ids.extend(self._encode(piece))
        return ids

    def response(self, prompt: str, text: str) -> array[int]:
        """Token ids of an answer as they continue the prompt: behind a transcript's cue, after a space."""
        in_transcript = prompt.endswith(CUE) and not prompt.startswith(BOS)
        return self._encode(f" {text}" if in_transcript and text else text)

    def _encode(self, text: str) -> array[int]:
        ids = self._kept.get(text)
        if ids is None:
            if self._num_kept_chars > _MAX_KEPT_CHARS:
                self._kept.clear()
                self._num_kept_chars = 0
            ids = self._kept[text] = array("i", self._vocabulary.encode(text))
            self._num_kept_chars += len(text)
        return ids


def tokenize_rows(
    rows: Iterable[TraceRow], vocabulary: Vocabulary, progress: Progress | None = None
) -> StudyRequests:
    """Every row as a request. One conversation id under two workloads or modes is two conversations.

    `progress` is told the numbers of requests and prompt tokens so far. Raises a `UserError`
    for a prompt that has no token.
    """
    encoder, builder = PieceEncoder(vocabulary), RequestsBuilder()
    for row in rows:
        builder.add(
            row.timestamp,
            encoder.prompt(row.prompt),
            encoder.response(row.prompt, row.response),
            conversation=_conversation(row),
            turn=row.turn_index,
            workload=row.workload,
            mode=row.mode,
        )
        if progress and len(builder) % PROGRESS_EVERY_REQUESTS == 0:
            progress(len(builder), builder.num_prompt_ids)
    if not len(builder):
        raise UserError("the trace holds no request; check what its filters left")
    if progress:
        progress(len(builder), builder.num_prompt_ids)
    return builder.build()


def _conversation(row: TraceRow) -> tuple[str, ...]:
    return (row.workload, row.mode, row.conversation_id) if row.conversation_id else ()
