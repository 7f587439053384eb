"""Pictures in their augmented views, as pixels for a base: what every store of frozen features reads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from torch import Tensor

from trimtab.config import ViewsConfig
from trimtab.data.images import ImageError
from trimtab.data.shards import PictureFile, explain_vanished
from trimtab.data.views import make_view
from trimtab.errors import DataError
from trimtab.towers.dual_encoder import DualEncoder

_THREADS = 4


class PictureViews:
    """Pictures of one base, decoded anew each time.

    Args:
        seed: of the views; view 0 is the picture itself.
    """

    def __init__(self, base: DualEncoder, pictures: Sequence[PictureFile], options: ViewsConfig, seed: int) -> None:
        self.base = base
        self.pictures = list(pictures)
        self.options, self.seed = options, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def keys(self) -> list[str]:
        """What caches know each picture by; its bytes are read.

        Raises:
            DataError: a picture is gone or cannot be read any more.
        """
        with explain_vanished():
            return [f"{picture.digest()} {picture.name}" for picture in self.pictures]

    def cache_parts(self, view: int) -> list[str]:
        """What the caches of a view have in their name beside that of the base."""
        return [f"view {view} {self.seed} {sorted(asdict(self.options).items())}"] if view else []

    def pixels(self, items: Sequence[int], views: Sequence[int]) -> dict[str, Tensor]:
        """Pixel tensors of pictures (B,), each in one of its views (B,).

        Raises:
            DataError: a picture cannot be decoded any more.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(self._one, items, views))
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    def _one(self, item: int, view: int) -> dict[str, Tensor]:
        picture = self.pictures[item]
        try:
            image = make_view(picture.read(), view, seed=self.seed, key=picture.name, options=self.options)
            return self.base.preprocess(image)
        except ImageError as error:
            raise DataError(f"{picture}: {error.reason}; it could be read when the run began: start again") from error
