"""Image-text retrieval in both directions: R@1, R@5, R@10 and their mean mR."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trimtab.data.classes import equal_rows, told_alike
from trimtab.errors import DataError
from trimtab.evaluation.embedding import EmbeddedImages, Encoder, Skipped, embed_images, embed_texts
from trimtab.evaluation.escape import shortened
from trimtab.evaluation.ranking import CHUNK, Hubness, Ranks, rank_embeddings, rank_similarity

DEFAULT_KS = (1, 5, 10)
_SHOWN = 80  # letters of a text in a message
logger = logging.getLogger(__name__)


class Pairs(Protocol):
    """`trimtab.data.manifests.RetrievalPairs`, or the like: unique images and texts, and which match."""

    @property
    def images(self) -> Sequence[Any]: ...

    @property
    def texts(self) -> Sequence[str]: ...

    @property
    def positives(self) -> Sequence[tuple[int, int]]: ...


@dataclass(frozen=True)
class Recall:
    """Recalls in percent.

    Attributes:
        mR: mean over both directions and all k (six figures by default).
        i2t: image to text, "R@1" and so on; the mean over images that have a text.
        t2i: text to image; the mean over texts that have an image.
    """

    mR: float  # noqa: N815 - the name in the literature, and in the JSON contract
    i2t: dict[str, float]
    t2i: dict[str, float]


@dataclass(frozen=True)
class RetrievalResult:
    """One retrieval evaluation.

    Attributes:
        recall: the figures.
        n_images: images ranked and searched.
        n_texts: texts ranked and searched.
        hubness: correction used; anything but "none" makes the figures transductive.
        skipped: images that could not be read.
        lost_texts: texts left out because all their images were skipped.
        text_ranks: (n_texts,) rank of each text's best image.
        text_positions: (n_texts,) where each text stood in the input.
    """

    recall: Recall
    n_images: int
    n_texts: int
    hubness: Hubness
    skipped: tuple[Skipped, ...]
    lost_texts: tuple[str, ...]
    text_ranks: np.ndarray
    text_positions: np.ndarray

    @property
    def mR(self) -> float:  # noqa: N802
        """Mean recall in percent."""
        return self.recall.mR

    def as_json(self) -> dict[str, Any]:
        """Percent; skipped images and lost texts are counted, the images also named."""
        return {
            "mR": self.recall.mR,
            "i2t": dict(self.recall.i2t),
            "t2i": dict(self.recall.t2i),
            "n_images": self.n_images,
            "n_texts": self.n_texts,
            "hubness": self.hubness,
            "n_skipped": len(self.skipped),
            "n_lost_texts": len(self.lost_texts),
            "skipped": [item.as_json() for item in self.skipped],
        }


def recall_at_k(
    similarity: np.ndarray | tuple[np.ndarray, np.ndarray],
    positives: Sequence[tuple[int, int]] | np.ndarray,
    ks: Sequence[int] = DEFAULT_KS,
    *,
    hubness: Hubness = "none",
    logit_scale: float = 100.0,
    chunk: int = CHUNK,
) -> Recall:
    """Recall at k as CLIP papers count it: a query scores when any of its positives is among the first k.

    Ties count against the model. An image or text without a positive is a distractor: a candidate, no query.

    Args:
        similarity: (N, M) scores, images by texts; or the unit-norm embeddings ((N, D), (M, D)), for which
            the matrix is never made whole.
        positives: (image, text) positions that belong together.
        ks: cut-offs; one beyond the number of candidates is a hit always.
        hubness: correction, on embeddings only; see `trimtab.evaluation.ranking.hubness_offsets`.
        logit_scale: for the correction "dual_softmax".
        chunk: images and texts per block; it bounds the memory and changes no figure.

    Raises:
        ValueError: for positives out of range, none at all, or a correction on a matrix.
    """
    pairs = np.asarray(positives, np.int64).reshape(-1, 2)
    if isinstance(similarity, tuple):
        ranks = rank_embeddings(*similarity, pairs, hubness=hubness, logit_scale=logit_scale, chunk=chunk)
    elif hubness != "none":
        raise ValueError("a hubness correction needs embeddings, not a similarity matrix")
    else:
        ranks = rank_similarity(similarity, pairs)
    return _recall(ranks, ks)


def retrieve(
    model: Encoder,
    pairs: Pairs,
    *,
    images: EmbeddedImages | None = None,
    hubness: Hubness = "none",
    progress: bool = False,
    chunk: int = CHUNK,
    warn: bool = False,
) -> RetrievalResult:
    """Evaluate retrieval.

    Images that cannot be read are left out together with the texts that have no other image, and counted.

    Args:
        model: encodes both sides.
        pairs: images, texts and positives.
        images: the pictures of `pairs`, embedded before (`embed_images`), to share between several texts.
        hubness: "none" (default), or a transductive correction that is named in the result.
        progress: show bars.
        chunk: see `recall_at_k`.
        warn: name texts of different images that the model reads alike, and images of different texts that it sees
            alike, such as copies.

    Raises:
        DataError: when there is nothing to evaluate or no image can be read.
        ModelError: when the embeddings are not finite.
    """
    if not pairs.positives:
        raise DataError("there are no image-text pairs to evaluate")
    embedded = embed_images(model, pairs.images, progress=progress) if images is None else images
    if embedded.total != len(pairs.images):
        raise ValueError(f"{embedded.total} images were embedded, but the pairs have {len(pairs.images)}")
    new_place = np.full(embedded.total, -1, np.int64)
    new_place[embedded.positions] = np.arange(len(embedded.positions))

    positives = np.asarray(pairs.positives, np.int64).reshape(-1, 2)
    had_image = np.zeros(len(pairs.texts), bool)
    had_image[positives[:, 1]] = True
    positives = positives[new_place[positives[:, 0]] >= 0]
    has_image = np.zeros(len(pairs.texts), bool)
    has_image[positives[:, 1]] = True
    lost = np.flatnonzero(had_image & ~has_image)
    kept = np.flatnonzero(has_image | ~had_image)
    if not len(positives):
        raise DataError("none of the images that could be read has a text")
    text_place = np.full(len(pairs.texts), -1, np.int64)
    text_place[kept] = np.arange(len(kept))

    kept_texts = [pairs.texts[at] for at in kept.tolist()]
    texts = embed_texts(model, kept_texts, progress=progress)
    matches = np.stack([new_place[positives[:, 0]], text_place[positives[:, 1]]], axis=1)
    if warn:
        _warn_of_equal(kept_texts, texts, matches)
        _warn_of_copies([pairs.images[at] for at in embedded.positions], embedded.embeddings, matches)
    ranks = rank_embeddings(
        embedded.embeddings,
        texts,
        matches,
        hubness=hubness,
        logit_scale=float(getattr(model, "logit_scale", 100.0)),
        chunk=chunk,
    )
    return RetrievalResult(
        recall=_recall(ranks, DEFAULT_KS),
        n_images=len(embedded.positions),
        n_texts=len(kept),
        hubness=hubness,
        skipped=embedded.skipped,
        lost_texts=tuple(pairs.texts[at] for at in lost.tolist()),
        text_ranks=ranks.columns,
        text_positions=kept,
    )


def _warn_of_equal(texts: Sequence[str], embeddings: np.ndarray, matches: np.ndarray) -> None:
    """Log a warning that names texts of equal embeddings that belong to different images."""
    if alike := _equal_of_others(embeddings, matches[:, ::-1]):
        logger.warning(
            "the model reads the texts %r and %r alike%s: pictures of one find the other as well, and a tie counts as "
            "wrong. They differ in what its tokenizer drops or does not know, such as another language, or after its "
            "last token: write them otherwise, or give their pictures one text",
            *told_alike(alike, [shortened(text, _SHOWN) for text in texts]),
        )


def _warn_of_copies(images: Sequence[Any], embeddings: np.ndarray, matches: np.ndarray) -> None:
    """The same of images and their texts."""
    if alike := _equal_of_others(embeddings, matches):
        logger.warning(
            "the model sees the pictures %r and %r alike%s, and their texts differ: a text of one finds the other as "
            "well, and a tie counts as wrong. Of copies keep one, with the texts of all",
            *told_alike(alike, [str(image) for image in images]),
        )


def _equal_of_others(embeddings: np.ndarray, matches: np.ndarray) -> list[list[int]]:
    """Pairs of equal rows that do not match the same; `matches` has the rows first."""
    alike = equal_rows(embeddings)
    if not alike:
        return []
    others: dict[int, set[int]] = {}
    for row, other in matches.tolist():
        others.setdefault(row, set()).add(other)
    return [pair for pair in alike if others.get(pair[0], set()) != others.get(pair[1], set())]


def _recall(ranks: Ranks, ks: Sequence[int]) -> Recall:
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {tuple(ks)}; every k must be at least 1")
    directions = []
    for rank in (ranks.rows, ranks.columns):
        counted = rank[rank > 0]
        directions.append({f"R@{k}": 100 * float(np.mean(counted <= k)) for k in ks})
    i2t, t2i = directions
    return Recall(float(np.mean([*i2t.values(), *t2i.values()])), i2t, t2i)
