"""Names of classes, and other texts, that a model cannot tell apart."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

logger = logging.getLogger(__name__)


def warn_of_equal(names: Sequence[str], vectors: np.ndarray, *, tie: float = 1e-6) -> None:
    """Log a warning that names classes whose vectors are equal: pictures of these can only be taken for both.

    So it is with names that differ in case, inner blanks or an invisible character alone, which tokenizers drop.

    Args:
        vectors: (C, F), one per name.
        tie: numbers closer than this are equal.
    """
    pairs = equal_rows(vectors, tie=tie)
    if pairs:
        logger.warning(
            "the model reads the class names %r and %r alike%s, so it can tell no picture of one from the other, and "
            "in an evaluation both count as wrong: rename one, or make them one class",
            *told_alike(pairs, names),
        )


def equal_rows(vectors: np.ndarray, *, tie: float = 1e-6) -> list[list[int]]:
    """Pairs of rows of (N, F) that are equal, the lower number first; of K equal ones K - 1 pairs."""
    # Equal vectors are neighbours along any direction, so that not all pairs need comparing.
    direction = np.random.default_rng(0).standard_normal(vectors.shape[1])
    along = np.einsum("nf,f->n", vectors, direction)  # `@` would copy all vectors to float64
    order = np.argsort(along, kind="stable")
    near = np.flatnonzero(np.diff(along[order]) <= tie * np.abs(direction).sum())
    # One by one, as of many pictures nearly all are that near, and copies of their rows would fill the memory.
    pairs = (sorted(order[at : at + 2].tolist()) for at in near)
    return [pair for pair in pairs if np.ptp(vectors[pair], axis=0).max(initial=0) <= tie]


def told_alike(pairs: Sequence[list[int]], names: Sequence[str]) -> tuple[str, str, str]:
    """Of pairs from `equal_rows`, for "%r and %r alike%s": the names of the first, and how many more there are."""
    one, other = min(pairs)
    return names[one], names[other], f" (and {len(pairs) - 1:,} more such pairs)" if len(pairs) > 1 else ""
