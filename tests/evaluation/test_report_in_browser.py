"""Reports as Chromium lays them out: on a phone, and printed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from headless_browser import CHROMIUM, DRIVER, Browser, driver
from trimtab.evaluation import Report, render_html
from trimtab.evaluation.blocks import BarPanel, Bars, Column, Table, TableRow, Text

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]

LONG = "runs/" + "a-name-without-a-blank-" * 4


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    columns = [Column("Pair", numeric=False), *(Column(f"column {at}", numeric=False) for at in range(5))]
    page = render_html(
        Report(
            "Report",
            verdict=LONG,
            sections=[
                Text(LONG),
                Bars(["a"], [BarPanel(["x"], [[1.0]])], title="Bars"),
                Table(columns, [TableRow([LONG.replace("-", "_")] * 6)], title="Long"),
            ],
        )
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page, encoding="utf-8")
    with driver() as address:
        browser = Browser(address, tmp_path_factory.mktemp("profile"))
        browser.open(path.as_uri())
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [375, 320])
def test_no_name_is_wider_than_a_phone(window: Browser, width: int) -> None:
    window.emulate("setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
    assert window.run("return document.documentElement.scrollWidth") == width


def test_a_printed_page_keeps_colours_and_whole_tables(window: Browser) -> None:
    window.emulate("setDeviceMetricsOverride", width=700, height=1000, deviceScaleFactor=1, mobile=False)
    window.emulate("setEmulatedMedia", media="print")
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert window.run(style, ".legend i", "printColorAdjust") == "exact"
    assert window.run(style, ".scroll", "overflowX") == "visible"
    assert window.run("return document.documentElement.scrollWidth") == 700
