"""The command of the few-shot protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trimtab.cli.app import app
from trimtab.cli.printing import console, plain, show_written
from trimtab.errors import TrimtabError


@app.command()
def fewshot(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe of the prompt link, with test data.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values that replace the recipe's, such as data.test=test.csv."),
    ] = None,
    shots: Annotated[str, typer.Option(metavar="N,N", help="Training pictures per class.")] = "1,2,4,8,16",
    seeds: Annotated[str, typer.Option(metavar="N,N", help="One draw of pictures each.")] = "1,2,3",
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="What to compare; the common ones by default, or 'all'.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="JSONL", help="One line per finished run; runs in it are not repeated.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write report.html and report.md into this folder.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the data; its folder by default.")
    ] = None,
) -> None:
    """Compare few-shot methods: the same shots for each, the whole test set, mean over seeds."""
    from trimtab.config import PromptRecipe, load_recipe

    resolved = load_recipe(recipe, overrides or ())  # before torch is imported: a typing error shows at once
    if not isinstance(resolved, PromptRecipe):
        raise TrimtabError(f"{recipe} is a recipe of the {resolved.link} link; few-shot runs take link: prompt")
    numbers = {"shots": _numbers("--shots", shots), "seeds": _numbers("--seeds", seeds)}
    from trimtab.recipes.fewshot import DEFAULT_METHODS, METHODS, Plan, mean_rows
    from trimtab.recipes.fewshot import fewshot as run
    from trimtab.recipes.fewshot_report import write_fewshot_report

    names = DEFAULT_METHODS if methods is None else tuple(METHODS) if methods == "all" else tuple(_parts(methods))
    plan = Plan(numbers["shots"], numbers["seeds"], names, dataset)
    out = out or Path(f"{resolved.out.rstrip('/')}.fewshot.jsonl")
    runs = run(resolved, plan, out)
    title = plain(f"{runs[0]['dataset']}: top-1, percent")
    table = Table("method", *(f"{count} shots" for count in plan.shots), title=title)
    for method, cells in mean_rows(runs).items():
        table.add_row(plain(method), *cells)
    console().print(table)
    html = write_fewshot_report(report, runs) if report else None
    show_written(out, html)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _parts(text))
    except ValueError:
        raise TrimtabError(f"{option} {text!r} must be whole numbers with commas between, such as 1,2,4") from None


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
