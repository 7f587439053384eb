"""The measure of the base-to-new benchmark."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from fewshot_new import harmonic_mean

accuracy = st.floats(0.01, 100)


@given(accuracy, accuracy)
def test_the_harmonic_mean_lies_nearer_to_the_lower_accuracy(base: float, new: float) -> None:
    found = harmonic_mean(base, new)
    assert found == pytest.approx(statistics.harmonic_mean([base, new]))
    assert min(base, new) - 1e-9 <= found <= (base + new) / 2 + 1e-9
    assert found == harmonic_mean(new, base)


@pytest.mark.parametrize("pair", [(0.0, 0.0), (0.0, 90.0), (90.0, 0.0)])
def test_nothing_right_on_one_side_is_nothing(pair: tuple[float, float]) -> None:
    assert harmonic_mean(*pair) == 0
