"""A toy classification: pictures of one colour, their table, and a recipe that learns them in a second.

As a script it adapts a recipe, and may send itself a signal at the start of a training step:
``python tiny_prompt.py RECIPE.yaml [STEP SIGKILL]``.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import tiny_pairs
from tiny_language import merged
from trimtab.config import PromptRecipe, recipe_from_mapping

# Every word is in the vocabulary of the tiny BERT.
COLOURS = {"red": (200, 30, 30), "yellow": (220, 210, 40), "blue": (30, 60, 200), "green": (40, 160, 60)}
NAMES = list(COLOURS)


def picture(number: int) -> Image.Image:
    """One colour, with noise that differs for every number."""
    noise = np.random.default_rng(number)
    colour = COLOURS[NAMES[number % len(NAMES)]]
    pixels = np.broadcast_to(np.array(colour), (40, 40, 3)) + noise.integers(-60, 60, (40, 40, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_labelled(folder: Path, count: int, *, first: int = 0, name: str = "items.csv") -> Path:
    """Pictures and their table with the columns image and label."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(first, first + count):
        picture(number).save(folder / f"{number:03d}.png")
        rows.append((f"{number:03d}.png", NAMES[number % len(NAMES)]))
    return tiny_pairs.write_table(folder / name, rows, columns=("image", "label"))


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


def signal_at(step: int, number: int) -> None:
    """Have this process send itself a signal at the start of a training step."""
    from trimtab.tasks.prompt import PromptTask

    original, calls = PromptTask.step, 0

    @functools.wraps(original)
    def counted(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), number)
        return original(self, batch)

    PromptTask.step = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    from trimtab.recipes.adapt import adapt

    recipe_file, *rest = sys.argv[1:]
    if rest:
        signal_at(int(rest[0]), getattr(signal, rest[1]))
    adapt(recipe_file)
