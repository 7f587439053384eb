"""How much of a cache is on disk already, for plans: nothing is computed, written or locked."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from trimtab.data.segments import DTYPES, UNREADABLE, Layout, Segment, cache_key, item_digests


def cached_count(
    folder: str | Path, kind: Literal["states", "arrays"], key_parts: Sequence[str], items: Sequence[str]
) -> int:
    """How many different items of those given the cache holds in whole segments.

    Args:
        folder, key_parts, items: as for `trimtab.data.cache.cached_states` and `cached_arrays`.
    """
    wanted = item_digests(dict.fromkeys(items))
    found = np.zeros(len(wanted), bool)
    for dtype in DTYPES:  # what float16 could not hold is in float32
        for path in (Path(folder) / cache_key(Layout(kind, dtype), key_parts)).glob("[0-9]*"):
            with contextlib.suppress(*UNREADABLE):
                found |= np.isin(wanted, Segment(path).digests)
    return int(found.sum())
