from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tiny_towers import BUILDERS, TEXTS, TOWERS, features_of, inputs_of
from trimtab.errors import ModelError, RecipeError
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.hf import FAMILIES, load_base
from trimtab.towers.layers import (
    LAYOUTS,
    PartName,
    Site,
    TowerCut,
    TowerName,
    padding_mask,
    refuse_wrong_cut,
    sites,
    tower_module,
)

Load = Callable[[str], DualEncoder]


def all_sites(base: DualEncoder, tower: TowerName) -> list[Site]:
    return [site for part in parts_of(base, tower) for site in sites(base, tower, part)]


def parts_of(base: DualEncoder, tower: TowerName) -> list[PartName]:
    """What sites it has, from the lowest."""
    if tower == "image" and base.name.endswith("clip-resnet"):
        return ["blocks"]
    return ["blocks", "layers"] if tower == "image" and base.name.endswith("starter") else ["layers"]


def watch(base: DualEncoder, found: list[Site]) -> tuple[list[tuple[str, Tensor, Tensor]], list[Any]]:
    """A list that fills with (path, states in, states out) of the sites that run, and the hooks that fill it."""
    ran: list[tuple[str, Tensor, Tensor]] = []

    def note(path: str, args: Any, output: Any) -> None:
        ran.append((path, args[0], output[0] if isinstance(output, tuple) else output))

    return ran, [
        base.model.get_submodule(site.path).register_forward_hook(
            lambda _, args, output, path=site.path: note(path, args, output)
        )
        for site in found
    ]


# The tables


def test_every_family_has_both_towers_known(base_of: Load) -> None:
    assert set(FAMILIES) <= set(BUILDERS)
    kinds = {tower_module(base_of(name), tower).config.model_type for name, tower in TOWERS}
    assert kinds == set(LAYOUTS)


@torch.no_grad()
@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_sites_are_what_runs_and_as_wide_as_they_say(
    name: str, tower: TowerName, base_of: Load, two: list[Image.Image]
) -> None:
    base = base_of(name)
    for part in parts_of(base, tower):
        found = sites(base, tower, part)
        ran, handles = watch(base, found)
        features_of(base, tower, inputs_of(base, tower, two))
        for handle in handles:
            handle.remove()
        assert [path for path, _, _ in ran] == [site.path for site in found]
        assert [site.index for site in found] == list(range(len(found)))
        for site, (_, entered, left) in zip(found, ran, strict=True):
            axis = 1 if part == "blocks" else 2
            assert entered.shape[axis] == site.width_in, site
            assert left.shape[axis] == site.width_out, site
            assert entered.shape[-2] == left.shape[-2] * site.stride, site
        for (_, _, left), (_, entered, _) in pairwise(ran):
            assert torch.equal(left, entered)  # nothing lies between
    config = tower_module(base, tower).config
    if (name, tower) == ("clip-resnet", "image"):
        assert len(sites(base, tower, "blocks")) == sum(config.depths)
    elif name != "starter":
        assert len(sites(base, tower, "layers")) == config.num_hidden_layers


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDERS)
def test_causal_towers_are_known_as_such(name: str, base_of: Load) -> None:
    base = base_of(name)
    found = sites(base, "text", "layers")
    inputs = inputs_of(base, "text", [])
    other = {key: value.clone() for key, value in inputs.items()}
    other["input_ids"][:, 2] = 3
    ran, (handle,) = watch(base, found[:1])
    base.token_features(inputs)
    base.token_features(other)
    handle.remove()
    first_tokens = [left[:, 0] for _, _, left in ran]
    assert all(site.causal == torch.equal(*first_tokens) for site in found)


def test_a_part_that_a_tower_lacks_is_told(base_of: Load) -> None:
    with pytest.raises(
        RecipeError, match=r"\(clip_vision_model\) has no convolutional blocks; it has 2 Transformer.*domain-clip"
    ):
        sites(base_of("clip"), "image", "blocks")
    with pytest.raises(RecipeError, match=r"text tower .*\(trimtab_sentence_bert\) has no convolutional blocks"):
        sites(base_of("starter"), "text", "blocks")
    with pytest.raises(
        RecipeError, match=r"\(trimtab_clip_resnet\) has no Transformer layers; it has 6 convolutional.*kind=conv"
    ):
        sites(base_of("clip-resnet"), "image", "layers")


def test_unknown_towers_are_told(base_of: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LAYOUTS, "vit")
    with pytest.raises(ModelError, match=r"layers of the image tower .* not known \(its kind is 'vit'\).*clip_vision"):
        sites(base_of("vision-text-dual-encoder"), "image", "layers")
    monkeypatch.delattr(base_of("vision-text-dual-encoder").model.vision_model, "config")
    with pytest.raises(ModelError, match="its kind is 'unknown'"):
        sites(base_of("vision-text-dual-encoder"), "image", "layers")


def test_features_are_cached_of_towers_of_any_kind(
    base_of: Load, two: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("vision-text-dual-encoder")
    monkeypatch.delitem(LAYOUTS, "vit")
    cut = TowerCut(base, "image", None)
    inputs = inputs_of(base, "image", two)
    assert torch.equal(cut.upper(cut.lower(inputs)), base.pixel_features(inputs))
    monkeypatch.setattr("trimtab.towers.layers._TOWERS", {"image": ("eye",)})
    monkeypatch.setattr("trimtab.towers.layers.PROJECTIONS", {"image": ()})
    assert set(cut.paths_below()) == {"vision_model", "text_model", "visual_projection", "text_projection"}


def test_sites_know_their_order(base_of: Load) -> None:
    found = all_sites(base_of("starter"), "image")
    assert [str(found[0]), str(found[16]), str(found[-1])] == ["image.blocks.0", "image.blocks.16", "image.layers.1"]
    assert found[16].path == "vision_model.trunk.head"
    for lower, upper in pairwise(found):
        assert lower.is_below(upper)
        assert not upper.is_below(lower)
    assert not found[0].is_below(found[0])


# The mask


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_the_mask_is_found_whatever_the_kernel(
    name: str, tower: TowerName, attention: str, base_of: Load, two: list[Image.Image]
) -> None:
    base = base_of(name)
    if name == "starter" and tower == "image":
        pytest.skip("no masks and no choice of kernels")
    inputs = inputs_of(base, tower, two)
    seen: list[Tensor | None] = []
    handle = tower_module(base, tower).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(padding_mask(module, args, kwargs)), with_kwargs=True
    )
    model: Any = tower_module(base, tower)
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    features_of(base, tower, inputs)
    model.set_attn_implementation(before)
    handle.remove()
    expected = inputs.get("attention_mask", inputs.get("pixel_attention_mask"))
    assert seen == [None] if expected is None else torch.equal(seen[0], expected)  # type: ignore[arg-type]


def test_a_mask_given_by_position() -> None:
    class Tower(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
            return input_ids

    mask = torch.ones(1, 2)
    assert padding_mask(Tower(), (mask, mask), {"return_dict": True}) is mask
    assert padding_mask(Tower(), (mask,), {}) is None


# Cuts


@torch.no_grad()
@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_both_halves_make_the_whole(name: str, tower: TowerName, base_of: Load, two: list[Image.Image]) -> None:
    base = base_of(name)
    pictures = two[:1] if name == "starter" else two
    inputs = inputs_of(base, tower, pictures)
    expected = features_of(base, tower, inputs)
    for site in [*all_sites(base, tower), None]:
        cut = TowerCut(base, tower, site)
        below = cut.lower(inputs)
        assert all(len(tensor) == len(expected) for tensor in below.values())
        found = cut.upper(below, inputs if tower == "text" else None)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=f"{site}")


def packed(cut: TowerCut, texts: list[str]) -> list[Tensor]:
    """Token states of each text, without padding, as a cache holds them."""
    inputs = cut.base.text_inputs(texts)
    states = cut.lower(inputs)["states"]
    return [row[keep] for row, keep in zip(states, cut.token_mask(inputs), strict=True)]


def padded(cut: TowerCut, rows: list[Tensor], texts: list[str], value: float) -> dict[str, Tensor]:
    mask = cut.token_mask(cut.base.text_inputs(texts))
    states = torch.full((*mask.shape, rows[0].shape[-1]), value)
    states[mask] = torch.cat(rows)
    return {"states": states}


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDERS)
def test_company_and_padding_of_cached_texts_do_not_matter(name: str, base_of: Load) -> None:
    base = base_of(name)
    expected = base.token_features(base.text_inputs(TEXTS))
    for site in sites(base, "text", "layers"):
        cut = TowerCut(base, "text", site)
        alone = [packed(cut, [text])[0] for text in TEXTS]
        together = packed(cut, TEXTS)
        # Longer and shorter than they were computed at, with any values in the padding.
        for rows, chosen, value in ((alone, [0, 1, 2, 3], 0.0), (together, [0, 2], 3.0), (together, [3], 0.0)):
            texts = [TEXTS[i] for i in chosen]
            below = padded(cut, [rows[i] for i in chosen], texts, value)
            found = cut.upper(below, base.text_inputs(texts))
            torch.testing.assert_close(found, expected[chosen], atol=1e-5, rtol=1e-5)


def test_towers_that_see_their_padding_keep_it(base_of: Load) -> None:
    base = base_of("siglip")
    inputs = base.text_inputs(TEXTS)
    assert TowerCut(base, "text", None).token_mask(inputs).all()
    mask = torch.tensor([[1, 0], [1, 1]])
    given = {"input_ids": torch.ones(2, 2), "attention_mask": mask}
    assert TowerCut(base, "text", None).token_mask(given).all()
    assert torch.equal(TowerCut(base_of("clip"), "text", None).token_mask(given), mask.bool())


def hooks_of(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_only_the_upper_half_runs_and_all_is_put_back(
    name: str, tower: TowerName, base_of: Load, two: list[Image.Image]
) -> None:
    base = base_of(name)
    site = sites(base, tower, parts_of(base, tower)[-1])[1]
    cut = TowerCut(base, tower, site)
    inputs = inputs_of(base, tower, two)
    modules = dict(base.model.named_modules())
    state = {key: (set(module.__dict__), hooks_of(module)) for key, module in modules.items()}
    ran: list[str] = []
    watched = [site.path for site in all_sites(base, tower)]
    watched += [f"{key}" for key in modules if key.endswith(("word_embeddings", "token_embedding", "patch_embedding"))]
    handles = [modules[path].register_forward_hook(lambda *_, path=path: ran.append(path)) for path in watched]
    below = cut.lower(inputs)
    assert not set(ran) & {one.path for one in all_sites(base, tower) if not one.is_below(site)}
    assert not any(tensor.requires_grad for tensor in below.values())
    ran.clear()
    states = {"states": below.pop("states").requires_grad_(), **below}
    features = cut.upper(states, inputs if tower == "text" else None)
    assert ran == [one.path for one in all_sites(base, tower) if not one.is_below(site)]
    features.sum().backward()
    assert states["states"].grad is not None

    with pytest.raises(Exception, match=r".+"):  # states of a wrong width
        cut.upper({key: value[..., :3] for key, value in states.items()}, inputs if tower == "text" else None)
    with pytest.raises(Exception, match=r".+"):
        cut.lower({key: value[:, :0] for key, value in inputs.items()})
    for handle in handles:
        handle.remove()
    again = dict(base.model.named_modules())
    assert list(again) == list(modules)
    assert all(again[key] is modules[key] for key in modules)
    assert {key: (set(module.__dict__), hooks_of(module)) for key, module in again.items()} == state


@pytest.mark.parametrize("tower", ["image", "text"])
def test_states_in_half_precision_and_bfloat16_bases(
    tower: TowerName, tmp_path: Path, base_of: Load, two: list[Image.Image]
) -> None:
    base = base_of("clip")
    inputs = inputs_of(base, tower, two)
    cut = TowerCut(base, tower, sites(base, tower, "layers")[1])
    below = {key: value.half() for key, value in cut.lower(inputs).items()}
    found = cut.upper(below, inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, features_of(base, tower, inputs), atol=2e-2, rtol=1e-2)

    narrow = load_base(base.name, device="cpu", dtype="bfloat16")
    cut = TowerCut(narrow, tower, sites(narrow, tower, "layers")[1])
    assert torch.equal(cut.upper(cut.lower(inputs), inputs), features_of(narrow, tower, inputs))
    with torch.autocast("cpu", torch.bfloat16):
        cut = TowerCut(base, tower, sites(base, tower, "layers")[1])
        assert torch.equal(cut.upper(cut.lower(inputs), inputs), features_of(base, tower, inputs))


def test_states_and_inputs_must_belong_together(base_of: Load) -> None:
    base = base_of("clip")
    cut = TowerCut(base, "text", sites(base, "text", "layers")[0])
    below = cut.lower(base.text_inputs(TEXTS))
    with pytest.raises(ValueError, match=r"text states \(4, \d+, 16\) need the inputs of these texts, padded alike"):
        cut.upper(below, base.text_inputs(TEXTS[:1]))
    with pytest.raises(ValueError, match="need the inputs"):
        cut.upper(below)


def test_sites_of_another_tower_are_refused(base_of: Load) -> None:
    site = sites(base_of("clip"), "image", "layers")[0]
    with pytest.raises(ModelError, match=r"has no image.layers.0 in its text tower"):
        TowerCut(base_of("clip"), "text", site)
    with pytest.raises(ModelError, match=r"starter has no image.layers.0 in its image tower"):
        TowerCut(base_of("starter"), "image", site)
    assert repr(TowerCut(base_of("clip"), "image", site)).endswith("clip', image.layers.0)")
    assert repr(TowerCut(base_of("clip"), "text", None)).endswith("clip', above the text tower)")


def test_features_that_take_another_way_are_told(base_of: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("clip")
    monkeypatch.setattr(base, "token_features", lambda tokens: torch.zeros(1, 12))
    cut = TowerCut(base, "text", sites(base, "text", "layers")[1])
    with pytest.raises(ModelError, match=r"do not pass through text_model.encoder.layers.1"):
        cut.lower(base.text_inputs(TEXTS))


# Refusing stale caches


@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_paths_below_are_what_the_lower_half_depends_on(
    name: str, tower: TowerName, base_of: Load, two: list[Image.Image]
) -> None:
    base = base_of(name)
    inputs = inputs_of(base, tower, two[:1])
    found = all_sites(base, tower)

    def gradients_of(*outputs: Tensor) -> set[str]:
        sum(one.sum() for one in outputs if one.requires_grad).backward()
        reached = {key for key, parameter in base.model.named_parameters() if parameter.grad is not None}
        base.model.zero_grad()
        return reached

    base.model.requires_grad_(True)
    try:
        used = gradients_of(features_of(base, tower, inputs))
        for site in (found[0], found[len(found) // 2], found[-1], None):
            cut = TowerCut(base, tower, site)
            paths = tuple(f"{path}." for path in cut.paths_below())
            below = {key for key in used if f"{key}.".startswith(paths)}
            assert below == gradients_of(*TowerCut.lower.__wrapped__(cut, inputs).values()), site  # type: ignore[attr-defined]
    finally:
        base.model.requires_grad_(False)


def test_the_refusal_names_what_is_trained(base_of: Load) -> None:
    base = base_of("clip")
    layers = sites(base, "image", "layers")
    base.model.get_submodule(layers[0].path).requires_grad_(True)
    try:
        with pytest.raises(RecipeError, match=r"cannot be cached at image\.layers\.1: vision_model.* and \d+ more"):
            refuse_wrong_cut(TowerCut(base, "image", layers[1]))
        with pytest.raises(RecipeError, match=r"cached at its features"):
            refuse_wrong_cut(TowerCut(base, "image", None), nn.Identity())
        refuse_wrong_cut(TowerCut(base, "image", layers[0]), [nn.Identity()])
        refuse_wrong_cut(TowerCut(base, "text", None))
    finally:
        base.model.requires_grad_(False)


def test_what_is_carried_past_a_cut_is_where_the_states_are(base_of: Load, two: list[Image.Image]) -> None:
    base = base_of("siglip2")
    moved: list[str] = []
    original = base._on_device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_on_device", lambda tensors: moved.extend(tensors) or original(tensors))
        below = TowerCut(base, "image", all_sites(base, "image")[-1]).lower(inputs_of(base, "image", two))
    assert "pixel_attention_mask" in below
    assert moved.count("pixel_attention_mask") == 2  # with the pixels, and beside the states
