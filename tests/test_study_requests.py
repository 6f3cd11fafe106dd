"""Requests in memory, the synthetic workloads, and several of them as one trace."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.study.prepare import ClientSettings
from dsatrace.study.requests import RequestsBuilder, StudyRequests, block_trace
from dsatrace.study.sources import Client, Source
from dsatrace.study.tokenization import open_vocabulary
from dsatrace.workloads.request_generator import num_turns
from dsatrace.workloads.synthetic import (
    CHAT_MULTI,
    CHAT_SINGLE,
    INSTRUCTION,
    QA,
    SUMMARIZATION,
    WORKLOADS,
    ChatSettings,
    QaSettings,
    SummarizationSettings,
    chat_conversations,
    interleave,
    qa_conversations,
    summarization_conversations,
    synthetic_conversations,
)
from dsatrace.workloads.trace_rows import TraceRow

parts = st.lists(
    st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.sampled_from(["", "a", "b"])),
    min_size=1,
    max_size=8,
)


def build(given_parts: list[tuple[list[int], str]]) -> StudyRequests:
    builder = RequestsBuilder()
    turns = Counter[str]()
    for i, (ids, name) in enumerate(given_parts):
        builder.add(
            float(i), ids, ids[:2], conversation=(name,) if name else (), turn=turns[name] if name else -1
        )
        turns[name] += 1
    return builder.build()


@given(parts)
def test_requests_give_back_what_was_added(given_parts: list[tuple[list[int], str]]) -> None:
    requests = build(given_parts)
    assert [request.prompt_ids.tolist() for request in requests] == [ids for ids, _ in given_parts]
    assert [request.response_ids.tolist() for request in requests] == [ids[:2] for ids, _ in given_parts]
    names = [requests.conversation_ids[i] if i >= 0 else "" for i in requests.conversation]
    assert names == [name for _, name in given_parts]


@given(parts, st.data())
def test_taking_rows_takes_their_ids(given_parts: list[tuple[list[int], str]], data: st.DataObject) -> None:
    requests = build(given_parts)
    rows = data.draw(st.lists(st.integers(0, len(requests) - 1), max_size=10))
    taken = requests.take(np.array(rows, dtype=np.int64))
    assert [r.prompt_ids.tolist() for r in taken] == [given_parts[i][0] for i in rows]
    assert [r.arrival_s for r in taken] == [float(i) for i in rows]


@given(parts)
def test_by_conversation_the_turns_stand_together(
    given_parts: list[tuple[list[int], str]],
) -> None:
    requests = build(given_parts)
    ordered = requests.ordered("conversation")
    keys = [(r.conversation, i if r.conversation < 0 else 0) for i, r in enumerate(ordered)]
    assert len(list(itertools.groupby(keys))) == len(set(keys))
    for _, turns in itertools.groupby(ordered, key=lambda request: request.conversation):
        shown = [request.turn for request in turns]
        assert shown == sorted(shown)
    assert ordered.arrival_s.tolist() == requests.arrival_s.tolist()
    assert sorted(map(tuple, (r.prompt_ids for r in ordered))) == sorted(tuple(ids) for ids, _ in given_parts)
    assert requests.ordered("arrival") is requests


def test_conversations_follow_by_first_arrival() -> None:
    ordered = build([([1], "b"), ([2], "a"), ([3], ""), ([4], "b"), ([5], "a")]).ordered("conversation")
    assert ordered.prompt_ids.tolist() == [1, 4, 2, 5, 3]


def test_what_no_replay_could_use_is_refused() -> None:
    builder = RequestsBuilder()
    builder.add(1.0, [1])
    with pytest.raises(UserError, match="request 1 has an empty prompt"):
        builder.add(2.0, [])
    with pytest.raises(UserError, match="request 1 arrives before"):
        builder.add(0.5, [1])
    with pytest.raises(UserError, match="unknown order 'random'"):
        builder.build().ordered("random")  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="request 1 of 1"):
        builder.build()[1]


def test_memory_is_four_bytes_a_token() -> None:
    builder = RequestsBuilder()
    for i in range(100):
        builder.add(float(i), range(1000), num_response_tokens=7)
    requests = builder.build()
    assert requests.prompt_ids.nbytes == 400_000 and requests.response_ids.nbytes == 0
    assert requests[3].num_response_tokens == 7 and requests.prompt(99)[-1] == 999


def test_chats_grow_and_share_nothing() -> None:
    chats = chat_conversations(ChatSettings(num_conversations=300), seed=1)
    assert sum(map(num_turns, chats)) / len(chats) == pytest.approx(4, rel=0.2)
    openings = [chat.messages[0].content[:40] for chat in chats]
    assert len(set(openings)) > 290
    assert all(chat.messages[-1].role == "assistant" for chat in chats)


def test_questions_share_few_contexts_the_first_most_of_all() -> None:
    settings = QaSettings(num_requests=400, num_contexts=5)
    asked = [chat.messages[0].content for chat in qa_conversations(settings, seed=1)]
    contexts = Counter(text.rsplit("\n\nQuestion: ", maxsplit=1)[0] for text in asked)
    assert len(contexts) == 5 and len(set(asked)) > 390
    counts = [count for _, count in contexts.most_common()]
    assert counts[0] > 2 * counts[-1]
    even = QaSettings(num_requests=400, num_contexts=5, zipf_exponent=0)
    assert max(Counter(c.messages[0].content[:60] for c in qa_conversations(even, seed=1)).values()) < 130


def test_documents_are_long_and_some_come_again() -> None:
    settings = SummarizationSettings(num_requests=200, document_words=100, again_share=0.3)
    texts = [chat.messages[0].content for chat in summarization_conversations(settings, seed=1)]
    assert all(text.startswith(INSTRUCTION) for text in texts)
    assert len(set(texts)) / len(texts) == pytest.approx(0.7, abs=0.08)
    words = sum(len(text.removeprefix(INSTRUCTION).split()) for text in texts) / len(texts)
    assert words == pytest.approx(105, rel=0.2)  # whole sentences round it up
    once = SummarizationSettings(num_requests=50, document_words=20, again_share=0)
    assert len({c.messages[0].content for c in summarization_conversations(once, 1)}) == 50


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChatSettings(turns=0), "turns of a synthetic workload must be at least 1"),
        (lambda: QaSettings(num_contexts=0), "num_contexts"),
        (lambda: QaSettings(zipf_exponent=-1), "zipf_exponent"),
        (lambda: SummarizationSettings(again_share=2), "again_share must lie between"),
        (lambda: Source(workloads=("chess",)), "unknown workload 'chess'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message) -> None:
    with pytest.raises(UserError, match=message):
        make()


def workload_rows(name: str, num_requests: int, seed: int = 42) -> list[TraceRow]:
    """As a client makes them."""
    client = Client(
        Source(workloads=(name,)),
        ClientSettings(num_requests=num_requests, seed=seed),
        open_vocabulary("words"),
    )
    return client.rows()


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_the_same_for_the_same_seed(name: str) -> None:
    rows = workload_rows(name, 20, seed=3)
    assert rows == workload_rows(name, 20, seed=3)
    assert rows != workload_rows(name, 20, seed=4)
    more = synthetic_conversations(name, 40, seed=3)
    assert more[:20] == synthetic_conversations(name, 20, seed=3)
    assert {row.workload for row in rows} == {name}
    assert len(rows) == 20 or (name == CHAT_MULTI and len(rows) > 20)


def four(num_requests: int = 12) -> list[list]:
    return [workload_rows(name, num_requests) for name in WORKLOADS]


def test_a_mix_by_arrival_is_sorted_and_complete() -> None:
    traces = four()
    rows = list(interleave(traces))
    assert [row.timestamp for row in rows] == sorted(row.timestamp for row in rows)
    assert Counter(rows) == Counter(itertools.chain(*traces))
    assert len({row.workload for row in rows[:12]}) > 2


def test_a_mix_by_pattern_keeps_it_until_a_workload_ends() -> None:
    traces = four()
    pattern = (QA, QA, CHAT_MULTI, CHAT_SINGLE, SUMMARIZATION)
    rows = list(interleave(traces, pattern))
    assert [row.workload for row in rows[:30]] == list(pattern) * 6
    assert QA not in [row.workload for row in rows[30:]]
    assert [row.timestamp for row in rows] == sorted(row.timestamp for row in itertools.chain(*traces))
    for name, trace in zip(WORKLOADS, traces, strict=True):
        assert [row.prompt for row in rows if row.workload == name] == [row.prompt for row in trace]
    with pytest.raises(UserError, match="the pattern and the workloads differ in 'chat_multi', 'chess'"):
        list(interleave(traces, (QA, CHAT_SINGLE, SUMMARIZATION, "chess")))


@settings(deadline=None)  # the kernel is compiled or loaded on the first call
@given(parts, st.integers(1, 3))
def test_equal_blocks_behind_equal_prefixes_have_one_key(
    given_parts: list[tuple[list[int], str]], block_size: int
) -> None:
    requests = build(given_parts)
    trace = block_trace(requests, block_size)
    seen: dict[tuple[int, ...], int] = {}
    for i, (ids, _) in enumerate(given_parts):
        whole = tuple(ids + ids[:2])  # the response too
        ends = range(block_size, len(whole) + 1, block_size)
        assert trace.keys_of(i) == [seen.setdefault(whole[:end], len(seen)) for end in ends]
    assert trace.time_s.tolist() == requests.arrival_s.tolist()


def test_blocks_of_block_ids() -> None:
    builder = RequestsBuilder(tokens_per_id=16)
    builder.add(0.0, [7, 8], num_prompt_tokens=20, num_response_tokens=40)
    builder.add(1.0, [7, 9], num_prompt_tokens=32, num_response_tokens=1)
    requests = builder.build()
    whole, half = block_trace(requests, 16), block_trace(requests, 8)
    assert [whole.keys_of(i) for i in range(2)] == [[0], [0, 1]]
    assert [half.keys_of(i) for i in range(2)] == [[0, 1], [0, 1, 2, 3]]
    assert whole.output_tokens.tolist() == half.output_tokens.tolist() == [40, 1]


def test_blocks_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(UserError, match="a block holds at least 1 token, not 0"):
        block_trace(build([([1], "")]), 0)
    builder = RequestsBuilder(tokens_per_id=16)
    builder.add(0.0, [1, 3], num_prompt_tokens=32)
    builder.add(0.0, [2, 3], num_prompt_tokens=32)
    with pytest.raises(UserError, match="block id 3 follows another block"):
        block_trace(builder.build(), 16)
