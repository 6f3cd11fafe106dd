"""The notebook in docs/ runs cell by cell, and finds what the open trace's README says."""

from __future__ import annotations

import json
from typing import Any

import matplotlib as mpl
import pytest

from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "load.ipynb"
README = ROOT / "data" / "traces" / "needle-2k" / "README.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the cells' names hold once all have run, in the folder where a reader starts them."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    left: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(NOTEBOOK.parent)
        for number, source in enumerate(sources(), 1):
            exec(compile(source, f"cell {number}", "exec"), left)
    assert plt.get_fignums()
    plt.close("all")
    return left


def sources() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_it_finds_what_the_readme_says(names: dict[str, Any]) -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    for part, title in (("answer", "| `2k`, saying the answer |"), ("past it", "| `2k`, past it |")):
        (line,) = (line for line in lines if line.startswith(title))
        *told, _ = (float(cell) for cell in line.strip("|").split("|")[1:])  # chance is of all steps there
        assert names["table"].loc[part].tolist()[:-1] == pytest.approx(told, abs=0.0006)
    assert (names["num_sets"], names["num_ids"]) == (2080, 2080 * 192)


def test_the_answers_blocks_stand_out(names: dict[str, Any]) -> None:
    blocks = names["blocks"].groupby("layer").mean()
    assert (blocks["the answer's blocks"] > blocks["all blocks"]).any()
    assert len(names["tables"]) > 5


def test_it_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    assert NOTEBOOK.stat().st_size < 20_000
    assert len(sources()) >= 6
