"""What evaluation asks of a model, and pictures embedded once for several evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trimtab.errors import DataError, ModelError


class Encoder(Protocol):
    """The part of `trimtab.towers.DualEncoder` that evaluation uses.

    ``last_skipped`` lists (position, source, reason) of the images that the last ``encode_image`` left out.
    """

    last_skipped: Any

    def encode_image(self, images: Any, *, on_error: Any = "raise", progress: bool = False) -> np.ndarray:
        """(N, D) float32 unit-norm embeddings of the images that could be read."""

    def encode_text(self, texts: Any, *, progress: bool = False) -> np.ndarray:
        """(N, D) float32 unit-norm embeddings."""


@dataclass(frozen=True)
class Skipped:
    """A picture that an evaluation left out: its position in the input, what it was, and why."""

    position: int
    source: str
    reason: str

    def as_json(self) -> dict[str, str]:
        """Source and reason; positions mean nothing outside the run."""
        return {"source": self.source, "reason": self.reason}


@dataclass(frozen=True)
class EmbeddedImages:
    """Pictures after the image tower; make it once, give it to every evaluation on the same pictures.

    Attributes:
        embeddings: (K, D) of the pictures that could be read.
        positions: (K,) where each stood in the input, ascending.
        total: number of pictures in the input.
        skipped: the others.
        tower: names the image tower, where that has a fingerprint.
    """

    embeddings: np.ndarray
    positions: np.ndarray
    total: int
    skipped: tuple[Skipped, ...] = ()
    tower: str = ""


def embed_images(model: Encoder, sources: Sequence[Any], *, progress: bool = False) -> EmbeddedImages:
    """Embed pictures; those that cannot be read are left out and listed.

    Raises:
        DataError: when there is no picture, or none can be read.
        ModelError: when the embeddings are not finite or not one per picture.
    """
    if not len(sources):
        raise DataError("there are no images to evaluate")
    embeddings = model.encode_image(list(sources), on_error="skip", progress=progress)
    positions, skipped = read_and_skipped(range(len(sources)), model.last_skipped)
    check_some_read(skipped, len(sources))
    check_embeddings(embeddings, len(positions), "images")
    return EmbeddedImages(embeddings, positions, len(sources), skipped, image_tower(model))


def image_tower(model: Encoder) -> str:
    """Names what decides where pictures land: of another `alpha` another one; "" of encoders that do not say."""
    names = (getattr(model, name, "") for name in ("image_fingerprint", "image_input_digest"))
    return " ".join(filter(None, names))


def read_and_skipped(positions: range, last_skipped: Any) -> tuple[np.ndarray, tuple[Skipped, ...]]:
    """Of pictures that stand at `positions` of the input, (K,) those that were read, and the others.

    Args:
        last_skipped: see `Encoder`, for these pictures alone.
    """
    skipped = tuple(Skipped(positions[int(at)], str(source), str(reason)) for at, source, reason in last_skipped)
    left_out = {item.position for item in skipped}
    return np.array([at for at in positions if at not in left_out], np.int64), skipped


def check_some_read(skipped: Sequence[Skipped], total: int) -> None:
    """Refuse an evaluation of no picture at all.

    Raises:
        DataError: all of `total` pictures were skipped.
    """
    if len(skipped) == total:
        raise DataError(
            f"none of the {total} images can be read; the first is {skipped[0].source}: {skipped[0].reason}. "
            "Check the paths in the manifest and --root"
        )


def embed_texts(model: Encoder, texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
    """Embed texts, (N, D).

    Raises:
        ModelError: when the embeddings are not finite or not one per text.
    """
    embeddings = model.encode_text(list(texts), progress=progress)
    check_embeddings(embeddings, len(texts), "texts")
    return embeddings


def check_embeddings(embeddings: np.ndarray, count: int, what: str) -> None:
    """Refuse arrays that would turn into wrong figures: NaN compares as "not better", so all would be right.

    Raises:
        ModelError: when the shape is not (count, D) or a value is not finite.
    """
    if embeddings.ndim != 2 or len(embeddings) != count:
        raise ModelError(f"the model returned an array {embeddings.shape} for {count} {what}")
    if not np.isfinite(embeddings).all():
        bad = int(np.flatnonzero(~np.isfinite(embeddings).all(axis=1))[0])
        raise ModelError(
            f"the embeddings of the {what} are not finite (first at position {bad}): the weights are damaged, "
            "or half precision overflows; try dtype=float32"
        )


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to unit norm, float32; a row of zeros stays one."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def spans(count: int, size: int) -> Iterable[slice]:
    """Consecutive slices that cover ``range(count)``, each at most `size` long."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
