"""Commands around vectors: compose models, embed, index, search, export."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trimtab.cli.app import Model, app
from trimtab.cli.printing import console, plain, say, show, show_written
from trimtab.errors import TrimtabError

_SHOWN = 5


class Of(str, Enum):
    """What is embedded."""

    auto = "auto"
    images = "images"
    texts = "texts"


class Format(str, Enum):
    """Files of vectors."""

    parquet = "parquet"
    npy = "npy"


class Dtype(str, Enum):
    """Precision of vectors on disk."""

    float32 = "float32"
    float16 = "float16"


class Engine(str, Enum):
    """What runs the shards."""

    local = "local"
    ray = "ray"


class Kind(str, Enum):
    """Kinds of index."""

    auto = "auto"
    flat = "flat"
    hnsw = "hnsw"
    ivfpq = "ivfpq"


class ExportFormat(str, Enum):
    """What an export writes."""

    onnx = "onnx"
    merged = "merged"


ModelOption = Annotated[
    str, typer.Option("--model", metavar="MODEL", help="'starter', a folder or hub id, an adapted or composed folder.")
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")]
Device = Annotated[str, typer.Option(help="'auto' takes a GPU where there is one; or a torch device.")]


@app.command()
def compose(
    parts: Annotated[
        list[str], typer.Argument(metavar="BASE_OR_FOLDERS", help="A base and adapted folders, one of each link.")
    ],
    out: Out,
    names: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="Other names of the prompts' classes: column 'class', and others."),
    ] = None,
) -> None:
    """Put a language, a domain and prompts that were trained one by one into one folder."""
    from trimtab.recipes.compose import compose as run

    show(run(parts, out, names=names))


@app.command()
def embed(
    input: Annotated[
        str,
        typer.Argument(metavar="INPUT", help="Table, folder of pictures, or shards such as 'shard-{000..012}.tar'."),
    ],
    model: ModelOption,
    out: Out,
    of: Annotated[Of, typer.Option(help="What to embed; pictures where there are any by default.")] = Of.auto,
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of a table; 'image' or 'text' by default.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option("--id", metavar="NAME", help="Column of the ids; 'id' where there is one.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Further column to keep; repeat for several.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the pictures; the table's own by default.")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Items per shard.")] = 8192,
    batch_size: Annotated[int, typer.Option(min=1, help="Most items per forward pass.")] = 64,
    format: Annotated[Format, typer.Option(help="Parquet, or .npy with the ids beside it.")] = Format.parquet,
    dtype: Annotated[Dtype, typer.Option(help="Of the vectors on disk.")] = Dtype.float32,
    engine: Annotated[Engine, typer.Option(help="'ray' uses the workers of a Ray cluster.")] = Engine.local,
    workers: Annotated[int, typer.Option(min=1, help="Workers of the engine 'ray'.")] = 2,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Do every N-th shard only, so that N processes share the work.")
    ] = "1/1",
    device: Device = "auto",
) -> None:
    """Embed pictures or texts of any number into a folder; run it again to go on where it stopped."""
    from trimtab.serve.embed import embed as run

    with _bar(of.value if of != Of.auto else "items") as advance:
        outcome = run(
            input,
            model,
            out,
            of=of.value,
            column=column,
            id_column=id_column,
            keep=tuple(keep or ()),
            root=root,
            shard_size=shard_size,
            batch_size=batch_size,
            format=format.value,
            dtype=dtype.value,
            engine=engine.value,
            workers=workers,
            part=_part(part),
            device=device,
            progress=advance,
        )
    skipped = outcome.pop("skipped_items")
    show(outcome)
    if skipped:
        lines = [f"  {one['source'] or one['id']}: {one['reason']}" for one in skipped[:_SHOWN]]
        listed = "all" if len(skipped) == outcome["skipped"] else f"{len(skipped):,} of them"
        more = f"\n  {listed} are listed in {out / 'skipped.csv'}" if not outcome["unfinished_shards"] else ""
        say("\n".join([f"left out because they cannot be used: {outcome['skipped']}", *lines]) + more, "yellow")
    if outcome["unfinished_shards"]:
        say(f"{outcome['unfinished_shards']} shards are left to other parts", "yellow")


@app.command()
def index(
    embeddings: Annotated[Path, typer.Argument(metavar="EMBEDDINGS", help="Folder that `trimtab embed` wrote.")],
    out: Out,
    kind: Annotated[Kind, typer.Option(help="Chosen by the number of vectors if 'auto'.")] = Kind.auto,
    queries: Annotated[
        Path | None, typer.Option(metavar="EMBEDDINGS", help="Embedded queries that recall is measured with.")
    ] = None,
    recall: Annotated[float, typer.Option(help="Share of the true neighbours that is wanted.")] = 0.95,
) -> None:
    """Arrange embeddings for searching, and measure how many of the true neighbours are found."""
    from trimtab.serve.indexing import build_index, described, remarks

    with _bar("vectors") as advance:
        about = build_index(embeddings, out, kind=kind.value, queries=queries, recall=recall, progress=advance)
    show(described(about))
    for remark in remarks(about):
        say(remark, "yellow")
    show_written(out)


@app.command()
def search(
    index: Annotated[Path, typer.Option("--index", metavar="DIR", help="Folder that `trimtab index` wrote.")],
    query: Annotated[str | None, typer.Argument(metavar="TEXT", help="What to look for.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="Look for what is like this picture.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Of the same space; the model of the index by default.")
    ] = None,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="How many to show.")] = 10,
    device: Device = "auto",
) -> None:
    """Find pictures or texts by a text or a picture."""
    if (query is None) == (image is None):
        raise TrimtabError("give a text or --image FILE, and not both")
    from trimtab.serve.search import search as run

    _show_hits(run(index, text=query, image=image, model=model, k=k, device=device))


@app.command()
def export(
    model: Model,
    out: Out,
    format: Annotated[
        ExportFormat, typer.Option(help="ONNX files of both towers, or the weights as a transformers folder.")
    ] = ExportFormat.onnx,
    int8: Annotated[bool, typer.Option("--int8", help="Also write quantised towers, and measure them.")] = False,
    sample: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Your pictures and texts to measure on: columns image, text.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of these pictures; the table's own by default.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference from PyTorch that is let through.")] = 1e-4,
) -> None:
    """Write a model, with its adapters, for programs without Trimtab."""
    from trimtab.recipes.export import export as run

    show(run(model, out, format=format.value, int8=int8, sample=sample, root=root, tolerance=tolerance))


def _part(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal()):
        raise TrimtabError(f"--part {text} must be of the form 1/4: the first of four")
    return int(first), int(count)


def _show_hits(found: list[dict[str, Any]]) -> None:
    from rich.table import Column, Table

    columns = list(found[0]) if found else []
    if columns[:1] == ["id"] and len(columns) > 1 and all(one["id"] == one[columns[1]] for one in found):
        columns = columns[1:]  # a picture without an id of its own is known by its path
    columns = ["score", *(name for name in columns if name != "score")]
    table = Table(*(Column(plain(name)) for name in columns))
    for one in found:
        table.add_row(*(plain(f"{one[name]:.3f}" if name == "score" else one[name]) for name in columns))
    console().print(table)


class _bar:  # noqa: N801 - it reads as a function
    """A progress bar on a terminal; yields a function of the items done and in all."""

    def __init__(self, what: str) -> None:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, transient=True, disable=not sys.stdout.isatty())
        self.task = self.bar.add_task(what, total=None)

    def __enter__(self) -> Any:
        self.bar.start()
        return lambda done, total: self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
