from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trimtab.adapters.prompt import Pictures, PromptedClasses, StructuredPrompt
from trimtab.config import (
    DomainPartConfig,
    GeneralConfig,
    InstanceConfig,
    PromptConfig,
    PromptObjective,
)
from trimtab.tasks import prompt as module
from trimtab.tasks.prompt import PromptTask
from trimtab.towers.prompting import PromptTower

NAMES = ["cat", "dog", "red car", "tea", "bird", "house"]
LABELS = np.array([0, 1, 2, 3, 4, 5, 0, 1])
COOP = PromptConfig(GeneralConfig("photo of a"), None, DomainPartConfig(residual=False, patches=False))
FULL = PromptConfig(GeneralConfig("photo of a"), InstanceConfig(width=8, heads=2, top_k=2), DomainPartConfig())


def task(base: Any, config: PromptConfig, **objective: Any) -> PromptTask:
    tower = PromptTower(base)
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(8, base.embedding_dim, generator=generator), dim=-1)
    tokens = torch.randn(8, 5, 16, generator=generator)
    prompt = StructuredPrompt(config, tower, patch_width=16, classes=len(NAMES))
    classes = PromptedClasses(tower, prompt, NAMES)
    return PromptTask(
        classes,
        lookup=lambda items, views: Pictures(images[items], tokens[items]),
        labels=LABELS,
        templates=F.normalize(torch.randn(6, base.embedding_dim, generator=generator), dim=-1),
        objective=PromptObjective(**objective),
        logit_scale=20.0,
    )


BATCH = (np.array([0, 3, 6]), np.array([0, 0, 0]))


@pytest.fixture
def base(tiny_base: Any) -> Any:
    return tiny_base("vision-text-dual-encoder")


def test_coop_is_cross_entropy_over_cosines_with_prompted_names(base: Any) -> None:
    coop = task(base, COOP, template=0)
    texts = F.normalize(base.token_features(base.text_inputs([f"photo of a {name}" for name in NAMES])), dim=-1)
    pictures = coop.lookup(*BATCH)
    expected = F.cross_entropy(20 * pictures.embeddings @ texts.T, torch.tensor([0, 3, 0]))
    terms = coop.step(BATCH)
    assert set(terms) == {"cross_entropy"}
    assert terms["cross_entropy"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_hand_templates_predict_the_same_where_training_is_in_bf16(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    coop = task(base, COOP, frozen=1)
    monkeypatch.setattr(module, "prompt_terms", lambda *_, frozen, **__: given.append(frozen) or {})
    with torch.autocast("cpu", torch.bfloat16):
        coop.step(BATCH)
    torch.testing.assert_close(given[0], 20 * coop.lookup(*BATCH).embeddings @ coop.templates.T)


def test_with_few_fresh_classes_the_loss_is_the_same_at_first(base: Any) -> None:
    whole, few = task(base, COOP, template=0), task(base, COOP, template=0, classes_per_step=3)
    assert few.step(BATCH)["cross_entropy"].item() == pytest.approx(whole.step(BATCH)["cross_entropy"].item(), abs=1e-5)


def test_fresh_classes_are_those_of_the_batch_and_some_others(base: Any) -> None:
    few = task(base, COOP, classes_per_step=3)
    for _ in range(5):
        fresh = few._fresh(torch.tensor([0, 3, 0]))
        assert fresh is not None
        assert len(set(fresh.tolist())) == 3
        assert {0, 3} <= set(fresh.tolist())
    assert task(base, COOP, classes_per_step=6)._fresh(torch.tensor([0])) is None


def test_other_classes_stay_as_they_were_last(base: Any) -> None:
    few = task(base, COOP, template=0, classes_per_step=2)
    before = few.stale.clone()
    with torch.no_grad():
        few.classes.prompt.general.add_(torch.randn(few.classes.prompt.general.shape))
    few.step(BATCH)
    changed = (few.stale - before).abs().amax(dim=1) > 1e-4
    assert changed.tolist() == [True, False, False, True, False, False]
    assert not few.stale.requires_grad


def test_steps_lower_the_loss_of_the_whole_prompt(base: Any) -> None:
    full = task(base, FULL, template=1.0, residual=0.01, frozen=0.1, separation=1.0)
    optimiser = torch.optim.Adam(full.parameters(), lr=0.01)
    batch = (np.arange(8), np.zeros(8, int))
    losses = []
    for _ in range(30):
        terms = full.step(batch)
        loss = sum(terms.values(), torch.zeros(()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(terms["cross_entropy"].item())
    assert losses[-1] < 0.5 * losses[0]
    assert (full.logits(full.lookup(*batch)).argmax(dim=1).numpy() == LABELS).all()
