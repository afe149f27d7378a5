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
    page.preformatted("a: <1>")
    page.write(tmp_path / "page.html")
    return html.parse(tmp_path / "page.html").getroot()


def test_text_is_escaped(page: html.HtmlElement) -> None:
    assert page.findtext(".//h1") == "A <b> & c"
    assert page.findtext(".//pre") == "a: <1>"
    assert not page.findall(".//script")


def test_table_and_figure(page: html.HtmlElement) -> None:
    assert [cell.text for cell in page.iterfind(".//td")] == ["<script>", "12,345", "x", "0.5000"]
    assert page.find(".//figure/svg") is not None
    assert page.findtext(".//figcaption") == "a curve"


def test_nothing_is_fetched(page: html.HtmlElement) -> None:
    assert not page.xpath("//@src | //link | //@href")
