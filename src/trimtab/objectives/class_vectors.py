"""The class vectors that fit frozen features best: a convex problem, solved rather than trained."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def solve_vectors(
    inputs: Tensor,
    labels: Tensor,
    offset: Tensor,
    *,
    scale: float,
    penalty: float,
    start: Tensor | None = None,
    steps: int = 50,
) -> Tensor:
    """The vectors w (C, F) with the least mean cross-entropy of ``offset + scale * inputs @ w.T``.

    Args:
        inputs: (N, F).
        labels: (N,).
        offset: (N, C) logits that are there without the vectors.
        penalty: weight of the mean squared length of the vectors.
        start: vectors to begin with, say of another penalty; zero by default.
        steps: of L-BFGS, at most.
    """
    vectors = torch.zeros(offset.shape[1], inputs.shape[1], device=inputs.device) if start is None else start.clone()
    vectors.requires_grad_(True)
    optimiser = torch.optim.LBFGS([vectors], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(offset + scale * inputs @ vectors.T, labels)
        loss = loss + penalty * vectors.square().sum(dim=1).mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return vectors.detach()


def best_factor(logits: Tensor, labels: Tensor, *, cautious: bool = False) -> float:
    """The factor of logits (N, C) with the least loss on their labels (Guo et al., arXiv 1706.04599), 1/50 to 50.

    Args:
        cautious: count one picture more, which is of every class alike. Of a few pictures that are all right the best
            factor is otherwise the largest, and scores would be certain of what ten pictures cannot tell.
    """
    smoothing = 1 / (len(labels) + 1) if cautious else 0.0
    low, high = -3.912, 3.912
    for _ in range(24):  # the loss is convex in the factor
        left, right = low + (high - low) / 3, high - (high - low) / 3
        factors = torch.tensor([left, right]).exp()
        losses = [F.cross_entropy(factor * logits, labels, label_smoothing=smoothing) for factor in factors]
        low, high = (low, right) if losses[0] < losses[1] else (left, high)
    return float(torch.tensor((low + high) / 2).exp())
