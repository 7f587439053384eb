from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_towers import BUILDERS
from trimtab.adapters.domain import DomainAdapted, DomainAdapters
from trimtab.config import DomainAdapterConfig
from trimtab.towers.prefix_reuse import can_reuse, reused_features
from trimtab.towers.prompting import PromptTower

NAMES = ["cat", "red car", "tea", "dog"]
CAUSAL = ["clip", "vit+clip-text", "clip-resnet"]


def learned(tower: PromptTower, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randn(3, 5, tower.width, generator=generator).requires_grad_()
    return prompt, torch.randn(classes, 2, tower.width, generator=generator).requires_grad_()


def row_by_row(tower: PromptTower, layout: Any, prompt: Tensor, chosen: Tensor, extra: Tensor) -> Tensor:
    parts = []
    for image, classes in enumerate(chosen):
        parts.append(tower.features(layout.take(classes), prompt[image : image + 1], extra[classes]))
    return torch.stack(parts)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("memory", [1 << 30, 20_000, 1])
@pytest.mark.parametrize("some", [False, True])
def test_it_equals_the_plain_pass_and_so_do_gradients(name: str, memory: int, some: bool, base_of: Any) -> None:
    base = base_of(name)
    tower = PromptTower(base, memory=memory)
    assert can_reuse(tower)
    layout = tower.layout(NAMES, prompt=5, extra=2)
    chosen = torch.tensor([[2, 0], [1, 3], [0, 3]]) if some else torch.arange(4).expand(3, -1)
    found = []
    for way in ("plain", "reused"):
        prompt, extra = learned(tower, len(NAMES))
        if way == "plain":
            features = row_by_row(tower, layout, prompt, chosen, extra)
        else:
            features = reused_features(tower, layout, prompt, chosen if some else None, extra)
        features.sin().sum().backward()
        found.append((features, prompt.grad, extra.grad))
    for plain, reused in zip(*found, strict=True):
        torch.testing.assert_close(reused, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_only_causal_towers_may(name: str, base_of: Any) -> None:
    assert can_reuse(PromptTower(base_of(name))) == (name in CAUSAL)


def test_not_where_adapters_are_attached(base_of: Any) -> None:
    base = base_of("clip")
    adapters = DomainAdapters(base, [DomainAdapterConfig("text", width=4)])
    assert not can_reuse(PromptTower(DomainAdapted(base, adapters)))
    with adapters.attach(base):
        assert not can_reuse(PromptTower(base))
    assert can_reuse(PromptTower(base))
