"""AdamW and Muon: which parameters get what, and how far a step goes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.config import TrainingConfig, recipe_from_mapping
from trimtab.errors import RecipeError
from trimtab.training.optimiser import Muon, is_matrix, make_optimizer, orthogonal, trainable

MUON = TrainingConfig(optimizer="muon", learning_rate=0.1)


@pytest.mark.parametrize("shape", [(4, 64), (64, 4), (16, 16)])
def test_singular_values_become_alike(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, 4))[0] for side in shape)
    matrix = left @ torch.diag(torch.tensor([1.0, 0.7, 0.3, 0.1])) @ right.T
    values = torch.linalg.svdvals(orthogonal(matrix))[:4]
    assert 0.6 < values.min() <= values.max() < 1.3
    torch.testing.assert_close(orthogonal(100 * matrix), orthogonal(matrix), atol=1e-4, rtol=1e-4)


def test_nothing_stays_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_depthwise_filters_biases_and_gains_are_no_matrices() -> None:
    model = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.LayerNorm(4), nn.Linear(4, 2))
    found = {name for name, one in trainable(model).items() if is_matrix(one)}
    assert found == {"0.weight", "3.weight"}
    groups = make_optimizer(trainable(model), MUON).param_groups
    assert {(group["matrices"], group["weight_decay"]): len(group["params"]) for group in groups} == {
        (True, 0.01): 2, (False, 0.01): 1, (False, 0.0): 5,
    }  # fmt: skip


def test_matrices_move_by_the_rate_and_all_else_as_adamw_moves_it() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(32, 8), nn.Linear(32, 8)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(64, 32)
    before = ours.weight.detach().clone()
    for model, settings in ((ours, MUON), (theirs, TrainingConfig(learning_rate=0.1))):
        optimizer = make_optimizer(trainable(model), settings)
        model(x).square().sum().backward()
        optimizer.step()
    step = (ours.weight - before * (1 - 0.1 * 0.01)).detach()
    assert 0.5 < float(step.square().mean().sqrt()) / (0.1 * 0.2) < 1.5  # the size of AdamW's steps
    values = torch.linalg.svdvals(step)
    assert values.max() < 2 * values.min()
    assert torch.equal(ours.bias, theirs.bias)


def test_decay_of_matrices_shrinks_them() -> None:
    model = nn.Linear(3, 2, bias=False)
    before = model.weight.detach().clone()
    settings = TrainingConfig(optimizer="muon", learning_rate=0.1, weight_decay=0.5)
    model.weight.grad = torch.zeros_like(before)
    make_optimizer(trainable(model), settings).step()
    torch.testing.assert_close(model.weight.detach(), 0.95 * before)


def test_two_steps_of_a_matrix_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    settings = TrainingConfig(optimizer="muon", learning_rate=0.1, weight_decay=0.0)
    optimizer = make_optimizer(trainable(model), settings)
    first, second, expected = torch.randn(3, 4), torch.randn(3, 4), model.weight.detach().clone()
    for gradient in (first, second):
        model.weight.grad = gradient.clone()
        optimizer.step()
    momentum = 0.95 * first + second
    # Nesterov's: each step looks ahead by the momentum that it has just taken in.
    for ahead in (1.95 * first, second + 0.95 * momentum):
        expected -= 0.1 * 0.2 * 4**0.5 * orthogonal(ahead)
    torch.testing.assert_close(model.weight.detach(), expected)


def test_both_learn() -> None:
    x, target = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)), torch.eye(12)[:, :6]
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 6))
        optimizer = make_optimizer(trainable(model), TrainingConfig(optimizer=name, learning_rate=0.02))
        assert isinstance(optimizer, Muon) == (name == "muon")
        losses = []
        for _ in range(60):
            loss = (model(x) - x @ target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0], name


def test_others_are_refused_with_their_names() -> None:
    with pytest.raises(RecipeError, match=r"optimizer.*adamw"):
        recipe_from_mapping(
            {"link": "domain", "data": {"train": ["a.csv"]}, "training": {"optimizer": "sgd"}}, "a.yaml"
        )
