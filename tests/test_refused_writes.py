"""Every write of a run refused in its turn: one line, exit 2, what was written stays, a resume ends the run.

By write is meant all that changes a run's folder: a file made, written, cut, renamed, or written through to
the disk. Refused once, or from then on; a start, a resume, and limits that the kernel itself enforces. A few
for CI; by hand all of them:

    DSATRACE_REFUSED_STRIDE=1 python -m pytest -s tests/test_refused_writes.py
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from dsatrace import files
from dsatrace.commands import export, summarize
from dsatrace.commands.run_dataset import main
from dsatrace.schema import MANIFEST_FILE, STEPS_FILE
from dsatrace.trace.reader import RunReader
from dsatrace.trace.writer import SummarySink
from dsatrace.verify.run import verify
from helpers.checkpoints import tiny_config
from helpers.golden_run import read_lines
from helpers.resume_samples import answers_of, check_summary, records_of
from test_damaged_inputs import ended

STRIDE = int(os.environ.get("DSATRACE_REFUSED_STRIDE", "37"))
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
NUM_REQUESTS = 3


class Disk:
    """Counts what changes files below a folder, and refuses the `at`th change, or all from then on."""

    def __init__(self, below: Path, at: int = 0, stays: bool = False, error: int = errno.ENOSPC) -> None:
        self.below, self.at, self.stays, self.error = below, at, stays, error
        self.changes: list[str] = []
        self.num_refused = 0
        self.refused_cut = False
        self.lines = 0  # of step records, in writes that were not refused

    @contextlib.contextmanager
    def patched(self) -> Iterator[Disk]:
        disk, replace, mkdir, fsync = self, Path.replace, Path.mkdir, os.fsync

        class File(FileIO):
            def __init__(self, path: Path, mode: str) -> None:
                if mode != "rb":
                    disk.change("open", path)
                super().__init__(path, mode)
                self.path = path

            def write(self, data: Any) -> int:
                disk.change("write", self.path, lambda: super(File, self).write(data[: len(data) // 2]))
                if self.path.name == STEPS_FILE:
                    disk.lines += bytes(data).count(b"\n")
                return super().write(data)

            def truncate(self, size: int | None = None) -> int:
                if disk.error != errno.ENOSPC:  # a full disk gives space back
                    disk.change("truncate", self.path)
                return super().truncate(size)

        def synced(descriptor: int) -> None:
            disk.change("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
            fsync(descriptor)

        def made(path: Path, *args: Any, **kwargs: Any) -> None:
            disk.change("mkdir", path)
            mkdir(path, *args, **kwargs)

        def replaced(path: Path, target: Path) -> Path:
            disk.change("replace", path)
            return replace(path, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "FileIO", File)
            patch.setattr(os, "fsync", synced)
            patch.setattr(Path, "replace", replaced)
            patch.setattr(Path, "mkdir", made)
            # Every step is written through to the disk, and replaces the summary.
            patch.setattr(files, "SYNC_INTERVAL_S", 0.0)
            patch.setattr(SummarySink, "_refresh", lambda sink: sink._write("running"))
            yield self

    def change(self, what: str, path: Path, half: Callable[[], object] = lambda: None) -> None:
        if self.below not in path.parents:
            return
        self.changes.append(f"{what} {path.name}")
        number = len(self.changes)
        if self.at and (number == self.at or (self.stays and number > self.at)):
            self.num_refused += 1
            self.refused_cut |= what == "truncate"
            if number == self.at:
                half()
            raise OSError(self.error, os.strerror(self.error))


@pytest.fixture(scope="module")
def flags(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A run of a few short requests, one at a time."""
    folder = tmp_path_factory.mktemp("refused")
    texts = ("ship port fog " * (3 + 2 * i) for i in range(NUM_REQUESTS))
    talks = [({"from": "human", "value": text}, {"from": "gpt", "value": "Yes."}) for text in texts]
    chats = [{"id": f"c{i}", "conversations": talk} for i, talk in enumerate(talks)]
    (folder / "chats.json").write_text(json.dumps(chats))
    found = ("--dataset", "sharegpt", "--sharegpt-json", folder / "chats.json", "--no-hub", "--device", "cpu")
    found += ("--ckpt-path", tiny_checkpoint, "--config", tiny_config(folder, index_topk=16))
    found += ("--max-new-tokens", 3, "--max-batch-size", 1, "--max-seq-len", 256, "--trace-prefill", "last")
    return tuple(map(str, found))


@pytest.fixture(scope="module")
def whole(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert ended(partial(main, [*flags, "--trace-out", str(folder)]))[0] == 0
    return folder


@pytest.fixture(scope="module")
def killed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run as a kill in the second request would have left it."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    shutil.copytree(whole, folder)
    manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    files.write_json(folder / MANIFEST_FILE, {**manifest, "state": "running", "files": None})
    (folder / "summary.json").unlink()
    steps, requests = (folder / STEPS_FILE).read_bytes(), folder / "requests.jsonl"
    (folder / STEPS_FILE).write_bytes(steps[: len(steps) // 2])
    requests.write_bytes(requests.read_bytes().splitlines(keepends=True)[0])
    return folder


def check_what_is_left(folder: Path, disk: Disk, sound: list[dict[str, Any]], before: bytes = b"") -> None:
    """What was written is there, whole; nothing temporary is. `before`: the steps of the run to resume."""
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert not [name for name in left if name.startswith(".")]
    if MANIFEST_FILE not in left:
        assert not left
        return
    run = RunReader(folder)
    assert run.state == "incomplete"
    steps = [record["selected_token_pos"] for record in run.steps()]
    assert steps == [record["selected_token_pos"] for record in sound[: len(steps)]]
    assert len(steps) >= disk.lines
    untouched = (
        before and run.step_paths[0].read_bytes() == before
    )  # refused before the kill's torn line was cut
    assert not run.torn_lines or disk.refused_cut or untouched


def check_finished(folder: Path, whole: Path) -> None:
    for record, expected in zip(records_of(folder).items(), records_of(whole).items(), strict=True):
        assert record == expected
    assert answers_of(folder) == answers_of(whole)
    assert (verify(folder).state, verify(folder).faults) == ("complete", ())
    check_summary(folder)


def is_one_line(said: str) -> bool:
    errors = [line for line in said.splitlines() if line.startswith(("error: ", "warning: "))]
    return len(errors) == 1 and "Traceback" not in said


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("start", ["start", "resume"])
def test_every_write_refused(
    start: str, stays: bool, error: str, flags: tuple[str, ...], whole: Path, killed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    again = ["--resume", str(folder)]
    argv = again if start == "resume" else [*flags, "--trace-out", str(folder)]
    before = (killed / STEPS_FILE).read_bytes() if start == "resume" else b""

    def run(disk: Disk) -> tuple[int, str]:
        if start == "resume":
            shutil.copytree(killed, folder)
        with disk.patched():
            return ended(partial(main, argv))

    counting = Disk(tmp_path, error=ERRORS[error])
    assert run(counting)[0] == 0
    shutil.rmtree(folder)
    changes, sound = counting.changes, read_lines(whole)
    counts, faults = Counter[str](), list[str]()
    for at in range(STRIDE, len(changes) + 1, STRIDE):
        disk = Disk(tmp_path, at, stays, ERRORS[error])
        code, said = run(disk)
        counts["refused"] += 1
        counts["tracebacks"] += "Traceback" in said or code == 70
        try:
            assert disk.num_refused
            assert (code, is_one_line(said)) == (2, True), f"exit {code}"
            assert os.strerror(ERRORS[error]) in said
            check_what_is_left(folder, disk, sound, before)
            is_begun = (folder / MANIFEST_FILE).exists()
            counts["resumed"] += is_begun
            code, said = ended(partial(main, again if is_begun else argv))
            assert code == 0
            check_finished(folder, whole)
        except AssertionError as wrong:
            faults.append(f"{at}, {changes[at - 1]}: {said.strip()[-300:]}: {str(wrong)[:300]}")
        shutil.rmtree(folder)
    print(f"\n{start}, {error}, stays {stays}: {len(changes)} writes, {dict(counts)}, {len(faults)} wrong")
    assert counts["refused"] == len(changes) // STRIDE > 0
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("error", ERRORS)
def test_a_resume_whose_second_file_is_refused(error: str, killed: Path, tmp_path: Path) -> None:
    """The first is closed again, which fails as well where the disk stays so."""
    shutil.copytree(killed, folder := tmp_path / "run")
    disk = Disk(tmp_path, 2, stays=True, error=ERRORS[error])
    with disk.patched():
        code, said = ended(partial(main, ["--resume", str(folder)]))
    assert disk.changes == ["open trace_steps.jsonl", "open requests.jsonl", "fsync trace_steps.jsonl"]
    assert (code, is_one_line(said)) == (2, True), said
    assert f"cannot resume: {os.strerror(ERRORS[error])}" in said
    assert (folder / STEPS_FILE).read_bytes() == (killed / STEPS_FILE).read_bytes()


@contextlib.contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """The kernel lets no file of this process grow beyond this."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9])
def test_the_kernel_refuses(share: float, flags: tuple[str, ...], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    limit = int(share * (whole / STEPS_FILE).stat().st_size)
    with file_limit(limit):
        code, said = ended(partial(main, [*flags, "--trace-out", str(folder)]))
    assert (code, is_one_line(said)) == (2, True), said
    assert "File too large" in said
    check_what_is_left(folder, Disk(tmp_path), read_lines(whole))
    argv = [*flags, "--trace-out", str(folder)]
    if (folder / MANIFEST_FILE).exists():
        argv = ["--resume", str(folder)]
    assert ended(partial(main, argv))[0] == 0
    check_finished(folder, whole)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("to", ["parquet", "jsonl"])
def test_the_kernel_refuses_an_export(share: float, to: str, whole: Path, tmp_path: Path) -> None:
    source, out = whole, tmp_path / "out"
    if to == "jsonl":
        source = tmp_path / "source"
        assert ended(partial(export.main, [str(whole), "--to", "parquet", "--out", str(source)]))[0] == 0
    argv = [str(source), "--to", to, "--out", str(out)]
    assert ended(partial(export.main, argv))[0] == 0
    largest = max(path.stat().st_size for path in out.iterdir())
    shutil.rmtree(out)
    left = sorted(tmp_path.iterdir())
    with file_limit(int(share * largest)):
        code, said = ended(partial(export.main, argv))
    assert (code, is_one_line(said)) == (2, True), said
    assert sorted(tmp_path.iterdir()) == left
    assert ended(partial(export.main, argv))[0] == 0


def test_the_kernel_refuses_a_summary(whole: Path, tmp_path: Path) -> None:
    with file_limit(100):
        code, said = ended(partial(summarize.main, [str(whole), "--out", str(tmp_path / "s.json")]))
    assert (code, is_one_line(said)) == (2, True), said
    assert not list(tmp_path.iterdir())
