"""What recipes check of themselves, and the paths in them."""

from __future__ import annotations

import os
from typing import Any

from trimtab.errors import RecipeError


def require(config: Any, name: str, ok: bool, allowed: str) -> None:
    if not ok:
        raise RecipeError(f"{name}={getattr(config, name)!r} must be {allowed}")


def check_run(recipe: Any) -> None:
    """What every recipe has: `base`, `out` and `seed`."""
    require(recipe, "base", bool(recipe.base.strip()), "non-empty text")
    require(recipe, "out", bool(recipe.out.strip()), "the folder to write")
    expand_home(recipe, "base", "out")
    require(recipe, "seed", 0 <= recipe.seed < 2**32, "from 0 to 4294967295")


def expand_home(config: Any, *names: str) -> None:
    """Put the home folder for a leading ``~`` in fields that are paths, lists of paths or None, as shells do."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, tuple):
            object.__setattr__(config, name, tuple(map(_expanded, value)))
        elif value is not None:
            object.__setattr__(config, name, _expanded(value))


def _expanded(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111 - a Path fails where there is no home, and drops a last slash
