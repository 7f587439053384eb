"""The command that puts runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.app import app
from trimtab.cli.printing import say, show_written


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Adapted folders, folders with results.json, or files of results."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Put several runs side by side on one page that needs no other file."""
    from trimtab.recipes.side_by_side import report_runs

    outcome = report_runs(runs, out)
    for path in outcome["unreadable"]:
        say(f"left out, because it cannot be read: {path}; the page says why", "yellow")
    show_written(out)
