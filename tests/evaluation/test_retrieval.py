from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field

import numpy as np
import pytest

from table_model import TableModel, unit
from trimtab.errors import DataError, ModelError
from trimtab.evaluation import embed_images, recall_at_k, retrieve


@dataclass
class Pairs:
    images: list[str]
    texts: list[str]
    positives: list[tuple[int, int]] = field(default_factory=list)


X, Y, Z = [1, 0, 0], [0, 1, 0], [0, 0, 1]


def test_the_contract_of_the_json() -> None:
    model = TableModel({"x": X, "y": Y, "z": Z}, {"an x": X, "a y": Y, "a z": Y})
    result = retrieve(model, Pairs(["x", "y", "z"], ["an x", "a y", "a z"], [(0, 0), (1, 1), (2, 2)]))
    told = json.loads(json.dumps(result.as_json()))
    assert told["n_images"] == told["n_texts"] == 3
    assert list(told["i2t"]) == list(told["t2i"]) == ["R@1", "R@5", "R@10"]
    # y ties with its wrong text, and "a z" is as near to x as to z.
    assert told["i2t"]["R@1"] == pytest.approx(100 / 3)
    assert told["t2i"]["R@1"] == pytest.approx(200 / 3)
    assert told["mR"] == pytest.approx((100 + 200 + 4 * 300) / 18)
    assert result.hubness == "none"


def test_several_texts_per_image_and_images_per_text() -> None:
    model = TableModel({"x": X, "x2": X, "y": Y}, {"an x": X, "also x": X, "a y": Y})
    pairs = Pairs(["x", "x2", "y"], ["an x", "also x", "a y"], [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2)])
    assert retrieve(model, pairs).mR == 100.0


def test_a_text_without_an_image_is_a_distractor() -> None:
    model = TableModel({"x": X, "y": Y}, {"an x": X, "a y": Y, "of none": X})
    positives = [(0, 0), (1, 1)]
    assert retrieve(model, Pairs(["x", "y"], ["an x", "a y"], positives)).recall.i2t["R@1"] == 100.0
    result = retrieve(model, Pairs(["x", "y"], ["an x", "a y", "of none"], positives))
    assert (result.n_texts, result.lost_texts) == (3, ())
    assert result.recall.i2t["R@1"] == 50.0
    assert result.recall.t2i["R@1"] == 100.0


def test_a_text_has_the_rank_of_its_best_image() -> None:
    model = TableModel({"x": X, "y": Y}, {"an x": X, "a y": Y, "no y": [2, 1, 0]})
    result = retrieve(model, Pairs(["x", "y"], ["an x", "a y", "no y"], [(0, 0), (1, 1), (1, 2)]))
    assert result.text_ranks.tolist() == [1, 1, 2]


@pytest.mark.parametrize("hubness", ["csls", "dual_softmax"])
def test_ranks_are_corrected_as_asked_in_the_scale_of_the_model(hubness: str) -> None:
    rng = np.random.default_rng(22)
    seen = rng.standard_normal((20, 3))
    images, texts = unit(seen), unit(seen + rng.standard_normal((20, 3)))
    names, positives = [str(at) for at in range(20)], [(at, at) for at in range(20)]
    model = TableModel(dict(zip(names, images)), dict(zip(names, texts)), logit_scale=5.0)
    found = retrieve(model, Pairs(names, names, positives), hubness=hubness).mR
    own, other = (
        recall_at_k((images, texts), positives, hubness=hubness, logit_scale=scale).mR for scale in (5.0, 100.0)
    )
    assert found == own != recall_at_k((images, texts), positives).mR
    assert (own != other) == (hubness == "dual_softmax")


def test_skipped_images_take_the_texts_with_them_that_have_no_other() -> None:
    model = TableModel({"bad": "truncated", "x": X, "y": Y}, {"of bad": Z, "of both": X, "of y": Y})
    pairs = Pairs(["bad", "x", "y"], ["of bad", "of both", "of y"], [(0, 0), (0, 1), (1, 1), (2, 2)])
    result = retrieve(model, pairs)
    assert (result.n_images, result.n_texts, result.mR) == (2, 2, 100.0)
    assert result.lost_texts == ("of bad",)
    assert result.text_positions.tolist() == [1, 2]
    assert model.text_calls == [["of both", "of y"]]
    told = result.as_json()
    assert (told["n_skipped"], told["n_lost_texts"]) == (1, 1)
    assert told["skipped"] == [{"source": "bad", "reason": "truncated"}]


def test_texts_that_the_model_reads_alike_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = TableModel({"x": X, "y": Y, "z": Z}, {"an x": X, "An x": X, "a y": Y, "A y": Y, "a z": Z})
    # Both texts of y belong to one picture, so that their tie takes nothing.
    texts = ["an x", "a y", "A y", "a z"]
    with caplog.at_level(logging.WARNING, "trimtab"):
        assert retrieve(model, Pairs(["x", "y", "z"], texts, [(0, 0), (1, 1), (1, 2), (2, 3)]), warn=True).mR == 100.0
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "trimtab"):
        found = retrieve(model, Pairs(["x", "y", "z"], ["an x", "a y", "An x"], [(0, 0), (1, 1), (2, 2)]), warn=True)
    assert found.mR < 100
    assert ["'an x' and 'An x' alike:" in record.getMessage() for record in caplog.records] == [True]


def test_copies_of_a_picture_with_other_texts_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = TableModel({"x": X, "x2": X, "y": Y, "y2": Y, "bad": "broken"}, {"an x": X, "x too": [1, 0.1, 0], "a y": Y})
    texts = ["an x", "x too", "a y"]
    pairs = Pairs(["bad", "x", "x2", "y", "y2"], texts, [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2)])
    with caplog.at_level(logging.WARNING, "trimtab"):
        assert retrieve(model, pairs, warn=True).recall.t2i["R@1"] < 100
    assert ["pictures 'x' and 'x2' alike, and" in record.getMessage() for record in caplog.records] == [True]


def test_images_embedded_once_serve_several_texts() -> None:
    model = TableModel({"x": X, "y": Y, "bad": "broken"}, {"a": X, "b": Y, "甲": X, "乙": Y, "丙": Z})
    images = embed_images(model, ["x", "bad", "y"])
    english = retrieve(model, Pairs(["x", "bad", "y"], ["a", "b"], [(0, 0), (2, 1)]), images=images)
    chinese = retrieve(model, Pairs(["x", "bad", "y"], ["甲", "丙", "乙"], [(0, 0), (1, 1), (2, 2)]), images=images)
    assert english.mR == chinese.mR == 100.0
    assert chinese.lost_texts == ("丙",)
    with pytest.raises(ValueError, match="3 images were embedded"):
        retrieve(model, Pairs(["x"], ["a"], [(0, 0)]), images=images)


def test_nothing_to_evaluate() -> None:
    model = TableModel({"bad": "no such file"}, {"a": X})
    with pytest.raises(DataError, match=r"none of the 1 images can be read.*bad: no such file.*--root"):
        retrieve(model, Pairs(["bad"], ["a"], [(0, 0)]))
    with pytest.raises(DataError, match="no image-text pairs"):
        retrieve(model, Pairs([], [], []))


def test_nan_is_not_a_perfect_score() -> None:
    model = TableModel({"x": X, "y": [np.nan, 0, 0]}, {"a": X, "b": Y})
    with pytest.raises(ModelError, match="not finite"):
        retrieve(model, Pairs(["x", "y"], ["a", "b"], [(0, 0), (1, 1)]))


def test_a_model_that_returns_too_few_vectors_is_refused() -> None:
    model = TableModel({"x": X, "y": Y}, {"a": X})
    model.encode_text = lambda texts, progress=False: np.zeros((1, 3), np.float32)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"array \(1, 3\) for 2 texts"):
        retrieve(model, Pairs(["x", "y"], ["a", "b"], [(0, 0), (1, 1)]))
