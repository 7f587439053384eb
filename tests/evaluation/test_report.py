from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trimtab.errors import TrimtabError
from trimtab.evaluation import Report, render_html, render_markdown, write_report
from trimtab.evaluation.blocks import (
    BarPanel,
    Bars,
    Block,
    Cell,
    Code,
    Column,
    Details,
    Facts,
    GridImage,
    GridQuery,
    Group,
    Histogram,
    ImageGrid,
    LinePanel,
    Lines,
    Series,
    Table,
    TableRow,
    Text,
    Tile,
    Tiles,
)

EVIL = """<script>alert("1")</script>' onerror='x' "><img src=x> & `code` | *a* [b](javascript:c)"""
VOID = {"meta", "img", "i", "br", "hr"}


class Page(HTMLParser):
    """Collects elements, and checks that they close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID - {"i"}:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def every_block(text: str, picture: object) -> list[Block]:
    """One of each, with `text` wherever text can stand."""
    table = Table(
        [Column(text, group=text, numeric=False), Column(text, group=text, meter=100), Column(text)],
        [
            TableRow([Cell(text, note=text), Cell(12.34, note=text, tone="good"), None], strong=True),
            TableRow([text], empty=text),
        ],
        title=text,
        note=text,
    )
    labelled = LinePanel([Series(text, [1, 2], [3.0, 2.0], [text, ""])], text, text, text, tall=True)
    line = LinePanel([Series(text, [1, 2, 3], [3.0, 2.0, 1.0])], text, text, text, smooth=3, mark=(2, text))
    grid = ImageGrid(
        [GridQuery(text, [GridImage(picture, text, True), GridImage("absent.png", text)], text, text)], text, text
    )
    return [
        Tiles([Tile(text, text, text, text, "bad")], title=text),
        Text(text, title=text, tone="caution"),
        Text(text, title=text),
        table,
        Bars([text, text], [BarPanel([text, text], [[1.0, None], [2.0, 3.0]], text)], text, text, unit=text),
        Lines([line, labelled], text, text),
        Histogram([text, text], [0, 1, 2], [[1, 3], [2, 0]], text, text, text, text, [1.5, None], text),
        grid,
        Facts([(text, text), ("n", 3)], text),
        Group(text, [Details(text, [Code(text, text, text)])], text),
    ]


def report_of(text: str, picture: object = "absent.png") -> Report:
    return Report(text, text, [Tile(text, 1.0)], every_block(text, picture), context=text, footer=text)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (600, 300), "red").save(path)
    return path


def test_files_are_written(tmp_path: Path, picture: Path) -> None:
    html, markdown = write_report(tmp_path / "out", report_of("鱼", picture))
    assert html.name == "report.html"
    assert markdown.name == "report.md"
    assert "鱼" in html.read_text(encoding="utf-8")
    assert markdown.read_text(encoding="utf-8").startswith("# 鱼\n")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((TrimtabError, OSError), match="file"):
        write_report(tmp_path / "file", report_of("a"))


def test_users_text_never_becomes_markup(picture: Path) -> None:
    page = Page(render_html(report_of(EVIL, picture)))
    harmless = Page(render_html(report_of("plain", picture)))
    assert {tag for tag, _ in page.elements} - {"code"} == {tag for tag, _ in harmless.elements} - {"code"}
    assert not page.all("script")
    assert len(page.all("img")) == 1
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        assert not (attributes.get("href") or "").startswith("javascript")
    assert page.text.count("<script>alert") > 20


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=30).filter(lambda text: text.strip()))
def test_any_text_gives_a_whole_page(text: str) -> None:
    rendered = render_html(report_of(text))
    rendered.encode("utf-8")
    Page(rendered)
    render_markdown(report_of(text)).encode("utf-8")


def test_unprintable_characters_can_be_written(tmp_path: Path) -> None:
    html, _ = write_report(tmp_path, report_of("a\x00b\x1b\ud800c"))
    assert "a\N{REPLACEMENT CHARACTER}b" in html.read_text(encoding="utf-8")


@pytest.mark.parametrize("override", ["\u202e", "\u202a", "\u2066", "\u2069"])
def test_no_text_turns_around_what_stands_beside_it(override: str) -> None:
    for rendered in (render_html(report_of(f"a{override}b")), render_markdown(report_of(f"a{override}b"))):
        assert override not in rendered
        assert "a\N{REPLACEMENT CHARACTER}b" in rendered


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("一只猫", "zh"), ("T恤", "zh"), ("直子の骨", "ja"), ("고양이", "ko"), ("חתול", "he"), ("γάτα", "el"),
        ("naïve", None), ("кот", None), ("قطة", None), ("iPod 壳", None), ("…", None),
    ],
)  # fmt: skip
def test_texts_say_their_language_where_the_script_decides(text: str, language: str | None) -> None:
    table = Table([Column("Text", numeric=False)], [TableRow([text])])
    blocks: list[Block] = [Details(text, [Facts([("model", text)]), table])]
    blocks.append(ImageGrid([GridQuery(text, [GridImage(b"", text)])]))
    page = Page(render_html(Report("t", sections=blocks)))
    found = [attrs.get("lang") for tag, attrs in page.elements if tag in ("bdi", "p", "span") and "lang" in attrs]
    assert found == ([language] * 5 if language else [])
    assert sum(tag == "bdi" for tag, _ in page.elements) == 3


def test_tables_without_a_title_have_the_name_of_what_holds_them() -> None:
    table = Table([Column("Text", numeric=False)], [TableRow(["a"])])
    blocks: list[Block] = [Details("Templates", [table]), Group("Left out", [table]), table]
    page = Page(render_html(Report("t", sections=blocks)))
    names = [attrs["aria-label"] for _, attrs in page.elements if attrs.get("role") == "region"]
    assert names == ["Templates", "Left out", "table"]


def test_two_panels_of_one_title_are_two_tables_in_markdown() -> None:
    series = [Series("prompts", [1.0, 2.0], [1.0, 0.5])]
    lines = Lines([LinePanel(series, "Loss", "step", label) for label in ("training", "validation")])
    text = render_markdown(Report("t", sections=[lines]))
    assert "| Loss, training |" in text
    assert "| Loss, validation |" in text


def test_nothing_is_fetched_and_nothing_runs(picture: Path) -> None:
    rendered = render_html(report_of("plain", picture))
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", rendered)
    assert not re.search(r"https?:|//\w|@import|url\(|<link|<script", without_pictures)
    page = Page(rendered)
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in page.all("img"))
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy["content"] or "")


def test_pictures_and_charts_speak(picture: Path) -> None:
    page = Page(render_html(report_of("plain", picture)))
    assert page.all("img")[0]["alt"] == "rank 1: plain (right)"
    charts = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(charts) == 4
    assert charts[0]["aria-label"] == "plain. plain: plain 1.0plain, plain –; plain: plain 2.0plain, plain 3.0plain"
    assert page.elements[0] == ("html", {"lang": "en"})


def test_thumbnails_are_small_and_unreadable_pictures_are_named(picture: Path) -> None:
    rendered = render_html(report_of("plain", picture))
    encoded = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", rendered)
    assert len(encoded) == 1
    assert Image.open(io.BytesIO(base64.b64decode(encoded[0]))).size == (224, 112)
    assert "absent.png: no such file" in rendered


def test_pictures_in_memory_are_told_apart() -> None:
    images = [GridImage(np.full((8, 8, 3), shade, np.uint8), str(shade)) for shade in (0, 255)]
    rendered = render_html(Report("t", sections=[ImageGrid([GridQuery("q", images)])]))
    assert len(set(re.findall(r"base64,([A-Za-z0-9+/=]+)", rendered))) == 2


def test_contents_link_to_sections() -> None:
    sections = [Text("a", title=f"Part {at}") for at in range(4)]
    page = Page(render_html(Report("t", sections=sections)))
    anchors = {section["id"] for section in page.all("section")}
    links = [link["href"] for link in page.all("a")]
    assert len(links) == 4
    assert all((link or "")[1:] in anchors for link in links)


def test_headings_step_down_one_at_a_time(picture: Path) -> None:
    page = Page(render_html(report_of("plain", picture)))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert max(after - before for before, after in pairwise(levels)) <= 1


def test_markdown_tables_hold_together(picture: Path) -> None:
    table = Table(
        [Column("Row", numeric=False), Column("mR", group="Photos"), Column("top-1")],
        [
            TableRow([Cell("a|b", note="small"), 12.345, Cell(1234, tone="caution")]),
            TableRow(["missing"], empty="not available: see `docs`"),
            TableRow(["line\nbreak", None, float("nan")]),
        ],
    )
    assert render_markdown(Report("T", sections=[table])) == (
        "# T\n\n"
        "| Row | Photos mR | top-1 |\n"
        "| --- | ---: | ---: |\n"
        "| a\\|b (small) | 12.3 | ⚠ 1,234 |\n"
        "| missing | not available: see `docs` |  |\n"
        "| line break | – | – |\n"
    )
    for line in render_markdown(report_of(EVIL, picture)).splitlines():
        if line.startswith("|"):
            bars = len(re.findall(r"(?<!\\)\|", line))
            assert bars in (4, 5, 6), line


def test_markdown_escapes_markup(picture: Path) -> None:
    text = render_markdown(Report("t", EVIL, sections=[GroupOf(EVIL, picture)]))
    assert "<script" not in text
    assert "[b](" not in text
    assert "javascript" in text


def GroupOf(text: str, picture: object) -> Group:  # noqa: N802 - a block with users' text in it
    return Group(text, [block for block in every_block(text, picture) if not isinstance(block, Group)])


def test_code_in_markdown_cannot_leave_its_fence() -> None:
    text = render_markdown(Report("t", sections=[Code("a\n```\n# not a heading", language="yaml`x")]))
    assert "````yamlx\na\n```\n# not a heading\n````" in text


def test_prose_has_paragraphs_lists_and_code() -> None:
    block = Text("First\nline with `code` & more.\n\n- one\n- two\n  goes on\n\nLast ` one.")
    page = render_html(Report("t", sections=[block]))
    assert (
        "<p>First line with <code>code</code> &amp; more.</p><ul><li>one</li><li>two goes on</li></ul>"
        "<p>Last ` one.</p>" in page
    )
    assert render_markdown(Report("t", sections=[block])).endswith(
        "First line with `code` &amp; more.\n\n- one\n- two goes on\n\nLast \\` one.\n"
    )


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="has 1 cells, not 2"):
        Table([Column("a"), Column("b")], [TableRow(["x"])])
    with pytest.raises(ValueError, match="a value per series and group"):
        Bars(["a"], [BarPanel(["g"], [[1.0, 2.0]])])
    with pytest.raises(ValueError, match="2 colors for 1 series"):
        Bars(["a"], [BarPanel(["g"], [[1.0]])], colors=(1, 2))
    with pytest.raises(ValueError, match="2 x and 1 y"):
        Series("a", [1, 2], [1])
    with pytest.raises(ValueError, match="2 points and 1 labels"):
        Series("a", [1, 2], [1, 2], ["x"])
    with pytest.raises(ValueError, match="a count per set and bin"):
        Histogram(["a"], [0, 1, 2], [[1]])
    with pytest.raises(ValueError, match="must ascend"):
        Histogram(["a"], [0, 0], [[1]])
    with pytest.raises(ValueError, match="1 marks for 2 sets"):
        Histogram(["a", "b"], [0, 1], [[1], [2]], marks=[0.5])


def test_a_tile_shortens_millions_but_the_markdown_does_not() -> None:
    report = Report("t", tiles=[Tile("Parameters", 1_912_064), Tile("Pairs", 41_204)])
    assert "1.91M" in render_html(report)
    assert "41,204" in render_html(report)
    assert "1,912,064" in render_markdown(report)


def test_a_picture_in_a_table_is_small_and_named(picture: Path) -> None:
    table = Table(
        [Column("Picture", numeric=False), Column("Caption", numeric=False)],
        [
            TableRow([Cell("red.png", picture=picture), "red <b>"]),
            TableRow([Cell("gone.png", picture="x/gone.png"), "gone"]),
        ],
    )
    rendered = render_html(Report("t", sections=[table]))
    page = Page(rendered)
    assert [image["alt"] for image in page.all("img")] == ["red.png"]
    encoded = re.findall(r"base64,([A-Za-z0-9+/=]+)", rendered)
    assert max(Image.open(io.BytesIO(base64.b64decode(encoded[0]))).size) == 208
    assert 'aria-label="gone.png">no such file</span>' in rendered
    assert render_markdown(Report("t", sections=[table])).endswith("| red.png | red &lt;b&gt; |\n| gone.png | gone |\n")


def test_one_picture_in_two_sizes_is_embedded_twice(picture: Path) -> None:
    table = Table([Column("p", numeric=False)], [TableRow([Cell("a", picture=picture)])])
    grid = ImageGrid([GridQuery("q", [GridImage(picture)])])
    rendered = render_html(Report("t", sections=[table, grid, table]))
    assert len(set(re.findall(r"base64,([A-Za-z0-9+/=]+)", rendered))) == 2


def test_points_and_histograms_in_markdown() -> None:
    lines = Lines([LinePanel([Series("a", [1.0, 2.0], [3.0, 4.5], ["base", "1"])], x_label="x", y_label="y")])
    histogram = Histogram(["old", "new"], [0, 0.5, 1], [[1, 3], [0, 0]], x_label="d", marks=[0.75, None])
    assert render_markdown(Report("t", sections=[lines, histogram])) == (
        "# t\n\n"
        "| line | point | x | y |\n"
        "| --- | --- | ---: | ---: |\n"
        "| a | base | 1 | 3 |\n"
        "| a | 1 | 2 | 4.5 |\n\n"
        "| d | old, % | new, % |\n"
        "| --- | ---: | ---: |\n"
        "| 0 to 0.5 | 25.0 | 0.0 |\n"
        "| 0.5 to 1 | 75.0 | 0.0 |\n"
        "| median | 0.75 | – |\n"
    )
