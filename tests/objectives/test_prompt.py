from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from trimtab.config import PromptObjective
from trimtab.objectives.prompt import divergence, prompt_terms, separation, template_distance

LOGITS = 10 * torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 0])


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def terms(**options: Any) -> dict[str, torch.Tensor]:
    penalty = options.pop("residual", 0.0)
    config = PromptObjective(**{"template": 0, **options})
    return prompt_terms(
        LOGITS,
        LABELS,
        config,
        classes=unit(4, 8),
        templates=unit(4, 8, seed=2),
        frozen=torch.zeros(5, 4),
        vectors=[torch.full((4, 2), 0.5), torch.ones(4, 3)],
        penalty=penalty,
    )


def test_terms_of_weight_zero_are_not_computed() -> None:
    assert set(terms()) == {"cross_entropy"}
    assert set(terms(template=1, separation=1, frozen=1, residual=1)) == {
        "cross_entropy", "template", "separation", "frozen", "residual"
    }  # fmt: skip


def test_weights_multiply() -> None:
    one, two = (terms(template=w, separation=w, frozen=w, residual=w) for w in (1.0, 2.0))
    for name in ("template", "separation", "frozen", "residual"):
        assert two[name] == pytest.approx(2 * one[name].item())
    assert one["residual"] == pytest.approx(0.5 + 3)


def test_labels_are_smoothed_as_asked() -> None:
    expected = F.cross_entropy(LOGITS, LABELS, label_smoothing=0.2)
    torch.testing.assert_close(terms(label_smoothing=0.2)["cross_entropy"], expected)
    assert expected != terms()["cross_entropy"]


def test_terms_are_as_exact_where_training_is_in_bf16() -> None:
    weights = {"template": 1, "separation": 1, "frozen": 1, "residual": 1}
    exact = terms(**weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert {name: term.item() for name, term in terms(**weights).items()} == pytest.approx(
            {name: term.item() for name, term in exact.items()}, rel=1e-5
        )


def test_nothing_is_lost_at_the_templates() -> None:
    templates = unit(6, 8)
    assert template_distance(templates, templates) == pytest.approx(0, abs=1e-6)
    assert separation(templates, templates) == pytest.approx(0, abs=1e-6)
    assert divergence(torch.randn(3, 4), torch.randn(3, 4)) > 0
    logits = torch.randn(3, 4)
    assert divergence(logits, logits + 5) == pytest.approx(0, abs=1e-6)


def test_the_divergence_is_weighed_by_the_frozen_prediction() -> None:
    right = math.exp(2) / (math.exp(2) + 1)
    expected = 0.5 * math.log(0.5 / right) + 0.5 * math.log(0.5 / (1 - right))
    assert divergence(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)).item() == pytest.approx(expected)


def test_separation_punishes_only_what_came_nearer() -> None:
    apart = torch.eye(3)
    together = F.normalize(torch.ones(3, 3) + 0.1 * torch.eye(3), dim=-1)
    assert separation(together, apart) > 0.5
    assert separation(apart, together) == 0
    assert separation(apart[:1], apart[:1]) == 0
