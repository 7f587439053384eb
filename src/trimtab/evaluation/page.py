"""A report as one HTML file: no script, nothing fetched, pictures inside."""

from __future__ import annotations

import base64
import io
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.evaluation.blocks import (
    PALETTE_SIZE,
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
    Table,
    TableRow,
    Text,
    Tiles,
    Value,
    as_cell,
    format_compact,
    format_value,
)
from trimtab.evaluation.charts import bars_svg, histogram_svg, lines_svg, swatch
from trimtab.evaluation.escape import code_spans, escape, passages

THUMBNAIL = 224
SMALL_THUMBNAIL = 208
_QUALITY = 80

# A rudder with its trim tab.
_MARK = (
    '<svg class="logo" viewBox="0 0 24 24" aria-hidden="true"><path class="rudder" d="M7 3h6a2 2 0 0 1 2 2v14'
    'a2 2 0 0 1-2 2H9a2 2 0 0 1-2-2z"/><path class="tab" d="M16.5 13l4 6.2a.9.9 0 0 1-.8 1.4h-3.2z"/></svg>'
)

# By what Unicode's names of letters begin with. Arabic and Cyrillic letters leave open which language it is.
_LANGUAGES = {
    **{"CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "HEBREW": "he", "GREEK": "el", "THAI": "th"},
    **{"ARMENIAN": "hy", "GEORGIAN": "ka"},
}

# The policy is the second lock after escaping: no script runs and nothing is fetched, whatever a caption holds.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<p class="brand">{mark}Trimtab{context}</p>
<h1>{title}</h1>
{verdict}{tiles}{contents}</header>
{sections}
<footer>{footer}</footer>
</main>
</body>
</html>
"""


def render_page(title: str, verdict: str, tiles: Tiles, sections: Sequence[Block], *, context: str, footer: str) -> str:
    """The whole file as text."""
    thumbnails: dict[str, str] = {}
    named = [(f"s{at}", block.title) for at, block in enumerate(sections) if block.title]
    links = "".join(f'<li><a href="#{anchor}">{escape(name)}</a></li>' for anchor, name in named)
    return _PAGE.format(
        title=escape(title),
        style=resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8"),
        mark=_MARK,
        context=f'<span class="context">{escape(context)}</span>' if context else "",
        verdict=f'<div class="verdict">{prose(verdict)}</div>\n' if verdict else "",
        tiles=_tiles(tiles) + "\n" if tiles.tiles else "",
        contents=f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n' if len(named) > 3 else "",
        sections="\n".join(
            f'<section id="s{at}">{block_html(block, thumbnails)}</section>' for at, block in enumerate(sections)
        ),
        footer=escape(footer),
    )


def block_html(block: Block, thumbnails: dict[str, str], level: int = 2, within: str = "") -> str:
    """One block; `thumbnails` keeps pictures that stand in several places, `within` is the title of what holds it."""
    if isinstance(block, Details):
        # Its own title is no heading, so headings inside follow on from those outside.
        inner = "".join(block_html(each, thumbnails, level, block.title) for each in block.blocks)
        return f"<details><summary>{_bdi(block.title)}</summary><div>{inner}</div></details>"
    if isinstance(block, Text) and block.tone != "plain":
        title = f"<strong>{escape(block.title)}</strong>" if block.title else ""
        return f'<aside class="note {block.tone}" role="note">{title}{prose(block.text)}</aside>'
    depth = min(level, 6)
    heading = f"<h{depth}>{escape(block.title)}</h{depth}>" if block.title else ""
    return heading + _body(block, thumbnails, level, within)


def prose(text: str) -> str:
    """Paragraphs, lists and code words."""
    parts = []
    for kind, lines in passages(text):
        if kind == "list":
            parts.append("<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in lines) + "</ul>")
        else:
            parts.append(f"<p>{_inline(lines[0])}</p>")
    return "".join(parts)


def thumbnail_uri(source: Any, side: int = THUMBNAIL) -> str:
    """A picture as a small JPEG in a data URI, its longer side at most `side` pixels.

    Raises:
        TrimtabError: when it cannot be read.
    """
    from trimtab.data.images import read_image

    image = read_image(source)
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _body(block: Block, thumbnails: dict[str, str], level: int, within: str) -> str:
    if isinstance(block, Tiles):
        return _tiles(block)
    if isinstance(block, Text):
        return prose(block.text)
    if isinstance(block, Table):
        return _table(block, thumbnails, within) + _note(block.note)
    if isinstance(block, Bars):
        return _bars(block) + _note(block.note)
    if isinstance(block, Lines):
        panels = f'<div class="panels">{"".join(map(_line_panel, block.panels))}</div>'
        return _beside(panels, block.note) if len(block.panels) == 1 else panels + _note(block.note)
    if isinstance(block, Histogram):
        return _beside(_histogram(block), block.note)
    if isinstance(block, ImageGrid):
        queries = "".join(_query(query, thumbnails) for query in block.queries)
        return f'<div class="queries">{queries}</div>' + _note(block.note)
    if isinstance(block, Facts):
        items = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{_bdi(format_value(value))}</dd></div>" for name, value in block.items
        )
        return f'<dl class="facts">{items}</dl>'
    if isinstance(block, Code):
        return f'<pre tabindex="0"><code>{escape(block.text.rstrip())}</code></pre>'
    assert isinstance(block, Group)
    lead = f'<div class="lead">{prose(block.lead)}</div>' if block.lead else ""
    return lead + "".join(block_html(inner, thumbnails, level + 1, block.title) for inner in block.blocks)


def _tiles(block: Tiles) -> str:
    tiles = []
    for tile in block.tiles:
        unit = f'<span class="unit">{escape(tile.unit)}</span>' if tile.unit else ""
        note = f'<p class="small">{_inline(tile.note)}</p>' if tile.note else ""
        tiles.append(
            f'<li class="tile {tile.tone}"><p class="label">{escape(tile.label)}</p>'
            f'<p class="figure">{escape(_figure(tile.value))}{unit}</p>{note}</li>'
        )
    return f'<ul class="tiles" style="--columns:{_per_line(len(tiles), 5)}">{"".join(tiles)}</ul>'


def _figure(value: Value) -> str:
    """As in a table, but millions in short: a tile has room for about seven characters."""
    large = isinstance(value, int) and abs(value) >= 1_000_000
    return format_compact(float(value)) if large and value is not None else format_value(value)


def _per_line(count: int, limit: int) -> int:
    """How many to put side by side so that the lines are about equally long."""
    lines = max(1, math.ceil(count / limit))
    return max(1, math.ceil(count / lines))


def _table(table: Table, thumbnails: dict[str, str], within: str) -> str:
    rows = "".join(_row(row, table.columns, thumbnails) for row in table.rows)
    pictures = any(as_cell(cell).picture is not None for row in table.rows for cell in row.cells)
    # A wide table of few rows, or with pictures, becomes a card per row on a phone; a narrow one of figures needs
    # no whole line.
    shape = "stacks" if len(table.columns) >= 5 and (len(table.rows) <= 12 or pictures) else ""
    if len(table.columns) <= 4 and all(column.numeric and not column.meter for column in table.columns[1:]):
        shape = "narrow"
    caption = f'<caption class="unseen">{escape(table.title)}</caption>' if table.title else ""
    name = escape(table.title or within or "table")
    return (
        f'<div class="scroll {shape}" tabindex="0" role="region" aria-label="{name}"><table>{caption}'
        f"<thead>{_head(table.columns)}</thead><tbody>{rows}</tbody></table></div>"
    )


def _head(columns: Sequence[Column]) -> str:
    labels = "".join(f'<th scope="col"{_align(column)}>{escape(column.label)}</th>' for column in columns)
    if not any(column.group for column in columns):
        return f"<tr>{labels}</tr>"
    spans: list[tuple[str, int]] = []
    for column in columns:
        if spans and spans[-1][0] == column.group:
            spans[-1] = (column.group, spans[-1][1] + 1)
        else:
            spans.append((column.group, 1))
    groups = "".join(
        f'<th class="group" scope="colgroup" colspan="{count}">{escape(group)}</th>' if group else
        f'<td colspan="{count}"></td>'
        for group, count in spans
    )  # fmt: skip
    return f"<tr>{groups}</tr><tr>{labels}</tr>"


def _row(row: TableRow, columns: Sequence[Column], thumbnails: dict[str, str]) -> str:
    first = as_cell(row.cells[0])
    classes = f' class="{"strong" if row.strong else "missing"}"' if row.strong or row.empty else ""
    head = f'<th scope="row">{_value(first, columns[0], thumbnails)}</th>'
    if row.empty:
        rest = f'<td colspan="{len(columns) - 1}">{_inline(row.empty)}</td>'
    else:
        rest = "".join(
            f'<td{_align(column)} data-label="{escape(f"{column.group} {column.label}".strip())}">'
            f"{_value(as_cell(cell), column, thumbnails)}</td>"
            for cell, column in zip(row.cells[1:], columns[1:])
        )
    return f"<tr{classes}>{head}{rest}</tr>"


def _value(cell: Cell, column: Column, thumbnails: dict[str, str]) -> str:
    tone = f" {cell.tone}" if cell.tone != "plain" else ""
    text = format_value(cell.value, column.digits)
    if cell.picture is None:
        shown = f'<span class="value{tone}">{_bdi(text)}</span>'
    else:
        picture = _picture(cell.picture, text, thumbnails, SMALL_THUMBNAIL)
        shown = f'<span class="picture" title="{escape(text)}">{picture}</span>'
    meter = ""
    if column.meter and isinstance(cell.value, (int, float)):
        share = 100 * max(0.0, min(1.0, cell.value / column.meter))
        meter = f'<span class="meter" aria-hidden="true"><i style="width:{share:.1f}%"></i></span>'
    note = f'<span class="small">{_inline(cell.note)}</span>' if cell.note else ""
    return shown + meter + note


def _align(column: Column) -> str:
    return ' class="number"' if column.numeric else ""


def _bars(bars: Bars) -> str:
    legend = "".join(f'<li><i class="c{bars.color(at)}"></i>{escape(name)}</li>' for at, name in enumerate(bars.series))
    panels = "".join(
        f"<figure><figcaption>{escape(panel.title)}</figcaption>{bars_svg(bars, panel)}</figure>"
        for panel in bars.panels
    )
    return f'<ul class="legend">{legend}</ul><div class="panels">{panels}</div>'


def _line_panel(panel: LinePanel) -> str:
    legend = []
    for at, series in enumerate(panel.series):
        finite = [value for value in series.ys if math.isfinite(value)]
        last = f"<b>{format_compact(finite[-1])}</b>" if finite and not series.labels else ""
        legend.append(f"<li>{swatch(panel, at)}{escape(series.name)} {last}</li>")
    unit = f' <span class="small">{escape(panel.y_label)}</span>' if panel.y_label else ""
    return (
        f"<figure><figcaption>{escape(panel.title)}{unit}</figcaption>"
        f'<ul class="legend">{"".join(legend)}</ul>{lines_svg(panel)}</figure>'
    )


def _histogram(block: Histogram) -> str:
    legend = []
    for at, name in enumerate(block.names):
        mark = block.marks[at] if block.marks else None
        pointed = "" if mark is None else f"{escape(block.mark_name)} <b>{format_compact(mark)}</b>"
        legend.append(f'<li><i class="c{at % PALETTE_SIZE}"></i>{escape(name)} {pointed}</li>')
    return (
        f'<figure><figcaption><span class="small">{escape(block.y_label)}</span></figcaption>'
        f'<ul class="legend">{"".join(legend)}</ul>{histogram_svg(block)}</figure>'
    )


def _query(query: GridQuery, thumbnails: dict[str, str]) -> str:
    language = f' lang="{escape(query.language)}"' if query.language else _lang(query.text)
    meaning = f'<span class="small">{escape(query.meaning)}</span>' if query.meaning else ""
    images = "".join(_grid_image(image, rank, thumbnails) for rank, image in enumerate(query.images, 1))
    columns = _per_line(len(query.images), 6)
    return (
        f'<article class="query"><p class="asked"><span class="words" dir="auto"{language}>'
        f'{escape(query.text)}</span>{meaning}</p><ol style="--columns:{columns}">{images}</ol></article>'
    )


def _grid_image(image: GridImage, rank: int, thumbnails: dict[str, str]) -> str:
    verdict = "right" if image.correct else "not right"
    alternative = f"rank {rank}: {image.caption or 'untitled'} ({verdict})"
    picture = _picture(image.source, alternative, thumbnails, THUMBNAIL)
    badge = '<span class="badge" title="right">✓</span>' if image.correct else ""
    told = escape(image.caption)
    caption = f'<p class="small" dir="auto"{_lang(image.caption)} title="{told}">{told}</p>'
    mark = ' class="right"' if image.correct else ""
    return f'<li{mark}><div class="frame">{picture}{badge}</div>{caption}</li>'


def _picture(source: Any, alternative: str, thumbnails: dict[str, str], side: int) -> str:
    key = str(source) if isinstance(source, (str, Path)) else f"object {id(source)}"
    key = f"{side} {key}"
    try:
        if key not in thumbnails:
            thumbnails[key] = thumbnail_uri(source, side)
    except TrimtabError as error:
        # One unreadable picture must not cost the report.
        told = str(error) if side == THUMBNAIL else str(getattr(error, "reason", error))
        return f'<span class="broken" role="img" aria-label="{escape(alternative)}">{escape(told)}</span>'
    return f'<img src="{thumbnails[key]}" alt="{escape(alternative)}" loading="lazy">'


def _bdi(text: str) -> str:
    """Text of unknown direction must not turn what stands around it."""
    return escape(text) if text.isascii() else f"<bdi{_lang(text)}>{escape(text)}</bdi>"


def _lang(text: str) -> str:
    """The attribute that says which language to read a text aloud in, where half of its letters decide that."""
    scripts = [unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha()]
    found = Counter(_LANGUAGES.get(script, "") for script in scripts)
    if found["ja"]:  # which is written in Han too
        found["ja"] += found.pop("zh", 0)
    language = max(found, key=lambda one: (found[one], one), default="")
    return f' lang="{language}"' if language else ""


def _inline(line: str) -> str:
    return "".join(f"<code>{escape(piece)}</code>" if code else escape(piece) for code, piece in code_spans(line))


def _beside(figure: str, note: str) -> str:
    """A figure that stands alone, with its note where there would be nothing."""
    return f'<div class="beside">{figure}{_note(note)}</div>'


def _note(note: str) -> str:
    return f'<div class="small under">{prose(note)}</div>' if note else ""
