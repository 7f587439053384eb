"""Augmented views of pictures, drawn by seed, picture and number alone: the same in every process and run."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageEnhance

from trimtab.config import ViewsConfig

_ASPECT = 4 / 3  # of a crop, at most, either way
_ATTEMPTS = 10
_LARGEST_SIDE = 768  # no tower reads more, and colours of large photos take long


def make_view(image: Image.Image, view: int, *, seed: int, key: str, options: ViewsConfig) -> Image.Image:
    """One view of a picture: random resized crop, mirroring, brightness, contrast, saturation and hue.

    A crop is stretched to a square, as in the training of most image towers (Szegedy et al., arXiv 1409.4842),
    so that no processor cuts it again. Every kind of change has numbers of its own: without mirroring, the crops
    and colours are the same as with it.

    Args:
        image: decoded RGB picture; it is left as it is.
        view: 0 is the picture itself; from 1 on, views differ.
        seed: of the run.
        key: what stays the same for a picture wherever it lies, such as `PictureFile.name`.
        options: how far a view may be from the picture.

    Returns:
        An RGB picture: the picture itself for view 0; else a square, or the whole picture where
        `options.crop_min` is 1.
    """
    if image.mode != "RGB":
        raise ValueError(f"the picture has mode {image.mode}; decode it with read_image")
    if view < 0:
        raise ValueError(f"view={view} must be at least 0")
    if view == 0:
        return image
    # Seeding from text goes through SHA-512, and `random()` is promised to stay: other draws are not.
    rng = random.Random(f"{seed}/{view}/{key}")
    flipped = rng.random() < 0.5
    brightness, contrast, saturation, hue = (2 * rng.random() - 1 for _ in range(4))
    result = image
    if options.crop_min < 1:
        result = _cropped(result, options.crop_min, rng)
    elif max(image.size) > _LARGEST_SIDE:
        result = image.copy()
        result.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.BICUBIC)
    if options.flip and flipped:
        result = result.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if options.colour > 0:
        result = ImageEnhance.Brightness(result).enhance(1 + options.colour * brightness)
        result = ImageEnhance.Contrast(result).enhance(1 + options.colour * contrast)
        result = ImageEnhance.Color(result).enhance(1 + options.colour * saturation)
        result = _turn_hue(result, options.colour * hue / 8)
    return result


def _cropped(image: Image.Image, smallest: float, rng: random.Random) -> Image.Image:
    """A part of at least `smallest` of the area and of bounded aspect, as a square."""
    width, height = image.size
    for _ in range(_ATTEMPTS):
        area = width * height * (smallest + (1 - smallest) * rng.random())
        aspect = math.exp(math.log(_ASPECT) * (2 * rng.random() - 1))
        part = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if part[0] <= width and part[1] <= height:
            left, top = (width - part[0]) * rng.random(), (height - part[1]) * rng.random()
            break
    else:  # a long picture has no large part of such an aspect: take its middle
        part = min(width, height * _ASPECT), min(height, width * _ASPECT)
        left, top = (width - part[0]) / 2, (height - part[1]) / 2
    side = max(1, min(_LARGEST_SIDE, round(math.sqrt(part[0] * part[1]))))
    box = (left, top, min(width, left + part[0]), min(height, top + part[1]))
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    shift = round(256 * turn)
    if shift == 0:
        return image
    hue, saturation, value = image.convert("HSV").split()
    return Image.merge("HSV", (hue.point([(level + shift) % 256 for level in range(256)]), saturation, value)).convert(
        "RGB"
    )
