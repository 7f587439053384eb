"""What a run of the domain link would do, for `--dry-run`: sizes from shapes, times from a few measured items."""

from __future__ import annotations

import math
import time

import numpy as np
from torch import Tensor

from trimtab.config import DomainRecipe, to_yaml
from trimtab.data.sampling import pairs_per_epoch
from trimtab.files import cache_home
from trimtab.precision import fast_inference, fast_training
from trimtab.recipes.domain_methods import Method
from trimtab.recipes.domain_pairs import DomainPairs
from trimtab.recipes.domain_states import FrozenStates, ImageStates, TextStates
from trimtab.recipes.estimates import about
from trimtab.recipes.folders import training_folder
from trimtab.tasks.domain import Side

_MEASURED = 16
_GATES = {
    "none": "none: every picture is adapted",
    "soft": "soft: adapters fade out for pictures that do not look like the domain",
    "hard": "hard: pictures that do not look like the domain are left to the base",
}


def plan(recipe: DomainRecipe, pairs: DomainPairs, method: Method, frozen: FrozenStates, asked: int) -> str:
    """The resolved recipe, what is trained and cached, and how long it takes.

    Args:
        asked: epochs that the recipe asks for; `least_steps` may have made them more.
    """
    train, validation = pairs.train, pairs.validation
    total = method.base_parameters
    lower_image, passed_image, upper_image = _seconds(method, frozen.image_side, frozen.images)
    lower_text, passed_text, upper_text = _seconds(method, frozen.text_side, frozen.texts)
    views = len(train.images) * (1 + recipe.data.views) + len(validation.images)
    encoding = views * lower_image + (len(train.captions) + len(validation.captions)) * lower_text
    drawn = pairs_per_epoch(len(train), recipe.bank.epoch_share, recipe.training.batch_size)
    size = recipe.training.batch_size
    negatives = recipe.objective.hard_negatives if recipe.bank.enabled else 0
    texts = min(size + negatives, len(train.captions)) / size  # captions that a pair of a batch adds
    step = upper_image + texts * upper_text
    whole = step + lower_image + texts * lower_text
    epochs = recipe.training.epochs
    looks = math.ceil(epochs / recipe.training.validate_every)
    look = len(validation.images) * passed_image + len(validation.captions) * passed_text
    kept = min(recipe.memory, len(train.images)) if recipe.method == "adapter" else 0
    longer = f", {recipe.least_steps} steps at least" if epochs > asked else ""
    in_use = 4 * (total + (3 + _averages(recipe)) * method.trained_parameters)
    lines = [
        to_yaml(recipe).rstrip(),
        "",
        f"pairs        {len(train):,} to train on ({len(train.images):,} pictures, {len(train.captions):,} captions), "
        f"{len(validation):,} for validation",
        f"parameters   {method.trained_parameters:,} trained ({100 * method.trained_parameters / total:.3g}% of the "
        f"base's {total:,}), the others frozen",
        f"image tower  {_where(frozen.image_side)}",
        f"text tower   {_where(frozen.text_side)}",
        *([f"gate         {_GATES[recipe.gate.kind]}"] if recipe.method == "adapter" else []),
        *([f"memory       up to {kept:,} training pictures with their captions"] if kept else []),
        f"cache        {frozen.nbytes / 1e9:.2f} GB in {cache_home() / 'features'}",
        f"free         {frozen.room()} on its disk",
        f"checkpoints  {checkpoint_bytes(recipe, pairs, method) / 1e9:.2f} GB each at most, two of them in "
        f"{training_folder(recipe.out)}",
        f"in memory    {in_use / 1e9:.2f} GB for weights, gradients and moments; what a batch takes comes on top",
    ]
    if frozen.image_side.cut or frozen.text_side.cut:
        lines.append(f"step         {100 * step / whole:.0f}% of the time that it would take without the cache")
    lines.append(
        f"time         {about(encoding)} to encode once, {about(epochs * drawn * step)} to train "
        f"({epochs} epochs of {drawn:,} pairs{longer}), {about(looks * look)} to validate ({looks} times)"
    )
    return "\n".join(lines)


def checkpoint_bytes(recipe: DomainRecipe, pairs: DomainPairs, method: Method) -> int:
    """Of weights, their two moments, the best of them and a mean if there is one; and of the captions in the bank."""
    captions = len(pairs.train.captions) * method.base.embedding_dim if recipe.bank.enabled else 0
    return 4 * ((4 + _averages(recipe)) * method.trained_parameters + captions)


def _averages(recipe: DomainRecipe) -> bool:
    return recipe.training.ema is not None or recipe.training.bell is not None


def _where(side: Side) -> str:
    if side.cut is None:
        every_time = "pictures are decoded" if side.tower == "image" else "captions are read"
        return f"trained throughout: nothing is cached, {every_time} in every step"
    if side.cut.site is None:
        return "frozen: its features are cached"
    return f"frozen below {side.cut.site}: the states that enter it are cached"


def _seconds(method: Method, side: Side, states: ImageStates | TextStates) -> tuple[float, float, float]:
    """Per item: to compute what is cached, to pass it on, and to train on it."""
    # The first time around buffers are allocated and kernels chosen.
    once, again = (_measured(method, side, states) for _ in range(2))
    lower, passed, trained = map(min, once, again)
    return lower, passed, trained


def _measured(method: Method, side: Side, states: ImageStates | TextStates) -> tuple[float, float, float]:
    device = side.base.device
    clock = time.monotonic()
    inputs = states.inputs(np.arange(min(_MEASURED, len(states))))
    count = len(next(iter(inputs.values())))
    with fast_inference(device):
        below: dict[str, Tensor] = side.cut.lower(inputs) if side.cut else inputs
    decoded = time.monotonic() - clock
    clock = time.monotonic()
    with method.at_work(), fast_training(method.recipe.training.precision, device):
        tokens = inputs if side.tower == "text" else None
        features = side.upper({name: _as_cached(one) for name, one in below.items()}, tokens)
        passed = time.monotonic() - clock
        if features.requires_grad:
            features.sum().backward()
    for parameter in method.parameters():
        parameter.grad = None
    trained = time.monotonic() - clock
    # Without a cache what comes in is decoded each time.
    lower, every_time = (decoded, 0.0) if side.cut else (0.0, decoded)
    return lower / count, (every_time + passed) / count, (every_time + trained) / count


def _as_cached(one: Tensor) -> Tensor:
    """A copy to train on, in fp32 as the cache gives it."""
    return one.float().clone() if one.is_floating_point() else one.clone()
