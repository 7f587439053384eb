"""Commands that train, measure and describe models."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli.app import Model, app
from trimtab.cli.printing import show, show_classification, show_retrieval, show_written
from trimtab.errors import TrimtabError


class Hubness(str, Enum):
    """Corrections of retrieval for candidates that are near everything."""

    none = "none"
    csls = "csls"
    dual_softmax = "dual_softmax"


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
    show({key: value for key, value in outcome.items() if key != "history"} if outcome else outcome)


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
            help="Sentence with {} for the class name; repeat for several. If not given, prompts score where the "
            "model has any; else chosen by script.",
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
    batch_size: Annotated[int, typer.Option(min=1, help="Most images per forward pass.")] = 64,
) -> None:
    """Measure classification (zero-shot, or by learned prompts) or image-text retrieval on your own pictures."""
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
        show_classification(
            evaluate_classification(model, classification, classes, templates=template or None, **common)
        )
    elif retrieval is not None:
        correction: Any = hubness.value if hubness else "none"
        show_retrieval(evaluate_retrieval(model, retrieval, hubness=correction, **common))
    show_written(json_path, report and report / "report.html")


@app.command()
def info(model: Model) -> None:
    """Say what a model is: towers, sizes and fingerprint, or what an adapted folder was trained on."""
    from trimtab.recipes.info import describe

    show(describe(model))


@app.command()
def relocate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An adapted or composed folder.")],
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Where its base is now: folder or hub id.")] = None,
    student: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Where its student is now, if it has a language link.")
    ] = None,
) -> None:
    """Tell an adapted folder where its base and student are now; it is checked that they are the same models."""
    from trimtab.recipes.relocate import relocate as run

    show(run(folder, base=base, student=student))


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="OpenCLIP's .safetensors, or a .bin or .pt state dict.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: a new or an empty one.")],
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
    """Turn an OpenCLIP checkpoint into a transformers folder."""
    from trimtab.towers.open_clip import convert_open_clip

    show_written(convert_open_clip(checkpoint, out, config=config, tokenizer=tokenizer, quick_gelu=quick_gelu))


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the adapted model and its report.")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """Teach the starter Chinese from text, a domain from pictures, classes from a few; measure all, write a report."""
    from trimtab.recipes.quickstart import quickstart as run

    show(run(out))


@app.command("align-starter", hidden=True)
def align_starter(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the aligned weights.")] = Path("runs/starter"),
) -> None:
    """Train the starter's alignment again from its packaged towers."""
    from trimtab.recipes.starter import align_starter as run

    show(run(out))
