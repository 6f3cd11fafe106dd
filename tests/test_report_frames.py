"""A report's tables as JSON and as data frames: the numbers that the printed texts were made from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsatrace
from conftest import ROOT
from dsatrace import cli
from dsatrace.report.grid import MAX_ROWS, Cell, Grid, number, percent
from dsatrace.report.parts import parts_json, report_parts
from dsatrace.report.replay_tables import replay_parts
from dsatrace.report.workload_tables import workload_tables
from helpers.golden_run import SERVING, write_golden
from helpers.kind_runs import KINDS, write_kind
from helpers.tier_samples import SETUPS

OPEN = ROOT / "data" / "traces" / "needle-2k" / "2k"
SMALL = ("--num-requests", 20, "--seeds", 2, "--skip-visualization")
STUDIES = {
    "run": ("--min-turns", 2, "--runner", "engine", "--skip-visualization"),
    "compare": ("--num-blocks", 40, "--skip-visualization"),
    "explain": (),
    "sweep": (*SMALL, "--capacities", 64, "--policies", "lru"),
    "mixed": (*SMALL, "--policies", "lru", "fifo"),
}
WAYS = ("open", "served", *KINDS, *SETUPS, *STUDIES)


@pytest.fixture(scope="module", params=WAYS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every kind and of every setup of tiers, and every study."""
    name, out = request.param, tmp_path_factory.mktemp("frames") / "out"
    if name in KINDS:
        return write_kind(out, name)
    if name in STUDIES:
        flags = [str(flag) for flag in STUDIES[name]]
        assert cli.main(["study", name, *flags, "--output-dir", str(out)]) == 0
        return out
    return OPEN if name == "open" else write_golden(out, serving=SERVING, tiers=SETUPS.get(name))


def grids_of(folder: Path) -> list[Grid]:
    return [part for part in report_parts(folder) if isinstance(part, Grid)]


NUMERIC = re.compile(r"[-+]?[\d,]+(\.\d+)?( ?(%|x|s|ms|us|KiB|MiB|GiB|TiB|tokens|points)\b.*)?")


def unkept(grid: Grid) -> Iterator[str]:
    """Texts that show a number without keeping it."""
    for row in grid.rows:
        yield from (cell for cell in row if not isinstance(cell, Cell) and NUMERIC.fullmatch(cell))


def shows(cell: Cell) -> bool:
    """Whether the text begins with the value: rounded, in percent, or in a larger unit."""
    if cell.value is None:
        return cell in ("-", "none", "unknown", "too small")
    if isinstance(cell.value, list):
        return all(
            f"{one}" in cell for value in cell.value for one in (value if type(value) is list else [value])
        )
    found = re.match(r"[-+]?[\d,]*\.?\d+", cell)
    assert found, cell
    shown = float(found[0].replace(",", ""))
    half = 0.5 * 10 ** -len(found[0].partition(".")[2]) * 1.001
    scales = (1, 100, 1e-3, *(1024.0**-i for i in range(1, 5)))
    return any(abs(shown - cell.value * scale) <= max(half, abs(shown) * 1e-5) for scale in scales)


def test_every_number_is_kept(folder: Path) -> None:
    grids, num_cells = grids_of(folder), 0
    for grid in grids:
        assert list(unkept(grid)) == [], grid.title
        for row in grid.rows:
            for cell in row:
                if isinstance(cell, Cell):
                    assert shows(cell), (grid.title, cell, cell.value)
                    num_cells += 1
    assert num_cells > 5


def test_json_is_the_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in folder.iterdir()}
    assert cli.main(["report", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {path.name for path in folder.iterdir()} == before
    assert told == json.loads(json.dumps(parts_json(report_parts(folder))))
    for table, grid in zip(told["tables"], grids_of(folder), strict=True):
        assert (table["title"], table["columns"]) == (grid.title, list(grid.columns))
        assert [len(row) for row in table["rows"]] == [len(row) for row in grid.rows]
    assert told["lines"]


def test_every_table_is_a_frame(folder: Path) -> None:
    frames = dsatrace.tables(folder)
    assert list(frames) == [grid.title for grid in grids_of(folder)]
    for grid in grids_of(folder):
        frame = frames[grid.title].to_pandas()
        assert frame.shape == (len(grid.rows), len(grid.columns))
        assert len(set(frame.columns)) == len(frame.columns) and all(frame.columns)


def test_the_open_traces_numbers() -> None:
    frames = dsatrace.tables(OPEN)
    overlap = frames["Share of a selection already selected ..."].to_pandas()
    summary = dsatrace.load(OPEN).reader.summary()
    assert overlap.measured.tolist() == [summary[f"{of}_overlap"]["mean"] for of in ("step", "layer")]
    blocks = frames["KV blocks touched by one decode step, per layer (mean)"].to_pandas()
    assert blocks["block size"].tolist() == [row["block_size_tokens"] for row in summary["blocks_touched"]]
    assert blocks["measured"].tolist() == [row["mean"] for row in summary["blocks_touched"]]
    sinks = next(frame for title, frame in frames.items() if "(sinks)" in title)
    assert sinks.columns == ["layer", "sinks", "uniform", "recent", "uniform (2)", "recency selector"]


def test_a_replays_numbers_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = ("--link", "pcie5-x16", "--compute-us", "100", "--hbm-gb", "4")
    assert cli.main(["replay", str(OPEN), "--out", str(tmp_path / "out"), "--no-figure", *costs]) == 0
    record = json.loads((tmp_path / "out" / "replay.json").read_bytes())
    grids = [part for part in replay_parts(record) if isinstance(part, Grid)]
    assert [list(unkept(grid)) for grid in grids] == [[]] * len(grids)
    assert json.dumps(parts_json(grids), allow_nan=False)
    rates = grids[0].frame().to_pandas().set_index("policy")
    assert rates["2k"]["lru"] == record["overall"]["policies"]["lru"]["2k"]["miss_rate"]


def test_more_rows_than_are_printed() -> None:
    scores = {"mean": 1.0, "num_scored": 99, "by": {"row": {}}}
    scores["by"] = {"row": {f"{i:02}": {"mean": float(i), "num_scored": 1} for i in range(99)}}
    (grid,) = workload_tables({"scores": scores})
    lines = grid.markdown().splitlines()
    assert f"| ... and {99 - MAX_ROWS} more in summary.json |" in lines
    assert sum(line.startswith("| row ") for line in lines) == MAX_ROWS
    assert len(grid.to_json()["rows"]) == len(grid.frame().to_arrow()) == 100


def test_a_column_of_words_and_numbers_is_text() -> None:
    rows = [("a", number(1.5, ".1f", " ms"), percent(0.25), number(3)), ("b", "fast", number(None), "")]
    grid = Grid("t", ("", "", "x", "n"), rows)
    assert grid.to_json()["rows"] == [["a", 1.5, 0.25, 3], ["b", "fast", None, ""]]
    table = grid.frame().to_arrow()
    assert table.to_pydict() == {
        "name": ["a", "b"], "value": ["1.5 ms", "fast"], "x": [0.25, None], "n": [3, None]
    }  # fmt: skip


def test_json_of_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path), "--json"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
