from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from table_model import TableModel, unit
from trimtab.data.manifests import LabelledImage
from trimtab.errors import DataError, ModelError, RecipeError
from trimtab.evaluation import classify, classify_embeddings, embed_classes

X, Y, Z = [1, 0, 0], [0, 1, 0], [0, 0, 1]


def test_top1_top5_and_what_went_wrong() -> None:
    images = {"x1": X, "x2": [3, 1, 0], "y1": [2, 1, 0], "bad": "truncated", "z1": Z}
    model = TableModel(images, {"a cat": X, "a dog": Y, "a cow": Z})
    items = [("x1", 0), ("x2", 0), ("y1", 1), ("bad", 1), ("z1", 2)]
    result = classify(model, items, ["cat", "dog", "cow"], ["a {}"])
    assert (result.top1, result.top5, result.n) == (75.0, 100.0, 4)
    assert [(item.name, item.n, item.top1) for item in result.per_class] == [
        ("cat", 2, 100.0), ("dog", 1, 0.0), ("cow", 1, 100.0),
    ]  # fmt: skip
    assert result.confusion == {(0, 0): 2, (1, 0): 1, (2, 2): 1}
    assert [(m.source, m.true, m.predicted) for m in result.mistakes] == [("y1", "dog", "cat")]
    assert result.mistakes[0].margin == pytest.approx(1 / np.sqrt(5), abs=1e-6)
    assert result.mean_per_class == pytest.approx(200 / 3)
    told = json.loads(json.dumps(result.as_json()))
    assert (told["top1"], told["top5"], told["n"], told["n_skipped"]) == (75.0, 100.0, 4, 1)
    assert told["confusions"] == [{"class": "dog", "taken_for": "cat", "count": 1}]
    assert told["skipped"] == [{"source": "bad", "reason": "truncated"}]


def test_it_takes_the_records_of_a_manifest(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "x.png"
    model = TableModel({path: X}, {"cat": X, "dog": Y})
    result = classify(model, [LabelledImage(path, 0, 2)], ["cat", "dog"], ["{}"])
    assert result.top1 == 100.0


def test_a_class_is_the_normalised_mean_of_normalised_prompts() -> None:
    model = TableModel({}, {"one cat": [10, 0, 0], "two cat": [0, 0.1, 0], "one dog": Z, "two dog": Z})
    vectors = embed_classes(model, ["cat", "dog"], ["one {}", "two {}"])
    assert vectors == pytest.approx(np.array([[np.sqrt(0.5), np.sqrt(0.5), 0], Z]), abs=1e-6)


def test_many_classes_are_embedded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"c{at}" for at in range(11)]
    texts = {f"{t} {name}": [at + 1, t, 1] for at, name in enumerate(names) for t in (1, 2)}
    model = TableModel({}, texts)
    whole = embed_classes(model, names, ["1 {}", "2 {}"])
    monkeypatch.setattr("trimtab.evaluation.classification._TEXTS_AT_ONCE", 6)
    model.text_calls.clear()
    assert np.array_equal(embed_classes(model, names, ["1 {}", "2 {}"]), whole)
    assert [len(call) for call in model.text_calls] == [6, 6, 6, 4]


def test_a_tie_is_a_mistake() -> None:
    # A tower that maps unknown names to one vector must not score by the order of the classes.
    same = unit([X, X, X])
    result = classify_embeddings(unit([X]), same, np.array([0]))
    assert (result.top1, result.top5) == (0.0, 100.0)
    assert result.confusion == {(0, 1): 1}
    # Equal vectors may give cosines that differ in the last bits.
    nearly = np.array([X, [1 - 3e-7, 0, 0]], np.float32)
    assert classify_embeddings(unit([X]), nearly, np.array([0])).top1 == 0.0


def test_classes_that_the_model_reads_alike_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = TableModel({"x": X, "y": Y}, {"a cat": X, "a Cat": X, "a cow": Y})
    with caplog.at_level(logging.WARNING, "trimtab"):
        result = classify(model, [("x", 0), ("y", 1)], ["cat", "cow", "Cat"], ["a {}"])
    assert result.top1 == 50.0
    assert ["'cat' and 'Cat' alike" in record.getMessage() for record in caplog.records] == [True]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 8))
def test_equal_to_brute_force(seed: int, count: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    images = unit(rng.integers(-2, 3, (count, 3)) + np.array([0.0, 0.0, 0.5]))
    names = unit(rng.integers(-2, 3, (classes, 3)) + np.array([0.0, 0.0, 0.5]))
    labels = rng.integers(0, classes, count)
    scores = images.astype(np.float64) @ names.T.astype(np.float64)
    ranks = np.array([sum(s >= row[label] - 1e-6 for s in row) for row, label in zip(scores, labels)])
    result = classify_embeddings(images, names, labels)
    assert result.top1 == pytest.approx(100 * np.mean(ranks == 1))
    assert result.top5 == pytest.approx(100 * np.mean(ranks <= min(5, classes)))
    assert sum(result.confusion.values()) == count
    right = sum(n for (true, taken), n in result.confusion.items() if true == taken)
    assert 100 * right / count == pytest.approx(result.top1)
    margins = [mistake.margin for mistake in result.mistakes]
    assert margins == sorted(margins, reverse=True)


def test_scores_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    images, names = unit(rng.standard_normal((40, 3))), unit(rng.standard_normal((9, 3)))
    labels = rng.integers(0, 9, 40)
    whole = classify_embeddings(images, names, labels)
    monkeypatch.setattr("trimtab.evaluation.classification._SCORES_AT_ONCE", 27)
    parts = classify_embeddings(images, names, labels)
    assert (parts.top1, parts.top5, parts.confusion) == (whole.top1, whole.top5, whole.confusion)


def test_bad_input() -> None:
    model = TableModel({"x": X}, {"cat": X, "dog": Y})
    with pytest.raises(DataError, match="'cat' stands 2 times"):
        classify(model, [("x", 0)], ["cat", "dog", "cat"], ["{}"])
    with pytest.raises(DataError, match="label 2, but there are 2 classes"):
        classify(model, [("x", 2)], ["cat", "dog"], ["{}"])
    with pytest.raises(DataError, match="no items"):
        classify(model, [], ["cat"], ["{}"])
    with pytest.raises(DataError, match="no class names"):
        embed_classes(model, [], ["{}"])
    for templates in ([], ["no place"], ["{} and {}"]):
        with pytest.raises(RecipeError):
            classify(model, [("x", 0)], ["cat", "dog"], templates)
    with pytest.raises(ModelError, match="not finite"):
        classify_embeddings(np.full((1, 3), np.nan), unit([X, Y]), np.array([0]))


def test_the_most_frequent_confusions_come_first() -> None:
    taken_for, labels = [Y] + 3 * [Z] + 2 * [X], [0] + 3 * [1] + 2 * [2]
    result = classify_embeddings(unit(taken_for), unit([X, Y, Z]), np.array(labels), classes=["x", "y", "z"])
    assert [(cell["class"], cell["count"]) for cell in result.confusions()] == [("y", 3), ("z", 2), ("x", 1)]


def test_pictures_in_memory_are_named_by_type() -> None:
    result = classify_embeddings(unit([X]), unit([Y, X]), np.array([0]), sources=[np.zeros((2, 2))])
    assert result.as_json()["mistakes"][0]["image"] == "<ndarray>"


def test_of_many_mistakes_the_worst_are_kept() -> None:
    images = np.linspace(0.1, 1.0, 60)[:, None] * np.array([[0.0, 1.0]]) + np.array([[1.0, 0.0]])
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    result = classify_embeddings(images.astype(np.float32), np.eye(2, dtype=np.float32), np.ones(60, int))
    assert result.n == 60
    wrong = [mistake.source for mistake in result.mistakes]
    assert wrong == list(range(50)), "those furthest from their class first"
