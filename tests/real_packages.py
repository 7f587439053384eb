"""Tests on the fetched third-party packages run where these are in the cache, and nowhere fetch anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

from trimtab.data.packages import PACKAGES
from trimtab.files import cache_home

Test = TypeVar("Test", bound=Callable[..., None])


def needs(*keys: str) -> Callable[[Test], Test]:
    """Mark a test as one of the given packages; it is skipped unless all of them were fetched before."""
    folders = {key: f"{key}-{PACKAGES[key].version.replace(':', '_')}" for key in keys}
    absent = [key for key in keys if not (cache_home() / "packages" / folders[key] / ".complete").exists()]
    skip = pytest.mark.skipif(bool(absent), reason=f"not fetched: {', '.join(absent)}")
    return lambda test: pytest.mark.packages(skip(test))
