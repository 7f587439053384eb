"""The second part of the main job: `starter` learns clothes, shoes and bags; what it gains there, loses elsewhere."""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.adapters.adapted import load_adapted
from trimtab.config import DomainRecipe, to_mapping, to_yaml
from trimtab.data.fashion import CAPTION, FashionFiles
from trimtab.data.manifests import LabelledImage, read_class_names, read_classification
from trimtab.evaluation.blocks import Block, Code, Details, Group, Tile, Tiles
from trimtab.evaluation.classification import ClassificationResult, classify_embeddings, embed_classes
from trimtab.evaluation.domain_pairs import difficulty_histogram, hardest_pairs
from trimtab.evaluation.domain_summaries import (
    MAIN_METHOD,
    METHODS,
    REFERENCE_METHOD,
    alpha_lines,
    general_rows,
    general_table,
    method_table,
    training_curves,
    training_rows,
    with_seed,
)
from trimtab.evaluation.embedding import EmbeddedImages, embed_images
from trimtab.evaluation.forgetting import GeneralSet, forgetting, mean_score, measure
from trimtab.evaluation.summaries import score, score_rows
from trimtab.objectives.memory_bank import Measure, MemoryBank, global_difficulty
from trimtab.recipes.adapt import adapt
from trimtab.recipes.domain_report import HARDEST_FILE
from trimtab.recipes.folders import training_folder
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.states_below import StatesBelow

DATASET, NAME = "fashion", "Clothes, shoes and bags"
SHOWN = {key: METHODS[key] for key in (REFERENCE_METHOD, "adapter", MAIN_METHOD)}
ALPHAS = (0.0, 0.5, 1.0)
_HARDEST = 12


@dataclass(frozen=True)
class Measured:
    """What a model can do.

    Attributes:
        images: the test pictures, embedded.
        domain: zero-shot classification of them.
        difficulty: (N,) of naming each test picture.
        general: score of each set outside the domain.
    """

    images: EmbeddedImages
    domain: ClassificationResult
    difficulty: np.ndarray
    general: dict[str, float]


@dataclass(frozen=True)
class DomainPart:
    """What goes into ``results.json``, and into the report beside it.

    Attributes:
        images: the test pictures as the base embeds them, and as the link does.
    """

    results: dict[str, Any]
    histories: dict[str, list[dict[str, Any]]]
    difficulty: tuple[np.ndarray, np.ndarray]
    hardest: list[dict[str, Any]]
    images: tuple[EmbeddedImages, EmbeddedImages]


def learn_domain(
    recipe: DomainRecipe,
    files: FashionFiles,
    base: DualEncoder,
    general: Sequence[GeneralSet],
    images: Mapping[str, EmbeddedImages],
) -> DomainPart:
    """Train with and without hard sampling, then open the test pictures, once.

    Args:
        recipe: with hard sampling; the other run differs in that alone.
        files: manifests; the recipe names its own of training and validation.
        base: the recipe's, loaded.
        general: pictures outside the domain.
        images: these, embedded by the base's image tower.
    """
    started = time.monotonic()
    recipes = {
        "adapter": replace(recipe, out=f"{recipe.out}-uniform", bank=replace(recipe.bank, enabled=False)),
        MAIN_METHOD: recipe,
    }
    classes = read_class_names(files.classes)
    test = read_classification(files.test, classes)
    kind = MemoryBank.measure(recipe.bank)

    def look(model: DualEncoder, known: Mapping[str, EmbeddedImages] | None = None) -> Measured:
        embedded = embed_images(model, [item.path for item in test])
        found, difficulty = _name(model, test, embedded, classes, kind, base.logit_scale)
        return Measured(embedded, found, difficulty, measure(model, general, dict(known or {})))

    before = look(base, images)
    rows = _scores(REFERENCE_METHOD, before, before, general, seed=None)
    outcomes, states_below = {}, StatesBelow()
    for key, each in recipes.items():
        outcome = adapt(each)
        assert outcome is not None  # one process
        outcomes[key] = outcome
        model = load_adapted(each.out, base=base)
        model.states_below = states_below  # both have their adapters at the same layers
        after = look(model)
        rows += _scores(key, after, before, general, seed=recipe.seed)
        rows += training_rows(
            key,
            parameters=outcome["trained_parameters"],
            base_parameters=outcome["base_parameters"],
            minutes=outcome["seconds"]["training"] / 60,
            seed=recipe.seed,
        )
    # The last one is the link itself.
    dial = {0.0: before, 1.0: after}
    for alpha in ALPHAS:
        if alpha not in dial:
            model.alpha = alpha
            dial[alpha] = look(model)
    model.alpha = 1.0
    results = {
        "rows": rows,
        "alpha": [
            {
                "row": MAIN_METHOD,
                "alpha": alpha,
                "domain": dial[alpha].domain.top1,
                "general": mean_score(dial[alpha].general),
                "seed": recipe.seed,
            }
            for alpha in ALPHAS
        ],
        "sizes": {
            "train": outcomes[MAIN_METHOD]["images"],
            "test": before.domain.n,
            "classes": len(classes),
        },
        "validation": {key: outcome["validation"] for key, outcome in outcomes.items()},
        "seconds": {
            **{key: outcome["seconds"] for key, outcome in outcomes.items()},
            "all": time.monotonic() - started,
        },
        "fingerprint": model.fingerprint,
        "recipe": to_mapping(recipe),
    }
    histories = {key: outcome["history"] for key, outcome in outcomes.items()}
    difficulty, embedded = (before.difficulty, after.difficulty), (before.images, after.images)
    return DomainPart(results, histories, difficulty, _read_hardest(recipe), embedded)


def _name(
    model: DualEncoder,
    test: Sequence[LabelledImage],
    images: EmbeddedImages,
    classes: Sequence[str],
    kind: Measure,
    logit_scale: float,
) -> tuple[ClassificationResult, np.ndarray]:
    """Zero-shot classification, and how hard each picture is, in the base's own unit for every model."""
    vectors = embed_classes(model, classes, [CAPTION])
    labels = np.array([item.label for item in test])[images.positions]
    difficulty = global_difficulty(
        torch.from_numpy(images.embeddings),
        torch.from_numpy(vectors),
        torch.from_numpy(labels),
        kind,
        logit_scale=logit_scale,
    )
    found = classify_embeddings(images.embeddings, vectors, labels, classes=classes, templates=[CAPTION])
    return found, difficulty.numpy()


def _scores(
    row: str, found: Measured, before: Measured, general: Sequence[GeneralSet], *, seed: int | None
) -> list[dict[str, Any]]:
    changed = forgetting(before.general, found.general)
    return with_seed(score_rows(row, DATASET, found.domain), seed) + general_rows(row, changed, general, seed=seed)


def _read_hardest(recipe: DomainRecipe) -> list[dict[str, Any]]:
    """The top of the table that the run left beside its checkpoints."""
    path = training_folder(recipe.out) / HARDEST_FILE
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(itertools.islice(csv.DictReader(stream), _HARDEST))
    return [
        {
            **row,
            "image": Path(row["image"]),
            "file": Path(row["file"]).name,
            "before": float(row["before"]),
            "now": float(row["now"]),
            "drawn": int(row["drawn"]),
        }
        for row in rows
    ]


def domain_sentence(results: Mapping[str, Any]) -> str:
    """The domain's part of the verdict."""
    rows, sizes = results["rows"], results["sizes"]
    top1 = {key: score(rows, key, DATASET, "top1") for key in SHOWN}
    lost = score(rows, MAIN_METHOD, "general", "forgetting") or 0.0
    return (
        f"From {sizes['train']:,} pictures of clothes, shoes and bags it learns to name {top1[MAIN_METHOD]:.0f}% of "
        f"{sizes['test']:,} others, {top1[REFERENCE_METHOD]:.0f}% before; elsewhere it {_change(lost)}."
    )


def domain_section(part: DomainPart, recipe: DomainRecipe, names: Mapping[str, str]) -> Group:
    """The domain's part of the report.

    Args:
        names: of the general sets, by their keys.
    """
    results = part.results
    rows, seconds = results["rows"], results["seconds"]
    hard, uniform, base = (score(rows, key, DATASET, "top1") for key in (MAIN_METHOD, "adapter", REFERENCE_METHOD))
    lost = score(rows, MAIN_METHOD, "general", "forgetting")
    share = score(rows, MAIN_METHOD, "training", "percent_of_base") or 0.0
    parameters = int(score(rows, MAIN_METHOD, "training", "parameters") or 0)
    measure_name = MemoryBank.measure(recipe.bank)
    tiles = [
        Tile("Named right", hard, "%", f"base {base:.0f}%, without hard sampling {uniform:.0f}%"),
        Tile("Forgotten elsewhere", lost, "points", "general score, in English"),
        Tile("Trained parameters", parameters, "", f"{share:.2g}% of the base's"),
        Tile("Time", seconds["all"] / 60, "min", "both runs and their evaluation"),
    ]
    blocks: list[Block | None] = [
        Tiles(tiles),
        method_table(
            rows,
            [(DATASET, "top1", "Top-1")],
            group=NAME,
            methods=SHOWN,
            title="Same pictures, same number of steps",
            note=f"Top-1 of {results['sizes']['test']:,} test pictures among {results['sizes']['classes']} names. "
            "General is the mean of the English mR on the sets below.",
        ),
        general_table(
            rows,
            [(key, "mR", name) for key, name in names.items()],
            methods=SHOWN,
            title="What is left elsewhere",
        ),
        alpha_lines(results["alpha"], domain="top-1, %", title="The dial alpha"),
        training_curves(
            part.histories,
            terms={"i2t": "Loss, image to text", "t2i": "Loss, text to image"},
            metrics={"top1": "Validation top-1, %"},
            methods=SHOWN,
            title="Training on the domain",
        ),
        difficulty_histogram(
            *part.difficulty,
            label=f"difficulty ({measure_name})",
            title="How hard the test pictures are to name",
            note="Above 0.5 another name comes first." if measure_name == "margin" else "",
        ),
        hardest_pairs(
            part.hardest,
            scale=1.0,
            title="Hardest training pairs",
            note=f"`{HARDEST_FILE}` in `{training_folder(recipe.out).name}/` has more of them, and `report.html` there "
            "is the run's own page.",
        ),
        Details("Recipe of the domain as resolved", [Code(to_yaml(recipe), language="yaml")]),
    ]
    return Group(
        f"A domain: {NAME.lower()}",
        [block for block in blocks if block is not None],
        lead="Adapters beside the frozen layers of the image tower learn from pictures with captions. A memory bank "
        "draws the pairs that are still hard more often.",
    )


def _change(lost: float) -> str:
    if abs(lost) < 0.05:
        return "stays as good as it was"
    return f"{'loses' if lost > 0 else 'gains'} {abs(lost):.1f} points"
