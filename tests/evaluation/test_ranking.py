from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import ModelError
from trimtab.evaluation import nearest, ranking, recall_at_k
from trimtab.evaluation.ranking import hubness_offsets, rank_embeddings, rank_similarity


def brute_force(similarity: np.ndarray, positives: list[tuple[int, int]], tie: float) -> list[int]:
    """Rank of each row's best positive, counted one comparison at a time."""
    ranks = []
    for row in range(len(similarity)):
        right = {column for at, column in positives if at == row}
        if not right:
            ranks.append(0)
            continue
        best = max(similarity[row, column] for column in right)
        wrong = [c for c in range(similarity.shape[1]) if c not in right and similarity[row, c] >= best - tie]
        ranks.append(1 + len(wrong))
    return ranks


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Embeddings from few distinct vectors, so that ties are common; cosines are 0, 0.5 or 1 apart."""
    vectors = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1], [-1, -1, 0, 0]], np.float32)
    vectors /= np.sqrt(2, dtype=np.float32)
    n, m = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    pick = st.integers(0, len(vectors) - 1)
    rows = vectors[draw(st.lists(pick, min_size=n, max_size=n))]
    columns = vectors[draw(st.lists(pick, min_size=m, max_size=m))]
    pair = st.tuples(st.integers(0, n - 1), st.integers(0, m - 1))
    return rows, columns, draw(st.lists(pair, min_size=1, max_size=15))


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(1, 5))
def test_ranks_equal_brute_force_whatever_the_chunk(
    problem: tuple[np.ndarray, np.ndarray, list[tuple[int, int]]], chunk: int
) -> None:
    rows, columns, positives = problem
    similarity = rows.astype(np.float64) @ columns.T.astype(np.float64)
    turned = [(column, row) for row, column in positives]
    ranks = rank_embeddings(rows, columns, np.array(positives), chunk=chunk)
    assert ranks.rows.tolist() == brute_force(similarity, positives, 1e-6)
    assert ranks.columns.tolist() == brute_force(similarity.T, turned, 1e-6)
    exact = rank_similarity(np.round(similarity, 3), np.array(positives))
    assert exact.rows.tolist() == ranks.rows.tolist()
    assert exact.columns.tolist() == ranks.columns.tolist()


@pytest.mark.parametrize("hubness", ["none", "csls", "dual_softmax"])
def test_chunks_change_nothing(hubness: str) -> None:
    rng = np.random.default_rng(0)
    rows, columns = rng.standard_normal((37, 16)), rng.standard_normal((53, 16))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    columns /= np.linalg.norm(columns, axis=1, keepdims=True)
    positives = [(at % 37, at) for at in range(53)]
    results = [recall_at_k((rows, columns), positives, hubness=hubness, chunk=chunk) for chunk in (1, 7, 16, 4096)]
    assert all(result == results[0] for result in results)


def test_equal_vectors_in_different_blocks_tie() -> None:
    # BLAS may round the last columns of a block differently from the first.
    rng = np.random.default_rng(1)
    row = rng.standard_normal((1, 384)).astype(np.float32)
    row /= np.linalg.norm(row)
    for count in (2, 3, 17, 100):
        columns = np.repeat(row[:, ::-1], count, axis=0)
        ranks = rank_embeddings(row, columns, np.array([(0, count // 2)]))
        assert ranks.rows.tolist() == [count]


def test_any_positive_counts_and_other_positives_do_not_push_it_down() -> None:
    similarity = np.array([[0.9, 0.8, 0.7, 0.6]])
    assert rank_similarity(similarity, np.array([(0, 0), (0, 1), (0, 2)])).rows.tolist() == [1]
    assert rank_similarity(similarity, np.array([(0, 2), (0, 3)])).rows.tolist() == [3]


def test_a_tie_counts_against_the_model() -> None:
    constant = np.full((4, 3), 0.5, np.float32) / np.sqrt(0.75, dtype=np.float32)
    recall = recall_at_k((constant, constant), [(at, at) for at in range(4)], ks=(1, 3, 4))
    assert recall.i2t == {"R@1": 0.0, "R@3": 0.0, "R@4": 100.0}


def test_recall_figures() -> None:
    similarity = np.array([[0.9, 0.1, 0.3], [0.8, 0.2, 0.4], [0.1, 0.3, 0.2]])
    recall = recall_at_k(similarity, [(0, 0), (1, 1), (2, 2)], ks=(1, 2))
    assert recall.i2t == pytest.approx({"R@1": 100 / 3, "R@2": 200 / 3})
    assert recall.t2i == pytest.approx({"R@1": 100 / 3, "R@2": 200 / 3})
    assert recall.mR == pytest.approx(50)


def test_distractors_are_candidates_but_no_queries() -> None:
    similarity = np.array([[0.5, 0.9], [0.2, 0.3]])
    recall = recall_at_k(similarity, [(0, 0)], ks=(1,))
    assert (recall.i2t, recall.t2i) == ({"R@1": 0.0}, {"R@1": 100.0})


def test_what_cannot_be_ranked_is_refused() -> None:
    matrix = np.eye(3)
    with pytest.raises(ValueError, match="no positives"):
        recall_at_k(matrix, [])
    with pytest.raises(ValueError, match="out of range"):
        recall_at_k(matrix, [(0, 3)])
    with pytest.raises(ValueError, match="out of range"):
        recall_at_k((matrix, matrix), [(-1, 0)])
    with pytest.raises(ValueError, match="at least 1"):
        recall_at_k(matrix, [(0, 0)], ks=(0,))
    with pytest.raises(ValueError, match="NaN"):
        recall_at_k(np.full((2, 2), np.nan), [(0, 0)])
    with pytest.raises(ModelError, match="not finite"):
        recall_at_k((np.full((2, 2), np.nan), np.eye(2)), [(0, 0)])
    with pytest.raises(ValueError, match="needs embeddings"):
        recall_at_k(matrix, [(0, 0)], hubness="csls")
    with pytest.raises(ValueError, match="one of none, csls, dual_softmax"):
        recall_at_k((matrix, matrix), [(0, 0)], hubness="magic")  # type: ignore[arg-type]


def test_offsets_equal_their_formulas() -> None:
    rng = np.random.default_rng(2)
    rows, columns = rng.standard_normal((12, 5)), rng.standard_normal((14, 5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    columns /= np.linalg.norm(columns, axis=1, keepdims=True)
    cosine = rows @ columns.T
    of_rows, of_columns = hubness_offsets(rows, columns, "csls", chunk=5)
    assert of_rows == pytest.approx(np.sort(cosine, axis=1)[:, -10:].mean(axis=1) / 2, abs=1e-6)
    assert of_columns == pytest.approx(np.sort(cosine.T, axis=1)[:, -10:].mean(axis=1) / 2, abs=1e-6)
    of_rows, of_columns = hubness_offsets(rows, columns, "dual_softmax", logit_scale=20, chunk=5)
    assert of_rows == pytest.approx(np.log(np.exp(20 * cosine).sum(axis=1)) / 40, abs=1e-6)
    assert of_columns == pytest.approx(np.log(np.exp(20 * cosine).sum(axis=0)) / 40, abs=1e-6)
    # Ranking by cosine minus the offset is ranking by the product of the two softmaxes.
    logits = 20 * cosine
    both = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) * np.exp(logits) / np.exp(logits).sum(axis=0)
    assert np.array_equal(np.argsort(cosine - of_columns, axis=1), np.argsort(both, axis=1))


def test_hubness_correction_helps_against_a_hub() -> None:
    rng = np.random.default_rng(3)
    texts = rng.standard_normal((30, 8)).astype(np.float32)
    images = texts + 0.3 * rng.standard_normal((30, 8)).astype(np.float32) + np.array([2] + [0] * 7, np.float32)
    texts[0] = [1] + [0] * 7
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    positives = [(at, at) for at in range(30)]
    plain = recall_at_k((images, texts), positives, ks=(1,)).mR
    assert recall_at_k((images, texts), positives, ks=(1,), hubness="csls").mR > plain
    assert recall_at_k((images, texts), positives, ks=(1,), hubness="dual_softmax", logit_scale=20).mR > plain


def test_nearest_is_ordered_and_breaks_ties_by_position() -> None:
    candidates = np.array([[0, 1], [1, 0], [1, 0], [0.6, 0.8]], np.float32)
    places, scores = nearest(np.array([[1, 0]], np.float32), candidates, 3)
    assert places.tolist() == [[1, 2, 3]]
    assert scores[0] == pytest.approx([1, 1, 0.6])
    for chunk in (1, 2, 3):
        assert nearest(np.array([[1, 0]], np.float32), candidates, 3, chunk=chunk)[0].tolist() == [[1, 2, 3]]
    assert nearest(candidates, candidates, 9)[0].shape == (4, 4)


def test_of_many_equal_candidates_the_first_are_taken() -> None:
    rows = np.tile(np.array([[1.0, 0.0]], np.float32), (300, 1))
    places, _ = ranking.nearest(rows[:2], rows, 7, chunk=128)
    assert places.tolist() == [list(range(7))] * 2
    in_turn = np.tile(np.array([[0.6, 0.8], [1.0, 0.0], [0.8, 0.6]], np.float32), (100, 1))
    assert nearest(rows[:1], in_turn, 5)[0].tolist() == [[1, 4, 7, 10, 13]]
