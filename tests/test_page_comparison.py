"""Runs side by side: their own numbers, the differences between them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from dsatrace import cli
from dsatrace.report.page.comparison import CURVES, comparison_html, require_comparable
from dsatrace.report.page.material import Material
from dsatrace.report.page.page import MAX_BYTES
from dsatrace.trace.kind import Layer, SelectionKind
from dsatrace.trace.reader import RunReader
from helpers.command_runs import told_error
from helpers.golden_run import REQUESTS, SERVING, write_golden
from helpers.kind_runs import KINDS, write_kind
from helpers.page import Page
from helpers.tier_samples import SETUPS

TRACES = ROOT / "data" / "traces" / "needle-2k"


def compared(out: Path, *folders: Path, flags: tuple[str, ...] = ()) -> Page:
    assert cli.main(["report", *map(str, folders), "--html", str(out), *flags]) == 0
    return Page.read(out)


def materials_of(*folders: Path) -> list[Material]:
    return [Material.of(RunReader(folder), "not replayed") for folder in folders]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("compared") / "page.html"
    page = compared(out, TRACES / "2k", TRACES / "4k")
    assert out.stat().st_size < MAX_BYTES
    return page


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_bytes())


def test_differences_are_of_the_summaries(traces: Page) -> None:
    a, b = (summary_of(TRACES / name) for name in ("2k", "4k"))
    rows = {row["figure"]: row for row in traces.table("differences")}
    for name, of in (
        ("records", lambda one: one["counts"]["records"]),
        ("selected in the step before", lambda one: one["step_overlap"]["mean"]),
        ("of the answer's tokens, selected", lambda one: one["needle_recall"]["mean"]),
        ("latents read", lambda one: one["bytes_read"]["without_indexer_scan"]),
        ("offset, median (tokens)", lambda one: one["offsets"]["p50"]),
    ):
        assert (rows[name]["A 2k"], rows[name]["B 4k"], rows[name]["B - A"]) == (of(a), of(b), of(b) - of(a))
    for before, after in zip(a["blocks_touched"], b["blocks_touched"], strict=True):
        row = rows[f"blocks of {before['block_size_tokens']} touched, of the context's"]
        shares = [one["mean"] / one["context_mean"] for one in (before, after)]
        assert (row["A 2k"], row["B 4k"], row["B - A"]) == (*shares, shares[1] - shares[0])
    assert "latency, median (ms)" not in rows  # nothing arrived over time


def test_curves_are_of_the_summaries(traces: Page) -> None:
    for name in ("2k", "4k"):
        of = summary_of(TRACES / name)
        run = f"{'A' if name == '2k' else 'B'} {name}"
        for key, shares in (
            ("step-overlap", of["step_overlap"]["per_layer"]),
            ("answer", of["needle_recall"]["per_layer"]),
            ("blocks", [row["mean"] / row["context_mean"] for row in of["blocks_touched"]]),
        ):
            found = [row for row in traces.table(key) if row["run"] == run]
            assert [list(row.values())[2] for row in found] == shares


def test_each_run_has_its_own_maps(traces: Page) -> None:
    """One per run, of the layer that knows the answer."""
    for (values, facts), name in zip(traces.heat_maps("positions"), ("2k", "4k"), strict=True):
        assert facts["pool"] == "mean"
        assert np.nansum(values) == 64 * 192, name


def test_a_run_has_one_colour_and_dash(traces: Page) -> None:
    for key in ("curve", "step-overlap", "blocks"):
        lines = traces.sections()[key].first("svg", role="img").all("g")
        drawn = {line.attributes["class"]: line for line in lines if "null" not in line.attributes["class"]}
        assert list(drawn) == ["s0", "s1"], key
        dashes = [line.first("path").attributes.get("stroke-dasharray") for line in drawn.values()]
        assert len(set(dashes)) == 2, key


def test_ids_stand_once(traces: Page) -> None:
    ids = [one.attributes["id"] for one in traces.root.all() if "id" in one.attributes]
    assert len(set(ids)) == len(ids)
    tables = {button.attributes["data-table"] for button in traces.root.all("button", class_="copy")}
    assert tables <= set(ids)


def test_three_runs_with_other_tiers(tmp_path: Path) -> None:
    """What they were run with stands in the table of settings; each shows its own tiers."""
    folders = [
        write_golden(tmp_path / "all", serving=SERVING),
        write_golden(tmp_path / "row", serving=SERVING, tiers=SETUPS["row"]),
        write_golden(tmp_path / "block", serving=SERVING, tiers=SETUPS["block"]),
    ]
    page = compared(tmp_path / "page.html", *folders)
    settings = page.sections()["differences"].first("table").text
    assert "all in HBM" in settings
    assert "granularity" in settings
    rows = {row["figure"]: row for row in page.table("differences")}
    found = rows["selected tokens found in HBM"]
    assert found["A all"] is None
    for name, folder in (("B row", folders[1]), ("C block", folders[2])):
        fetch = summary_of(folder)["kv_fetch"]
        total = sum(one["hit_tokens"] for one in fetch.values())
        assert found[name] == fetch["hbm"]["hit_tokens"] / total
    assert rows["latency, median (ms)"]["C - A"] == 0
    assert len(list(page.sections()["bytes"].all("div", class_="run"))) == 3


def test_two_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    page = compared(
        tmp_path / "page.html", write_golden(tmp_path / "a/run"), write_golden(tmp_path / "b/run")
    )
    assert {row["run"] for row in page.table("step-overlap")} == {"A run", "B run"}


def test_runs_of_the_same_tokens_are_compared_row_by_row(tmp_path: Path) -> None:
    run = write_golden(tmp_path / "run")
    page = compared(tmp_path / "page.html", run, write_golden(tmp_path / "again"))
    assert "0 of " in page.sections()["same"].text
    assert set(page.column("same", "differ")) == {0}
    values, _ = page.heat_map("same")
    assert np.nanmin(values) == 1
    other = write_golden(tmp_path / "other", seed=1)
    page = compared(tmp_path / "page.html", run, other)
    out = tmp_path / "diff"
    assert cli.main(["diff", str(run), str(other), "--out", str(out), "--no-figure"]) == 1
    record = json.loads((out / "diff.json").read_bytes())
    assert page.column("same", "differ") == [layer["differing"] for layer in record["layers"]]
    assert page.column("same", "overlap") == [layer["overlap"] for layer in record["layers"]]


def test_runs_of_other_tokens_are_not(traces: Page) -> None:
    assert "same" not in traces.sections()
    (why,) = (
        why for why, titles in traces.left_out() if "Do they select the same, token by token?" in titles
    )
    assert "not the same tokens" in why


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_beside_itself(tmp_path: Path, name: str) -> None:
    folder = write_kind(tmp_path / "run", name)
    page = Page(comparison_html(materials_of(folder, folder), "not compared"))
    assert [row["B - A"] for row in page.table("differences") if row["B - A"]] == []
    assert len(page.sections()) + len(page.left_out()) > len(CURVES)


SMALLER_K = SelectionKind(
    layers=(Layer(8), Layer(0, heads=0), Layer(6)), door="layerwise", missing=("timing", "prefix")
)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("entry", "unit: token of 1 in the first, entry of 4 in the second"),
        ("slots", "ids: position in the first, slot in the second"),
        ("expert", "unit"),
        (SMALLER_K, "k by layer: 16, 0, 6 in the first, 8, 0, 6 in the second"),
        ("two heads", "k by layer"),
    ],
)
def test_runs_of_other_kinds_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, other: str | SelectionKind, named: str
) -> None:
    kind = None if isinstance(other, str) else other
    a = write_kind(tmp_path / "a", "uneven layers")
    b = write_kind(tmp_path / "b", other if isinstance(other, str) else "", kind=kind)
    said = told_error(
        capsys, lambda: cli.main(["report", str(a), str(b), "--html", str(tmp_path / "page.html")])
    )
    assert f"{a} and {b} cannot be compared: " in said
    assert named in said
    assert not (tmp_path / "page.html").exists()


def test_runs_of_other_models_and_levels_are_refused(tmp_path: Path) -> None:
    golden = write_golden(tmp_path / "golden")
    for folder, named in (
        (write_golden(tmp_path / "blocks", level="blocks"), "trace level"),
        (write_golden(tmp_path / "deep", num_layers=4), "layers"),
    ):
        with pytest.raises(Exception, match=named):
            require_comparable(materials_of(golden, folder))
    require_comparable(materials_of(golden, write_golden(tmp_path / "stats", level="stats")))


def test_replays_of_other_settings_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, page = write_golden(tmp_path / "run"), str(tmp_path / "page.html")
    for name, sizes, *chosen in (("a", "1k"), ("b", "1k,2k", "--choose", "1k"), ("c", "1k,2k")):
        out = str(tmp_path / name)
        asked = ["replay", str(run), "--policy", "lru", "--sizes", sizes, "--out", out, "--no-figure"]
        assert cli.main([*asked, *chosen]) == 0
    for first, second, named in (
        ("a", "b", "sizes is ['1k'] in the first, ['1k', '2k'] in the second"),
        ("b", "c", "size is 1k in the first, 2k in the second"),
    ):
        replays = [flag for name in (first, second) for flag in ("--replay", str(tmp_path / name))]
        args = ["report", str(run), str(run), "--html", page, *replays]
        assert named in told_error(capsys, lambda args=args: cli.main(args))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "several runs are compared on a page; add --html FILE"),
        (["--html", "page.html", "--replay", "x"], "--replay: 1 for 2 runs"),
        (["third", "fourth", "--html", "page.html"], "fourth: a page compares at most 3 runs"),
    ],
)
def test_what_cannot_be_asked_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], named: str
) -> None:
    run = str(write_golden(tmp_path / "run", REQUESTS[:1]))
    assert named in told_error(capsys, lambda: cli.main(["report", run, run, *flags]))
