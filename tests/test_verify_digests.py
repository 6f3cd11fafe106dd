"""The digests in the manifest find what no derivation can, go on over a resume, and give no false alarm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsatrace import files
from dsatrace.commands import sanity
from dsatrace.errors import UserError
from dsatrace.files import LineFile, write_json
from dsatrace.schema import MANIFEST_FILE, REQUESTS_FILE, STEPS_FILE, STEPS_PARQUET_FILE, SUMMARY_FILE
from dsatrace.trace.export import export_run
from dsatrace.trace.reader import RunReader
from dsatrace.trace.summarize import summarize_runs
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.plain_record import PlainSelection, needle_field, step_record
from dsatrace.verify.run import verify
from helpers.damage import overwrite
from helpers.golden_run import BLOCK_SIZE, LAYOUTS, TOP_K, read_lines, write_golden, write_lines
from helpers.json_edits import changed
from helpers.resume_samples import resume, serve

FILES = (STEPS_FILE, REQUESTS_FILE, SUMMARY_FILE)


def digests_of(folder: Path, *names: str) -> dict[str, Any]:
    contents = {name: (folder / name).read_bytes() for name in names or FILES}
    return {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }


def manifest_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text())
    return record


def test_every_door_seals_its_run(tmp_path: Path) -> None:
    served, sane = serve(tmp_path / "served"), tmp_path / "sane"
    assert sanity.main(["--trace-out", str(sane)]) == 0
    for folder in (served, sane):
        assert manifest_of(folder)["files"] == digests_of(folder)
        assert verify(folder).is_sealed
        assert verify(folder).notes == ()
        assert "files unchanged since the run ended" in verify(folder).text()


def a_position_swapped(folder: Path) -> None:
    """One position for another one, and everything derived from it."""
    records = read_lines(folder)
    record = records[-4]
    chosen = record["selected_token_pos"]
    new = next(p for p in range(record["seq_len_current"] - 1) if p not in chosen)
    stats = record["scores_stats"]
    forged = step_record(
        PlainSelection(
            **{name: record[name] for name in ("request_id", "layer_id", "step_idx", "phase")},
            **{name: record[name] for name in ("forward_idx", "step_wall_us", "step_synced")},
            seq_len=record["seq_len_current"],
            top_k=TOP_K,
            positions=[new, *chosen[1:]],
            scores=None,
            score_stats=(stats["min"], stats["mean"], stats["max"], record["kth_margin"]),
            num_cached_blocks=record["prefix"]["prefix_cached_blocks"],
            prefix_key=record["prefix"]["prefix_key"],
            batch_size=record["kv_fetch"]["hbm"]["batch_size"],
            needle_positions=tuple(range(11, 31)) if "needle" in record else (),
        ),
        block_size=BLOCK_SIZE,
        latent_bytes=LAYOUTS[0].latent_bytes_per_token,
        index_bytes=LAYOUTS[0].index_bytes_per_token,
    )
    assert forged["selected_token_pos"] != chosen
    write_lines(folder, [*records[:-4], forged, *records[-3:]])


def needles_moved(folder: Path) -> None:
    lines = read_lines(folder, REQUESTS_FILE)
    moved = {line["request_id"]: [p + 2 for p in line["needle_positions"]] for line in lines}
    new = [line | {"needle_positions": moved[line["request_id"]]} for line in lines]
    write_lines(folder, new, REQUESTS_FILE)
    write_lines(
        folder,
        [
            record | needle_field(record["selected_token_pos"], moved[record["request_id"]])
            for record in read_lines(folder)
        ],
    )


def a_request_scored_better(folder: Path) -> None:
    lines = read_lines(folder, REQUESTS_FILE)
    write_lines(folder, [line | {"score": line["score"] and 100.0} for line in lines], REQUESTS_FILE)


def a_selection_scored_otherwise(folder: Path) -> None:
    records = read_lines(folder)
    records[5]["scores_stats"]["mean"] += 1e-3
    write_lines(folder, records)


@pytest.mark.parametrize(
    ("forge", "changed_file"),
    [
        (a_position_swapped, STEPS_FILE),
        (needles_moved, STEPS_FILE),
        (a_request_scored_better, REQUESTS_FILE),
        (a_selection_scored_otherwise, STEPS_FILE),
    ],
)
def test_what_no_derivation_can_tell_is_found(
    tmp_path: Path, forge: Callable[[Path], None], changed_file: str
) -> None:
    folder = write_golden(tmp_path / "run", sealed=True)
    assert verify(folder).is_sealed
    forge(folder)
    write_json(folder / SUMMARY_FILE, summarize_runs([folder]))
    for how in ({"plain": True}, {"jobs": 2}):
        with pytest.raises(Mismatch, match=rf"^{changed_file}: (bytes|sha256): .* when the run ended"):
            verify(folder, **how)
    write_json(folder / MANIFEST_FILE, manifest_of(folder) | {"files": None})
    assert not verify(folder).is_sealed  # all the rest is as it must be


def test_the_place_is_named_where_it_can_be(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run", sealed=True)
    records = read_lines(folder)
    records[7]["unique_blocks"] += 1
    write_lines(folder, records)
    with pytest.raises(Mismatch, match=r"line 8 .*unique_blocks: stored"):
        verify(folder)


def test_a_byte_more_less_or_other_is_found_in_every_file(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run", sealed=True)
    for name in FILES:
        whole = (folder / name).read_bytes()
        for data in (whole.replace(b"}", b"} ", 1), whole.replace(b":", b": ", 1), whole[:-1] + b" "):
            overwrite(folder / name, data)
            with pytest.raises(Mismatch, match=rf"^{name}: (bytes|sha256): "):
                verify(folder)
        overwrite(folder / name, whole)
    assert verify(folder).is_sealed


DIGEST = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("files",), {}, r"files\.trace_steps\.jsonl: .*missing"),
        (("files", SUMMARY_FILE), ..., r"files\.summary\.json: .*missing"),
        (("files", "../secret"), DIGEST, r"files\.\.\./secret: .*no file of a run"),
        (("files", STEPS_PARQUET_FILE), DIGEST, r"trace_steps\.parquet: file: missing, 1 bytes when"),
        (("files", STEPS_FILE), [1], r"files\.trace_steps\.jsonl: .*not object"),
        (("files", STEPS_FILE, "bytes"), -1, "below 0"),
        (("files", STEPS_FILE, "bytes"), "1", "is not int"),
        (("files", STEPS_FILE, "sha256"), "0" * 63, "not 64 hex digits"),
        (("files", STEPS_FILE, "sha256"), "F" * 64, "not 64 hex digits"),
        (("files", STEPS_FILE, "sha256"), "0" * 64, r"trace_steps\.jsonl: sha256: "),
        (("source_files",), {REQUESTS_FILE: DIGEST}, r"files\.requests\.jsonl\.bytes: stored"),
    ],
)
def test_an_edited_block_is_found(tmp_path: Path, where: tuple[str, ...], value: Any, said: str) -> None:
    folder = write_golden(tmp_path / "run", sealed=True)
    record = manifest_of(folder)
    edited = record | {where[0]: value} if len(where) == 1 else changed(record, where, value)
    write_json(folder / MANIFEST_FILE, edited)
    with pytest.raises(Mismatch, match=said):
        verify(folder)


@pytest.mark.parametrize("level", ["full", "stats"])
def test_a_resume_goes_on_with_them(tmp_path: Path, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended as by Ctrl-C: sealed as it is then, and again when it is complete."""
    folder = serve(tmp_path / "run", stop_at=5, level=level)
    assert manifest_of(folder)["state"] == "incomplete"
    assert manifest_of(folder)["files"] == digests_of(folder)
    assert verify(folder).is_sealed
    read, hashed = [], files._hashed

    def noted(path: Path) -> Any:
        read.append(path.name)
        return hashed(path)

    monkeypatch.setattr(files, "_hashed", noted)
    resume(folder, level=level)
    assert len(read) == len(set(read)) <= 2  # what was kept is read once, what was replaced not at all
    assert manifest_of(folder)["files"] == digests_of(folder)
    assert verify(folder).is_sealed


def test_lines_are_hashed_however_they_came(tmp_path: Path) -> None:
    path = tmp_path / "lines"

    def check(lines: LineFile) -> None:
        assert lines.digest() == digests_of(tmp_path, "lines")["lines"]

    lines = LineFile(path)
    check(lines)
    for data in (b"one\n", b"two\n", memoryview(b"three\n")):
        lines.append(data)
        check(lines)
    lines.close()
    check(lines)
    again = LineFile.reopen(path)
    again.append(b"four\n")
    check(again)
    again.truncate(4)
    check(again)
    again.append(b"five\n")
    check(again)
    again.replace([b"six\n", b"seven\n"])
    check(again)
    again.append(b"eight\n")
    again.close()
    check(again)
    assert path.read_bytes() == b"six\nseven\neight\n"


def test_a_run_without_them_is_unsealed_and_not_broken(tmp_path: Path) -> None:
    killed = write_golden(tmp_path / "killed", state="running")
    older = write_golden(tmp_path / "older", sealed=True)
    record = manifest_of(older)
    del record["files"]
    write_json(older / MANIFEST_FILE, record)
    for folder in (killed, older):
        found = verify(folder)
        assert not found.is_sealed
        assert any(note.startswith("unsealed: ") for note in found.notes)
        assert "not checked: unsealed: " in found.text()


def test_a_run_that_could_not_be_written_is_unsealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, num_lines = LineFile.append, []

    def refused(lines: LineFile, data: bytes | memoryview) -> None:
        num_lines.append(1)
        if len(num_lines) == 5:
            raise OSError(28, "No space left on device")
        append(lines, data)

    monkeypatch.setattr(LineFile, "append", refused)
    with pytest.raises(UserError, match="No space left"):
        serve(tmp_path / "run")
    assert len(num_lines) >= 5
    assert (manifest_of(tmp_path / "run")["state"], manifest_of(tmp_path / "run")["files"]) == (
        "incomplete",
        None,
    )
    assert verify(tmp_path / "run").num_records > 0


def test_an_export_has_its_own_and_names_its_sources(tmp_path: Path) -> None:
    run, columns, lines = write_golden(tmp_path / "run", sealed=True), tmp_path / "p", tmp_path / "j"
    export_run(RunReader(run), "parquet", columns)
    export_run(RunReader(columns), "jsonl", lines)
    in_columns = digests_of(columns, STEPS_PARQUET_FILE, REQUESTS_FILE, SUMMARY_FILE)
    assert manifest_of(columns)["files"] == in_columns
    assert manifest_of(columns)["source_files"] == digests_of(run)
    assert manifest_of(lines)["files"] == digests_of(run)
    assert manifest_of(lines)["source_files"] == digests_of(run) | in_columns
    assert verify(columns).is_sealed
    assert verify(lines).is_sealed
    path = columns / STEPS_PARQUET_FILE
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"parquet-cpp", b"parquet-cqp", 1))  # the footer's `created_by`
    assert path.read_bytes() != whole
    with pytest.raises(Mismatch, match=rf"^{STEPS_PARQUET_FILE}: sha256: "):
        verify(columns)


def test_a_changed_run_is_not_sealed_anew(tmp_path: Path) -> None:
    run = write_golden(tmp_path / "run", sealed=True)
    a_selection_scored_otherwise(run)
    with pytest.raises(UserError, match=rf"{STEPS_FILE}: not as it was when the run ended"):
        export_run(RunReader(run), "parquet", tmp_path / "p")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    write_json(run / MANIFEST_FILE, manifest_of(run) | {"files": None})
    export_run(RunReader(run), "parquet", tmp_path / "p")
    assert manifest_of(tmp_path / "p")["source_files"] is None
    assert verify(tmp_path / "p").is_sealed
