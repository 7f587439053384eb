"""The first part of the main job: pictures with English and Chinese texts, five rows, and what the report shows."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.adapters.adapted import LanguageAdapted
from trimtab.data.manifests import RetrievalPairs, read_retrieval
from trimtab.data.pictures import Captioned, openmoji_pictures, tuxpaint_photos
from trimtab.evaluation.blocks import (
    Block,
    Cell,
    Column,
    GridImage,
    GridQuery,
    Group,
    ImageGrid,
    LinePanel,
    Lines,
    Series,
    Table,
    TableRow,
    Text,
    Tile,
)
from trimtab.evaluation.embedding import EmbeddedImages, embed_images, embed_texts
from trimtab.evaluation.ranking import nearest
from trimtab.evaluation.retrieval import RetrievalResult, retrieve
from trimtab.evaluation.summaries import (
    five_row_table,
    ratio_to_english,
    recall_bars,
    score,
    score_rows,
)
from trimtab.files import atomic_path, cache_home

DATASETS = {"tuxpaint": "Tux Paint photos", "openmoji": "OpenMoji, held-out names"}
LANGUAGE = "Chinese"
NO_TRANSLATION = "no translation model comes in a package; bring your own to measure it"
GRID_QUERIES, GRID_IMAGES = 8, 6


@dataclass(frozen=True)
class TestSet:
    """One set of pictures with its English and its target-language texts."""

    name: str
    english: RetrievalPairs
    target: RetrievalPairs


def test_sets(folder: Path) -> list[TestSet]:
    """Copy the evaluation pictures to `folder` and write their manifests."""
    rendered = cache_home() / "openmoji"
    captioned = {"tuxpaint": tuxpaint_photos("zh_CN"), "openmoji": list(openmoji_pictures("zh", rendered))}
    sets = []
    for name, items in captioned.items():
        copies = _copy(items, folder / name)
        manifests = {}
        for language, texts in (("en", [c.english for c in items]), ("zh", [c.target for c in items])):
            manifests[language] = folder / f"{name}-{language}.csv"
            _write_manifest(manifests[language], copies, texts)
        sets.append(TestSet(name, read_retrieval(manifests["en"]), read_retrieval(manifests["zh"])))
    return sets


def _copy(items: Sequence[Captioned], folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, item in enumerate(items):
        target = folder / f"{number:04d}-{item.path.name}"
        if not target.exists():
            with atomic_path(target) as temporary:
                shutil.copyfile(item.path, temporary)
        names.append(f"{folder.name}/{target.name}")
    return names


def _write_manifest(path: Path, images: Iterable[str], texts: Iterable[str]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "text"])
        writer.writerows(zip(images, texts, strict=True))


def evaluate(model: LanguageAdapted, sets: Sequence[TestSet]) -> tuple[dict[str, Any], dict[str, EmbeddedImages]]:
    """The five rows on every test set; pictures are embedded once for all of them."""
    unrouted = LanguageAdapted(
        model.base, model.student, model.adapter, layers=model.layers, english="adapter", name=model.name
    )
    rows: list[dict[str, Any]] = []
    pictures, sizes = {}, {}
    for test in sets:
        pictures[test.name] = embed_images(model, test.english.images)
        results: dict[str, RetrievalResult] = {}
        for row, encoder, pairs in (
            ("english_base", model.base, test.english),
            ("target_raw", model.base, test.target),
            ("adapted_target", model, test.target),
            ("adapted_english", model, test.english),
            ("adapted_english_unrouted", unrouted, test.english),
        ):
            results[row] = retrieve(encoder, pairs, images=pictures[test.name])
            rows += score_rows(row, test.name, results[row])
        corrected = retrieve(model, test.target, images=pictures[test.name], hubness="csls")
        rows += score_rows("adapted_target_csls", test.name, corrected)
        sizes[test.name] = {
            "images": results["english_base"].n_images,
            "english_texts": results["english_base"].n_texts,
            "target_texts": results["adapted_target"].n_texts,
        }
    return {"language": {"rows": rows, "sizes": sizes}}, pictures


def language_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """The language's part of the verdict."""
    kept, raw = (_of_english(rows, row) for row in ("adapted_target", "target_raw"))
    return (
        f"Chinese text finds pictures with {kept['tuxpaint']:.0f}% of English quality on Tux Paint photos and "
        f"{kept['openmoji']:.0f}% on emoji of an unseen vendor; before, it had {raw['tuxpaint']:.0f}% and "
        f"{raw['openmoji']:.0f}%. No picture was used in training."
    )


def language_tiles(results: Mapping[str, Any]) -> list[Tile]:
    """Key figures; the last is the time of the whole quickstart."""
    rows, seconds = results["language"]["rows"], results["seconds"]
    kept, raw = (_of_english(rows, row) for row in ("adapted_target", "target_raw"))
    return [
        *(Tile(f"{DATASETS[name]}: kept of English", kept[name], "%", f"raw {raw[name]:.0f}%") for name in DATASETS),
        Tile("Pairs of text", results["pairs"], "", f"translation match {results['validation']['match']:.0f}%"),
        Tile("Time", seconds["all"] / 60, "min", f"training {seconds['training'] / 60:.1f} min, no GPU"),
    ]


def language_sections(
    results: Mapping[str, Any],
    history: Sequence[dict[str, Any]],
    sets: Sequence[TestSet],
    pictures: Mapping[str, EmbeddedImages],
    model: LanguageAdapted,
) -> list[Block]:
    """The language's part of the report."""
    rows = results["language"]["rows"]
    shown = [{**row, "dataset": DATASETS[row["dataset"]]} for row in rows]
    csls = " · ".join(f"{DATASETS[name]} {score(rows, 'adapted_target_csls', name, 'mR'):.1f}" for name in DATASETS)
    unrouted = " · ".join(
        f"{DATASETS[name]} {score(rows, 'adapted_english_unrouted', name, 'mR'):.1f}" for name in DATASETS
    )
    return [
        five_row_table(
            shown,
            language=LANGUAGE,
            missing={"translation": NO_TRANSLATION},
            metrics=("mR",),
            title=f"Retrieval on pictures and {LANGUAGE} texts that no training saw",
            note="mR is the mean of R@1, R@5 and R@10 in both directions, in percent.",
        ),
        Text(
            "English text is routed to the base's own tower, so its row equals the base's. If English went through "
            f"the adapter too, its mR would be: {unrouted}. With the hubness correction `csls`, which needs all "
            f"queries at once, adapted Chinese would have: {csls}.",
            title="Two switches",
        ),
        *(recall_bars(shown, label, language=LANGUAGE, title=f"Recall on {label}") for label in DATASETS.values()),
        query_grid(sets[0], pictures[sets[0].name], model),
        training_curves(history),
        Group("Where the pairs came from", [counts_table(results["counts"])]),
    ]


def _of_english(rows: Sequence[Mapping[str, Any]], row: str) -> dict[str, float]:
    return {name: ratio_to_english(rows, row, name, "mR") or 0.0 for name in DATASETS}


def query_grid(test: TestSet, pictures: EmbeddedImages, model: LanguageAdapted) -> ImageGrid:
    """Queries spread over the test set, not picked by result, with the pictures each finds."""
    count = len(test.target.texts)
    chosen = np.linspace(0, count - 1, GRID_QUERIES).round().astype(int).tolist()
    meaning = {image: test.english.texts[text] for image, text in test.english.positives}
    wanted: dict[int, set[int]] = {}
    for image, text in test.target.positives:
        wanted.setdefault(text, set()).add(image)
    queries = embed_texts(model, [test.target.texts[i] for i in chosen])
    found, _ = nearest(queries, pictures.embeddings, GRID_IMAGES)
    grid = []
    for text, places in zip(chosen, found, strict=True):
        images = [int(pictures.positions[place]) for place in places]
        grid.append(
            GridQuery(
                test.target.texts[text],
                [GridImage(test.target.images[i], meaning.get(i, ""), i in wanted[text]) for i in images],
                meaning=meaning.get(min(wanted[text]), ""),
                language="zh",
            )
        )
    return ImageGrid(
        grid,
        title="Chinese queries and what they find",
        note="Test sentences at even distances through the set, not picked by result; right pictures are framed.",
    )


def training_curves(history: Sequence[dict[str, Any]]) -> Lines:
    """Loss terms over steps, and translation match over epochs."""
    training = [record for record in history if record["kind"] == "train"]
    validation = [record for record in history if record["kind"] == "validation"]
    terms = [name for name in ("mse", "cosine", "infonce", "gram") if training and name in training[0]]
    steps = [record["step"] for record in training]
    losses = [Series(name, steps, [record[name] for record in training]) for name in terms]
    points = [record["step"] for record in validation]
    matches = [
        Series(label, points, [record[name] for record in validation])
        for label, name in (("Chinese", "match"), ("English through the adapter", "english_match"))
    ]
    return Lines(
        [
            LinePanel(losses, title="Loss terms", x_label="step", log_y=True, smooth=15),
            LinePanel(matches, title="Translation match on validation pairs, %", x_label="step", digits=1),
        ],
        title="Training",
        note="Model choice uses validation pairs only; the test sets above were opened once, at the end.",
    )


def counts_table(counts: Mapping[str, Mapping[str, int]]) -> Table:
    """Pairs of each source that were kept and dropped; in small print what each rule dropped, where rules did."""
    rows = []
    for name, entry in counts.items():
        dropped = {rule: count for rule, count in entry.items() if rule != "kept" and count}
        rules = ", ".join(f"{rule.replace('_', ' ')} {n:,}" for rule, n in dropped.items() if rule != "dropped")
        rows.append(TableRow([name, entry["kept"], Cell(sum(dropped.values()), rules)]))
    return Table([Column("Source", numeric=False), Column("Kept"), Column("Dropped")], rows)
