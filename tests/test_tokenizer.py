"""Text to ids and back: bytes, special tokens, streaming, and every way a vocabulary may be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.workloads import tokenizer as specials
from dsatrace.workloads.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, write_byte_tokenizer

SPECIALS = [
    specials.BOS,
    specials.EOS,
    specials.PAD,
    specials.USER,
    specials.ASSISTANT,
    specials.THINK,
    specials.END_THINK,
]


def test_a_byte_is_a_token(byte_tokenizer: Tokenizer) -> None:
    text = "Hä? 🙂\n\x00 三"
    ids = byte_tokenizer.encode(text)
    assert ids == [byte + 3 for byte in text.encode()]
    assert byte_tokenizer.decode(ids) == text
    assert byte_tokenizer.vocab_size == 256 + len(SPECIALS) <= 384


def test_special_tokens_have_ids_of_their_own(byte_tokenizer: Tokenizer) -> None:
    ids = [byte_tokenizer.special_id(name) for name in SPECIALS]
    assert ids == [0, 1, 2, 259, 260, 261, 262]
    assert byte_tokenizer.eos_id == 1
    assert byte_tokenizer.decode(ids) == "".join(SPECIALS)


def test_special_text_of_a_user_stays_text(byte_tokenizer: Tokenizer) -> None:
    for name in SPECIALS:
        ids = byte_tokenizer.encode(f"a{name}b")
        assert not {byte_tokenizer.special_id(other) for other in SPECIALS} & set(ids)
        assert byte_tokenizer.decode(ids) == f"a{name}b"


def test_tokens_marked_not_special_stay_text_too(tmp_path: Path) -> None:
    definition = json.loads(write_byte_tokenizer(tmp_path).read_text())
    for token in definition["added_tokens"]:
        token["special"] = token["content"] == specials.BOS  # DeepSeek marks only some
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("<think>")) == len("<think>")
    assert tokenizer.special_id("<think>") == 261


def test_half_a_surrogate_pair_is_a_question_mark(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.decode(byte_tokenizer.encode("a\ud83db")) == "a?b"


@given(st.lists(st.integers(0, 300), max_size=40))
def test_stream_equals_decode_for_any_ids(ids: list[int]) -> None:
    tokenizer = Tokenizer(json.dumps(specials.byte_tokenizer_json()).encode(), "byte tokenizer")
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_stream_holds_a_character_until_it_is_whole(byte_tokenizer: Tokenizer) -> None:
    stream = byte_tokenizer.stream()
    assert [stream.push(token) for token in byte_tokenizer.encode("é🙂.")] == ["", "é", "", "", "", "🙂", "."]
    assert stream.flush() == ""
    assert stream.push(byte_tokenizer.encode("🙂")[0]) == ""
    assert stream.flush() == "\ufffd"


def test_digest_follows_the_file(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    file = write_byte_tokenizer(tmp_path)
    assert load_tokenizer(file).digest == byte_tokenizer.digest
    file.write_text(file.read_text() + "\n")
    assert load_tokenizer(file).digest != byte_tokenizer.digest


def test_transformers_gives_the_same_ids(tiny_hf: Path, byte_tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_hf)
    text = "One fish, zwei Fische, 三条鱼."
    assert theirs(text, add_special_tokens=False)["input_ids"] == byte_tokenizer.encode(text)
    assert theirs.eos_token_id == byte_tokenizer.eos_id


def test_a_vocabulary_larger_than_the_model_is_refused(byte_tokenizer: Tokenizer) -> None:
    check_vocabulary(byte_tokenizer, 263)
    with pytest.raises(UserError, match="ids up to 262, but the model's vocab_size is 262"):
        check_vocabulary(byte_tokenizer, 262)


def test_files_that_are_no_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.json: cannot read the tokenizer: No such file"):
        load_tokenizer(tmp_path)
    file = tmp_path / "other.json"
    for text in ("{", "[]", "{}"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"other\.json: not a tokenizer\.json"):
            load_tokenizer(file)
    definition = specials.byte_tokenizer_json()
    file.write_text(json.dumps({**definition, "decoder": None}))
    with pytest.raises(UserError, match="not a byte-level tokenizer"):
        load_tokenizer(file)
    file.write_text(json.dumps({**definition, "added_tokens": []}))
    with pytest.raises(UserError, match="has no token <think>"):
        load_tokenizer(file).special_id(specials.THINK)
