"""A report as Markdown: the same words and figures, charts as tables, pictures by caption."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from trimtab.evaluation.blocks import (
    Bars,
    Block,
    Cell,
    Code,
    Details,
    Facts,
    Group,
    Histogram,
    ImageGrid,
    LinePanel,
    Lines,
    Table,
    Text,
    Tiles,
    as_cell,
    format_compact,
    format_value,
)
from trimtab.evaluation.escape import code_spans, escape_markdown, passages, printable

_TONES = {"good": "✓ ", "caution": "⚠ ", "bad": "✗ "}


def block_markdown(block: Block, level: int = 2) -> str:
    """One block; its title becomes a heading of `level`."""
    heading = f"{'#' * min(level, 6)} {escape_markdown(block.title)}\n\n" if block.title else ""
    return heading + _body(block, level).rstrip("\n") + "\n"


def _body(block: Block, level: int) -> str:
    if isinstance(block, Tiles):
        return tiles_markdown(block)
    if isinstance(block, Text):
        return prose_markdown(block.text, quote=block.tone != "plain")
    if isinstance(block, Table):
        return _table(block) + _note(block.note)
    if isinstance(block, Bars):
        return "\n".join(_bars(block)) + _note(block.note)
    if isinstance(block, Lines):
        return "\n".join(_lines(block)) + _note(block.note)
    if isinstance(block, Histogram):
        return _histogram(block) + _note(block.note)
    if isinstance(block, ImageGrid):
        return _grid(block) + _note(block.note)
    if isinstance(block, Facts):
        return "".join(
            f"- {escape_markdown(name)}: {escape_markdown(format_value(value))}\n" for name, value in block.items
        )
    if isinstance(block, Code):
        text = printable(block.text)
        # A fence must be longer than any run of back-quotes inside it.
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
        return f"{fence}{re.sub('[^a-z]', '', block.language)}\n{text.rstrip()}\n{fence}\n"
    assert isinstance(block, (Group, Details))
    lead = prose_markdown(block.lead) + "\n" if isinstance(block, Group) and block.lead else ""
    return lead + "\n".join(block_markdown(inner, level + 1) for inner in block.blocks)


def tiles_markdown(block: Tiles) -> str:
    """Key figures as a list."""
    lines = []
    for tile in block.tiles:
        unit = f" {tile.unit}" if tile.unit else ""
        note = f" ({_inline(tile.note)})" if tile.note else ""
        value = escape_markdown(format_value(tile.value) + unit)
        lines.append(f"- {escape_markdown(tile.label)}: **{value}**{note}\n")
    return "".join(lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    """A pipe table; the texts are Markdown already."""
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join(" ---: " if number else " --- " for number in numeric) + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _table(table: Table) -> str:
    head = [escape_markdown(f"{column.group} {column.label}") for column in table.columns]
    rows = []
    for row in table.rows:
        first = as_cell(row.cells[0])
        if row.empty:
            rows.append([_cell(first, 0), _cell_text(row.empty), *[""] * (len(table.columns) - 2)][: len(head)])
            continue
        rows.append([_cell(as_cell(cell), column.digits) for cell, column in zip(row.cells, table.columns)])
    return markdown_table(head, rows, [column.numeric and at > 0 for at, column in enumerate(table.columns)])


def _cell(cell: Cell, digits: int) -> str:
    text = _TONES.get(cell.tone, "") + escape_markdown(format_value(cell.value, digits))
    return f"{text} ({_cell_text(cell.note)})" if cell.note else text


def _cell_text(text: str) -> str:
    """Prose of a table's cell: a bar would end the cell, even inside a code word."""
    flat = " ".join(text.split())
    return _inline(flat.replace("`", "'") if "|" in flat else flat)


def _bars(bars: Bars) -> list[str]:
    tables = []
    for panel in bars.panels:
        rows = [
            [escape_markdown(name), *(format_value(value) for value in values)]
            for name, values in zip(bars.series, panel.values)
        ]
        numeric = [False] + [True] * len(panel.groups)
        tables.append(markdown_table([escape_markdown(text) for text in (panel.title, *panel.groups)], rows, numeric))
    return tables


def _lines(lines: Lines) -> list[str]:
    tables = []
    for panel in lines.panels:
        if any(series.labels for series in panel.series):
            tables.append(_points(panel))
            continue
        rows = []
        for series in panel.series:
            ys = [y for y in series.ys if math.isfinite(y)]
            figures = [ys[0], min(ys), max(ys), ys[-1]] if ys else []
            rows.append([escape_markdown(series.name), *([format_compact(y) for y in figures] or ["–"] * 4)])
        title = ", ".join(filter(None, (panel.title, panel.y_label)))
        head = [escape_markdown(title), "first", "lowest", "highest", "last"]
        tables.append(markdown_table(head, rows, [False, True, True, True, True]))
    return tables


def _points(panel: LinePanel) -> str:
    rows = [
        [escape_markdown(text) for text in (series.name, label, format_compact(x), format_compact(y))]
        for series in panel.series
        for label, x, y in zip(series.labels or [""] * len(series.xs), series.xs, series.ys)
    ]
    head = [escape_markdown(text) for text in (panel.title or "line", "point", panel.x_label, panel.y_label)]
    return markdown_table(head, rows, [False, False, True, True])


def _histogram(block: Histogram) -> str:
    bins = zip(block.edges, block.edges[1:], *block.shares)
    rows = [
        [f"{format_compact(low)} to {format_compact(high)}", *(f"{share:.1f}" for share in shares)]
        for low, high, *shares in bins
    ]
    if block.marks:
        marks = ("–" if mark is None else format_compact(mark) for mark in block.marks)
        rows.append([escape_markdown(block.mark_name), *marks])
    head = [block.x_label, *(f"{name}, {block.y_label}" for name in block.names)]
    return markdown_table([escape_markdown(text) for text in head], rows, [False] + [True] * len(block.names))


def _grid(grid: ImageGrid) -> str:
    lines = []
    for query in grid.queries:
        meaning = f" ({escape_markdown(query.meaning)})" if query.meaning else ""
        found = [
            ("✓ " if image.correct else "") + (escape_markdown(image.caption) or "untitled") for image in query.images
        ]
        lines.append(f"- **{escape_markdown(query.text)}**{meaning}: {' · '.join(found) or 'nothing'}\n")
    return "".join(lines)


def prose_markdown(text: str, quote: bool = False) -> str:
    """Paragraphs and lists; `quote` sets them apart."""
    parts = []
    for kind, lines in passages(text):
        parts.append("\n".join(("- " if kind == "list" else "") + _inline(line) for line in lines))
    prose = "\n\n".join(parts)
    if quote:
        prose = "\n".join(f"> {line}".rstrip() for line in prose.splitlines())
    return prose + "\n"


def _inline(line: str) -> str:
    # Pieces keep the blanks at their ends, which escaping would fold.
    return "".join(
        f"`{printable(piece)}`" if code else re.sub(r"\S+", lambda word: escape_markdown(word[0]), piece)
        for code, piece in code_spans(line)
    )


def _note(note: str) -> str:
    return f"\n{prose_markdown(note)}" if note else ""
