"""Pages are well-formed, self-contained and escape what they are given."""

from pathlib import Path

import pytest
from lxml import html

from common.html import Page


@pytest.fixture
def page(tmp_path: Path) -> html.HtmlElement:
    page = Page("A <b> & c")
    page.heading("Loss")
    page.table(["name", "rows"], [["<script>", 12345], ["x", 0.5]])
    page.figure('<?xml version="1.0"?><svg width="1"></svg>', "a curve")
    page.figure('<svg width="1"></svg>', "bars", alt='falls "fast"')
    page.table(["year"], [[3]], folded="The <numbers>")
    page.preformatted("a: <1>")
    page.write(tmp_path / "page.html")
    return html.parse(tmp_path / "page.html").getroot()


def test_text_is_escaped(page: html.HtmlElement) -> None:
    assert page.findtext(".//h1") == "A <b> & c"
    assert page.findtext(".//pre") == "a: <1>"
    assert not page.findall(".//script")


def test_table_and_figure(page: html.HtmlElement) -> None:
    cells = [cell.text for cell in page.iterfind(".//td")]
    assert cells == ["<script>", "12,345", "x", "0.5000", "3"]
    assert {cell.get("scope") for cell in page.iterfind(".//th")} == {"col"}
    assert page.find(".//figure/svg") is not None
    assert page.findtext(".//figcaption") == "a curve"
    assert page.findtext(".//details/summary") == "The <numbers>"
    assert page.findtext(".//details/table//td") == "3"


def test_a_plot_says_what_it_shows(page: html.HtmlElement) -> None:
    plots = page.findall(".//figure/svg")
    assert {plot.get("role") for plot in plots} == {"img"}
    assert [plot.get("aria-label") for plot in plots] == ["a curve", 'falls "fast"']


def test_nothing_is_fetched(page: html.HtmlElement) -> None:
    assert not page.xpath("//@src | //link | //@href")
