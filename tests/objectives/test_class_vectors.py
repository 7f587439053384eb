from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from trimtab.objectives.class_vectors import best_factor, solve_vectors


def drawn(count: int, factor: float, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn by their softmax at `factor`."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator)
    return logits, torch.multinomial((factor * logits).softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.5, 1.0, 8.0])
def test_the_factor_that_labels_were_drawn_by_is_found(factor: float) -> None:
    logits, labels = drawn(20000, factor)
    plain, cautious = best_factor(logits, labels), best_factor(logits, labels, cautious=True)
    assert plain == pytest.approx(factor, rel=0.15)
    assert cautious == pytest.approx(plain, rel=0.05)
    best = F.cross_entropy(plain * logits, labels)
    assert all(best <= F.cross_entropy(other * plain * logits, labels) + 1e-6 for other in (0.9, 1.1))


@pytest.mark.parametrize("count", [1, 10, 100])
def test_pictures_that_are_all_right_do_not_make_it_certain(count: int) -> None:
    logits = 2 * torch.eye(4).repeat(25, 1)[:count]
    labels = logits.argmax(1)
    assert best_factor(logits, labels) > 40
    surest = (best_factor(logits, labels, cautious=True) * logits).softmax(1).amax()
    # Of count + 1 pictures one is of every class alike.
    assert float(surest) == pytest.approx((count + 1 / 4) / (count + 1), abs=0.01)


def test_vectors_have_the_least_loss() -> None:
    torch.manual_seed(0)
    inputs, labels, offset = torch.randn(60, 5), torch.randint(0, 3, (60,)), torch.randn(60, 3)

    def loss(vectors: torch.Tensor) -> float:
        fit = F.cross_entropy(offset + 2.0 * inputs @ vectors.T, labels)
        return float(fit + 0.1 * vectors.square().sum(dim=1).mean())

    found = solve_vectors(inputs, labels, offset, scale=2.0, penalty=0.1)
    assert all(loss(found) < loss(found + 0.01 * torch.randn(3, 5)) for _ in range(20))
    again = solve_vectors(inputs, labels, offset, scale=2.0, penalty=0.1, start=found)
    torch.testing.assert_close(again, found, atol=1e-3, rtol=1e-3)
