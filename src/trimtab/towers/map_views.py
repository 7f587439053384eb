"""Augmented views of feature maps: a convolutional trunk's cached states are cropped, mirrored and erased in each step.

A crop of a map is close to the map of a crop, as convolutions look at a small surrounding. So a picture that is encoded
once is another one in every step, for a fraction of what encoding it again would cost.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.config import MapViewsConfig

NUMBERS = 10
"""How many random numbers from 0 to 1 a view is made of."""

_ASPECT = 4 / 3  # of a crop, at most, either way
_ERASED = (0.2, 0.5)  # least and greatest side of what is erased, as parts of the map's


def draw_numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """What `make_map_views` needs for views of such a shape: (*shape, NUMBERS) float32."""
    return rng.random((*shape, NUMBERS), dtype=np.float32)


def make_map_views(maps: Tensor, numbers: np.ndarray, options: MapViewsConfig) -> Tensor:
    """One view of each map: random resized crop (Szegedy et al., arXiv 1409.4842), mirroring, random erasing (Zhong et
    al., arXiv 1708.04896) with the map's own mean.

    Every kind of change has numbers of its own: without mirroring, the crops are the same as with it.

    Args:
        maps: (B, C, H, W) float.
        numbers: (B, NUMBERS) from `draw_numbers`.

    Returns:
        (B, C, H, W); the maps themselves if the options change nothing.
    """
    of_crop, of_flip, of_erasing = torch.from_numpy(numbers).to(maps).split((4, 1, 5), dim=1)
    if options.crop_min < 1 or options.flip:
        maps = _sampled(maps, of_crop, of_flip[:, 0], options)
    if options.erase > 0:
        maps = _erased(maps, of_erasing, options.erase)
    return maps


def _sampled(maps: Tensor, numbers: Tensor, of_flip: Tensor, options: MapViewsConfig) -> Tensor:
    area = options.crop_min + (1 - options.crop_min) * numbers[:, 0]
    aspect = torch.exp(math.log(_ASPECT) * (2 * numbers[:, 1] - 1)) if options.crop_min < 1 else torch.ones_like(area)
    width, height = (area * aspect).sqrt().clamp_max(1), (area / aspect).sqrt().clamp_max(1)
    transform = torch.zeros(len(maps), 2, 3).to(maps)
    transform[:, 0, 0], transform[:, 1, 1] = width, height
    transform[:, 0, 2] = (1 - width) * (2 * numbers[:, 2] - 1)
    transform[:, 1, 2] = (1 - height) * (2 * numbers[:, 3] - 1)
    if options.flip:
        transform[:, 0, 0] *= torch.where(of_flip < 0.5, -1.0, 1.0)
    grid = F.affine_grid(transform, list(maps.shape), align_corners=False)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _erased(maps: Tensor, numbers: Tensor, share: float) -> Tensor:
    rows, columns = maps.shape[-2:]
    smallest, largest = _ERASED
    inside = []
    for side, at, length in ((rows, 1, 2), (columns, 3, 4)):
        size = side * (smallest + (largest - smallest) * numbers[:, length, None])
        start = (side - size) * numbers[:, at, None]
        places = torch.arange(side, device=maps.device) + 0.5
        inside.append((places >= start) & (places < start + size))  # (B, side)
    gone = inside[0][:, None, :, None] & inside[1][:, None, None, :] & (numbers[:, 0] < share)[:, None, None, None]
    return torch.where(gone, maps.mean((2, 3), keepdim=True), maps)
