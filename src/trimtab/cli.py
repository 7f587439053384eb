"""The command line: parse, call, print. What a command does stands in `trimtab.recipes`.

Everything heavy is imported inside the commands, so that ``trimtab --help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from trimtab import __version__
from trimtab.errors import TrimtabError

INTERRUPTED = 130  # 128 + SIGINT, as shells count
_SKIPPED_SHOWN = 5


class _Commands(TyperGroup):
    """Ends every command alike: a sentence and a status instead of a traceback, where the user can mend it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TrimtabError as error:
            _say(f"error: {error}", "bold red")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            _say(
                "stopped by Ctrl-C. Files that were finished are whole, and the same command continues from the "
                "last checkpoint where there is one.",
                "yellow",
            )
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    name="trimtab",
    cls=_Commands,
    help="Steer a frozen vision-language model to a new language, domain or objective by training a small part.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Hubness(str, Enum):
    """Corrections of retrieval for candidates that are near everything."""

    none = "none"
    csls = "csls"
    dual_softmax = "dual_softmax"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="'starter', a transformers folder or hub id, or an adapted folder.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trimtab {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def adapt(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train; recipes/ has examples.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values that replace the recipe's, such as training.epochs=3."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, sizes and estimates, and train nothing.")
    ] = False,
) -> None:
    """Train an adapter and write the adapted folder."""
    from trimtab.config import load_recipe

    resolved = load_recipe(recipe, overrides or ())  # before torch is imported: a typing error shows at once
    from trimtab.recipes.adapt import adapt as run

    outcome = run(resolved, dry_run=dry_run)
    _show({key: value for key, value in outcome.items() if key != "history"} if outcome else outcome)


@app.command()
def evaluate(
    model: Model,
    classification: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Pictures and their classes: columns image, label.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="TXT", help="Class names, one per line; for --classification.")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Sentence with {} for the class name; repeat for several. Chosen by script if not given.",
        ),
    ] = None,
    retrieval: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Pictures and texts that belong together: columns image, text.")
    ] = None,
    hubness: Annotated[
        Hubness | None, typer.Option(help="Correction for --retrieval, transductive; none by default.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the pictures; the manifest's own by default.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write report.html and report.md into this folder.")
    ] = None,
    device: Annotated[str, typer.Option(help="'auto' takes a GPU where there is one; or a torch device.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
) -> None:
    """Measure zero-shot classification or image-text retrieval on your own pictures."""
    if (classification is None) == (retrieval is None):
        raise TrimtabError("give exactly one of --classification and --retrieval")
    if classification is not None and classes is None:
        raise TrimtabError("--classification needs --classes, a file with one class name per line")
    if classification is not None and hubness is not None:
        raise TrimtabError("--hubness belongs to --retrieval, not to --classification")
    if retrieval is not None and (classes is not None or template):
        raise TrimtabError("--classes and --template belong to --classification, not to --retrieval")
    from trimtab.recipes.evaluate import evaluate_classification, evaluate_retrieval

    common: dict[str, Any] = {
        "root": root,
        "json_path": json_path,
        "report": report,
        "device": device,
        "batch_size": batch_size,
        "progress": sys.stdout.isatty(),
    }
    if classification is not None and classes is not None:
        _show_classification(
            evaluate_classification(model, classification, classes, templates=template or None, **common)
        )
    elif retrieval is not None:
        correction: Any = hubness.value if hubness else "none"
        _show_retrieval(evaluate_retrieval(model, retrieval, hubness=correction, **common))
    _show_written(json_path, report and report / "report.html")


@app.command()
def info(model: Model) -> None:
    """Say what a model is: towers, sizes and fingerprint, or what an adapted folder was trained on."""
    from trimtab.recipes.info import describe

    _show(describe(model))


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="OpenCLIP's .safetensors, or a .bin or .pt state dict.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")],
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="open_clip_config.json; the one beside CHECKPOINT by default.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder or hub id of its tokenizer; CHECKPOINT's by default.")
    ] = None,
    quick_gelu: Annotated[
        bool | None, typer.Option("--quick-gelu/--no-quick-gelu", help="The activation, where no configuration tells.")
    ] = None,
) -> None:
    """Turn an OpenCLIP checkpoint into a transformers CLIPModel folder."""
    from trimtab.towers.open_clip import convert_open_clip

    _show_written(convert_open_clip(checkpoint, out, config=config, tokenizer=tokenizer, quick_gelu=quick_gelu))


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the adapted model and its report.")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """Teach the starter Chinese from text alone, then a domain from pictures; measure both and write a report."""
    from trimtab.recipes.quickstart import quickstart as run

    _show(run(out))


@app.command("align-starter", hidden=True)
def align_starter(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the aligned weights.")] = Path("runs/starter"),
) -> None:
    """Train the starter's alignment again from its packaged towers."""
    from trimtab.recipes.starter import align_starter as run

    _show(run(out))


# Printing


def _console() -> Console:
    # Rich would fold tables at 80 columns in a pipe or file, where nothing limits them.
    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 240)


def _say(message: str, style: str) -> None:
    """One line on stderr, as it is: messages hold paths and users' text, never markup."""
    Console(stderr=True, highlight=False).print(Text(message, style=style), soft_wrap=True)


def _show(result: Any) -> None:
    """Facts as a table; a path as where something was written; other text as it is."""
    if isinstance(result, Mapping):
        _console().print(_facts(result))
    elif isinstance(result, Path):
        _show_written(result)
    elif result is not None:
        _console().print(Text(str(result)), soft_wrap=True)


def _show_written(*paths: Path | None) -> None:
    for path in paths:
        if path is not None:
            _console().print(Text(f"wrote {path}", style="green"), soft_wrap=True)


def _facts(values: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            table.add_row(Text(str(name), style="bold"), "")
            for inner, item in value.items():
                table.add_row(Text(f"  {inner}"), Text(_value(item)))
        else:
            table.add_row(Text(str(name)), Text(_value(value)))
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


def _show_classification(result: Mapping[str, Any]) -> None:
    table = Table("pictures", "classes", "top-1", "top-5", title=Text(result["model"]))
    table.add_row(f"{result['n']:,}", f"{result['n_classes']:,}", f"{result['top1']:.2f}", f"{result['top5']:.2f}")
    _console().print(table)
    _console().print(Text(f"templates ({result['templates_for']}): {' | '.join(result['templates'])}"), soft_wrap=True)
    _show_skipped(result)


def _show_retrieval(result: Mapping[str, Any]) -> None:
    recalls = list(result["t2i"])
    table = Table("", *recalls, title=Text(result["model"]))
    for key, words in (("t2i", "text finds image"), ("i2t", "image finds text")):
        table.add_row(words, *(f"{result[key][recall]:.2f}" for recall in recalls))
    _console().print(table)
    corrected = "" if result["hubness"] == "none" else f", corrected by {result['hubness']} (transductive)"
    _console().print(
        f"mR {result['mR']:.2f} on {result['n_images']:,} images and {result['n_texts']:,} texts{corrected}"
    )
    _show_skipped(result)


def _show_skipped(result: Mapping[str, Any]) -> None:
    if not (skipped := result["skipped"]):
        return
    shown = [f"  {item['source']}: {item['reason']}" for item in skipped[:_SKIPPED_SHOWN]]
    if len(skipped) > len(shown):
        shown.append(f"  and {len(skipped) - len(shown)} more; --json FILE lists all")
    _say("\n".join([f"images left out because they cannot be used: {len(skipped)}", *shown]), "yellow")


# The process


class _Warnings(logging.Handler):
    """Shows each warning of trimtab once, on stderr."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self.shown:
            self.shown.add(message)
            _say(f"{record.levelname.lower()}: {message}", "yellow")


def main() -> None:
    """Entry point of the ``trimtab`` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # class names and paths are UTF-8 even where the locale is not
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    # What matters of transformers' chatter is raised as an error by `trimtab.towers`.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait take the cores from each other when a machine is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("trimtab").addHandler(_Warnings())
    logging.getLogger("trimtab").propagate = False
    try:
        app()
    except Exception:
        traceback.print_exc()
        _say(f"This is a bug in trimtab {__version__}: please report it with the text above and the command.", "red")
        sys.exit(1)


if __name__ == "__main__":
    main()
