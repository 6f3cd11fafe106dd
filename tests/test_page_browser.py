"""The page as a reader has it: opened from disk in Chromium, at two widths, light and dark, with and without
JavaScript, by hostile names too.

What it shows is read back from the screen (texts, places of bars and points, pixels of a map) and held
against `replay.json` and `summary.json`.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from dsatrace.cli import main
from helpers.golden_run import REQUESTS, SERVING, write_golden
from helpers.page import SMALL_SWEEP
from helpers.tier_samples import SETUPS

RUN = ROOT / "data" / "traces" / "needle-2k" / "2k"
HOSTILE = "<img src=x onerror=window.hacked=1>"
WIDTHS = (1280, 400)
OPEN = "((is_open) => document.querySelectorAll('details').forEach((one) => { one.open = is_open }))"
READY = "document.querySelectorAll('canvas.heat:not(.ready)').length === 0"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page of a real run and the figures it was made of: (page, replay.json, summary.json)."""
    folder = tmp_path_factory.mktemp("page")
    replay = ["--policy", "lru,fifo,opt", "--sizes", "1k,1.5k,2k,4k", "--no-figure"]
    assert main(["replay", str(RUN), "--out", str(folder / "replay"), *replay]) == 0
    page = folder / "page.html"
    assert main(["report", str(RUN), "--html", str(page), "--replay", str(folder / "replay")]) == 0
    records = (folder / "replay" / "replay.json", RUN / "summary.json")
    return page, *(json.loads(path.read_text()) for path in records)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The page of a run whose every name is a piece of HTML."""
    requests = [one._replace(request_id=f"{HOSTILE}{one.request_id}") for one in REQUESTS]
    folder = tmp_path_factory.mktemp("hostile") / HOSTILE
    write_golden(folder, requests, serving=SERVING, tiers=SETUPS["block"])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model_config"]["name"] = HOSTILE
    manifest |= {"argv": [HOSTILE], "data_source": f"</script>{HOSTILE}", "tokenizer": HOSTILE}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    page = folder.parent / "page.html"
    assert main(["report", str(folder), "--html", str(page)]) == 0
    return page


@pytest.fixture(scope="module")
def compared(hostile):
    """The page that sets the hostile run beside another of its kind."""
    other = write_golden(hostile.parent / "other", serving=SERVING, tiers=SETUPS["block"], seed=1)
    page = hostile.parent / "two.html"
    assert main(["report", str(hostile.parent / HOSTILE), str(other), "--html", str(page)]) == 0
    return page


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """The page of a study of eviction policies."""
    folder = tmp_path_factory.mktemp("study") / "sweep"
    assert main(["study", "sweep", "--output-dir", str(folder), *SMALL_SWEEP]) == 0
    page = folder.parent / "page.html"
    assert main(["report", str(folder), "--html", str(page), "--bytes-per-token", "40016"]) == 0
    return page


@pytest.fixture(scope="module")
def pages(made, hostile, compared, studied):
    return {"real": made[0], "hostile": hostile, "compared": compared, "study": studied}


@pytest.fixture
def page(browser, made):
    with browser.open(made[0]) as opened:
        opened.wait(READY)
        yield opened


@pytest.fixture(scope="module")
def still(browser, made):
    """The same, open once for all who only read it."""
    with browser.open(made[0]) as opened:
        opened.wait(READY)
        yield opened


@pytest.fixture(scope="module", params=[False, True])
def shaded(browser, made, still, request):
    """Whether it is dark, and the page loaded so, for those who only read it."""
    if not request.param:
        yield False, still
        return
    with browser.open(made[0], dark=True) as opened:
        opened.wait(READY)
        yield True, opened


@pytest.mark.parametrize("name", ["real", "hostile", "compared", "study"])
@pytest.mark.parametrize("javascript", [True, False])
def test_no_error_and_no_request_but_the_file(browser, pages, name, javascript):
    with browser.open(pages[name], javascript=javascript) as page:
        page.value("window.scrollTo(0, document.documentElement.scrollHeight)")
        if javascript:
            page.wait(READY)
            page.value("document.querySelectorAll('button, summary').forEach((one) => one.click())")
        assert page.errors == []
        assert page.requests == [pages[name].as_uri()]
        assert page.value("document.title")


def test_the_same_run_gives_the_same_bytes_and_says_what_they_say(still, made, tmp_path, capsys):
    again = tmp_path / "page.html"
    assert main(["report", str(RUN), "--html", str(again), "--replay", str(made[0].parent / "replay")]) == 0
    assert again.read_bytes() == made[0].read_bytes()
    assert again.stat().st_size < 2_000_000
    first = ".warnings li, .verdict, [aria-labelledby=curve-title] .answer"
    shown = still.value(f"[...document.querySelectorAll('{first}')].map((one) => one.textContent.trim())")
    said = capsys.readouterr().out.replace("`", "")  # which mark commands, shown as code on the page
    assert said.splitlines() == [*shown, f"page: {again}"]


@pytest.mark.parametrize("name", ["hostile", "compared"])
def test_hostile_names_are_text(browser, pages, name):
    with browser.open(pages[name]) as page:
        page.wait(READY)
        assert page.value("window.hacked === undefined && document.images.length === 0")
        text = page.value("document.body.innerText")
        assert text.count(HOSTILE) >= 3  # folder, model, data
        assert page.value("document.title").startswith(HOSTILE)


# What is read back

TABLE = """((id) => {
    const table = document.getElementById(id);
    return [...table.rows].map((row) => [...row.cells].map((cell) => cell.dataset.value ?? cell.textContent));
})"""


def table_of(page: Any, key: str) -> dict[str, list[Any]]:
    """The columns of a section's table by name: numbers, or texts."""
    head, *rows = page.value(f"{TABLE}({json.dumps(f'{key}-table')})")
    return {name: [number_in(row[i]) for row in rows] for i, name in enumerate(head)}


def number_in(text: str) -> float | str | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text


def test_shown_numbers_are_the_whole_ones(still):
    """A number on the page is its whole value, rounded as it is shown."""
    cells = still.value(
        "[...document.querySelectorAll('[data-value], data')].map((one) => [one.textContent, "
        "one.dataset.value ?? one.value])"
    )
    assert len(cells) > 500
    num_checked = 0
    for shown, whole in cells:
        match = re.fullmatch(r"[^\d-]*(-?[\d,]+(?:\.(\d+))?)\s*(%|[kMGT]i?B|[kMGT]\b)?.*", shown, re.DOTALL)
        if not whole or match is None:
            assert not whole or not any(map(str.isdigit, shown)), (shown, whole)
            continue
        try:
            value = float(whole)
        except ValueError:
            continue
        unit = {None: 1.0, "%": 0.01}.get(match[3]) or _unit(match[3])
        last = 10.0 ** -len(match[2] or "") * unit
        assert abs(float(match[1].replace(",", "")) * unit - value) <= last * 0.5001, (shown, whole)
        num_checked += 1
    assert num_checked > 500


def _unit(name: str) -> float:
    base = 1024.0 if "i" in name else 1000.0
    return base ** ("kMGT".index(name[0]) + 1)


def test_the_tables_are_the_replays(still, made):
    _, replay, _ = made
    overall, layers = replay["overall"]["policies"], replay["layers"]
    curve = table_of(still, "curve")
    for size, cell in overall["lru"].items():
        at = curve["size"].index(size)
        assert curve["buffer, ids"][at] == cell["ids"]
        for policy in ("lru", "fifo", "opt"):
            assert curve[f"{policy} missed"][at] == overall[policy][size]["miss_rate"] > 0
        assert [curve["lru, 95% from"][at], curve["to"][at]] == cell["interval"]
    size = replay["chosen"]["size"]
    missed = [layer["policies"]["lru"][size]["misses_per_step"] for layer in layers]
    by_layer = table_of(still, "by-layer")
    for name in ("mean", "p50", "p95", "p99"):
        assert by_layer[name] == [one[name] for one in missed]


def test_the_verdict_is_the_replays(still, made):
    _, replay, summary = made
    size = replay["chosen"]["size"]
    rates = [replay["overall"]["policies"][name][size]["miss_rate"] for name in ("lru", "opt")]
    said = still.value("[...document.querySelectorAll('.verdict data')].map((one) => Number(one.value))")
    for number in (*rates, summary["counts"]["steps"], summary["counts"]["requests"]):
        assert number in said


DRAWN = """((key) => {
    const svg = document.querySelector(`#${key}-title`).closest("section").querySelector("svg[role=img]");
    const place = (one) => { const box = one.getBoundingClientRect();
        return {x: box.x + box.width / 2, y: box.y + box.height / 2, top: box.y}; };
    return {
        ticks: [...svg.querySelectorAll("path.grid")].map((one) =>
            [place(one).y, one.nextElementSibling.textContent]),
        bars: [...svg.querySelectorAll("rect.bar")].map(place),
        markers: Object.fromEntries([...svg.querySelectorAll("g[class^=s]")].map((group) =>
            [group.getAttribute("class"), [...group.querySelectorAll(".marker")].map(place)])),
    };
})"""


def drawn(page: Any, key: str) -> tuple[dict[str, Any], Any, float]:
    """A section's chart, a function from a height on the screen to the axis' value, and a pixel's worth."""
    found = page.value(f"{DRAWN}({json.dumps(key)})")
    heights = np.array([height for height, _ in found["ticks"]])
    values = np.array([_tick(text) for _, text in found["ticks"]])
    slope, at_top = np.polyfit(heights, values, 1)
    assert np.abs(slope * heights + at_top - values).max() < abs(slope)
    return found, lambda height: slope * height + at_top, abs(slope)


def _tick(text: str) -> float:
    number, _, unit = text.partition(" ")
    scale = 0.01 if number.endswith("%") else {"": 1.0, "M": 1e6, "G": 1e9}[unit]
    return float(number.strip("%").replace(",", "")) * scale


def test_bars_are_as_high_as_their_numbers(still, made):
    _, replay, _ = made
    size = replay["chosen"]["size"]
    means = [layer["policies"]["lru"][size]["misses_per_step"]["mean"] for layer in replay["layers"]]
    chart, value, pixel = drawn(still, "by-layer")
    assert [value(bar["top"]) for bar in chart["bars"]] == pytest.approx(means, abs=2 * pixel)
    assert max(means) > 20 * pixel  # else the bars could have any height


def test_points_lie_where_their_numbers_are(still, made):
    _, replay, _ = made
    chart, value, pixel = drawn(still, "curve")
    for style, policy in (("s1", "opt"), ("s2", "fifo")):
        rates = [cell["miss_rate"] for cell in replay["overall"]["policies"][policy].values()]
        assert [value(one["y"]) for one in chart["markers"][style]] == pytest.approx(rates, abs=2 * pixel)
        assert max(rates) - min(rates) > 20 * pixel


def test_pixels_are_the_tables_numbers(shaded):
    _, page = shaded
    columns = table_of(page, "by-step")
    del columns["layer"]
    values = np.array(list(columns.values()), float).T  # layers by steps
    pixels = page.pixels("section[aria-labelledby=by-step-title] canvas.heat")
    stops = page.value(
        "Array.from({length: 8}, (_, i) => getComputedStyle(document.documentElement)"
        ".getPropertyValue(`--r${i}`).trim())"
    )
    ramp = np.array([[int(stop[at : at + 2], 16) for at in (1, 3, 5)] for stop in stops], float)
    places = values / np.nanmax(values) * 7
    expected = np.stack([np.interp(places, np.arange(8), ramp[:, channel]) for channel in range(3)], -1)
    assert pixels.shape[:2] == values.shape
    assert np.all(pixels[..., 3] == 255)
    # A level is 1/254 of the ramp, a stop a seventh: so much may lie between the number and its level.
    step = np.abs(np.diff(ramp, axis=0)).max() * 7 / 254 / 2 + 1
    assert np.abs(pixels[..., :3] - expected).max() <= step
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 20


# How it looks

OVERLAPS = """(() => {
    const said = [];
    const boxes = (list) => list.map((one) => [one, one.getBoundingClientRect()])
        .filter(([, box]) => box.width > 0 && box.height > 0);
    const meet = (a, b, slack) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > slack
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > slack;
    const name = (one) => `${one.tagName} ${(one.textContent || one.className).trim().slice(0, 40)}`;
    for (const svg of document.querySelectorAll("svg[role=img]")) {
        const texts = boxes([...svg.querySelectorAll("text")]), whole = svg.getBoundingClientRect();
        texts.forEach(([one, a], i) => {
            if (a.left < whole.left - 1 || a.right > whole.right + 1 || a.top < whole.top - 1
                || a.bottom > whole.bottom + 1) said.push(`cut off: ${name(one)}`);
            texts.slice(i + 1).forEach(([other, b]) => {
                if (meet(a, b, a.height / 8)) said.push(`text on text: ${name(one)} | ${name(other)}`);
            });
        });
    }
    for (const parent of document.querySelectorAll("body, main, header, section, figure, details, dl, ul")) {
        const blocks = boxes([...parent.children].filter((one) => {
            const style = getComputedStyle(one);
            return !["inline", "none", "contents"].includes(style.display) && style.position === "static";
        }));
        blocks.forEach(([one, a], i) => blocks.slice(i + 1).forEach(([other, b]) => {
            if (meet(a, b, 1)) said.push(`block on block: ${name(one)} | ${name(other)}`);
        }));
    }
    for (const one of document.querySelectorAll("body *")) {
        if (one.closest(".scroll, svg, canvas, button, summary")) continue;
        if (getComputedStyle(one).display !== "inline" && one.clientWidth
            && one.scrollWidth > one.clientWidth + 1) said.push(`wider than its box: ${name(one)}`);
    }
    return said;
})()"""
CONTRASTS = """(() => {
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
        .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const ground = (one) => {
        for (; one; one = one.parentElement) {
            const colour = parse(getComputedStyle(one).backgroundColor);
            if (colour.length < 4 || colour[3] > 0) return colour;
        }
        return matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
    };
    const found = [];
    for (const one of document.querySelectorAll("svg[role=img] :is(.marker, .line, .bar, .whisker)")) {
        const style = getComputedStyle(one), behind = light(ground(one));
        const inks = [style.fill, style.stroke].filter((ink) => ink !== "none");
        const most = Math.max(...inks.map((ink) => ratio(light(parse(ink)), behind)));
        const classes = [one.parentElement, one].map((each) => each.getAttribute("class"));
        found.push([most * 1.5, `drawn ${classes.join(" ")}`]);
    }
    for (const one of document.querySelectorAll("body *")) {
        if (!one.checkVisibility() || one.closest("svg[aria-hidden]") || one.matches("text.cell")) continue;
        if (![...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
        const style = getComputedStyle(one);
        const ink = parse(one instanceof SVGElement ? style.fill : style.color);
        const name = `${one.tagName} ${one.textContent.trim().slice(0, 40)}`;
        found.push([ratio(light(ink), light(ground(one))), name]);
    }
    return found;
})()"""


@pytest.mark.parametrize("name", ["real", "hostile", "compared", "study"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_the_screen(browser, pages, name, width):
    with browser.open(pages[name], width=width) as page:
        page.wait(READY)
        for dark, opened in itertools.product((False, True), (False, True)):
            page.darken(dark)
            assert page.value("matchMedia('(prefers-color-scheme: dark)').matches") == dark
            page.value(f"{OPEN}({json.dumps(opened)})")
            assert page.value("document.documentElement.scrollWidth") <= width
            assert page.value(OVERLAPS) == []


HIDDEN = """[...document.querySelectorAll(".lying .scroll")].map((frame) => [
    frame.scrollWidth - frame.clientWidth,
    Math.max(...[...frame.querySelectorAll("text")].map((one) => one.getBoundingClientRect().right))
        - frame.getBoundingClientRect().right,
    Math.min(...[...frame.querySelectorAll("text")].map((one) => one.getBoundingClientRect().height)),
])"""


@pytest.mark.parametrize("width", WIDTHS)
def test_numbers_behind_lying_bars_are_in_sight(browser, pages, width):
    """Without scrolling, in letters that can be read."""
    for name, least in (("hostile", 3), ("compared", 0)):
        with browser.open(pages[name], width=width) as page:
            frames = page.value(HIDDEN)
            assert len(frames) >= least
            for scrolls, beyond, tall in frames:
                assert scrolls <= 0 and beyond <= 0 and tall >= 11
            if least:
                page.value("document.querySelector('.lying .scroll > svg').style.minWidth = '2000px'")
                assert page.value(HIDDEN)[0][0] > 0  # the check finds a drawing that is too wide


ALIGNED = """[...document.querySelectorAll("table")].flatMap((table) =>
    [...(table.tHead?.rows[0].cells ?? [])].flatMap((head, i) => {
        const cells = [...table.tBodies[0].rows].map((row) => row.cells[i]).filter((one) => one);
        const sides = new Set(cells.map((one) => getComputedStyle(one).textAlign));
        return sides.size === 1 ? [[getComputedStyle(head).textAlign, ...sides]] : [];
    }))"""


@pytest.mark.parametrize("name", ["real", "study"])
def test_a_columns_name_stands_over_its_numbers(browser, pages, name):
    with browser.open(pages[name]) as page:
        page.value(f"{OPEN}(true)")
        found = page.value(ALIGNED)
        assert len(found) > 10 and {tuple(one) for one in found} == {("left", "left"), ("right", "right")}


def test_texts_lines_and_points_stand_out(shaded):
    """By WCAG's AA: 4.5 to 1, what is drawn 3 to 1."""
    dark, page = shaded
    found = page.value(CONTRASTS)
    assert sum(name.startswith("drawn") for _, name in found) > 50 and len(found) > 200
    assert [one for one in found if one[0] < 4.5] == []
    ground = page.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 150) == dark


def test_the_checks_of_looks_find_what_is_wrong(page):
    """Each spoils the page in one way, which must be told."""
    assert page.value(OVERLAPS) == []
    spoil = {
        "text on text": "const t = document.querySelector('svg[role=img] text'); t.after(t.cloneNode(true))",
        "cut off": "document.querySelector('svg[role=img] text').setAttribute('x', -300)",
        "block on block": "document.querySelector('section').style.marginTop = '-200px'",
        "wider than its box": "document.querySelector('h2').style = 'width: 30px; overflow-wrap: normal'",
    }
    for said, change in spoil.items():
        page.value(f"(() => {{ {change} }})()")
        assert any(one.startswith(said) for one in page.value(OVERLAPS)), said
    page.value(
        "document.querySelector('.note').style.color = getComputedStyle(document.body).backgroundColor"
    )
    assert min(page.value(CONTRASTS))[0] < 1.1


def test_without_javascript_all_but_the_controls_remain(browser, made):
    def num_shown(page: Any, css: str) -> int:
        return page.value(
            f"[...document.querySelectorAll({json.dumps(css)})].filter((one) => one.checkVisibility("
            "{visibilityProperty: true}) && one.getBoundingClientRect().height > 15).length"
        )

    remain, leave = ("section", "svg[role=img]", ".verdict", "details"), ("button", "canvas", "input")
    with browser.open(made[0]) as page:
        page.wait(READY)
        page.value(f"{OPEN}(true)")
        scripted = {css: num_shown(page, css) for css in (*remain, *leave)}
        text = page.value("document.querySelector('.verdict').innerText")
    with browser.open(made[0], javascript=False) as page:
        assert page.value("document.querySelector('.verdict').innerText") == text
        # A closed table opens by itself, with the keyboard.
        table = "document.querySelector('#curve-table')"
        assert not page.value(f"{table}.checkVisibility()")
        page.value(f"{table}.closest('details').querySelector('summary').focus()")
        page.press("Enter")
        assert page.value(f"{table}.checkVisibility()")
        page.value(f"{OPEN}(true)")
        assert {css: num_shown(page, css) for css in remain} == {css: scripted[css] for css in remain}
        assert {num_shown(page, css) for css in leave} == {0} and all(scripted[css] for css in leave)
        # Where the script would have filled a map, a coarse drawing of it stands.
        assert page.value("document.querySelectorAll('.preview path').length") > 3


def test_the_keyboard_reaches_everything(page):
    """Tab goes through all that can be used, in the order of the page; what has the focus shows it."""
    usable = (
        "[...document.querySelectorAll('a[href], button, summary, input, select, [tabindex]')]"
        ".filter((one) => one.checkVisibility() && !one.disabled)"
    )
    page.value(f"window.usable = {usable}; document.activeElement.blur()")
    reached = []
    for _ in range(page.value("usable.length")):
        page.press("Tab")
        reached.append(page.value("usable.indexOf(document.activeElement)"))
        assert page.value("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert reached == list(range(len(reached))) and len(reached) > 20


def test_a_link_leads_to_each_section(still):
    links = still.value("[...document.querySelectorAll('a[href]')].map((one) => one.getAttribute('href'))")
    assert links and all(link.startswith("#") for link in links)
    ids = still.value("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(set(ids)) == len(ids)
    assert {link[1:] for link in links} <= set(ids)


def test_a_table_is_copied_whole(page, made):
    """As CSV, with numbers in full."""
    page.value("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.value("document.querySelector('button[data-table=by-layer-table]').click()")
    page.wait("window.copied")
    head, *rows = page.value("window.copied").splitlines()
    assert head.split(",")[:1] == ["layer"] and len(rows) == len(made[1]["layers"])
    size = made[1]["chosen"]["size"]
    mean = made[1]["layers"][0]["policies"]["lru"][size]["misses_per_step"]["mean"]
    assert f"{mean}" in rows[0]


def test_the_pointer_reads_a_map_out(page):
    """A cell's row, column and value, which are the table's."""
    columns = table_of(page, "by-step")
    canvas = "document.querySelector('section[aria-labelledby=by-step-title] canvas.heat')"
    page.value(f"{canvas}.scrollIntoView()")
    box = page.value(f"{canvas}.getBoundingClientRect().toJSON()")
    (_, *steps), layers = columns, columns["layer"]
    at = {"x": box["x"] + box["width"] * 4.5 / len(steps), "y": box["y"] + box["height"] * 2.5 / len(layers)}
    page.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
    said = page.value(f"{canvas}.closest('figure').querySelector('.readout').textContent")
    found = re.fullmatch(r"layer (\S+), decode step (\d+): missed tokens per step ([\d.,]+)", said)
    assert found, said
    assert (found[1], found[2]) == (f"{layers[2]:g}", steps[4])
    level = max(max(columns[step]) for step in steps) / 254
    assert float(found[3]) == pytest.approx(columns[steps[4]][2], abs=level)


def test_on_paper_all_is_open(browser, made):
    with browser.open(made[0], media="print") as page:
        page.wait(READY)
        page.value("window.dispatchEvent(new Event('beforeprint'))")
        assert page.value("[...document.querySelectorAll('details')].every((one) => one.open)")
        for css in ("nav", "button.copy"):
            assert not page.value(f"document.querySelector({json.dumps(css)}).checkVisibility()")


def test_every_picture_has_words(still):
    """Each chart a name and a description, each table a caption, each control a name."""
    charts = still.value(
        "[...document.querySelectorAll('svg[role=img]')].map((one) => "
        "['title', 'desc'].map((name) => one.querySelector(name).textContent))"
    )
    assert len(charts) >= 6 and all(name and len(words) > 20 for name, words in charts)
    assert still.value("[...document.querySelectorAll('table')].every((one) => one.caption.textContent)")
    nodes = still.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "slider", "spinbutton", "combobox", "link", "region")
    controls = [node for node in nodes if node.get("role", {}).get("value") in roles]
    assert len(controls) > 20
    assert [node["role"]["value"] for node in controls if not node.get("name", {}).get("value")] == []
