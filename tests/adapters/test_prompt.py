from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tiny_links import save_tiny_prompt
from tiny_towers import inputs_of
from trimtab.adapters.adapted import load_adapted
from trimtab.adapters.prompt import Pictures, PromptedClasses, StructuredPrompt, best_classes, extended
from trimtab.config import DomainPartConfig, GeneralConfig, InstanceConfig, PromptConfig
from trimtab.errors import ModelError, RecipeError
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.prefix_reuse import can_reuse
from trimtab.towers.prompting import PromptTower, image_tokens

NAMES = ["cat", "red car", "tea", "dog"]
INIT = "photo of a"
FULL = PromptConfig(GeneralConfig(INIT), InstanceConfig(width=8, heads=2), DomainPartConfig(tokens=1, residual=True))
KINDS = {
    "general": PromptConfig(GeneralConfig(INIT), None, DomainPartConfig(0, residual=False, patches=False)),
    "attention": FULL,
    "late attention": PromptConfig(GeneralConfig(INIT), InstanceConfig(width=8, heads=2, layer=1), DomainPartConfig()),
    "meta": PromptConfig(GeneralConfig(INIT), InstanceConfig("meta"), DomainPartConfig(0, residual=False)),
    "few refined": PromptConfig(GeneralConfig(INIT), InstanceConfig(width=8, heads=2, top_k=2), DomainPartConfig()),
}


@torch.no_grad()
def seen(base: DualEncoder, pictures: list[Image.Image]) -> Pictures:
    found = image_tokens(base, inputs_of(base, "image", pictures))
    return Pictures(torch.nn.functional.normalize(found.features, dim=-1), found.tokens, found.mask)


def prompted(base: DualEncoder, config: PromptConfig, pictures: Pictures, *, moved: float = 0) -> PromptedClasses:
    assert pictures.tokens is not None
    tower = PromptTower(base)
    prompt = StructuredPrompt(config, tower, patch_width=pictures.tokens.shape[2], classes=len(NAMES), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(moved * torch.randn(parameter.shape, generator=generator))
    return PromptedClasses(tower, prompt, NAMES)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["clip", "siglip2", "flava", "starter"])
@torch.no_grad()
def test_it_starts_as_the_general_part_alone(kind: str, name: str, base_of: Any, pictures: list[Image.Image]) -> None:
    base = base_of(name)
    images = seen(base, pictures)
    classes = prompted(base, KINDS[kind], images)
    alone = prompted(base, KINDS["general"], images)
    if classes.prompt.class_tokens is not None:
        pytest.skip("class-specific tokens are tokens of their own")
    start = images.embeddings @ alone.embeddings().T
    close(classes.scores(images, classes.embeddings()), start)
    expected = base.token_features(base.text_inputs([f"{INIT} {one}" for one in NAMES]))
    close(alone.embeddings(), torch.nn.functional.normalize(expected, dim=-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["clip", "siglip2", "starter"])
@torch.no_grad()
def test_each_picture_is_independent_of_its_batch(
    kind: str, name: str, base_of: Any, pictures: list[Image.Image]
) -> None:
    base = base_of(name)
    classes = prompted(base, KINDS[kind], seen(base, pictures), moved=0.3)
    embeddings = classes.embeddings()
    together = classes.scores(seen(base, pictures), embeddings)
    alone = torch.cat([classes.scores(seen(base, [one]), embeddings) for one in pictures])
    close(together, alone)
    shuffled = classes.scores(seen(base, pictures[::-1]), embeddings).flip(0)
    close(together, shuffled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["clip", "starter"])
def test_gradients_reach_every_part_and_nothing_else(
    kind: str, name: str, base_of: Any, pictures: list[Image.Image]
) -> None:
    base = base_of(name)
    images = seen(base, pictures)
    classes = prompted(base, KINDS[kind], images, moved=0.1)
    if kind == "meta":  # it has a single ReLU at this width: open, else nothing below it can have a gradient
        torch.nn.init.constant_(classes.prompt.instance.down.bias, 2.0)
    labels = torch.tensor([0, 1, 2, 3, 0])
    scores = classes.scores(images, classes.embeddings(), labels)
    torch.nn.functional.cross_entropy(20 * scores, labels).backward()
    for part, parameter in classes.prompt.named_parameters():
        assert parameter.grad is not None, part
        assert parameter.grad.abs().max() > 0 or part == "instance.key.bias", part  # a softmax cancels it
    assert all(parameter.grad is None for parameter in base.model.parameters())


@pytest.mark.parametrize("name", ["clip", "siglip", "starter"])
@torch.no_grad()
def test_refined_classes_are_scored_as_all_are(name: str, base_of: Any, pictures: list[Image.Image]) -> None:
    base = base_of(name)
    images = seen(base, pictures)
    every = prompted(base, FULL, images, moved=0.3)
    chosen = torch.tensor([[0, 2], [3, 1], [2, 0], [1, 2], [3, 0]])
    close(
        every.of_pictures(images, chosen),
        every.of_pictures(images).gather(1, chosen[:, :, None].expand(-1, -1, base.embedding_dim)),
    )
    assert can_reuse(every.tower) == (name == "clip")


@torch.no_grad()
def test_the_true_class_is_refined_wherever_it_ranks(base_of: Any, pictures: list[Image.Image]) -> None:
    base = base_of("clip")
    images = seen(base, pictures)
    config = KINDS["few refined"]
    few, every = (
        prompted(base, replace(config, instance=InstanceConfig(width=8, heads=2, top_k=top_k)), images, moved=0.3)
        for top_k in (2, None)
    )
    scores = every.scores(images, every.embeddings())
    labels = few.scores(images, few.embeddings()).argmin(dim=1)
    found = few.scores(images, few.embeddings(), labels)
    close(found.gather(1, labels[:, None]), scores.gather(1, labels[:, None]))


@torch.no_grad()
def test_cosines_are_as_exact_where_training_is_in_bf16(base_of: Any, pictures: list[Image.Image]) -> None:
    images = seen(base_of("clip"), pictures)
    classes = prompted(base_of("clip"), KINDS["general"], images)
    embeddings = classes.embeddings()
    exact = classes.scores(images, embeddings)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classes.scores(images, embeddings), exact)


@pytest.mark.parametrize(("kind", "kept"), [("attention", 0.0), ("late attention", 1.0)])
def test_classes_get_the_gradient_of_what_each_picture_has_of_its_own(
    kind: str, kept: float, base_of: Any, pictures: list[Image.Image]
) -> None:
    """Prompts of each picture stand in for those of the class; where they enter late, both get a gradient."""
    images = seen(base_of("clip"), pictures)
    classes = prompted(base_of("clip"), KINDS[kind], images, moved=0.3)
    embeddings = classes.embeddings().detach().requires_grad_(True)
    classes.scores(images, embeddings).sum().backward()
    assert embeddings.grad is not None
    expected = kept * classes.prompt.text_weight * images.embeddings.sum(dim=0)
    close(embeddings.grad, expected.detach().expand(len(NAMES), -1))


@torch.no_grad()
def test_vectors_are_set_side_by_side(base_of: Any, pictures: list[Image.Image]) -> None:
    images = seen(base_of("clip"), pictures)
    prompt = prompted(base_of("clip"), FULL, images).prompt
    vectors = torch.randn(len(NAMES), prompt.compared(images).shape[1])
    prompt.set_vectors(vectors)
    assert len(prompt.vectors()) == 2
    close(torch.cat(prompt.vectors(), dim=1), vectors)


@torch.no_grad()
def test_instance_tokens_differ_between_pictures_once_trained(base_of: Any, pictures: list[Image.Image]) -> None:
    base = base_of("clip")
    images = seen(base, pictures)
    classes = prompted(base, FULL, images, moved=0.3)
    own = classes.of_pictures(images)
    assert (own[0] - own[1]).abs().max() > 1e-2
    instance: Any = classes.prompt.instance
    weights = instance.attention(images)
    close(weights.sum(dim=2), torch.ones(5, 2))


@pytest.mark.parametrize("kind", ["attention", "meta"])
@torch.no_grad()
def test_padding_is_not_looked_at(kind: str, base_of: Any, pictures: list[Image.Image]) -> None:
    base = base_of("siglip2")
    images = seen(base, pictures)
    assert images.mask is not None
    assert images.tokens is not None
    classes = prompted(base, KINDS[kind], images, moved=0.3)
    before = classes.scores(images, classes.embeddings())
    images.tokens[~images.mask] = 1e3
    close(classes.scores(images, classes.embeddings()), before)
    if kind == "attention":
        instance: Any = classes.prompt.instance
        assert instance.attention(images)[~images.mask[:, None].expand(-1, 2, -1)].max() == 0


@torch.no_grad()
def test_untrained_queries_see_the_mean_of_all_patches(base_of: Any, pictures: list[Image.Image]) -> None:
    base = base_of("clip")
    images = seen(base, pictures)
    assert images.tokens is not None
    pooled = prompted(base, FULL, images).prompt.pooled(images)
    close(pooled, torch.nn.functional.normalize(images.tokens.mean(dim=1), dim=-1))


def test_a_longer_context_starts_at_random_before_the_template(base_of: Any) -> None:
    base = base_of("clip")
    tower = PromptTower(base)

    def general(seed: int = 3, **options: Any) -> Tensor:
        config = PromptConfig(GeneralConfig(**options), None, DomainPartConfig())
        return StructuredPrompt(config, tower, patch_width=16, classes=2, seed=seed).general

    start = tower.embedded(INIT)
    close(general(init=INIT), start)
    longer = general(init=INIT, tokens=len(start) + 2)
    close(longer[2:], start)
    assert longer[:2].abs().max() < 0.2
    assert torch.equal(longer, general(init=INIT, tokens=len(start) + 2))  # the seed decides
    assert not torch.equal(longer, general(seed=4, init=INIT, tokens=len(start) + 2))
    assert general(init=None, tokens=5).shape == (5, 16)
    with pytest.raises(RecipeError, match=r"general\.tokens=1, but init='photo of a' has"):
        general(init=INIT, tokens=1)


@torch.no_grad()
def test_unseen_classes_have_their_name_alone(base_of: Any, pictures: list[Image.Image]) -> None:
    base = base_of("clip")
    images = seen(base, pictures)
    classes = prompted(base, FULL, images, moved=0.3)
    names = ["dog", "bear", "cat"]
    other = PromptedClasses(classes.tower, extended(classes.prompt, [3, None, 0]), names)
    assert other.prompt.residual is not None
    assert classes.prompt.residual is not None
    close(other.prompt.residual[[0, 2]], classes.prompt.residual[[3, 0]])
    assert other.prompt.residual[1].abs().max() == 0
    assert other.prompt.class_tokens is not None
    assert classes.prompt.class_tokens is not None
    close(other.prompt.class_tokens[1], classes.prompt.class_tokens.mean(dim=0))
    scores = classes.scores(images, classes.embeddings())
    close(other.scores(images, other.embeddings())[:, [0, 2]], scores[:, [3, 0]])
    assert len(classes.prompt.residual) == 4  # it is as it was


def test_learned_classes_are_known_in_other_case_and_white_space(
    base_of: Any, pictures: list[Image.Image], tmp_path: Path
) -> None:
    base = base_of("clip")
    model = load_adapted(save_tiny_prompt(tmp_path / "prompt", base, patches=True), base=base)
    expected = model.classifier().scores(pictures)
    classifier = model.classifier(["CAT", "dog ", "red\xa0car"])
    assert classifier.classes == ("CAT", "dog ", "red\xa0car")
    assert np.allclose(classifier.scores(pictures), expected, atol=1e-6)
    classifier.add_classes(["bear"])
    assert classifier.classes[3] == "bear"
    scores = classifier.scores(pictures)[:, :3]
    assert np.allclose(scores / scores.sum(axis=1, keepdims=True), expected, atol=1e-6)


@pytest.mark.parametrize("size", [10**13, 10**30])
@pytest.mark.parametrize(
    "keys",
    [
        ("patch_width",),
        ("prompt", "general", "tokens"),
        ("prompt", "instance", "width"),
        ("prompt", "domain", "tokens"),
    ],
)
def test_described_sizes_take_no_memory(base_of: Any, tmp_path: Path, keys: tuple[str, ...], size: int) -> None:
    base = base_of("clip")
    folder = save_tiny_prompt(tmp_path / "prompt", base, instance=True)
    raw = json.loads((folder / "adapter.json").read_text())
    section = raw["config"]
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = size
    (folder / "adapter.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"does not fit the prompt adapter|has a wrong size"):
        load_adapted(folder, base=base)


def test_best_classes_have_the_true_one() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.4, 0.1, 0.2, 0.3]])
    assert best_classes(scores, 2).tolist() == [[1, 2], [0, 3]]
    assert {frozenset(row) for row in best_classes(scores, 2, torch.tensor([0, 0])).tolist()} == {
        frozenset({0, 1}), frozenset({0, 3})
    }  # fmt: skip


def test_pictures_without_patches_are_refused(base_of: Any, pictures: list[Image.Image], tmp_path: Path) -> None:
    base = base_of("clip")
    images = seen(base, pictures)
    classes = prompted(base, FULL, images)
    with pytest.raises(ValueError, match="reads patch tokens"):
        classes.scores(Pictures(images.embeddings), classes.embeddings())
