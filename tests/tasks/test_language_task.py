from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.adapters.language import LanguageAdapter
from trimtab.config import DistillationConfig, LanguageAdapterConfig
from trimtab.objectives.distillation import Standardiser
from trimtab.tasks.language import LanguageTask

WIDTH, DIM = 6, 4


def make_task(lookup: Callable[[np.ndarray], Any] | None = None, **weights: float) -> LanguageTask:
    torch.manual_seed(0)
    config = LanguageAdapterConfig(width=8, layers=1, heads=2)
    adapter = LanguageAdapter(config, input_dim=WIDTH, output_dim=DIM)
    return LanguageTask(adapter, Standardiser(DIM), DistillationConfig(**weights), lookup or toy_lookup)


def toy_lookup(indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """States in the cache's fp16, of lengths 2 to 5, and teacher vectors that depend on their mean."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(40, 5, WIDTH, generator=generator).half()
    mask = torch.arange(5) < (2 + torch.arange(40) % 4)[:, None]
    states[~mask] = 0
    teacher = states.float().sum(1)[:, :DIM] / mask.sum(1, keepdim=True)
    picked = torch.from_numpy(indices)
    return states[picked], mask[picked], teacher[picked].half()


def test_terms_are_named_and_only_the_adapter_gets_gradients() -> None:
    task = make_task(mse=1.0, cosine=0.5, infonce=2.0, gram=1.0)
    terms = task.step(np.arange(8))
    assert terms.keys() == {"mse", "cosine", "infonce", "gram"}
    assert all(term.shape == () and term.dtype == torch.float32 for term in terms.values())
    sum(terms.values(), torch.zeros(())).backward()
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, p in task.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
    assert all(name.startswith("adapter.") for name in trained)


def test_a_term_of_weight_zero_is_not_computed() -> None:
    assert make_task(mse=0.0, cosine=1.0).step(np.arange(4)).keys() == {"cosine"}


def test_the_loss_falls() -> None:
    task = make_task()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = task.step(np.arange(40))["mse"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_features_need_no_gradient_and_do_not_depend_on_padding() -> None:
    task = make_task().eval()
    torch.nn.init.normal_(task.adapter.up.weight)
    states, mask, _ = toy_lookup(np.arange(8))
    features = task.features(states, mask)
    assert (features.dtype, features.shape) == (np.float32, (8, DIM))
    wider = torch.cat([states, torch.full((8, 3, WIDTH), 9.0).half()], dim=1)
    more = torch.cat([mask, torch.zeros(8, 3, dtype=torch.bool)], dim=1)
    np.testing.assert_allclose(task.features(wider, more), features, atol=1e-5)


def test_standardiser_is_saved_with_the_adapter() -> None:
    assert {"standardiser.mean", "standardiser.std"} <= make_task().state_dict().keys()


@pytest.mark.parametrize("weights", [{"mse": 0.0, "cosine": 1.0}, {"mse": 1.0}])
def test_mean_of_two_halves_is_the_step_of_the_whole(weights: dict[str, float]) -> None:
    task = make_task(**weights)
    whole, *halves = (
        sum(task.step(rows).values(), torch.zeros(())) for rows in (np.arange(8), np.arange(4), np.arange(4, 8))
    )
    torch.testing.assert_close(sum(halves, torch.zeros(())) / 2, whole)
