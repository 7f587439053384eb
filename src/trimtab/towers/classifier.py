"""Pictures to class names with probabilities: what `DualEncoder.classifier` returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from trimtab.data.captions import fold_name
from trimtab.data.classes import warn_of_equal
from trimtab.data.parallel import clean_text
from trimtab.data.templates import check_template, fill_all
from trimtab.errors import DataError
from trimtab.scripts import normal_form

if TYPE_CHECKING:
    from trimtab.data.images import ImageSource, SkippedImages
    from trimtab.towers.dual_encoder import DualEncoder

_TEXTS_AT_ONCE = 1 << 15
_MOST_SCORES = 1 << 23  # that are sorted at once


class Prediction(NamedTuple):
    """A class name and its probability among all classes of the classifier."""

    label: str
    score: float


class Classifier:
    """Classes as one unit vector each: the mean of their name in several templates.

    Where the model reads two names alike, a warning names them.

    Attributes:
        model: encodes the pictures, and the names of classes.
        templates: sentences with one ``{}`` each that names stand in.
        logit_scale: multiplies cosines before the softmax: the base's own, or one that was fitted on validation.
        reads_embeddings: whether a picture's embedding is all that its scores depend on.
    """

    reads_embeddings: bool = True

    def __init__(
        self,
        model: DualEncoder,
        classes: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        logit_scale: float | None = None,
        texts: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            texts: embeddings of all names in all templates, in the order of `fill_all`, where they are known already.
        """
        names = check_class_names(classes)
        self.model = model
        self.templates = tuple(model.default_templates(names)[1] if templates is None else templates)
        if not self.templates:
            raise DataError("there are no templates: leave them out, or give sentences with one {} each")
        for template in self.templates:
            check_template(template)
        self.logit_scale = model.logit_scale if logit_scale is None else logit_scale
        # Replaced as one: a thread that predicts meanwhile sees the old classes or the new.
        vectors = self._vectors(names) if texts is None else mean_vectors(texts, len(names))
        self._known: tuple[tuple[str, ...], Any] = (names, vectors)
        self._warn_of_equal()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model.name!r}, {len(self.classes)} classes)"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the columns of `scores`."""
        return self._known[0]

    @property
    def last_skipped(self) -> SkippedImages:
        """Images that the last call with ``on_error="skip"`` left out."""
        return self.model.last_skipped

    def scores(
        self,
        images: Iterable[ImageSource] | ImageSource | np.ndarray,
        *,
        batch_size: int = 64,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> np.ndarray:
        """Probability of each class for each image.

        Args:
            images: what `DualEncoder.encode_image` takes, or embeddings (N, D).
            batch_size, on_error: see there; of skipped images there is no row.

        Returns:
            (N, C) float32, each row with the sum 1.

        Raises:
            ImageError: an image cannot be used and `on_error` is "raise".
        """
        return softmax(self.logit_scale * self._similarities(images, self._known[1], batch_size, on_error))

    def similarities(
        self,
        images: Iterable[ImageSource] | ImageSource | np.ndarray,
        *,
        batch_size: int = 64,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> np.ndarray:
        """What `scores` turns into probabilities, times `logit_scale`; arguments as there.

        Args:
            progress: show a bar.

        Returns:
            (N, C) float32 cosines of images with classes; behind learned prompts, with what class vectors add to them.
        """
        return self._similarities(images, self._known[1], batch_size, on_error, progress)

    def predict(
        self,
        images: Iterable[ImageSource] | ImageSource | np.ndarray,
        *,
        top_k: int = 5,
        batch_size: int = 64,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> list[list[Prediction]]:
        """The most probable classes of each image, best first; arguments as for `scores`.

        Args:
            top_k: classes per image; all if there are fewer.
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1")
        return self.best(self.similarities(images, batch_size=batch_size, on_error=on_error), top_k)

    def best(self, similarities: np.ndarray, top_k: int) -> list[list[Prediction]]:
        """The most probable classes by what `similarities` gave, (N, C), best first."""
        names = self.classes  # by now perhaps more than there are columns: classes are appended alone
        at_once = max(1, _MOST_SCORES // max(1, len(names)))
        found = []
        for start in range(0, len(similarities), at_once):
            scores = softmax(self.logit_scale * similarities[start : start + at_once])
            found += [[Prediction(names[at], float(row[at])) for at in highest(row, top_k)] for row in scores]
        return found

    def add_classes(self, names: Sequence[str] | str) -> None:
        """Append classes by name alone, without training.

        Raises:
            DataError: a name is empty, or stands twice or is there already.
        """
        added = check_class_names([names] if isinstance(names, str) else names, known=self.classes)
        old_names, old = self._known
        self._known = (old_names + added, np.concatenate([old, self._vectors(added)]))
        self._warn_of_equal()

    # For classifiers that know more of a class than its vector

    def _vectors(self, names: Sequence[str]) -> Any:
        return class_vectors(self.model, names, self.templates)

    def _compared(self, known: Any) -> np.ndarray:
        """All that the score of a class depends on, (C, F)."""
        return known

    def _warn_of_equal(self) -> None:
        names, known = self._known
        warn_of_equal(names, self._compared(known))

    def _similarities(
        self, images: Any, known: Any, batch_size: int, on_error: Literal["raise", "skip"], progress: bool = False
    ) -> np.ndarray:
        if not self.model._are_embeddings(images):
            images = self.model.encode_image(images, batch_size=batch_size, on_error=on_error, progress=progress)
        return np.asarray(images, np.float32) @ known.T


def check_class_names(names: Sequence[str], *, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The names as a tuple.

    Args:
        known: names that are taken already.

    Raises:
        DataError: there is none, or one is empty, no text, or stands twice.
    """
    if isinstance(names, str):
        raise DataError(f"class names must be a list of texts, not one text {names!r:.60}")
    if not isinstance(names, Iterable):
        raise DataError(f"class names must be a list of texts, not a {type(names).__name__}")
    names = tuple(names)
    if not len(names):
        raise DataError("there are no class names")
    taken = set(map(normal_form, known))  # which models read alike
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"class {index} has no name ({name!r:.60}): every class needs one")
        form = normal_form(name)
        if form in taken:
            raise DataError(f"class name {name!r} stands twice: names must differ; remove or rename one")
        taken.add(form)
    return names


class Spellings:
    """Finds names that are written a little otherwise: with other white space, as labels of training lose it too; in
    another case, or with hyphens and underscores as a folder has them, where that leaves one name."""

    def __init__(self, names: Iterable[str]) -> None:
        self._exact = {name: name for name in names}
        self._cleaned = {clean_text(name): name for name in self._exact}
        folded = Counter(map(str.casefold, self._cleaned))
        self._folded = {key.casefold(): name for key, name in self._cleaned.items() if folded[key.casefold()] == 1}
        tidied = Counter(map(fold_name, self._cleaned))
        self._tidied = {fold_name(key): name for key, name in self._cleaned.items() if tidied[fold_name(key)] == 1}

    def find(self, name: str) -> str | None:
        """The name as it is known; None if it is not."""
        cleaned = clean_text(name)
        found = self._exact.get(name) or self._cleaned.get(cleaned) or self._folded.get(cleaned.casefold())
        return found or self._tidied.get(fold_name(cleaned))


def class_vectors(model: DualEncoder, names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
    """One unit vector per class, (C, D): each filled template normalised, their mean normalised again.

    Args:
        templates: None takes `DualEncoder.default_templates`.
    """
    templates = model.default_templates(names)[1] if templates is None else templates
    parts = []
    size = max(1, _TEXTS_AT_ONCE // len(templates))
    for start in range(0, len(names), size):
        some = names[start : start + size]
        parts.append(mean_vectors(model.encode_text(fill_all(templates, some)), len(some)))
    return np.concatenate(parts)


def mean_vectors(texts: np.ndarray, names: int) -> np.ndarray:
    """Unit vectors (names, D) of embeddings (names * templates, D), those of one name side by side."""
    mean = texts.reshape(names, -1, texts.shape[-1]).mean(axis=1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` highest of (C,) scores, highest first; of equal ones the first."""
    if 2 * count >= len(scores):
        return np.argsort(-scores, kind="stable")[:count]
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores >= least)
    return above[np.argsort(-scores[above], kind="stable")[:count]]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (N, C) float32 of logits."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf), dtype=np.float64)
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
