"""The split and the measure of the base-to-new benchmark."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.data.labelled import LabelledPictures
from trimtab.data.shards import PictureFile

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from fewshot_new import base_and_new, harmonic_mean, only

accuracy = st.floats(0.01, 100)


@given(st.integers(2, 500))
def test_base_and_new_are_all_classes(count: int) -> None:
    base, new = base_and_new(count)
    assert [*base, *new] == list(range(count))
    assert 0 <= len(base) - len(new) <= 1


def test_some_classes_alone() -> None:
    images = tuple(PictureFile(Path(f"{at}.png"), f"{at}.png") for at in range(4))
    found = LabelledPictures(images, np.array([0, 1, 2, 1]), ("a", "b", "c"))
    some = only(found, np.array([2, 1]))
    assert (some.classes, some.labels.tolist()) == (("c", "b"), [1, 0, 1])
    assert [image.name for image in some.images] == ["1.png", "2.png", "3.png"]


@given(accuracy, accuracy)
def test_the_harmonic_mean_lies_nearer_to_the_lower_accuracy(base: float, new: float) -> None:
    found = harmonic_mean(base, new)
    assert found == pytest.approx(statistics.harmonic_mean([base, new]))
    assert min(base, new) - 1e-9 <= found <= (base + new) / 2 + 1e-9
    assert found == harmonic_mean(new, base)


@pytest.mark.parametrize("pair", [(0.0, 0.0), (0.0, 90.0), (90.0, 0.0)])
def test_nothing_right_on_one_side_is_nothing(pair: tuple[float, float]) -> None:
    assert harmonic_mean(*pair) == 0
