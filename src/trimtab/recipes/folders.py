"""Where a run writes, checked before it works for hours."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trimtab.adapters.files import CARD_FILE, DESCRIPTION_FILE, TENSORS_FILE, is_adapted_folder
from trimtab.config import MapViewsConfig, Recipe, to_mapping
from trimtab.errors import RecipeError
from trimtab.files import digest_of, write_text

ADAPTED_FILES = (DESCRIPTION_FILE, TENSORS_FILE, CARD_FILE)


def training_folder(out: str) -> Path:
    """Checkpoints and logs: beside the adapted folder, which holds only what is deployed."""
    return Path(f"{out.rstrip('/')}.training")


def recipe_digest(recipe: Recipe) -> str:
    """Names what decides the weights: not where they are written, nor how often something is saved or logged, nor
    what is only measured."""
    mapping = used(recipe)
    for name in ("out", "general", "alphas"):
        mapping.pop(name, None)
    for name in ("checkpoint_every", "log_every", "trackers", "processes"):
        del mapping["training"][name]
    return digest_of(str(mapping))


def used(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a mapping, without options that came after the first runs were named by theirs and are not used:
    so those names stay as they were."""
    mapping: dict[str, Any] = to_mapping(recipe)
    training = mapping["training"]
    later = (
        (mapping, "context", None),
        (mapping, "least_steps", 0),
        (mapping, "memory", 0),
        (mapping["data"], "map_augmentation", to_mapping(MapViewsConfig())),
        (training, "validate_every", 1),
        (training, "bell", None),
        (training, "optimizer", "adamw"),
        (mapping.get("adapter", {}), "memory", 0),
    )
    for part, name, unused in later:
        if part.get(name) == unused:
            part.pop(name, None)
    for source in (*mapping["data"]["train"], *mapping["data"]["validation"]):
        if source.get("templates", ()) is None:  # was the default; which captions came of it the pairs say
            source["templates"] = ["a photo of a {}"]
    return mapping


def check_out(out: str, own_files: Collection[str] | None = ADAPTED_FILES) -> None:
    """Refuse, before any work, a folder that could not be written at the end or that holds something else.

    Args:
        own_files: names of the files of an adapted folder, which may be written over; None for a whole model, which
            is written to a new or empty folder, or over what the same run wrote there before (see `claim`).

    Raises:
        RecipeError: `out` is a file, cannot be written, or is a folder of other things.
    """
    folder = Path(out).absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir():
        raise RecipeError(f"out={out}: {place} is a file; choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RecipeError(
            f"out={out}: {place} cannot be written (read-only, or permission denied); choose another folder"
        )
    own = is_adapted_folder(folder) if own_files is not None else _claim(out).exists()
    if place == folder and not own:
        names = own_files or ()
        others = [p.name for p in folder.iterdir() if p.name not in names and not p.name.startswith(".")]
        if others:
            raise RecipeError(f"out={out} holds other files ({min(others)} ...); choose a folder of its own")


def claim(out: str) -> None:
    """Note beside `out` that this run is about to write a whole model there, so that it may do so again."""
    write_text(_claim(out), "This run writes a model to the folder beside this one.\n")


def _claim(out: str) -> Path:
    return training_folder(out) / "writes-out"
