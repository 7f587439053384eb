"""What the frozen image tower says of pictures, once for all: embeddings and patch tokens, in each view, cached.

One object can serve many runs: `PictureFeatures.take` gives the same features for some of the pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from trimtab.adapters.prompt import Pictures
from trimtab.config import ViewsConfig
from trimtab.data.cache import CachedArrays, Progress, cached_arrays
from trimtab.data.cached import cached_count
from trimtab.data.shards import PictureFile
from trimtab.files import cache_home
from trimtab.precision import fast_inference, resolved_precision
from trimtab.recipes.picture_views import PictureViews
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.passes import Passes, per_pass
from trimtab.towers.prompting import image_tokens

_BATCH = 64


class PictureFeatures:
    """Features of N pictures.

    Args:
        views: augmented views besides the picture itself.
        tokens: keep patch tokens too.

    Raises:
        RecipeError: `tokens` are wanted and the image tower has none.
    """

    def __init__(
        self,
        base: DualEncoder,
        pictures: Sequence[PictureFile],
        *,
        views: int = 0,
        options: ViewsConfig | None = None,
        seed: int = 0,
        tokens: bool = True,
    ) -> None:
        self.base = base
        self.views, self.tokens = views, tokens
        self._source = PictureViews(base, pictures, options or ViewsConfig(), seed)
        self._cached: list[CachedArrays] = []
        self._rows = np.arange(len(self._source))
        self._dim = base.embedding_dim
        self._shape: tuple[int, int] = (0, 0)
        self._masked = False
        if tokens:
            grey = base.preprocess(Image.new("RGB", (64, 64), (128, 128, 128)))
            with torch.no_grad():
                found = image_tokens(base, grey)
            self._shape = (found.tokens.shape[1], found.tokens.shape[2])
            self._masked = found.mask is not None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def patch_width(self) -> int:
        """Wi, 0 without patch tokens."""
        return self._shape[1]

    @property
    def files(self) -> list[PictureFile]:
        """The pictures."""
        return [self._source.pictures[at] for at in self._rows]

    @property
    def nbytes(self) -> int:
        """Bytes that the cache takes."""
        return 2 * self._width * len(self._source) * (1 + self.views)

    def missing_bytes(self, folder: Path) -> int:
        """Bytes of what is not in the cache yet."""
        keys = self._source.keys()
        views = range(self.views + 1)
        cached = sum(cached_count(folder, "arrays", self._cache_parts(view), keys) for view in views)
        return 2 * self._width * (len(set(keys)) * len(views) - cached)

    def fill(self, folder: Path | None = None, progress: Progress | None = None) -> PictureFeatures:
        """Compute what is not in the cache yet; returns itself.

        Raises:
            DataError: a picture cannot be decoded any more.
        """
        keys = self._source.keys()
        place = {key: at for at, key in enumerate(keys)}
        for view in range(self.views + 1):

            def compute(some: list[str], view: int = view) -> np.ndarray:
                return self._encode_all([place[key] for key in some], view)

            where = cache_home() / "features" if folder is None else folder
            self._cached.append(cached_arrays(where, self._cache_parts(view), keys, compute, progress=progress))
        return self

    def encode(self) -> Pictures:
        """Features of the pictures as they are, computed anew: to see how long it takes."""
        return self._unpacked(torch.from_numpy(self._encode_all(self._rows.tolist(), 0)).to(self.base.device))

    def take(self, positions: np.ndarray) -> PictureFeatures:
        """The same features for some of the pictures, by position; nothing is copied."""
        some = copy.copy(self)
        some._rows = self._rows[positions]
        return some

    def pictures(self, items: np.ndarray | slice | None = None, views: np.ndarray | int = 0) -> Pictures:
        """Features of pictures (B,), all by default, each in one of its views (B,)."""
        rows = self._rows if items is None else self._rows[items]
        views = np.broadcast_to(views, rows.shape)
        flat = np.empty((len(rows), self._width), np.result_type(*(one.dtype for one in self._cached)))
        for view in np.unique(views):
            mine = views == view
            flat[mine] = self._cached[view][rows[mine]]
        return self._unpacked(torch.from_numpy(flat).to(self.base.device))

    def _cache_parts(self, view: int) -> list[str]:
        precision = resolved_precision("auto", self.base.device)
        tokens = "x".join(map(str, self._shape)) if self.tokens else "no"
        parts = [f"picture embeddings and {tokens} tokens", self.base.fingerprint, self.base.image_input_digest]
        return [*parts, precision, *self._source.cache_parts(view)]

    @property
    def _width(self) -> int:
        count, width = self._shape
        return self._dim + count * width + (count if self._masked else 0)

    def _unpacked(self, flat: Tensor) -> Pictures:
        count, width = self._shape
        embeddings = F.normalize(flat[:, : self._dim].float(), dim=-1)
        if not self.tokens:
            return Pictures(embeddings)
        tokens = flat[:, self._dim : self._dim + count * width].view(-1, count, width).float()
        mask = flat[:, self._dim + count * width :] > 0 if self._masked else None
        return Pictures(embeddings, tokens, mask)

    def _encode_all(self, positions: Sequence[int], view: int) -> np.ndarray:
        passes = Passes(per_pass(_BATCH, "images", self.base.device))
        with fast_inference(self.base.device):
            return np.concatenate(passes.of(lambda span: self._encode(positions[span], view), len(positions)))

    @torch.no_grad()
    def _encode(self, positions: Sequence[int], view: int) -> np.ndarray:
        stacked = self._source.pixels(positions, [view] * len(positions))
        if not self.tokens:
            return F.normalize(self.base.pixel_features(stacked).float(), dim=-1).cpu().numpy()
        found = image_tokens(self.base, stacked)
        parts = [F.normalize(found.features.float(), dim=-1), found.tokens.float().flatten(1)]
        if found.mask is not None:
            parts.append(found.mask.float())
        return torch.cat(parts, dim=1).cpu().numpy()
