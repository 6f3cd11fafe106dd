"""A run that is gone on with, wherever it broke off, ends up with what an undisturbed run would hold."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsatrace import files
from dsatrace.errors import UserError
from dsatrace.files import LineFile
from dsatrace.schema import MANIFEST_FILE, REQUESTS_FILE, STEPS_FILE, SUMMARY_FILE
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.export import export_run
from dsatrace.trace.reader import RunReader
from dsatrace.trace.resume import prepare_resume
from dsatrace.trace.tracer import Tracer
from dsatrace.trace.writer import TraceWriterError
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.run import verify
from helpers import resume_samples
from helpers.golden_run import read_lines, write_lines
from helpers.killing_disk import Disk, Killed
from helpers.resume_samples import (
    INFO,
    OUTPUTS,
    REQUESTS,
    Server,
    answers_of,
    check_summary,
    config_of,
    records_of,
    resume,
    rounded,
    serve,
)
from helpers.trace_samples import SECRET, SampleRequest

NUM_FORWARDS = 10
LEVELS_BELOW = ("blocks", "stats")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serve(tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.fixture(scope="module")
def writes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    """Every append of an undisturbed run, in order: (file, bytes)."""
    found: list[tuple[str, bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        append = LineFile.append

        def noted(lines: LineFile, data: bytes | memoryview) -> None:
            found.append((lines.path.name, bytes(data)))
            append(lines, data)

        patch.setattr(LineFile, "append", noted)
        serve(tmp_path_factory.mktemp("writes") / "run")
    return found


def killed_after(whole: Path, writes: list[tuple[str, bytes]], num_bytes: int, folder: Path) -> Path:
    """The run as a kill leaves it that came after so many bytes of all those appended."""
    shutil.copytree(whole, folder)
    for name in (STEPS_FILE, REQUESTS_FILE):
        (folder / name).write_bytes(b"")
    for name, data in writes:
        with (folder / name).open("ab") as file:
            file.write(data[:num_bytes])
        num_bytes -= min(num_bytes, len(data))
    _say_running(folder)
    (folder / SUMMARY_FILE).unlink()
    return folder


def check_equal(folder: Path, undisturbed: Path) -> None:
    assert records_of(folder) == records_of(undisturbed)
    assert answers_of(folder) == answers_of(undisturbed)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    verified = verify(folder)
    assert (verified.state, verified.notes) == ("complete", ())
    check_summary(folder)


def boundaries(writes: list[tuple[str, bytes]]) -> list[int]:
    """Bytes written by the end of each append, and before the first."""
    ends = [0]
    for _, data in writes:
        ends.append(ends[-1] + len(data))
    return ends


def test_the_cut_at_any_byte(
    undisturbed: Path, writes: list[tuple[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run killed anywhere the lines of ended requests stay, byte by byte, and nothing else."""
    Disk(monkeypatch)
    ends = boundaries(writes)
    near_an_end = {end + offset for end in ends for offset in (-2, -1, 0, 1, 2)}
    for size in sorted((near_an_end | set(range(0, ends[-1], 211))) & set(range(ends[-1] + 1))):
        folder = killed_after(undisturbed, writes, size, tmp_path / str(size))
        resumed = prepare_resume(folder)
        done = {line["request_id"] for line in _whole_lines(writes, size, REQUESTS_FILE)}
        assert resumed.done == done
        resumed.cut()
        for name in (STEPS_FILE, REQUESTS_FILE):
            kept = [line for line in _whole_lines(writes, size, name) if line["request_id"] in done]
            assert read_lines(folder, name) == kept
        assert resumed.summary.counts["requests"] == len(done)
        resumed.close()
        shutil.rmtree(folder)


def _whole_lines(writes: list[tuple[str, bytes]], size: int, name: str) -> Iterator[dict[str, Any]]:
    for where, data in writes:
        if where == name:
            for line in data[:size].splitlines(keepends=True):
                if line.endswith(b"\n"):
                    yield json.loads(line)
        size -= min(size, len(data))


def test_killed_between_any_two_writes(
    undisturbed: Path, writes: list[tuple[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch)
    for size in boundaries(writes):
        folder = killed_after(undisturbed, writes, size, tmp_path / str(size))
        resume(folder)
        check_equal(folder, undisturbed)


def test_killed_at_any_moment_of_the_resume(
    undisturbed: Path, writes: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    """Killed at each change that a resume makes to the folder, and resumed again."""
    ends = boundaries(writes)
    for size in (ends[7] + 30, ends[-3]):
        for at in itertools.count(1):
            folder = killed_after(undisturbed, writes, size, tmp_path / f"{size}_{at}")
            with pytest.MonkeyPatch.context() as patch:
                Disk(patch, at)
                patch.setattr(files, "_removed_on_failure", lambda path: contextlib.nullcontext())
                if not _is_killed(folder):
                    break
            verify(folder)
            with pytest.MonkeyPatch.context() as patch:
                Disk(patch)
                resume(folder)
            check_equal(folder, undisturbed)
        assert at > 10


def _is_killed(folder: Path) -> bool:
    try:
        resume(folder)
    except (Killed, UserError, TraceWriterError):
        return True
    return False


@pytest.mark.parametrize("at", range(1, 8))
def test_a_full_disk_in_the_resume(
    undisturbed: Path,
    writes: list[tuple[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    """One clear line, and what was there can still be resumed."""
    size = boundaries(writes)[12]
    folder = killed_after(undisturbed, writes, size, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, at, full=True)
        with pytest.raises(UserError, match="No space left on device") as caught:
            resume(folder)
    assert "\n" not in str(caught.value)
    assert RunReader(folder).state == "incomplete"
    verify(folder)
    resume(folder)
    check_equal(folder, undisturbed)


@pytest.mark.parametrize("stops", [(3, 6), (2, 4, 5, 9, 11), (1, 1, 1)])
def test_resumed_several_times(undisturbed: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    folder = serve(tmp_path / "run", stop_at=stops[0])
    started = RunReader(folder).manifest["started_utc"]
    seams = []
    for stop_at in (*stops[1:], 1 << 30):
        verify(folder)
        seams.append(resume(folder, stop_at).next_forward_idx)
    check_equal(folder, undisturbed)
    manifest = RunReader(folder).manifest
    assert manifest["resumed_at_forward"] == seams
    assert manifest["started_utc"] == started
    forwards = [record["forward_idx"] for record in read_lines(folder)]
    assert forwards == sorted(forwards)


@pytest.mark.parametrize("level", LEVELS_BELOW)
@pytest.mark.parametrize("stop_at", range(0, NUM_FORWARDS, 3))
def test_levels_below_full(tmp_path: Path, level: str, stop_at: int) -> None:
    """The summary is that of an undisturbed run, though its distributions cannot be derived again."""
    whole = serve(tmp_path / "whole", level=level)
    folder = serve(tmp_path / "run", stop_at, level=level)
    verify(folder)
    resume(folder, level=level)
    check_counted_once(folder, whole)


def check_counted_once(folder: Path, whole: Path) -> None:
    assert records_of(folder) == records_of(whole)
    assert answers_of(folder) == answers_of(whole)
    verified = verify(folder)
    assert (verified.state, verified.notes) == ("complete", verify(whole).notes)
    check_summary(folder)
    summary, expected = RunReader(folder).summary(), RunReader(whole).summary()
    for found in (summary, expected):
        # Who shares a forward with whom is another matter after a seam.
        del found["tracing_cost"], found["step_ms"], found["histograms"]["step_us"], found["counts"]["steps"]
    assert rounded(summary) == rounded(expected)


@pytest.mark.parametrize("level", ("full", *LEVELS_BELOW))
@pytest.mark.parametrize("stop_at", (0, 4, 7))
def test_what_lies_past_the_answers_stays_apart(
    tmp_path: Path, level: str, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer is one token; a request that was stopped past it is served, and counted, again."""
    ends = {"min_new_tokens": 0, "ignore_eos": True}
    asked = [dataclasses.replace(one, needle_positions=(3, 7, 9)) for one in REQUESTS]
    monkeypatch.setattr(resume_samples, "REQUESTS", asked)
    monkeypatch.setattr(resume_samples, "INFO", dataclasses.replace(INFO, answer_end=ends))
    capture, facts = resume_samples.Server.capture, resume_samples.RequestFacts

    def with_needles(server: Server, rows: Any, batch_size: int) -> StepCapture:
        found = capture(server, rows, batch_size)
        return dataclasses.replace(found, needles=server.tracer.needles(found.request_ids))

    monkeypatch.setattr(resume_samples.Server, "capture", with_needles)
    monkeypatch.setattr(resume_samples, "RequestFacts", functools.partial(facts, answer_tokens=1))
    whole = serve(tmp_path / "whole", level=level)
    folder = serve(tmp_path / "run", stop_at, level=level)
    verify(folder)
    resume(folder, level=level)
    check_counted_once(folder, whole)
    summary = RunReader(folder).summary()
    steps = [num_tokens - 1 for num_tokens in OUTPUTS.values()]
    said, past = sum(min(one, 1) for one in steps), sum(max(one - 1, 0) for one in steps)
    for name, num_steps in (("needle_recall", said), ("needle_recall_past", past)):
        assert summary[name]["records"] == num_steps * resume_samples.NUM_LAYERS > 0


@pytest.mark.parametrize("level", LEVELS_BELOW)
def test_killed_with_a_summary_behind_its_records(
    tmp_path: Path, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last summary does not count of a killed run is served again, ended or not."""
    Disk(monkeypatch)
    whole = serve(tmp_path / "whole", level=level)
    stored = [serve(tmp_path / f"s{i}", i, level=level) for i in range(0, NUM_FORWARDS, 3)]
    counted, served_again, shares = set(), 0, 0
    for i, behind in enumerate(stored):
        for ahead in stored[i:]:
            folder = tmp_path / f"{behind.name}_{ahead.name}"
            shutil.copytree(ahead, folder)
            shutil.copy(behind / SUMMARY_FILE, folder / SUMMARY_FILE)
            _say_running(folder)
            unfinished = RunReader(folder).summary()["unfinished"]
            shares += sum(unfinished["histograms"]["offsets"]["counts"])
            num_ended = sum(state == "length" for state, _ in answers_of(folder).values())
            served_again += num_ended - unfinished["ended_requests"]
            counted.add(unfinished["ended_requests"])
            resume(folder, level=level)
            check_counted_once(folder, whole)
    assert served_again > 0  # requests whose lines were there and in no summary
    assert shares > 0  # and there were steps to take off
    assert len(counted) > 1


@pytest.mark.parametrize("level", LEVELS_BELOW)
def test_killed_while_resuming_below_full(tmp_path: Path, level: str) -> None:
    """Its requests are cut already, and its summary is still the last one of before."""
    whole = serve(tmp_path / "whole", level=level)
    for at in itertools.count(1):
        folder = serve(tmp_path / str(at), 7, level=level)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, at)
            patch.setattr(files, "_removed_on_failure", lambda path: contextlib.nullcontext())
            with contextlib.suppress(Killed, TraceWriterError):
                resume(folder, level=level)
                break
        resume(folder, level=level)
        check_counted_once(folder, whole)
    assert at > 10


@pytest.mark.parametrize("level", LEVELS_BELOW)
def test_a_summary_that_keeps_no_shares_apart(tmp_path: Path, level: str) -> None:
    """An older version's, or one of which a power cut has taken a request: steps count twice, and are
    said to."""
    for lost in ("shares", "request"):
        folder = serve(tmp_path / lost, 7, level=level)
        summary = RunReader(folder).summary()
        if lost == "shares":
            del summary["unfinished"]
        else:
            summary["unfinished"]["ended_requests"] += 1
        (folder / SUMMARY_FILE).write_text(json.dumps(summary))
        resume(folder, level=level)
        assert "served again after a resume" in verify(folder).notes[-1]
        assert "unfinished" not in RunReader(folder).summary()


def test_killed_before_the_first_file(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(undisturbed / MANIFEST_FILE, folder)
    _say_running(folder)
    resumed = resume(folder)
    assert (resumed.done, resumed.next_forward_idx, resumed.elapsed_s) == (frozenset(), 0, 0.0)
    check_equal(folder, undisturbed)


def test_where_the_counters_go_on(tmp_path: Path) -> None:
    folder = serve(tmp_path / "run", stop_at=7)
    times = [line["finish_s"] for line in read_lines(folder, REQUESTS_FILE) if line["finish_s"]]
    forwards = [record["forward_idx"] for record in read_lines(folder)]
    resumed = prepare_resume(folder)
    assert resumed.elapsed_s == max(times) == pytest.approx(0.07)
    assert resumed.next_forward_idx == max(forwards) + 1 == 7
    assert resumed.done == {"r0", "r1", "r3"}
    resumed.close()


def test_nothing_to_cut_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose requests had all ended when it broke off, and one of which only a torn tail goes."""
    folder = serve(tmp_path / "run")
    _say_running(folder)
    before = {name: (folder / name).read_bytes() for name in (STEPS_FILE, REQUESTS_FILE)}
    with (folder / STEPS_FILE).open("ab") as file:
        file.write(b'{"event":"dsa_topk","request_id":"r9","la')
    inodes = [(folder / name).stat().st_ino for name in before]
    resumed = prepare_resume(folder)
    monkeypatch.setattr(LineFile, "append", _refuse)
    resumed.cut()
    resumed.close()
    assert [(folder / name).stat().st_ino for name in before] == inodes
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_records_that_a_power_cut_took(undisturbed: Path, tmp_path: Path) -> None:
    """A line of requests.jsonl may have reached the disk before the records it counts on."""
    folder = serve(tmp_path / "run")
    _say_running(folder)
    lines = (folder / STEPS_FILE).read_bytes().splitlines(keepends=True)
    (folder / STEPS_FILE).write_bytes(b"".join(lines[:-3]))
    lost = {json.loads(line)["request_id"] for line in lines[-3:]}
    resumed = resume(folder)
    assert resumed.done == OUTPUTS.keys() - lost
    check_equal(folder, undisturbed)


def test_sampled_steps(tmp_path: Path) -> None:
    whole = serve(tmp_path / "whole", sample_rate=0.5)
    for stop_at in range(1, NUM_FORWARDS):
        folder = serve(tmp_path / f"run{stop_at}", stop_at, sample_rate=0.5)
        resume(folder, sample_rate=0.5)
        check_equal(folder, whole)


def test_dropped_steps_are_not_served_again(tmp_path: Path) -> None:
    """Where a step may be lost, a request without it is done all the same, and the loss stays counted."""
    folder = serve(tmp_path / "run", 7, queue_policy="drop")
    kept = [record for record in read_lines(folder) if record["forward_idx"] != 4]
    write_lines(folder, kept)
    resumed = resume(folder, queue_policy="drop")
    assert resumed.done == {"r0", "r1", "r3"}
    assert RunReader(folder).summary()["dropped_steps"] == 1
    assert verify(folder).state == "complete"


def _say_running(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST_FILE).read_bytes()) | {"state": "running", "files": None}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def _refuse(*arguments: object) -> None:
    raise AssertionError(f"called with {arguments}")


def test_one_resume_at_a_time(tmp_path: Path) -> None:
    folder = serve(tmp_path / "run", stop_at=7)
    first = prepare_resume(folder)
    with pytest.raises(UserError, match="is still being written"):
        prepare_resume(folder)
    first.cut()  # the file is another one now, and locked as well
    with pytest.raises(UserError, match="is still being written"):
        prepare_resume(folder)
    first.close()
    prepare_resume(folder).close()


def test_a_lock_on_a_file_that_was_replaced_is_none(tmp_path: Path) -> None:
    """Opened before another process cut the file, locked after: it would write into the void."""
    path = tmp_path / "lines"
    first = LineFile(path)
    first.append(b"one\n")
    late = LineFile.reopen(path)
    first.lock()
    first.replace([b"two\n"])
    with pytest.raises(BlockingIOError):
        late.lock()
    with pytest.raises(BlockingIOError):
        LineFile.reopen(path).lock()
    first.append(b"three\n")
    first.close()
    assert path.read_bytes() == b"two\nthree\n"


def test_folders_that_cannot_be_resumed(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="complete, there is nothing to resume"):
        prepare_resume(undisturbed)
    with pytest.raises(UserError, match="is this a run's folder"):
        prepare_resume(tmp_path)
    folder = serve(tmp_path / "run", stop_at=7)
    export_run(RunReader(folder), "parquet", tmp_path / "parquet")
    with pytest.raises(UserError, match="an export to Parquet"):
        prepare_resume(tmp_path / "parquet")
    with (
        pytest.raises(UserError, match="is still being written"),
        Tracer(config_of(tmp_path / "live"), INFO, secret=SECRET),
    ):
        prepare_resume(tmp_path / "live")


def test_another_prompt_is_refused(tmp_path: Path) -> None:
    folder = serve(tmp_path / "run", stop_at=7)
    resumed = prepare_resume(folder)
    with Tracer(config_of(folder), INFO, secret=SECRET, resumed=resumed) as tracer:
        with pytest.raises(UserError, match="r0: its prompt has 3 tokens, 20 when"):
            tracer.skip_request(SampleRequest("r0", [1, 2, 3]))
        with pytest.raises(ValueError, match="r2: no earlier part"):
            tracer.skip_request(REQUESTS[2])
        with pytest.raises(ValueError, match="r0 was added already"):
            tracer.add_request(REQUESTS[0])
        tracer.close("incomplete")


def test_a_refused_resume_cuts_nothing(tmp_path: Path) -> None:
    folder = serve(tmp_path / "run", stop_at=7)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        UserError, match=r"trace\.level was 'full' and is 'stats' now; give the same --trace-level"
    ):
        resume(folder, level="stats")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


Record = dict[str, Any]


def _uncut(records: list[Record], manifest: Record) -> None:
    """A record of r2 from before the resume, moved in front of the others."""
    late = [record for record in records if record["request_id"] == "r2" and record["step_idx"] < 1]
    early = [record | {"forward_idx": 6, "step_idx": -1} for record in late if record["step_idx"] < 0]
    at = next(i for i, record in enumerate(records) if record["forward_idx"] >= 7)
    for record in late:
        if record["step_idx"] < 0:
            records.remove(record)
    records[at:at] = early


def _no_seam(records: list[Record], manifest: Record) -> None:
    manifest["resumed_at_forward"] = []


def _late_seam(records: list[Record], manifest: Record) -> None:
    manifest["resumed_at_forward"] = [10**6]


def _larger_batch(records: list[Record], manifest: Record) -> None:
    """More requests missing from a forward than were ever served again."""
    forward = next(record["forward_idx"] for record in records if record["phase"] == "decode")
    for record in records:
        if record["forward_idx"] == forward:
            for tier in record["kv_fetch"].values():
                tier["batch_size"] += 4


def _lost_row(records: list[Record], manifest: Record) -> None:
    records[:] = [record for record in records if (record["request_id"], record["step_idx"]) != ("r0", 1)]


def _lost_row_later(records: list[Record], manifest: Record) -> None:
    records[:] = [record for record in records if (record["request_id"], record["step_idx"]) != ("r2", 3)]


def _smaller_batch_later(records: list[Record], manifest: Record) -> None:
    for record in records:
        if record["forward_idx"] >= 7 and record["phase"] == "decode":
            for tier in record["kv_fetch"].values():
                tier["batch_size"] += 1


def _twice(records: list[Record], manifest: Record) -> None:
    records += [record | {"forward_idx": record["forward_idx"] + 100} for record in records[:2]]


@pytest.mark.parametrize(
    "spoil",
    [_uncut, _no_seam, _late_seam, _larger_batch, _lost_row, _lost_row_later, _smaller_batch_later, _twice],
)
def test_verify_sees_what_no_resume_explains(
    tmp_path: Path, spoil: Callable[[list[Record], Record], None]
) -> None:
    folder = serve(tmp_path / "run", stop_at=7)
    resume(folder)
    records = read_lines(folder)
    manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    assert any(record["kv_fetch"]["hbm"]["batch_size"] > 1 for record in records)
    verify(folder)
    spoil(records, manifest)
    write_lines(folder, records)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(Mismatch) as caught:
        verify(folder)
    assert str(caught.value).startswith((STEPS_FILE, REQUESTS_FILE))
