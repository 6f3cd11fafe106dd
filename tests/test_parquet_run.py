"""A run written as Parquet holds what one of JSON lines holds, and loses at most what waited when killed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import INFERENCE, ROOT
from dsatrace import cli, files
from dsatrace.commands.generate import main as generate
from dsatrace.errors import UserError
from dsatrace.schema import (
    MANIFEST_FILE,
    REQUESTS_FILE,
    STEPS_FILE,
    STEPS_FOLDER,
    STEPS_PARQUET_FILE,
    SUMMARY_FILE,
)
from dsatrace.trace.estimate import SyntheticSelections
from dsatrace.trace.export import export_run
from dsatrace.trace.manifest import TierSettings
from dsatrace.trace.parquet import parts, sink
from dsatrace.trace.parquet.columns import to_lines
from dsatrace.trace.parquet.concatenation import Concatenation
from dsatrace.trace.parquet.steps import layout_batch, step_batch
from dsatrace.trace.reader import RunReader, part_paths
from dsatrace.trace.records import RecordDeriver, StepLines
from dsatrace.trace.resume import prepare_resume
from dsatrace.trace.selections import read_selections
from dsatrace.trace.tracer import Tracer, tiers_of
from dsatrace.trace.writer import TraceWriterError
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.run import verify
from helpers.killing_disk import Disk, Killed
from helpers.kind_runs import KINDS, write_kind
from helpers.resume_samples import INFO, answers_of, check_summary, config_of, records_of, resume, serve
from helpers.tier_samples import SETUPS, SimulatedTiers
from helpers.trace_samples import (
    LAYOUT,
    RUN,
    SECRET,
    WAYS,
    SampleRequest,
    config_for,
    sample_capture,
    sample_needles,
)

HOWS: list[dict[str, Any]] = [
    *WAYS,
    {"tiers": SETUPS["half a block"]},
    {"shared_layers": {1: 0}},
    {"tiers": SETUPS["row"], "level": "stats"},
]


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("seq_lens", [[1], [5, 40, 90], [300, 300, 3, 77]], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, -0.0])
def test_columns_are_those_of_the_lines(how: dict[str, Any], seq_lens: list[int], scale: float) -> None:
    rng = np.random.default_rng(len(seq_lens))
    needles = sample_needles(rng, seq_lens)
    cached = [min(n // 16, 2) for n in seq_lens]
    capture = sample_capture(rng, seq_lens, cached_blocks=cached, needles=needles)
    assert capture.scores is not None
    capture.scores[:] *= np.float32(scale)
    capture.score_stats[:] *= np.float32(scale)
    how = dict(how)
    tiers: TierSettings | None = how.pop("tiers", None)
    shared_layers = how.pop("shared_layers", None)
    if tiers is not None:
        capture = SimulatedTiers(tiers).fetched(capture)
    accounts = tiers_of(dataclasses.replace(RUN, tiers=tiers))
    deriver = RecordDeriver(config_for(**how), LAYOUT, accounts, shared_layers=shared_layers)
    step = deriver.derive(capture)
    assert to_lines(step_batch(step)) == bytes(StepLines().encode(step)).splitlines()


@pytest.mark.parametrize("name", list(KINDS))
def test_other_kinds_of_selection(tmp_path: Path, name: str) -> None:
    """Recorded as columns, and laid out for replay."""
    lines, folder = write_kind(tmp_path / "j", name), write_kind(tmp_path / "p", name, format="parquet")
    assert list(RunReader(folder).steps()) == list(RunReader(lines).steps())
    assert verify(folder).is_sealed
    export_run(RunReader(folder), "replay", tmp_path / "r")
    assert verify(tmp_path / "r").is_sealed
    found = {request.request_id: request.layers for request in read_selections(RunReader(tmp_path / "r"))}
    for request in read_selections(RunReader(lines)):
        layers = found.pop(request.request_id)
        assert list(layers) == list(request.layers)
        for which, selected in request.layers.items():
            for field in dataclasses.fields(selected):
                ours, theirs = (getattr(one, field.name) for one in (selected, layers[which]))
                np.testing.assert_array_equal(ours, theirs)
    assert not found


def test_columns_do_not_change_with_the_next_step() -> None:
    deriver = RecordDeriver(config_for(), LAYOUT, tiers_of(RUN), reuse=True)
    first, second = (sample_capture(np.random.default_rng(i), [40, 90]) for i in range(2))
    step = deriver.derive(first)
    batch, lines = step_batch(step), bytes(StepLines().encode(step)).splitlines()
    deriver.derive(second)
    assert to_lines(batch) == lines


def test_a_field_that_the_schema_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="the schema knows no field phrase"):
        layout_batch({"phrase": 1}, 1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as JSON lines."""
    return serve(tmp_path_factory.mktemp("undisturbed") / "run")


def check_equal(folder: Path, undisturbed: Path) -> None:
    assert records_of(folder) == records_of(undisturbed)
    assert answers_of(folder) == answers_of(undisturbed)
    assert {path.name for path in folder.iterdir()} == {
        MANIFEST_FILE,
        REQUESTS_FILE,
        STEPS_PARQUET_FILE,
        SUMMARY_FILE,
    }
    verified = verify(folder)
    assert (verified.state, verified.is_sealed, verified.notes) == ("complete", True, ())
    check_summary(folder)


@pytest.mark.parametrize(("part_records", "least"), [(1, 1), (1, 3), (7, 1 << 12), (1 << 12, 1 << 12)])
def test_a_run_holds_what_its_lines_would(
    tmp_path: Path, undisturbed: Path, part_records: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether parts are copied or made larger when they are joined."""
    monkeypatch.setattr(sink, "PART_RECORDS", part_records)
    monkeypatch.setattr(parts, "LEAST_RECORDS", least)
    folder = serve(tmp_path / "run", format="parquet")
    check_equal(folder, undisturbed)
    of_the_moment = {"step_wall_us": None}
    assert [record | of_the_moment for record in RunReader(folder).steps()] == [
        record | of_the_moment for record in RunReader(undisturbed).steps()
    ]
    assert (folder / REQUESTS_FILE).read_bytes() == (undisturbed / REQUESTS_FILE).read_bytes()
    trace = RunReader(folder).manifest["trace"]
    assert trace.pop("format") == "parquet"
    assert trace == RunReader(undisturbed).manifest["trace"]
    assert (folder / STEPS_PARQUET_FILE).stat().st_size > 0


def test_the_flag(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The same tokens' records by either format; the manifest differs in its format alone."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The tide pulled back and left its usual collection of rope. " * 5)
    flags = ["--ckpt-path", str(tiny_checkpoint), "--config", str(INFERENCE / "config_tiny.json")]
    flags += ["--input-file", str(prompt), "--max-new-tokens", "4", "--temperature", "0", "--trace-out"]
    for format_ in ("jsonl", "parquet"):
        assert generate([*flags, str(tmp_path / format_), "--trace-format", format_]) == 0
    assert records_of(tmp_path / "parquet") == records_of(tmp_path / "jsonl")
    assert (tmp_path / "parquet" / STEPS_PARQUET_FILE).exists()
    assert "format" not in RunReader(tmp_path / "jsonl").manifest["trace"]
    assert cli.main(["verify", str(tmp_path / "parquet")]) == 0


def test_exported_it_is_the_lines(tmp_path: Path, undisturbed: Path) -> None:
    folder = serve(tmp_path / "run", format="parquet")
    assert cli.main(["export", str(folder), "--to", "jsonl", "--out", str(tmp_path / "j")]) == 0
    assert (tmp_path / "j" / STEPS_FILE).read_bytes() == (undisturbed / STEPS_FILE).read_bytes()
    assert verify(tmp_path / "j").is_sealed


@pytest.mark.parametrize("level", ["blocks", "stats"])
def test_levels_below_full(tmp_path: Path, level: str) -> None:
    """Resumed too: the summary does not run ahead of what is in parts."""
    whole = serve(tmp_path / "whole", level=level)
    for stop_at in range(0, 10, 3):
        folder = serve(tmp_path / str(stop_at), stop_at, level=level, format="parquet")
        verify(folder)
        resume(folder, level=level, format="parquet")
        assert records_of(folder) == records_of(whole)
        assert verify(folder).notes == verify(whole).notes
        check_summary(folder)


def test_requests_without_records(tmp_path: Path) -> None:
    folder = serve(tmp_path / "run", sample_rate=0.0, prefill="off", format="parquet")
    assert list(RunReader(folder).steps()) == []
    assert len(answers_of(folder)) == 5
    assert pq.read_metadata(folder / STEPS_PARQUET_FILE).num_rows == 0


def test_ids_in_score_order_keep_it(tmp_path: Path) -> None:
    def selected(folder: Path) -> list[list[int]]:
        return [record["selected_token_pos"] for record in RunReader(folder).steps()]

    for format_ in ("jsonl", "parquet"):
        config = config_of(tmp_path / format_, keep_order=True, format=format_)
        with Tracer(config, INFO, secret=SECRET) as tracer:
            tracer.add_request(SampleRequest("r0", [1] * 40))
            tracer.put(SyntheticSelections("clustered", 2, 4, seed=1).capture([40], 0, request_ids=["r0"]))
    assert selected(tmp_path / "jsonl") == selected(tmp_path / "parquet")
    assert any(ids != sorted(ids) for ids in selected(tmp_path / "parquet"))
    columns = pq.read_metadata(tmp_path / "parquet" / STEPS_PARQUET_FILE).row_group(0).to_dict()["columns"]
    ids = next(c for c in columns if c["path_in_schema"] == "selected_token_pos.list.element")
    assert "DELTA_BINARY_PACKED" not in ids["encodings"]


class Deletes(Disk):
    """Counts deletions too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 0, *, full: bool = False) -> None:
        super().__init__(monkeypatch, at, full=full)
        disk, unlink = self, Path.unlink

        def unlinked(path: Path, missing_ok: bool = False) -> None:
            if not disk.full:
                disk.change()
            unlink(path, missing_ok)

        monkeypatch.setattr(Path, "unlink", unlinked)
        monkeypatch.setattr(files, "_removed_on_failure", lambda path: contextlib.nullcontext())


def run_or_resume(folder: Path) -> bool:
    """False when it was killed on the way."""
    try:
        if (folder / MANIFEST_FILE).exists():
            resume(folder, format="parquet")
        else:
            serve(folder, format="parquet", summary_interval_s=1e-9)
    except (Killed, UserError, TraceWriterError):
        return False
    return True


@pytest.mark.parametrize(("part_records", "first"), [(3, 1), (1 << 12, 2)])
def test_killed_at_any_moment(
    tmp_path: Path, undisturbed: Path, part_records: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each change of the folder, from the first to the parts' joining, and again while resuming."""
    monkeypatch.setattr(sink, "PART_RECORDS", part_records)
    seen = set()
    for at in itertools.count(first, 11):
        folder = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch:
            Deletes(patch, at)
            if run_or_resume(folder):
                break
        if not (folder / MANIFEST_FILE).exists():
            continue
        run = RunReader(folder)
        assert run.state == "incomplete"
        lost = check_is_a_beginning(run, undisturbed)
        seen.add((bool(part_paths(folder)), (folder / STEPS_PARQUET_FILE).exists(), lost))
        for again in (at % 5 + 1, 0):
            with pytest.MonkeyPatch.context() as patch:
                Deletes(patch, again)
                if run_or_resume(folder):
                    break
        check_equal(folder, undisturbed)
    assert at > 20
    assert (True, False, True) in seen


def test_killed_between_the_joined_file_and_its_parts(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The joined file counts; what stands beside it is a leftover."""
    monkeypatch.setattr(sink, "PART_RECORDS", 5)
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.StepParts, "_remove_parts", lambda self: (_ for _ in ()).throw(Killed))
        assert not run_or_resume(folder)
    assert len(part_paths(folder)) > 3
    assert RunReader(folder).state == "incomplete"
    assert not check_is_a_beginning(RunReader(folder), undisturbed)
    assert run_or_resume(folder)
    check_equal(folder, undisturbed)


def check_is_a_beginning(run: RunReader, undisturbed: Path) -> bool:
    """What was recorded up to some moment, with all that its requests' lines promise; whether any is lost."""
    whole = [(r["request_id"], r["step_idx"], r["layer_id"]) for r in RunReader(undisturbed).steps()]
    found = [(r["request_id"], r["step_idx"], r["layer_id"]) for r in run.steps()]
    assert found == whole[: len(found)]
    done = prepare_resume(run.folder)
    assert done.done == {line["request_id"] for line in run.requests()}
    done.close()
    verified = verify(run.folder)
    assert verified.num_records == len(found)
    return len(found) < len(whole)


PROGRAM = """
import sys
from pathlib import Path
from dsatrace.trace.parquet import sink
sink.PART_RECORDS = 16
from helpers import resume_samples
from helpers.resume_samples import serve
import time
capture = resume_samples.Server.capture
def slow(self, rows, batch_size):
    if self.forward_idx == int(sys.argv[2]):
        print("here", flush=True)
        time.sleep(60)
    return capture(self, rows, batch_size)
resume_samples.Server.capture = slow
serve(Path(sys.argv[1]), format="parquet")
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a process that SIGKILL ended while it waited in a forward. To be copied."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    env = {**os.environ, "PYTHONPATH": f"{INFERENCE}:{ROOT / 'tests'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), "8"], env=env, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "here\n"
        deadline = time.monotonic() + 20
        while not part_paths(folder) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert RunReader(folder).state == "running"
        with pytest.raises(UserError, match="still being written"):
            prepare_resume(folder)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return folder


def test_sigkill_leaves_all_whole_parts(
    killed: Path, tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    run = RunReader(folder)
    assert (run.manifest["state"], run.state) == ("running", "incomplete")
    num_records = len(list(run.steps()))
    assert 16 <= num_records < len(list(RunReader(undisturbed).steps()))
    assert "less than 4,096 records and a step's" in run.torn_lines[STEPS_FOLDER]
    verified = verify(folder)
    assert (verified.num_records, verified.is_sealed) == (num_records, False)
    assert any(note.startswith(STEPS_FOLDER) for note in verified.notes)
    for command in ("verify", "summarize", "report"):
        assert cli.main([command, str(folder)]) == 0, command
        assert capsys.readouterr().out
    assert cli.main(["export", str(folder), "--to", "jsonl", "--out", str(tmp_path / "j")]) == 0
    assert "left out" in capsys.readouterr().out
    lines = (tmp_path / "j" / STEPS_FILE).read_bytes().splitlines()
    assert lines == (undisturbed / STEPS_FILE).read_bytes().splitlines()[:num_records]
    layers = [layer for request in read_selections(run) for layer in request.layers.values()]
    assert sum(len(layer.step_idx) for layer in layers) == num_records
    (folder / "report.png").unlink(missing_ok=True)
    resume(folder, format="parquet")
    check_equal(folder, undisturbed)


def test_a_full_disk_is_one_clear_line(tmp_path: Path, undisturbed: Path) -> None:
    """Whichever change it refuses; what was there can be resumed."""
    refused = 0
    for at in itertools.count(2, 3):
        folder = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sink, "PART_RECORDS", 5)
            Disk(patch, at, full=True)
            try:
                serve(folder, format="parquet")
            except UserError as error:
                refused += 1
                assert "No space left on device" in str(error)
                assert str(folder) in str(error)
            else:
                break
        verify(folder)
        resume(folder, format="parquet")
        check_equal(folder, undisturbed)
    assert refused > 3


def test_a_run_goes_on_in_its_format(tmp_path: Path, undisturbed: Path) -> None:
    folder = serve(tmp_path / "p", 4, format="parquet")
    with pytest.raises(UserError, match=r"trace\.format was 'parquet' and is 'jsonl' now; give the same"):
        resume(folder)
    other = serve(tmp_path / "j", 4)
    with pytest.raises(UserError, match=r"trace\.format was 'jsonl' and is 'parquet' now"):
        resume(other, format="parquet")
    assert cli.main(["export", str(folder), "--to", "jsonl", "--out", str(tmp_path / "pj")]) == 0
    with pytest.raises(UserError, match="an export to JSON lines; resume the run"):
        resume(tmp_path / "pj")
    resume(folder, format="parquet")
    check_equal(folder, undisturbed)


def test_a_complete_run_without_its_records_is_bad(tmp_path: Path) -> None:
    folder = serve(tmp_path / "run", format="parquet")
    (folder / STEPS_PARQUET_FILE).unlink()
    with pytest.raises(UserError, match=r"trace_steps\.parquet: cannot read it"):
        list(RunReader(folder).steps())
    with pytest.raises(Mismatch):
        verify(folder)


def test_a_damaged_part_is_named(killed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    path = part_paths(folder)[0]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"trace_steps/000001\.parquet: not a whole Parquet file"):
        list(RunReader(folder).steps())
    with pytest.raises(UserError, match=r"trace_steps/000001\.parquet: not a whole Parquet file"):
        verify(folder)


def test_a_concatenation_is_as_pyarrow_reads_it(tmp_path: Path) -> None:
    """Statistics, names and values of each file's row groups, in every encoding that pyarrow writes."""
    tables = [
        pa.table(
            {
                "n": pa.array(range(i, i + 2000), pa.int64()),
                "x": pa.array(np.random.default_rng(i).random(2000), pa.float64()),
                "who": pa.array([f"r{j % (i + 1)}" for j in range(2000)]),
                "ids": pa.array([list(range(j % 5)) if j % 7 else None for j in range(2000)]),
                "is": pa.array([j % 3 == 0 if j % 2 else None for j in range(2000)]),
            }
        )
        for i in range(3)
    ]
    for i, table in enumerate(tables):
        options = {"row_group_size": 700, "data_page_size": 512, "compression": "zstd"}
        pq.write_table(table, tmp_path / f"{i}", write_page_index=i > 0, **options)
    with (tmp_path / "whole").open("wb") as out, Concatenation(out) as whole:
        for i in range(3):
            with (tmp_path / f"{i}").open("rb") as file:
                whole.append(file)
    assert pq.read_table(tmp_path / "whole").equals(pa.concat_tables(tables))
    with pq.ParquetFile(tmp_path / "whole") as file:
        assert file.metadata.num_row_groups == 9
        for group in range(9):
            assert file.read_row_group(group).equals(tables[group // 3].slice(group % 3 * 700, 700))
            first = file.metadata.row_group(group).column(0).statistics
            assert (first.min, first.max) == (
                group // 3 + group % 3 * 700,
                group // 3 + min(group % 3 * 700 + 699, 1999),
            )
    with (tmp_path / "bad").open("wb") as out, Concatenation(out) as whole:
        pq.write_table(tables[0].drop_columns(["x"]), tmp_path / "other")
        whole.append(io.BytesIO((tmp_path / "0").read_bytes()))
        with pytest.raises(ValueError, match="different schemas"):
            whole.append(io.BytesIO((tmp_path / "other").read_bytes()))


def test_small_parts_join_to_large_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "PART_RECORDS", 1)
    monkeypatch.setattr(parts, "GROUP_RECORDS", 12)
    folder = serve(tmp_path / "run", format="parquet")
    metadata = pq.read_metadata(folder / STEPS_PARQUET_FILE)
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert max(sizes) == 12
    assert sum(sizes) == metadata.num_rows > 24
