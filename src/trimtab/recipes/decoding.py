"""How recipes read pictures: each is decoded once before anything is computed, which takes a while the first time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from trimtab.files import cache_home
from trimtab.training.trackers import progress_reporter


@contextlib.contextmanager
def decoding() -> Iterator[dict[str, Any]]:
    """Options for `load_pairs` and `load_labelled`: progress is shown, and what was decoded is noted in the cache."""
    with progress_reporter("decoding", "pictures") as report:
        yield {"notes": cache_home() / "pictures", "progress": report}
