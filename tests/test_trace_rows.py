"""Trace rows: written and read back alike, private, and every fault told in one line."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.study.request_files import read_requests
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.trace_rows import TraceRow, read_trace_rows, write_trace_rows
from helpers.byte_tokenizer import byte_tokenizer
from helpers.json_lines import write_json_lines

GOOD: dict[str, Any] = {
    "prompt": "q", "response": "a", "conversation_id": "c", "turn_index": 0, "timestamp": 1.5,
}  # fmt: skip
BYTES = byte_tokenizer()

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
trace_rows = st.builds(
    TraceRow,
    prompt=words.filter(bool),
    response=words,
    conversation_id=words,
    turn_index=st.integers(0, 2**31 - 1),
    timestamp=st.floats(0, 1e10).map(abs),
    mode=words,
    workload=words,
)


@given(rows=st.lists(trace_rows, min_size=1, max_size=8))
def test_rows_come_back_as_they_were_written(rows: list[TraceRow], tmp_path_factory: Any) -> None:
    rows = sorted(rows, key=lambda row: row.timestamp)
    path = tmp_path_factory.mktemp("rows") / "trace.jsonl"
    assert write_trace_rows(path, rows) == len(rows)
    assert list(read_trace_rows(path)) == rows


def test_a_trace_is_its_owners_and_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = TraceRow("q", "a", "c", 0, 5.0)
    write_trace_rows(path, [row])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "mode" not in json.loads(path.read_text())
    with pytest.raises(UserError, match=r"row 1 has the timestamp 4\.0 after 5\.0"):
        write_trace_rows(path, [row, TraceRow("q", "a", "c", 1, 4.0)])
    with pytest.raises(UserError, match="row 0 holds a lone surrogate"):
        write_trace_rows(path, [TraceRow("\ud800", "a", "c", 1, 4.0)])
    assert list(read_trace_rows(path)) == [row]  # the old one, and no other file beside it
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="cannot write the file"):
        write_trace_rows(tmp_path / "missing" / "trace.jsonl", [row])


def test_time_is_read_as_timestamp(tmp_path: Path) -> None:
    row = {**GOOD, "time": 2, "conversation_id": 7, "color": "red", "workload": "qa"}
    del row["timestamp"]
    (read,) = read_trace_rows(write_json_lines(tmp_path / "t.jsonl", row))
    assert read == TraceRow("q", "a", "7", 0, 2.0, workload="qa")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "'prompt': not a text"),
        ({"prompt": ""}, "'prompt': empty prompt"),
        ({"response": ...}, "'response': missing column"),
        ({"conversation_id": ...}, "'conversation_id': missing column"),
        ({"conversation_id": True}, "'conversation_id': not a text"),
        ({"turn_index": -1}, "'turn_index': negative number"),
        ({"turn_index": 0.5}, "'turn_index': not a whole number"),
        ({"turn_index": 10**400}, "'turn_index': number too large"),
        ({"turn_index": "0"}, "'turn_index': not a number"),
        ({"timestamp": ...}, "'timestamp': missing column"),
        ({"timestamp": -0.5}, "'timestamp': negative number"),
        ({"timestamp": 1.0}, r"'timestamp': timestamp runs backwards: 1\.0 after 1\.5"),
        ({"timestamp": True}, "'timestamp': not a number"),
        ({"mode": 3}, "'mode': not a text"),
        ({"workload": "\ud800"}, "'workload': lone surrogate"),
    ],
)
def test_bad_rows_are_named_or_counted(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    bad = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    path = write_json_lines(tmp_path / "t.jsonl", GOOD, bad, GOOD)
    with pytest.raises(UserError, match=rf"t\.jsonl: row 1 \(line 2\), column {message}") as caught:
        list(read_trace_rows(path))
    assert "\n" not in str(caught.value)
    bad_rows = BadRows("skip")
    assert len(list(read_trace_rows(path, bad_rows))) == 2 and bad_rows.counts.total() == 1


def test_a_line_cut_off_is_named(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "t.jsonl", GOOD, GOOD)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"row 1 \(line 2\): not JSON"):
        list(read_trace_rows(path))
    assert len(list(read_trace_rows(path, BadRows("skip")))) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = (
    "prompt", "response", "conversation_id", "turn_index", "timestamp", "time", "mode", "workload",
    "hash_ids", "input_length", "output_length", "type", "chat_id", "parent_chat_id", "turn", "input_tok_ids",
    "output_tok_ids", "input_toks", "output_toks", "arrival_time_ns",
)  # fmt: skip
plausible = st.integers(-1, 40) | st.lists(st.integers(-1, 9), max_size=3) | st.text(max_size=3) | json_values
files = st.one_of(
    st.binary(max_size=60),
    st.lists(st.dictionaries(st.sampled_from(COLUMNS), plausible), max_size=4).map(
        lambda rows: "\n".join(json.dumps(row) for row in rows).encode()
    ),
    json_values.map(lambda value: json.dumps(value).encode()),
)


@given(data=files, policy=st.sampled_from(["fail", "skip"]), cut=st.integers(0, 20))
def test_any_file_gives_requests_or_one_line(
    data: bytes, policy: Any, cut: int, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("any") / "trace.jsonl"
    path.write_bytes(data[: len(data) - cut])
    try:
        requests = read_requests(path, BYTES, BadRows(policy))
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert len(requests) and min(requests.num_prompt_tokens) > 0 and min(requests.prompt_ids) >= 0
