"""A report: what a run came to, for people. Figures come from the results' JSON; see `summaries`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.evaluation.blocks import Block, Tile, Tiles
from trimtab.evaluation.escape import escape_markdown
from trimtab.evaluation.markdown import block_markdown, prose_markdown, tiles_markdown
from trimtab.evaluation.page import render_page
from trimtab.files import write_text


@dataclass(frozen=True)
class Report:
    """A headline and sections, in reading order.

    Attributes:
        title: what was done.
        verdict: one sentence that a reader may stop after.
        tiles: key figures.
        sections: blocks; each block's title heads its section, `Group` puts several under one.
        context: small print above the title, such as the recipe's name.
        footer: last line, such as version and date.
    """

    title: str
    verdict: str = ""
    tiles: Sequence[Tile] = ()
    sections: Sequence[Block] = ()
    context: str = ""
    footer: str = ""


def render_html(report: Report) -> str:
    """The report as one HTML file that fetches nothing and runs no script."""
    return render_page(
        report.title,
        report.verdict,
        Tiles(report.tiles),
        report.sections,
        context=report.context,
        footer=report.footer,
    )


def render_markdown(report: Report) -> str:
    """The report as Markdown; charts become tables, pictures their captions."""
    parts = [f"# {escape_markdown(report.title)}\n"]
    if report.verdict:
        parts.append(prose_markdown(report.verdict))
    if report.tiles:
        parts.append(tiles_markdown(Tiles(report.tiles)))
    parts += [block_markdown(block) for block in report.sections]
    if last := " · ".join(escape_markdown(text) for text in (report.context, report.footer) if text):
        parts.append(f"---\n\n{last}\n")
    return "\n".join(parts)


def write_report(folder: str | Path, report: Report) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md``; returns their paths.

    Raises:
        TrimtabError: when the folder cannot be written to.
    """
    html, markdown = Path(folder) / "report.html", Path(folder) / "report.md"
    write_text(html, render_html(report))
    write_text(markdown, render_markdown(report))
    return html, markdown
