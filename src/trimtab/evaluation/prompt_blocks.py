"""What a report shows of learned prompts: where they look, which words they are near to, what they mistake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from trimtab.data.images import read_image
from trimtab.evaluation.blocks import Cell, Column, GridImage, GridQuery, ImageGrid, Table, TableRow
from trimtab.evaluation.domain_pairs import picture_name

MATRIX_CLASSES = 12
_SIDE = 224
_LEAST_TINT = 0.15


@dataclass(frozen=True)
class Looked:
    """A picture, and how much each query looks at each of its patches.

    Attributes:
        source: whatever `trimtab.data.images.read_image` takes.
        attention: (M, N) each row with the sum 1; N is a square number, or one more with a CLS token first.
        caption: what it shows and what it was taken for.
        correct: whether that is the same.
    """

    source: Any
    attention: np.ndarray
    caption: str = ""
    correct: bool = False


def attention_maps(
    looked: Sequence[Looked], *, title: str = "Where the instance queries look", note: str = ""
) -> ImageGrid:
    """Each picture as it is, then as each query sees it: the brighter a patch, the more it is looked at."""
    queries = []
    for one in looked:
        picture = read_image(one.source).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        images = [GridImage(picture, one.caption, one.correct)]
        for number, weights in enumerate(one.attention, start=1):
            images.append(GridImage(lit(picture, weights), f"query {number}"))
        queries.append(GridQuery(one.caption, images))
    if looked and all(np.ptp(one.attention, axis=-1).max() == 0 for one in looked):
        # As at the start of training, whose weights are kept where validation was never better.
        note = f"{note} Here all patches are looked at alike: nothing was learned of where to look.".strip()
    return ImageGrid(queries, title=title, note=note)


def lit(picture: Image.Image, weights: np.ndarray) -> Image.Image:
    """The picture, darkened where little is looked at.

    Args:
        weights: (N,) of patches row by row; of a further one in front, a CLS token, nothing is shown.

    Raises:
        ValueError: the patches do not make a square.
    """
    side = int(np.sqrt(len(weights)))
    patches = weights if side * side == len(weights) else weights[1:]
    side = int(np.sqrt(len(patches)))
    if side * side != len(patches):
        raise ValueError(f"{len(weights)} patches make no square")
    spread = patches.max() - patches.min()
    light = (patches - patches.min()) / spread if spread > 0 else np.ones(len(patches))
    mask = Image.fromarray((255 * (_LEAST_TINT + (1 - _LEAST_TINT) * light)).astype(np.uint8).reshape(side, side))
    dark = Image.new("RGB", picture.size, (16, 24, 48))
    return Image.composite(picture, dark, mask.resize(picture.size, Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class NearWords:
    """A learned token: the text token that it started from, how far it moved, and the nearest words with cosines."""

    start: str
    moved: float
    words: Sequence[tuple[str, float]]


def nearest_words(
    tokens: Sequence[NearWords], *, title: str = "Words near the learned context", note: str = ""
) -> Table:
    """One row per learned token of the General part."""
    rows = [
        TableRow(
            [
                Cell(f"{number}", note=f"started as {one.start!r}" if one.start else "started at random"),
                one.moved,
                ", ".join(f"{word} ({cosine:.2f})" for word, cosine in one.words),
            ]
        )
        for number, one in enumerate(tokens, start=1)
    ]
    columns = [Column("Token", numeric=False), Column("Moved by", digits=2), Column("Nearest words", numeric=False)]
    return Table(columns, rows, title=title, note=note)


def confusion_matrix(
    labels: np.ndarray, taken: np.ndarray, classes: Sequence[str], *, title: str = "Confusion matrix", note: str = ""
) -> Table:
    """Pictures of each class (rows) by the class they were taken for (columns); of more than twelve classes only the
    twelve that are mistaken most often.

    Args:
        labels, taken: (N,) class numbers.
    """
    wrong = Counter(labels[labels != taken].tolist()) + Counter(taken[labels != taken].tolist())
    shown = list(range(len(classes)))
    if len(shown) > MATRIX_CLASSES:
        shown = sorted(sorted(shown, key=lambda at: (-wrong[at], at))[:MATRIX_CLASSES])
        note = f"{note} Of {len(classes)} classes the {MATRIX_CLASSES} that are mistaken most often.".strip()
    counts = Counter(zip(labels.tolist(), taken.tolist(), strict=True))
    rows = []
    for true in shown:
        cells: list[Cell | str | int | float | None] = [classes[true]]
        for other in shown:
            count = counts[true, other]
            cells.append(Cell(count or None, tone="good" if true == other and count else "plain"))
        beyond = sum(count for (one, other), count in counts.items() if one == true and other not in shown)
        cells.append(beyond or None)
        rows.append(TableRow(cells))
    columns = [Column("Class", numeric=False), *(Column(classes[at], "taken for") for at in shown)]
    columns.append(Column("another", "taken for"))
    return Table(columns, rows, title=title, note=note)


def confident_mistakes(
    sources: Sequence[Any],
    labels: np.ndarray,
    scores: np.ndarray,
    classes: Sequence[str],
    *,
    limit: int = 12,
    title: str = "Most confident mistakes",
    note: str = "",
) -> Table:
    """The wrong answers with the highest scores.

    Args:
        sources: N pictures.
        labels: (N,) class numbers.
        scores: (N, C) probabilities.
    """
    taken = scores.argmax(axis=1)
    sure = scores.max(axis=1)
    wrong = np.flatnonzero(taken != labels)
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")][:limit]
    rows = [
        TableRow(
            [
                Cell(picture_name(sources[at]), f"a picture of {classes[labels[at]]}", picture=sources[at]),
                classes[labels[at]],
                classes[taken[at]],
                100 * float(sure[at]),
                100 * float(scores[at, labels[at]]),
            ]
        )
        for at in wrong.tolist()
    ]
    columns = [
        Column("Picture", numeric=False),
        Column("Class", numeric=False),
        Column("Taken for", numeric=False),
        Column("Score, %"),
        Column("Score of its class, %"),
    ]
    return Table(columns, rows, title=title, note=note)
