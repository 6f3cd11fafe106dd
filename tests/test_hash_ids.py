"""Traces without text: Mooncake's and Bailian's block ids, simulators' token ids."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.study.request_files import ORPHANS, hash_id_rows, read_requests, requests_from_hash_ids
from dsatrace.study.requests import RequestsBuilder
from dsatrace.workloads.id_logs import (
    BAILIAN,
    MOONCAKE,
    HashIdRow,
    read_hash_ids,
    read_token_ids,
    write_hash_ids,
)
from dsatrace.workloads.rows import BadRows
from helpers.byte_tokenizer import byte_tokenizer
from helpers.json_lines import read_json_lines, write_json_lines
from helpers.real_data import real_file

BYTES = byte_tokenizer()
MOONCAKE_ROW: dict[str, Any] = {
    "timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [0, 1],
}  # fmt: skip
BAILIAN_ROW: dict[str, Any] = {
    "timestamp": 2.5, "input_length": 20, "output_length": 5, "hash_ids": [7, 8],
    "type": "text", "chat_id": 9, "parent_chat_id": -1, "turn": 1,
}  # fmt: skip
TOKEN_ROW: dict[str, Any] = {
    "input_tok_ids": [5, 6], "output_tok_ids": [7], "arrival_time_ns": 2_000_000_000, "input_toks": 2,
}  # fmt: skip


def test_mooncake_rows_are_milliseconds_and_blocks_of_512(tmp_path: Path) -> None:
    (row,) = read_hash_ids(write_json_lines(tmp_path / "t.jsonl", MOONCAKE_ROW))
    assert row == HashIdRow(1.5, 600, 5, array("q", [0, 1]))


def test_bailian_rows_are_seconds_blocks_of_16_and_chats(tmp_path: Path) -> None:
    rows = [
        BAILIAN_ROW,
        {**BAILIAN_ROW, "chat_id": 10, "parent_chat_id": 9, "turn": 2, "timestamp": 3},
        {**BAILIAN_ROW, "chat_id": 11, "parent_chat_id": 10, "turn": 3, "timestamp": 3, "type": "search"},
        {**BAILIAN_ROW, "chat_id": 12, "parent_chat_id": 4, "turn": 2, "timestamp": 4},
    ]
    path, counts = write_json_lines(tmp_path / "t.jsonl", *rows), Counter[str]()
    requests = read_requests(path, BYTES, counts=counts)
    assert requests.tokens_per_id == 16
    assert requests.arrival_s.tolist() == [2.5, 3, 3, 4]
    assert [request.turn for request in requests] == [0, 1, 2, 1]
    assert [request.workload for request in requests] == ["text", "text", "search", "text"]
    assert counts == {ORPHANS: 1}


def test_a_conversation_is_its_parents_whatever_the_type() -> None:
    rows = [
        HashIdRow(0, 16, 0, array("q", [0]), "a", "", 0, "text"),
        HashIdRow(1, 32, 0, array("q", [0, 1]), "b", "a", 1, "image"),
        HashIdRow(2, 48, 0, array("q", [0, 1, 2]), "c", "b", 2, "text"),
    ]
    conversation = requests_from_hash_ids(rows, BAILIAN).conversation
    assert len(set(conversation.tolist())) == 1


@pytest.mark.parametrize(
    ("good", "change", "message"),
    [
        (MOONCAKE_ROW, {"hash_ids": [0]},
         "'hash_ids': ids contradict the length: 1 ids, but 600 tokens are 2 blocks of 512"),
        (MOONCAKE_ROW, {"hash_ids": [0, True]}, "'hash_ids': not a whole number"),
        (MOONCAKE_ROW, {"hash_ids": [0, 1.5]}, "'hash_ids': not a whole number"),
        (MOONCAKE_ROW, {"block_size": 64}, "'block_size': another block size"),
        (MOONCAKE_ROW, {"hash_ids": "01"}, "'hash_ids': not a list"),
        (MOONCAKE_ROW, {"hash_ids": ...}, "'hash_ids': missing column"),
        (MOONCAKE_ROW, {"input_length": -600}, "'input_length': negative number"),
        (MOONCAKE_ROW, {"input_length": 0, "hash_ids": []}, "'input_length': empty prompt"),
        (MOONCAKE_ROW, {"output_length": None}, "'output_length': not a number"),
        (MOONCAKE_ROW, {"timestamp": 1499}, "'timestamp': timestamp runs backwards"),
        (BAILIAN_ROW, {"input_length": 33}, "'hash_ids': ids contradict the length"),
        (BAILIAN_ROW, {"turn": 0}, "'turn': number too small"),
        (BAILIAN_ROW, {"chat_id": ...}, "'chat_id': missing column"),
        (TOKEN_ROW, {"input_tok_ids": []}, "'input_tok_ids': empty prompt"),
        (TOKEN_ROW, {"input_toks": 3}, "'input_toks': ids contradict the length: there are 2 ids"),
        (TOKEN_ROW, {"output_toks": 3}, "'output_toks': ids contradict the length"),
        (TOKEN_ROW, {"output_tok_ids": ...}, "'output_tok_ids': missing column"),
        (TOKEN_ROW, {"output_tok_ids": [2**31]}, "'output_tok_ids': number too large"),
        (TOKEN_ROW, {"arrival_time_ns": 1}, "'arrival_time_ns': timestamp runs backwards"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_or_counted(
    tmp_path: Path, good: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    bad = {key: value for key, value in {**good, **change}.items() if value is not ...}
    path = write_json_lines(tmp_path / "t.jsonl", good, bad, good)
    with pytest.raises(UserError) as caught:
        read_requests(path, BYTES)
    assert f"t.jsonl: row 1 (line 2), column {message}" in str(caught.value)
    bad_rows = BadRows("skip")
    assert len(read_requests(path, BYTES, bad_rows)) == 2 and bad_rows.counts.total() == 1


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a request trace"):
        read_requests(write_json_lines(tmp_path / "t.jsonl", {"conversations": []}), BYTES)
    bad_first = write_json_lines(tmp_path / "b.jsonl", MOONCAKE_ROW | {"block_size": "x"}, MOONCAKE_ROW)
    with pytest.raises(UserError, match=r"row 0 .*column 'block_size': not a number"):
        read_requests(bad_first, BYTES)
    assert len(read_requests(bad_first, BYTES, BadRows("skip"))) == 1


token_lists = st.lists(st.integers(0, 2), min_size=1, max_size=70)


@given(
    prompts=st.lists(st.tuples(token_lists, st.sampled_from(["", "a", "b"])), min_size=1, max_size=6),
    layout=st.sampled_from([MOONCAKE, BAILIAN]),
)
def test_written_ids_share_the_same_prefixes(
    prompts: list[tuple[list[int], str]], layout: Any, tmp_path_factory: Any
) -> None:
    builder = RequestsBuilder()
    for i, (ids, name) in enumerate(prompts):
        builder.add(float(i), ids, [1, 2], conversation=(name,) if name else (), workload="w")
    requests = builder.build()
    path = tmp_path_factory.mktemp("ids") / "t.jsonl"
    assert write_hash_ids(path, hash_id_rows(requests, layout), layout) == len(prompts)
    read = read_requests(path, BYTES)
    assert read.arrival_s.tolist() == requests.arrival_s.tolist()
    assert read.num_prompt_tokens.tolist() == requests.num_prompt_tokens.tolist()
    assert read.num_response_tokens.tolist() == [2] * len(prompts)
    size = layout.tokens_per_block
    for i, (ids, name) in enumerate(prompts):
        for j, (others, other_name) in enumerate(prompts):
            for k in range(min(len(read.prompt(i)), len(read.prompt(j)))):
                same = ids[: (k + 1) * size] == others[: (k + 1) * size]
                assert (read.prompt(i)[k] == read.prompt(j)[k]) == same
            if layout.has_chats:
                together = i == j or (name == other_name and name != "")
                assert (read.conversation[i] == read.conversation[j]) == together


def test_ids_that_cannot_be_read_back_are_not_written(tmp_path: Path) -> None:
    row = HashIdRow(1.0, 600, 5, array("q", [0, 1]))
    path = tmp_path / "t.jsonl"
    with pytest.raises(UserError, match=r"row 0: ids contradict the length.*use ids of bailian blocks"):
        write_hash_ids(path, [row], BAILIAN)
    with pytest.raises(UserError, match=r"row 1 has the timestamp 0\.0 after 1\.0"):
        write_hash_ids(path, [row, HashIdRow(0.0, 600, 5, array("q", [0, 1]))], MOONCAKE)
    assert not path.exists()
    with pytest.raises(UserError, match="512-token blocks cannot become one of 16"):
        list(hash_id_rows(requests_from_hash_ids([row], MOONCAKE), BAILIAN))


def test_block_ids_expand_to_as_many_tokens(tmp_path: Path) -> None:
    path = write_json_lines(
        tmp_path / "t.jsonl", MOONCAKE_ROW, {**MOONCAKE_ROW, "input_length": 512, "hash_ids": [9]}
    )
    tokens = read_requests(path, BYTES).as_tokens()
    assert tokens.tokens_per_id == 1
    assert tokens.prompt(0).tolist() == [0] * 512 + [1] * 88
    assert tokens.prompt(1).tolist() == [9] * 512
    assert tokens.as_tokens() is tokens


def test_ids_of_63_bits_become_ranks(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "t.jsonl", {**MOONCAKE_ROW, "hash_ids": [2**62, 5]})
    assert read_requests(path, BYTES).prompt(0).tolist() == [1, 0]


def test_the_real_mooncake_slice_comes_back_as_it_was(tmp_path: Path) -> None:
    source, path = real_file("mooncake/conversation_trace_head500.jsonl"), tmp_path / "t.jsonl"
    requests = read_requests(source, BYTES)
    assert len(requests) == 500 and requests.tokens_per_id == 512
    write_hash_ids(path, hash_id_rows(requests, MOONCAKE), MOONCAKE)
    assert read_json_lines(source) == read_json_lines(path)
    assert len(requests.as_tokens().prompt_ids) == int(np.sum(requests.num_prompt_tokens, dtype=np.int64))


def test_the_real_token_trace_keeps_its_ids() -> None:
    path = real_file("sharegpt300_llama31.jsonl")
    requests = read_requests(path, BYTES)
    rows = list(read_token_ids(path))
    assert len(requests) == len(rows) == 300
    assert len(requests.prompt_ids) == 257_239
    assert requests.prompt(299).tolist() == rows[299].prompt_ids.tolist()
    assert requests.response(7).tolist() == rows[7].response_ids.tolist()
    assert np.all(np.diff(requests.arrival_s) >= 0) and requests.arrival_s[0] == pytest.approx(0.046926808)
