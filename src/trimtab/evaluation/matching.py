"""How well a student's vectors find their teacher's: the validation figure of the language link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from trimtab.evaluation.embedding import normalise
from trimtab.evaluation.ranking import CHUNK, Hubness, rank_embeddings


@dataclass(frozen=True)
class MatchResult:
    """Translation match in percent.

    Attributes:
        accuracy: mean of the two directions.
        student_to_teacher: how often the nearest teacher vector is the right one.
        teacher_to_student: how often the nearest student vector is a right one.
        n: number of pairs; the more there are, the harder it is, so it belongs to the figure.
    """

    accuracy: float
    student_to_teacher: float
    teacher_to_student: float
    n: int

    def as_json(self) -> dict[str, float | int]:
        """All four figures."""
        return {
            "accuracy": self.accuracy,
            "student_to_teacher": self.student_to_teacher,
            "teacher_to_student": self.teacher_to_student,
            "n": self.n,
        }


Groups: TypeAlias = "Sequence[str] | Sequence[int] | np.ndarray | None"


def translation_match(
    student: np.ndarray,
    teacher: np.ndarray,
    *,
    groups: Groups = None,
    hubness: Hubness = "none",
    chunk: int = CHUNK,
) -> MatchResult:
    """Among N pairs, how often each side's nearest vector (by cosine) is its partner's.

    Pairs with the same teacher vector (several sentences with one translation) are right for each other.
    Ties with a wrong one count as wrong, so a collapsed student scores near 0.

    Args:
        student: (N, D), any norm.
        teacher: (N, D), any norm.
        groups: N keys, such as the English texts: pairs with equal keys share a teacher vector. Without it,
            vectors that are equal after rounding to 4 decimals do.
        hubness: see `trimtab.evaluation.ranking.hubness_offsets`.
        chunk: bounds the memory; see `trimtab.evaluation.ranking`.

    Raises:
        ValueError: when shapes differ or there is no pair.
        ModelError: when a value is not finite.
    """
    every = {"": np.ones(len(student), bool)}
    return match_of_parts(student, teacher, every, groups=groups, hubness=hubness, chunk=chunk)[""]


def match_of_parts(
    student: np.ndarray,
    teacher: np.ndarray,
    parts: Mapping[str, np.ndarray],
    *,
    groups: Groups = None,
    hubness: Hubness = "none",
    chunk: int = CHUNK,
) -> dict[str, MatchResult]:
    """As `translation_match`, for the pairs of each part, such as a language; the nearest vector is that of all pairs.

    Args:
        parts: name -> (N,) bool, which pairs are of it.
    """
    if student.shape != teacher.shape or student.ndim != 2 or not len(student):
        raise ValueError(f"student {student.shape} and teacher {teacher.shape} must be equal (N, D) with N > 0")
    if groups is not None and len(groups) != len(student):
        raise ValueError(f"there are {len(groups)} groups for {len(student)} pairs")
    student, teacher = normalise(student), normalise(teacher)
    if groups is None:
        _, first, member = np.unique(np.round(teacher, 4), axis=0, return_index=True, return_inverse=True)
    else:
        _, first, member = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    member = member.reshape(-1)
    pairs = np.stack([np.arange(len(student)), member], axis=1)
    ranks = rank_embeddings(student, teacher[first], pairs, hubness=hubness, chunk=chunk)
    found = {}
    for name, part in parts.items():
        forward = 100 * float(np.mean(ranks.rows[part] == 1))
        backward = 100 * float(np.mean(ranks.columns[member[part]] == 1))
        found[name] = MatchResult((forward + backward) / 2, forward, backward, int(part.sum()))
    return found


def mean_pairwise_cosine(vectors: np.ndarray) -> float:
    """Mean cosine over all pairs of different rows, in O(N D): near 1 means that the outputs have collapsed.

    Uses the square of the summed unit vectors, which is N plus twice the sum over pairs.

    Raises:
        ValueError: for fewer than two rows.
    """
    if vectors.ndim != 2 or len(vectors) < 2:
        raise ValueError(f"vectors {vectors.shape} must be (N, D) with N > 1")
    unit = normalise(vectors).astype(np.float64)
    count = len(unit)
    total = unit.sum(axis=0)
    return float((total @ total - np.einsum("nd,nd->", unit, unit)) / (count * (count - 1)))
