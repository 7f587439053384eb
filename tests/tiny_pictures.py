"""What the toys of the domain and the prompt link share: colours whose names the tiny BERT knows, tables, signals."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import tiny_pairs

COLOURS = {"red": (200, 30, 30), "yellow": (220, 210, 40), "blue": (30, 60, 200), "green": (40, 160, 60)}


def noisy(pixels: np.ndarray, number: int, strength: int) -> Image.Image:
    """Pixels (40, 40, 3) with noise that differs for every number."""
    noise = np.random.default_rng(number).integers(-strength, strength, (40, 40, 3))
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def write_pictures(
    folder: Path,
    numbers: Sequence[int],
    picture: Callable[[int], Image.Image],
    text: Callable[[int], str],
    name: str,
    **options: Any,
) -> Path:
    """Pictures and their table."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture(number).save(folder / f"{number:03d}.png")
    rows = [(f"{number:03d}.png", text(number)) for number in numbers]
    return tiny_pairs.write_table(folder / name, rows, **options)


def signal_at(task: type, step: int, number: int) -> None:
    """Have this process send itself a signal at the start of a step of a task."""
    original, calls = task.step, 0  # type: ignore[attr-defined]

    @functools.wraps(original)
    def counted(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), number)
        return original(self, batch)

    task.step = counted  # type: ignore[attr-defined]
