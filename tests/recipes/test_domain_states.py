"""What is cached of pictures and captions is what the towers would give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_domain import toy_recipe, write_pairs
from tiny_towers import BUILDERS
from trimtab.config import MapViewsConfig, ViewsConfig
from trimtab.data.pairs import load_pairs
from trimtab.data.views import make_view
from trimtab.errors import DataError, RecipeError
from trimtab.recipes.domain_methods import METHODS
from trimtab.recipes.domain_states import FrozenStates, ImageStates, TextStates, base_embeddings, embed, frozen_states
from trimtab.recipes.picture_views import PictureViews
from trimtab.towers.hf import load_base
from trimtab.towers.layers import TowerCut, sites
from trimtab.towers.map_views import draw_numbers, make_map_views

FAMILIES = ["clip", "siglip2", "chinese_clip", "vision-text-dual-encoder", "flava"]
OPTIONS = ViewsConfig()


@pytest.fixture(autouse=True)
def cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    compute_in_bf16(monkeypatch, False)
    return cache


def compute_in_bf16(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    """Whatever the machine has: what is compared must not depend on it."""
    monkeypatch.setattr("trimtab.precision.has_fast_bf16", lambda device: wanted)


@pytest.fixture
def pairs(tmp_path: Path) -> Any:
    recipe = toy_recipe(tmp_path, write_pairs(tmp_path / "data", 14), Path("v.csv"), tmp_path / "out")
    return load_pairs(recipe.data.train)


def picture_states(base: Any, cut: TowerCut | None, pairs: Any, views: int = 2) -> ImageStates:
    return ImageStates(base, cut, pairs.images, viewed=10, views=views, options=OPTIONS, seed=3)


def test_a_picture_that_is_gone_is_named(tiny_base: Any, pairs: Any) -> None:
    pairs.images[3].path.unlink()
    with pytest.raises(DataError, match=rf"{pairs.images[3].path.name}: cannot be read any more .*: start again"):
        picture_states(tiny_base("clip"), TowerCut(tiny_base("clip"), "image", None), pairs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["layer", "features"])
def test_pictures_go_on_from_the_cache_in_each_view(
    family: str, where: str, tiny_base: Any, pairs: Any, cache: Path
) -> None:
    base = tiny_base(family)
    cut = TowerCut(base, "image", sites(base, "image", "layers")[1] if where == "layer" else None)
    states = picture_states(base, cut, pairs)
    states.fill(cache)
    items, views = np.array([3, 9, 3, 12, 0]), np.array([1, 2, 0, 0, 1])
    with torch.no_grad():
        found = cut.upper(states(items, views))
        pictures = [
            make_view(pairs.images[i].read(), v, seed=3, key=pairs.images[i].name, options=OPTIONS)
            for i, v in zip(items.tolist(), views.tolist())
        ]
        expected = base.image_features(pictures)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)  # half precision on disk
    assert not torch.allclose(found[0], found[2])


def test_a_view_too_large_for_float16_stays_what_it_is(tiny_base: Any, pairs: Any, cache: Path) -> None:
    base = tiny_base("clip")
    states = picture_states(base, TowerCut(base, "image", None), pairs, views=1)
    plain = states._states

    def large(items: Any, view: int) -> np.ndarray:
        return plain(items, view) * (1e6 if view else 1)

    states._states = large  # type: ignore[method-assign]
    states.fill(cache)
    found = states(np.array([3, 4]), np.array([0, 1]))["features"]
    torch.testing.assert_close(found[1], torch.from_numpy(large([4], 1))[0], rtol=1e-4, atol=1)
    assert found.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["layer", "features"])
def test_captions_go_on_from_the_cache(family: str, where: str, tiny_base: Any, cache: Path) -> None:
    base = tiny_base(family)
    captions = ["a cat", "a photo of a small red car", "the house near the river", "tea"]
    cut = TowerCut(base, "text", sites(base, "text", "layers")[1] if where == "layer" else None)
    states = TextStates(base, cut, captions)
    states.fill(cache)
    items = np.array([2, 0, 3])
    with torch.no_grad():
        found = cut.upper(states(items, np.zeros(3, np.int64)), states.inputs(items))
        expected = base.text_features([captions[item] for item in items])
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_bf16_states_are_near_and_kept_apart(tiny_base: Any, pairs: Any, cache: Path, monkeypatch: Any) -> None:
    base = tiny_base("clip")
    items, views = np.arange(10), np.zeros(10, np.int64)
    found = []
    for wanted in (False, True):
        compute_in_bf16(monkeypatch, wanted)
        states = picture_states(base, TowerCut(base, "image", None), pairs)
        states.fill(cache)
        found.append(states(items, views)["features"])
    exact, coarse = found
    assert not torch.equal(exact, coarse)
    assert torch.nn.functional.cosine_similarity(exact, coarse).min() > 0.99


@pytest.mark.parametrize(("views", "changes", "warned"), [(0, True, True), (1, True, False), (0, False, False)])
def test_pictures_without_maps_and_views_are_no_secret(
    views: int, changes: bool, warned: bool, tiny_base: Any, pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole = {"viewed": 10, "views": views, "options": OPTIONS, "seed": 0, "maps": MapViewsConfig(flip=changes)}
    ImageStates(tiny_base("clip"), None, pairs.images, **whole)
    assert ("set data.views=1" in caplog.text) is warned


def test_maps_are_changed_where_there_are_numbers_and_nowhere_else(pairs: Any, cache: Path, tmp_path: Path) -> None:
    base, maps = load_base(BUILDERS["starter"](tmp_path / "starter"), device="cpu"), MapViewsConfig(0.5, True, 0.5)
    states = ImageStates(
        base,
        TowerCut(base, "image", sites(base, "image", "blocks")[8]),
        pairs.images[:3],
        viewed=3,
        views=0,
        options=OPTIONS,
        seed=3,
        maps=maps,
    )
    states.fill(cache)
    items, views, numbers = np.array([2, 0]), np.array([0, 0]), draw_numbers(np.random.default_rng(0), (2,))
    plain, changed = states(items, views), states(items, views, numbers)
    assert torch.equal(changed["states"], make_map_views(plain["states"], numbers, maps))
    assert not torch.allclose(changed["states"], plain["states"])


def test_states_that_are_no_maps_are_not_changed(tiny_base: Any, pairs: Any) -> None:
    base, maps = tiny_base("clip"), MapViewsConfig(flip=True)
    options: dict[str, Any] = {"viewed": 10, "views": 0, "options": OPTIONS, "seed": 3, "maps": maps}
    ImageStates(base, TowerCut(base, "image", None), pairs.images, **options)
    ImageStates(base, None, pairs.images, **options)
    with pytest.raises(RecipeError, match=r"data.map_augmentation .* image.layers.1 have shape \(17, 16\)"):
        ImageStates(base, TowerCut(base, "image", sites(base, "image", "layers")[1]), pairs.images, **options)


def test_without_a_cut_nothing_is_cached(tiny_base: Any, pairs: Any, cache: Path) -> None:
    base = tiny_base("clip")
    pictures, texts = picture_states(base, None, pairs), TextStates(base, None, pairs.captions)
    pictures.fill(cache)
    texts.fill(cache)
    assert not cache.exists()
    assert pictures.nbytes == texts.nbytes == 0
    with torch.no_grad():
        found = base.pixel_features(pictures(np.array([1, 2]), np.array([0, 1])))
        torch.testing.assert_close(found[0], base.image_features([pairs.images[1].read()])[0])
        assert base.token_features(texts(np.array([1]), np.array([0]))).shape == (1, base.embedding_dim)


def test_a_second_fill_computes_nothing(tiny_base: Any, pairs: Any, cache: Path, monkeypatch: Any) -> None:
    base = tiny_base("clip")
    cut = TowerCut(base, "image", None)
    first = picture_states(base, cut, pairs)
    first.fill(cache)
    second = picture_states(base, cut, pairs)
    monkeypatch.setattr(PictureViews, "pixels", None)
    second.fill(cache)
    items = np.arange(10)
    assert torch.equal(first(items, items % 3)["features"], second(items, items % 3)["features"])


def test_bytes_are_told_before(tiny_base: Any, pairs: Any, cache: Path) -> None:
    base = tiny_base("clip")
    layer = sites(base, "image", "layers")[1]
    states = picture_states(base, TowerCut(base, "image", layer), pairs)
    assert states.nbytes == 2 * 17 * 16 * (14 + 2 * 10)  # 16 patches and a CLS token of width 16


def test_bytes_of_captions_take_a_pass_of_one_and_none_where_all_are_cached(
    tiny_base: Any, pairs: Any, cache: Path, monkeypatch: Any
) -> None:
    base = tiny_base("clip")
    cut, passed = TowerCut(base, "text", sites(base, "text", "layers")[1]), []
    lower = cut.lower
    monkeypatch.setattr(cut, "lower", lambda tokens: passed.append(len(tokens["input_ids"])) or lower(tokens))
    texts = TextStates(base, cut, pairs.captions)
    assert texts.missing_bytes(cache) == texts.nbytes > 0
    assert passed == [1, 1]
    texts.fill(cache)
    passed.clear()
    assert texts.missing_bytes(cache) == 0
    assert not passed


def test_a_picture_that_went_bad_is_named(tiny_base: Any, pairs: Any, cache: Path) -> None:
    base = tiny_base("clip")
    states = picture_states(base, TowerCut(base, "image", None), pairs)
    pairs.images[4].path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"004.png.*start again"):
        states.fill(cache)


def test_nan_in_a_view_is_named_and_never_cached(
    tiny_base: Any, pairs: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("clip")
    states = picture_states(base, TowerCut(base, "image", None), pairs)
    original = ImageStates._states

    def poisoned(self: ImageStates, items: list[int], view: int) -> np.ndarray:
        found = original(self, items, view)
        if view == 1 and 4 in items:
            found[list(items).index(4), 0] = np.nan
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ImageStates, "_states", poisoned)
        with pytest.raises(DataError, match=r"NaN or infinity for .*004\.png.*check"):
            states.fill(cache)
    again = picture_states(base, TowerCut(base, "image", None), pairs)
    again.fill(cache)
    assert torch.isfinite(again(np.arange(10), np.ones(10, np.int64))["features"]).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_the_embeddings_of_the_base(method: str, tiny_folder: Any, pairs: Any) -> None:
    base = load_base(str(tiny_folder("vision-text-dual-encoder")), device="cpu")
    expected = base.encode_image([one.read() for one in pairs.images]), base.encode_text(pairs.captions)
    recipe = toy_recipe(Path("b"), Path("t.csv"), Path("v.csv"), Path("out"), method=method)
    held = METHODS[method](base, recipe)
    frozen = frozen_states(recipe, held, pairs, pairs)
    assert isinstance(frozen, FrozenStates)
    frozen.fill()
    with held.at_work():
        found = base_embeddings(frozen, pairs)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine.numpy(), theirs, atol=3e-3)
        again = embed(frozen.image_side, len(pairs.images) + np.arange(14))  # as validation
        np.testing.assert_allclose(again.numpy(), expected[0], atol=3e-3)


def test_states_of_other_inputs_are_kept_apart(
    tiny_folder: Any, tiny_base: Any, pairs: Any, cache: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder("clip"), tmp_path / "clip"))
    changes: dict[str, dict[str, Any]] = {
        "preprocessor_config.json": {"image_mean": [0.5] * 3},
        "tokenizer_config.json": {"model_max_length": 8},
    }
    for name, change in changes.items():
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **change}))
    captions = ["a photo of a small red car on the road", "tea"]
    for base in (tiny_base("clip"), load_base(folder, device="cpu")):
        images = picture_states(base, TowerCut(base, "image", None), pairs, views=0)
        texts = TextStates(base, TowerCut(base, "text", None), captions)
        for states, expected in (
            (images, base.image_features([one.read() for one in pairs.images[:2]])),
            (texts, base.text_features(captions)),
        ):
            states.fill(cache)
            found = states(np.arange(2), np.zeros(2, np.int64))["features"]
            torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
