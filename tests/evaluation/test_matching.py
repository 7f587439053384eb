from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import ModelError
from trimtab.evaluation import mean_pairwise_cosine, translation_match
from trimtab.evaluation.matching import match_of_parts


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 6))
def test_equal_to_brute_force(seed: int, count: int, distinct: int) -> None:
    rng = np.random.default_rng(seed)
    meanings = rng.integers(0, distinct, count)
    teacher = rng.standard_normal((distinct, 6))[meanings]
    student = teacher + rng.standard_normal((count, 6))
    cosine = unit(student) @ unit(teacher).T
    forward = np.mean([meanings[cosine[at].argmax()] == meanings[at] for at in range(count)])
    backward = np.mean([meanings[cosine[:, at].argmax()] == meanings[at] for at in range(count)])
    for groups in (None, meanings, [f"word {m}" for m in meanings]):
        result = translation_match(student, teacher, groups=groups, chunk=4)
        assert result.student_to_teacher == pytest.approx(100 * forward)
        assert result.teacher_to_student == pytest.approx(100 * backward)
        assert result.accuracy == pytest.approx(50 * (forward + backward))
        assert result.n == count


def test_sentences_with_one_translation_are_right_for_each_other() -> None:
    teacher = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    student = np.array([[1, 0.3], [1, 0.1], [0, 1]], np.float32)
    assert translation_match(student, teacher).accuracy == 100.0


def test_groups_hold_vectors_together_that_half_precision_set_apart() -> None:
    teacher = np.array([[1, 0], [1, 0.01], [0, 1]], np.float32)
    student = np.array([[1, 0.3], [1, -0.1], [0, 1]], np.float32)
    assert translation_match(student, teacher).accuracy < 100
    assert translation_match(student, teacher, groups=["dog", "dog", "sky"]).accuracy == 100.0


def test_parts_look_among_all_pairs() -> None:
    teacher = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    student = np.array([[1, 0, 0], [0, 1, 0], [0.1, 1, 0.2]], np.float32)  # the last is nearest to another part's
    parts = {"zh": np.array([True, True, False]), "de": np.array([False, False, True])}
    found = match_of_parts(student, teacher, parts)
    assert (found["zh"].accuracy, found["zh"].n) == (100, 2)
    assert (found["de"].student_to_teacher, found["de"].teacher_to_student, found["de"].n) == (0, 100, 1)
    whole = translation_match(student, teacher)
    assert whole.accuracy == pytest.approx((2 * found["zh"].accuracy + found["de"].accuracy) / 3)


def test_a_hub_is_corrected_where_that_is_asked_for() -> None:
    """All students lean towards one teacher vector, which takes them from their own."""
    teacher = unit(np.random.default_rng(0).standard_normal((60, 32)))
    student = teacher + 1.5 * teacher[0]
    plain, corrected = translation_match(student, teacher), translation_match(student, teacher, hubness="csls")
    assert plain.student_to_teacher < 10
    assert corrected.student_to_teacher > 90
    assert match_of_parts(student, teacher, {"": np.ones(60, bool)}, hubness="csls")[""] == corrected


def test_a_collapsed_student_scores_nothing() -> None:
    teacher = unit(np.random.default_rng(0).standard_normal((50, 8)))
    result = translation_match(np.ones((50, 8)), teacher)
    assert result.teacher_to_student == 0
    assert result.student_to_teacher == pytest.approx(2)
    assert mean_pairwise_cosine(np.ones((50, 8))) == pytest.approx(1)


def test_norms_do_not_matter() -> None:
    teacher = unit(np.random.default_rng(0).standard_normal((20, 8)))
    scales = np.random.default_rng(1).uniform(0.01, 100, (20, 1))
    assert translation_match(scales * teacher, teacher).accuracy == 100.0


def test_mean_pairwise_cosine_equals_the_mean_over_pairs() -> None:
    vectors = np.random.default_rng(2).standard_normal((30, 5)) + 0.5
    cosine = unit(vectors) @ unit(vectors).T
    assert mean_pairwise_cosine(vectors) == pytest.approx(cosine[~np.eye(30, dtype=bool)].mean(), abs=1e-6)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        translation_match(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="N > 0"):
        translation_match(np.ones((0, 3)), np.ones((0, 3)))
    with pytest.raises(ValueError, match="1 groups for 2"):
        translation_match(np.ones((2, 3)), np.ones((2, 3)), groups=["a"])
    with pytest.raises(ModelError):
        translation_match(np.full((2, 3), np.nan), np.ones((2, 3)))
    with pytest.raises(ValueError, match="N > 1"):
        mean_pairwise_cosine(np.ones((1, 3)))
