from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from table_model import TableModel
from trimtab.data.manifests import LabelledImage, RetrievalPairs
from trimtab.errors import DataError, ModelError
from trimtab.evaluation import embed_images
from trimtab.evaluation.forgetting import (
    GeneralSet,
    LabelledPictures,
    alpha_curve,
    forgetting,
    mean_score,
    measure,
)

X, Y, Z = [1, 0, 0], [0, 1, 0], [0, 0, 1]
TEXTS = {"an x": X, "a y": Y, "x": X, "y": Y}
percent = st.floats(0, 100)


@dataclass
class Pairs:
    images: list[str]
    texts: list[str]
    positives: list[tuple[int, int]] = field(default_factory=list)


def sets() -> list[GeneralSet]:
    return [
        GeneralSet("photos", Pairs(["p", "q"], ["an x", "a y"], [(0, 0), (1, 1)])),
        GeneralSet("emoji", LabelledPictures([("e", 0), ("f", 1)], ["x", "y"], ["{}"])),
    ]


class Counting(TableModel):
    """Remembers which pictures were embedded."""

    def __init__(self, images: dict[Any, Any]) -> None:
        super().__init__(images, TEXTS)
        self.image_calls: list[list[Any]] = []

    def encode_image(self, images: Any, **options: Any) -> np.ndarray:
        self.image_calls.append(list(images))
        return super().encode_image(images, **options)


def base() -> Counting:
    return Counting({"p": X, "q": Y, "e": X, "f": Y})


def adapted() -> Counting:
    return Counting({"p": [0, 1, 0.1], "q": Y, "e": Y, "f": Y})


def test_sets_know_how_they_are_scored() -> None:
    photos, emoji = sets()
    assert (photos.kind, photos.metric, photos.sources) == ("retrieval", "mR", ["p", "q"])
    assert (emoji.kind, emoji.metric, emoji.sources) == ("classification", "top1", ["e", "f"])
    assert isinstance(GeneralSet("m", RetrievalPairs([], [], [])).sources, list)


def test_every_set_gets_its_primary_score() -> None:
    assert measure(base(), sets()) == {"photos": 100.0, "emoji": 100.0}
    found = measure(adapted(), sets())
    assert found["emoji"] == 50.0
    # Among two, R@5 and R@10 are full; "p" finds the wrong text, and "an x" is as far from both pictures.
    assert 0 < found["photos"] < 100
    assert list(found) == ["photos", "emoji"]


def test_records_of_manifests(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "x.png"
    model = TableModel({path: X}, TEXTS)
    data = LabelledPictures([LabelledImage(path, 0, 2)], ["x", "y"], ["{}"])
    assert measure(model, [GeneralSet("one", data)]) == {"one": 100.0}


def test_pictures_are_embedded_once_for_one_tower() -> None:
    model, cache = base(), {}
    first = measure(model, sets(), cache)
    assert model.image_calls == [["p", "q"], ["e", "f"]]
    assert sorted(cache) == ["emoji", "photos"]
    model.image_calls.clear()
    assert measure(model, sets(), cache) == first
    assert model.image_calls == [["p"], ["e"]]  # one picture each, to see that it is the same tower


def test_a_cache_of_another_tower_is_replaced_not_used() -> None:
    cache: dict[str, Any] = {}
    measure(base(), sets(), cache)
    other = adapted()
    assert measure(other, sets(), cache) == measure(adapted(), sets())
    assert ["p", "q"] in other.image_calls
    assert measure(base(), sets(), cache) == {"photos": 100.0, "emoji": 100.0}


def test_a_tower_that_moves_some_pictures_alone_gets_no_other_ones_cache() -> None:
    plain, gated = base(), Counting({"p": X, "q": X, "e": X, "f": X})  # the first picture of each set stays
    plain.image_fingerprint, gated.image_fingerprint = "base", "base, adapted"  # type: ignore[attr-defined]
    cache: dict[str, Any] = {}
    before = measure(plain, sets(), cache)
    after = measure(gated, sets(), cache)
    assert after == measure(gated, sets())
    assert forgetting(before, after)["points"] > 0
    measure(gated, sets(), cache)
    assert gated.image_calls[-2:] == [["p"], ["e"]], "its own it may use again"


def test_a_cache_of_other_pictures_or_of_another_width_is_replaced() -> None:
    cache = {"emoji": embed_images(base(), ["e"])}
    assert measure(base(), sets(), cache)["emoji"] == 100.0
    wide = TableModel({"e": [1, 0, 0, 0], "f": [0, 1, 0, 0]}, {}, dim=4)
    cache = {"emoji": embed_images(wide, ["e", "f"])}
    assert measure(base(), sets(), cache)["emoji"] == 100.0


def test_unreadable_pictures_are_left_out() -> None:
    model = Counting({"p": "truncated", "q": Y, "e": X, "f": Y})
    cache: dict[str, Any] = {}
    assert measure(model, sets(), cache)["photos"] == 100.0
    assert measure(model, sets(), cache)["photos"] == 100.0
    assert model.image_calls[2] == ["q"]  # the first that could be read


def test_errors_name_the_set() -> None:
    broken = Counting({"p": "no such file", "q": "no such file", "e": X, "f": Y})
    with pytest.raises(DataError, match=r"general set 'photos': none of the 2 images can be read"):
        measure(broken, sets())
    with pytest.raises(DataError, match="general set 'emoji': there are no images"):
        measure(base(), [GeneralSet("emoji", LabelledPictures([], ["x"], ["{}"]))])
    with pytest.raises(DataError, match="different names, not 'photos', 'photos': rename one"):
        measure(base(), [sets()[0], sets()[0]])
    with pytest.raises(ModelError, match="not finite"):
        measure(Counting({"p": [math.nan, 0, 0], "q": Y}), sets()[:1])


def test_forgetting_by_example() -> None:
    found = forgetting({"photos": 40.0, "emoji": 20.0}, {"photos": 30.0, "emoji": 21.0})
    assert (found["before"], found["after"]) == (30.0, 25.5)
    assert (found["points"], found["relative"]) == (4.5, 15.0)
    assert found["sets"]["photos"] == {"before": 40.0, "after": 30.0, "points": 10.0, "relative": 25.0}
    assert found["sets"]["emoji"]["points"] == -1.0  # a gain stays a gain
    assert json.loads(json.dumps(found)) == found


def test_nothing_can_be_lost_from_nothing() -> None:
    found = forgetting({"photos": 0.0}, {"photos": 3.0})
    assert (found["points"], found["relative"], found["sets"]["photos"]["relative"]) == (-3.0, None, None)


def test_forgetting_needs_the_same_sets() -> None:
    with pytest.raises(ValueError, match="before was measured on a, after on a, b"):
        forgetting({"a": 1.0}, {"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match="no general set"):
        forgetting({}, {})


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.tuples(percent, percent), min_size=1, max_size=5))
def test_points_are_the_mean_over_sets_and_antisymmetric(scores: dict[str, tuple[float, float]]) -> None:
    before = {name: pair[0] for name, pair in scores.items()}
    after = {name: pair[1] for name, pair in scores.items()}
    found = forgetting(before, after)
    assert found["points"] == pytest.approx(np.mean([entry["points"] for entry in found["sets"].values()]), abs=1e-9)
    assert found["points"] == pytest.approx(-forgetting(after, before)["points"])
    assert forgetting(before, before)["points"] == 0.0


def test_the_curve_goes_from_the_base_on() -> None:
    made = []

    def make_encoder(alpha: float) -> TableModel:
        made.append(alpha)
        start, end = base().images, adapted().images
        mixed = {name: (1 - alpha) * np.array(start[name]) + alpha * np.array(end[name]) for name in start}
        return TableModel(mixed, TEXTS)

    curve = alpha_curve(
        make_encoder,
        (0, 0.25, 1),
        lambda encoder: encoder.encode_image(["p"], on_error="skip")[0, 1] * 100,
        lambda encoder: mean_score(measure(encoder, sets())),
    )
    assert made == [0, 0.25, 1]
    assert [point["alpha"] for point in curve] == [0.0, 0.25, 1.0]
    assert curve[0] == {"alpha": 0.0, "domain": 0.0, "general": 100.0}
    assert curve[2]["general"] == pytest.approx(mean_score(measure(adapted(), sets())))
    assert json.loads(json.dumps(curve)) == curve


def test_one_object_whose_dial_is_turned_is_measured_at_every_place() -> None:
    class Dial(TableModel):
        alpha = 0.0

    dial = Dial({}, {})

    def turn(alpha: float) -> Dial:
        dial.alpha = alpha
        return dial

    curve = alpha_curve(turn, [0.0, 0.5], lambda encoder: encoder.alpha, lambda encoder: 1 - encoder.alpha)  # type: ignore[attr-defined]
    assert [(point["domain"], point["general"]) for point in curve] == [(0.0, 1.0), (0.5, 0.5)]


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_alpha_must_be_a_number(alpha: float) -> None:
    with pytest.raises(ValueError, match="it must be a finite number"):
        alpha_curve(lambda _: base(), [alpha], lambda _: 0.0, lambda _: 0.0)
