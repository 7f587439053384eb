"""What the links of the main job give together, in English and in Chinese, on its test pictures of clothes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.adapters.adapted import LanguageAdapted, load_adapted
from trimtab.adapters.composed import Composed
from trimtab.adapters.composing import load_composed
from trimtab.config import DomainRecipe
from trimtab.data.fashion import CAPTION, CHINESE, FashionFiles
from trimtab.data.manifests import read_class_names, read_classification
from trimtab.data.templates import DEFAULT_TEMPLATES
from trimtab.evaluation.blocks import Code, Column, Group, Table, TableRow
from trimtab.evaluation.classification import classify_embeddings, embed_classes
from trimtab.evaluation.embedding import EmbeddedImages
from trimtab.files import write_text
from trimtab.recipes.compose import read_aliases
from trimtab.recipes.quickstart_prompt import PromptPart

NAMES_FILE = "names.csv"
DATASET = "fashion"
LABELS = {
    "base": "the base",
    "language": "language",
    "domain": "domain",
    "language+domain": "language, domain",
    "language+domain+prompt": "language, domain, prompts",
}


def put_together(
    language: LanguageAdapted,
    clothes: DomainRecipe,
    files: FashionFiles,
    images: tuple[EmbeddedImages, EmbeddedImages],
    prompts: PromptPart,
) -> dict[str, Any]:
    """Compose the links that were trained, and name the test pictures in both languages.

    No picture is encoded anew. That of all three links is what the prompt link measured on the domain link: a
    language changes nothing of English names, and Chinese ones stand for the classes that prompts know.

    Args:
        language: with the base that all links stand on.
        clothes: recipe of the domain link.
        images: the test pictures as the base embeds them, and as the domain link does.

    Returns:
        ``rows`` for ``results.json`` and ``names``, the table of Chinese names, which is written beside `files`.
    """
    base, classes = language.base, read_class_names(files.classes)
    names = write_names(files.classes.with_name(NAMES_FILE), classes)
    domain = load_adapted(clothes.out, base=base)
    both = Composed(base, domain=domain, language=_on(domain, language))
    labels = np.array([item.label for item in read_classification(files.test, classes)])
    chinese = [CHINESE[name] for name in classes]
    rows = []
    for row, model, pictures in (
        ("base", base, images[0]),
        ("language", language, images[0]),
        ("domain", domain, images[1]),
        ("language+domain", both, images[1]),
    ):
        for metric, given, templates in (
            ("top1", classes, [CAPTION]),
            ("top1_chinese", chinese, DEFAULT_TEMPLATES["zh"]),
        ):
            vectors = embed_classes(model, given, templates)
            found = classify_embeddings(pictures.embeddings, vectors, labels[pictures.positions], classes=given)
            rows.append({"row": row, "dataset": DATASET, "metric": metric, "value": found.top1, "seed": clothes.seed})
    folders = [language.folder or language.name, clothes.out, prompts.results["adapted"]["folder"]]
    whole = load_composed(folders, aliases=read_aliases(names), base=base, student=language.student)
    assert set(chinese) <= set(whole.aliases) | set(classes)  # so that they are scored alike
    value = prompts.results["adapted"]["test"]["top1"]
    for metric in ("top1", "top1_chinese"):
        rows.append({"row": "language+domain+prompt", "dataset": DATASET, "metric": metric, "value": value, "seed": 1})
    return {"rows": rows, "names": str(names), "pictures": len(labels), "classes": len(classes)}


def _on(domain: Any, language: LanguageAdapted) -> LanguageAdapted:
    """The same link on the base with the adapters of a domain."""
    return LanguageAdapted(
        domain,
        language.student,
        language.adapter,
        layers=language.layers,
        english=language.english,
        languages=language.languages,
        name=language.name,
        folder=language.folder,
    )


def write_names(path: Path, classes: Sequence[str]) -> Path:
    """The table of other names that `trimtab compose --names` takes."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("class", "zh"))
    writer.writerows((name, CHINESE[name]) for name in classes)
    write_text(path, stream.getvalue())
    return path


def together_section(together: dict[str, Any], folders: Sequence[str]) -> Group:
    """The part of the report."""
    found = {(row["row"], row["metric"]): row["value"] for row in together["rows"]}
    rows = [
        TableRow(
            [label, *(found[key, metric] for metric in ("top1", "top1_chinese"))],
            strong=key == "language+domain+prompt",
        )
        for key, label in LABELS.items()
    ]
    columns = [
        Column("Links", numeric=False),
        Column("English names", meter=100.0),
        Column("Chinese names", meter=100.0),
    ]
    note = (
        f"Percent of {together['pictures']:,} test pictures that are named right, of {together['classes']} kinds; one "
        "seed. With prompts the Chinese names stand for the classes that were learned, and so the figure is that of "
        "English. Without a domain link the base knows little of these pictures in any language."
    )
    command = (
        f"trimtab compose {' '.join(folders)} \\\n  --names {together['names']} --out {Path(folders[0]).parent}/all"
    )
    return Group(
        "All links in one model",
        [Table(columns, rows, note=note), Code(command, language="bash")],
        lead="Each link was trained by itself, the prompts on top of the domain. Putting them together trains nothing.",
    )
