from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tiny_towers import BUILDERS, inputs_of
from trimtab.adapters.domain import DomainAdapted, DomainAdapters
from trimtab.config import DomainAdapterConfig
from trimtab.errors import DataError, ModelError, RecipeError
from trimtab.towers import prompting
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.prompting import PromptTower, image_tokens, rows_per_pass

NAMES = ["cat", "red car", "tea", "dog"]
INIT = "photo of a"


def plain(base: DualEncoder, names: list[str] = NAMES) -> Tensor:
    return base.token_features(base.text_inputs([f"{INIT} {name}" for name in names]))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_the_embeddings_of_a_template_are_the_template(name: str, base_of: Any) -> None:
    base = base_of(name)
    tower = PromptTower(base)
    prompt = tower.embedded(INIT)
    layout = tower.layout(NAMES, prompt=len(prompt))
    close(tower.features(layout, prompt[None]), plain(base))
    close(plain(base), plain(base))  # the tower is as it was


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_class_tokens_stand_behind_the_name(name: str, base_of: Any) -> None:
    base = base_of(name)
    tower = PromptTower(base)
    tokens = [tower.name_tokens([word])[0] for word in ("cat", "dog")]
    layout = tower.layout(["red", "tea"], prompt=len(tower.embedded("a")), extra=len(tokens[0]))
    extra = tower._table(torch.tensor(tokens))
    expected = base.token_features(base.text_inputs(["a red cat", "a tea dog"]))
    close(tower.features(layout, tower.embedded("a")[None], extra), expected)


@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_reach_the_prompt_and_not_the_tower(name: str, base_of: Any) -> None:
    base = base_of(name)
    tower = PromptTower(base)
    prompt = torch.randn(2, tower.width, requires_grad=True)
    tower.features(tower.layout(NAMES, prompt=2), prompt[None]).square().sum().backward()
    assert prompt.grad is not None
    assert (prompt.grad.abs().sum(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in base.model.parameters())


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_a_shift_at_a_later_layer_changes_only_what_is_above(name: str, base_of: Any) -> None:
    base = base_of(name)
    tower = PromptTower(base)
    prompt = tower.embedded(INIT)
    layout = tower.layout(NAMES, prompt=len(prompt))
    last = tower.layers - 1
    states = tower.entering(layout, last, prompt[None])
    rows = torch.tensor([2, 0, 2])
    none = tower.shifted(layout, last, states, rows, torch.zeros(3, 2, tower.state_width))
    close(none, plain(base)[rows])
    shift = torch.randn(3, 2, tower.state_width)
    some = tower.shifted(layout, last, states, rows, shift)
    assert (some - none).abs().max() > 1e-3
    close(some[1:], tower.shifted(layout, last, states, rows[1:], shift[1:]))  # rows are independent


def test_a_later_layer_refuses_a_text_tower_with_adapters(base_of: Any) -> None:
    """A pass that ends or begins at a layer would miss them."""
    base = base_of("clip")
    for place, refused in (("text", True), ("image", False)):
        adapters = DomainAdapters(base, [DomainAdapterConfig(tower=place, width=4)])  # type: ignore[arg-type]
        tower = PromptTower(DomainAdapted(base, adapters))
        layout = tower.layout(NAMES, prompt=1)
        with pytest.raises(ModelError, match=r"instance\.layer=1") if refused else contextlib.nullcontext():
            tower.entering(layout, 1, torch.zeros(1, 1, tower.width))


@pytest.mark.parametrize("name", ["clip", "siglip", "altclip", "starter"])
def test_passes_change_neither_result_nor_gradient(name: str, base_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(name)
    results = []
    for memory in (1 << 30, 1):
        tower = PromptTower(base, memory=memory)
        assert len(tower.spans(len(NAMES), 8)) == (1 if memory > 1 else len(NAMES))
        prompt = torch.linspace(-1, 1, 2 * tower.width).view(2, -1).requires_grad_()
        layout = tower.layout(NAMES, prompt=2)
        whole = tower.features(layout, prompt[None])
        states = tower.entering(layout, 1, prompt[None])
        late = tower.shifted(layout, 1, states, torch.tensor([0, 3]), prompt.new_ones(2, 1, tower.state_width))
        (whole.sin().sum() + late.sin().sum()).backward()
        results.append((whole, late, prompt.grad))
    for one, other in zip(*results, strict=True):
        close(one, other)


@pytest.mark.parametrize(("memory", "each"), [(1 << 30, 1), (1, 2)])
def test_passes_run_again_only_where_memory_is_short(
    memory: int, each: int, base_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("starter")
    tower = PromptTower(base, memory=memory)
    monkeypatch.setattr(prompting, "_GROUP_ROWS", 2)  # so that a few names are several groups of like length
    prompt = torch.zeros(1, 1, tower.width, requires_grad=True)
    layout = tower.layout(["cat", "dog", "a red pear", "a blue pear"], prompt=1)
    parts = 2 if memory > 1 else len(layout)
    counted, whole = [], base.token_features
    monkeypatch.setattr(base, "token_features", lambda inputs: counted.append(1) or whole(inputs))
    tower.features(layout, prompt).sum().backward()
    assert len(counted) == parts * each


@torch.no_grad()
def test_what_follows_the_end_token_is_dropped_only_where_nothing_sees_it(base_of: Any) -> None:
    for name, causal in (("clip", True), ("siglip", False), ("starter", False)):
        base = base_of(name)
        tower = PromptTower(base)
        assert tower.causal == causal
        prompt = tower.embedded(INIT)
        layout = tower.layout(NAMES, prompt=len(prompt))
        assert int(layout.end_at.max()) + 1 == layout.length or name == "siglip"
        # The same text with padding behind it, all of it visible.
        wide = {
            "input_ids": torch.nn.functional.pad(
                layout.inputs["input_ids"], (0, 3), value=layout.inputs["input_ids"][0, -1]
            )
        }
        if name == "siglip":
            wide = {"input_ids": layout.inputs["input_ids"][:, : int(layout.end_at.max()) + 1]}
        difference = (
            (base.token_features(wide) - base.token_features({"input_ids": layout.inputs["input_ids"]})).abs().max()
        )
        assert (difference < 1e-5) == causal


def test_names_that_do_not_fit_are_named(base_of: Any) -> None:
    tower = PromptTower(base_of("clip"))
    with pytest.raises(DataError, match=r"class name 'long long.* tokens, but beside 4 learned ones .* room for \d+"):
        tower.layout(["cat", "long " * 30], prompt=4)
    with pytest.raises(DataError, match="room for 0"):
        tower.layout(["cat"], prompt=999)


@given(st.integers(1, 1 << 34), st.integers(1, 300), st.integers(1, 2048), st.integers(0, 48))
def test_rows_fit_into_memory(memory: int, tokens: int, width: int, layers: int) -> None:
    rows = rows_per_pass(memory, tokens, width, layers)
    each = 4 * prompting._FLOATS_PER_TOKEN * tokens * width * max(1, layers)
    assert rows == 1 or rows * each <= memory
    assert (rows + 1) * each > memory


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_patch_tokens_of_every_family(name: str, base_of: Any, pictures: list[Image.Image]) -> None:
    base = base_of(name)
    pixels = inputs_of(base, "image", pictures)
    found = image_tokens(base, pixels)
    close(found.features, base.pixel_features(pixels), 1e-6)
    assert found.tokens.shape[0] == 5
    assert found.tokens.shape[1] == {
        "starter": 49,
        "clip-resnet": 4,
        "siglip": 16,
        "siglip2": 16,
        "dinov2-registers+bert": 19,
    }.get(name, 17)
    assert (found.mask is not None) == (name == "siglip2")
    if found.mask is not None:
        assert found.mask.shape == found.tokens.shape[:2]
        assert not found.mask.all()
    alone = image_tokens(base, {key: one[1:2] for key, one in pixels.items()})
    close(found.tokens[1:2], alone.tokens)


def test_towers_without_patches_are_refused(base_of: Any, pictures: list[Image.Image], monkeypatch: Any) -> None:
    base = base_of("clip")
    pixels = inputs_of(base, "image", pictures)

    class Pooled:
        last_hidden_state = torch.zeros(5, 16)

    tower = prompting.tower_module(base, "image")
    monkeypatch.setattr(tower, "forward", lambda *_, **__: Pooled())
    monkeypatch.setattr(base, "pixel_features", lambda pixels: tower(pixels) and None)
    with pytest.raises(
        RecipeError, match=r"no patch tokens \(it gives states of shape \(5, 16\)\).*set prompt.instance to null"
    ):
        image_tokens(base, pixels)


def test_unknown_towers_are_refused(
    base_of: Any, pictures: list[Image.Image], monkeypatch: Any, tmp_path: Path
) -> None:
    base = base_of("clip")
    monkeypatch.setattr(prompting, "tower_module", lambda *_: (_ for _ in ()).throw(prompting.ModelError("not known")))
    with pytest.raises(RecipeError, match=r"no patch tokens \(not known\)"):
        image_tokens(base, inputs_of(base, "image", pictures))
