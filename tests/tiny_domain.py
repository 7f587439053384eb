"""A toy domain: pictures of two colours with captions, and a recipe that learns them in a second.

As a script it adapts a recipe, and may send itself a signal at the start of a training step:
``python tiny_domain.py RECIPE.yaml [STEP SIGKILL]``.
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
from trimtab.config import DomainRecipe, recipe_from_mapping

# Every word is in the vocabulary of the tiny BERT.
COLOURS = {"red": (200, 30, 30), "yellow": (220, 210, 40), "blue": (30, 60, 200), "green": (40, 160, 60)}
CAPTIONS = [f"a {first} car on the {second} road" for first in COLOURS for second in COLOURS if first != second]


def picture(number: int) -> Image.Image:
    """The upper half has one colour and the lower half another, with noise that differs for every number."""
    colours = [(a, b) for a in COLOURS.values() for b in COLOURS.values() if a != b]
    noise = np.random.default_rng(number)
    halves = [np.broadcast_to(np.array(one), (20, 40, 3)) for one in colours[number % len(colours)]]
    pixels = np.concatenate(halves) + noise.integers(-25, 25, (40, 40, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_pairs(folder: Path, count: int, *, first: int = 0, name: str = "pairs.csv") -> Path:
    """Pictures and their table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(first, first + count):
        picture(number).save(folder / f"{number:03d}.png")
        rows.append((f"{number:03d}.png", CAPTIONS[number % len(CAPTIONS)]))
    return tiny_pairs.write_table(folder / name, rows)


def toy_mapping(base: Path, train: Path, validation: Path, out: Path) -> dict[str, Any]:
    """A recipe as it would stand in a YAML file."""
    return {
        "link": "domain",
        "base": str(base),
        "out": str(out),
        "data": {"train": str(train), "validation": str(validation), "views": 1},
        "adapters": [{"tower": "image", "width": 8}, {"tower": "text", "first": -1, "width": 8}],
        "lora": {"rank": 4, "alpha": 8},
        "objective": {"learn_logit_scale": True},
        "bank": {"epoch_share": 0.5},
        "training": {"epochs": 12, "batch_size": 12, "learning_rate": 2e-2, "log_every": 2, "trackers": []},
    }


def toy_recipe(*places: Path, **changes: Any) -> DomainRecipe:
    recipe = recipe_from_mapping(merged(toy_mapping(*places), changes), "toy")
    assert isinstance(recipe, DomainRecipe)
    return recipe


def signal_at(step: int, number: int) -> None:
    """Have this process send itself a signal at the start of a training step."""
    from trimtab.tasks.domain import DomainTask

    original, calls = DomainTask.step, 0

    @functools.wraps(original)
    def counted(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), number)
        return original(self, batch)

    DomainTask.step = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    path, *when = sys.argv[1:]
    if when:
        signal_at(int(when[0]), getattr(signal, when[1]))
    sys.argv[1:] = ["adapt", path]
    from trimtab.cli import main

    main()
