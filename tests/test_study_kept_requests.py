"""Requests that an earlier study tokenised: found again whole, or made anew; a study never fails for them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsatrace.jit import private_folder
from dsatrace.study import kept_requests
from dsatrace.study.kept_requests import KeptRequests, Made
from dsatrace.study.prepare import ClientSettings
from dsatrace.study.requests import StudyRequests
from dsatrace.study.sources import Client, Log, Source
from dsatrace.study.tokenization import PieceEncoder, open_vocabulary
from dsatrace.workloads.rows import BadRows
from helpers.study_samples import study, three_turns

ASK, SAID = {"role": "user", "content": "Where is it?"}, "In the shed."
LOG = [{"timestamp": 1764320003.5 + i, "messages": [ASK] * (1 + i), "response": SAID} for i in range(4)]
CHATS = [{"id": str(i), "conversations": [{"from": "human", "value": f"Hello {i}"}]} for i in range(3)]
TRACE = [
    {"prompt": "Hello", "response": "", "conversation_id": "c", "turn_index": i, "timestamp": i}
    for i in range(2)
]
WORDS = {"name": "words", "unit": "word"}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_requests, "FEWEST_IDS", 1)


def files() -> list[Path]:
    folder = private_folder("requests")
    assert folder is not None
    return sorted(folder.iterdir())


def write(path: Path, rows: list[dict[str, Any]], more: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + more)
    return path


def never() -> Made:
    raise AssertionError("what was kept is made again")


def check_equal(one: StudyRequests, other: StudyRequests) -> None:
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name), strict=isinstance(value, np.ndarray))


@pytest.mark.parametrize("kind", ["log", "trace", "chats"])
def test_the_next_client_tokenises_nothing_and_knows_the_same(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {
        "log": lambda: Source(log=Log((str(write(tmp_path / "log", LOG, "{}\n")),))),
        "trace": lambda: Source(trace_file=write(tmp_path / "trace", TRACE, "{}\n")),
        "chats": lambda: Source((write(tmp_path / "chats", CHATS, "{}\n"),)),
    }[kind]()

    def client() -> Client:
        words, skip = open_vocabulary("words"), BadRows("skip")
        return Client(source, ClientSettings(), words, skip, keep_tokens=True)

    first, again = client(), client()
    requests = first.requests()
    assert first.bad_rows.counts.total() == 1
    monkeypatch.setattr(PieceEncoder, "encoded", never)
    check_equal(again.requests(), requests)
    assert again.describe() == first.describe()
    assert again.kept is not None
    assert again.kept.said == [f"read and tokenised by an earlier run, {files()[0]}"]
    assert files()[0].stat().st_mode & 0o777 == 0o600


def test_a_second_study_of_a_log_says_so_and_finds_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write(tmp_path / "log", LOG)
    flags = ("--log", log, "--tokenizer", "words", "--kv-layout", "glm-5", "--block-size", 4)
    said = []
    for number, more in enumerate(((), (), ("--no-kept-tokens",))):
        out = tmp_path / str(number)
        assert study("size", *flags, *more, "--skip-visualization", "--output-dir", out) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("requests: ")])
        assert (out / "size.json").read_bytes() == (tmp_path / "0" / "size.json").read_bytes()
    assert said == [
        [f"requests: kept for the next run in {files()[0]}"],
        [f"requests: read and tokenised by an earlier run, {files()[0]}"],
        [],
    ]


def test_off_a_terminal_lines_say_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dsatrace.commands.progress.LINE_INTERVAL_S", 0)
    flags = ("--log", write(tmp_path / "log", LOG), "--tokenizer", "words", "--no-kept-tokens")
    assert study("explain", *flags, "--output-dir", tmp_path / "out") == 0
    assert "tokenize requests: 4 records so far\n" in capsys.readouterr().err


def test_another_text_tokenizer_form_or_version_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(made_of: Any, label: Mapping[str, str]) -> None:
        KeptRequests(label).get(made_of, lambda: (three_turns(), {}))

    label = {"name": "a/tokenizer.json", "sha256": "1", "form": "DeepSeek's chat form"}
    keep("text", label)
    KeptRequests({**label, "name": "b/tokenizer.json"}).get("text", never)
    keep("other text", label)
    keep("text", {**label, "sha256": "2"})
    keep("text", {**label, "form": "Human: and Assistant: lines"})
    monkeypatch.setattr(kept_requests, "_code_digest", lambda: "another version")
    keep("text", label)
    assert len(files()) == 5


def test_damage_anywhere_is_found_and_mended() -> None:
    kept = KeptRequests(WORDS)
    requests, facts = kept.get("text", lambda: (three_turns(), {"counts": {"a": 1}}))
    (file,) = files()
    whole = file.read_bytes()
    for at in (*range(0, len(whole), 97), len(whole) - 1):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :]):
            file.write_bytes(damaged)
            found, found_facts = kept.get("text", lambda: (requests, facts))
            check_equal(found, requests)
            assert found_facts == facts
            if kept.said[-1].endswith("; what an earlier run kept was damaged"):
                assert file.read_bytes() == whole
    mended = sum("damaged" in line for line in kept.said)
    assert mended > len(kept.said) * 0.6  # the rest hit what zip files say twice, and nothing that is read


def test_a_full_disk_costs_only_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    kept = KeptRequests(WORDS)
    kept.get("text", lambda: (three_turns(), {}))
    (line,) = kept.said
    assert line.startswith("not kept for the next run: ") and "No space left on device" in line
    assert files() == []


def test_a_log_that_grows_meanwhile_and_a_small_one_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptRequests(WORDS)
    kept.get("text", lambda: (three_turns(), {}), is_current=lambda: False)
    monkeypatch.setattr(kept_requests, "FEWEST_IDS", 1000)
    kept.get("text", lambda: (three_turns(), {}))
    assert (files(), kept.said) == ([], [])


def test_what_was_not_used_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptRequests(WORDS)
    kept.get("a", lambda: (three_turns(), {}))
    (first,) = files()
    os.utime(first, (1, 1))
    monkeypatch.setattr(kept_requests, "MOST_BYTES", first.stat().st_size * 2 + 100)
    kept.get("b", lambda: (three_turns(), {}))
    (second,) = set(files()) - {first}
    os.utime(second, (2, 2))
    for name in ("old", "new"):
        (first.parent / f".{name}.tmp").touch()
    os.utime(first.parent / ".old.tmp", (1, 1))  # left by a study that was killed
    kept.get("a", never)  # used last, though it is older
    kept.get("c", lambda: (three_turns(), {}))
    assert [file.name for file in files() if file.suffix == ".tmp"] == [".new.tmp"]
    assert len(files()) == 3 and not second.exists()
    kept.get("a", never)
