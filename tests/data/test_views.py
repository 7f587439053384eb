"""Views are a function of seed, key and number alone, and stay close to the picture."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trimtab.config import ViewsConfig
from trimtab.data.views import make_view

PLAIN = ViewsConfig(crop_min=1.0, flip=False, colour=0.0)


def gradient(width: int = 80, height: int = 60) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=2).astype(np.uint8))


def view(number: int = 1, *, seed: int = 0, key: str = "a.png", options: ViewsConfig, image=None) -> np.ndarray:
    return np.asarray(make_view(image or gradient(), number, seed=seed, key=key, options=options))


def test_view_0_is_the_picture() -> None:
    image = gradient()
    assert make_view(image, 0, seed=0, key="a", options=ViewsConfig()) is image


def test_views_depend_on_seed_key_and_number_alone() -> None:
    image = gradient()
    before = image.tobytes()
    first = view(options=ViewsConfig(), image=image)
    assert image.tobytes() == before, "the picture is left as it is"
    np.testing.assert_array_equal(view(options=ViewsConfig(), image=image), first)
    for change in ({"seed": 1}, {"key": "b.png"}, {"number": 2}):
        other = view(**change, options=ViewsConfig())
        assert other.shape != first.shape or (other != first).any(), change


def test_another_process_makes_the_same_view() -> None:
    code = (
        "import hashlib; from PIL import Image; from trimtab.config import ViewsConfig; "
        "from trimtab.data.views import make_view; "
        "image = Image.linear_gradient('L').convert('RGB'); "
        "view = make_view(image, 3, seed=7, key='猫.png', options=ViewsConfig()); "
        "print(view.size, hashlib.sha256(view.tobytes()).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    image = Image.linear_gradient("L").convert("RGB")
    here = make_view(image, 3, seed=7, key="猫.png", options=ViewsConfig())
    assert outputs == {f"{here.size} {hashlib.sha256(here.tobytes()).hexdigest()}\n"}


def test_kinds_of_change_are_independent() -> None:
    crops = [view(n, options=ViewsConfig(flip=False, colour=0.0)) for n in range(1, 30)]
    mirrored = [view(n, options=ViewsConfig(colour=0.0)) for n in range(1, 30)]
    same = [bool((a == b).all()) for a, b in zip(crops, mirrored, strict=True)]
    assert all(equal or (a == b[:, ::-1]).all() for a, b, equal in zip(crops, mirrored, same, strict=True))
    assert 5 < sum(same) < 24
    for number in range(1, 5):
        assert view(number, options=ViewsConfig()).shape == crops[number - 1].shape


def test_without_changes_the_picture_stays() -> None:
    np.testing.assert_array_equal(view(options=PLAIN), np.asarray(gradient()))
    large = make_view(gradient(1600, 800), 1, seed=0, key="a", options=PLAIN)
    assert large.size == (768, 384)
    assert make_view(gradient(1300, 1200), 1, seed=0, key="a", options=ViewsConfig()).size == (768, 768)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.floats(0.05, 1), st.integers(1, 50))
def test_crops_show_at_least_the_smallest_part(width: int, height: int, smallest: float, number: int) -> None:
    options = ViewsConfig(crop_min=smallest, flip=False, colour=0.0)
    image = gradient(width, height)
    result = make_view(image, number, seed=0, key="a", options=options)
    assert result.mode == "RGB"
    if smallest == 1:
        assert result.size == image.size
        return
    side = result.width
    assert result.size == (side, side)
    long = max(width / height, height / width)
    floor = smallest if long <= 4 / 3 else min(smallest, 4 / 3 / long)
    assert np.sqrt(width * height) + 0.51 >= side >= np.sqrt(floor * width * height) - 0.51
    shown = np.ptp(np.asarray(result)[:, :, 0].astype(int)) * np.ptp(np.asarray(result)[:, :, 1].astype(int))
    if min(width, height) > 100:
        assert shown / 255**2 > floor * 0.85, "the gradient tells how much is shown"


def test_crops_vary_in_place_and_aspect() -> None:
    crops = [view(n, options=ViewsConfig(flip=False, colour=0.0)).astype(int) for n in range(1, 40)]
    left, top = np.array([(crop[0, 0, 0], crop[0, 0, 1]) for crop in crops]).T
    assert left.std() > 10
    assert top.std() > 5
    aspects = np.array([np.ptp(crop[..., 0]) * 80 / (np.ptp(crop[..., 1]) * 60) for crop in crops])
    assert 0.7 < aspects.min() < 0.95
    assert 1.05 < aspects.max() < 1.45


def test_colours_change_within_bounds() -> None:
    options = ViewsConfig(crop_min=1.0, flip=False, colour=0.2)
    image = Image.new("RGB", (8, 8), (200, 60, 40))
    colours = np.array([view(n, options=options, image=image)[0, 0] for n in range(1, 200)], int)
    assert len(np.unique(colours, axis=0)) > 100
    assert np.abs(colours - (200, 60, 40)).max() < 120
    assert (colours[:, 0] > colours[:, 1]).all(), "red stays red"
    values = colours.max(axis=1)
    assert values.min() >= 200 * 0.8 * 0.8
    hues = np.array([Image.new("RGB", (1, 1), tuple(c)).convert("HSV").getpixel((0, 0))[0] for c in colours.tolist()])
    start = image.convert("HSV").getpixel((0, 0))[0]
    turns = (hues - start + 128) % 256 - 128
    assert -9 <= turns.min() < -2
    assert 2 < turns.max() <= 9
    grey = Image.new("RGB", (4, 4), (90, 90, 90))
    assert np.ptp(view(options=options, image=grey), axis=2).max() == 0, "grey has no hue"


def test_what_is_no_view_is_refused() -> None:
    with pytest.raises(ValueError, match="mode L"):
        make_view(Image.new("L", (4, 4)), 1, seed=0, key="a", options=PLAIN)
    with pytest.raises(ValueError, match="view=-1"):
        make_view(gradient(), -1, seed=0, key="a", options=PLAIN)
