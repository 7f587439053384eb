"""How the commands print: facts as tables, messages as they are."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trimtab.controls import without_controls

_SKIPPED_SHOWN = 5


def console() -> Console:
    # Rich would fold tables at 80 columns in a pipe or file, where nothing limits them.
    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 240)


def say(message: str, style: str) -> None:
    """One line on stderr: messages hold paths and users' text, never markup."""
    Console(stderr=True, highlight=False).print(plain(message, style), soft_wrap=True)


def tell(line: str) -> None:
    """One line on stdout, whose text is a user's as in `say`."""
    console().print(plain(line), soft_wrap=True)


def plain(text: object, style: str = "") -> Text:
    """Text that is shown as it is, be it markup, without characters that steer a terminal. All of users goes by it."""
    return Text(without_controls(str(text)), style=style)


def show(result: Any) -> None:
    """Facts as a table; a path as where something was written; other text as it is."""
    if isinstance(result, Mapping):
        console().print(_facts(result))
    elif isinstance(result, Path):
        show_written(result)
    elif result is not None:
        tell(str(result))


def show_written(*paths: Path | None) -> None:
    for path in paths:
        if path is not None:
            console().print(plain(f"wrote {path}", "green"), soft_wrap=True)


def _facts(values: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            table.add_row(plain(name, "bold"), "")
            for inner, item in value.items():
                table.add_row(plain(f"  {inner}"), plain(_value(item)))
        else:
            table.add_row(plain(name), plain(_value(value)))
    return table


def _value(value: Any) -> str:
    if value is None or value == "" or value == {} or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)) and not any(isinstance(item, (list, tuple, Mapping)) for item in value):
        return ", ".join(map(_value, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def show_classification(result: Mapping[str, Any]) -> None:
    table = Table("pictures", "classes", "top-1", "top-5", title=plain(result["model"]))
    table.add_row(f"{result['n']:,}", f"{result['n_classes']:,}", f"{result['top1']:.2f}", f"{result['top5']:.2f}")
    console().print(table)
    templates = f"templates ({result['templates_for']}): {' | '.join(result['templates'])}"
    if result["templates_for"] == "bare name":
        templates += "; there are none for the language of the names, --template takes your own"
    scored = "scored by the model's prompts; --template takes hand templates instead"
    tell(scored if result["templates_for"] == "prompts" else templates)
    show_skipped(result)


def show_retrieval(result: Mapping[str, Any]) -> None:
    recalls = list(result["t2i"])
    table = Table("", *recalls, title=plain(result["model"]))
    for key, words in (("t2i", "text finds image"), ("i2t", "image finds text")):
        table.add_row(words, *(f"{result[key][recall]:.2f}" for recall in recalls))
    console().print(table)
    lost = f"; texts left out with their pictures: {result['n_lost_texts']:,}" if result["n_lost_texts"] else ""
    corrected = "" if result["hubness"] == "none" else f", corrected by {result['hubness']} (transductive)"
    console().print(
        f"mR {result['mR']:.2f} on {result['n_images']:,} images and {result['n_texts']:,} texts{corrected}{lost}"
    )
    show_skipped(result)


def show_skipped(result: Mapping[str, Any]) -> None:
    if not (skipped := result["skipped"]):
        return
    shown = [f"  {item['source']}: {item['reason']}" for item in skipped[:_SKIPPED_SHOWN]]
    if len(skipped) > len(shown):
        shown.append(f"  and {len(skipped) - len(shown)} more; --json FILE lists all")
    say("\n".join([f"images left out because they cannot be used: {len(skipped)}", *shown]), "yellow")
