"""READ THIS FIRST. From a recipe to an adapted folder: `adapt` is all of Trimtab on one page.

    recipe -> pairs -> frozen features, cached -> adapter, trained on them -> adapted folder

Each link has a module beside this one; `LINKS` says which.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trimtab.config import Recipe, load_recipe, recipe_from_mapping, to_mapping
from trimtab.errors import RecipeError
from trimtab.recipes.domain import adapt_domain
from trimtab.recipes.language import adapt_language
from trimtab.recipes.prompt import adapt_prompt
from trimtab.training.checkpoint import own_generators
from trimtab.training.distributed import explain_lost_processes
from trimtab.training.trackers import check_trackers

LINKS: dict[str, Callable[..., dict[str, Any] | None]] = {
    "language": adapt_language,
    "domain": adapt_domain,
    "prompt": adapt_prompt,
}


def adapt(
    recipe: Recipe | Mapping[str, Any] | str | Path, overrides: Sequence[str] = (), *, dry_run: bool = False
) -> dict[str, Any] | None:
    """Train what the recipe describes and write the adapted folder, or go on where an earlier run stopped.

    Args:
        recipe: a recipe, a mapping as its YAML file would hold, or the path of that file.
        overrides: `key=value` texts on top of it.
        dry_run: print the resolved recipe, parameter counts, cache size and time, and train nothing.

    Returns:
        What happened: the folder, validation figures, counts, durations. None on processes other than the main one.

    Raises:
        TrimtabError: anything the user can mend; see `trimtab.errors`.
    """
    recipe = _resolved(recipe, overrides)
    check_trackers(recipe.training.trackers)
    atexit.unregister(_part)
    atexit.register(_part)
    with own_generators(), explain_lost_processes():
        outcome = LINKS[recipe.link](recipe, dry_run=dry_run)
        if _in_company():
            dist.barrier()  # the main process still writes when the others are done: none leaves before it
    return outcome


def _resolved(recipe: Recipe | Mapping[str, Any] | str | Path, overrides: Sequence[str]) -> Recipe:
    if isinstance(overrides, str):
        raise RecipeError(f"overrides are a list of key=value texts, not one text {overrides!r:.60}")
    if isinstance(recipe, (str, Path)):
        return load_recipe(recipe, overrides)
    if isinstance(recipe, Mapping):
        return recipe_from_mapping(dict(recipe), "the recipe", overrides)
    return recipe_from_mapping(to_mapping(recipe), "the recipe", overrides) if overrides else recipe


def _part() -> None:
    """Part from the other processes in good order; else a thread that waits for them may abort a finished program."""
    if _in_company():
        dist.destroy_process_group()


def _in_company() -> bool:
    return dist.is_available() and dist.is_initialized()
