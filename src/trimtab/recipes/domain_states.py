"""What lies below the trained layers of both towers: computed once and cached, or looked up whole where nothing may be.

Pictures are cached in each of their views, texts once. Where a tower is trained from the ground up, pictures are
decoded and views are made anew in every step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trimtab.config import DomainRecipe, MapViewsConfig, ViewsConfig
from trimtab.data.cache import CachedArrays, PackedStates, Progress, cached_arrays, cached_states, cached_vectors
from trimtab.data.cached import cached_count
from trimtab.data.pairs import ImageTextPairs
from trimtab.data.shards import PictureFile
from trimtab.errors import RecipeError
from trimtab.files import cache_home
from trimtab.precision import fast_inference, resolved_precision
from trimtab.recipes.domain_methods import Method
from trimtab.recipes.estimates import room_on_disk
from trimtab.recipes.picture_views import PictureViews
from trimtab.tasks.domain import Side
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.layers import TowerCut
from trimtab.towers.map_views import make_map_views
from trimtab.towers.passes import Passes, per_pass, rows_of
from trimtab.training.trackers import progress_reporter

_BATCH = 64
logger = logging.getLogger(__name__)


class ImageStates:
    """States of pictures at a cut, or the pictures themselves; a `trimtab.tasks.domain.Lookup`.

    Args:
        cut: None looks pictures up as pixels.
        images: N pictures; the first `viewed` of them have views.
        views: augmented views besides the picture itself.
        maps: how cached maps are changed when they are looked up with numbers.

    Raises:
        RecipeError: `maps` changes what enters the cut, which is no map.
    """

    def __init__(
        self,
        base: DualEncoder,
        cut: TowerCut | None,
        images: Sequence[PictureFile],
        *,
        viewed: int,
        views: int,
        options: ViewsConfig,
        seed: int,
        maps: MapViewsConfig | None = None,
    ) -> None:
        self.base, self.cut = base, cut
        self.images = list(images)
        self.viewed, self.views = viewed, views
        self.options = options
        self.seconds = 0.0
        self._source = PictureViews(base, self.images, options, seed)
        self._keys = self._source.keys() if cut else []
        self._cached: list[CachedArrays] = []
        # A tower that is passed from its pixels, or ends below the cut, has no maps to crop.
        self._maps = maps if maps and maps.changes and cut and cut.site else None
        if maps and maps.changes and not self._maps and not views:
            logger.warning(
                "no maps are cached here for data.map_augmentation to change, so pictures are trained on as they are: "
                "set data.views=1 to augment them"
            )
        if self._maps and cut and len(shape := self._layout["states"][0]) != 3:
            raise RecipeError(
                f"data.map_augmentation changes maps of a convolutional trunk, but the states that enter {cut.site} "
                f"have shape {shape}: set data.map_augmentation={{}} and perhaps more data.views"
            )

    def __call__(self, items: np.ndarray, views: np.ndarray, numbers: np.ndarray | None = None) -> dict[str, Tensor]:
        """Tensors of images (B,), each in one of its views (B,), and of its map if there are numbers (B, K)."""
        if self.cut is None:
            return self._source.pixels(items.tolist(), views.tolist())
        flat = np.empty((len(items), *self._cached[0].shape[1:]), np.result_type(*(one.dtype for one in self._cached)))
        for view in np.unique(views):
            rows = views == view
            flat[rows] = self._cached[view][items[rows]]
        below = self._unpacked(torch.from_numpy(flat))
        if self._maps and numbers is not None:
            below["states"] = make_map_views(below["states"], numbers, self._maps)
        return below

    def fill(self, folder: Path, progress: Progress | None = None) -> None:
        """Compute what is not in the cache yet: nothing without a cut.

        Raises:
            DataError: a picture cannot be decoded any more.
        """
        if self.cut is None:
            return
        started = time.monotonic()
        passes = Passes(per_pass(_BATCH, "images", self.base.device))
        for view in range(self.views + 1):
            parts, keys = self._cache_of(self.cut, view)
            place = {key: item for item, key in enumerate(keys)}

            def compute(some: list[str], view: int = view, place: dict[str, int] = place) -> np.ndarray:
                items = [place[key] for key in some]
                return np.concatenate(passes.of(lambda span: self._states(items[span], view), len(items)))

            self._cached.append(cached_arrays(folder, parts, keys, compute, progress=progress))
        self.seconds = time.monotonic() - started

    def _cache_of(self, cut: TowerCut, view: int) -> tuple[list[str], list[str]]:
        """What names the cache of a view, and its items."""
        precision = resolved_precision("auto", self.base.device)
        parts = ["image states", self.base.fingerprint, self.base.image_input_digest]
        parts += [str(cut.site or "features"), precision, *self._source.cache_parts(view)]
        return parts, self._keys[: None if view == 0 else self.viewed]

    def __len__(self) -> int:
        return len(self.images)

    def inputs(self, items: np.ndarray) -> dict[str, Tensor]:
        """Pixel tensors of pictures (B,) as they are."""
        return self._source.pixels(items.tolist(), [0] * len(items))

    @property
    def nbytes(self) -> int:
        """Bytes that the cache takes, from the shapes alone."""
        if self.cut is None:
            return 0
        return self._bytes_each * (len(self.images) + self.views * self.viewed)

    def missing_bytes(self, folder: Path) -> int:
        """Bytes of what is not in the cache yet."""
        if self.cut is None:
            return 0
        caches = [self._cache_of(self.cut, view) for view in range(self.views + 1)]
        return self._bytes_each * sum(
            len(set(keys)) - cached_count(folder, "arrays", parts, keys) for parts, keys in caches
        )

    @property
    def _bytes_each(self) -> int:
        return 2 * sum(int(np.prod(shape)) for shape, _ in self._layout.values())

    @cached_property
    def _layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor of one picture below the cut."""
        assert self.cut is not None
        grey = self.base.preprocess(Image.new("RGB", (64, 64), (128, 128, 128)))
        return {name: (tuple(one.shape[1:]), one.dtype) for name, one in self.cut.lower(grey).items()}

    def _states(self, items: Sequence[int], view: int) -> np.ndarray:
        assert self.cut is not None
        pixels = self._source.pixels(items, [view] * len(items))
        with fast_inference(self.base.device):
            below = self.cut.lower(pixels)
        # Named tensors of any shape side by side in one row.
        return torch.cat([below[name].float().flatten(1) for name in self._layout], dim=1).cpu().numpy()

    def _unpacked(self, flat: Tensor) -> dict[str, Tensor]:  # (B, numbers of one picture)
        below, start = {}, 0
        for name, (shape, dtype) in self._layout.items():
            size = int(np.prod(shape))
            part = flat[:, start : start + size].reshape(-1, *shape)
            below[name] = part.float() if dtype.is_floating_point else part.to(dtype)
            start += size
        return below


class TextStates:
    """Token states of captions at a cut, their features where nothing is trained, or the tokens themselves."""

    def __init__(self, base: DualEncoder, cut: TowerCut | None, captions: Sequence[str]) -> None:
        self.base, self.cut = base, cut
        self.captions = list(captions)
        self.seconds = 0.0
        self._states: PackedStates | CachedArrays | None = None

    def __call__(self, items: np.ndarray, views: np.ndarray, numbers: np.ndarray | None = None) -> dict[str, Tensor]:
        """Tensors of captions (B,); their `views` and `numbers` mean nothing."""
        if self.cut is None:
            return self.inputs(items)
        if isinstance(self._states, PackedStates):
            states, _ = self._states.rows(items)
            return {"states": torch.from_numpy(states).float()}
        assert self._states is not None
        return {"features": torch.from_numpy(self._states[items]).float()}

    @property
    def reads_tokens(self) -> bool:
        """Whether a step reads tokens beside what lies below: not those of texts that are cached whole."""
        return self.cut is None or self.cut.site is not None

    @property
    def nbytes(self) -> int:
        """Bytes that the cache takes, from the lengths of some captions."""
        if self.cut is None:
            return 0
        some = self.captions[:: max(1, len(self.captions) // 64)]
        tokens = self.base.text_inputs(some)
        with torch.no_grad():
            below = self.cut.lower(rows_of(tokens, slice(1)))
        if self.cut.site is None:
            each = float(below["features"].shape[-1])
        else:
            each = float(self.cut.token_mask(tokens).sum()) * below["states"].shape[-1] / len(some)
        return round(2 * each * len(self.captions))

    def missing_bytes(self, folder: Path) -> int:
        """Bytes of what is not in the cache yet, as roughly."""
        if self.cut is None or not self.captions:
            return 0
        kind: Literal["states", "arrays"] = "states" if self.cut.site else "arrays"
        missing = len(set(self.captions)) - cached_count(folder, kind, self._cache_parts(self.cut), self.captions)
        return round(self.nbytes / len(self.captions) * missing) if missing else 0

    def _cache_parts(self, cut: TowerCut) -> list[str]:
        precision = resolved_precision("auto", self.base.device)
        inputs = [self.base.fingerprint, self.base.text_input_digest]
        return ["text states", *inputs, str(cut.site or "features"), precision]

    def __len__(self) -> int:
        return len(self.captions)

    def inputs(self, items: np.ndarray) -> dict[str, Tensor]:
        """Token tensors of captions (B,)."""
        return self.base.text_inputs([self.captions[item] for item in items])

    def fill(self, folder: Path, progress: Progress | None = None) -> None:
        """Compute what is not in the cache yet."""
        cut = self.cut
        if cut is None:
            return
        started = time.monotonic()
        parts = self._cache_parts(cut)

        passes = Passes(_BATCH)

        def lower(texts: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
            tokens = self.base.text_inputs(texts)
            with fast_inference(self.base.device):
                return cut.lower(tokens), tokens

        def states_of(texts: list[str]) -> list[np.ndarray]:
            def run(span: slice) -> list[np.ndarray]:
                below, tokens = lower(texts[span])
                states, mask = below["states"].float().cpu().numpy(), cut.token_mask(tokens).numpy()
                return [one[real] for one, real in zip(states, mask, strict=True)]

            return [one for some in passes.of(run, len(texts)) for one in some]

        def features_of(texts: list[str]) -> np.ndarray:
            def run(span: slice) -> np.ndarray:
                return lower(texts[span])[0]["features"].float().cpu().numpy()

            return np.concatenate(passes.of(run, len(texts)))

        if cut.site is None:
            self._states = cached_vectors(folder, parts, self.captions, features_of, progress=progress)
        else:
            self._states = cached_states(folder, parts, self.captions, states_of, progress=progress)
        self.seconds = time.monotonic() - started


@dataclass(frozen=True)
class FrozenStates:
    """Both towers of a run as far as they are frozen. Pictures and captions of validation follow those of training.

    Attributes:
        images, texts: what the upper halves of `image_side` and `text_side` start from.
    """

    images: ImageStates
    texts: TextStates
    image_side: Side
    text_side: Side

    @property
    def seconds(self) -> float:
        """Spent on encoding, near 0 when the cache had it all."""
        return self.images.seconds + self.texts.seconds

    @property
    def nbytes(self) -> int:
        """Bytes that the caches take, roughly: texts are taken to be as long as the first ones."""
        return self.images.nbytes + self.texts.nbytes

    def room(self) -> str:
        """What is free on the cache's disk, and a warning where what is not in the cache yet needs more."""
        folder = cache_home() / "features"
        needed = self.images.missing_bytes(folder) + self.texts.missing_bytes(folder)
        return room_on_disk(folder, needed, views=self.images.views)

    def fill(self) -> None:
        """Compute what is not in the cache yet.

        Raises:
            DataError: a picture cannot be decoded any more.
        """
        folder = cache_home() / "features"
        with progress_reporter("pictures", "pictures") as report:
            self.images.fill(folder, report)
        with progress_reporter("captions") as report:
            self.texts.fill(folder, report)


def frozen_states(
    recipe: DomainRecipe, method: Method, train: ImageTextPairs, validation: ImageTextPairs
) -> FrozenStates:
    """What a method leaves frozen; nothing is computed yet.

    Raises:
        RecipeError: a cut above something that is trained, or maps to be changed where there are none.
    """
    base = method.base
    image_cut, text_cut = method.cut("image"), method.cut("text")
    images = ImageStates(
        base,
        image_cut,
        [*train.images, *validation.images],
        viewed=len(train.images),
        views=recipe.data.views,
        options=recipe.data.augmentation,
        seed=recipe.seed,
        maps=recipe.data.map_augmentation,
    )
    texts = TextStates(base, text_cut, [*train.captions, *validation.captions])
    return FrozenStates(
        images,
        texts,
        Side(base, "image", image_cut, images, head=method.head("image")),
        Side(base, "text", text_cut, texts, texts.inputs if texts.reads_tokens else None, head=method.head("text")),
    )


def base_embeddings(frozen: FrozenStates, train: ImageTextPairs) -> tuple[Tensor, Tensor]:
    """Embeddings of the frozen base, (N, D) of the training pictures and (U, D) of their captions.

    A tower of which nothing is frozen later on is run, and cached, as a whole.
    """
    base = frozen.images.base
    image_side, text_side = frozen.image_side, frozen.text_side
    folder = cache_home() / "features"
    if image_side.cut is None:
        cut = TowerCut(base, "image", None)
        images = ImageStates(base, cut, train.images, viewed=0, views=0, options=frozen.images.options, seed=0)
        with progress_reporter("pictures", "pictures") as report:
            images.fill(folder, report)
        image_side = Side(base, "image", cut, images)
    if text_side.cut is None:
        cut = TowerCut(base, "text", None)
        texts = TextStates(base, cut, train.captions)
        texts.fill(folder)
        text_side = Side(base, "text", cut, texts)
    with fast_inference(base.device):  # as what is cached below; texts are few
        of_images = embed(image_side, np.arange(len(train.images)))
    return of_images, embed(text_side, np.arange(len(train.captions)))


@torch.no_grad()
def embed(side: Side, items: np.ndarray, *, batch_size: int = 128) -> Tensor:
    """Unit-norm embeddings (N, D) of pictures as they are, or of captions, on the base's device."""
    passes = Passes(per_pass(batch_size, "images" if side.tower == "image" else "texts", side.base.device))
    parts = passes.of(lambda span: side.features(items[span]), len(items))
    return torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1)
