"""Classification: zero-shot, where a class is the mean of its name in several templates, or by learned prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from trimtab.data.classes import warn_of_equal
from trimtab.data.templates import fill_all
from trimtab.errors import DataError
from trimtab.evaluation.embedding import (
    EmbeddedImages,
    Encoder,
    Skipped,
    check_embeddings,
    check_some_read,
    embed_images,
    embed_texts,
    normalise,
    read_and_skipped,
    spans,
)
from trimtab.evaluation.ranking import TIE

MISTAKES_KEPT = 50
_TEXTS_AT_ONCE = 1 << 15
_SCORES_AT_ONCE = 1 << 24


class Scorer(Protocol):
    """The part of `trimtab.towers.classifier.Classifier` that `classify_with` uses.

    ``last_skipped`` is as of an `Encoder`.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """C names."""

    @property
    def last_skipped(self) -> Any:
        """What the last call left out."""

    def similarities(
        self, images: Any, *, batch_size: int = 64, on_error: Any = "raise", progress: bool = False
    ) -> np.ndarray:
        """(N, C) of the images that could be read; the highest of a row is its class."""


@dataclass(frozen=True)
class ClassAccuracy:
    """Top-1 of the items of one class, in percent."""

    name: str
    n: int
    top1: float


@dataclass(frozen=True)
class Mistake:
    """An item taken for another class; `margin` is how far the wrong class's cosine, or the score that prompts give
    it, lies above the right's."""

    source: Any
    true: str
    predicted: str
    margin: float


@dataclass(frozen=True)
class ClassificationResult:
    """One evaluation.

    Attributes:
        top1: percent of items whose class scores above all others.
        top5: percent of items whose class is among the best min(5, C).
        n: items evaluated.
        n_classes: C.
        per_class: classes that have items, in class order.
        confusion: how often items of a class (first) were taken for a class (second), by class index; the
            cells that are not zero.
        mistakes: the 50 most confident, worst first.
        skipped: images that could not be read.
        templates: what the class names stood in; none behind prompts.
    """

    top1: float
    top5: float
    n: int
    n_classes: int
    per_class: tuple[ClassAccuracy, ...]
    confusion: dict[tuple[int, int], int]
    mistakes: tuple[Mistake, ...]
    skipped: tuple[Skipped, ...]
    templates: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def mean_per_class(self) -> float:
        """Mean of the classes' top-1, in percent: every class counts the same, however many items it has."""
        return float(np.mean([item.top1 for item in self.per_class]))

    def confusions(self) -> list[dict[str, Any]]:
        """All of them, by name, the most frequent first."""
        wrong = [(pair, count) for pair, count in self.confusion.items() if pair[0] != pair[1]]
        return [
            {"class": self.classes[true], "taken_for": self.classes[taken], "count": count}
            for (true, taken), count in sorted(wrong, key=lambda item: (-item[1], item[0]))
        ]

    def as_json(self) -> dict[str, Any]:
        """Percent; classes by name; the 50 most frequent confusions."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "n": self.n,
            "n_classes": self.n_classes,
            "mean_per_class": self.mean_per_class,
            "templates": list(self.templates),
            "per_class": [{"class": item.name, "n": item.n, "top1": item.top1} for item in self.per_class],
            "confusions": self.confusions()[:MISTAKES_KEPT],
            "mistakes": [
                {
                    "image": _describe(item.source),
                    "class": item.true,
                    "taken_for": item.predicted,
                    "margin": round(item.margin, 4),
                }
                for item in self.mistakes
            ],
            "n_skipped": len(self.skipped),
            "skipped": [item.as_json() for item in self.skipped],
        }


def embed_classes(
    model: Encoder, classes: Sequence[str], templates: Sequence[str], *, progress: bool = False
) -> np.ndarray:
    """One unit vector per class, (C, D): each filled template normalised, their mean normalised again.

    Raises:
        DataError: for no classes or a name that stands twice.
        RecipeError: for a template without exactly one ``{}``.
    """
    if not classes:
        raise DataError("there are no class names")
    if len(set(classes)) < len(classes):
        name, count = Counter(classes).most_common(1)[0]
        raise DataError(f"class name {name!r} stands {count} times: names must differ; remove or rename one")
    parts = []
    for some in spans(len(classes), max(1, _TEXTS_AT_ONCE // max(1, len(templates)))):
        texts = fill_all(templates, classes[some])
        vectors = normalise(embed_texts(model, texts, progress=progress))
        parts.append(normalise(vectors.reshape(-1, len(templates), vectors.shape[1]).mean(axis=1)))
    return np.concatenate(parts)


def classify(
    model: Encoder,
    items: Sequence[Any],
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    images: EmbeddedImages | None = None,
    progress: bool = False,
) -> ClassificationResult:
    """Evaluate zero-shot classification; images that cannot be read are left out and listed.

    Classes whose vectors are equal tie, which counts against both; a warning names them.

    Args:
        model: encodes both sides.
        items: `trimtab.data.manifests.LabelledImage`, or (image, class index).
        classes: names, all different.
        templates: sentences with one ``{}`` each.
        images: the pictures of `items`, embedded before (`embed_images`), to share between evaluations.
        progress: show bars.

    Raises:
        DataError: for no items, labels out of range, equal class names, or when no image can be read.
        RecipeError: for a template without exactly one ``{}``.
        ModelError: when the embeddings are not finite.
    """
    sources, labels = _sources_and_labels(items, len(classes))
    class_vectors = embed_classes(model, classes, templates, progress=progress)
    warn_of_equal(classes, class_vectors, tie=TIE)
    embedded = embed_images(model, sources, progress=progress) if images is None else images
    if embedded.total != len(items):
        raise ValueError(f"{embedded.total} images were embedded, but there are {len(items)} items")
    return classify_embeddings(
        embedded.embeddings,
        class_vectors,
        labels[embedded.positions],
        classes=classes,
        templates=templates,
        sources=[sources[at] for at in embedded.positions],
        skipped=embedded.skipped,
    )


def classify_with(
    classifier: Scorer, items: Sequence[Any], *, batch_size: int = 64, progress: bool = False
) -> ClassificationResult:
    """As `classify`, by a classifier that scores pictures itself, such as one behind learned prompts.

    Args:
        items: as for `classify`, with indices into the classifier's names.
        batch_size: images per forward pass.
        progress: show a bar.

    Raises:
        DataError: for no items, labels out of range, or when no image can be read.
        ModelError: when scores are not finite.
    """
    names = tuple(classifier.classes)
    sources, labels = _sources_and_labels(items, len(names))
    read, parts = [], []
    skipped: list[Skipped] = []
    for some in spans(len(sources), max(1, _SCORES_AT_ONCE // len(names))):
        scores = classifier.similarities(sources[some], batch_size=batch_size, on_error="skip", progress=progress)
        positions, left_out = read_and_skipped(range(len(sources))[some], classifier.last_skipped)
        check_embeddings(scores, len(positions), "images")
        parts.append(_verdicts(scores, labels[positions]))
        read.append(positions)
        skipped += left_out
    check_some_read(skipped, len(sources))
    used = np.concatenate(read)
    return _result(parts, labels[used], names, sources=[sources[at] for at in used], skipped=skipped)


def classify_embeddings(
    images: np.ndarray,
    class_vectors: np.ndarray,
    labels: np.ndarray,
    *,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] = (),
    sources: Sequence[Any] | None = None,
    skipped: Sequence[Skipped] = (),
) -> ClassificationResult:
    """Score embeddings; a class that ties with the right one counts as better than it.

    Args:
        images: (N, D) unit norm.
        class_vectors: (C, D) unit norm.
        labels: (N,) class indices.
        classes: C names for the result; the indices by default.
        templates: for the result.
        sources: N names of the items for the list of mistakes; their positions by default.
        skipped: for the result.
    """
    count, n_classes = len(labels), len(class_vectors)
    check_embeddings(images, count, "images")
    check_embeddings(class_vectors, n_classes, "classes")
    names = tuple(classes) if classes is not None else tuple(str(index) for index in range(n_classes))
    parts = [
        _verdicts(images[some] @ class_vectors.T, labels[some])
        for some in spans(count, max(1, _SCORES_AT_ONCE // n_classes))
    ]
    return _result(parts, labels, names, templates=templates, sources=sources, skipped=skipped)


class _Verdicts(NamedTuple):
    """Of some pictures: the rank of the own class, the class that it is taken for, and how far ahead the best wrong
    class is."""

    ranks: np.ndarray
    taken_for: np.ndarray
    margins: np.ndarray


def _sources_and_labels(items: Sequence[Any], n_classes: int) -> tuple[list[Any], np.ndarray]:
    sources = [item.path if hasattr(item, "path") else item[0] for item in items]
    labels = np.array([item.label if hasattr(item, "label") else item[1] for item in items], np.int64)
    if not len(labels):
        raise DataError("there are no items to classify")
    outside = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if len(outside):
        raise DataError(f"item {outside[0]} has label {labels[outside[0]]}, but there are {n_classes} classes")
    return sources, labels


def _verdicts(scores: np.ndarray, labels: np.ndarray) -> _Verdicts:
    """Verdicts by scores (B, C), which are written over."""
    here = np.arange(len(scores))
    right = scores[here, labels]
    ranks = np.count_nonzero(scores >= right[:, None] - TIE, axis=1)
    scores[here, labels] = -np.inf
    rival = scores.argmax(axis=1)
    return _Verdicts(ranks, np.where(ranks == 1, labels, rival), scores[here, rival] - right)


def _result(
    parts: Sequence[_Verdicts],
    labels: np.ndarray,
    names: tuple[str, ...],
    *,
    templates: Sequence[str] = (),
    sources: Sequence[Any] | None = None,
    skipped: Sequence[Skipped] = (),
) -> ClassificationResult:
    ranks, taken_for, margins = (np.concatenate(part) for part in zip(*parts, strict=True))
    n_classes = len(names)
    cells, counts = np.unique(np.stack([labels, taken_for], axis=1), axis=0, return_counts=True)
    confusion = {(int(t), int(p)): int(c) for (t, p), c in zip(cells, counts)}
    members = np.bincount(labels, minlength=n_classes)
    per_class = tuple(
        ClassAccuracy(names[at], int(members[at]), 100 * confusion.get((at, at), 0) / int(members[at]))
        for at in np.flatnonzero(members).tolist()
    )
    wrong = np.flatnonzero(ranks > 1)
    wrong = wrong[np.argsort(-margins[wrong], kind="stable")][:MISTAKES_KEPT]
    return ClassificationResult(
        top1=100 * float(np.mean(ranks <= 1)),
        top5=100 * float(np.mean(ranks <= min(5, n_classes))),
        n=len(labels),
        n_classes=n_classes,
        per_class=per_class,
        confusion=confusion,
        mistakes=tuple(
            Mistake(
                at if sources is None else sources[at],
                names[labels[at]],
                names[taken_for[at]],
                float(margins[at]),
            )
            for at in wrong.tolist()
        ),
        skipped=tuple(skipped),
        templates=tuple(templates),
        classes=names,
    )


def _describe(source: Any) -> str:
    """A path as it is; pictures in memory by their type, not their pixels."""
    return f"<{type(source).__name__}>" if hasattr(source, "size") or isinstance(source, bytes) else str(source)
