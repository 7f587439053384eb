from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models import DUAL_ENCODERS, IMAGE_SIZE
from trimtab.towers.parts import image_processor_class
from trimtab.towers.resizing import shrunk

SIZES = [(1, 1), (3, 200), (200, 3), (IMAGE_SIZE, IMAGE_SIZE), (33, 32), (32, 47), (131, 97), (97, 131), (640, 481)]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("family", DUAL_ENCODERS)
def test_pixels_are_those_of_transformers(family: str, tiny_base: Any) -> None:
    base = tiny_base(family)
    for size in SIZES:
        picture = noise(*size)
        before = picture.tobytes()
        assert_same(base.preprocess(picture), dict(base.image_processor(images=[picture], return_tensors="pt")))
        assert picture.tobytes() == before, "the caller's picture is left alone"


@pytest.mark.parametrize(
    ("kind", "settings", "shrinks"),
    [
        ("CLIP", {}, True),
        ("CLIP", {"resample": 0, "do_convert_rgb": False}, True),
        ("CLIP", {"size": {"height": 60, "width": 90}, "do_center_crop": False}, True),
        ("Bit", {}, True),
        ("CLIP", {"do_resize": False}, False),
        ("CLIP", {"size": {"shortest_edge": 60, "longest_edge": 90}}, False),
        ("CLIP", {"size": {"max_height": 60, "max_width": 90}}, False),
        ("ConvNext", {"size": {"shortest_edge": 224}}, False),  # it resizes in a way of its own
    ],
)
def test_settings_of_processors(kind: str, settings: dict[str, Any], shrinks: bool) -> None:
    processor = image_processor_class(f"{kind}ImageProcessor")(**settings)
    picture = noise(640, 481)
    small = shrunk(picture, processor)
    assert (small is not picture) == shrinks
    assert_same(
        dict(processor(images=[small], return_tensors="pt")), dict(processor(images=[picture], return_tensors="pt"))
    )


def test_pictures_of_other_modes_are_left_to_the_processor() -> None:
    processor = image_processor_class("CLIPImageProcessor")()
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert shrunk(picture := noise(640, 481, mode), processor) is picture
    picture = noise(640, 481)
    picture.info["transparency"] = (0, 0, 0)
    assert shrunk(picture, processor) is picture


def test_a_photo_is_not_copied_at_its_full_size(tiny_base: Any) -> None:
    base, photo = tiny_base("clip"), noise(1600, 1200)
    base.preprocess(photo)
    tracemalloc.start()
    try:
        base.preprocess(photo)
        assert tracemalloc.get_traced_memory()[1] < 1600 * 1200
    finally:
        tracemalloc.stop()
