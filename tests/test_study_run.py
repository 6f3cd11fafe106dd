"""A replay of the study: its settings, its seam, the files it leaves, and the block accesses it hands on."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.kv.simulation.replay import ReplayConfig, replay
from dsatrace.study.accesses import ACCESSES_FILE, REQUESTS_FILE, read_accesses, write_accesses
from dsatrace.study.output_folder import check_output, file_labels, open_study
from dsatrace.study.requests import block_trace
from dsatrace.study.results import REQUEST_COLUMNS, statistics, write_results
from dsatrace.study.run import StudySettings, run_study
from helpers.study_samples import ROWS, read_csv, requests_of, three_turns


@pytest.mark.parametrize(
    "name", ["block_size", "num_blocks", "concurrency", "chunk_tokens", "host_blocks", "recount_tokens"]
)
@pytest.mark.parametrize("value", [0, -3, 2**31])
def test_a_bad_setting_is_named(name: str, value: int) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UserError, match=rf"{flag} must lie between 1 and \d+, not {value}"):
        StudySettings(**{name: value})


def test_a_cache_beyond_need_takes_no_memory() -> None:
    replayed = run_study(
        three_turns(), StudySettings(block_size=4, num_blocks=2**31 - 1, concurrency=2**31 - 1)
    )
    assert replayed.result.hit_tokens.tolist() == [0, 8, 16]
    assert len(replayed.result.final.block_keys) == replayed.trace.num_blocks_at_most


def test_without_prefix_caching_nothing_is_shared() -> None:
    replayed = run_study(three_turns(), StudySettings(block_size=4, prefix_caching=False))
    values = statistics(replayed)["metrics"]
    assert (values["blocks_reused"], values["blocks_unique"], values["hit_rate_first_prefill"]) == (0, 0, 0)
    assert values["blocks_allocated"] == 3 + 4 + 6
    assert values["hit_rate_infinite"] == values["hit_rate_chunks_recounted"] == 0


def test_the_files_of_a_replay(tmp_path: Path) -> None:
    replayed = run_study(three_turns(), StudySettings(block_size=4))
    with open_study(tmp_path / "out", {"study": "run"}) as folder:
        record = write_results(folder, "multi_turn", replayed)
    stats, manifest = (
        json.loads((tmp_path / "out" / name).read_text())
        for name in ("multi_turn_stats.json", "manifest.json")
    )
    assert stats == json.loads(json.dumps(record))
    assert stats["metrics"]["blocks_reused"] == 6
    assert stats["rejected"] == {"output_cut": 0, "prompt_too_long": 0, "request_too_long": 0}
    assert "workloads" not in stats  # there is one
    rows = read_csv(tmp_path / "out" / "multi_turn_request_metrics.csv")
    assert tuple(rows[0]) == REQUEST_COLUMNS
    assert [row["hit_tokens"] for row in rows] == ["0", "8", "16"]
    assert [row["conversation_id"] for row in rows] == ["c0"] * 3
    assert {row["host_hit_blocks"] for row in rows} == {""}
    blocks = read_csv(tmp_path / "out" / "multi_turn_block_metrics.csv")
    assert [row["hits"] for row in blocks] == ["2", "2", "1", "1", "0"]
    assert [row["depth"] for row in blocks] == ["0", "1", "2", "3", "4"]
    assert manifest["state"] == "complete"
    assert set(manifest["files"]) == {path.name for path in (tmp_path / "out").iterdir()} - {"manifest.json"}


def test_workloads_stand_apart() -> None:
    rows = [([1, 2, 3, 4, 5], [], "a"), ([1, 2, 3, 4, 6], [], "b")]
    record = statistics(run_study(requests_of(rows), StudySettings(block_size=4)))
    assert record["workloads"]["a"]["metrics"]["hit_rate_first_prefill"] == 0
    assert record["workloads"]["b"]["metrics"]["hit_rate_first_prefill"] == 4 / 5


def test_a_results_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(UserError, match="never overwritten; name a new or empty folder"):
        check_output(tmp_path)
    with pytest.raises(UserError, match="holds something already"), open_study(tmp_path, {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="holds something already"):
        check_output(file)


@pytest.mark.parametrize(
    "name", ["../x.json", "/tmp/x.json", "a/b", "", ".", "..", ".hidden", "a\0b", "manifest.json"]
)
def test_no_file_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with open_study(tmp_path / "out", {}) as folder, pytest.raises(UserError, match="output file"):
        folder.file(name)


def test_two_files_never_share_a_name(tmp_path: Path) -> None:
    with open_study(tmp_path / "out", {}) as folder:
        folder.write_json("a.json", {})
        with pytest.raises(UserError, match="another file of that name"):
            folder.write_json("a.json", {})


def test_a_study_that_fails_says_so(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_study(tmp_path / "out", {"study": "run"}):
        raise ZeroDivisionError
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["state"], manifest["error"]) == ("incomplete", "ZeroDivisionError")


@settings(deadline=None)  # the first call loads compiled code
@given(st.lists(st.text(max_size=90), unique=True, max_size=8))
def test_workloads_in_file_names(names: list[str]) -> None:
    labels = file_labels(names)
    assert len(set(labels.values())) == len(names)
    assert all(Path(label).name == label and label.isascii() and len(label) < 70 for label in labels.values())


@settings(deadline=None)  # the first call loads compiled code
@given(ROWS, st.integers(1, 4), st.integers(1, 3))
def test_accesses_are_read_as_written(tmp_path_factory: Any, rows: Any, block_size: int, factor: int) -> None:
    """Requests and blocks, at the size that was written and at its multiples."""
    folder = tmp_path_factory.mktemp("accesses")
    requests = requests_of(rows)
    write_accesses(folder, requests, block_trace(requests, block_size))
    again = read_accesses(folder)
    for name in ("arrival_s", "turn", "num_prompt_tokens", "num_response_tokens", "conversation", "workload"):
        assert np.array_equal(getattr(again, name), getattr(requests, name)), name
    assert again.workload_names == requests.workload_names
    size = block_size * factor
    wanted, trace = block_trace(requests, size), block_trace(again, size)
    assert trace.key_ptr.tolist() == wanted.key_ptr.tolist()
    same = dict(zip(trace.keys.tolist(), wanted.keys.tolist(), strict=True))
    assert [same[key] for key in trace.keys.tolist()] == wanted.keys.tolist()
    assert len(set(same.values())) == len(same)
    if block_size > 1:
        tokens = again.as_tokens()
        assert tokens.num_prompt_tokens.tolist() == np.diff(tokens.prompt_offsets).tolist()
        hits = [
            replay(each, ReplayConfig(None)).hit_tokens.tolist()
            for each in (block_trace(tokens, size), wanted)
        ]
        assert hits[0] == hits[1]


def write_three_turns_accesses(folder: Path) -> None:
    requests = three_turns()
    write_accesses(folder, requests, block_trace(requests, 4))


def test_access_files_are_their_owners(tmp_path: Path) -> None:
    write_three_turns_accesses(tmp_path)
    for name in (REQUESTS_FILE, ACCESSES_FILE):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    access = json.loads((tmp_path / ACCESSES_FILE).read_text().splitlines()[1])
    assert (access["block_ids"], access["output_block_ids"]) == ([0, 1, 2], [3])


def _edit(name: str, change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        change(rows)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    return edit


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_edit(ACCESSES_FILE, lambda rows: rows.pop()), "3 rows in requests.jsonl but 2 in accesses.jsonl"),
        (_edit(ACCESSES_FILE, lambda rows: rows[1].update(block_ids=[0, -1])), "row 1.*id out of range"),
        (_edit(ACCESSES_FILE, lambda rows: rows[1].update(block_ids="01")), "row 1.*not a list of whole"),
        (_edit(ACCESSES_FILE, lambda rows: rows[1].update(block_ids=[True])), "row 1.*not a list of whole"),
        (_edit(ACCESSES_FILE, lambda rows: rows[2].update(block_size=8)), "row 2: block size 8 after 4"),
        (_edit(ACCESSES_FILE, lambda rows: rows[0].update(block_size=0)), "row 0.*block size below 1"),
        (_edit(ACCESSES_FILE, lambda rows: rows[0]["block_ids"].extend([7, 8])), "row 0: more block ids"),
        (_edit(ACCESSES_FILE, lambda rows: rows[1]["block_ids"].pop()), "row 1: output_block_ids without"),
        (_edit(ACCESSES_FILE, lambda rows: rows.reverse()), "row 0.*requests out of order"),
        (_edit(REQUESTS_FILE, lambda rows: rows[2].update(arrival_s=1.0)), "row 2.*runs backwards"),
        (_edit(REQUESTS_FILE, lambda rows: rows[1].pop("num_tokens")), "row 1.*missing column"),
        (_edit(REQUESTS_FILE, lambda rows: rows[1].update(num_tokens=-1)), "row 1.*negative number"),
        (_edit(REQUESTS_FILE, lambda rows: rows[1].update(turn=-2)), "row 1.*negative number"),
        (lambda folder: (folder / REQUESTS_FILE).unlink(), "cannot read the file"),
        (lambda folder: (folder / ACCESSES_FILE).write_bytes(b'{"request": 0, "ti'), "not JSON"),
        (lambda folder: (folder / ACCESSES_FILE).write_bytes(b""), "holds no rows"),
    ],
)
def test_spoilt_accesses_are_named(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    write_three_turns_accesses(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        read_accesses(tmp_path)
