"""The page in a browser: the script's figures are Python's, and its sliders change what they say."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from conftest import ROOT
from dsatrace import cli
from dsatrace.kv.stores.simulated import UNKNOWN
from dsatrace.report.page.material import Material
from dsatrace.report.page.page import page_html
from dsatrace.selection_replay.cost import LINKS, Cost
from dsatrace.trace.reader import RunReader
from helpers.page import Page

NEEDLE = ROOT / "data/traces/needle-2k/2k"


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    out = tmp_path_factory.mktemp("sliders") / "out"
    flags = ["--policy", "lru", "--sizes", "1k,2k", "--no-figure"]
    assert cli.main(["replay", str(NEEDLE), "--out", str(out), *flags]) == 0
    return json.loads((out / "replay.json").read_text())


@pytest.fixture(scope="module")
def page_file(replayed, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(page_html(Material.of(RunReader(NEEDLE), replayed)))
    return file


@pytest.fixture
def page(browser, page_file):
    with browser.open(page_file) as opened:
        opened.call(
            "Emulation.setFocusEmulationEnabled", enabled=True
        )  # keys go to it, whatever lies in front
        opened.wait("document.querySelectorAll('canvas.heat:not(.ready)').length === 0")
        yield opened
        assert opened.errors == []
        assert opened.requests == [page_file.as_uri()]


def table_of(page, name):
    """The cells' values as numbers, None for none."""
    return page.value(
        f"[...document.getElementById('{name}').tBodies[0].rows].map((row) => "
        "[...row.cells].map((cell) => cell.dataset.value === '' ? null : Number(cell.dataset.value)))"
    )


def tables_of(cost, hbm_bytes):
    """What both tables must hold."""
    record = cost.to_json(hbm_bytes)
    keys = ("context", "most_requests", "most_requests_offloaded", "tokens_per_s", "tokens_per_s_offloaded",
            "pays_from_batch")  # fmt: skip
    return (
        [
            [row["batch"], row["whole_ms"], row["overlapped_ms"], row["serial_ms"]]
            for row in record["by_batch"]
        ],
        [[row[key] for key in keys] for row in record["by_context"]],
    )


def assert_tables(page, expected):
    for name, rows in zip(("cost-batches", "cost-contexts"), expected, strict=True):
        assert table_of(page, name) == rows


def enter(page, selector, value, event="change"):
    """Sets an input's value, as a reader would."""
    page.value(
        f"(() => {{ const one = document.querySelector('{selector}'); one.value = '{value}'; "
        f"one.dispatchEvent(new Event('{event}')); }})()"
    )


def number_of(key):
    return f"input[type=number][data-key={key}]"


def test_the_scripts_figures_are_pythons_as_the_page_opens(page, page_file, replayed):
    before = Page.read(page_file)
    expected = tables_of(*Cost.stored(replayed))
    assert_tables(page, expected)
    for name, rows in zip(("cost-batches", "cost-contexts"), expected, strict=True):
        assert before.rows(name) == rows
    said = page.value("document.querySelector('[data-cost=said]').textContent")
    assert said in before.root.text
    shown = page.value("[...document.querySelectorAll('#cost-batches td')].map((cell) => cell.textContent)")
    assert shown[:4] == shown_cells(page_file, "cost-batches")[:4]


def shown_cells(page_file, name):
    """The texts of a table's cells in the HTML."""
    table = page_file.read_text().partition(f'<table id="{name}">')[2].partition("</table>")[0]
    return [part.partition(">")[2].partition("<")[0] for part in table.split("<td")[1:]]


@pytest.mark.parametrize(
    ("changes", "link", "compute", "hbm"),
    [
        ({"bandwidth": 3}, {"read_gb_per_s": 3}, {}, 40),
        ({"alpha": 12.5, "op": 0.75}, {"alpha_batch_us": 12.5, "alpha_op_us": 0.75}, {}, 40),
        ({"base": 7, "perRequest": 0.25, "hbm": 0.02}, {}, {"base": 7.0, "per_request": 0.25}, 0.02),
    ],
)
def test_the_sliders_compute_as_python_does(page, replayed, changes, link, compute, hbm):
    for key, value in changes.items():
        enter(page, number_of(key), value)
    cost, _ = Cost.stored(replayed)
    figures = {name: dataclasses.replace(UNKNOWN, value=float(value)) for name, value in link.items()}
    changed = dataclasses.replace(
        cost,
        link=dataclasses.replace(cost.link, **figures),
        compute=cost.compute._replace(**compute),
    )
    assert changed != cost
    assert_tables(page, tables_of(changed, hbm * 2**30))


def test_a_slider_moves_its_number_the_tables_and_the_curves(page):
    def seen():
        lines = "document.querySelectorAll('[data-cost=chart] svg[role=img] path.line')"
        curves = page.value(f"[...{lines}].map((one) => one.getAttribute('d'))")
        return curves, table_of(page, "cost-batches")

    curves, table = seen()
    enter(page, "input[type=range][data-key=bandwidth]", 0, "input")
    assert page.value(f"document.querySelector('{number_of('bandwidth')}').value") == "0.5"
    slower_curves, slower = seen()
    assert len(slower_curves) == 3
    assert slower_curves != curves
    for before, after in zip(table, slower, strict=True):
        assert after[1] == before[1]  # what lies in HBM needs no link
        assert after[3] > before[3]
    page.value("document.querySelector('.controls .reset').click()")
    assert table_of(page, "cost-batches") == table


def test_a_link_sets_its_three_figures(page, replayed):
    enter(page, "#cost-link", "pcie5-x16")
    cost, hbm = Cost.stored(replayed)
    assert_tables(page, tables_of(dataclasses.replace(cost, link=LINKS["pcie5-x16"]), hbm))


def test_what_is_no_number_goes_back(page):
    before = table_of(page, "cost-batches")
    enter(page, number_of("bandwidth"), "")
    assert table_of(page, "cost-batches") == before


def test_the_pixels_of_a_map_are_its_cells(page, page_file):
    """Each pixel is the mean of its cells: the more are selected, the darker; blank where none is visible."""
    page.value("document.querySelectorAll('#positions canvas').forEach((one, i) => one.id = `map${i}`)")
    for i, (values, _) in enumerate(Page.read(page_file).heat_maps("positions")):
        pixels = page.pixels(f"#map{i}")
        rows, columns = values.shape
        assert pixels.shape[0] == rows
        assert pixels.shape[1] == page.value(f"document.getElementById('map{i}').clientWidth") < columns
        at = np.arange(columns) * pixels.shape[1] // columns
        edges = np.searchsorted(at, np.arange(pixels.shape[1]))
        known = np.add.reduceat(np.isfinite(values), edges, axis=1, dtype=int)
        sums = np.add.reduceat(np.nan_to_num(values), edges, axis=1)
        np.testing.assert_array_equal(pixels[..., 3] > 0, known > 0)
        shares = sums[known > 0] / known[known > 0]
        light = pixels[known > 0][:, :3].sum(axis=1, dtype=int)
        _, level = np.unique(shares, return_inverse=True)
        by_level = [np.unique(light[level == one]) for one in range(level.max() + 1)]
        assert all(len(found) == 1 for found in by_level)
        assert np.all(np.diff(np.concatenate(by_level)) < 0)


def test_a_map_reads_out_by_keyboard(page):
    page.value("document.querySelector('#positions canvas').focus()")
    readout = "document.querySelector('#positions .readout').textContent"
    assert page.value(readout).startswith("decode step 0, position (tokens) 0: selected ")
    page.press("ArrowDown")
    page.press("ArrowRight", modifiers=8)
    assert page.value(readout).startswith("decode step 1, position (tokens) 10: selected ")
    page.press("Home")
    assert page.value(readout).startswith("decode step 1, position (tokens) 0: selected ")


def test_controls_take_the_keyboard_and_fit_a_narrow_screen(page):
    page.value("document.querySelector('input[type=range][data-key=hbm]').focus()")
    before = table_of(page, "cost-contexts")
    page.press("ArrowRight")
    assert table_of(page, "cost-contexts") != before
    page.resize(400)
    assert page.value("document.documentElement.scrollWidth") <= 400


def test_without_javascript_there_are_no_controls_but_all_figures(browser, page_file):
    with browser.open(page_file, javascript=False) as page:
        assert page.errors == []
        assert page.value("getComputedStyle(document.querySelector('.controls')).display") == "none"
        assert table_of(page, "cost-contexts") == Page.read(page_file).rows("cost-contexts")
