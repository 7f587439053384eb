"""What each method trains, where it may be cut, its dial, and that its folder is the model in training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimtab
from tiny_domain import CAPTIONS, picture, toy_recipe
from trimtab.errors import ModelError, RecipeError
from trimtab.recipes.domain_methods import METHODS, Method
from trimtab.towers.hf import load_base

PICTURES = [picture(number) for number in range(6)]
FAMILY = "vision-text-dual-encoder"
SCALE = 7.0


def make(folder: Path, method: str, **changes: Any) -> Method:
    base = load_base(str(folder), device="cpu")
    recipe = toy_recipe(folder, Path("pairs.csv"), Path("pairs.csv"), Path("out"), method=method, **changes)
    return METHODS[method](base, recipe)


def trained(method: Method) -> Method:
    """As if it had learnt something: every number that is trained moves."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in method.parameters():
            if one.requires_grad:
                one.add_(0.1 * torch.randn(one.shape, generator=generator))
    return method


def embeddings(model: Any) -> np.ndarray:
    return np.concatenate([model.encode_image(PICTURES), model.encode_text(CAPTIONS)])


@pytest.mark.parametrize("name", METHODS)
def test_it_starts_as_the_base(name: str, tiny_folder: Any, tiny_base: Any) -> None:
    method = make(tiny_folder(FAMILY), name)
    with method.at_alpha(1.0, SCALE) as model:
        np.testing.assert_allclose(embeddings(model), embeddings(tiny_base(FAMILY)), atol=2e-6)


@pytest.mark.parametrize("family", [FAMILY, "clip", "flava"])
@pytest.mark.parametrize("name", METHODS)
def test_its_dial_leads_from_the_base_to_what_it_learnt(
    name: str, family: str, tiny_folder: Any, tiny_base: Any
) -> None:
    method = trained(make(tiny_folder(family), name))
    found = []
    for alpha in (0.0, 0.5, 1.0, 0.0):
        with method.at_alpha(alpha, SCALE) as model:
            found.append(embeddings(model))
            assert model.logit_scale == SCALE
    base = embeddings(tiny_base(family))
    np.testing.assert_allclose(found[0], base, atol=2e-6)
    assert np.array_equal(found[0], found[3])
    far = np.linalg.norm(found[2] - base)
    assert 0.01 < np.linalg.norm(found[1] - base) < far


@pytest.mark.parametrize("family", [FAMILY, "clip", "flava"])
@pytest.mark.parametrize("name", METHODS)
def test_the_saved_folder_is_the_model(name: str, family: str, tiny_folder: Any, tmp_path: Path) -> None:
    method = trained(make(tiny_folder(family), name))
    with method.at_alpha(1.0, SCALE) as model:
        expected = embeddings(model)
    method.save(tmp_path / "out", SCALE, card="# A card\n")
    loaded = trimtab.load(str(tmp_path / "out"))
    np.testing.assert_allclose(embeddings(loaded), expected, atol=2e-6)
    assert loaded.logit_scale == pytest.approx(SCALE)
    assert (tmp_path / "out" / "README.md").read_text() == "# A card\n"


def test_parameters_are_counted(tiny_folder: Any, tiny_base: Any) -> None:
    total = sum(one.numel() for one in tiny_base(FAMILY).model.parameters())
    for name in METHODS:
        method = make(tiny_folder(FAMILY), name)
        assert method.base_parameters == total
        assert 0 < method.trained_parameters <= total
    assert make(tiny_folder(FAMILY), "full").trained_parameters == total - 1  # logit_scale is the task's


def test_full_keeps_eval_mode_and_leaves_what_no_tower_uses(tiny_folder: Any) -> None:
    method = make(tiny_folder("flava"), "full")
    method.train()
    assert not any(module.training for module in method.base.model.modules())
    frozen = [name for name, one in method.base.model.named_parameters() if not one.requires_grad]
    assert any(name.startswith("multimodal_model") for name in frozen)
    assert not any(name.startswith(("text_model", "image_projection")) for name in frozen)


def test_lora_leaves_what_no_tower_uses(tiny_folder: Any) -> None:
    names = [name.replace("|", ".") for name in make(tiny_folder("flava"), "lora").updates]  # type: ignore[union-attr]
    assert {name.partition(".")[0] for name in names} == {"image_model", "text_model"}
    assert len(names) == 2 * 2 * 3 * 2  # towers, layers, products and halves of an update


def test_cuts(tiny_folder: Any) -> None:
    def cut(name: str, **changes: Any) -> list[str]:
        method = make(tiny_folder(FAMILY), name, **changes)
        cuts = [method.cut("image"), method.cut("text")]
        return ["none" if one is None else str(one.site or "features") for one in cuts]

    assert cut("adapter") == ["image.layers.0", "text.layers.1"]
    assert cut("adapter", adapters=[{"tower": "text", "first": 0}]) == ["features", "text.layers.0"]
    assert cut("full") == ["none", "none"]
    assert cut("probe") == ["features", "features"]
    assert cut("lora") == ["image.layers.0", "text.layers.0"]
    assert cut("lora", lora={"targets": ["layer.1.attention.self.query"]}) == ["features", "text.layers.1"]
    assert cut("lora", lora={"targets": ["visual_projection"]}) == ["none", "features"]


def test_lora_acts_in_pytorchs_fused_layers(tmp_path: Path) -> None:
    """Which read the weights of a layer past what `peft` puts in its place."""
    import tiny_starter

    folder = tiny_starter.build_starter(tmp_path / "base")
    method = make(folder, "lora", lora={"targets": ["linear1", "linear2", "out_proj"], "rank": 4})
    assert not any("out_proj" in name for name, _ in method.updates.named_parameters())  # type: ignore[union-attr]
    fused = torch.backends.mha.get_fastpath_enabled()
    with method.at_alpha(0.0, SCALE) as model:
        before = model.encode_image(PICTURES[:2])
    trained(method)
    with method.at_alpha(1.0, SCALE) as model:
        after = model.encode_image(PICTURES[:2])
    assert np.abs(after - before).max() > 1e-3
    assert torch.backends.mha.get_fastpath_enabled() == fused
    method.save(tmp_path / "out", SCALE, card="")
    np.testing.assert_allclose(trimtab.load(str(tmp_path / "out")).encode_image(PICTURES[:2]), after, atol=1e-5)


def test_what_cannot_be_is_refused(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"targets=\['nothing'\]"):
        make(tiny_folder(FAMILY), "lora", lora={"targets": ["nothing"]})
    with pytest.raises(RecipeError, match="needs a base with projections"):
        make(tiny_folder("siglip"), "probe")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'trimtab\[peft\]'"):
        make(tiny_folder(FAMILY), "lora")
