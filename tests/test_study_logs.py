"""Logs that services write: each layout by a row of its own, what is refused, and what is assumed."""

from __future__ import annotations

import copy
import gzip
import io
import itertools
import json
import pickle
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from dsatrace.commands.study.options import add_request_arguments, new_parser
from dsatrace.errors import UserError
from dsatrace.study.log_conversations import CONTINUED, FOUND, JOINED, ORPHANS
from dsatrace.study.log_layouts import LAYOUTS
from dsatrace.study.log_messages import ITEMS_LEFT_OUT, PARTS_LEFT_OUT, TOOL_CALLS, TOOL_ROLES
from dsatrace.study.logs import (
    MOVED,
    NO_ANSWERS,
    NO_PROMPTS,
    NO_TIMES,
    OTHER_MODELS,
    Log,
    ReadLog,
    read_log,
)
from dsatrace.study.requests import StudyRequests
from dsatrace.study.tokenization import WordVocabulary, open_vocabulary, tokenize_rows
from dsatrace.workloads.burstgpt import read_burstgpt
from dsatrace.workloads.id_logs import DELAYED
from dsatrace.workloads.rows import SORT_WINDOW, BadRows
from dsatrace.workloads.sharegpt import ShareGPTLoader
from dsatrace.workloads.trace_rows import TraceRow
from helpers.real_data import real_file
from helpers.study_samples import check_mistake, study

SYSTEM = {"role": "system", "content": "Be brief and polite."}
ASK = {"role": "user", "content": "Where is it?"}
SAID = "In the shed."
ANSWER = {"role": "assistant", "content": SAID}
NEXT = {"role": "user", "content": "And the helmet?"}
EPOCH = 1764320003.5
CHOICES = {"choices": [{"index": 0, "message": ANSWER}], "usage": {"prompt_tokens": 9}}

CHATS: dict[str, dict[str, Any]] = {
    "answer last": {"timestamp": "2025-11-28T08:53:23Z", "messages": [SYSTEM, ASK, ANSWER]},
    "response": {"timestamp": EPOCH, "messages": [SYSTEM, ASK], "response": SAID},
    "choices": {"created": EPOCH, "messages": [SYSTEM, ASK], "response": CHOICES},
    "both": {"time": EPOCH, "messages": [SYSTEM, ASK, ANSWER], "response": SAID},
    "begun": {
        "time": EPOCH, "messages": [SYSTEM, ASK, {**ANSWER, "content": "In the "}], "completion": "shed."
    },
    "row's system": {"timestamp": EPOCH, "system": SYSTEM["content"], "messages": [ASK, ANSWER]},
    "parts": {
        "timestamp": EPOCH,
        "messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "Where is it?"}]}, ANSWER],
    },
    "developer": {"timestamp": EPOCH, "messages": [{**SYSTEM, "role": "developer"}, ASK, ANSWER]},
    "pair": {"timestamp": EPOCH, "request": {"model": "m", "messages": [SYSTEM, ASK]}, "response": CHOICES},
    "batch": {
        "timestamp": EPOCH,
        "body": {"messages": [SYSTEM, ASK]},
        "response": {"status_code": 200, "body": CHOICES},
    },
    "litellm": {
        "call_type": "acompletion", "startTime": EPOCH, "messages": [SYSTEM, ASK], "response": CHOICES
    },
    "litellm from a data base": {
        "call_type": "acompletion",
        "spend": 0.1,
        "startTime": "2025-11-28 08:53:23.8317",
        "messages": "{}",
        "proxy_server_request": json.dumps({"messages": [SYSTEM, ASK]}),
        "response": json.dumps(CHOICES),
    },
    "prompt": {"timestamp": 0.5, "prompt": [SYSTEM, ASK], "response": SAID},
}  # fmt: skip
"""One request in every layout that holds messages."""


def response(text: str, **more: Any) -> dict[str, Any]:
    """As OpenAI's Responses API returns it."""
    part = {"type": "output_text", "text": text, "annotations": []}
    message = {
        "type": "message",
        "id": "msg_1",
        "status": "completed",
        "role": "assistant",
        "content": [part],
    }
    return {
        "id": "resp_1", "object": "response", "created_at": EPOCH, "status": "completed", "error": None,
        "model": "m", "output": [message], "tools": [], "usage": {"input_tokens": 9}, **more,
    }  # fmt: skip


BRIEF = SYSTEM["content"]
WHERE = {"role": "user", "content": [{"type": "input_text", "text": ASK["content"]}]}
CHATS |= {
    "responses": {"input": ASK["content"], "instructions": BRIEF, **response(SAID)},
    "responses, items": {"input": [{"type": "message", **WHERE}], **response(SAID, instructions=BRIEF)},
    "responses, beside": {"input": [{**SYSTEM, "role": "developer"}, WHERE], "response": response(SAID)},
    "responses, pair": {
        "request": {"model": "m", "input": ASK["content"], "instructions": BRIEF}, "response": response(SAID)
    },
    "responses, batch": {
        "body": {"input": ASK["content"], "instructions": BRIEF},
        "response": {"status_code": 200, "body": response(SAID)},
    },
}  # fmt: skip


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(*files: str, counts: Counter[str] | None = None, policy: Any = "fail", **settings: Any) -> ReadLog:
    counts = Counter() if counts is None else counts
    return read_log(Log(tuple(files), **settings), open_vocabulary("words"), BadRows(policy), counts)


def ids(requests: StudyRequests) -> list[tuple[list[int], list[int]]]:
    return [(requests.prompt(i).tolist(), requests.response(i).tolist()) for i in range(len(requests))]


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_the_same_request_in_every_layout(tmp_path: Path, name: str) -> None:
    formatter = open_vocabulary("words").formatter
    row = TraceRow(formatter.format_conversation([SYSTEM, ASK]), SAID, "", 0, 0.0)
    expected = ids(tokenize_rows([row], WordVocabulary()))
    log = read(write(tmp_path / "log.jsonl", CHATS[name]))
    assert ids(log.requests) == expected
    assert log.holds_text and log.requests.times_recorded


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [ASK, {"role": "tool", "content": "3"}]}, TOOL_ROLES),
        (
            {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            TOOL_CALLS,
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}
                ]
            },
            PARTS_LEFT_OUT,
        ),
        (
            {"messages": [ASK], "tools": [{"type": "function"}]},
            "rows with tools, which is not part of the prompt here",
        ),
        ({"messages": [ASK]}, NO_ANSWERS),
        ({"input": [WHERE, {"type": "reasoning", "summary": []}]}, ITEMS_LEFT_OUT),
        ({"input": [WHERE, {"type": "function_call", "name": "f", "arguments": "{}"}]}, TOOL_CALLS),
        ({"input": [WHERE, {"type": "function_call_output", "call_id": "1", "output": "3"}]}, TOOL_ROLES),
    ],
)
def test_what_is_changed_or_left_out_is_counted(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    counts: Counter[str] = Counter()
    read(write(tmp_path / "log.jsonl", row), counts=counts)
    assert counts[what] == 1


@pytest.mark.parametrize("by", ["previous_response_id", "conversation"])
def test_a_response_goes_on_from_the_one_it_names(tmp_path: Path, by: str) -> None:
    """A server that keeps conversations is sent the newest message; what it reads is the whole chat."""
    named = [{}, {by: "resp_1"}, {by: "resp_2"}]
    if by == "conversation":
        named = [{by: "conv_1"}, {by: {"id": "conv_1"}}, {by: "conv_1"}]
    sent = [
        {"input": ASK["content"], "instructions": "Be polite."},
        {"input": [WHERE], "instructions": BRIEF},
        {"input": NEXT["content"]},
    ]
    rows = [
        {**row, **name, **response(SAID, id=f"resp_{i + 1}", created_at=EPOCH + i)}
        for i, (row, name) in enumerate(zip(sent, named, strict=True))
    ]
    polite = {**SYSTEM, "content": "Be polite."}
    whole = [[polite, ASK], [SYSTEM, ASK, ANSWER, ASK], [ASK, ANSWER, ASK, ANSWER, NEXT]]
    counts: Counter[str] = Counter()
    # The second line comes last in the file: a log is written as answers end.
    log = read(write(tmp_path / "log", rows[0], rows[2], rows[1]), counts=counts)
    same = [
        {"timestamp": EPOCH + i, "messages": chat, "response": SAID, "session_id": "s"}
        for i, chat in enumerate(whole)
    ]
    assert ids(log.requests) == ids(read(write(tmp_path / "same", *same)).requests)
    assert (log.requests.conversation.tolist(), log.requests.turn.tolist()) == ([0, 0, 0], [0, 1, 2])
    assert (counts[CONTINUED], counts[ORPHANS], log.requests.arrival_s.tolist()) == (2, 0, [0, 1, 2])


def test_a_response_to_one_that_is_not_there_begins_a_conversation(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    rows = [{"input": "a", **response(SAID, previous_response_id="resp_0", id=None)}, {"input": [WHERE]}]
    rows[1]["created_at"] = EPOCH
    requests = read(write(tmp_path / "log", *rows), counts=counts).requests
    assert (requests.conversation.tolist(), counts[ORPHANS], counts[CONTINUED]) == ([0, 1], 1, 0)


@pytest.mark.parametrize(
    "row",
    [
        {"input": "a text", "model": "embedding-3", "created": EPOCH},
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"input": ["a", "b"]},
    ],
)
def test_not_everything_with_an_input_is_a_response(tmp_path: Path, row: dict[str, Any]) -> None:
    file = write(tmp_path / "log", row)
    with pytest.raises(UserError, match="has the columns of a known layout"):
        assert Log((file,)).layout
    if isinstance(row["input"], str):
        assert len(read(file, forced="responses").requests) == 1


def test_requests_of_another_model_are_counted(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    read(write(tmp_path / "a", *({"messages": [ASK], "model": m} for m in "aba")), counts=counts)
    assert counts[OTHER_MODELS] == 1


@pytest.mark.parametrize("system", [None, SYSTEM["content"]])
@pytest.mark.parametrize(("role", "text"), [("from", "value"), ("role", "content")])
def test_sharegpt_takes_both_spellings_and_a_system_of_the_row(
    tmp_path: Path, role: str, text: str, system: str | None
) -> None:
    entries = [{role: "user", text: ASK["content"]}, {role: "assistant", text: SAID}]
    if system is None:
        entries.insert(0, {role: "system", text: SYSTEM["content"]})
    row = {"id": "c", "conversations": entries, **({} if system is None else {"system": system})}
    file = write(tmp_path / "chats.jsonl", row)
    assert Log((file,)).layout == "sharegpt"
    loader = ShareGPTLoader(file)
    (conversation,) = loader
    assert [(m.role, m.content) for m in conversation.messages] == [
        (m["role"], m["content"]) for m in (SYSTEM, ASK, ANSWER)
    ]
    assert loader.counts["odd_role"] == 0


def test_several_files_of_conversations_are_read_and_their_ids_kept_apart(tmp_path: Path) -> None:
    def chat(name: str, *texts: str) -> dict[str, Any]:
        roles = itertools.cycle(("human", "gpt"))
        return {"id": name, "conversations": [{"from": next(roles), "value": text} for text in texts]}

    logs = tmp_path / "logs"
    logs.mkdir()
    write(logs / "a.jsonl", chat("c", "one", "1", "two"), chat("d", "three"))
    write(logs / "b.jsonl", chat("c", "four", "4", "five"))
    out = tmp_path / "out"
    flags = ("--skip-visualization", "--turn-delay", 1, "--tokenizer", "words")
    assert study("run", "--log", logs, "--output-dir", out, *flags) == 0
    rows = [json.loads(line) for line in (out / "multi_turn_trace.jsonl").read_text().splitlines()]
    assert Counter(row["conversation_id"] for row in rows) == {"c": 2, "d": 1, "c#2": 2}
    source = json.loads((out / "manifest.json").read_text())["source"]
    assert [Path(file["path"]).name for file in source["files"]] == ["a.jsonl", "b.jsonl"]
    loader = ShareGPTLoader(sorted(logs.iterdir()))
    assert [conversation.source_row for conversation in loader] == [0, 1, 2]
    assert loader.counts["duplicate_id"] == 1
    assert [c.source_row for c in ShareGPTLoader(sorted(logs.iterdir()), 2)] == [0, 1]
    (logs / "b.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"b.jsonl: row 0 \(line 1\), column 'conversations': missing column"):
        list(ShareGPTLoader(sorted(logs.iterdir())))


ROWS = [{"timestamp": EPOCH + i, "messages": [SYSTEM, ASK, ANSWER]} for i in range(3)]


def packed(path: Path, kind: str) -> str:
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if kind == "gz":
        content = gzip.compress(content)
    elif kind == "zst":
        import pyarrow

        out = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(out, "zstd") as stream:
            stream.write(content)
        content = out.getvalue().to_pybytes()
    elif kind == "array":
        content = json.dumps(ROWS, indent=1).encode()
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("kind", ["array", "gz", "zst"])
def test_packed_logs_and_arrays_are_read(tmp_path: Path, kind: str) -> None:
    plain = read(write(tmp_path / "log.jsonl", *ROWS))
    assert ids(read(packed(tmp_path / "packed", kind)).requests) == ids(plain.requests)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_damaged_packed_log_is_one_line(tmp_path: Path, kind: str) -> None:
    file = Path(packed(tmp_path / "packed", kind))
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(UserError, match="packed: the packed file is damaged or cut off"):
        read(str(file))


def test_several_files_a_folder_and_standard_input_are_one_log_by_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    late, early = write(logs / "a.jsonl", *ROWS[1:]), write(logs / "b.jsonl", ROWS[0])
    for given in ((late, early), (str(logs),)):
        assert read(*given).requests.arrival_s.tolist() == [0, 1, 2]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(late).read_bytes())))
    assert read("-", early).requests.arrival_s.tolist() == [0, 1, 2]


def test_logs_of_several_services_are_workloads_of_one_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the same session's id they are conversations of their own; a row may name its workload too."""
    rows = [{**row, "session_id": "s"} for row in ROWS]
    a, b = write(tmp_path / "a", *rows), write(tmp_path / "b=c", *rows, {**rows[0], "workload": "other"})
    requests = read(f"chat={a}", b).requests
    assert [requests.workload_names[i] for i in requests.workload] == [
        "chat", "", "other", "chat", "", "chat", ""
    ]  # fmt: skip
    assert requests.conversation.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert requests.turn.tolist() == [0, 0, 0, 1, 1, 2, 2]
    flags = ("--policies", "lru", "--num-blocks", 64, "--output-dir", tmp_path / "out", "--markdown")
    code = study("mixed", "--log", f"chat={a}", f"qa={b}", *flags, "--skip-visualization", "--block-size", 4)
    assert code == 0
    assert "| chat | qa | gain over lru |" in capsys.readouterr().out
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]
    assert source["workloads_of_files"] == ["chat", "qa"]
    code = study("mixed", "--log", a, *flags[:-3], "--output-dir", tmp_path / "one")
    check_mistake(capsys, code, "or name workloads with --log NAME=FILE NAME=FILE")


@pytest.mark.parametrize(
    ("row", "names", "message"),
    [
        (
            {"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [0]},
            "a",
            "block ids of one file",
        ),
        ({"id": "c", "conversations": []}, "a", "conversations are the workload chat_multi"),
        ({"messages": [ASK]}, "ab", "names a file twice"),
    ],
)
def test_workloads_are_named_where_that_means_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], names: str, message: str
) -> None:
    file = write(tmp_path / "log", row)
    code = study("mixed", "--log", *(f"{name}={file}" for name in names), "--output-dir", tmp_path / "out")
    check_mistake(capsys, code, message)


@pytest.mark.parametrize(
    ("times", "unit", "seconds"),
    [
        ([EPOCH, EPOCH + 2], None, 2),
        ([1764320003500, 1764320005500], None, 2),
        (["2025-11-28T10:00:00+01:00", "2025-11-28T09:00:02Z"], None, 2),
        (["2025-11-28 10:00:00.1234567", "2025-11-28 10:00:02.1234567"], None, 2),
        ([7, 9], "s", 2),
        ([0, 2], "ms", 0.002),
    ],
)
def test_times_are_dates_or_numbers_of_a_known_unit(
    tmp_path: Path, times: list[Any], unit: str | None, seconds: float
) -> None:
    rows = [{"timestamp": time, "messages": [ASK]} for time in times]
    log = read(write(tmp_path / "log", *rows), time_unit=unit)
    assert log.requests.arrival_s.tolist() == pytest.approx([0, seconds])


def test_times_of_an_unclear_unit_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "log", {"timestamp": 7, "messages": [ASK]})
    with pytest.raises(UserError, match="unit is unclear; give it with --time-unit s, ms"):
        read(file)


@pytest.mark.parametrize(
    ("times", "message"),
    [({"timestamp": "2025-11-28"}, "'timestamp' holds dates, not numbers"), ({}, "its rows have no times")],
)
def test_a_unit_without_numbers_is_refused(tmp_path: Path, times: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=f"{message}; leave out --time-unit"):
        read(write(tmp_path / "log", {**times, "messages": [ASK]}), time_unit="s")


def test_without_times_rows_follow_each_other_and_it_is_said(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    log = read(write(tmp_path / "log", {"messages": [ASK]}, {"messages": [NEXT]}), counts=counts)
    assert (log.requests.arrival_s.tolist(), counts[NO_TIMES]) == ([0, 1], 2)
    assert not log.requests.times_recorded


def test_files_without_times_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsatrace.workloads.rows.SORT_WINDOW", 1)
    rows = [{"messages": [ASK], "session_id": name} for name in "abcdef"]
    requests = read(write(tmp_path / "1", *rows[:4]), write(tmp_path / "2", *rows[4:])).requests
    assert requests.conversation_ids == tuple("abcdef")
    assert requests.arrival_s.tolist() == [0, 1, 2, 3, 4, 5]


def test_rows_are_sorted_within_the_window_and_counted(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    rows = [{"timestamp": EPOCH + i, "messages": [ASK]} for i in (2, 0, 1, 3)]
    log = read(write(tmp_path / "log", *rows), counts=counts)
    assert (log.requests.arrival_s.tolist(), counts[MOVED]) == ([0, 1, 2, 3], 2)


def test_rows_beyond_the_window_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SORT_WINDOW == 10_000
    monkeypatch.setattr("dsatrace.workloads.rows.SORT_WINDOW", 3)
    rows = [{"timestamp": EPOCH + i, "messages": [ASK]} for i in (1, 2, 3, 4, 0)]
    with pytest.raises(UserError, match="a row is 1 s earlier than one that stands over 3 rows before it"):
        read(write(tmp_path / "log", *rows))


def test_conversations_without_ids_are_joined_by_common_prefix(tmp_path: Path) -> None:
    other = {"role": "user", "content": "Who are you?"}
    long = {"role": "user", "content": "word " * 50}
    chats = [[ASK], [other], [ASK, ANSWER, NEXT], [ASK], [ASK, ANSWER, NEXT, ANSWER, long], [ASK, other]]
    rows = [{"timestamp": EPOCH + i, "messages": chat, "response": SAID} for i, chat in enumerate(chats)]
    counts: Counter[str] = Counter()
    requests = read(write(tmp_path / "log", *rows), counts=counts).requests
    assert requests.conversation.tolist() == [0, 1, 0, 2, 0, 3]
    assert requests.turn.tolist() == [0, 0, 1, 0, 2, 0]
    assert (counts[FOUND], counts[JOINED]) == (4, 2)


def test_named_conversations_stay_as_named(tmp_path: Path) -> None:
    rows = [{"timestamp": EPOCH + i, "messages": [ASK], "session_id": c} for i, c in enumerate("aab")]
    requests = read(write(tmp_path / "log", *rows)).requests
    assert (requests.conversation.tolist(), requests.turn.tolist()) == ([0, 0, 1], [0, 1, 0])


VLLM_LINES = """\
INFO 11-28 09:00:00 [api_server.py:1] Starting
(APIServer pid=7) INFO 11-28 09:00:01 [logger.py:41] Received request chatcmpl-1: prompt: "it's \\n one", \
params: SamplingParams(n=1), prompt_token_ids: [1,2,3], lora_request: None.
DEBUG 11-28 09:00:03 [logger.py:49] Request cmpl-2 details: prompt: None, prompt_token_ids: [4, 5], x: None.
"""


@pytest.mark.parametrize(("line", "holds_text"), [(1, True), (2, False)])
def test_vllms_lines_are_read(tmp_path: Path, line: int, holds_text: bool) -> None:
    lines = VLLM_LINES.splitlines(keepends=True)
    (tmp_path / "log").write_text(lines[0] + lines[line])
    counts: Counter[str] = Counter()
    log = read(str(tmp_path / "log"), counts=counts)
    expected = WordVocabulary().encode("it's \n one") if holds_text else [4, 5]
    assert (ids(log.requests), log.holds_text) == ([(expected, [])], holds_text)
    assert counts[NO_PROMPTS] == 1


def test_text_beside_ids_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(VLLM_LINES)
    with pytest.raises(UserError, match=r"row 2 \(line 3\): another kind of prompt: token ids.* layout vllm"):
        read(str(tmp_path / "log"))


def test_sglangs_dump_gives_ids_or_text(tmp_path: Path) -> None:
    dump = {"created_time": EPOCH, "obj": {"text": "a b", "input_ids": [7, 8]}, "out": {"output_ids": [9]}}
    received = {"timestamp": EPOCH, "event": "request.received", "obj": {"text": "a b"}}
    assert ids(read(write(tmp_path / "ids", dump)).requests) == [([7, 8], [9])]
    finished = {**received, "event": "request.finished", "out": {"text": "c"}}
    log = read(write(tmp_path / "text", received, finished))
    assert ids(log.requests) == [(WordVocabulary().encode("a b"), [2 + WordVocabulary().encode("c")[0]])]


def blocks(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    lengths = {"output_length": 1}
    return [{**lengths, "input_length": 512 * len(row["hash_ids"]), **row} for row in rows]


@pytest.mark.parametrize("first", [-5, "9f86d081", 2**64 - 1, 2**40])
def test_block_ids_need_only_be_equal(tmp_path: Path, first: int | str) -> None:
    rows = blocks({"timestamp": 0, "hash_ids": [first, 0]}, {"timestamp": 5, "hash_ids": [first, 1]})
    requests = read(write(tmp_path / "log", *rows)).requests
    (a, b), (c, d) = requests.prompt(0).tolist(), requests.prompt(1).tolist()
    assert a == c and len({a, b, d}) == 3 and min(a, b, d) >= 0
    assert requests.arrival_s.tolist() == [0, 0.005]


def test_sessions_go_on_after_a_delay(tmp_path: Path) -> None:
    rows = blocks(
        {"session_id": "s", "timestamp": 0, "hash_ids": [0]},
        {"session_id": "s", "delay": 100, "hash_ids": [0, 2]},
        {"session_id": "t", "timestamp": 50, "hash_ids": [1]},
    )
    counts: Counter[str] = Counter()
    requests = read(write(tmp_path / "log", *rows), counts=counts).requests
    assert requests.arrival_s.tolist() == pytest.approx([0, 0.05, 0.1])
    assert (requests.conversation.tolist(), requests.turn.tolist()) == ([0, 1, 0], [0, 0, 1])
    assert (counts[DELAYED], counts[MOVED]) == (1, 1)


def test_blocks_have_the_size_of_the_row_or_the_flag(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 100, "output_length": 1, "hash_ids": [0, 1]}
    assert read(write(tmp_path / "row", {**row, "block_size": 64})).requests.tokens_per_id == 64
    assert read(write(tmp_path / "flag", row), block_size=50).requests.tokens_per_id == 50
    with pytest.raises(UserError, match="another block size: the log's is 64 tokens"):
        read(write(tmp_path / "two", {**row, "block_size": 64}, {**row, "block_size": 50}))


def test_bailians_optional_fields_may_be_absent(tmp_path: Path) -> None:
    row = {"chat_id": 159, "timestamp": 61.1, "input_length": 32, "output_length": 13, "hash_ids": [1, 2]}
    requests = read(write(tmp_path / "log", row)).requests
    assert (requests.conversation_ids, requests.tokens_per_id) == (("159",), 16)


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ("TIMESTAMP,ContextTokens,GeneratedTokens", "is an Azure log"),
        ("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", "inference/run_burstgpt.py"),
    ],
)
def test_a_log_of_lengths_names_its_runner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], header: str, text: str
) -> None:
    (tmp_path / "log.csv").write_text(f"{header}\n1,2,3\n")
    check_mistake(capsys, study("run", "--log", tmp_path / "log.csv", "--output-dir", tmp_path / "out"), text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["a b", "a --log b", "--log a --log b", "--log a b"])
def test_logs_may_stand_before_the_flags(given: str) -> None:
    """Without a flag, after one, or both: they are one log."""
    parser = new_parser("any", "Any verb.", "%(prog)s")
    add_request_arguments(parser)
    assert parser.parse_args([*given.split(), "--layout", "messages"]).log == ["a", "b"]
    assert parser.parse_args(["--layout", "messages"]).log is None


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "dump.pkl").write_bytes(pickle.dumps([SYSTEM]))
    with pytest.raises(UserError, match="is a pickle, which may run code"):
        read(str(tmp_path / "dump.pkl"))


SECRET = "zebra-4711"


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ('{"x": 1}\n', (), "has the columns of a known layout; known are bailian, mooncake"),
        ("hello\n", (), "it is no JSON"),
        ("", (), "holds no rows"),
        (f'{{"messages": "{SECRET}"}}\n', (), "has the columns of a known layout"),
        (f'{{"messages": [{{"role": "{SECRET}", "content": "a"}}]}}\n', (), "layout messages, see --layout"),
        (f'{{"prompt": "{SECRET}"}}\n', ("--layout", "sglang"), "read as layout sglang, see --layout"),
        (f'{{"prompt": "{SECRET}"}}\n', ("--log-block-size", "16"), "is for block ids"),
        (
            f'{{"conversations": [], "id": "{SECRET}"}}\n',
            ("--time-unit", "s"),
            "leave out --data-path and --time-unit",
        ),
        (f'{{"prompt": "{SECRET}", "timestamp": "soon"}}\n', (), "column 'timestamp': not a time"),
        (f'{{"prompt": "{SECRET}"}}\n', ("--trace-file", "x"), "--log and --trace-file are a source each"),
        (f'{{"prompt": "{SECRET}"}}\n', ("--workload", "qa"), "--log is a source by itself"),
        (f'{{"prompt": "{SECRET}"}}\n', ("--turn-delay", "2"), "a log has its own requests and times"),
    ],
)
def test_what_does_not_fit_is_one_line_without_the_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, flags: tuple[str, ...], message: str
) -> None:
    (tmp_path / "log").write_text(content)
    code = study("run", "--log", tmp_path / "log", *flags, "--output-dir", tmp_path / "out")
    error = capsys.readouterr().err
    assert message in error and SECRET not in error
    assert (code, error.count("\n")) == (2, 1)


LOGGED = [
    *CHATS.values(),
    {"created_time": EPOCH, "obj": {"input_ids": [1, 2]}, "out": {"output_ids": [3]}},
    {"event": "request.finished", "obj": {"text": "a", "session_params": {"id": "s"}}, "out": {"text": "b"}},
    {"arrival_time_ns": 5, "input_tok_ids": [1], "output_tok_ids": [2]},
    {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1], "session_id": "s"},
    {"timestamp": 0, "input_length": 16, "output_length": 5, "hash_ids": [0], "chat_id": 5, "turn": 1},
]
JUNK = [None, True, 0, -1, 1e300, 10**400, "", "x", [], [None], ["x"], {}, {"messages": "x"}, "\ud83d"]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a row."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@pytest.mark.parametrize("number", range(len(LOGGED)))
def test_any_value_anywhere_in_a_row_is_read_or_a_clear_line(tmp_path: Path, number: int) -> None:
    """Each value of a row by a third of the junk, in a log of one row and after a good one."""
    good, refused = LOGGED[number], 0
    for place in range(len(list(places(good)))):
        for junk in JUNK[place % 3 :: 3]:
            row = copy.deepcopy(good)
            container, key = list(places(row))[place]
            container[key] = junk
            for rows in ((row,), (good, row)):
                try:
                    assert len(read(write(tmp_path / "log", *rows)).requests) > 0
                except UserError as error:
                    assert "\n" not in str(error)
                    refused += 1
    assert refused


def test_flags_of_a_log_need_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_mistake(
        capsys, study("run", "--layout", "messages", "--output-dir", tmp_path / "o"), "name its file"
    )


def test_bad_rows_can_be_skipped_and_the_layout_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "log", {"x": SECRET}, *ROWS, {"timestamp": EPOCH, "messages": [ANSWER]})
    out = tmp_path / "out"
    assert study("run", file, "--bad-rows", "skip", "--output-dir", out, "--skip-visualization") == 0
    shown = capsys.readouterr().out
    assert f"source: log {file} as layout messages (recognised)" in shown
    assert "2 bad rows skipped" in shown
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["source"]["layout"] == "messages" and len(manifest["source"]["files"]) == 1
    written = "".join(path.read_text() for path in out.iterdir())
    assert str(ASK["content"]) not in written


def test_the_page_names_every_layout() -> None:
    page = (ROOT / "docs/study-logs.md").read_text()
    assert [name for name in LAYOUTS if f"\n| `{name}` |" not in page] == []


def test_rows_of_messages_are_conversations_where_that_is_asked_for(tmp_path: Path) -> None:
    row = {"messages": [SYSTEM, ASK, ANSWER, NEXT, ANSWER]}
    out = tmp_path / "out"
    flags = ("--layout", "sharegpt", "--output-dir", out, "--skip-visualization")
    assert study("run", "--log", write(tmp_path / "log", row), *flags) == 0
    rows = [json.loads(line) for line in (out / "multi_turn_trace.jsonl").read_text().splitlines()]
    assert [row["turn_index"] for row in rows] == [0, 1]


@pytest.mark.parametrize("file", ["burstgpt/BurstGPT_1_head400.csv", "burstgpt/BurstGPT_3_head105.csv"])
def test_burstgpt_is_read_packed_too(tmp_path: Path, file: str) -> None:
    source = real_file(file)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(source.read_bytes()))
    assert list(read_burstgpt(tmp_path / "b.csv.gz")) == list(read_burstgpt(source))


def test_azures_trace_is_read_by_the_runner_that_is_named(tmp_path: Path) -> None:
    lines = ("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.9799600,374,44")
    (tmp_path / "azure.csv").write_text("\n".join([*lines, "2023-11-16 18:17:04.9799600,396,109"]))
    first, second = read_burstgpt(tmp_path / "azure.csv")
    assert second.timestamp_s - first.timestamp_s == pytest.approx(1)
    assert (first.request_tokens, first.response_tokens) == (374, 44)
    (tmp_path / "azure.csv").write_text("\n".join([lines[0], "2023-13-16 18:17:03,1,1"]))
    with pytest.raises(UserError, match="column 'Timestamp': not a date"):
        list(read_burstgpt(tmp_path / "azure.csv"))


SAMPLES = {
    "logs/chatprompt.jsonl": ("prompt", 3),
    "logs/litellm.jsonl": ("litellm", 3),
    "logs/native_iso.jsonl": ("prompt", 3),
    "logs/noconv.jsonl": ("prompt", 3),
    "logs/openai_log.jsonl": ("messages", 3),
    "logs/openai_reqresp.jsonl": ("pairs", 3),
    "logs/sglang_dump.jsonl": ("sglang", 3),
    "logs/vllm_server.log": ("vllm", 12),
    "formats/bailian_optional_fields.jsonl": ("bailian", 1),
    "formats/hash_ids_hex.jsonl": ("mooncake", 1),
    "formats/mooncake_block64.jsonl": ("mooncake", 2),
    "formats/mooncake_session_delay.jsonl": ("mooncake", 2),
    "formats/mooncake_u64_hash.jsonl": ("mooncake", 1),
    "formats/mooncake_unsorted.jsonl": ("mooncake", 2),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_recorded_logs_are_read(name: str) -> None:
    file = str(real_file(f"../cases/{name}"))
    layout, num_requests = SAMPLES[name]
    assert Log((file,)).layout == layout
    assert len(read(file).requests) == num_requests


@pytest.mark.parametrize("name", ["logs/sharegpt_rolecontent.jsonl", "formats/sharegpt.json.gz"])
def test_recorded_conversations_are_read(name: str) -> None:
    file = real_file(f"../cases/{name}")
    assert Log((str(file),)).layout == "sharegpt"
    assert all(list(conversation.prompts()) for conversation in ShareGPTLoader(file))
