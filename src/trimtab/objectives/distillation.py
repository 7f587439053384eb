"""Distillation from a frozen teacher: tensors in, named terms out.

Student and teacher are features in the teacher's output space, row for row: the student's for a sentence,
the teacher's for its English translation (after Reimers & Gurevych 2020, arXiv 2004.09813). Every function
returns the mean over rows; `weights` multiplies the rows first and is meant to average one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from trimtab.config import DistillationConfig

# Equal sentences encoded in different batches, or read back from fp16, differ in the last bits only.
_SAME = 1 - 1e-5


class Standardiser(nn.Module):
    """Zero mean and unit variance per dimension, as fitted on teacher vectors; its state is in buffers.

    Unit-norm targets of D dimensions make the squared error per dimension about 1/D, and a few dimensions
    with large variance outweigh the rest; standardised, every dimension counts alike.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @classmethod
    def fit(cls, vectors: Any, *, chunk: int = 65_536) -> Standardiser:
        """Fit on (N, D) vectors: a tensor, an array or a memory map, read `chunk` rows at a time.

        Raises:
            ValueError: fewer than two rows.
        """
        count, dim = vectors.shape
        if count < 2:
            raise ValueError(f"a standardiser needs at least 2 vectors, not {count}")
        total, squares = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
        for start in range(0, count, chunk):
            rows = vectors[start : start + chunk]
            total += _double(rows).sum(0)
        mean = total / count
        for start in range(0, count, chunk):  # a second pass: the difference of sums of squares cancels
            rows = vectors[start : start + chunk]
            squares += (_double(rows) - mean).square().sum(0)
        std = (squares / count).sqrt()
        fitted = cls(dim)
        fitted.mean.copy_(mean)
        # A dimension that never varies would be divided by zero: treat it as varying very little.
        fitted.std.copy_(std.clamp_min(max(1e-3 * std.mean().item(), 1e-12)))
        return fitted

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return (x - self.mean) / self.std


def mse(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared error summed over dimensions: for raw unit-norm features from 0 to 4."""
    return _mean((student - teacher).square().sum(-1), weights)  # (B, D) -> (B,) -> ()


def cosine(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cosine distance, from 0 to 2."""
    return _mean(1 - F.cosine_similarity(student, teacher, dim=-1), weights)


def infonce(student: Tensor, teacher: Tensor, weights: Tensor | None = None, *, logit_scale: float = 20.0) -> Tensor:
    """Symmetric InfoNCE within the batch; rows with equal teacher vectors are positives of each other.

    With several processes the negatives are those of this process's slice of the batch.
    """
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    logits = logit_scale * s @ t.T  # (B, B)
    positive = t @ t.T > _SAME  # (B, B)
    positive.fill_diagonal_(True)
    matched = logits.masked_fill(~positive, -torch.inf)
    to_teacher = logits.logsumexp(1) - matched.logsumexp(1)  # (B,)
    to_student = logits.logsumexp(0) - matched.logsumexp(0)  # (B,)
    return _mean((to_teacher + to_student) / 2, weights)


def gram(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared difference of the batch's two cosine matrices, mean over pairs of different rows."""
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    difference = (s @ s.T - t @ t.T).square()  # (B, B)
    others = difference.sum(1) - difference.diagonal()
    return _mean(others / max(len(student) - 1, 1), weights)


def distillation_terms(
    student: Tensor,
    teacher: Tensor,
    config: DistillationConfig,
    *,
    standardiser: Standardiser | None = None,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms that `config` gives a weight above 0, each already multiplied by it; all in float32.

    With standardised targets the ``mse`` term is divided by D, so that a constant output at the teacher's
    mean scores 1, whatever the base; the other terms always see the raw features.

    Args:
        student: (B, D) features with gradient.
        teacher: (B, D) features; no gradient reaches them.
        standardiser: needed when ``config.targets`` is ``standardise`` and ``config.mse`` above 0.
        weights: (B,) instance weights that average one.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    # bf16 similarities are coarse (4e-3): too coarse to tell equal teacher rows from close ones.
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = student.float(), teacher.detach().float()
        terms: dict[str, Tensor] = {}
        if config.mse > 0 and config.targets == "standardise":
            if standardiser is None:
                raise ValueError("targets='standardise' needs a standardiser fitted on teacher vectors")
            error = mse(standardiser(student), standardiser(teacher), weights)
            terms["mse"] = config.mse * error / student.shape[-1]
        elif config.mse > 0:
            terms["mse"] = config.mse * mse(student, teacher, weights)
        if config.cosine > 0:
            terms["cosine"] = config.cosine * cosine(student, teacher, weights)
        if config.infonce > 0:
            terms["infonce"] = config.infonce * infonce(student, teacher, weights, logit_scale=config.logit_scale)
        if config.gram > 0:
            terms["gram"] = config.gram * gram(student, teacher, weights)
    return terms


def _mean(rows: Tensor, weights: Tensor | None) -> Tensor:  # (B,) -> ()
    return rows.mean() if weights is None else (rows * weights.to(rows)).mean()


def _double(rows: Any) -> Tensor:
    return rows.detach().cpu().double() if isinstance(rows, Tensor) else torch.tensor(rows).double()
