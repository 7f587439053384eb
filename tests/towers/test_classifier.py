from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from tiny_models import DUAL_ENCODERS
from trimtab.data.images import ImageError
from trimtab.errors import DataError, RecipeError
from trimtab.towers.classifier import Classifier, Spellings, highest, softmax

NAMES = ["cat", "red car", "yellow flower"]


@pytest.mark.parametrize("family", DUAL_ENCODERS)
def test_every_family_classifies_by_names(family: str, tiny_base: Any, pictures: list[Image.Image]) -> None:
    model = tiny_base(family)
    classifier = model.classifier(NAMES)
    scores = classifier.scores(pictures, batch_size=2)
    assert (scores.shape, scores.dtype) == ((5, 3), np.float32)
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)
    vectors = np.stack(
        [model.encode_text([t.replace("{}", name) for t in classifier.templates]).mean(0) for name in NAMES]
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = model.encode_image(pictures) @ vectors.T
    np.testing.assert_allclose(scores, softmax(model.logit_scale * cosines), atol=1e-5)
    best = classifier.predict(pictures, top_k=2)
    assert [len(row) for row in best] == [2] * 5
    for row, found in zip(scores, best, strict=True):
        assert [one.label for one in found] == [NAMES[at] for at in np.argsort(-row)[:2]]
        assert found[0].score == pytest.approx(row.max(), rel=1e-5)


@pytest.fixture
def model(tiny_base: Any) -> Any:
    return tiny_base("clip")


def test_embeddings_serve_as_images(model: Any, pictures: list[Image.Image]) -> None:
    classifier = model.classifier(NAMES)
    np.testing.assert_allclose(
        classifier.scores(model.encode_image(pictures)), classifier.scores(iter(pictures)), atol=1e-6
    )


def test_one_image_and_more_places_than_classes(model: Any, pictures: list[Image.Image]) -> None:
    assert [len(row) for row in model.classifier(NAMES).predict(pictures[0], top_k=99)] == [3]
    with pytest.raises(ValueError, match="top_k=0"):
        model.classifier(NAMES).predict(pictures, top_k=0)


def test_classes_can_be_added_without_training(model: Any, pictures: list[Image.Image]) -> None:
    classifier = model.classifier(NAMES[:1], templates=["a {}"])
    classifier.add_classes(NAMES[1:])
    whole = model.classifier(NAMES, templates=["a {}"])
    assert classifier.classes == whole.classes == tuple(NAMES)
    np.testing.assert_allclose(classifier.scores(pictures), whole.scores(pictures), atol=1e-6)
    classifier.add_classes("black bear")
    assert classifier.classes[-1] == "black bear"


def test_names_that_the_model_reads_alike_are_named(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trimtab"):
        model.classifier(NAMES).add_classes(NAMES[0].upper())
        model.classifier(["x", "X"])
    found = [record.args[:2] for record in caplog.records if record.name == "trimtab.data.classes"]  # type: ignore[index]
    assert found == [(NAMES[0], NAMES[0].upper()), ("x", "X")]


def test_refused_names_leave_the_classes_as_they_are(model: Any) -> None:
    classifier = model.classifier(NAMES)
    for names in (["dog", "cat"], ["dog", "dog"], ["dog", " "], []):
        with pytest.raises(DataError, match=r"stands twice|has no name|no class names"):
            classifier.add_classes(names)
    assert classifier.classes == tuple(NAMES)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "there are no class names"),
        (["cat", ""], "class 1 has no name"),
        (["cat", 3], "class 1 has no name"),
        (["cat", "dog", "cat"], "'cat' stands twice"),
        (["사과", "\u1109\u1161\u1100\u116a"], "stands twice"),
        ("cat", "must be a list of texts"),
    ],
)
def test_bad_names(model: Any, names: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.classifier(names)


def test_a_model_without_classes_asks_for_names(model: Any) -> None:
    with pytest.raises(DataError, match="was not trained on classes: give their names"):
        model.classifier()


def test_bad_template(model: Any) -> None:
    with pytest.raises(RecipeError, match="exactly one"):
        model.classifier(NAMES, templates=["a photo"])


def test_templates_follow_the_script_of_the_names(tiny_base: Any) -> None:
    model = tiny_base("chinese_clip")
    assert model.classifier(["猫", "狗"]).templates[0] == "一张{}的照片"
    assert model.classifier(["cat"]).templates[0] == "a photo of a {}"


def test_bad_images_raise_or_are_left_out(model: Any, pictures: list[Image.Image], tmp_path: Path) -> None:
    classifier = model.classifier(NAMES)
    images = [pictures[0], tmp_path / "none.jpg", pictures[1]]
    with pytest.raises(ImageError, match=r"none\.jpg"):
        classifier.scores(images)
    assert classifier.scores(images, on_error="skip").shape == (2, 3)
    assert classifier.last_skipped.indices == [1]
    assert classifier.predict([tmp_path / "none.jpg"], on_error="skip") == []


def test_a_scale_of_its_own(model: Any, pictures: list[Image.Image]) -> None:
    flat = Classifier(model, NAMES, logit_scale=1e-6).scores(pictures)
    np.testing.assert_allclose(flat, 1 / 3, atol=1e-4)


@given(arrays.arrays(np.float32, (3, 4), elements=st.floats(-1e4, 1e4, width=32)))
def test_softmax_is_a_distribution(logits: np.ndarray) -> None:
    found = softmax(logits)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    assert softmax(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_spellings_are_found_where_they_mean_one_name() -> None:
    spellings = Spellings(["cat", "Turkey", "turkey", "red car", "Stra\u00dfe"])
    same = {"cat": "cat", "CAT": "cat", "\ufeffcat ": "cat", "red\xa0 car": "red car", "STRASSE": "Stra\u00dfe"}
    assert {name: spellings.find(name) for name in same} == same
    assert [spellings.find(name) for name in ("Turkey", "turkey ", "TURKEY", "redcar", "dog")] == [
        "Turkey", "turkey", None, None, None
    ]  # fmt: skip
    tidied = Spellings(["Granny Smith", "T-shirt", "t shirt", "-1", "1"])
    assert [tidied.find(name) for name in ("Granny_Smith", "granny-smith", "t_shirt", "T-Shirt", "-1", "_1")] == [
        "Granny Smith", "Granny Smith", None, "T-shirt", "-1", None
    ]  # fmt: skip


@given(
    arrays.arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([-1.0, 0.0, 0.5, 0.75, 2.0])),
    st.integers(1, 50),
)
def test_the_highest_are_those_of_a_whole_sort(scores: np.ndarray, count: int) -> None:
    assert highest(scores, count).tolist() == np.argsort(-scores, kind="stable")[:count].tolist()


def test_many_classes_are_sorted_a_few_pictures_at_a_time(
    model: Any, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = model.classifier(NAMES)
    whole = classifier.predict(pictures, top_k=2)
    monkeypatch.setattr("trimtab.towers.classifier._MOST_SCORES", 7)  # two pictures
    assert classifier.predict(pictures, top_k=2) == whole


def test_names_from_a_generator_and_templates_that_are_none(model: Any) -> None:
    assert model.classifier(name for name in ("cat", "dog")).classes == ("cat", "dog")
    with pytest.raises(DataError, match="there are no templates: leave them out"):
        model.classifier(["cat", "dog"], templates=[])
    with pytest.raises(DataError, match="a list of texts, not a int"):
        model.classifier(7)
