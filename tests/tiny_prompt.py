"""A toy classification: pictures of one colour, their table, and a recipe that learns them in a second.

As a script it adapts a recipe, and may send itself a signal at the start of a training step:
``python tiny_prompt.py RECIPE.yaml [STEP SIGKILL]``.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tiny_language import merged
from tiny_pictures import COLOURS, noisy, signal_at, write_pictures
from trimtab.config import PromptRecipe, recipe_from_mapping

NAMES = list(COLOURS)


def picture(number: int) -> Image.Image:
    """One colour, with noise that differs for every number."""
    colour = COLOURS[NAMES[number % len(NAMES)]]
    return noisy(np.broadcast_to(np.array(colour), (40, 40, 3)), number, 60)


def write_labelled(folder: Path, count: int, *, first: int = 0, name: str = "items.csv") -> Path:
    """Pictures and their table with the columns image and label."""
    numbers, columns = range(first, first + count), ("image", "label")
    return write_pictures(folder, numbers, picture, lambda at: NAMES[at % len(NAMES)], name, columns=columns)


def toy_mapping(base: Path, train: Path, out: Path) -> dict[str, Any]:
    """A recipe as it would stand in a YAML file."""
    return {
        "link": "prompt",
        "base": str(base),
        "out": str(out),
        "data": {"train": str(train), "shots": 4, "views": 1},
        "prompt": {"general": {"init": "photo of a"}, "instance": {"width": 8, "heads": 2, "top_k": 2}},
        "steps": 24,
        "training": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-2, "log_every": 4, "trackers": []},
    }


def toy_recipe(base: Path, train: Path, out: Path, **changes: Any) -> PromptRecipe:
    recipe = recipe_from_mapping(merged(toy_mapping(base, train, out), changes), "toy")
    assert isinstance(recipe, PromptRecipe)
    return recipe


if __name__ == "__main__":
    from trimtab.recipes.adapt import adapt

    recipe_file, *rest = sys.argv[1:]
    if rest:
        from trimtab.tasks.prompt import PromptTask

        signal_at(PromptTask, int(rest[0]), getattr(signal, rest[1]))
    adapt(recipe_file)
