"""Reading rows: whatever the file holds, rows come out or one clear line does, and memory holds one row."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.workloads import json_rows
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.rows import BadRow, BadRows, choice_column, open_source, text_column

ROWS = [{"id": "a", "text": 'q "x" \\ [1]'}, {"id": "b", "text": "深度{\n}"}, {"id": "c", "text": "\\\\"}]
BROKEN = b'[{"id": "a"}, {"id": "b", "text": "no end'


def read(path: Path, bad_rows: BadRows | None = None) -> list[dict[str, Any]]:
    return list(read_json_rows(path, lambda number, row: row, bad_rows or BadRows()))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.json"


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_arrays_and_lines_read_alike(
    file: Path, indent: int | None, ascii_only: bool, ends: bytes, mark: bytes
) -> None:
    array = json.dumps(ROWS, indent=indent, ensure_ascii=ascii_only).encode().replace(b"\n", ends)
    file.write_bytes(mark + array + ends)
    assert read(file) == ROWS
    lines = [json.dumps(row, ensure_ascii=ascii_only).encode() for row in ROWS]
    file.write_bytes(mark + ends.join([*lines[:1], b"", *lines[1:]]))  # a blank line, no last line's end
    assert read(file) == ROWS


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text('aé深😀\0\u2028\\"{[,', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\"\\[{,]}'"), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text('ab"\\', max_size=3), json_values, max_size=3)


@given(
    st.lists(objects, min_size=1, max_size=5), st.booleans(), st.sampled_from([None, 2]), st.integers(1, 9)
)
def test_streamed_rows_are_those_of_the_standard_library(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    ascii_only: bool,
    indent: int | None,
    chunk: int,
) -> None:
    file = tmp_path_factory.getbasetemp() / "array.json"
    file.write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    with open_source(file) as stream, pytest.MonkeyPatch.context() as patch:
        stream.read(1)
        patch.setattr(json_rows, "_CHUNK_BYTES", chunk)  # every border falls somewhere
        pieces = [bytes(piece.data) for piece in json_rows._Array(stream, 1, "array.json").pieces()]
    assert [json.loads(piece) for piece in pieces] == rows
    assert read(file) == rows


junk = st.one_of(
    st.binary(max_size=60),
    st.lists(
        st.sampled_from([*b'[]{}",:\\\n\r \0\xff1']).map(lambda byte: bytes([byte]))
        | st.sampled_from([b"\xef\xbb\xbf", b'"a"', b"NaN", b'"\\ud800"', b"\xed\xa0\x80", b'{"a": "b"}']),
        max_size=20,
    ).map(b"".join),
)


@given(junk, st.sampled_from(["fail", "skip"]))
def test_any_bytes_give_rows_or_a_clear_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, policy: Any
) -> None:
    file = tmp_path_factory.getbasetemp() / "junk.json"
    file.write_bytes(content)

    def parse(number: int, row: dict[str, Any]) -> str:
        return text_column(row, "a")

    try:
        texts = list(read_json_rows(file, parse, BadRows(policy)))
    except UserError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
    else:
        assert texts
        assert [text.encode() for text in texts]  # no half of a surrogate pair came through


@given(st.integers(1, len(json.dumps(ROWS)) - 1))
def test_an_array_cut_off_gives_its_whole_rows(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    content = json.dumps(ROWS).encode()[:length]
    file = tmp_path_factory.getbasetemp() / "cut.json"
    file.write_bytes(content)
    seen: list[dict[str, Any]] = []
    with pytest.raises(UserError, match=rf"cut off: the file ends at byte {length}[ ,]"):
        for row in read_json_rows(file, lambda number, row: row, BadRows()):
            seen.append(row)
    ends = [len(json.dumps(ROWS[: n + 1])) for n in range(len(ROWS))]  # a comma or bracket follows row n
    assert seen == ROWS[: sum(length >= end for end in ends)]


def test_a_string_cut_off_names_where_it_began(file: Path) -> None:
    file.write_bytes(BROKEN)
    with pytest.raises(UserError) as caught:
        read(file)
    begin = BROKEN.index(b'"no end')
    assert str(caught.value) == (
        f"{file}: row 1 (byte 14): cut off: the file ends at byte {len(BROKEN)}, "
        f"in a string from byte {begin}; mend the row, or pass over such rows with --bad-rows skip"
    )
    bad_rows = BadRows("skip")
    assert read(file, bad_rows) == [{"id": "a"}]
    assert bad_rows.text() == "1 bad row skipped: 1 cut off"


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        (b'{"a": NaN}', "not JSON: NaN is not a JSON value"),
        (b'{"a": -Infinity}', "not JSON: -Infinity is not a JSON value"),
        (b'{"a": "x\0y"}', "not JSON: Invalid control character at byte 23"),
        (b'{"a": "\xc3\xa9", "b": tru}', "not JSON: Expecting value at byte 32"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8: at byte 22"),
        (b'{"a": "\\ud83d"}', "column 'a': lone surrogate: at character 0"),
        (b'{"a": 7}', "column 'a': not a text: it is of type int"),
        (b'{"b": "x"}', "column 'a': missing column"),
        (b'["a"]', "not an object: it is of type list"),
        (b"9" * 5000, "not JSON: Exceeds the limit"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not JSON: it is nested too deeply"),
    ],
)
def test_a_bad_element_is_named_and_costs_its_row_only(file: Path, element: bytes, reason: str) -> None:
    def parse(number: int, row: dict[str, Any]) -> tuple[int, str]:
        return number, text_column(row, "a")

    for content in (b'[{"a": "1"},\n  %b, {"a": "3"}]', b'{"a": "1"}    \n%b\n{"a": "3"}\n'):
        file.write_bytes(content % element)
        bad_rows = BadRows("skip")
        assert list(read_json_rows(file, parse, bad_rows)) == [(0, "1"), (2, "3")]
        assert bad_rows.summary() == {
            "policy": "skip",
            "num_skipped": 1,
            "by_reason": {reason.partition("': ")[2].partition(":")[0] or reason.partition(":")[0]: 1},
        }
    file.write_bytes(b'[{"a": "1"},\n  %b, {"a": "3"}]' % element)
    with pytest.raises(UserError) as caught:
        list(read_json_rows(file, parse, BadRows()))
    assert str(caught.value).startswith(f"{file}: row 1 (byte 15)") and reason in str(caught.value)


def test_lines_are_numbered_as_an_editor_does(file: Path) -> None:
    file.write_bytes(b'{"a": 1}\n\n\n{"a":\n')
    with pytest.raises(UserError, match=r"row 1 \(line 4\): not JSON: Expecting value at byte 17"):
        read(file)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no rows"),
        (b"\xef\xbb\xbf \r\n", "holds no rows"),
        (b"[ ]", "holds no rows"),
        (b"<html>\n<body>\n", "row 0 (line 1): not JSON"),
        ('[{"a": "b"}]'.encode("utf-16"), "is UTF-16 or UTF-32; convert it to UTF-8"),
        (b'[{"a": "b"}]\0\0', "the array is closed, but more follows at byte 12"),
        (b'[{"a": "b"},]', "row 1 (byte 12): not JSON"),
    ],
)
def test_a_file_that_is_no_list_of_rows_says_so(file: Path, content: bytes, reason: str) -> None:
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(file)
    assert reason in str(caught.value)


def test_a_file_of_bad_rows_only_is_refused_under_skip_too(file: Path) -> None:
    file.write_bytes(b"<html>\n<body>\n")
    with pytest.raises(UserError, match="none of its 2 rows can be used: 2 bad rows skipped: 2 not JSON"):
        read(file, BadRows("skip"))


@pytest.mark.parametrize("name", ["missing.json", ".", "nul\0.json"])
def test_a_path_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot read the file"):
        read(tmp_path / name)


@pytest.mark.parametrize("form", ["array", "lines"])
def test_a_value_of_ten_megabytes_is_a_value(file: Path, form: str) -> None:
    huge = {"a": 'x"\\\n ' * (2 << 20)}
    content = json.dumps([huge, {"a": "small"}]) if form == "array" else json.dumps(huge) + '\n{"a": "small"}'
    file.write_text(content)
    assert read(file) == [huge, {"a": "small"}]


def test_a_row_that_never_ends_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 1 << 20)
    for content in (b'[{"a": [', b'{"a": '):
        file.write_bytes(content + b"1," * (2 << 20))
        with pytest.raises(UserError, match=r"row at byte \d is longer than 1\.0 MiB"):
            read(file)


def test_memory_holds_one_row_whatever_the_file(file: Path) -> None:
    row = json.dumps({"a": "x" * 100_000})
    with file.open("w") as stream:
        stream.write("[" + ",\n".join([row] * 400) + "]")
    tracemalloc.start()
    num_rows = sum(1 for _ in read_json_rows(file, lambda number, row: None, BadRows()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_rows == 400
    assert peak < 8 << 20 < file.stat().st_size / 4


def test_policies_and_choices() -> None:
    with pytest.raises(UserError, match="unknown policy 'ignore' for bad rows; use fail or skip"):
        BadRows("ignore")  # type: ignore[arg-type]
    assert BadRows("skip").text() == "0 bad rows skipped"
    assert choice_column({"a": "x"}, "a", ("x", "y")) == "x"
    with pytest.raises(BadRow, match="unknown value: use one of x, y"):
        choice_column({"a": "secret"}, "a", ("x", "y"))
