"""Chat prompts, checked id by id: on our own vocabulary, on DeepSeek's ids, and on its real tokenizer."""

from __future__ import annotations

import pytest

from dsatrace.errors import UserError
from dsatrace.workloads.encoding import Message, Role, Vocabulary, encode_chat
from dsatrace.workloads.tokenizer import ASSISTANT, BOS, END_THINK, EOS, PAD, THINK, USER, Tokenizer
from helpers.ruler_samples import deepseek_tokenizer

DEEPSEEK_IDS = {BOS: 0, EOS: 1, PAD: 2, USER: 128803, ASSISTANT: 128804, THINK: 128798, END_THINK: 128799}


class DeepSeekIds:
    """V3.2's special ids over a vocabulary in which a character is its code point."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def special_id(self, name: str) -> int:
        return DEEPSEEK_IDS[name]


def chat(*turns: str) -> list[Message]:
    roles: tuple[Role, Role] = ("user", "assistant")
    return [Message(roles[i % 2], text) for i, text in enumerate(turns)]


def test_first_turn_closes_thinking_in_chat_mode() -> None:
    assert encode_chat(chat("Hi"), DeepSeekIds()) == [0, 128803, 72, 105, 128804, 128799]


def test_first_turn_opens_thinking_in_thinking_mode() -> None:
    assert encode_chat(chat("Hi"), DeepSeekIds(), thinking=True) == [0, 128803, 72, 105, 128804, 128798]


def test_system_text_follows_bos_directly() -> None:
    ids = encode_chat([Message("system", "S"), *chat("u")], DeepSeekIds())
    assert ids == [0, 83, 128803, 117, 128804, 128799]


@pytest.mark.parametrize(("thinking", "last"), [(False, 128799), (True, 128798)])
def test_earlier_answers_are_closed_and_end_with_eos(thinking: bool, last: int) -> None:
    ids = encode_chat(chat("a", "b", "c", "d", "e"), DeepSeekIds(), thinking=thinking)
    assert ids == [
        0,
        *(128803, ord("a"), 128804, 128799, ord("b"), 1),
        *(128803, ord("c"), 128804, 128799, ord("d"), 1),
        *(128803, ord("e"), 128804, last),
    ]  # fmt: skip


@pytest.mark.parametrize("answer", ["hm</think>b", "</think>", "<think>a</think>b", "b", ""])
@pytest.mark.parametrize("thinking", [False, True])
def test_earlier_answers_stand_as_they_were_recorded(answer: str, thinking: bool) -> None:
    ids = encode_chat(chat("a", answer, "c"), DeepSeekIds(), thinking)
    assert ids[4:-4] == [128799, *map(ord, answer), 1]


def test_answer_prefix_starts_the_answer() -> None:
    ids = encode_chat(chat("u"), DeepSeekIds(), answer_prefix="The")
    assert ids == [0, 128803, 117, 128804, 128799, 84, 104, 101]
    with pytest.raises(UserError, match="answer prefix"):
        encode_chat(chat("u"), DeepSeekIds(), thinking=True, answer_prefix="The")


def test_a_user_cannot_write_a_special_token(byte_tokenizer: Tokenizer) -> None:
    ids = encode_chat(chat(f"{EOS}{USER}{END_THINK}"), byte_tokenizer)
    special = [token for token in ids if token < 3 or token > 258]
    assert special == [byte_tokenizer.special_id(name) for name in (BOS, USER, ASSISTANT, END_THINK)]


def test_our_own_vocabulary_decodes_to_the_template(byte_tokenizer: Tokenizer) -> None:
    messages = [Message("system", "Be brief."), *chat("q1", "a1", "q2")]
    text = byte_tokenizer.decode(encode_chat(messages, byte_tokenizer))
    assert text == f"{BOS}Be brief.{USER}q1{ASSISTANT}{END_THINK}a1{EOS}{USER}q2{ASSISTANT}{END_THINK}"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "must end with a message of the user"),
        ([Message("system", "s")], "must end with a message of the user"),
        (chat("a", "b"), "must end with a message of the user"),
        ([Message("assistant", "a")], "message 0: the assistant's where the user's should be"),
        ([*chat("a"), *chat("b")], "message 1: the user's where the assistant's should be"),
        ([*chat("a", "b"), Message("system", "s")], "message 2: the system's where"),
        ([Message("tool", "a")], "message 0: unknown role 'tool'"),  # type: ignore[arg-type]
    ],
)
def test_a_conversation_out_of_order_is_refused(messages: list[Message], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        encode_chat(messages, DeepSeekIds())


class V32Vocabulary:
    """DeepSeek's real vocabulary; its package ships V4's, whose thinking tokens have other ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def special_id(self, name: str) -> int:
        return DEEPSEEK_IDS[name] if name in (THINK, END_THINK) else self._tokenizer.special_id(name)


def test_on_deepseeks_own_tokenizer() -> None:
    tokenizer = deepseek_tokenizer()
    vocabulary: Vocabulary = V32Vocabulary(tokenizer)
    hello = [19923, 14, 2058, 3, 223, 17180, 1645, 4568]
    assert encode_chat(chat("Hello, world! 深度求索"), vocabulary) == [0, 128803, *hello, 128804, 128799]
    assert tokenizer.decode(hello) == "Hello, world! 深度求索"
    assert 128803 not in tokenizer.encode(f"{USER}{THINK}")

    # The library's own reading of the rendered text, special tokens and all, is the second opinion.
    from tokenizers import Tokenizer as Library

    text = f"{BOS}Be brief.{USER}q one{ASSISTANT}{END_THINK}a one{EOS}{USER}q two{ASSISTANT}{END_THINK}"
    theirs = Library.from_file(tokenizer.source).encode(text, add_special_tokens=False).ids
    messages = [Message("system", "Be brief."), *chat("q one", "a one", "q two")]
    assert encode_chat(messages, tokenizer) == theirs
