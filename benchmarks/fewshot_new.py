"""Base-to-new: prompts learned on half of the classes, measured on them and on the other half, which has no pictures.

The split is CoOp's (first half of the class list); its measure is the harmonic mean of both accuracies, each among the
classes of its own half (Zhou et al., arXiv 2203.05557).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.adapters.adapted import load
from trimtab.adapters.prompt import PromptedClasses, extended
from trimtab.config import PromptRecipe
from trimtab.data.labelled import LabelledPictures
from trimtab.data.shots import draw_shots
from trimtab.data.templates import default_templates
from trimtab.files import digest_of
from trimtab.recipes.fewshot import append_run, read_fewshot, read_runs, setting
from trimtab.recipes.fewshot_methods import CHANGES
from trimtab.recipes.prompt_features import PictureFeatures
from trimtab.recipes.prompt_fit import LabelledFeatures, fit_prompt, right
from trimtab.towers.classifier import class_vectors

SHOTS = 16


def base_to_new(
    recipe: PromptRecipe,
    dataset: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Runs that the file does not have yet."""
    data = read_fewshot(recipe)
    model = load(recipe.base)
    halves = base_and_new(len(data.train.classes))
    tests = [only(data.test, half) for half in halves]
    known = {run["key"] for run in read_runs(out)}
    tokens = recipe.resolved().prompt.reads_patches
    features: dict[int, PictureFeatures] = {}

    def encoded(pictures: LabelledPictures, *, views: int = 0) -> PictureFeatures:
        options = recipe.data.augmentation
        return PictureFeatures(model, pictures.images, views=views, options=options, seed=0, tokens=tokens).fill()

    for seed in seeds:
        train = only(data.train, halves[0])
        held = only(data.validation, halves[0]) if data.validation else None
        draw = draw_shots(train, held, SHOTS, seed, allow_fewer=recipe.data.allow_fewer)
        sets = None
        for method in methods:
            key = digest_of(setting(recipe, method), data.digest, model.fingerprint, dataset, "new", method, str(seed))[
                :16
            ]
            if key in known:
                continue
            for half, test in enumerate(tests):
                if half not in features:
                    features[half] = encoded(test)
            started = time.monotonic()
            if method == "template":
                found = [zero_shot(model, test, features[half]) for half, test in enumerate(tests)]
            else:
                sets = sets or [
                    LabelledFeatures(encoded(draw.train, views=recipe.data.views), draw.train.labels),
                    LabelledFeatures(encoded(draw.validation), draw.validation.labels),
                ]
                changed = replace(CHANGES[method](recipe), seed=seed)
                fitted = fit_prompt(model, changed, sets[0], sets[1], train.classes, seed)
                tower, prompt = fitted.task.classes.tower, fitted.prompt
                nothing = extended(prompt, [None] * len(tests[1].classes))
                found = [
                    accuracy(fitted.task.classes, tests[0], features[0]),
                    accuracy(PromptedClasses(tower, nothing, tests[1].classes), tests[1], features[1]),
                ]
            run: dict[str, Any] = {
                "method": method, "dataset": dataset, "shots": SHOTS, "seed": seed, "base": found[0], "new": found[1],
                "harmonic": harmonic_mean(*found),
                "n_base": len(tests[0]), "n_new": len(tests[1]), "seconds": round(time.monotonic() - started, 1),
                "key": key,
            }  # fmt: skip
            append_run(out, run)
            say(f"{dataset}, {method}, seed {seed}: base {found[0]:.1f}, new {found[1]:.1f}")


def base_and_new(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the base classes, the first half (of an odd number, one more), and of the new ones."""
    half = math.ceil(classes / 2)
    return np.arange(half), np.arange(half, classes)


def only(pictures: LabelledPictures, classes: np.ndarray) -> LabelledPictures:
    """The pictures of some classes, by number; these are then all classes, in the order given."""
    place = np.full(len(pictures.classes), -1, np.int64)
    place[classes] = np.arange(len(classes))
    kept = pictures.take(place[pictures.labels] >= 0)
    names = tuple(pictures.classes[at] for at in classes.tolist())
    return replace(kept, labels=place[kept.labels], classes=names)


def harmonic_mean(base: float, new: float) -> float:
    """Of two accuracies; 0 when either is, so that neither can be bought with the other."""
    return statistics.harmonic_mean((base, new))


@torch.no_grad()
def accuracy(classes: PromptedClasses, test: LabelledPictures, features: PictureFeatures) -> float:
    """Percent of the pictures named right among `classes`."""
    embeddings = classes.embeddings()
    scores = [classes.scores(features.pictures(slice(at, at + 64)), embeddings) for at in range(0, len(features), 64)]
    return right(torch.cat(scores).cpu(), torch.from_numpy(test.labels))


def zero_shot(model: Any, test: LabelledPictures, features: PictureFeatures) -> float:
    """The first hand template."""
    vectors = class_vectors(model, test.classes, default_templates(test.classes)[1][:1])
    parts = [
        features.pictures(slice(at, at + 512)).embeddings.numpy() @ vectors.T for at in range(0, len(features), 512)
    ]
    return right(torch.from_numpy(np.concatenate(parts)), torch.from_numpy(test.labels))
