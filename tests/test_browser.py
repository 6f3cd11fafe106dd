"""The tests' own browser: it tells what a page did, and leaves no process behind.

What it cannot see, the page's tests cannot see either, so each fault here is one that must be told.
"""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from helpers.browser import Browser, BrowserError, find_browser

PAGE = """<!doctype html><meta charset="utf-8"><title>a page</title>
<style>@media (prefers-color-scheme: dark) { body { background: rgb(1, 2, 3) } }</style>
<canvas width="3" height="2"></canvas><input type="range" max="10" value="3"><noscript>no scripts</noscript>
<img src="http://example.org/a.png">
<script>
const context = document.querySelector("canvas").getContext("2d")
context.fillStyle = "#ff8000"
context.fillRect(1, 0, 1, 1)
console.error("said", 1)
setTimeout(() => { window.done = true; throw new Error("thrown late") }, 0)
</script>"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a page.html"
    path.write_text(PAGE)
    return path


def test_it_tells_errors_and_addresses(browser, file):
    with browser.open(file) as page:
        page.wait("window.done")
        assert len(page.errors) == 3
        for said in ("ERR_NAME_NOT_RESOLVED", "console.error: said 1", "thrown late"):
            assert any(said in error for error in page.errors), page.errors
        assert page.requests == [file.as_uri(), "http://example.org/a.png"]


def test_it_reads_values_pixels_and_pictures(browser, file, tmp_path):
    with browser.open(file, width=400) as page:
        assert page.value("Promise.resolve([innerWidth, document.title])") == [400, "a page"]
        expected = np.zeros((2, 3, 4), np.uint8)
        expected[0, 1] = 255, 128, 0, 255
        assert np.array_equal(page.pixels("canvas"), expected)
        page.value("document.querySelector('input').focus()")
        page.press("ArrowRight")
        assert page.value("document.querySelector('input').value") == "4"
        picture = page.screenshot(tmp_path / "page.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        with pytest.raises(BrowserError, match="nowhere is not defined"):
            page.value("nowhere")


@pytest.mark.parametrize("dark, colour", [(False, "rgba(0, 0, 0, 0)"), (True, "rgb(1, 2, 3)")])
def test_it_is_dark_where_it_is_told(browser, file, dark, colour):
    with browser.open(file, dark=dark) as page:
        assert page.value("getComputedStyle(document.body).backgroundColor") == colour


def test_without_javascript_no_script_runs(browser, file):
    with browser.open(file, javascript=False) as page:
        assert "no scripts" in page.value("document.body.innerText")
        assert [error for error in page.errors if "said" in error] == []


def test_a_missing_file_is_an_error(browser, tmp_path):
    with pytest.raises(BrowserError, match="ERR_FILE_NOT_FOUND"), browser.open(tmp_path / "none.html"):
        pass


def test_no_process_is_left(browser, file):
    with Browser(find_browser()) as other, other.open(file):
        processes = [other.pid, *(child.pid for child in psutil.Process(other.pid).children(recursive=True))]
    assert len(processes) > 2
    assert not [
        pid for pid in processes if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"
    ]


def test_a_browser_that_died_says_so(browser, file):
    other = Browser(find_browser())
    with other.open(file):
        pass
    psutil.Process(other.pid).kill()
    with pytest.raises(BrowserError, match="Chromium ended, code"):
        other.call("Target.getTargets")
    other.close()
