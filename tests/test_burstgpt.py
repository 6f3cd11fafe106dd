"""BurstGPT: both layouts, rebased arrivals, bad numbers, and a generator that follows its seed."""

from __future__ import annotations

import csv
import itertools
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.workloads.burstgpt import MAX_LINE_BYTES, Arrivals, read_burstgpt
from dsatrace.workloads.burstgpt_synthetic import (
    BurstRow,
    BurstSettings,
    SyntheticPrompts,
    generate_burstgpt,
)
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.samples import sample_file
from helpers.burstgpt_file import BURSTGPT_SETTINGS, write_burstgpt
from helpers.real_data import real_file

OLD = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
NEW = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "10.0,s1,3,GPT-4,9,4,13,Conversation log\n"
    "12.5,,,ChatGPT,5,0,5,API log\n"
    "12.5,s1,,GPT-4,20,2,22,Conversation log\n"
)


def rows_of(*seconds: float, failed: tuple[int, ...] = ()) -> list[BurstRow]:
    return [BurstRow(i, second, 4, 0 if i in failed else 2) for i, second in enumerate(seconds)]


def counts(*numbers: int) -> dict[str, int]:
    return dict(zip(Arrivals.COUNTS, (*numbers, 0), strict=True))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "burst.csv"


def test_columns_are_found_by_name_in_both_layouts(file: Path) -> None:
    file.write_text(NEW)
    assert list(read_burstgpt(file)) == [
        BurstRow(0, 10.0, 9, 4, "GPT-4", "Conversation log", "s1", 3.0),
        BurstRow(1, 12.5, 5, 0, "ChatGPT", "API log", None, None),
        BurstRow(2, 12.5, 20, 2, "GPT-4", "Conversation log", "s1", None),
    ]
    file.write_bytes(b"\xef\xbb\xbf" + OLD.encode() + b"\r\n5,ChatGPT,472,18,490,Conversation log\r\n\r\n")
    assert list(read_burstgpt(file)) == [BurstRow(0, 5.0, 472, 18, "ChatGPT", "Conversation log")]
    file.write_text('Response tokens,"Request tokens", Timestamp\n1,2,3e1\n')
    assert list(read_burstgpt(file)) == [BurstRow(0, 30.0, 2, 1)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("NaN,GPT-4,1,2,3,API log", "column 'Timestamp': not a number: 'NaN'"),
        ("inf,GPT-4,1,2,3,API log", "column 'Timestamp': not a number: 'inf'"),
        ("1_0,GPT-4,1,2,3,API log", "column 'Timestamp': not a number: '1_0'"),
        (",GPT-4,1,2,3,API log", "column 'Timestamp': not a number: ''"),
        ("-7,GPT-4,1,2,3,API log", "column 'Timestamp': negative number: -7"),
        ("1e11,GPT-4,1,2,3,API log", "column 'Timestamp': number too large: 1e11 is over 1e+10"),
        ("9" * 5000 + ",GPT-4,1,2,3,API log", f"number too large: {'9' * 40}... is over"),
        ("6,GPT-4,-1,2,3,API log", "column 'Request tokens': negative number: -1"),
        ("6,GPT-4,1.5,2,3,API log", "column 'Request tokens': not a whole number: 1.5"),
        ("6,GPT-4,1,20000000,3,API log", "column 'Response tokens': number too large"),
        ("6,GPT-4,1,2", "wrong number of columns: 4, but the header has 6"),
        ("6,GPT-4,1,2,3,API log,x", "wrong number of columns: 7"),
        ('6,GPT-4,1,2,3,"API log', "not CSV: unexpected end of data"),
        ("6,GPT\0-4,1,2,3,API log", "NUL byte: at byte 5 of the line"),
        ("6,GPT-\udcff,1,2,3,API log", "not UTF-8: at byte 6 of the line"),
        ("6,\udced\udca0\udc80,1,2,3,API log", "not UTF-8: at byte 2 of the line"),
        ("6," + "x" * (10 << 20) + ",1,2,3,API log", f"line too long: over {MAX_LINE_BYTES} bytes"),
        ("6," + "x" * 200_000 + ",1,2,3,API log", "not CSV: field larger than field limit"),
    ],
)
def test_bad_rows_are_named_or_counted(file: Path, line: str, reason: str) -> None:
    content = "\n".join([OLD, "5,GPT-4,1,2,3,API log", line, "5,GPT-4,7,2,9,API log", ""])
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        list(read_burstgpt(file))
    assert str(caught.value).startswith(f"{file}: row 1 (line 3)") and reason in str(caught.value)
    assert len(str(caught.value)) < 400
    bad_rows = BadRows("skip")
    assert [(row.source_row, row.request_tokens) for row in read_burstgpt(file, bad_rows)] == [(0, 1), (2, 7)]
    assert bad_rows.text().startswith("1 bad row skipped: 1 ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no column 'Timestamp' in line 1"),
        ("1,2,3\n", "no column 'Timestamp' in line 1"),
        ("Timestamp,Request tokens\n", "no column 'Response tokens' in line 1"),
        (f"{OLD},Model\n", "two columns of one name in line 1"),
        (f"{OLD}\n\n", "holds no rows"),
        ("\0\n", "line 1: NUL byte"),
        ("x" * (2 << 20), "line 1: line too long"),
    ],
)
def test_a_file_of_another_kind_says_so(file: Path, content: str, reason: str) -> None:
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        list(read_burstgpt(file, BadRows("skip")))
    assert str(caught.value).startswith(f"{file}: ") and reason in str(caught.value)


cells = st.sampled_from(
    ["5", "6.5", "-1", "nan", "", '"', "\0", "\udcff", "\r", "\n", ",", "x", "1e999", "GPT-4"]
)


@given(
    st.booleans(),
    st.lists(st.lists(cells, max_size=8).map(",".join), max_size=5),
    st.sampled_from(["fail", "skip"]),
)
def test_any_bytes_give_rows_or_a_clear_line(
    tmp_path_factory: pytest.TempPathFactory, header: bool, lines: list[str], policy: Any
) -> None:
    file = tmp_path_factory.getbasetemp() / "junk.csv"
    file.write_bytes("\n".join([OLD] * header + lines).encode("utf-8", "surrogateescape"))
    try:
        rows = list(read_burstgpt(file, BadRows(policy)))
    except UserError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
    else:
        seconds = [row.timestamp_s for row in rows]
        assert rows and seconds == sorted(seconds) and min(seconds) >= 0


def test_arrivals_start_at_the_first_row_kept() -> None:
    rows = rows_of(100.0, 103.0, 103.0, 110.0, failed=(0,))
    arrivals = Arrivals(rows)
    assert [(a.arrival_s, a.row.source_row) for a in arrivals] == [(0.0, 1), (0.0, 2), (7.0, 3)]
    assert arrivals.summary() == counts(4, 3, 1, 1, 0, 4)
    kept = Arrivals(rows, keep_failures=True, time_scale=0.1)
    assert [a.arrival_s for a in kept] == pytest.approx([0.0, 0.3, 0.3, 1.0])
    assert [a.arrival_s for a in Arrivals(rows, time_scale=0)] == [0.0, 0.0, 0.0]


def test_a_limit_counts_requests_and_reads_no_further() -> None:
    arrivals = Arrivals(rows_of(1.0, 2.0, 3.0, failed=(0,)), max_requests=1)
    assert [a.row.source_row for a in arrivals] == [1]
    assert arrivals.counts["rows"] == 2


def test_rows_are_put_in_order_within_the_window_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(rows_of(103.0, 100.0, 110.0, 101.0))
    arrivals = Arrivals(rows)
    assert [(a.arrival_s, a.row.source_row) for a in arrivals] == [(0, 1), (1, 3), (3, 0), (10, 2)]
    assert (arrivals.summary()["moved"], arrivals.summary()["rows"]) == (2, 4)
    assert [a.row.source_row for a in Arrivals(rows, max_requests=2)] == [1, 3]
    monkeypatch.setattr("dsatrace.workloads.rows.SORT_WINDOW", 1)
    with pytest.raises(UserError, match="a row is 2 s earlier than one that stands over 1 rows before"):
        list(Arrivals(rows, source="a.csv"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"time_scale": -1.0}, "time_scale must be a number of at least 0, not -1.0"),
        ({"time_scale": float("nan")}, "not nan"),
        ({"time_scale": float("inf")}, "not inf"),
        ({"max_requests": 0}, "max_requests must be at least 1"),
    ],
)
def test_impossible_arrivals_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Arrivals([], **options)


def test_the_real_head_of_the_old_layout() -> None:
    rows = list(read_burstgpt(real_file("burstgpt/BurstGPT_1_head400.csv")))
    arrivals = Arrivals(rows)
    served = list(arrivals)
    assert arrivals.summary() == counts(400, 383, 17, 4, 2, 400)
    assert served[0].arrival_s == 0.0 and served[-1].arrival_s == 37_269.0
    requests = [row.request_tokens for row in rows]
    assert sum(tokens == 0 for tokens in requests) == 17
    assert round(statistics.mean(requests)) == 520 and max(requests) == 2126
    assert len(list(Arrivals(rows, keep_failures=True))) == 400


def test_the_real_head_of_the_new_layout() -> None:
    rows = list(read_burstgpt(real_file("burstgpt/BurstGPT_3_head105.csv")))
    arrivals = Arrivals(rows)
    served = list(arrivals)
    assert arrivals.summary() == counts(105, 105, 0, 0, 6, 6)
    assert (rows[0].timestamp_s, rows[0].elapsed_s, served[0].arrival_s) == (19_440_110.0, 43.0, 0.0)
    assert max(row.request_tokens for row in rows) == 25_085
    sessions = [row.session_id for row in rows if row.session_id is not None]
    assert max(map(sessions.count, set(sessions))) == 24
    assert all((row.session_id is None) is (row.log_type == "API log") for row in rows)


@pytest.mark.parametrize("with_sessions", [True, False])
def test_generated_rows_survive_the_file(file: Path, with_sessions: bool) -> None:
    rows = list(generate_burstgpt(BurstSettings(num_rows=300, seed=3)))
    write_burstgpt(file, rows, with_sessions)
    read = list(read_burstgpt(file))
    assert [(r.timestamp_s, r.request_tokens, r.response_tokens, r.model, r.log_type) for r in read] == [
        (r.timestamp_s, r.request_tokens, r.response_tokens, r.model, r.log_type) for r in rows
    ]
    assert [row.session_id for row in read] == [row.session_id if with_sessions else None for row in rows]
    with file.open() as stream:
        table = list(csv.DictReader(stream))
    assert ",".join(table[0]) == (NEW.split("\n", maxsplit=1)[0] if with_sessions else OLD)
    assert all(
        int(row["Total tokens"]) == int(row["Request tokens"]) + int(row["Response tokens"]) for row in table
    )


def test_the_generator_draws_what_its_settings_say() -> None:
    one, other = (BurstSettings(num_rows=20_000, seed=seed) for seed in (1, 0))
    rows = list(generate_burstgpt(one))
    assert rows == list(generate_burstgpt(one)) != list(generate_burstgpt(other))
    gaps = [b.timestamp_s - a.timestamp_s for a, b in itertools.pairwise(rows)]
    mean = statistics.mean(gaps)
    assert mean == pytest.approx(0.25 * 2.0, rel=0.05)
    assert statistics.stdev(gaps) / mean == pytest.approx(0.25**-0.5, rel=0.05)  # of a Gamma distribution
    for lengths, largest in (
        ([row.request_tokens for row in rows if row.request_tokens], 4096),
        ([row.response_tokens for row in rows if row.response_tokens], 1024),
    ):
        weights = [k**-1.1 for k in range(1, largest + 1)]
        assert min(lengths) >= 1 and max(lengths) <= largest
        for k in (1, 2, 3, 10):
            assert lengths.count(k) / len(lengths) == pytest.approx(weights[k - 1] / sum(weights), rel=0.2)
        expected = sum(k * weight for k, weight in enumerate(weights, 1)) / sum(weights)
        assert statistics.mean(lengths) == pytest.approx(expected, rel=0.05)
    shares = {
        "api": statistics.mean(row.log_type == "API log" for row in rows),
        "gpt4": statistics.mean(row.model == "GPT-4" for row in rows),
        "failed": statistics.mean(row.failed for row in rows),
    }
    assert shares == pytest.approx({"api": 0.5, "gpt4": 0.15, "failed": 0.07}, rel=0.1)
    sessions = [row.session_id for row in rows if row.session_id is not None]
    assert len(sessions) / len(set(sessions)) == pytest.approx(4.0, rel=0.1)
    assert all((row.session_id is None) is (row.log_type == "API log") for row in rows)


def test_the_settings_print_and_refuse() -> None:
    assert (
        "gap_shape 0.25, gap_scale_s 2.0, zipf_exponent 1.1, max_request_tokens 4096"
        in BurstSettings().text()
    )
    for name, value in [
        ("num_rows", 0),
        ("gap_shape", 0.0),
        ("gap_scale_s", float("inf")),
        ("zipf_exponent", -1.0),
        ("mean_session_rows", 0.5),
        ("api_share", 1.5),
        ("failure_share", float("nan")),
    ]:
        with pytest.raises(UserError, match=f"{name} of generated arrivals must be "):
            BurstSettings(**{name: value})  # type: ignore[arg-type]


def test_the_embedded_rows_are_the_generators(file: Path) -> None:
    write_burstgpt(file, generate_burstgpt(BURSTGPT_SETTINGS))
    assert file.read_text() == sample_file("burstgpt").read_text()
    rows = list(read_burstgpt(sample_file("burstgpt")))
    assert len(rows) == 40 and any(row.failed for row in rows)
    assert len({row.session_id for row in rows}) > 5
    with pytest.raises(UserError, match="no embedded sample 'x'; there are burstgpt, longbench_v2, sharegpt"):
        sample_file("x")


def row_of(source_row: int, num_tokens: int, session: str | None = "s") -> BurstRow:
    return BurstRow(source_row, 0.0, num_tokens, 1, session_id=session)


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 300), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 5))
def test_prompts_of_a_session_share_a_beginning(a: int, b: int, share: float, seed: int) -> None:
    prompts = SyntheticPrompts(first_token_id=1000, num_token_ids=1_000_000, shared_share=share, seed=seed)
    one, two, other, alone = (
        prompts.token_ids(row) for row in (row_of(0, a), row_of(1, b), row_of(2, a, "t"), row_of(3, a, None))
    )
    assert [len(one), len(two)] == [max(1, a), max(1, b)]
    assert all(1000 <= token < 1_001_000 for token in one + two + alone)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
    assert common == int(share * min(len(one), len(two)))
    assert one[0] not in (other[0], alone[0])
    assert one == prompts.token_ids(row_of(0, a))


def test_prompts_follow_seed_and_range() -> None:
    def ids(**changes: Any) -> tuple[int, ...]:
        options: dict[str, Any] = {"first_token_id": 3, "num_token_ids": 256, "seed": 0} | changes
        return SyntheticPrompts(**options).token_ids(row_of(0, 4000))

    assert ids() == ids() != ids(seed=1)
    assert set(ids()) == set(range(3, 259))
    assert set(ids(num_token_ids=1)) == {3}
    for changes, reason in [
        ({"num_token_ids": 0}, "not 0 of them from 3 on"),
        ({"first_token_id": -1}, "from -1 on"),
        ({"shared_share": 1.5}, "shared_share must lie between 0 and 1, not 1.5"),
    ]:
        with pytest.raises(UserError, match=reason):
            ids(**changes)
