"""ShareGPT: every oddity of the file is handled and counted, and the chat template takes what comes out."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.workloads.encoding import Message, encode_chat
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.samples import sample_file
from dsatrace.workloads.sharegpt import HUGE_VALUE_CHARS, ODDITIES, ROLES, Conversation, ShareGPTLoader
from dsatrace.workloads.tokenizer import Tokenizer
from helpers.real_data import real_file

EDGE_CASES = "sharegpt/ShareGPT_V3_edge_cases.json"


class Characters:
    """A vocabulary of single characters, its special tokens negative."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def special_id(self, name: str) -> int:
        return -len(name)


def entries(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


def load(tmp_path: Path, *conversations: Any, **options: Any) -> ShareGPTLoader:
    file = tmp_path / "chats.json"
    rows = [{"id": f"c{i}", "conversations": turns} for i, turns in enumerate(conversations)]
    file.write_text(json.dumps(rows))
    return ShareGPTLoader(file, **options)


def shown(loader: ShareGPTLoader) -> dict[str, int]:
    """The counts of oddities that are not zero."""
    return {name: count for name, count in loader.summary().items() if count and name in ODDITIES}


@pytest.mark.parametrize(
    ("turns", "kept", "oddities"),
    [
        ([("human", "q"), ("gpt", "a")], "user:q assistant:a", set()),
        ([("user", "q"), ("bing", "a"), ("human", "r"), ("bard", "b")],
         "user:q assistant:a user:r assistant:b", {"odd_role"}),
        ([("system", "s"), ("human", "q"), ("chatgpt", "a")], "system:s user:q assistant:a", {"odd_role"}),
        ([("gpt", "z"), ("human", "q"), ("gpt", "a")], "user:q assistant:a", {"gpt_first"}),
        ([("system", "s"), ("gpt", "z"), ("human", "q")], "system:s user:q", {"gpt_first"}),
        ([("human", "q"), ("human", "r"), ("gpt", "a"), ("gpt", "b")], "user:q+r assistant:a+b",
         {"repeated_role"}),
        ([("system", "s"), ("system", "t"), ("human", "q")], "system:s+t user:q", {"repeated_role"}),
        ([("human", "q"), ("system", "s"), ("gpt", "a")], "user:q assistant:a", {"late_system"}),
        ([("human", "q"), ("gpt", "a"), ("human", " \n"), ("gpt", "b")], "user:q assistant:a+b",
         {"empty_value"}),
        ([("human", ""), ("gpt", "a"), ("human", "q")], "user:q", {"empty_value"}),
        ([("human", "q")], "user:q", {"single_entry"}),
        ([("gpt", "a")], "", {"single_entry", "gpt_first", "no_user_turn"}),
        ([("system", "s")], "", {"single_entry", "no_user_turn"}),
        ([("human", "")], "", {"single_entry", "empty_value", "no_user_turn"}),
        ([], "", {"empty"}),
    ],
)  # fmt: skip
def test_each_oddity_is_handled_and_counted(
    tmp_path: Path, turns: list[tuple[str, str]], kept: str, oddities: set[str]
) -> None:
    loader = load(tmp_path, entries(*turns))
    got = [
        " ".join(f"{message.role}:{message.content}" for message in conversation.messages)
        for conversation in loader
    ]
    assert got == ([kept.replace("+", "\n\n")] if kept else [])
    assert shown(loader) == dict.fromkeys(oddities, 1)


def test_huge_values_and_duplicate_ids_are_kept_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    rows = [("x", "q"), ("x", "z" * (HUGE_VALUE_CHARS + 1)), (7, "q"), ("7", "q"), (None, "q")]
    with file.open("w") as stream:
        for row_id, text in rows:
            row = {"id": row_id, "conversations": entries(("human", text), ("gpt", "a"))}
            if row_id is None:
                del row["id"]
            stream.write(json.dumps(row) + "\r\n")
    loader = ShareGPTLoader(file)
    conversations = loader.get_conversations()
    assert [conversation.conversation_id for conversation in conversations] == ["x", "x", "7", "7", "4"]
    assert [conversation.source_row for conversation in conversations] == [0, 1, 2, 3, 4]
    assert len(conversations[1].messages[0].content) == HUGE_VALUE_CHARS + 1
    assert shown(loader) == {"duplicate_id": 2, "huge_value": 1}


@pytest.mark.parametrize(
    ("conversations", "reason"),
    [
        (None, "column 'conversations': missing column"),
        ("text", "column 'conversations': not a list"),
        (["text"], "column 'conversations': not an object: entry 0"),
        ([{"value": "q"}], "column 'from': missing column"),
        ([{"from": "human"}], "column 'value': missing column"),
        ([{"from": "human", "value": None}], "column 'value': not a text"),
        ([{"from": "human", "value": "\ud800"}], "column 'value': lone surrogate"),
        ([{"from": "tool", "value": "q"}], "column 'from': unknown role: entry 0; known are human, user"),
    ],
)
def test_bad_rows_are_named_or_counted(tmp_path: Path, conversations: Any, reason: str) -> None:
    good = entries(("human", "q"))
    with pytest.raises(UserError) as caught:
        load(tmp_path, good, conversations).get_conversations()
    assert reason in str(caught.value) and "row 1 (byte " in str(caught.value)
    loader = load(tmp_path, good, conversations, good, bad_rows=BadRows("skip"))
    assert [conversation.source_row for conversation in loader] == [0, 2]
    assert loader.bad_rows.counts.total() == 1


def test_turn_modes() -> None:
    messages = (
        Message("system", "s"),
        Message("user", "q0"),
        Message("assistant", "a0"),
        Message("user", "q1"),
        Message("assistant", "a1"),
        Message("user", "q2"),
    )
    conversation = Conversation("c", 5, messages)
    (full,) = conversation.prompts("full")
    assert (full.prompt_id, full.turn, full.messages, full.answer) == ("row5", 2, messages, "")
    turns = list(conversation.prompts("per_user_turn"))
    assert [(turn.prompt_id, len(turn.messages), turn.answer) for turn in turns] == [
        ("row5.turn0", 2, "a0"),
        ("row5.turn1", 4, "a1"),
        ("row5.turn2", 6, ""),
    ]
    (full,) = Conversation("c", 5, messages[:5]).prompts()
    assert full.messages == messages[:4] and full.answer == "a1"
    with pytest.raises(UserError, match="unknown turn mode 'half'; use full or per_user_turn"):
        list(conversation.prompts("half"))  # type: ignore[arg-type]


def test_turns_of_a_conversation_share_their_prefix(byte_tokenizer: Tokenizer) -> None:
    for conversation in ShareGPTLoader(sample_file("sharegpt")):
        prompts = [
            encode_chat(prompt.messages, byte_tokenizer) for prompt in conversation.prompts("per_user_turn")
        ]
        for shorter, longer in itertools.pairwise(prompts):
            assert longer[: len(shorter)] == shorter


turns = st.lists(
    st.tuples(st.sampled_from(sorted(ROLES)), st.sampled_from(["", " ", "a", "b\n"])), max_size=12
)


@given(turns)
def test_whatever_was_shared_can_be_served(
    tmp_path_factory: pytest.TempPathFactory, chat: list[tuple[str, str]]
) -> None:
    loader = load(tmp_path_factory.getbasetemp(), entries(*chat))
    served = loader.get_conversations()
    spoken = [text for role, text in chat if ROLES[role] == "user" and text.strip()]
    assert len(served) == bool(spoken) == loader.counts["conversations"]
    for conversation in served:
        (full,) = conversation.prompts("full")
        assert encode_chat(full.messages, Characters())
        *_, last = conversation.prompts("per_user_turn")
        assert (last.messages, last.answer) == (full.messages, full.answer)
        said = [message.content for message in conversation.messages if message.role == "user"]
        assert "".join(said).replace("\n", "") == "".join(spoken).replace("\n", "")


def test_the_embedded_chats_are_plain() -> None:
    loader = ShareGPTLoader(sample_file("sharegpt"))
    assert len(loader.get_conversations()) == 8
    assert shown(loader) == {"single_entry": 1}
    assert sum(len(list(c.prompts("per_user_turn"))) for c in loader) == 17


def test_the_real_edge_cases() -> None:
    loader = ShareGPTLoader(real_file(EDGE_CASES))
    conversations = loader.get_conversations()
    assert loader.summary() == {
        "rows": 23,
        "conversations": 16,
        "empty": 3,
        "single_entry": 4,
        "gpt_first": 5,
        "odd_role": 4,
        "repeated_role": 3,
        "late_system": 0,
        "empty_value": 2,
        "huge_value": 0,
        "no_user_turn": 4,
        "duplicate_id": 3,
    }
    by_id = {conversation.conversation_id: conversation for conversation in conversations}
    roles = {key: [message.role for message in value.messages] for key, value in by_id.items()}
    assert roles["hRPPgZT_11"] == ["user", "assistant"] * 3  # began with gpt
    assert roles["kbvE3m4_0"] == ["system", "user", "assistant"]  # two human entries in a row
    assert roles["95NWF4s_0"] == ["system", "user", "assistant", "user", "assistant"]  # bard
    assert roles["J410gdS_38"] == ["user", "assistant", "user", "assistant"]  # an empty human entry
    assert len(by_id["JxHq6Gv_0"].messages) == 52  # of 54: one speaker thrice in a row
    for conversation in conversations:
        for prompt in conversation.prompts("per_user_turn"):
            assert encode_chat(prompt.messages, Characters())


@pytest.mark.parametrize(
    ("name", "num_rows"), [("ShareGPT_V3_tiny40.json", 40), ("fastchat_dummy_conversation.json", 500)]
)
def test_real_conversations_without_oddities(name: str, num_rows: int) -> None:
    file = real_file(f"sharegpt/{name}")
    loader = ShareGPTLoader(file)
    conversations = loader.get_conversations()
    assert len(conversations) == num_rows and not shown(loader)
    raw = json.loads(file.read_text())
    assert [[m.content for m in c.messages] for c in conversations] == [
        [entry["value"] for entry in row["conversations"]] for row in raw
    ]


def test_a_limit_counts_served_conversations() -> None:
    loader = ShareGPTLoader(sample_file("sharegpt"), max_conversations=2)
    assert [conversation.conversation_id for conversation in loader] == ["own_0", "own_1"]
    assert loader.counts["rows"] == 2
    assert len(loader.get_conversations()) == loader.counts["conversations"] == 2  # counts start anew
    with pytest.raises(UserError, match="max_conversations must be at least 1, not -1"):
        ShareGPTLoader(sample_file("sharegpt"), -1)
