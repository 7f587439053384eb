"""Fit prompts to features that are there already: one run of many, or the heart of `trimtab.recipes.prompt`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.adapters.prompt import Pictures, PromptedClasses, StructuredPrompt
from trimtab.config import PromptRecipe
from trimtab.data.templates import default_context, default_templates
from trimtab.evaluation.ranking import TIE
from trimtab.objectives.class_vectors import best_factor, solve_vectors
from trimtab.recipes.prompt_features import PictureFeatures
from trimtab.tasks.prompt import Batch, PromptTask
from trimtab.towers.classifier import check_class_names, class_vectors, softmax
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.prompting import PromptTower
from trimtab.training.checkpoint import CheckpointFolder
from trimtab.training.loop import train
from trimtab.training.run import Selection

_ORDER_STREAM, _VIEW_STREAM = 5, 6  # so that orders, views and shots are drawn independently
_EVALUATED_AT_ONCE = 64
_CONTEXT = "context"  # folder of the checkpoints of tokens that learn first
# What class vectors are solved with, the strongest penalty first.
_PENALTIES = (0.3, 0.03, 0.003, 0.0003)
_TEXT_WEIGHTS = (0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True, eq=False)
class LabelledFeatures:
    """Features of N pictures with their labels (N,)."""

    features: PictureFeatures
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(eq=False)
class FittedPrompt:
    """A prompt as it was kept.

    Attributes:
        task: holds the prompted classes, in eval mode.
        class_scale: multiplies scores before the softmax: as trained with, or fitted on validation.
        validation: figures of the kept weights on validation; empty without.
        history: records of training.
        steps: optimiser steps.
        seconds: in all, without the encoding of pictures.
    """

    task: PromptTask
    class_scale: float
    templates: tuple[str, ...]
    validation: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0

    @property
    def prompt(self) -> StructuredPrompt:
        """What was trained."""
        return self.task.classes.prompt

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        return self.task.classes.names

    def logits(self, pictures: PictureFeatures | Pictures) -> np.ndarray:
        """Calibrated logits (N, C) float32."""
        found = logits(self.task, pictures)
        return (self.class_scale / self.task.logit_scale * found).float().cpu().numpy()

    def scores(self, pictures: PictureFeatures | Pictures) -> np.ndarray:
        """Calibrated probabilities (N, C) float32."""
        return softmax(self.logits(pictures))

    def figures(self, pictures: LabelledFeatures) -> dict[str, float]:
        """Top-1 in percent, and the loss of the scores as they were calibrated on validation."""
        found, labels = torch.from_numpy(self.logits(pictures.features)), torch.from_numpy(pictures.labels)
        top1 = right(found, labels, self.class_scale)
        return {"top1": top1, "loss": float(F.cross_entropy(found, labels))}

    def top1(self, pictures: LabelledFeatures) -> float:
        """Percent of pictures whose class scores highest."""
        return self.figures(pictures)["top1"]


def check_checkpoints(recipe: PromptRecipe, checkpoints: Path, digest: str) -> None:
    """Refuse what `fit_prompt` would refuse to resume once features are there; arguments as for it.

    Raises:
        RecipeError: the checkpoints are of another recipe.
    """
    if recipe.resolved().context is not None:
        CheckpointFolder(checkpoints / _CONTEXT).check(_of_context(digest))
    CheckpointFolder(checkpoints).check(digest)


def _of_context(digest: str) -> str:
    return f"{digest} context"


def fit_prompt(
    base: DualEncoder,
    recipe: PromptRecipe,
    train_set: LabelledFeatures,
    validation_set: LabelledFeatures | None,
    classes: Sequence[str],
    seed: int = 0,
    *,
    checkpoints: Path | None = None,
    digest: str = "fit",
    run_config: Mapping[str, Any] | None = None,
    show_progress: bool = False,
    last: bool = True,
) -> FittedPrompt:
    """Train what `recipe.method` says on features, whatever the recipe's own data are.

    Args:
        train_set, validation_set: with features that were filled, of the same base.
        classes: C names, all different; labels are their numbers.
        seed: of starts, orders and views.
        checkpoints: folder to keep checkpoints in and to resume from; None keeps none.
        digest: names recipe and data in checkpoints.
        last: see `trimtab.training.loop.train`.

    Raises:
        DataError: class names that cannot be used.
        RecipeError: parts that do not go with this base.
        TrainingStopped: see `trimtab.training.loop.train`.
    """
    started = time.monotonic()
    names = check_class_names(classes)
    tower = PromptTower(base)
    recipe = settled(recipe.resolved(), names, tower.layers)
    prompt = new_prompt(recipe, tower, train_set.features.patch_width, len(names), seed)
    if recipe.context is not None:
        first = fit_prompt(
            base,
            recipe.of_context(),
            train_set,
            validation_set,
            names,
            seed,
            checkpoints=checkpoints and checkpoints / _CONTEXT,
            digest=_of_context(digest),
            show_progress=show_progress,
            last=False,
        )
        prompt.general.data.copy_(first.prompt.general.data)
    task, templates = new_task(recipe, tower, prompt, names, train_set.features.pictures, train_set.labels)
    if prompt.vectors() and recipe.prompt.domain.solve:
        start_vectors(task, recipe, train_set, validation_set)
    settings = recipe.training
    batch_size = min(settings.batch_size, len(train_set))
    per_epoch = steps_per_epoch(recipe, len(train_set))

    def epoch_batches(epoch: int) -> list[Batch]:
        views = train_set.features.views
        return draw_batches(len(train_set), batch_size, per_epoch, views, seed=seed, epoch=epoch)

    result = train(
        task.step,
        task,
        epoch_batches,
        steps_per_epoch=per_epoch,
        settings=replace(settings, batch_size=batch_size),
        checkpoint_dir=checkpoints,
        digest=digest,
        seed=seed,
        validate=(lambda _: validate(task, validation_set)) if validation_set else None,
        select=_SELECTIONS[recipe.select] if validation_set else None,
        run_config=run_config,
        show_progress=show_progress,
        last=last,
    )
    task.eval()
    fitted = FittedPrompt(task, task.logit_scale, templates, history=result.history, steps=result.steps)
    if validation_set:
        found = logits(task, validation_set.features)
        labels = torch.from_numpy(validation_set.labels).to(found.device)
        fitted.class_scale = task.logit_scale * best_factor(found, labels, cautious=True)
        fitted.validation = figures(found, labels, task.logit_scale)
    fitted.seconds = time.monotonic() - started
    return fitted


def settled(recipe: PromptRecipe, names: Sequence[str], layers: int) -> PromptRecipe:
    """The recipe with what it leaves to names and base: a context in their script, and a layer counted from the end.

    Args:
        layers: of the base's text tower. What it does not have is left for `new_prompt` to refuse.
    """
    general, instance = recipe.prompt.general, recipe.prompt.instance
    if general.init == "auto":
        general = replace(general, init=default_context(names))
    if instance is not None and -layers <= instance.layer < 0:
        instance = replace(instance, layer=instance.layer + layers)
    return replace(recipe, prompt=replace(recipe.prompt, general=general, instance=instance))


def new_prompt(
    recipe: PromptRecipe, tower: PromptTower, patch_width: int, classes: int, seed: int = 0
) -> StructuredPrompt:
    """The parts that the recipe's method leaves, untrained.

    Raises:
        RecipeError: parts that do not go with the tower.
    """
    config = recipe.resolved().prompt
    return StructuredPrompt(config, tower, patch_width=patch_width, classes=classes, seed=seed).to(tower.device)


def new_task(
    recipe: PromptRecipe,
    tower: PromptTower,
    prompt: StructuredPrompt,
    names: Sequence[str],
    lookup: Callable[[np.ndarray, np.ndarray], Pictures],
    labels: np.ndarray,
) -> tuple[PromptTask, tuple[str, ...]]:
    """What is trained, in its objective, and the hand templates that it is compared with."""
    base = tower.base
    templates = recipe.templates or tuple(default_templates(names)[1])
    task = PromptTask(
        PromptedClasses(tower, prompt, names),
        lookup=lookup,
        labels=labels,
        templates=torch.from_numpy(class_vectors(base, names, templates)),
        objective=recipe.objective,
        logit_scale=recipe.objective.logit_scale or base.logit_scale,
    )
    return task.to(base.device), templates


def steps_per_epoch(recipe: PromptRecipe, pictures: int) -> int:
    """Optimiser steps of each epoch with so many training pictures."""
    settings = recipe.training
    batch_size = min(settings.batch_size, pictures)
    return math.ceil((recipe.steps or settings.epochs * pictures / batch_size) / settings.epochs)


_SELECTIONS = {
    "last": None,
    "top1": Selection("top1", with_start=True),
    "loss": Selection("loss", greater_is_better=False, with_start=True),
}


def draw_batches(count: int, batch_size: int, steps: int, views: int, *, seed: int, epoch: int) -> list[Batch]:
    """Positions (B,) of pictures in random order, each once before any comes again, and a view of each (B,)."""
    rng = np.random.default_rng([seed, epoch, _ORDER_STREAM])
    passes = math.ceil(steps * batch_size / count)
    items = np.concatenate([rng.permutation(count) for _ in range(passes)])[: steps * batch_size]
    chosen = np.random.default_rng([seed, epoch, _VIEW_STREAM]).integers(0, views + 1, (steps, batch_size))
    return list(zip(items.reshape(steps, batch_size), chosen, strict=True))


@torch.no_grad()
def logits(task: PromptTask, pictures: PictureFeatures | Pictures) -> Tensor:
    """(N, C) at the scale of training, of pictures as they are."""
    embeddings = task.classes.embeddings()
    if isinstance(pictures, Pictures):
        return task.logits(pictures, embeddings)
    size = _EVALUATED_AT_ONCE if task.classes.prompt.instance else max(1, len(pictures))
    parts = [
        task.logits(pictures.pictures(slice(start, start + size)), embeddings)
        for start in range(0, len(pictures), size)
    ]
    return torch.cat(parts)


def validate(task: PromptTask, pictures: LabelledFeatures) -> dict[str, float]:
    """`figures` of pictures that no training saw."""
    found = logits(task, pictures.features)
    return figures(found, torch.from_numpy(pictures.labels).to(found.device), task.logit_scale)


def figures(found: Tensor, labels: Tensor, scale: float = 1.0) -> dict[str, float]:
    """Top-1 in percent, and the loss at the factor with the least: of pictures that choices are made by; `scale` as for
    `ahead`."""
    return {
        "top1": right(found, labels, scale),
        "loss": float(F.cross_entropy(best_factor(found, labels) * found, labels)),
    }


def right(logits: Tensor, labels: Tensor, scale: float = 1.0) -> float:
    """Percent of the rows (N, C) whose own class is above all others; `scale` as for `ahead`."""
    return 100 * int(ahead(logits, labels, scale).sum()) / len(labels)


def ahead(logits: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    """(N,) whether a row's own class is above all others: a tie is wrong.

    Args:
        scale: what cosines were multiplied with to give the logits: they tie as in `trimtab.evaluation.ranking`.
    """
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (own - TIE * scale > others.max(1, keepdim=True).values)[:, 0]


def start_vectors(
    task: PromptTask, recipe: PromptRecipe, train_set: LabelledFeatures, validation_set: LabelledFeatures | None
) -> None:
    """Set class vectors to those that fit the pictures best with the untrained prompt.

    Validation chooses the penalty first and then the weight of the text, by top-1 and, of equal ones, by loss.
    """
    prompt, scale = task.classes.prompt, task.logit_scale
    views = range(1 + train_set.features.views)
    inputs, cosines = zip(*(_read(task, train_set.features, view) for view in views), strict=True)
    labels = torch.from_numpy(train_set.labels).to(task.labels.device)

    def solve(weight: float, penalty: float, views: int, start: Tensor | None) -> Tensor:
        return solve_vectors(
            torch.cat(inputs[:views]),
            labels.repeat(views),
            scale * weight * torch.cat(cosines[:views]),
            scale=scale,
            penalty=penalty,
            start=start,
        )

    given = recipe.objective.residual
    weight, penalty = 1.0, _PENALTIES[1] if given is None else given
    vectors: Tensor | None = None
    if validation_set is not None:
        held, held_cosines = _read(task, validation_set.features, 0)
        held_labels = torch.from_numpy(validation_set.labels).to(held.device)

        def choose(options: Sequence[tuple[float, float]]) -> tuple[float, float]:
            nonlocal vectors
            ranks = {}
            for option in options:
                vectors = solve(*option, 1, vectors)
                found = figures(scale * (option[0] * held_cosines + held @ vectors.T), held_labels, scale)
                ranks[option] = (-found["top1"], found["loss"])
            return min(ranks, key=ranks.__getitem__)

        if given is None:
            weight, penalty = choose([(1.0, one) for one in _PENALTIES])
        weight, penalty = choose([(one, penalty) for one in _TEXT_WEIGHTS])
    prompt.set_vectors(solve(weight, penalty, len(views), vectors))
    prompt.text_weight.fill_(weight)
    task.penalty = penalty


@torch.no_grad()
def _read(task: PromptTask, pictures: PictureFeatures, view: int) -> tuple[Tensor, Tensor]:
    """Of all pictures in a view, what class vectors are compared with (N, F), and cosines with classes (N, C)."""
    embeddings = task.classes.embeddings()
    inputs, cosines = [], []
    for start in range(0, len(pictures), _EVALUATED_AT_ONCE):
        some = pictures.pictures(slice(start, start + _EVALUATED_AT_ONCE), view)
        inputs.append(task.classes.prompt.compared(some))
        cosines.append(some.embeddings @ embeddings.T)
    return torch.cat(inputs), torch.cat(cosines)
