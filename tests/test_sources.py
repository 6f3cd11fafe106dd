"""Where rows come from: what is named is taken or refused, and what is not named is told."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.workloads import hub as hub_module
from dsatrace.workloads import sources
from dsatrace.workloads.burstgpt import read_burstgpt
from dsatrace.workloads.catalog import DATA_SETS
from dsatrace.workloads.data_set import Source
from dsatrace.workloads.exports import read_export
from dsatrace.workloads.hub import default_data_folder
from dsatrace.workloads.longbench_v2 import LongBenchV2Loader
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.ruler.reader import read_examples
from dsatrace.workloads.samples import sample_file
from dsatrace.workloads.sharegpt import ShareGPTLoader
from dsatrace.workloads.sources import find_source
from helpers.fake_hub import COMMIT, SILENT_S, FakeHub, fake_hub
from helpers.ruler_samples import ROW, pack, write_rows
from helpers.waiting import until

NAMES = list(DATA_SETS)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def contents(tmp_path: Path) -> dict[str, bytes]:
    """What the fake hub has for each data set: the embedded samples, and an archive of one row."""
    archive = pack(
        tmp_path / "r.tgz", [("data/ruler/vt/validation_4096.jsonl", json.dumps(ROW).encode() + b"\n")]
    )
    samples = {
        name: sample_file(DATA_SETS[name].sample or "").read_bytes() for name in NAMES if name != "ruler"
    }
    return {"ruler": archive.read_bytes(), **samples}


@pytest.fixture
def hub(contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that has all four, pinned as the real ones are."""
    repos = {}
    for name, content in contents.items():
        pinned = DATA_SETS[name].hub
        digest = hashlib.sha256(content).hexdigest()
        repos[pinned.repo] = {pinned.file: content}
        pinned = dataclasses.replace(pinned, revision=COMMIT, sha256=digest)
        monkeypatch.setitem(DATA_SETS, name, dataclasses.replace(DATA_SETS[name], hub=pinned))
    with fake_hub(repos, monkeypatch, tmp_path) as hub:
        yield hub


def num_rows(name: str, path: Path, policy: Any = "fail") -> int:
    """Reads it all, as a runner does."""
    bad_rows = BadRows(policy)
    if name == "ruler":
        return sum(1 for _ in read_examples(path, bad_rows=bad_rows))
    if name == "longbenchv2":
        return sum(1 for _ in LongBenchV2Loader(path, bad_rows=bad_rows))
    if name == "sharegpt":
        return sum(1 for _ in ShareGPTLoader(path, bad_rows=bad_rows))
    return sum(1 for _ in read_burstgpt(path, bad_rows))


@pytest.mark.parametrize("name", NAMES)
def test_switched_off_and_nothing_there_means_embedded(
    hub: FakeHub, data: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    by_flag = find_source(DATA_SETS[name], use_hub=False, data=data)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = find_source(DATA_SETS[name], data=data)
    assert source == by_flag and not hub.requests
    assert source.reason.startswith(
        f"nothing lies in data/{name}, and the hub is switched off; download it with "
    )
    assert DATA_SETS[name].file_flag in source.reason
    if name == "ruler":
        assert (source.path, source.description) == (None, "generator")
    else:
        assert source.path == sample_file(DATA_SETS[name].sample or "")
        assert source.description == f"embedded {source.path.name} sha256:{sha256(source.path)}"
        assert num_rows(name, source.path) > 0
    assert source.text() == f"{name}: {source.description} ({source.reason})"


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_comes_before_the_sample(
    hub: FakeHub, data: Path, contents: dict[str, bytes], name: str
) -> None:
    lines: list[str] = []
    source = find_source(DATA_SETS[name], data=data, say=lines.append)
    pinned = DATA_SETS[name].hub
    what = f"{pinned.repo}@{COMMIT} {pinned.file}"
    assert source.description == f"hub {what} sha256:{pinned.sha256}"
    assert source.path is not None and source.path.read_bytes() == contents[name]
    assert num_rows(name, source.path) > 0
    assert [line.rpartition(",")[0] for line in lines] == [f"{name}: from the hub: {what}"]
    num_requests = len(hub.requests)
    assert find_source(DATA_SETS[name], data=data) == source  # kept: asked for once
    assert len(hub.requests) == num_requests


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ({"silent": True}, "the hub did not answer within 0.3 s"),
        ({"status": 500}, "the hub answers with error 500"),
        ({"gated": {DATA_SETS["sharegpt"].hub.repo}}, "wants its terms accepted"),
        ({"repos": {}}, "the hub shows no repository"),
    ],
)
def test_a_hub_that_does_not_give_it_is_told(
    hub: FakeHub, data: Path, monkeypatch: pytest.MonkeyPatch, trouble: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(sources, "PROBE_S", 0.3 if "silent" in trouble else SILENT_S)
    for field, value in trouble.items():
        setattr(hub, field, value)
    began = time.monotonic()
    source = find_source(DATA_SETS["sharegpt"], data=data)
    assert time.monotonic() - began < SILENT_S / 2
    assert source.description.startswith("embedded ")
    assert source.reason.startswith("nothing lies in data/sharegpt, and ") and reason in source.reason
    with pytest.raises(UserError) as caught:  # asked for by name, it does not fall back
        find_source(DATA_SETS["sharegpt"], repo=DATA_SETS["sharegpt"].hub.repo, data=data)
    assert reason in str(caught.value)


def test_a_named_repository_that_never_answers_is_given_up(
    hub: FakeHub, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limit that users have, five seconds of a run's ten; here they pass faster."""
    hub.silent = True
    limits: list[float] = []
    within = hub_module._within

    def within_a_moment(seconds: float, ask: Callable[[], Any]) -> Any:
        limits.append(seconds)
        return within(0.1, ask)

    monkeypatch.setattr(hub_module, "_within", within_a_moment)
    with pytest.raises(UserError, match=r"the hub did not answer within 5 s; .* --sharegpt-json"):
        find_source(DATA_SETS["sharegpt"], repo="me/mine", data=data)
    assert limits == [5.0]
    until(lambda: hub.requests)


def test_other_bytes_than_the_pinned_are_an_error(
    hub: FakeHub, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = dataclasses.replace(DATA_SETS["sharegpt"].hub, sha256="0" * 64)
    monkeypatch.setitem(DATA_SETS, "sharegpt", dataclasses.replace(DATA_SETS["sharegpt"], hub=wrong))
    with pytest.raises(UserError, match="its sha256 is"):
        find_source(DATA_SETS["sharegpt"], data=data)
    source = find_source(DATA_SETS["sharegpt"], revision="main", data=data)
    assert source.description.startswith(f"hub {wrong.repo}@{COMMIT} {wrong.file} sha256:")
    assert source.reason == "as named"


def test_a_named_repository_is_asked_for_its_file(
    hub: FakeHub, data: Path, contents: dict[str, bytes]
) -> None:
    hub.repos["me/mine"] = {DATA_SETS["sharegpt"].hub.file: contents["sharegpt"]}
    source = find_source(DATA_SETS["sharegpt"], repo="me/mine", data=data)
    assert source.description.startswith(
        f"hub me/mine@{COMMIT} ShareGPT_V3_unfiltered_cleaned_split.json sha256:"
    )
    hub.repos["me/other"] = {"chats.json": contents["sharegpt"]}
    with pytest.raises(UserError, match=r"me/other@main has no file ShareGPT_V3"):
        find_source(DATA_SETS["sharegpt"], repo="me/other", data=data)


@pytest.mark.parametrize("name", NAMES)
def test_a_named_file_never_falls_back(hub: FakeHub, data: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"gone: cannot read the file: No such file"):
        find_source(DATA_SETS[name], tmp_path / "gone", data=data)
    with pytest.raises(UserError, match="both asked for; name one of them"):
        find_source(DATA_SETS[name], tmp_path / "gone", repo="a/b", data=data)
    (tmp_path / "empty").mkdir()
    if name != "ruler":
        with pytest.raises(
            UserError, match=rf"is a folder; name the file in it with {DATA_SETS[name].file_flag}"
        ):
            find_source(DATA_SETS[name], tmp_path / "empty", data=data)
    assert not hub.requests


def test_a_file_is_described_without_its_path(tmp_path: Path, data: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(b"[]")
    source = find_source(DATA_SETS["longbenchv2"], file, data=data)
    description = f"file mine.json sha256:{sha256(file)}"
    assert source == Source("longbenchv2", file, description, "as named")
    write_rows(tmp_path / "rows", "vt", [ROW])
    folder = find_source(DATA_SETS["ruler"], tmp_path / "rows", data=data)
    assert re.fullmatch("folder rows sha256:[0-9a-f]{64}", folder.description)
    write_rows(tmp_path / "rows", "vt", [ROW, ROW])
    assert find_source(DATA_SETS["ruler"], tmp_path / "rows", data=data).description != folder.description


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_in_the_data_folder_comes_first(
    hub: FakeHub, data: Path, contents: dict[str, bytes], name: str
) -> None:
    folder = data / name
    folder.mkdir(parents=True)
    assert find_source(DATA_SETS[name], use_hub=False, data=data).reason.startswith("nothing lies in data/")
    if name == "ruler":
        write_rows(folder, "vt", [ROW])
    else:
        (folder / ("mine.csv" if name == "burstgpt" else "mine.jsonl")).write_bytes(contents[name])
    source = find_source(DATA_SETS[name], data=data)
    assert source.reason == f"found in data/{name}"
    assert source.description.startswith("folder " if name == "ruler" else "file ")
    assert source.path is not None and num_rows(name, source.path) > 0
    if name != "ruler":
        (folder / ("other.csv" if name == "burstgpt" else "other.json")).write_bytes(b"")
        with pytest.raises(UserError, match=rf"holds .*mine.*; name one with {DATA_SETS[name].file_flag}"):
            find_source(DATA_SETS[name], data=data)
    assert not hub.requests


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"name": 1}', "\xff"])
def test_a_broken_description_of_an_export_is_named(data: Path, text: str) -> None:
    (data / "sharegpt").mkdir(parents=True)
    (data / "sharegpt" / "SOURCE.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"SOURCE\.json: not an export's description: .*; export again"):
        read_export(data / "sharegpt")


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DSATRACE_DATA", raising=False)
    assert default_data_folder() == Path(__file__).resolve().parents[1] / "data"
    monkeypatch.setenv("DSATRACE_DATA", str(tmp_path))
    assert default_data_folder() == tmp_path


SAMPLES = {
    "ruler": json.dumps(ROW).encode() + b"\n" + json.dumps(ROW).encode(),
    **{name: sample_file(DATA_SETS[name].sample or "").read_bytes() for name in NAMES if name != "ruler"},
}
WOUNDS = [b"\0", b"\xef\xbb\xbf", b"\xff", b"\r\n", b"\n\n", b'"', b"}", b"]", b",", b"NaN", b"-1", b"1e400"]
WOUNDS += [b'"\\ud800"', b"9" * 5000, b"\x1f\x8b", b"\\", b"[" * 3000, b'{"id": "a"}']


@st.composite
def wounded(draw: st.DrawFn, name: str) -> bytes:
    """A sample cut off, with bytes put in, left out or said twice; or bytes of no meaning."""
    content = SAMPLES[name]
    for _ in range(draw(st.integers(0, 3))):
        begin = draw(st.integers(0, len(content)))
        end = draw(st.integers(begin, min(len(content), begin + 40)))
        put = draw(st.sampled_from([*WOUNDS, content[begin:end] * 2, b""]) | st.binary(max_size=8))
        content = content[:begin] + put + content[end:]
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(NAMES), policy=st.sampled_from(["fail", "skip"]))
def test_no_bytes_give_a_traceback(tmp_path: Path, data: st.DataObject, name: str, policy: Any) -> None:
    content = data.draw(wounded(name) | st.binary(max_size=80))
    file = tmp_path / "vt" / ("validation_4096.csv" if name == "burstgpt" else "validation_4096.jsonl")
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    source = find_source(DATA_SETS[name], file, data=tmp_path / "data")
    assert source.path == file and source.description.endswith(hashlib.sha256(content).hexdigest())
    try:
        assert num_rows(name, file, policy) >= 0
    except UserError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)


@pytest.mark.parametrize("name", ["longbenchv2", "sharegpt"])
def test_crlf_bom_and_ten_megabytes_read_as_they_should(tmp_path: Path, name: str) -> None:
    rows = json.loads(SAMPLES[name])
    column = "context" if name == "longbenchv2" else "id"
    rows[0][column] = "x" * (10 << 20)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in rows))
    assert num_rows(name, file) == len(rows)
