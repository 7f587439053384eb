"""Classifiers on frozen embeddings: what they start from, what they learn, and that they match their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.objectives.probes import KeyCache, fit_logistic, fit_lp_plus_plus, train_keys

CLASSES, DIM = 4, 12


@pytest.fixture
def data() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (N, D) around one direction per class, labels, and text embeddings near the directions."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, DIM, generator=generator)
    labels = torch.arange(40) % CLASSES
    features = F.normalize(centres[labels] + 0.7 * torch.randn(40, DIM, generator=generator), dim=-1)
    text = F.normalize(centres + 0.7 * torch.randn(CLASSES, DIM, generator=generator), dim=-1)
    return features, labels, text


def share_right(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


def test_logistic_regression_is_at_its_minimum(data: tuple[Tensor, Tensor, Tensor]) -> None:
    features, labels, _ = data
    probe = fit_logistic(features, labels, CLASSES, 1e-2)
    weight, bias = probe.weight.clone().requires_grad_(True), probe.bias.clone().requires_grad_(True)
    x = (features - probe.mean) / probe.scale
    loss = F.cross_entropy(x @ weight + bias, labels) + 1e-2 / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(weight.grad.abs().max()) < 1e-4
    assert float(bias.grad.abs().max()) < 1e-4
    assert share_right(probe(features), labels) > 0.9


def test_a_stronger_penalty_makes_smaller_weights_and_a_start_changes_nothing(
    data: tuple[Tensor, Tensor, Tensor],
) -> None:
    features, labels, _ = data
    weak, strong = (fit_logistic(features, labels, CLASSES, penalty) for penalty in (1e-3, 1e-1))
    assert strong.weight.norm() < weak.weight.norm()
    again = fit_logistic(features, labels, CLASSES, 1e-1, weak)
    assert torch.allclose(again.weight, strong.weight, atol=1e-3)


def test_logistic_regression_does_not_mind_the_scale_of_features(data: tuple[Tensor, Tensor, Tensor]) -> None:
    features, labels, _ = data
    plain, scaled = (fit_logistic(factor * features, labels, CLASSES, 1e-2) for factor in (1.0, 50.0))
    assert torch.allclose(plain(features), scaled(50 * features), atol=1e-2)


def test_lp_plus_plus_starts_from_prototypes_and_lowers_the_loss(data: tuple[Tensor, Tensor, Tensor]) -> None:
    features, labels, text = data
    iterates = list(fit_lp_plus_plus(features, labels, text, shots=10, strength=20.0, steps=60))
    assert len(iterates) == 61
    start = iterates[0]
    of_first = features[labels == 0]
    assert torch.allclose(start.visual[:, 0], of_first.sum(0), atol=1e-5)
    cosines = torch.stack([(features[labels == one] @ text[one]).mean() for one in range(CLASSES)]).mean()
    assert torch.allclose(start.alpha, 20.0 * cosines.expand(CLASSES), atol=1e-4)
    losses = [float(F.cross_entropy(one(features), labels)) for one in iterates]
    assert losses[-1] < losses[0]
    # Multipliers move every tenth step, each class by its own.
    assert torch.equal(iterates[9].alpha, start.alpha)
    assert len(set(iterates[10].alpha.tolist())) == CLASSES
    sides, before = features @ text.T, iterates[9]
    error = (before(features).softmax(1) - F.one_hot(labels, CLASSES)) / len(features)
    slope = (error * sides).sum(0)  # of the mean cross-entropy
    rate = len(features) / (4 * sides.square().sum(0).max())
    assert torch.allclose(iterates[10].alpha, before.alpha - rate * slope, atol=1e-4)
    assert share_right(iterates[-1](features), labels) > 0.9


def test_lp_plus_plus_takes_views_for_one_picture(data: tuple[Tensor, Tensor, Tensor]) -> None:
    features, labels, text = data
    once = next(iter(fit_lp_plus_plus(features, labels, text, shots=10)))
    twice = next(iter(fit_lp_plus_plus(features.repeat(2, 1), labels.repeat(2), text, shots=10)))
    assert torch.allclose(once.visual, twice.visual, atol=1e-5)
    assert torch.allclose(once.alpha, twice.alpha, atol=1e-4)


def test_a_cache_without_weight_is_the_text_alone_and_with_weight_follows_its_neighbours(
    data: tuple[Tensor, Tensor, Tensor],
) -> None:
    features, labels, text = data
    values = F.one_hot(labels, CLASSES).float()
    silent = KeyCache(features, values, text, 10.0, 0.0, 5.0)
    assert torch.allclose(silent(features), 10 * features @ text.T, atol=1e-4)
    loud = KeyCache(features, values, text, 10.0, 1e4, 50.0)
    assert share_right(loud(features), labels) == 1.0


def test_training_keys_starts_at_the_keys_given_and_lowers_the_loss(data: tuple[Tensor, Tensor, Tensor]) -> None:
    features, labels, text = data
    cache = KeyCache(features, F.one_hot(labels, CLASSES).float(), text, 10.0, 2.0, 3.0)
    moved = list(train_keys(cache, lambda _: (features, labels), epochs=5, batch_size=16))
    assert len(moved) == 6
    assert torch.equal(moved[0], cache.keys)

    def loss(keys: Tensor) -> float:
        one = KeyCache(keys, cache.values, text, 10.0, 2.0, 3.0)
        return float(F.cross_entropy(one(features), labels))

    assert loss(moved[-1]) < loss(moved[0])
    assert torch.equal(cache.keys, features)  # what was given stays as it is
