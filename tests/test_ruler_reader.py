"""RULER rows from files: both layouts, folders and archives, and everything a file may hold instead."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.ruler import reader
from dsatrace.workloads.ruler.example import TASKS, Example, locate, token_positions
from dsatrace.workloads.ruler.reader import read_examples
from dsatrace.workloads.tokenizer import Tokenizer
from helpers.real_data import real_file
from helpers.ruler_samples import ROW, deepseek_tokenizer, pack, write_rows


def read_bytes(folder: Path, content: bytes, policy: str = "skip", task: str = "niah_single_1") -> Any:
    """Examples of one file of these bytes, and what was skipped."""
    file = folder / task / "validation_4096.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    bad_rows = BadRows(policy)  # type: ignore[arg-type]
    return list(read_examples(file, bad_rows=bad_rows)), bad_rows


def test_nvidias_row_as_it_stands(tmp_path: Path) -> None:
    file = write_rows(tmp_path, "niah_single_1", [ROW, {**ROW, "length": None}])
    first, second = read_examples(file)
    start = ROW["input"].index("1234567")
    assert first == Example(
        task="niah_single_1",
        row=0,
        prompt=ROW["input"],
        answer_prefix=" It is",
        references=("1234567",),
        max_length=4096,
        length=900,
    )
    assert first.tokens_to_generate == 128 and first.answer_spans == ((start, start + 7),)
    assert (second.row, second.length) == (1, None)  # `index` repeats, the row does not


def test_input_wins_over_a_short_question(tmp_path: Path) -> None:
    row = {"input": "Documents, long. Who?", "question": "Who?", "context": "x", "outputs": ["a", "b"]}
    (example,) = read_examples(write_rows(tmp_path, "qa_1", [row]))
    assert example.prompt == "Documents, long. Who?" and example.answer_prefix == ""
    assert example.references == ("a", "b")


@pytest.mark.parametrize("tail", [" It is", " It is \n", "It is"])
def test_a_prefix_that_ends_the_input_is_not_said_twice(tmp_path: Path, tail: str) -> None:
    (example,) = read_examples(write_rows(tmp_path, "vt", [{**ROW, "input": "Where?" + tail}]))
    assert (example.prompt, example.answer_prefix) == ("Where?", " It is")


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("niah_single_2", {"query": "brisk-anchor", "answer": "55"}),
        ("niah_multiquery", {"query": "a, and b", "answer": ["55", "66"], "type_needle_v": "numbers"}),
        ("niah_multikey_3", {"question": "Which uuid is brisk-anchor's?", "outputs": ["55"]}),
        ("vt", {"query": "55", "outputs": ["ABCDE"], "example": "SOLVED\n"}),
        ("cwe", {"answer": ["oak", "elm"], "example": "SOLVED\n"}),
        ("fwe", {"outputs": ["aaaaaa"]}),
        ("qa_2", {"question": "Who was it?", "answer": "nobody"}),
    ],
)
def test_context_and_query_make_a_prompt(tmp_path: Path, task: str, columns: dict[str, Any]) -> None:
    (example,) = read_examples(write_rows(tmp_path, task, [{"context": "THE CONTEXT.", **columns}]))
    assert "THE CONTEXT." in example.prompt
    asked = columns.get("query") or columns.get("question") or ""
    assert asked in example.prompt.split("THE CONTEXT.")[1]
    assert example.prompt.startswith(columns.get("example", ""))
    answer = columns.get("answer", columns.get("outputs"))
    assert example.references == (tuple(answer) if isinstance(answer, list) else (answer,))
    assert ("question" in columns and task != "qa_2") == (example.answer_prefix == "")
    if task == "niah_multiquery":
        assert "magic numbers for a, and b" in example.prompt and example.answer_prefix.endswith(" are")
    given = {"context": "c", **columns, "answer_prefix": " Given:"}
    (example,) = read_examples(write_rows(tmp_path, task, [given]))
    assert example.answer_prefix == " Given:"


def test_archive_folder_and_file_give_the_same(tmp_path: Path) -> None:
    members = []
    for task, length in (("vt", 8192), ("vt", 4096), ("cwe", 4096)):
        file = write_rows(tmp_path / "data" / "ruler", task, [ROW, {**ROW, "input": task}], length)
        members.append((f"./data/ruler/{file.parent.name}/{file.name}", file.read_bytes()))
    noise = [("README.md", b"hello"), ("data/ruler/vt/._validation_4096.jsonl", b"\x00\x05")]
    archive = pack(tmp_path / "sample.tgz", [*noise, *members])
    before = sorted(tmp_path.rglob("*"))

    def key(example: Example) -> tuple[str, int, int]:
        return example.task, example.max_length or 0, example.row

    unpacked = list(read_examples(tmp_path / "data"))
    assert list(map(key, unpacked)) == [
        (task, length, row) for task, length in [("vt", 4096), ("vt", 8192), ("cwe", 4096)] for row in (0, 1)
    ]
    assert sorted(read_examples(archive), key=key) == sorted(unpacked, key=key)
    for source in (archive, tmp_path / "data"):
        assert list(read_examples(source, ["vt"], 4096)) == unpacked[:2]
    assert list(read_examples(tmp_path / "data" / "ruler" / "vt" / "validation_4096.jsonl")) == unpacked[:2]
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked


def linked(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        ("data/../../vt/validation_4096.jsonl", "leaves its folder"),
        ("data\\..\\evil", "leaves its folder"),
        ("/vt/validation_4096.jsonl", "has an absolute path"),
        ("C:/vt/validation_4096.jsonl", "has an absolute path"),
        (linked("vt/validation_4096.jsonl", tarfile.SYMTYPE), "is a link"),
        (linked("vt/validation_4096.jsonl", tarfile.LNKTYPE), "is a link"),
        (linked("vt/validation_4096.jsonl", tarfile.FIFOTYPE), "is no plain file"),
    ],
)
def test_an_unsafe_member_ends_it(tmp_path: Path, member: tarfile.TarInfo | str, problem: str) -> None:
    archive = pack(tmp_path / "evil.tgz", [(member, b"")])
    name = member if isinstance(member, str) else member.name
    with pytest.raises(UserError, match=problem) as error:
        list(read_examples(archive))
    assert str(error.value).startswith(f"{archive}: member {name!r} ")


def test_half_an_archive_gives_its_whole_rows(tmp_path: Path) -> None:
    content = "".join(json.dumps({**ROW, "index": i * 7919}) + "\n" for i in range(5000)).encode()
    archive = pack(tmp_path / "half.tgz", [("vt/validation_4096.jsonl", content)])
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    examples = read_examples(archive, bad_rows=BadRows("skip"))
    assert next(examples).row == 0
    with pytest.raises(UserError, match=r"half\.tgz.*cannot read on after line \d+: .*; fetch it again"):
        list(examples)
    archive.write_bytes(b"no archive")
    with pytest.raises(UserError, match="not a whole tar archive"):
        list(read_examples(archive))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"input": "a", "outputs": ["b"', "not JSON: Expecting"),
        (b"\x00\x00\x00", "not JSON"),
        (b'{"input": "a\x00", "outputs": ["b"]}', "not JSON: Invalid control character"),
        (b"[1, 2]", "not an object: it is of type list"),
        (b'{"input": "\xff", "outputs": ["b"]}', "not UTF-8: at byte 11"),
        ('{"input": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"input": "a", "outputs": ["b"], "length": NaN}', "not JSON: NaN is not"),
        (b'{"input": "a", "outputs": ["b"], "length": -Infinity}', "not JSON: -Infinity is not"),
        (b'{"input": "a", "outputs": ["b"], "length": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b"[" * 100_000, "not JSON: it is nested too deeply"),
        (b'{"input": "a", "outputs": ["b"], "length": 1e999}', "column 'length': not a whole number"),
        (b'{"input": "a", "outputs": ["b"], "length": -1}', "column 'length': not a whole number"),
        (b'{"input": "a", "outputs": ["b"], "length": true}', "column 'length': not a whole number"),
        (b'{"input": 5, "outputs": ["b"]}', "column 'input': not a text"),
        (b'{"input": "\\ud83d", "outputs": ["b"]}', "column 'input': lone surrogate"),
        (b'{"input": " It is", "outputs": ["b"], "answer_prefix": "It is"}', "column 'input': empty text"),
        (b'{"input": "a", "outputs": ["b"], "answer_prefix": 3}', "column 'answer_prefix': not a text"),
        (b'{"input": "a"}', "column 'outputs': missing column"),
        (b'{"input": "a", "outputs": []}', "column 'outputs': not a text"),
        (b'{"input": "a", "outputs": [null]}', "column 'outputs': not a text"),
        (b'{"input": "a", "outputs": ["b", " "]}', "column 'outputs': empty text"),
        (b'{"input": "a", "outputs": ["\\udfff"]}', "column 'outputs': lone surrogate"),
        (b'{"input": "a", "answer": {"b": 1}}', "column 'answer': not a text"),
        (b'{"input": "", "outputs": ["b"]}', "column 'context': missing column"),
        (b'{"context": "c", "outputs": ["b"]}', "column 'query': missing column"),
        (b'{"context": "c", "query": ["q"], "outputs": ["b"]}', "column 'query': not a text"),
    ],
)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, line: bytes, problem: str) -> None:
    good = json.dumps(ROW).encode()
    content = b"\n\n".join((good, line, good))
    with pytest.raises(UserError, match=rf"validation_4096\.jsonl: row 1 \(line 3\).*{problem}.*; mend"):
        read_bytes(tmp_path, content, "fail")
    examples, bad_rows = read_bytes(tmp_path, content, "skip")
    assert [example.row for example in examples] == [0, 2]
    reason = re.sub("^column '.*?': ", "", problem).partition(":")[0]
    assert bad_rows.counts == {reason: 1}


def test_what_editors_and_systems_add_is_no_fault(tmp_path: Path) -> None:
    good = json.dumps(ROW, ensure_ascii=False).encode()
    examples, _ = read_bytes(tmp_path, b"\xef\xbb\xbf" + good + b"\r\n\r\n  \n" + good, "fail")
    assert [example.row for example in examples] == [0, 1]
    assert all(example.prompt == ROW["input"] for example in examples)


def test_odd_characters_stay_readable(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    row = {**ROW, "input": "\u00e9\x00\U0001f642 " + str(ROW["input"])}
    examples, _ = read_bytes(tmp_path, json.dumps(row).encode(), "fail")
    assert examples[0].prompt == row["input"]
    (positions,) = locate(examples[0], byte_tokenizer).answer_positions or ()
    ids = byte_tokenizer.encode(examples[0].prompt)
    assert byte_tokenizer.decode(ids[i] for i in positions) == "1234567"


def test_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = json.dumps(ROW).encode() + b"\n"
    long = json.dumps({**ROW, "input": "x" * 10_000_000}).encode() + b"\n"
    examples, _ = read_bytes(tmp_path, good + long + good, "fail")
    assert [len(example.prompt) for example in examples] == [len(ROW["input"]), 10_000_000, len(ROW["input"])]
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 1 << 20)
    examples, bad_rows = read_bytes(tmp_path, good + long + good, "skip")
    assert [example.row for example in examples] == [0, 2]
    assert bad_rows.counts == {"too long": 1}
    examples, bad_rows = read_bytes(tmp_path, good + long[:-1], "skip")
    assert len(examples) == bad_rows.counts.total() == 1


def test_sources_without_wanted_rows_say_what_they_have(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "some", "vt", [ROW])
    for source in (tmp_path / "some", pack(tmp_path / "a.tgz", [("vt/validation_4096.jsonl", b"")])):
        with pytest.raises(UserError, match="no RULER rows for cwe at any length; it has vt at 4096"):
            list(read_examples(source, ["cwe"]))
        with pytest.raises(UserError, match="no RULER rows for any task at 8192; it has vt at 4096"):
            list(read_examples(source, max_length=8192))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"it has no <task>/validation_<length>\.jsonl at all"):
        list(read_examples(tmp_path / "empty"))
    with pytest.raises(UserError, match="absent: cannot read: No such file"):
        list(read_examples(tmp_path / "absent", ["vt"]))
    with pytest.raises(UserError, match="unknown RULER task 'needle'"):
        list(read_examples(tmp_path / "some", ["needle"]))
    lone = file.rename(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"rows\.jsonl: its path names no RULER task"):
        list(read_examples(lone))
    assert [example.task for example in read_examples(lone, ["vt"])] == ["vt"]
    named = lone.rename(tmp_path / "qa_1.jsonl")
    assert [(e.task, e.max_length) for e in read_examples(named, max_length=99)] == [("qa_1", None)]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = ["input", "outputs", "answer", "answer_prefix", "length", "context", "query", "question", "example"]
RECORDS = st.dictionaries(st.sampled_from([*COLUMNS, "type_needle_v"]), JSON_VALUES)
LINES = st.one_of(RECORDS.map(lambda record: json.dumps(record).encode()), st.binary(max_size=60))
ANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANY
@given(lines=st.lists(LINES, max_size=4), task=st.sampled_from(sorted(TASKS)), crlf=st.booleans())
def test_no_rows_give_a_traceback(tmp_path: Path, lines: list[bytes], task: str, crlf: bool) -> None:
    content = (b"\r\n" if crlf else b"\n").join(lines)
    num_rows = sum(bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    try:
        examples, bad_rows = read_bytes(tmp_path, content, "skip", task)
    except UserError as error:
        assert re.search(r"holds no rows|none of its \d rows? can be used", str(error))
        return
    assert all(example.prompt.encode().strip() and all(example.references) for example in examples)
    assert len(examples) + bad_rows.counts.total() == num_rows
    try:
        assert len(read_bytes(tmp_path, content, "fail", task)[0]) == num_rows
    except UserError as error:
        assert bad_rows.counts.total() > 0 and "\n" not in str(error)
    else:
        assert bad_rows.counts.total() == 0


def plain_archive() -> bytes:
    """Two members, one of a name so long that it needs a pax header; the same bytes every time."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("vt/validation_4096.jsonl", "cwe/" + "ü" * 120 + "/validation_8192.jsonl"):
            info, content = tarfile.TarInfo(name), json.dumps(ROW).encode()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


HEADERS = plain_archive()[:4096].rstrip(b"\x00")  # what follows is mostly padding


@ANY
@given(
    changes=st.lists(st.tuples(st.integers(0, len(HEADERS) - 1), st.integers(0, 255)), max_size=8),
    end=st.integers(0, len(HEADERS)) | st.none(),
    packed=st.booleans(),
)
@hypothesis.example(changes=[], end=3, packed=True)  # tarfile itself raises TypeError here
def test_no_archive_gives_a_traceback(
    tmp_path: Path, changes: list[tuple[int, int]], end: int | None, packed: bool
) -> None:
    content = bytearray(gzip.compress(plain_archive(), mtime=0) if packed else plain_archive())
    for place, value in changes:
        content[place % len(content)] = value
    archive = tmp_path / ("a.tgz" if packed else "a.tar")
    archive.write_bytes(content[:end])
    try:
        assert len(list(read_examples(archive, bad_rows=BadRows("skip")))) <= 2
    except UserError as error:
        assert str(archive) in str(error)


def test_tokens_of_another_text_are_refused(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="the tokens hold 2 bytes, but the prompt 5"):
        token_positions("hello", [(0, 1)], byte_tokenizer.encode("he"), byte_tokenizer)


def test_real_rows() -> None:
    examples = list(read_examples(real_file("ruler")))
    assert len(examples) == 18 and {example.max_length for example in examples} == {1024}
    assert len({example.task for example in examples}) == 6
    for example in examples:
        task = TASKS[example.task]
        assert example.answer_prefix.startswith((" Answer:", " The special magic"))
        assert len(example.references) == {"niah": 1, "vt": 5, "cwe": 10, "fwe": 3}[task.family]
        found = [example.prompt[start:end] for start, end in example.answer_spans]
        assert found == (list(example.references) if task.family in ("niah", "vt") else [])


def test_real_lengths_and_positions() -> None:
    tokenizer = deepseek_tokenizer()
    for path in sorted(real_file("ruler").rglob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record, example in zip(records, read_examples(path), strict=True):
            counted = sum(len(tokenizer.encode(text)) for text in (example.prompt, example.answer_prefix))
            assert counted + example.tokens_to_generate == example.length
            if "token_position_answer" in record:
                (positions,) = locate(example, tokenizer).answer_positions or ()
                assert record["token_position_answer"] in (positions[0], positions[0] + 1)
                ids = tokenizer.encode(example.prompt)
                assert tokenizer.decode(ids[i] for i in positions).strip() == example.references[0]
