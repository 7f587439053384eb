"""A toy domain: pictures of two colours with captions, and a recipe that learns them in a second.

As a script it adapts a recipe, and may send itself a signal at the start of a training step:
``python tiny_domain.py RECIPE.yaml [STEP SIGKILL]``.
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
from trimtab.config import DomainRecipe, recipe_from_mapping

# Every word is in the vocabulary of the tiny BERT.
CAPTIONS = [f"a {first} car on the {second} road" for first in COLOURS for second in COLOURS if first != second]


def picture(number: int) -> Image.Image:
    """The upper half has one colour and the lower half another, with noise that differs for every number."""
    colours = [(a, b) for a in COLOURS.values() for b in COLOURS.values() if a != b]
    halves = [np.broadcast_to(np.array(one), (20, 40, 3)) for one in colours[number % len(colours)]]
    return noisy(np.concatenate(halves), number, 25)


def write_pairs(folder: Path, count: int, *, first: int = 0, name: str = "pairs.csv") -> Path:
    """Pictures and their table."""
    numbers = range(first, first + count)
    return write_pictures(folder, numbers, picture, lambda at: CAPTIONS[at % len(CAPTIONS)], name)


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


if __name__ == "__main__":
    path, *when = sys.argv[1:]
    if when:
        from trimtab.tasks.domain import DomainTask

        signal_at(DomainTask, int(when[0]), getattr(signal, when[1]))
    sys.argv[1:] = ["adapt", path]
    from trimtab.cli import main

    main()
