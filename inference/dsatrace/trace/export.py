"""Turns a run's folder from JSON lines into Parquet and back, without loss, or lays it out for replay.

The new folder appears whole or not at all: it is filled under a hidden name beside its place and
renamed last. The manifest is copied, so an export of a killed run says so too, but for the digests:
`files` is of what was written here, `source_files` of what it was made from.

    done = export_run(RunReader("outputs/mine"), "parquet", Path("outputs/mine_parquet"))
    done.num_records, done.bytes_after, done.left_out
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import pyarrow as pa

from dsatrace.errors import UserError
from dsatrace.files import NO_LOCKS, digest_of, sync, write_json
from dsatrace.schema import MANIFEST_FILE, REQUESTS_FILE, STEPS_FILE, STEPS_PARQUET_FILE, SUMMARY_FILE
from dsatrace.trace.parquet.file import (
    Line,
    count_records,
    lossless_batches,
    open_file,
    read_lines,
    write_parquet,
)
from dsatrace.trace.parquet.parts import filled, schema_of
from dsatrace.trace.parquet.replay_layout import Counts, write_replay_layout
from dsatrace.trace.reader import RunReader

Format = Literal["parquet", "jsonl", "replay"]

Progress = Callable[[int, int], None]  # done and all: bytes of text, or records on the way back


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    folder: Path
    num_records: int
    num_kept_as_text: int  # records whose line cannot be restored from their columns
    bytes_before: int  # of the step records' file
    bytes_after: int
    left_out: dict[str, str]  # file -> its last line, cut short by a kill


def export_run(
    run: RunReader, to: Format, out: Path, progress: Progress = lambda done, total: None
) -> Exported:
    """Writes the run's four files to `out`, a folder that is new or empty.

    Raises `UserError`, and leaves nothing behind, for a run that is still being written or is in that
    format already, for a file that is not as it was when the run ended, for a line that is not JSON,
    and for what the system refuses.
    """
    run.require_order_of_steps("export")
    if to != "replay" and run.is_parquet == (to == "parquet"):
        raise UserError(f"{run.folder}: its records are {to} already; nothing to export")
    sources = run.step_paths
    if not all(path.exists() for path in sources) or not sources:
        raise UserError(
            f"{run.folder}: holds no step records; a run killed before its first step has nothing to export"
        )
    if run.state == "running":
        raise UserError(
            f"{run.folder}: the run is still being written; export it when it has ended, or a copy of it"
        )
    try:
        with new_folder(out) as folder:
            counts: dict[str, Counts] = {}
            if to == "parquet":
                num_records, num_kept = _to_parquet(run, folder / STEPS_PARQUET_FILE, progress)
            elif to == "jsonl":
                num_records, num_kept = _to_jsonl(run, folder / STEPS_FILE, progress), 0
            else:
                counts = write_replay_layout(
                    _tables(run, progress), folder, run.manifest["trace"]["keep_order"]
                )
                num_records, num_kept = sum(count.records for count in counts.values()), 0
            written = [path for path in folder.rglob("*") if path.is_file()]
            size, bytes_before = (sum(path.stat().st_size for path in paths) for paths in (written, sources))
            _copy_others(run, folder)
            _require_unchanged(run)
            _write_manifest(run, folder, {"layout": "replay"} if to == "replay" else {}, counts)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot export there: {error.strerror}") from error
    return Exported(out, num_records, num_kept, bytes_before, size, dict(run.torn_lines))


def _to_parquet(run: RunReader, path: Path, progress: Progress) -> tuple[int, int]:
    total, done = sum(path.stat().st_size for path in run.step_paths), 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    keep_order, has_tiers = run.manifest["trace"]["keep_order"], bool(run.manifest.get("tiers"))
    written = write_parquet(path, _lines(run), advance, keep_order, has_tiers)
    return written.num_records, written.num_kept_as_text


def _to_jsonl(run: RunReader, path: Path, progress: Progress) -> int:
    total, done = sum(map(count_records, run.step_paths)), 0
    lines = itertools.chain.from_iterable(map(read_lines, run.step_paths))
    with path.open("wb") as file:
        for done, line in enumerate(lines, 1):
            file.write(line + b"\n")
            if done % 1000 == 0:
                progress(done, total)
    progress(done, total)
    return done


def _tables(run: RunReader, progress: Progress) -> Iterator[pa.Table]:
    """The step records, a group of them at a time."""
    total, done = sum(path.stat().st_size for path in run.step_paths), 0
    if not run.is_parquet:
        for group, batch in lossless_batches(_lines(run), bool(run.manifest.get("tiers"))):
            yield pa.Table.from_batches([batch])
            done += sum(len(line) + 1 for line, _ in group)
            progress(done, total)
        return
    schema = schema_of(run.step_paths)
    for path in run.step_paths:
        with open_file(path) as file:
            for index in range(file.metadata.num_row_groups):
                yield filled(file.read_row_group(index), schema)
                progress(done + path.stat().st_size * (index + 1) // file.metadata.num_row_groups, total)
        done += path.stat().st_size


def _lines(run: RunReader) -> Iterator[Line]:
    for line, record in run.lines(STEPS_FILE):
        yield line.removesuffix(b"\n"), record


def _copy_others(run: RunReader, folder: Path) -> None:
    """Byte for byte, except for a line of requests.jsonl that was cut short."""
    with (folder / REQUESTS_FILE).open("wb") as file:
        for line, _ in run.lines(REQUESTS_FILE):
            file.write(line)
    if (run.folder / SUMMARY_FILE).exists():
        shutil.copyfile(run.folder / SUMMARY_FILE, folder / SUMMARY_FILE)


def _require_unchanged(run: RunReader) -> None:
    """An export with new digests would hide that a file is no longer the one that was written."""
    for name, known in (run.manifest.get("files") or {}).items():
        path = run.folder / name
        if not path.exists() or digest_of(path) != known:
            raise UserError(
                f"{path}: not as it was when the run ended, see `dsatrace verify {run.folder}`; restore it, "
                f"or remove `files` from {MANIFEST_FILE} to export it as it is"
            )


def _write_manifest(
    run: RunReader, folder: Path, layout: Mapping[str, str], counts: Mapping[str, Counts]
) -> None:
    """The run's, with the digests of the files in `folder`, what each of several holds, and the digests of
    all that they were made from."""
    known = {**(run.manifest.get("source_files") or {}), **(run.manifest.get("files") or {})}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {name: digest_of(folder / name) for name in names}
    for name, count in counts.items():
        files[name] |= count._asdict()
    write_json(
        folder / MANIFEST_FILE, {**run.manifest, "files": files, **layout, "source_files": known or None}
    )


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends without an error and is removed otherwise.

    What a killed export left under the hidden name is removed by the next one to the same place.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already and is never overwritten; name another with --out")
    hidden = out.absolute().with_name(f".{out.absolute().name}.export")
    hidden.mkdir(parents=True, exist_ok=True)
    with _locked(hidden):
        try:
            for leftover in hidden.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield hidden
            for path in hidden.iterdir():
                sync(path)
            hidden.rename(out)  # fails if `out` has been filled meanwhile
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Refuses a second export to one place; the kernel drops the lock of a process that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another export is writing there; let it end first") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(handle)
