"""The prompt link end to end: read top to bottom."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.adapters.adapted import load
from trimtab.adapters.cards import card_head, shown_name
from trimtab.adapters.composing import read_composed
from trimtab.adapters.domain import DomainAdapted
from trimtab.adapters.files import is_adapted_folder, is_composed_folder, read_adapter
from trimtab.adapters.prompt import LINK, Pictures
from trimtab.adapters.prompted import save_prompt
from trimtab.config import PromptRecipe, to_mapping, to_yaml
from trimtab.controls import without_controls
from trimtab.data.labelled import LabelledPictures, load_labelled
from trimtab.data.shots import Shots, apart, draw_shots, warn_of_copies, warn_of_unjudged
from trimtab.errors import RecipeError
from trimtab.files import cache_home, digest_of
from trimtab.precision import fast_training, tune_allocator
from trimtab.recipes.decoding import decoding
from trimtab.recipes.estimates import about, room_on_disk
from trimtab.recipes.folders import check_out, recipe_digest, training_folder
from trimtab.recipes.prompt_features import PictureFeatures
from trimtab.recipes.prompt_fit import (
    FittedPrompt,
    LabelledFeatures,
    check_checkpoints,
    fit_prompt,
    new_prompt,
    new_task,
    right,
    settled,
    steps_per_epoch,
)
from trimtab.recipes.prompt_report import write_prompt_report
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.hf import portable
from trimtab.towers.prompting import PromptTower
from trimtab.training.distributed import check_alone, make_accelerator
from trimtab.training.trackers import progress_reporter

logger = logging.getLogger(__name__)

_MEASURED = 16
_TOO_GOOD = 99.0  # percent of the validation pictures that an adapted base names right before it has any prompt


def adapt_prompt(recipe: PromptRecipe, *, dry_run: bool = False) -> dict[str, Any] | None:
    """Learn prompts from labelled pictures; see `trimtab.recipes.adapt.adapt`."""
    started = time.monotonic()
    tune_allocator()
    # The user's mistakes first: no model is loaded before the data are known to be good.
    check_alone("prompts train", os.environ)
    check_out(recipe.out)
    check_no_prompts(recipe.base)
    sets = read_sets(recipe)
    base = load(recipe.base, device=str(make_accelerator().device))
    recipe = settled(recipe, sets.train.classes, PromptTower(base).layers)
    digest = digest_of(recipe_digest(recipe), sets.train.digest, sets.validation.digest, *base.digests)
    check_checkpoints(recipe, training_folder(recipe.out), digest)
    features = frozen_features(recipe, base, sets)
    # Parts that do not go with the tower are refused before pictures are encoded.
    new_prompt(recipe, PromptTower(base), features["train"].patch_width, len(sets.train.classes))
    if dry_run:
        print(without_controls(plan(recipe, base, sets, features)))
        return None

    room(recipe, features)
    clock = time.monotonic()
    for part in features.values():
        with progress_reporter("pictures", "pictures") as report:
            part.fill(progress=report)
    encoding = time.monotonic() - clock
    labelled = {name: LabelledFeatures(features[name], pictures.labels) for name, pictures in sets.as_dict().items()}
    fitted = fit_prompt(
        base,
        recipe,
        labelled["train"],
        labelled["validation"],
        sets.train.classes,
        recipe.seed,
        checkpoints=training_folder(recipe.out),
        digest=digest,
        run_config=to_mapping(recipe),
        show_progress=True,
    )
    outcome: dict[str, Any] = {
        "folder": recipe.out,
        "method": recipe.method,
        "classes": len(sets.train.classes),
        "pictures": {name: len(pictures) for name, pictures in sets.as_dict().items()},
        "validation": fitted.validation | {"zero_shot": zero_shot(base, fitted, labelled["validation"])},
        "trained_parameters": fitted.prompt.trained_parameters,
        "class_scale": fitted.class_scale,
        "steps": fitted.steps,
        "history": fitted.history,
    }
    if knows_domain(base) and outcome["validation"]["zero_shot"] >= _TOO_GOOD:
        logger.warning(
            "%s names %.0f%% of the validation pictures right without a prompt. If it was trained on these pictures, "
            "validation says nothing here: keep some apart from both trainings, in data.validation and data.test",
            recipe.base,
            outcome["validation"]["zero_shot"],
        )
    elif adds_nothing(outcome["validation"]):
        logger.warning(
            "prompts name no more of the validation pictures right than hand templates do (%.1f%%, templates %.1f%%): "
            "give more pictures per class, or stay with templates on %s",
            outcome["validation"]["top1"],
            outcome["validation"]["zero_shot"],
            recipe.base,
        )
    if sets.test is not None:  # opened once, when all is chosen
        test = labelled["test"]
        outcome["test"] = fitted.figures(test) | {"zero_shot": zero_shot(base, fitted, test)}
    outcome["seconds"] = {
        "encoding": encoding, "training": fitted.seconds, "total": time.monotonic() - started
    }  # fmt: skip
    shown = "validation" if sets.test is None else "test"
    save(recipe, base, sets, fitted, outcome)  # before the page, which may fail
    outcome["report"] = str(write_prompt_report(recipe, fitted, labelled[shown], outcome, name=shown))
    return outcome


def check_no_prompts(base: str) -> None:
    """Refuse a base with prompts of its own: they would not be part of what is trained, nor could both be composed.

    Raises:
        RecipeError: with the base to take.
    """
    if is_adapted_folder(base):
        described = read_adapter(base, tensors=False)
        if described.link == LINK:
            raise RecipeError(
                f"base={base} holds prompts, and prompts are not trained on others: {described.base.name} "
                "is its own base, take that"
            )
    elif is_composed_folder(base):
        about = read_composed(base)
        if LINK in about["links"]:
            others = [f"{base}/{name}" for name in about["links"] if name != LINK] or [about["base"]["name"]]
            remedy = f"take {others[0]}" if len(others) == 1 else f"compose {' and '.join(others)}, and take that"
            raise RecipeError(f"base={base} holds prompts, and prompts are not trained on others: {remedy}")


@dataclass(frozen=True)
class LabelledSets:
    """Pictures to train on, to choose by, and to measure on at the end, with the same classes."""

    train: LabelledPictures
    validation: LabelledPictures
    test: LabelledPictures | None = None

    def as_dict(self) -> dict[str, LabelledPictures]:
        """By name, those that there are."""
        found = {"train": self.train, "validation": self.validation}
        return found if self.test is None else {**found, "test": self.test}


def read_sets(recipe: PromptRecipe) -> LabelledSets:
    """Read and check all sources, and draw shots: no picture is in two sets.

    Raises:
        DataError: see `trimtab.data.labelled.load_labelled` and `trimtab.data.shots.draw_shots`.
    """
    data = recipe.data
    with decoding() as how:
        train = load_labelled(data.train, data.classes, **how)
        validation, test = (
            load_labelled(sources, train.classes, every_class=False, **how) if sources else None
            for sources in (data.validation, data.test)
        )
    if validation is not None:
        train = apart(train, validation, name="training", where="validation")
    if test is not None:
        train = apart(train, test, name="training", where="test")
        if validation is not None:
            validation = apart(validation, test, name="validation", where="test")
    fewer = data.allow_fewer
    drawn = draw_shots(train, validation, data.shots, recipe.seed, allow_fewer=fewer, reserve=fewer)
    # Validation pictures that the user gave are all used.
    sets = LabelledSets(drawn.train, drawn.validation if validation is None else validation, test)
    warn_of_copies(train, name="training")
    warn_of_unjudged(Shots(sets.train, sets.validation))
    return sets


def frozen_features(recipe: PromptRecipe, base: DualEncoder, sets: LabelledSets) -> dict[str, PictureFeatures]:
    """Features of each set; nothing is computed yet.

    Raises:
        RecipeError: a part of the prompt reads patch tokens, and the image tower has none.
    """
    tokens = recipe.resolved().prompt.reads_patches
    return {
        name: PictureFeatures(
            base,
            pictures.images,
            views=recipe.data.views if name == "train" else 0,
            options=recipe.data.augmentation,
            seed=recipe.seed,
            tokens=tokens,
        )
        for name, pictures in sets.as_dict().items()
    }


def room(recipe: PromptRecipe, features: dict[str, PictureFeatures]) -> str:
    """What is free on the cache's disk, and a warning where what is not in the cache yet needs more."""
    folder = cache_home() / "features"
    needed = sum(part.missing_bytes(folder) for part in features.values())
    return room_on_disk(folder, needed, views=recipe.data.views)


def knows_domain(base: DualEncoder) -> bool:
    """Whether it was trained on pictures of a domain, alone or composed with other links."""
    return isinstance(base, DomainAdapted) or getattr(base, "domain", None) is not None


def adds_nothing(validation: dict[str, float]) -> bool:
    """Whether hand templates name as many pictures right, and not all of them, where nothing could be added."""
    return validation["top1"] - 1e-3 < validation["zero_shot"] < _TOO_GOOD


def zero_shot(base: DualEncoder, fitted: FittedPrompt, pictures: LabelledFeatures) -> float:
    """Top-1 of the hand templates, in percent, for comparison."""
    vectors = fitted.task.templates.cpu().numpy()  # (C, D)
    found = pictures.features.pictures().embeddings.cpu().numpy() @ vectors.T
    return right(torch.from_numpy(found), torch.from_numpy(pictures.labels))


def plan(
    recipe: PromptRecipe, base: DualEncoder, sets: LabelledSets, features: dict[str, PictureFeatures]
) -> str:  # fmt: skip
    """The resolved recipe, what is trained and cached, and how long encoding takes: for `--dry-run`."""
    train = features["train"]
    chosen = np.arange(min(_MEASURED, len(train)))
    clock = time.monotonic()
    some = train.take(chosen).encode()
    each = (time.monotonic() - clock) / len(chosen)
    phases = [recipe.resolved()]
    if phases[0].context is not None:
        phases.append(phases[0].of_context().resolved())
    steps = [phase.training.epochs * steps_per_epoch(phase, len(train)) for phase in phases]
    training = sum(
        count * _seconds_a_step(base, phase, some, sets.train.labels[chosen], sets.train.classes)
        for count, phase in zip(steps, phases, strict=True)
    )
    passes = sum(len(part) * (1 + part.views) for part in features.values())
    counts = ", ".join(f"{len(pictures):,} for {name}" for name, pictures in sets.as_dict().items())
    parameters = new_prompt(recipe, PromptTower(base), train.patch_width, len(sets.train.classes)).trained_parameters
    total = sum(parameter.numel() for parameter in base.model.parameters())
    share = f"{100 * parameters / total:.3g}% of the base's {total:,}"
    return "\n".join([
        to_yaml(recipe).rstrip(),
        "",
        f"pictures     {counts}; {len(sets.train.classes):,} classes",
        f"parameters   {parameters:,} trained ({share}), the others frozen",
        f"cache        {sum(part.nbytes for part in features.values()) / 1e9:.2f} GB in {cache_home() / 'features'}",
        f"free         {room(recipe, features)} on its disk",
        f"time         {about(passes * each)} to encode once, {about(training)} to train ({sum(steps):,} steps), "
        "without the start of class vectors and validation",
    ])  # fmt: skip


def _seconds_a_step(
    base: DualEncoder, recipe: PromptRecipe, some: Pictures, labels: np.ndarray, classes: Sequence[str]
) -> float:
    tower = PromptTower(base)
    prompt = new_prompt(recipe, tower, 0 if some.tokens is None else some.tokens.shape[-1], len(classes))
    at = np.arange(recipe.training.batch_size) % len(labels)
    tokens, mask = (None if part is None else part[at] for part in some[1:])
    batch = Pictures(some.embeddings[at], tokens, mask)
    task, _ = new_task(recipe, tower, prompt, classes, lambda *_: batch, labels)
    seconds = []
    for _ in range(2):  # the first allocates
        clock = time.monotonic()
        with fast_training(recipe.training.precision, base.device):
            torch.stack(list(task.step((at, np.zeros_like(at))).values())).sum().backward()
        seconds.append(time.monotonic() - clock)
    return min(seconds)


def save(
    recipe: PromptRecipe, base: DualEncoder, sets: LabelledSets, fitted: FittedPrompt, outcome: dict[str, Any]
) -> None:
    """Write the adapted folder."""
    base.name = portable(base.name)
    metrics = {
        f"{name} {key}": value for name in ("validation", "test") for key, value in outcome.get(name, {}).items()
    }
    save_prompt(
        recipe.out,
        fitted.prompt,
        base=base,
        classes=fitted.classes,
        templates=fitted.templates,
        class_scale=fitted.class_scale,
        recipe=to_mapping(recipe),
        data={
            "digest": sets.train.digest,
            "pictures": outcome["pictures"],
            "unusable": len(sets.train.dropped),
        },
        metrics=metrics,
        card=model_card(recipe, fitted, outcome, metrics),
    )


def model_card(
    recipe: PromptRecipe, fitted: FittedPrompt, outcome: dict[str, Any], metrics: dict[str, float]
) -> str:  # fmt: skip
    """What a reader of the folder wants to know first."""
    name = Path(recipe.out).name
    figures = "\n".join(f"| {key} | {value:.3g} |" for key, value in metrics.items())
    some = ", ".join(fitted.classes[:10]) + (
        f" and {len(fitted.classes) - 10} more" if len(fitted.classes) > 10 else ""
    )
    return f"""{card_head(["clip", "prompt", recipe.method], models=[recipe.base])}
# {name}

Prompts for the frozen base `{shown_name(recipe.base)}`, learned from {outcome["pictures"]["train"]:,} labelled
pictures of {len(fitted.classes):,} classes: {some}. This folder holds what was learned alone
({outcome["trained_parameters"]:,} numbers); the base is loaded from its own place and checked by its fingerprint.

```python
import trimtab
classifier = trimtab.load("{name}").classifier()
classifier.predict(["picture.jpg"], top_k=3)
classifier.add_classes(["another class"])  # by name alone, without training
```

## Figures ({outcome["steps"]} steps, seed {recipe.seed})

| figure | value |
|---|---|
{figures}

`top1` and `zero_shot` (the hand templates) are percent of pictures, `loss` is the mean of minus the logarithm of the
true class's score. Scores were calibrated on validation, so its loss looks better than that of other pictures.

## Limits

It knows its classes from few pictures. It answers with one of them for every picture, also for one that shows none.
"""
