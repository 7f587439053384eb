"""What recipes check of themselves."""

from __future__ import annotations

from typing import Any

from trimtab.errors import RecipeError


def require(config: Any, name: str, ok: bool, allowed: str) -> None:
    if not ok:
        raise RecipeError(f"{name}={getattr(config, name)!r} must be {allowed}")
