"""A study's page: its cells and tables, capacities in GiB where a token's bytes are told."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from dsatrace import cli
from dsatrace.report.page.page import MAX_BYTES
from dsatrace.report.page.study_page import policies_by_capacity, study_html
from dsatrace.report.page.svg import WIDTH, Axis, Series, line_chart
from helpers.command_runs import told_error
from helpers.golden_run import write_golden
from helpers.page import SMALL_SWEEP, Page

COLUMNS = ("workload", "tokens per block", "policy", "capacity, blocks", "hit rate", "hits", "blocks asked")
KEYS = ("workload", "block_size", "policy", "capacity_blocks", "hit_rate", "hits", "accesses")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "sweep"
    assert cli.main(["study", "sweep", "--output-dir", str(folder), *SMALL_SWEEP]) == 0
    return folder


def page_of(folder: Path, out: Path, *flags: str) -> Page:
    assert cli.main(["report", str(folder), "--html", str(out), *flags]) == 0
    assert out.stat().st_size < MAX_BYTES
    return Page.read(out)


def test_the_numbers_are_the_cells(sweep: Path, tmp_path: Path) -> None:
    page = page_of(sweep, tmp_path / "page.html", "--bytes-per-token", "40016")
    cells = json.loads((sweep / "sweep.json").read_bytes())["cells"]
    rows = page.table("policies-sweep")
    assert len(rows) == len(cells) > 20
    for row, cell in zip(rows, cells, strict=True):
        assert [row[column] for column in COLUMNS] == [cell[key] for key in KEYS]
        assert row["95% from"] == cell.get("hit_rate_low")
        assert row["GiB"] == cell["capacity_blocks"] * cell["block_size"] * 40016 / 2**30


def test_a_chart_per_workload_has_a_line_per_policy(sweep: Path, tmp_path: Path) -> None:
    page = page_of(sweep, tmp_path / "page.html")
    section = page.sections()["policies-sweep"]
    cells = json.loads((sweep / "sweep.json").read_bytes())["cells"]
    charts = list(section.all("svg", role="img"))
    assert len(charts) == len({cell["workload"] for cell in cells})
    policies = {cell["policy"] for cell in cells}
    for legend in section.all("ul", class_="legend"):
        assert {line.text for line in legend.all("li")} == policies
        drawn = {f"{[path.attributes for path in key.all('path')]}" for key in legend.all("svg")}
        assert len(drawn) == len(policies)
    keys = [
        {line.text: line.first("g").attributes for line in legend.all("li")} for legend in section.all("ul")
    ]
    assert all(one == keys[0] for one in keys)  # a policy looks the same in all charts
    assert "Blocks only" in section.text
    assert all(row["GiB"] is None for row in page.table("policies-sweep"))


def test_a_policy_looks_the_same_in_all_results(sweep: Path, tmp_path: Path) -> None:
    """Two results that order fifo and s3-fifo differently, and one of a single capacity, drawn in bars."""
    record = json.loads((sweep / "sweep.json").read_bytes())
    other = {"fifo": "s3-fifo", "s3-fifo": "fifo"}
    swapped = [cell | {"policy": other.get(cell["policy"], cell["policy"])} for cell in record["cells"]]
    least = min(cell["capacity_blocks"] for cell in swapped)
    single = [cell for cell in swapped if cell["capacity_blocks"] == least and cell["policy"] != "lru"]
    (tmp_path / "manifest.json").write_bytes((sweep / "manifest.json").read_bytes())
    for name, cells in (("a", record["cells"]), ("b", swapped), ("c", single)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record | {"cells": cells}))
    sections = Page(study_html(tmp_path)).sections()
    keys = [
        {line.text: line.first("g").attributes["class"] for line in legend.all("li")}
        for name in "ab"
        for legend in sections[f"policies-{name}"].all("ul", class_="legend")
    ]
    assert all(one == keys[0] for one in keys) and len(set(keys[0].values())) == len(keys[0]) >= 3
    chart = next(sections["policies-c"].all("svg", role="img"))
    bars = [bar.attributes["class"] for bar in chart.all("g")]
    assert set(bars) == {look for policy, look in keys[0].items() if policy != "lru"}


def test_all_tables_of_the_report_are_there(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of(sweep, tmp_path / "page.html")
    capsys.readouterr()
    assert cli.main(["report", str(sweep), "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    for i, table in enumerate(tables):
        rows = page.rows(f"table-{i}-table")
        numbers = [[cell for cell in row if isinstance(cell, float | int)] for row in table["rows"]]
        assert [[cell for cell in row if isinstance(cell, float | int)] for row in rows] == numbers
        assert page.sections()[f"table-{i}"].first("h2").text == table["title"]


def test_a_mark_at_the_end_of_a_chart_keeps_its_label_within() -> None:
    x, y = Axis("size", 1, 4, log=True), Axis("hits", 0, 1, share=True)
    marks = [(4.0, "recommended: 256.0 GiB"), (1.0, "the smallest size of all of them"), (3.9, "no room")]
    page = Page(line_chart("Hits", "They grow.", x, y, [Series("lru", [1, 4], [0, 1])], marks))
    boxes = {
        text: (left, right) for left, _, right, _, text in page.text_boxes(page.root.first("svg", role="img"))
    }
    assert 0 <= boxes[marks[1][1]][0] < boxes[marks[1][1]][1] < boxes[marks[0][1]][0]
    assert boxes[marks[0][1]][1] <= WIDTH - 4
    assert "no room" not in boxes


def test_a_study_of_one_capacity_is_told_in_bars(tmp_path: Path) -> None:
    folder = tmp_path / "<b>one"
    folder.mkdir(parents=True)
    manifest = {"study": "mixed", "state": "complete", "argv": ["<script>"], "started_utc": "2026"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    cell = {
        "workload": "<img src=x>",
        "block_size": 16,
        "capacity_blocks": 64,
        "policy": "lru",
        "hits": 3,
        "accesses": 4,
    }
    (folder / "other.json").write_text(json.dumps({"none": 1}))
    counts = {"hits": 3, "accesses": 4, "hit_rate": 0.75}
    cells = [cell | counts, cell | counts | {"hit_rate": 1.0, "policy": "opt"}]
    section = policies_by_capacity(folder / "mixed.json", cells, ["lru", "opt"], None, "dsatrace report x")
    page = Page(section.html())
    assert "75.0%" in page.root.text
    assert not list(page.root.all("img"))
    page = Page(study_html(folder))
    assert "compares no policies" in page.root.text
    assert len(list(page.root.all("script"))) == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--layer", "1"], "--layer"),
        (["--request", "r0"], "--request"),
        (["--bytes-per-token", "0"], "--bytes-per-token"),
    ],
)
def test_flags_of_runs_are_refused(
    capsys: pytest.CaptureFixture[str], sweep: Path, tmp_path: Path, flags: list[str], named: str
) -> None:
    page = ["--html", str(tmp_path / "page.html")]
    assert named in told_error(capsys, lambda: cli.main(["report", str(sweep), *page, *flags]))


def test_a_study_and_a_run_are_not_compared(
    capsys: pytest.CaptureFixture[str], sweep: Path, tmp_path: Path
) -> None:
    run, page = str(write_golden(tmp_path / "run")), ["--html", str(tmp_path / "page.html")]
    for first, second in ((str(sweep), run), (run, str(sweep))):
        asked = ["report", first, second, *page]
        said = told_error(capsys, functools.partial(cli.main, asked))
        assert f"{sweep}: a study has a page of its own" in said
    asked = ["report", run, *page, "--bytes-per-token", "8"]
    assert "--bytes-per-token 8" in told_error(capsys, lambda: cli.main(asked))
