"""What a plan says of a cache is what a run finds there."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trimtab.data.cache import cached_states, cached_vectors
from trimtab.data.cached import cached_count


def test_nothing_is_cached_where_there_is_nothing(tmp_path: Path) -> None:
    assert cached_count(tmp_path / "new", "arrays", ["key"], ["a"]) == 0
    assert not (tmp_path / "new").exists()


def test_different_items_of_all_segments_are_counted(tmp_path: Path) -> None:
    for some in (["a", "b"], ["b", "c"]):
        cached_vectors(tmp_path, ["key"], some, lambda texts: np.ones((len(texts), 2)))
    assert cached_count(tmp_path, "arrays", ["key"], ["a", "c", "c", "d"]) == 2
    assert cached_count(tmp_path, "arrays", ["other"], ["a", "c"]) == 0
    assert cached_count(tmp_path, "states", ["key"], ["a", "c"]) == 0


def test_values_too_large_for_half_precision_are_cached_too(tmp_path: Path) -> None:
    cached_states(tmp_path, ["key"], ["a", "b"], lambda texts: [np.full((3, 2), 1e6)] * len(texts))
    assert cached_count(tmp_path, "states", ["key"], ["a", "b", "c"]) == 2


def test_a_damaged_segment_does_not_count(tmp_path: Path) -> None:
    cached_vectors(tmp_path, ["key"], ["a"], lambda texts: np.ones((len(texts), 2)))
    (path,) = tmp_path.glob("*/000001/digests.b16")
    path.write_bytes(b"x")
    assert cached_count(tmp_path, "arrays", ["key"], ["a"]) == 0
