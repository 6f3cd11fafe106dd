"""A run's page: its numbers are those of summary.json and replay.json, and it asks no address."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from dsatrace import cli
from dsatrace.report.page.material import Material
from dsatrace.report.page.page import MAX_BYTES, POLICY, SECTIONS, page_html, write_page
from dsatrace.report.page.svg import DASHES, MARKERS
from dsatrace.report.published import FIGURES
from dsatrace.trace.reader import RunReader
from helpers.command_runs import told_error
from helpers.golden_run import REQUESTS, GoldenRequest, write_golden
from helpers.kind_runs import KINDS, write_kind
from helpers.page import Element, Page
from test_trace_requests import serve_without_steps

NEEDLE = ROOT / "data" / "traces" / "needle-2k" / "2k"


def page_of(folder: Path, out: Path, *flags: str | Path) -> Page:
    """The page that the command writes."""
    assert cli.main(["report", str(folder), "--html", str(out), *map(str, flags)]) == 0
    return Page.read(out)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a real run, which its command replayed itself."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    page_of(NEEDLE, path)
    return path


@pytest.fixture(scope="module")
def needle(file: Path) -> Page:
    return Page.read(file)


@pytest.fixture(scope="module")
def replay(needle: Page, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command that the page names finds."""
    out = tmp_path_factory.mktemp("replay")
    command = shlex.split(needle.sections()["curve"].first("p", class_="command").text)
    assert command[:2] == ["dsatrace", "replay"]
    assert cli.main([*command[1:], "--out", str(out), "--no-figure"]) == 0
    found: dict[str, Any] = json.loads((out / "replay.json").read_bytes())
    return found


def test_the_curves_numbers_are_the_replays(needle: Page, replay: dict[str, Any]) -> None:
    rows, overall = needle.table("curve"), replay["overall"]
    by_size = {row["size"]: row for row in rows if row["size"]}
    assert list(by_size) == replay["settings"]["sizes"]
    for size, row in by_size.items():
        for policy in replay["settings"]["policies"]:
            assert row[f"{policy} missed"] == overall["policies"][policy][size]["miss_rate"]
        cell = overall["policies"]["lru"][size]
        assert [row["lru, 95% from"], row["to"]] == cell["interval"]
        assert row["lru, uniform selector"] == cell["nulls"]["uniform"]
        assert row["opt, recency window"] == overall["policies"]["opt"][size]["nulls"]["recency"]
    published = {(row["buffer, ids"] / 192, row["published"], row["of"]) for row in rows if row["published"]}
    assert published == {
        (figure.buffer_k, figure.low, figure.of.model)
        for figure in FIGURES
        if figure.policy == "lru" and figure.low == figure.high and (figure.buffer_k or 0) * 192 <= 1976
    }
    points = {row["buffer, ids"]: row for row in rows if not row["size"] and not row["published"]}
    assert len(points) > 50
    for name, column in (("run", "lru missed"), ("shuffled", "lru, own steps, shuffled in time")):
        curve = dict(zip(overall["curves"][name]["sizes"], overall["curves"][name]["miss_rate"], strict=True))
        shown = {size: row[column] for size, row in points.items() if size in curve}
        assert len(shown) > 50
        assert shown == {size: curve[size] for size in shown}


def test_misses_by_layer_and_step_are_the_replays(needle: Page, replay: dict[str, Any]) -> None:
    size = replay["chosen"]["size"]
    for row, layer in zip(needle.table("by-layer"), replay["layers"], strict=True):
        missed = layer["policies"]["lru"][size]["misses_per_step"]
        assert row["layer"] == layer["name"]
        assert {key: row[key] for key in missed} == missed
        assert row["missed"] == layer["policies"]["lru"][size]["miss_rate"]
    by_step = [layer["missed_by_step"][size] for layer in replay["layers"]]
    rows = [list(row.values())[1:] for row in needle.table("by-step")]
    assert rows == by_step
    values, facts = needle.heat_map("by-step")
    assert facts["rowsPerCell"] == facts["columnsPerCell"] == 1
    assert np.abs(values - np.array(by_step)).max() <= facts["high"] / facts["levels"] / 2 + 1e-9
    assert facts["high"] == np.max(by_step)


def test_overlap_and_reuse_are_the_replays(needle: Page, replay: dict[str, Any]) -> None:
    (group,) = replay["layer_overlap"]
    for row in needle.table("layers"):
        used, using = int(row["selection of layer"]), row["used by layer"]
        assert row["share"] == group["recall"][used][using]
        assert row["chance"] == group["chance"][used][using]
    overall = replay["overall"]
    assert needle.column("stays", "still selected") == overall["overlap"]["run"]["share"]
    assert needle.column("working-set", "the run") == overall["working_set"]["run"]["mean_ids"]
    *octaves, never = needle.table("reuse")
    assert sum(row["ids"] for row in octaves) == sum(overall["reuse"]["distances"]["counts"])
    assert never["share"] == overall["reuse"]["never_selected_before"]
    assert sum(row["share"] for row in (*octaves, never)) == pytest.approx(1)


def test_layers_that_share_an_index_are_outlined(tmp_path: Path, needle: Page) -> None:
    page = page_of(write_kind(tmp_path / "run", "slots"), tmp_path / "page.html")  # layer 1 uses 0's
    section = page.sections()["layers"]
    (outlined,) = section.all("rect", class_="outline")
    cells = {
        (cell.attributes["x"], cell.attributes["y"]) for cell in section.all("rect") if cell is not outlined
    }
    place = [f"{float(outlined.attributes[name] or 0) - 0.5:.1f}" for name in ("x", "y")]
    assert tuple(place) in cells
    assert "in this model" in section.first("p", class_="note").text
    assert not list(needle.sections()["layers"].all("rect", class_="outline"))
    assert "Nothing is outlined" in needle.sections()["layers"].first("p", class_="note").text


def test_the_verdict_names_the_run_and_its_numbers(needle: Page, replay: dict[str, Any]) -> None:
    verdict = needle.root.first("p", class_="verdict")
    for word in (
        "Measured",
        "deepseek_v32",
        "ruler",
        "192 tokens",
        "64 decode steps",
        "8 requests",
        "door serve",
    ):
        assert word in verdict.text
    said = [json.loads(f"{one.attributes['value']}") for one in verdict.all("data")]
    policies = replay["overall"]["policies"]
    for rate in (policies["lru"]["2k"]["miss_rate"], policies["opt"]["2k"]["miss_rate"]):
        assert rate in said
    assert policies["lru"]["2k"]["nulls"]["uniform"] in said
    counts = json.loads((NEEDLE / "summary.json").read_bytes())["counts"]
    assert {counts["steps"], counts["requests"]} <= set(said)
    facts = needle.root.first("dl", class_="facts")
    assert f"{counts['records']}" in [one.attributes["value"] for one in facts.all("data")]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"--share": "request", "--policy": "lru"}, "buffer of 48 (2k) for all layers misses"),
        ({"--unit": "block:4", "--sizes": "32,64"}, "Of the blocks of 4 tokens that a step touches"),
        (
            {"--unit": "block:4", "--sizes": "32,64", "--share": "prefix", "--policy": "lru"},
            "buffer of 8 misses",
        ),
        ({"--union": "2", "--seed": "3", "--start": "empty", "--policy": "opt,lru"}, "of 16 (2k) misses"),
    ],
)
def test_other_replays_are_shown_as_they_were_made(tmp_path: Path, flags: dict[str, str], said: str) -> None:
    run, out = write_golden(tmp_path / "run"), tmp_path / "replay"
    given = [text for pair in flags.items() for text in pair]
    assert cli.main(["replay", str(run), "--out", str(out), "--no-figure", *given]) == 0
    page = page_of(run, tmp_path / "page.html", "--replay", out)
    assert said in page.root.first("p", class_="verdict").text
    command = shlex.split(page.sections()["curve"].first("p", class_="command").text)
    assert command[:3] == ["dsatrace", "replay", str(run)]
    assert dict(zip(command[3::2], command[4::2], strict=True)) == flags
    lru = json.loads((out / "replay.json").read_bytes())["overall"]["policies"]["lru"]
    shown = {row["size"]: row["lru missed"] for row in page.table("curve") if row["size"]}
    assert shown
    assert shown == {size: cell["miss_rate"] for size, cell in lru.items() if size in shown}


def test_a_finished_replay_is_taken_as_it_is(file: Path, replay: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "replay.json").write_text(json.dumps(replay))
    page_of(NEEDLE, tmp_path / "page.html", "--replay", tmp_path)
    assert (tmp_path / "page.html").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("change", ["another run", "another model", "no replay"])
def test_a_replay_of_another_run_is_refused(
    replay: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    record: Any = json.loads(json.dumps(replay))
    if change == "another run":
        requests = record["sums"]["requests"]
        requests["2k/other"] = requests.pop(next(iter(requests)))
    elif change == "another model":
        record["sums"]["header"]["model_config_digest"] = "0" * 16
    else:
        record = {}
    path = tmp_path / "replay.json"
    path.write_text(json.dumps(record))
    flags = ["--html", str(tmp_path / "page.html"), "--replay", str(path)]
    assert f"--replay {path}" in told_error(capsys, lambda: cli.main(["report", str(NEEDLE), *flags]))
    assert not (tmp_path / "page.html").exists()


def test_a_run_laid_out_for_replay_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_golden(tmp_path / "run")
    layout = tmp_path / "layout"
    assert cli.main(["export", str(run), "--to", "replay", "--out", str(layout)]) == 0
    flags = ["report", str(layout), "--html", str(tmp_path / "page.html")]
    assert "report on the run that it was made from" in told_error(capsys, lambda: cli.main(flags))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--replay", "replay"], "--replay"),
        (["--html", "page.html", "--json"], "--json"),
        (["--request", "r0"], "--request"),
        (["--html", "page.html", "--layer", "9"], "--layer 9"),
        (["--html", "page.html", "--request", "nobody"], "nobody"),
        (["--html", "page.html", "--no-figure"], "--no-figure"),
        (["--html", "nowhere/page.html"], "--html nowhere/page.html"),
    ],
)
def test_flags_without_meaning_are_named(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flags: list[str],
    named: str,
) -> None:
    run = write_golden(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert named in told_error(capsys, lambda: cli.main(["report", str(run), *flags]))


def test_the_page_asks_no_address(needle: Page) -> None:
    (policy,) = needle.root.all("meta", http_equiv="Content-Security-Policy")
    assert policy.attributes["content"] == POLICY
    assert "default-src 'none'" in POLICY
    ids = [one.attributes["id"] for one in needle.root.all() if "id" in one.attributes]
    assert len(set(ids)) == len(ids)
    found = needle.addresses()
    assert len(found) > 10  # the links to the sections
    assert [address for address in found if address.removeprefix("#") not in ids] == []


def test_what_would_ask_an_address_is_found() -> None:
    for html in (
        '<img src="https://example.org/a.png">',
        '<a href="//example.org">x</a>',
        "<style>p { background: url(https://example.org/a) }</style>",
        "<style>@import 'a.css';</style>",
        "<script>fetch('/a')</script>",
        "<script>import('./a.js')</script>",
        '<p style="background:url(a.png)">x</p>',
        "<script>open('http://example.org')</script>",
    ):
        assert Page(html).addresses(), html


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_kind(tmp_path / "run", "two heads")
    page_of(run, tmp_path / "a.html")
    page_of(run, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


RUNS: dict[str, Callable[[Path], object]] = {
    **{name: functools.partial(write_kind, name=name) for name in KINDS},
    "golden": write_golden,
    "blocks": functools.partial(write_golden, level="blocks"),
    "stats": functools.partial(write_golden, level="stats"),
    "one layer": functools.partial(write_golden, num_layers=1),
    "one request": functools.partial(write_golden, requests=REQUESTS[:1]),
    "one step": functools.partial(write_golden, requests=[GoldenRequest("r0", 40, 2)]),
    "dense": functools.partial(write_golden, requests=[GoldenRequest("r0", 3, 4)]),
    "no steps": serve_without_steps,
    "sampled": functools.partial(write_golden, sample_rate=0.5),
}
"""Runs of all kinds, most of which lack something."""


def page_of_kind(name: str, tmp_path: Path) -> Page:
    folder = tmp_path / "run"
    if name == "no steps":
        folder.mkdir()
    RUNS[name](folder)
    return page_of(folder, tmp_path / "page.html")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_any_kind_has_a_page(name: str, tmp_path: Path) -> None:
    page = page_of_kind(name, tmp_path)
    shown, left_out = page.sections(), page.left_out()
    titles = [title for _, of_reason in left_out for title in of_reason]
    assert len(shown) - ("left-out" in shown) + len(titles) == len(SECTIONS)
    assert all(len(why) > 10 for why, _ in left_out)
    for word in ("None", "nan", "inf ", "{", "}"):
        assert word not in page.root.first("main").first("section").text, word
    for section in shown.values():
        for table in section.all("table"):
            assert len({len(list(row.all("th"))) + len(list(row.all("td"))) for row in table.all("tr")}) == 1
    for svg in page.root.all("svg", role="img"):
        check_labels(page, svg)


EXPECTED = {
    "slots": ["an engine's slots"],
    "no steps": ["No step was recorded"],
    "dense": ["everything was selected"],
    "sampled": ["share of 0.5"],
    "stats": ["synthetic"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_warnings_stand_before_the_verdict(name: str, tmp_path: Path) -> None:
    page = page_of_kind(name, tmp_path)
    header = page.root.first("header")
    warnings = header.first("ul", class_="warnings")
    for text in EXPECTED[name]:
        assert text in warnings.text
    order = [part.attributes.get("class") for part in header.content if isinstance(part, Element)]
    assert order.index("warnings") < order.index("verdict")


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("manifest", "selections", "random_weights", "weights are random"),
        ("summary", "dropped_steps", 12, "12 steps were dropped"),
        ("manifest", "sparse_active", 0, "sparse attention was not active"),
    ],
)
def test_what_forbids_belief_is_said(tmp_path: Path, section: str, key: str, value: Any, said: str) -> None:
    run = write_kind(tmp_path / "run", "entry")
    path = run / f"{section}.json"
    record = json.loads(path.read_bytes())
    (record["selection"] if key == "sparse_active" else record)[key] = value
    path.write_text(json.dumps(record))
    if key == "selections":
        summary = json.loads((run / "summary.json").read_bytes())
        (run / "summary.json").write_text(json.dumps(summary | {key: value}))
    header = Page(page_html(Material.of(RunReader(run), "not replayed"))).root.first("header")
    assert said in header.first("ul", class_="warnings").text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'&]]>--><img src=x onerror=alert(1)>\x1b[31m\u202e"
    folder = write_kind(tmp_path / "a<b>&\"'", "entry")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest |= {"data_source": hostile, "tokenizer": hostile, "argv": [hostile], "device": hostile}
    manifest["model_config"] = {"name": hostile}
    path.write_text(json.dumps(manifest))
    page = page_of(folder, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert len(list(page.root.all("script"))) == 1
    assert not list(page.root.all("img"))
    assert not [one for one in page.root.all() if any(name.startswith("on") for name in one.attributes)]
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert "<script>alert(1)" in page.root.first("p", class_="verdict").text  # as a text
    assert "a<b>&\"'" in page.root.first("h1").text


def large_replay(record: dict[str, Any], num_layers: int, num_steps: int) -> dict[str, Any]:
    """The figures of a replay of many layers and steps, of random numbers."""
    rng = np.random.default_rng(0)
    large = {key: value for key, value in record.items() if key != "sums"}
    sizes = record["settings"]["sizes"]
    layers = []
    for layer in range(num_layers):
        like = json.loads(json.dumps(record["layers"][layer % len(record["layers"])]))
        like["name"] = f"{layer}"
        like["missed_by_step"] = dict.fromkeys(sizes, (rng.random(num_steps) * 2048).tolist())
        layers.append(like)
    share = rng.random((num_layers, num_layers)).tolist()
    grid = sorted(set(np.geomspace(2048, 1 << 20, 800).astype(int).tolist()))
    curve = {"sizes": grid, "miss_rate": np.linspace(1, 0.1, len(grid)).tolist()}
    suggested = [
        {"least_recall": 0.5, "pattern": "FS" * (num_layers // 2), "full_layers": 1, "recall_of_shared": 1}
    ]
    large["layers"] = layers
    large["overall"] = record["overall"] | {"curves": dict.fromkeys(record["overall"]["curves"], curve)}
    large["layer_overlap"] = [
        {"layers": list(range(num_layers)), "recall": share, "chance": share, "suggested": suggested}
    ]
    return large


def test_a_large_run_has_a_small_page(replay: dict[str, Any], tmp_path: Path) -> None:
    large = large_replay(replay, 78, 20_000)
    write_page(page_html(Material.of(RunReader(NEEDLE), large)), tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < MAX_BYTES / 2
    page = Page.read(tmp_path / "page.html")
    values, facts = page.heat_map("by-step")
    assert values.shape[0] == 78
    assert facts["columnsPerCell"] > 1
    said = page.sections()["by-step"].first("figcaption").text
    assert f"the largest of {facts['columnsPerCell']} columns" in said
    by = facts["columnsPerCell"]
    first = large["layers"][0]["missed_by_step"]["2k"][:by]
    assert abs(values[0, 0] - max(first)) <= facts["high"] / facts["levels"] / 2 + 1e-9
    for svg in page.root.all("svg", role="img"):
        check_labels(page, svg)


def check_labels(page: Page, svg: Element) -> None:
    """No label of a drawing lies over another one, or beyond the edge."""
    _, _, width, height = map(float, f"{svg.attributes['viewbox']}".split())
    boxes = page.text_boxes(svg)
    assert boxes
    for i, (left, top, right, bottom, text) in enumerate(boxes):
        assert left >= -0.5, text
        assert right <= width + 0.5, text
        assert top >= -1, text
        assert bottom <= height, text
        for other in boxes[i + 1 :]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, f"{text} lies over {other[4]}"


def test_every_figure_is_told_in_words_and_numbers(needle: Page) -> None:
    for key, section in needle.sections().items():
        for svg in section.all("svg", role="img"):
            assert svg.attributes["aria-label"]
            assert svg.first("title").text
            assert len(svg.first("desc").text) > 20
            labels = [text.text for text in svg.all("text", class_="title")]
            has_axes = any(svg.all("path", class_="axis"))
            assert len(labels) >= 2 * has_axes, f"{key}: an axis has no title"
            check_labels(needle, svg)
        if key not in ("made", "left-out"):
            assert needle.table(key), key
            assert section.first("button", class_="copy").attributes["data-table"] == f"{key}-table"
            assert section.first("p", class_="command").text.startswith("dsatrace ")
            assert section.first("p", class_="note").text


def test_the_docs_name_every_section(needle: Page) -> None:
    docs = (ROOT / "docs" / "page.md").read_text()
    shown = [section.first("h2").text for key, section in needle.sections().items() if key != "left-out"]
    titles = [*shown, *(title for _, of_reason in needle.left_out() for title in of_reason)]
    assert len(titles) == len(SECTIONS)
    assert [title for title in titles if title not in docs] == []


def test_lines_of_a_chart_differ_without_colour(needle: Page) -> None:
    assert len(set(DASHES)) == len(DASHES)
    assert len(set(MARKERS)) == len(MARKERS)
    keys = needle.sections()["curve"].first("ul", class_="legend").all("svg")
    drawn = [tuple(sorted(f"{path.attributes}" for path in key.all("path"))) for key in keys]
    assert len(drawn) >= 6
    assert len(set(drawn)) == len(drawn)


def test_axes_of_shares_end_at_the_whole(needle: Page) -> None:
    for key in ("curve", "reuse", "stays"):
        labels = [text.text for text in needle.sections()[key].first("svg", role="img").all("text")]
        assert "100%" in labels
        assert not [label for label in labels if label.endswith("%") and float(label[:-1]) > 100]
