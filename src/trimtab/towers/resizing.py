"""Resizing of pictures as a transformers image processor does it, without its copies of the full picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

# What happens to a picture before it is resized, and the resizing: a processor with its own may give other pixels.
_STEPS = (
    *("preprocess", "_preprocess_image_like_inputs", "_prepare_image_like_inputs", "process_image", "convert_to_rgb"),
    *("_preprocess", "resize"),
)


def shrunk(image: Image.Image, processor: Any) -> Image.Image:
    """A picture in the size that `processor`, one of transformers', resizes it to, if that is smaller; else as it is.

    The processor then finds nothing to resize, and gives the same pixels. By itself it turns a photo into an array and
    back before, which takes longer than the resizing and several times the photo's memory.
    """
    from transformers.image_transforms import get_resize_output_image_size
    from transformers.image_utils import SizeDict

    size = getattr(processor, "size", None)
    if not (_is_plain(type(processor)) and processor.do_resize and isinstance(size, SizeDict)):
        return image
    if image.mode != "RGB" or "transparency" in image.info or not isinstance(processor.resample, int):
        return image
    if size.shortest_edge and not size.longest_edge:
        shape = np.broadcast_to(np.uint8(0), (3, image.height, image.width))  # takes no memory
        height, width = get_resize_output_image_size(
            shape, size.shortest_edge, default_to_square=False, input_data_format="channels_first"
        )
    elif size.height and size.width and not (size.shortest_edge or size.max_height):
        height, width = size.height, size.width
    else:
        return image
    if width * height >= image.width * image.height:
        return image
    return image.resize((width, height), resample=processor.resample)


def _is_plain(kind: Any) -> bool:
    """Whether a class of image processors leaves all steps up to the resizing as transformers has them for Pillow."""
    from transformers.image_processing_backends import PilBackend

    return issubclass(kind, PilBackend) and all(getattr(kind, step) is getattr(PilBackend, step) for step in _STEPS)
