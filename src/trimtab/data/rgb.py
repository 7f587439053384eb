"""Any decoded picture as an upright, opaque RGB picture.

`trimtab export` copies this file into its loader, so it imports Pillow and numpy alone.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_TIFF_BITS = 0x0102  # BitsPerSample
_TIFF_PHOTOMETRIC = 0x0106  # PhotometricInterpretation: 0 has white at 0
_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image) -> Image.Image:
    """A copy as RGB, turned as EXIF says."""
    image.load()
    # Only after load(): PNG may carry EXIF behind the pixels, and the TIFF plugin turns by itself.
    orientation = _orientation(image)
    rgb = to_rgb(image)
    return rgb.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else rgb


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block does not make the pixels unusable
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float32) * (255 / _white(image))
        # Pillow turns such files of up to 8 bits itself, those of 16 it gives as negatives.
        return _grey(255 - levels if getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == 0 else levels)
    if image.mode == "I":
        values = np.asarray(image)
        # Pillow opens 16-bit PGM, and some versions 16-bit PNG, in this 32-bit mode.
        full = 65535.0 if image.format in ("PNG", "PPM") else _full_scale(values)
        return _grey(values.astype(np.float32) * (255 / full))
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ValueError("the pixels hold NaN or infinity")
        return _grey(values * (255 / _full_scale(values)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if image.format == "BMP" and not rgba.getchannel("A").getbbox():
            return rgba.convert("RGB")  # programs that know no transparency leave its byte 0 in all pixels
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")  # a copy even if it is RGB already


def _white(image: Image.Image) -> int:
    """The value that stands for white in a picture of 16 bits, of which a TIFF file may use 12 alone."""
    (bits, *_) = getattr(image, "tag_v2", {}).get(_TIFF_BITS, (16,))
    return int(2 ** min(bits, 16) - 1)


def _full_scale(values: np.ndarray) -> float:
    """The value that stands for white: the smallest usual range that holds all values, else their maximum."""
    largest = float(values.max())
    usual = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    return next((full for full in usual if largest <= full), largest)


def _grey(values: np.ndarray) -> Image.Image:
    """(H, W) on a scale of 0..255, as an RGB image."""
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
