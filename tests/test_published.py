"""Published figures: sound as data, and the page's tables are theirs."""

from __future__ import annotations

import pytest

from conftest import ROOT
from dsatrace.report.published import FIGURES, POLICIES, Figure, Setting, miss_rates, published_markdown

PAGE = ROOT / "docs" / "published.md"


def test_the_page_is_the_datas() -> None:
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(
        "<!-- published: python -m dsatrace.report.published -->\n"
    )
    tables, end, _ = rest.partition("\n<!-- end of published -->")
    assert end
    assert tables.strip() == published_markdown().strip()


def test_every_figure_is_a_share_and_says_of_what() -> None:
    for figure in FIGURES:
        assert 0 <= figure.low <= figure.high <= 1
        of_buffer = figure.measure == "miss_rate"
        assert (figure.buffer_k is not None) == (figure.policy is not None) == of_buffer
        assert figure.policy in (None, *POLICIES)


def test_larger_buffers_miss_less_and_nothing_misses_less_than_opt() -> None:
    for setting in {figure.of for figure in FIGURES}:
        curve = sorted(
            (figure.buffer_k, figure.high)
            for figure in FIGURES
            if figure.of is setting and figure.policy == "lru" and figure.buffer_k
        )
        assert [missed for _, missed in curve] == sorted((missed for _, missed in curve), reverse=True)
        for best in (figure for figure in FIGURES if figure.of is setting and figure.policy == "opt"):
            others = [figure for figure in miss_rates(best.buffer_k or 0) if figure.of is setting]
            assert min(figure.low for figure in others) == best.low


def test_an_overlap_is_a_miss_rate_at_k() -> None:
    (hisparse,) = miss_rates(1.0, "lru")
    assert hisparse.missed_at_k == (0.3, 0.3)
    setting = Setting("s", "issue", "m", None, "token", 8)
    low, high = Figure(setting, "step_overlap", 0.25, 0.75).missed_at_k or (0, 0)
    assert (low, high) == (0.25, 0.75)
    assert Figure(setting, "step_overlap", 0.9, 0.9).missed_at_k == pytest.approx((0.1, 0.1))
    assert Figure(setting, "layer_overlap", 0.9, 0.9).missed_at_k is None
    assert Figure(setting, "miss_rate", 0.1, 0.1, 2.0, "lru").missed_at_k is None


def test_the_place_of_our_own_figures_is_marked() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- needle-2k: begin -->") == page.count("<!-- needle-2k: end -->") == 1
