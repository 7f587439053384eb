"""What an adapted model still knows of the world at large: general zero-shot before and after, and over `alpha`.

Nothing here trains or loads: encoders come in, figures go out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trimtab.errors import DataError
from trimtab.evaluation.classification import classify
from trimtab.evaluation.embedding import EmbeddedImages, Encoder, embed_images, image_tower
from trimtab.evaluation.retrieval import Pairs, retrieve

# Distance of unit vectors up to which two embeddings of one picture count as the same tower's. In float32 another
# batch stays below it, a tower that learnt anything does not. Half precision may exceed it: that only costs time.
_SAME_TOWER = 1e-4


@dataclass(frozen=True)
class LabelledPictures:
    """The data of a zero-shot classification: what `trimtab.evaluation.classify` takes.

    Attributes:
        items: `trimtab.data.manifests.LabelledImage`, or (image, class index).
        classes: names, all different.
        templates: sentences with one ``{}`` each.
    """

    items: Sequence[Any]
    classes: Sequence[str]
    templates: Sequence[str]


@dataclass(frozen=True)
class GeneralSet:
    """Pictures outside the domain, to see what adaptation costs elsewhere.

    Attributes:
        name: key of its score.
        data: `trimtab.data.manifests.RetrievalPairs` (scored by mR), or `LabelledPictures` (scored by top-1).
    """

    name: str
    data: Pairs | LabelledPictures

    @property
    def kind(self) -> Literal["retrieval", "classification"]:
        """What is measured on it."""
        return "classification" if isinstance(self.data, LabelledPictures) else "retrieval"

    @property
    def metric(self) -> Literal["mR", "top1"]:
        """Name of its score in result rows."""
        return "top1" if self.kind == "classification" else "mR"

    @property
    def sources(self) -> list[Any]:
        """The pictures, in the order of the data."""
        if isinstance(self.data, LabelledPictures):
            return [item.path if hasattr(item, "path") else item[0] for item in self.data.items]
        return list(self.data.images)


def measure(
    encoder: Encoder,
    sets: Sequence[GeneralSet],
    images_cache: MutableMapping[str, EmbeddedImages] | None = None,
    *,
    progress: bool = False,
) -> dict[str, float]:
    """The primary score of every set in percent, by name, in the order of `sets`.

    Args:
        encoder: base or adapted model.
        sets: names must differ.
        images_cache: pictures embedded before, by the name of the set; missing ones are embedded and put in.
            Encoders whose image tower is the same (adapted text towers, a probe) may share one. An entry of another
            tower is replaced: by its fingerprint, or if the first picture, which is embedded again, lands elsewhere.
            An encoder without an `image_fingerprint` must change all pictures or none.
        progress: show bars.

    Raises:
        DataError: for names that stand twice, and as `classify` and `retrieve`; the message names the set.
        RecipeError: for a template without exactly one ``{}``.
        ModelError: when the embeddings are not finite.
    """
    names = [each.name for each in sets]
    if len(set(names)) < len(names):
        raise DataError(f"general sets must have different names, not {', '.join(map(repr, names))}: rename one")
    cache = {} if images_cache is None else images_cache
    scores = {}
    for each in sets:
        try:
            images = _embedded(encoder, each, cache, progress)
            if isinstance(each.data, LabelledPictures):
                data = each.data
                found = classify(encoder, data.items, data.classes, data.templates, images=images, progress=progress)
                scores[each.name] = found.top1
            else:
                scores[each.name] = retrieve(encoder, each.data, images=images, progress=progress).mR
        except DataError as error:
            raise DataError(f"general set {each.name!r}: {error}") from error
    return scores


def mean_score(scores: Mapping[str, float]) -> float:
    """Mean over sets: the general score. Every set counts the same, however many pictures it has.

    Raises:
        ValueError: when there is no set.
    """
    if not scores:
        raise ValueError("there is no general set: forgetting cannot be measured")
    return float(np.mean(list(scores.values())))


def forgetting(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """How much general ability was lost, from two results of `measure` on the same sets.

    With b and a the scores of a set before and after, in percent:

    - points of a set: b - a. Above 0 something was forgotten; below 0 something was gained, which is kept as it
      is, since cutting it off at 0 would count the noise of one direction only.
    - relative of a set: 100 (b - a) / b percent of what there was; None when b is 0.
    - points over all sets: the mean of their points, which is the general score before minus after.
    - relative over all sets: these points in percent of the general score before. It is not the mean of the
      sets' percentages, in which a set with next to no score before would count most.

    Returns:
        ``before``, ``after`` (general scores), ``points``, ``relative``, and ``sets``: the same four keys by name.

    Raises:
        ValueError: when the sets differ or there is none.
    """
    if before.keys() != after.keys():
        raise ValueError(f"before was measured on {', '.join(before)}, after on {', '.join(after)}: use the same sets")
    return {
        **_change(mean_score(before), mean_score(after)),
        "sets": {name: _change(before[name], after[name]) for name in before},
    }


def alpha_curve(
    make_encoder: Callable[[float], Encoder],
    alphas: Iterable[float],
    domain_measure: Callable[[Encoder], float],
    general_measure: Callable[[Encoder], float],
) -> list[dict[str, float]]:
    """Domain and general score while `alpha` goes from the base (0) to the adapted model (1), and beyond.

    For adapters `make_encoder` sets their dial; for full fine-tuning it mixes the weights of the base and the
    tuned model as (1 - alpha) base + alpha tuned (Wortsman et al. 2022, arXiv:2109.01903). Each encoder is
    measured before the next is made, so all may be one object whose dial is turned.

    Args:
        make_encoder: the model at one alpha.
        alphas: in the order of the curve.
        domain_measure: score in percent on the domain's validation or test data.
        general_measure: score in percent elsewhere, such as ``mean_score(measure(encoder, sets))``; without an
            `images_cache` if the image tower is what changes.

    Returns:
        A point per alpha: ``alpha``, ``domain``, ``general``.

    Raises:
        ValueError: for an alpha that is not finite.
    """
    points = []
    for alpha in alphas:
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}; it must be a finite number: 0 is the base, 1 the adapted model")
        encoder = make_encoder(alpha)
        points.append(
            {
                "alpha": float(alpha),
                "domain": float(domain_measure(encoder)),
                "general": float(general_measure(encoder)),
            }
        )
    return points


def _change(before: float, after: float) -> dict[str, float | None]:
    points = float(before - after)
    return {
        "before": float(before),
        "after": float(after),
        "points": points,
        "relative": 100 * points / before if before else None,
    }


def _embedded(
    encoder: Encoder, each: GeneralSet, cache: MutableMapping[str, EmbeddedImages], progress: bool
) -> EmbeddedImages:
    sources = each.sources
    known = cache.get(each.name)
    if known is None or not _is_of(encoder, known, sources):
        known = cache[each.name] = embed_images(encoder, sources, progress=progress)
    return known


def _is_of(encoder: Encoder, known: EmbeddedImages, sources: Sequence[Any]) -> bool:
    """Whether embeddings fit the pictures and the encoder's image tower.

    One picture does not tell by itself: behind a gate it may be one of those that adapters leave where they were.
    """
    if known.tower != image_tower(encoder) or known.total != len(sources) or not len(known.positions):
        return False
    again = encoder.encode_image([sources[int(known.positions[0])]], on_error="skip")
    first = known.embeddings[:1]
    return again.shape == first.shape and float(np.linalg.norm(again - first)) <= _SAME_TOWER
