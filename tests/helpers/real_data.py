"""Where small slices of the real data sets lie; none is in this tree, and tests that use one may skip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conftest import ROOT


def real_file(name: str) -> Path:
    """A file of `data/` in the folder `DSATRACE_SHARED`, or in `shared` beside the checkout; else skips."""
    shared = Path(os.environ.get("DSATRACE_SHARED", ROOT.parent / "shared"))
    file = shared / "data" / name
    if not file.exists():
        pytest.skip(f"{file} is not there; set DSATRACE_SHARED to the folder that holds data/{name}")
    return file


def oracle_file(name: str) -> Path:
    """A file of recorded answers, `oracle/` beside `data/`; else skips."""
    return real_file(f"../oracle/{name}").resolve()
