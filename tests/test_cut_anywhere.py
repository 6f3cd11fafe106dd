"""A run whose files are cut at any byte: read up to the last whole line, or refused in one line.

A few cuts for CI; by hand at every byte, which takes a quarter of an hour:

    DSATRACE_CUT_STRIDE=1 python -m pytest -s tests/test_cut_anywhere.py
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import orjson
import pytest

from dsatrace.errors import UserError
from dsatrace.schema import MANIFEST_FILE, STEPS_FILE, STEPS_PARQUET_FILE, SUMMARY_FILE
from dsatrace.trace.export import export_run
from dsatrace.trace.reader import RunReader
from helpers.damage import overwrite
from helpers.golden_run import GoldenRequest, write_golden
from test_damaged_inputs import VERBS, ended, is_sound

STRIDE = int(os.environ.get("DSATRACE_CUT_STRIDE", "2000"))
"""Bytes from cut to cut for the reader."""
VERBS_STRIDE = max(50, 2 * STRIDE)
"""The same for every verb that reads a run."""
REQUESTS = (GoldenRequest("ré0", 6, 4), GoldenRequest("r1", 40, 3, needle_positions=(3, 4)))
NUM_LAYERS = 2


def killed(folder: Path) -> Path:
    """As a kill leaves a run: the manifest says that it is running, and knows no digests."""
    return write_golden(folder, REQUESTS, num_layers=NUM_LAYERS, state="running")


def complete(folder: Path) -> Path:
    return write_golden(folder, REQUESTS, num_layers=NUM_LAYERS, sealed=True)


def parquet(folder: Path) -> Path:
    export_run(RunReader(complete(folder.with_name("source"))), "parquet", folder)
    return folder


def codes(state: str, name: str, left: bytes, size: int) -> dict[str, int]:
    """The exit code of each verb for that file of so many bytes, of which these are left."""
    at = len(left)
    verify = 0 if state == "killed" else 1  # digests tell of every byte
    readers, resume, verbs = 0, 0 if state == "killed" else 2, {}
    if name == STEPS_PARQUET_FILE:
        readers = verify = 2
    elif name == MANIFEST_FILE:
        verify = 0
        if at < size - 1:  # else only the newline is missing
            readers = verify = resume = 2
    elif name == SUMMARY_FILE and at < size - 1:
        readers = resume = 2
        verify = 1
        verbs["export"] = 0  # copies it as it is
    elif name == STEPS_FILE:
        if b"\n" not in left:
            verify = 1  # requests that ended, and no record
        if state == "complete" and left.count(b"\n") % NUM_LAYERS and at < size - 1:
            verbs["summarize"] = 2  # the last forward lacks a layer
    if verify == 1 and state != "killed":
        verbs["export"] = 2  # it would hide that the digest is wrong
    verbs = {verb: verbs.get(verb, readers) for verb in ("report", "summarize", "export")}
    return {**verbs, "verify": verify, "resume": resume}


def check_lines(folder: Path, name: str, left: bytes, records: list[object]) -> None:
    """Every whole line is read, and the reader says so if one was cut short."""
    run = RunReader(folder)
    num_whole = left.count(b"\n")
    read = list(run.steps() if name == STEPS_FILE else run.requests())
    rest = left[left.rfind(b"\n") + 1 :]
    num_whole += orjson.dumps(records[num_whole]) == rest if num_whole < len(records) else 0
    assert read == records[:num_whole]
    is_torn = bool(rest) and len(read) == left.count(b"\n")
    assert (name in run.torn_lines) == is_torn, run.torn_lines


def check_refused(folder: Path, name: str) -> None:
    """One line that names the file."""
    with pytest.raises(UserError) as caught:
        run = RunReader(folder)
        list(run.steps())
        run.summary()
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def cuts(whole: bytes) -> list[int]:
    """Where the reader is asked: a stride apart, and around the ends of lines and of the file."""
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10] if len(whole) < 1 << 16 else []
    near = {end + offset for end in ends[:3] + ends[-3:] for offset in (-1, 0, 1)}
    return sorted((near | set(range(0, len(whole), STRIDE)) | {len(whole) - 1}) & set(range(len(whole))))


@pytest.mark.parametrize("make", [killed, complete, parquet])
def test_cut_at_any_byte(make, tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    counts: Counter[str] = Counter()
    faults: list[str] = []
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        records = [orjson.loads(line) for line in whole.splitlines()] if path.suffix == ".jsonl" else []
        for at in cuts(whole):
            overwrite(path, whole[:at])
            counts["cuts"] += 1
            try:
                if records:
                    check_lines(folder, path.name, whole[:at], records)
                elif at < len(whole) - 1 or path.name == STEPS_PARQUET_FILE:
                    check_refused(folder, path.name)
            except (AssertionError, UserError) as wrong:
                counts["read wrongly"] += 1
                faults.append(f"reader, {path.name} at {at}: {wrong}")
            if at % VERBS_STRIDE and at < len(whole) - 1:
                continue
            for verb, code in codes(make.__name__, path.name, whole[:at], len(whole)).items():
                case = tmp_path / "case"
                shutil.copytree(folder, case)
                found, said = ended(partial(VERBS[verb], case))
                counts["verbs"] += 1
                counts["tracebacks"] += "Traceback" in said or found == 70
                names_it = found != 2 or str(case) in said
                if found != code or not is_sound(found, said) or not names_it:
                    counts["ended wrongly"] += 1
                    faults.append(f"{verb}, {path.name} at {at}: exit {found}, not {code}: {said.strip()}")
                shutil.rmtree(case)
                shutil.rmtree(tmp_path / "case_out", ignore_errors=True)
        overwrite(path, whole)
    print(f"{make.__name__}: {dict(counts)}")
    assert counts["cuts"] > 30
    assert counts["verbs"] > 30
    assert not faults, "\n".join(faults[:20])
