"""Imports by the command, and what is in the runs that they make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsatrace import cli
from dsatrace.trace.reader import RunReader
from dsatrace.trace.selections import read_selections


def imported(folder: Path, *argv: object) -> Path:
    """A run imported by the command."""
    out = folder / f"run{len(list(folder.iterdir()))}"
    assert cli.main(["import", *map(str, argv), "--out", str(out)]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of an import that leaves nothing behind."""
    out = Path(str(argv[0])).parent / "refused"
    before = sorted(out.parent.rglob("*"))
    capsys.readouterr()
    assert cli.main(["import", *map(str, argv), "--out", str(out)]) == 2
    assert sorted(out.parent.rglob("*")) == before
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "read," not in line]
    assert line.startswith("error: ")
    return line


def sets_of(run: Path) -> dict[str, dict[int, list[set[int]]]]:
    """Request -> position -> the sets of its layers."""
    found: dict[str, dict[int, list[set[int]]]] = {}
    for request in read_selections(RunReader(run)):
        rows: dict[int, list[set[int]]] = {}
        for layer in request.layers.values():
            for t, seq_len in enumerate(layer.seq_len.tolist()):
                rows.setdefault(seq_len - 1, []).append(
                    set(layer.ids[layer.ptr[t] : layer.ptr[t + 1]].tolist())
                )
        found[request.request_id] = rows
    return found


def expected(ids: np.ndarray, first: int = 0) -> dict[int, list[set[int]]]:
    return {first + t: [set(row[row >= 0].tolist()) for row in sets] for t, sets in enumerate(ids)}
