"""Classifiers on frozen embeddings, fitted in seconds: logistic regression, LP++ and the cache of Tip-Adapter.

All take unit-norm embeddings, so that whoever compares them gives them the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LP_STEPS = 300
_W_STEPS = 10  # steps of the prototypes for each step of the multipliers


@dataclass(frozen=True, eq=False)
class Linear:
    """Logits ``((x - mean) / scale) @ weight + bias``.

    Attributes:
        weight: (D, C).
        bias: (C,).
        mean: (D,).
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: float

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) to (N, C)."""
        return ((features - self.mean) / self.scale) @ self.weight + self.bias


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, penalty: float, start: Linear | None = None, *, steps: int = 200
) -> Linear:
    """Multinomial logistic regression: the least cross-entropy + penalty / 2 * squared weights.

    Features are centred and divided by one number, so that a penalty means the same for every base.

    Args:
        features: (N, D).
        start: a solution for another penalty, to go on from.
        steps: of L-BFGS, at most.
    """
    mean = features.mean(0)
    scale = float((features - mean).square().mean().sqrt().clamp_min(1e-12))
    x = (features - mean) / scale
    weight = torch.zeros(x.shape[1], classes) if start is None else start.weight.clone()
    bias = torch.zeros(classes) if start is None else start.bias.clone()
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return Linear(weight.detach(), bias.detach(), mean, scale)


@dataclass(frozen=True, eq=False)
class Blend:
    """Logits ``x @ (w + alpha * t)``: visual prototypes and text embeddings of classes, mixed class by class.

    Attributes:
        visual: (D, C) prototypes w.
        bias: (C,).
        alpha: (C,) multipliers.
        text: (D, C) embeddings t.
    """

    visual: Tensor
    bias: Tensor
    alpha: Tensor
    text: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) to (N, C)."""
        return features @ self.visual + self.bias + self.alpha * (features @ self.text)


def fit_lp_plus_plus(
    features: Tensor, labels: Tensor, text: Tensor, *, shots: float, strength: float = 250.0, steps: int = LP_STEPS
) -> Iterator[Blend]:
    """LP++ (Huang et al., arXiv 2404.02285): every iterate of its block-wise descent, the start first.

    Prototypes start as sums of a class's embeddings, multipliers at the mean cosine of pictures with their class's text
    times `strength`. Step sizes come from the data: both blocks use the Lipschitz bounds of the paper's code.

    Args:
        features: (N, D), all views of all shots.
        text: (C, D).
        shots: pictures per class, on average, that `features` are views of.
        strength: the paper's 250 was found on CLIP, whose cosines are multiplied by 100.
    """
    count, classes = len(features), len(text)
    target = F.one_hot(labels, classes).float()  # (N, C)
    sides = features @ text.T  # (N, C)
    members = target.sum(0).clamp_min(1)
    visual = (features.T @ target) / members * shots
    alpha = torch.full((classes,), strength * float((sides * target).sum(0).div(members).mean()))
    bias = torch.zeros(classes)
    largest = float(torch.linalg.eigvalsh(features.T @ features)[-1])
    rate, alpha_rate = 4 * count / largest, count / (4 * float(sides.square().sum(0).max()))
    momentum = [torch.zeros_like(visual), torch.zeros_like(bias)]
    yield Blend(visual, bias, alpha, text.T)
    for step in range(1, steps + 1):
        logits = features @ visual + bias + alpha * sides
        error = (logits.softmax(1) - target) / count  # (N, C), the gradient of the mean cross-entropy by the logits
        momentum = [0.9 * momentum[0] + features.T @ error, 0.9 * momentum[1] + error.sum(0)]
        visual, bias = visual - rate * momentum[0], bias - rate * momentum[1]
        if step % _W_STEPS == 0:
            alpha = alpha - alpha_rate * (error * sides).sum(0)
        yield Blend(visual, bias, alpha, text.T)


@dataclass(frozen=True, eq=False)
class KeyCache:
    """Logits ``scale * x @ t + alpha * exp(-beta * (1 - x @ keys)) @ values`` (Zhang et al., arXiv 2207.09519).

    Attributes:
        keys: (N, D).
        values: (N, C) one-hot labels.
        text: (C, D).
    """

    keys: Tensor
    values: Tensor
    text: Tensor
    scale: float
    alpha: float
    beta: float

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) to (N, C)."""
        near = (-self.beta * (1 - features @ self.keys.T)).exp()
        return self.scale * (features @ self.text.T) + self.alpha * (near @ self.values)


def train_keys(
    cache: KeyCache,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    *,
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
) -> Iterator[Tensor]:
    """Keys after each epoch, the ones given first: the training of Tip-Adapter-F.

    Args:
        draw: gives the features (N, D) and labels (N,) of an epoch, shuffled.
    """
    keys = cache.keys.clone().requires_grad_(True)
    steps = -(-len(cache.keys) // batch_size)
    optimiser = torch.optim.AdamW([keys], lr=learning_rate, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * steps)
    yield cache.keys
    for epoch in range(epochs):
        features, labels = draw(epoch)
        for some in range(0, len(features), batch_size):
            moved = KeyCache(keys, cache.values, cache.text, cache.scale, cache.alpha, cache.beta)
            loss = F.cross_entropy(moved(features[some : some + batch_size]), labels[some : some + batch_size])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        yield keys.detach().clone()
