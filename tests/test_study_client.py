"""The client: prompts' text, arrival times, the traces that a study compares, and their ids."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dsatrace
from dsatrace.errors import UserError
from dsatrace.study import tokenization
from dsatrace.study.accesses import write_accesses
from dsatrace.study.logs import Log
from dsatrace.study.prepare import (
    CONVERSATIONS,
    SHORT,
    TOO_FEW_TURNS,
    TOO_LONG,
    ClientSettings,
    limit_requests,
    prepare_traces,
)
from dsatrace.study.request_files import hash_id_rows
from dsatrace.study.requests import block_trace
from dsatrace.study.sources import Client, Source
from dsatrace.study.tokenization import PieceEncoder, open_vocabulary, tokenize_rows
from dsatrace.workloads.chat_format import SPECIAL_TOKENS, ChatTemplateFormatter, split_chat_text
from dsatrace.workloads.encoding import Message, encode_chat
from dsatrace.workloads.id_logs import BAILIAN, write_hash_ids
from dsatrace.workloads.request_generator import RequestGenerator, ThinkTime, num_turns
from dsatrace.workloads.samples import sample_file
from dsatrace.workloads.sharegpt import Conversation, ShareGPTLoader
from dsatrace.workloads.tokenizer import BOS, END_THINK, EOS, USER, Tokenizer
from dsatrace.workloads.trace_rows import MULTI_TURN, SINGLE_TURN, write_trace_rows
from helpers import ruler_samples
from helpers.byte_tokenizer import byte_tokenizer
from helpers.json_lines import read_json_lines, write_json_lines
from helpers.real_data import real_file

BYTES = byte_tokenizer()
TRANSCRIPT = ChatTemplateFormatter()


@pytest.fixture(scope="session")
def deepseek_tokenizer() -> Tokenizer:
    return ruler_samples.deepseek_tokenizer()


def chat(name: str, *texts: str, row: int = 0) -> Conversation:
    roles = itertools.cycle(("user", "assistant"))
    return Conversation(name, row, tuple(Message(next(roles), text) for text in texts))


texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    st.lists(
        st.sampled_from(
            ["Hi", " ", "\n", "\n\n", "Human:", "Assistant: ", ".", "猫", "x1", "'s", *SPECIAL_TOKENS]
        ),
        min_size=1,
        max_size=8,
    ).map("".join),
)  # fmt: skip
conversations = st.lists(texts, min_size=1, max_size=7).map(lambda turns: chat("c", *turns))


def test_the_client_is_importable_from_the_package() -> None:
    loader = dsatrace.ShareGPTLoader(sample_file("sharegpt"), max_conversations=3)
    generator = dsatrace.RequestGenerator(loader.get_conversations(), 2.0, True, 42)
    formatter = dsatrace.ChatTemplateFormatter()
    single = generator.generate_single_turn_traces(formatter)
    multi = generator.generate_multi_turn_traces(formatter, turn_delay=1.0)
    assert len(single) == 3 < len(multi)
    assert [row for row in multi if row.turn_index == 0] != single  # they differ in their mode alone
    assert [row.prompt for row in multi if row.turn_index == 0] == [row.prompt for row in single]


def test_a_transcript_names_its_speakers() -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"from": "gpt", "value": "Hello."},
        Message("user", "And?"),
    ]
    formatter = TRANSCRIPT
    assert formatter.format_conversation(turns[:3]) == "System: Be brief.\n\nHuman: Hi\n\nAssistant: Hello."
    assert formatter.format_conversation(turns).endswith("Assistant: Hello.\n\nHuman: And?\n\nAssistant:")


def test_the_chat_form_is_deepseeks() -> None:
    text = ChatTemplateFormatter(BYTES).format_conversation(chat("c", "Hi", "Hello.", f"{USER} me"))
    assert text == (
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>Hello.<｜end▁of▁sentence｜>"  # noqa: RUF001
        "<｜User｜>< ｜User｜> me<｜Assistant｜></think>"  # noqa: RUF001
    )


def test_an_answer_that_names_a_special_token_stands_whole() -> None:
    text = ChatTemplateFormatter(BYTES).format_conversation(chat("c", "Hi", "One </think> two", "And?"))
    assert f"{END_THINK}One < /think> two{EOS}" in text


def test_a_template_of_ones_own_is_used() -> None:
    class Template:
        chat_template = "{{ messages }}"

        def apply_chat_template(self, conversation: list[dict[str, str]], **options: object) -> str:
            return f"{[row['role'] for row in conversation]} {options}"

    text = ChatTemplateFormatter(Template()).format_conversation(chat("c", "q", "a", "r"))
    assert text == "['user', 'assistant', 'user'] {'tokenize': False, 'add_generation_prompt': True}"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "without turns"),
        ([{"from": "tool", "value": "x"}], "turn 0 has the speaker 'tool'"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "turn 1 has no text"),
    ],
)
def test_turns_that_cannot_be_formatted_are_named(turns: list[dict[str, str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TRANSCRIPT.format_conversation(turns)


def test_an_object_that_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="a dict has no chat form"):
        ChatTemplateFormatter({})


def plain(text: str) -> bool:
    return not any(name in text for name in SPECIAL_TOKENS)


def check_ids_are_those_of_encode_chat(conversation: Conversation, tokenizer: Tokenizer) -> None:
    formatter, encoder = ChatTemplateFormatter(tokenizer), PieceEncoder(tokenizer)
    for prompt in conversation.prompts("per_user_turn"):
        text = formatter.format_conversation(prompt.messages)
        ids = encoder.prompt(text).tolist()
        specials = [ids.count(tokenizer.special_id(name)) for name in (BOS, USER, EOS)]
        assert specials == [1, prompt.turn + 1, prompt.turn]  # whatever the messages hold
        if all(plain(message.content) for message in prompt.messages):
            assert ids == encode_chat(prompt.messages, tokenizer)


@given(conversations)
def test_a_prompts_text_gives_the_ids_of_the_chat_encoder(conversation: Conversation) -> None:
    check_ids_are_those_of_encode_chat(conversation, BYTES)


@given(conversation=conversations)
def test_the_same_with_real_merges(deepseek_tokenizer: Tokenizer, conversation: Conversation) -> None:
    check_ids_are_those_of_encode_chat(conversation, deepseek_tokenizer)


@given(conversation=conversations, transcript=st.booleans())
def test_cutting_a_prompt_changes_no_id(
    deepseek_tokenizer: Tokenizer, conversation: Conversation, transcript: bool
) -> None:
    tokenizer = deepseek_tokenizer
    text = ChatTemplateFormatter(None if transcript else tokenizer).format_conversation(conversation)
    pieces = list(split_chat_text(text))
    assert "".join(piece for piece, _ in pieces) == text
    if transcript:
        assert PieceEncoder(tokenizer).prompt(text).tolist() == tokenizer.encode(text)
        assert not any(special for _, special in pieces)


@given(conversations)
def test_the_next_prompt_continues_this_one_and_its_answer(conversation: Conversation) -> None:
    """What decode writes into the cache is what the next turn looks up."""
    rows = RequestGenerator([conversation]).generate_multi_turn_traces(ChatTemplateFormatter(BYTES))
    requests = tokenize_rows(rows, BYTES)
    for i in range(len(requests) - 1):
        if plain(rows[i].response):  # an answer's thoughts leave the history
            sofar = [*requests.prompt(i), *requests.response(i)]
            assert requests.prompt(i + 1)[: len(sofar)].tolist() == sofar


@given(conversations)
def test_the_next_prompt_of_a_transcript_continues_too(conversation: Conversation) -> None:
    rows = RequestGenerator([conversation]).generate_multi_turn_traces(TRANSCRIPT)
    requests = tokenize_rows(rows, BYTES)  # no merges, so none differs
    for i in range(len(requests) - 1):
        sofar = [*requests.prompt(i), *requests.response(i)]
        assert requests.prompt(i + 1)[: len(sofar)].tolist() == sofar


def test_single_turn_takes_each_first_human_turn() -> None:
    chats = [chat("a", "q0", "a0", "q1", "a1"), chat("b", "q2")]
    rows = RequestGenerator(
        chats, arrival_rate=4, use_poisson=False, workload="w"
    ).generate_single_turn_traces(TRANSCRIPT)
    assert [(row.prompt, row.response, row.conversation_id, row.turn_index) for row in rows] == [
        ("Human: q0\n\nAssistant:", "a0", "a", 0),
        ("Human: q2\n\nAssistant:", "", "b", 0),
    ]
    assert [row.timestamp for row in rows] == [0.0, 0.25]
    assert {(row.mode, row.workload) for row in rows} == {(SINGLE_TURN, "w")}


def test_turns_follow_at_the_delay_and_rows_stand_by_arrival() -> None:
    chats = [chat("a", *"qaqaqa"), chat("b", *"qaqa"), chat("b", *"qa", row=2)]
    generator = RequestGenerator(chats, arrival_rate=1, use_poisson=False)
    rows = generator.generate_multi_turn_traces(TRANSCRIPT, turn_delay=1.0)
    assert [(row.conversation_id, row.turn_index, row.timestamp) for row in rows] == [
        ("a", 0, 0), ("a", 1, 1), ("b", 0, 1), ("a", 2, 2), ("b", 1, 2), ("b#2", 0, 2),
    ]  # fmt: skip
    assert {row.mode for row in rows} == {MULTI_TURN}
    together = generator.generate_multi_turn_traces(TRANSCRIPT, turn_delay=0)
    assert [(row.conversation_id, row.turn_index) for row in together][:4] == [
        ("a", 0), ("a", 1), ("a", 2), ("b", 0),
    ]  # fmt: skip


def test_think_times_are_drawn_from_answers_and_a_distribution() -> None:
    chats = [chat(str(i), "q", "a " * (200 * (i % 2)), "q", "a") for i in range(2000)]
    generator = RequestGenerator(chats, arrival_rate=1, use_poisson=False, seed=5)
    rows = generator.generate_multi_turn_traces(TRANSCRIPT, ThinkTime(8.0))
    begins = {row.conversation_id: row.timestamp for row in rows if row.turn_index == 0}
    delays = {
        row.conversation_id: row.timestamp - begins[row.conversation_id]
        for row in rows
        if row.turn_index == 1
    }
    assert [row.timestamp for row in rows] == sorted(row.timestamp for row in rows)
    short = [delay for name, delay in delays.items() if int(name) % 2 == 0]
    long = [delay - 20 for name, delay in delays.items() if int(name) % 2]  # 200 words at 10 a second
    for thinking in (short, long):
        assert min(thinking) > 0
        assert statistics.median(thinking) == pytest.approx(8, rel=0.1)
        assert statistics.stdev(map(math.log, thinking)) == pytest.approx(1.4, rel=0.1)
    again = generator.generate_multi_turn_traces(TRANSCRIPT, ThinkTime(8.0))
    assert again == rows
    fewer = RequestGenerator(chats[:9], 1, False, 5).generate_multi_turn_traces(TRANSCRIPT, ThinkTime(8.0))
    assert {(r.conversation_id, r.timestamp) for r in fewer} <= {
        (r.conversation_id, r.timestamp) for r in rows
    }
    with pytest.raises(UserError, match="median think time must be seconds above 0"):
        ClientSettings(think_time=0.0)


@given(st.lists(conversations, min_size=1, max_size=6), st.floats(0, 3), st.integers(0, 99))
def test_every_turn_arrives_once_and_in_order(chats: list[Conversation], delay: float, seed: int) -> None:
    generator = RequestGenerator(chats, seed=seed)
    rows = generator.generate_multi_turn_traces(TRANSCRIPT, delay)
    assert rows == RequestGenerator(chats, seed=seed).generate_multi_turn_traces(TRANSCRIPT, delay)
    assert len(rows) == len({(r.conversation_id, r.turn_index) for r in rows}) == sum(map(num_turns, chats))
    assert [row.timestamp for row in rows] == sorted(row.timestamp for row in rows)
    begins = {row.conversation_id: row.timestamp for row in rows if row.turn_index == 0}
    assert all(row.timestamp == begins[row.conversation_id] + delay * row.turn_index for row in rows)
    single = generator.generate_single_turn_traces(TRANSCRIPT)
    assert {row.conversation_id: row.timestamp for row in single} == begins


def test_poisson_gaps_have_the_mean_and_spread_of_their_rate() -> None:
    chats = [chat(str(i), "q") for i in range(4000)]
    rows = RequestGenerator(chats, arrival_rate=2.0).generate_single_turn_traces(TRANSCRIPT)
    gaps = [b.timestamp - a.timestamp for a, b in itertools.pairwise(rows)]
    assert statistics.mean(gaps) == pytest.approx(0.5, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.5, rel=0.08)
    other = RequestGenerator(chats, arrival_rate=2.0, seed=43)
    assert other.generate_single_turn_traces(TRANSCRIPT) != rows


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_a_bad_rate_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match="arrival_rate must be"):
        RequestGenerator([], rate)
    with pytest.raises(UserError, match="--arrival-rate must be"):
        ClientSettings(arrival_rate=rate)


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf")])
def test_a_bad_delay_is_refused(delay: float) -> None:
    with pytest.raises(UserError, match="turn_delay must be"):
        RequestGenerator([]).generate_multi_turn_traces(TRANSCRIPT, delay)
    with pytest.raises(UserError, match="--turn-delay must be"):
        ClientSettings(turn_delay=delay)


def test_both_traces_have_the_same_conversations() -> None:
    chats = [
        chat("long", "q" * 200, "a", "r"),
        chat("one", "q", "a"),
        chat("x", "q", "a", "r", "b", "s"),
        chat("y", "q", "a", "r"),
        chat("z", "q", "a", "r"),
    ]
    options = ClientSettings(max_conversations=4, max_tokens=100, min_turns=2)
    prepared = prepare_traces(chats, options, BYTES)
    assert [row.conversation_id for row in prepared.single] == ["x", "y"]
    assert sorted({row.conversation_id for row in prepared.multi}) == ["x", "y"]
    assert prepared.counts == {CONVERSATIONS: 2, TOO_FEW_TURNS: 1, TOO_LONG: 1}


def test_matched_requests_come_from_later_conversations() -> None:
    chats = [chat("a", *"qaqaq"), chat("b", "q"), chat("c", *"qaq"), chat("d", *"qaq")]
    options = ClientSettings(max_conversations=1, min_turns=2, match_requests=True)
    prepared = prepare_traces(iter(chats), options, BYTES)
    assert [row.conversation_id for row in prepared.single] == ["a", "b", "c"]  # b has one turn
    assert len(prepared.multi) == 3 and prepared.counts[SHORT] == 0
    short = prepare_traces(chats[:2], options, BYTES)
    assert len(short.single) == 2 and short.counts[SHORT] == 1
    first = prepare_traces(
        chats[1:2] + chats[:1] + chats[2:], dataclasses.replace(options, max_conversations=2), BYTES
    )
    assert [row.conversation_id for row in first.single] == ["a", "b", "c"]  # b was dropped, and serves here
    assert first.counts[TOO_FEW_TURNS] == 1
    long = [chat("e", "q", "a", "q" * 99), *chats]  # dropped for its second request
    some = dataclasses.replace(options, max_conversations=2, max_tokens=60)
    prepared = prepare_traces(long, some, BYTES)
    assert prepared.counts[TOO_LONG] == 1 and prepared.counts[SHORT] == 0
    assert [row.conversation_id for row in prepared.single] == ["a", "e", "b"]
    wide = dataclasses.replace(options, max_tokens=30)
    chats[1] = chat("b", "q" * 99)
    assert [row.conversation_id for row in prepare_traces(chats, wide, BYTES).single] == ["a", "c", "d"]


def test_filters_that_leave_nothing_say_so() -> None:
    with pytest.raises(
        UserError, match=r"no conversation is left.*conversations dropped: fewer than min_turns: 1"
    ):
        prepare_traces([chat("a", "q")], ClientSettings(min_turns=2), BYTES)
    with pytest.raises(UserError, match="--max-tokens must be at least 1"):
        ClientSettings(max_tokens=0)


@given(st.lists(conversations, min_size=1, max_size=5), st.integers(1, 300), st.integers(1, 3))
def test_both_filters_agree(chats: list[Conversation], max_tokens: int, min_turns: int) -> None:
    """On conversations before they arrive, and on the requests of a trace."""
    everything = prepare_traces(chats, ClientSettings(), BYTES)
    requests = tokenize_rows(everything.multi, BYTES)
    try:
        prepared = prepare_traces(chats, ClientSettings(max_tokens=max_tokens, min_turns=min_turns), BYTES)
    except UserError:
        with pytest.raises(UserError, match="no request is left"):
            limit_requests(requests, max_tokens, min_turns)
        return
    kept, counts = limit_requests(requests, max_tokens, min_turns)
    assert len(kept) == len(prepared.multi)
    assert {name: count for name, count in counts.items() if count} == prepared.counts


def test_progress_is_told_and_an_empty_trace_refused() -> None:
    seen: list[tuple[int, int]] = []
    rows = RequestGenerator([chat(str(i), "q") for i in range(250)]).generate_single_turn_traces(
        ChatTemplateFormatter()
    )
    requests = tokenize_rows(rows, BYTES, lambda *numbers: seen.append(numbers))
    assert [num_requests for num_requests, _ in seen] == [100, 200, 250]
    assert seen[-1][1] == len(requests.prompt_ids)
    with pytest.raises(UserError, match="holds no request"):
        tokenize_rows([], BYTES)


def test_ids_do_not_depend_on_how_many_pieces_are_kept(
    deepseek_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [chat(str(i), *(f"{word} {i % 3}" for word in ("where", "there", "why", "so"))) for i in range(9)]
    rows = RequestGenerator(chats).generate_multi_turn_traces(ChatTemplateFormatter(deepseek_tokenizer))
    expected = tokenize_rows(rows, deepseek_tokenizer)
    for kept, batch in ((0, 0), (30, 0), (30, 200)):
        monkeypatch.setattr(tokenization, "_MAX_KEPT_CHARS", kept)
        monkeypatch.setattr(tokenization, "_BATCH_CHARS", batch)
        requests = tokenize_rows(rows, deepseek_tokenizer)
        assert requests.prompt_ids.tolist() == expected.prompt_ids.tolist()
        assert requests.response_ids.tolist() == expected.response_ids.tolist()


def test_real_conversations_become_traces() -> None:
    loader = ShareGPTLoader(real_file("sharegpt/ShareGPT_V3_tiny40.json"))
    prepared = prepare_traces(loader, ClientSettings(min_turns=2), BYTES)
    requests = tokenize_rows(prepared.multi, BYTES)
    assert prepared.counts[CONVERSATIONS] == len(prepared.single) > 10
    for i, row in enumerate(prepared.multi):
        assert row.prompt.startswith(BOS) and row.prompt.endswith(END_THINK)
        assert requests[i].num_response_tokens == len(row.response.encode())


@pytest.mark.parametrize("form", ["text", "block ids", "accesses"])
def test_times_stay_what_they_are_in_a_file(form: str, tmp_path: Path) -> None:
    """Drawn times stay assumed where a trace is written and read back, recorded ones recorded."""
    words, path = open_vocabulary("words"), tmp_path / "trace.jsonl"
    made = Client(Source(workloads=("qa",)), ClientSettings(num_requests=4), words)
    rows, requests = made.rows(), made.requests()
    assert made.times == "assumed"

    def times_of(**source: Any) -> str:
        client = Client(Source(**source), ClientSettings(), words)
        assert len(client.requests()) == len(rows)
        return client.times

    read_from = tmp_path if form == "accesses" else path
    for recorded in (False, True):
        times = "recorded" if recorded else "assumed"
        requests = dataclasses.replace(requests, times_recorded=recorded)
        if form == "text":
            write_trace_rows(path, [dataclasses.replace(row, recorded=recorded) for row in rows])
            assert times_of(log=Log((str(path),))) == times
        elif form == "block ids":
            write_hash_ids(path, hash_id_rows(requests, BAILIAN), BAILIAN)
        else:
            write_accesses(tmp_path, requests, block_trace(requests, 16))
            path = tmp_path / "requests.jsonl"
        assert times_of(trace_file=read_from) == times
    untold = [{k: v for k, v in row.items() if k != "arrivals"} for row in read_json_lines(path)]
    write_json_lines(path, *untold)  # as older versions wrote them; block ids are those of published logs
    assert times_of(trace_file=read_from) == ("recorded" if form == "block ids" else "assumed")
