from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tiny_models
import trimtab
from tiny_models import randomised
from tiny_towers import BUILDERS, TEXTS, TOWERS, features_of, inputs_of
from trimtab.adapters.domain import DomainAdapted, DomainAdapters, save_domain
from trimtab.adapters.files import read_adapter
from trimtab.adapters.gate import DomainGate
from trimtab.adapters.kinds import KINDS, ConvBottleneck, PictureNorm
from trimtab.config import DomainAdapterConfig, from_mapping, to_mapping
from trimtab.errors import ModelError, RecipeError, TrimtabError
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.hf import load_base
from trimtab.towers.layers import Site, TowerCut, TowerName, lowest_site, refuse_wrong_cut, sites
from trimtab.towers.states_below import StatesBelow

Load = Callable[[str], DualEncoder]

CASES = [
    (name, tower, kind)
    for name, tower in TOWERS
    for kind in ("bottleneck", "transformer")
    if (name, tower) != ("clip-resnet", "image")
]
CASES += [("starter", "image", "conv"), ("clip-resnet", "image", "conv")]


def group(tower: str, kind: str = "bottleneck", **changes: Any) -> DomainAdapterConfig:
    options: dict[str, Any] = {"width": 4, **({"heads": 2, "layers": 2} if kind == "transformer" else {})}
    return DomainAdapterConfig(tower, kind, **{**options, **changes})  # type: ignore[arg-type]


def make(base: DualEncoder, *groups: DomainAdapterConfig, random: bool = True, seed: int = 0) -> DomainAdapters:
    torch.manual_seed(seed)
    adapters = DomainAdapters(base, groups)
    return randomised(adapters, seed) if random else adapters  # type: ignore[return-value]


def hooks_of(base: DualEncoder) -> list[Any]:
    return [
        hook
        for module in base.model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.items()
    ]


# The contract of every kind, on every tower


@pytest.mark.parametrize(("name", "tower", "kind"), CASES)
def test_the_contract(name: str, tower: TowerName, kind: str, base_of: Load, two: list[Image.Image]) -> None:
    base = base_of(name)
    inputs = inputs_of(base, tower, two[:1] if name == "starter" else two)
    hooks, weights = hooks_of(base), {key: value.clone() for key, value in base.model.state_dict().items()}
    with torch.no_grad():
        plain = features_of(base, tower, inputs)
    adapters = make(base, group(tower, kind), random=False)

    # the identity at the start, and the base itself at alpha = 0
    with torch.no_grad(), adapters.attach(base):
        torch.testing.assert_close(features_of(base, tower, inputs), plain, atol=1e-6, rtol=0)
    randomised(adapters)
    with torch.no_grad(), adapters.attach(base):
        adapted = features_of(base, tower, inputs)
        adapters.alpha = 0
        assert torch.equal(features_of(base, tower, inputs), plain)
        adapters.alpha = 1
        assert torch.equal(features_of(base, tower, inputs), adapted)
    assert (adapted - plain).norm() > 1e-2 * plain.norm()

    # gradients reach every adapter and nothing of the base
    with adapters.attach(base):
        features_of(base, tower, inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())
    assert all(parameter.grad is None for parameter in base.model.parameters())
    for site, adapter in adapters.placed():
        assert sum(parameter.grad.abs().sum() for parameter in adapter.parameters()) > 0, site  # type: ignore[union-attr]

    # the base is restored
    with torch.no_grad():
        assert torch.equal(features_of(base, tower, inputs), plain)
    assert hooks_of(base) == hooks
    assert all(torch.equal(value, weights[key]) for key, value in base.model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize(("name", "tower", "kind"), CASES)
def test_every_cut_with_adapters(name: str, tower: TowerName, kind: str, base_of: Load, two: list[Image.Image]) -> None:
    """The states below the lowest adapter, computed without any, give the features of the whole adapted tower."""
    base = base_of(name)
    inputs = inputs_of(base, tower, two[:1] if name == "starter" else two)
    found = [*sites(base, tower, KINDS[kind][0])]
    if name == "starter" and kind == "conv":
        found = [found[0], found[9], found[-1]]
    for site in found:
        adapters = make(base, group(tower, kind, first=site.index))
        assert lowest_site(adapters, tower) == site
        cut = TowerCut(base, tower, site)
        below = cut.lower(inputs)
        with adapters.attach(base):
            expected = features_of(base, tower, inputs)
            upper = cut.upper(below, inputs if tower == "text" else None)
        torch.testing.assert_close(upper, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(cut.upper(below, inputs if tower == "text" else None), expected, atol=1e-5)
        refuse_wrong_cut(cut, adapters)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bottleneck", "transformer"])
@pytest.mark.parametrize("name", BUILDERS)
def test_padding_does_not_matter(name: str, kind: str, base_of: Load) -> None:
    base = base_of(name)
    adapters = make(base, group("text", kind))
    cut = TowerCut(base, "text", sites(base, "text", "layers")[0])
    states = cut.lower(base.text_inputs(TEXTS))["states"]
    with adapters.attach(base):
        together = base.token_features(base.text_inputs(TEXTS))
        for i, text in enumerate(TEXTS):
            alone = base.text_inputs([text])
            torch.testing.assert_close(base.token_features(alone)[0], together[i], atol=1e-5, rtol=1e-5)
            cached = {"states": states[i : i + 1, : alone["input_ids"].shape[1]]}
            torch.testing.assert_close(cut.upper(cached, alone)[0], together[i], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padded_patches_do_not_matter(base_of: Load, two: list[Image.Image]) -> None:
    """SigLIP 2 pads narrow pictures; what the padding holds must not reach a transformer adapter."""
    base = base_of("siglip2")
    adapters = make(base, group("image", "transformer"))
    inputs = inputs_of(base, "image", two)
    padding = inputs["pixel_attention_mask"] == 0
    assert padding.any()
    other = {**inputs, "pixel_values": inputs["pixel_values"].masked_fill(padding[..., None], 5.0)}
    with adapters.attach(base):
        torch.testing.assert_close(base.pixel_features(other), base.pixel_features(inputs), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_mask_reaches_adapters_under_every_kernel(attention: str, base_of: Load) -> None:
    base = base_of("chinese_clip")
    adapters = make(base, group("text", "transformer"))
    with adapters.attach(base):
        expected = base.token_features(base.text_inputs(TEXTS))
        before = base.model.config._attn_implementation
        base.model.set_attn_implementation(attention)
        try:
            found = [base.token_features(base.text_inputs([text]))[0] for text in TEXTS]
        finally:
            base.model.set_attn_implementation(before)
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "vit+clip-text"])
def test_adapters_of_causal_towers_are_causal(name: str, base_of: Load) -> None:
    base = base_of(name)
    adapters = make(base, group("text", "transformer"))
    rows: list[Tensor] = []
    last = sites(base, "text", "layers")[-1]
    inputs = base.text_inputs(TEXTS)
    changed = {key: value.clone() for key, value in inputs.items()}
    changed["input_ids"][:, 2] = 5
    with adapters.attach(base):
        handle = base.model.get_submodule(last.path).register_forward_hook(lambda _, __, out: rows.append(out))
        base.token_features(inputs)
        base.token_features(changed)
        handle.remove()
    assert torch.equal(rows[0][:, :2], rows[1][:, :2])
    assert not torch.equal(rows[0][:, 2:], rows[1][:, 2:])


@torch.no_grad()
def test_padding_at_the_start_is_no_nan(base_of: Load) -> None:
    adapter: Any = make(base_of("clip"), group("text", "transformer")).placed()[0][1]
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    states = torch.randn(2, 4, 16)
    found = adapter(states, mask)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, 2:], adapter(states[:1, 2:])[0], atol=1e-6, rtol=1e-5)


# Precision


@torch.no_grad()
@pytest.mark.parametrize(("name", "tower", "kind"), [("clip", "text", "transformer"), ("starter", "image", "conv")])
def test_other_precisions(name: str, tower: TowerName, kind: str, base_of: Load, two: list[Image.Image]) -> None:
    base = base_of(name)
    adapters = make(base, group(tower, kind, first=-2))
    inputs = inputs_of(base, tower, two[:1])
    with adapters.attach(base):
        expected = features_of(base, tower, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = features_of(base, tower, inputs)
        assert (found - expected).norm() < 0.15 * expected.norm()
    narrow = load_base(base.name, device="cpu", dtype="bfloat16")
    with adapters.attach(narrow):
        found = features_of(narrow, tower, inputs)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.2 * expected.norm()


# Places


def test_groups_choose_layers_from_both_ends(base_of: Load) -> None:
    base = base_of("starter")
    adapters = make(base, group("image", "conv", first=-3), group("image", first=1, last=1), group("text", last=0))
    assert list(adapters.adapters) == [
        *("image_blocks_14_conv", "image_blocks_15_conv", "image_blocks_16_conv"),
        *("image_layers_1_bottleneck", "text_layers_0_bottleneck"),
    ]
    assert [str(site) for site, _ in adapters.placed()][2:] == ["image.blocks.16", "image.layers.1", "text.layers.0"]
    assert str(lowest_site(adapters, "image")) == "image.blocks.14"
    assert str(lowest_site(adapters, "text")) == "text.layers.0"
    assert lowest_site(make(base, group("text")), "image") is None
    assert adapters.trained_parameters == sum(value.numel() for value in adapters.state_dict().values())
    assert "adapters.image_blocks_14_conv.depthwise.weight" in adapters.state_dict()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "give at least one group"),
        ([group("image", last=0), group("image")], r"two groups with kind=bottleneck claim image\.layers\.0"),
        ([group("image", first=2)], r"first=2, last=-1 is no range of the 2 layers of the image tower of .*0 to 1"),
        ([group("text", first=-3)], "or -2 to -1 from the end"),
        ([group("text", first=1, last=-2)], "first=1, last=-2 is no range"),
        ([group("image", "conv")], "has no convolutional blocks; it has 2 Transformer layers"),
    ],
)
def test_impossible_places_are_refused(groups: list[DomainAdapterConfig], message: str, base_of: Load) -> None:
    with pytest.raises(RecipeError, match=message):
        DomainAdapters(base_of("clip"), groups)


def test_two_kinds_may_share_a_layer(base_of: Load, two: list[Image.Image]) -> None:
    base = base_of("clip")
    inputs = inputs_of(base, "image", two)
    both = make(base, group("image", first=-1), group("image", "transformer", first=-1))
    with torch.no_grad():
        plain = base.pixel_features(inputs)
        with both.attach(base):
            found = base.pixel_features(inputs)
    assert len(both.placed()) == 2
    assert not torch.allclose(found, plain, atol=1e-3)


def test_the_conv_adapter_lies_on_the_grid_of_its_block(base_of: Load) -> None:
    """The padding is that of the trunk, so a spot in the map stays at its place through a strided block."""
    for site in sites(base_of("starter"), "image", "blocks"):
        adapter = ConvBottleneck(group("image", "conv"), site)
        for side in (7, 8):
            found = adapter(torch.randn(1, site.width_in, side, side))
            assert found.shape == (1, site.width_out, -(-side // site.stride), -(-side // site.stride))
    strided = next(site for site in sites(base_of("starter"), "image", "blocks") if site.stride == 2)
    block: Any = copy.deepcopy(base_of("starter").model.get_submodule(strided.path))
    conv = ConvBottleneck(group("image", "conv"), strided).depthwise
    for layer in (conv, block.depthwise[0]):
        nn.init.ones_(layer.weight)
    spot = torch.zeros(1, 1, 8, 8)
    spot[..., 3, 3] = 1
    ours = conv(spot.expand(1, conv.in_channels, 8, 8)) - conv.bias[:, None, None]
    theirs = block.depthwise[0](spot.expand(1, block.depthwise[0].in_channels, 8, 8))
    assert torch.equal(ours[0, 0] > 0.5, theirs[0, 0] > 0.5)


# Attaching


@torch.no_grad()
def test_several_sets_on_one_base(base_of: Load, two: list[Image.Image]) -> None:
    base = base_of("clip")
    first, second = make(base, group("image", last=0)), make(base, group("image", last=0), seed=1)
    inputs = inputs_of(base, "image", two)
    layer = base.model.get_submodule(sites(base, "image", "layers")[0].path)
    outputs: list[Tensor] = []

    def run() -> Tensor:
        handle = layer.register_forward_hook(lambda _, __, out: outputs.append(out))
        base.pixel_features(inputs)
        handle.remove()
        return outputs[-1]

    plain = run()
    with first.attach(base):
        one = run()
    with second.attach(base):
        other = run()
        with first.attach(base):
            both = run()
        assert torch.equal(run(), other)  # the order of leaving does not matter
    torch.testing.assert_close(both, one + other - plain)
    assert torch.equal(run(), plain)


def test_attaching_twice_or_to_another_base_is_refused(base_of: Load) -> None:
    adapters = make(base_of("clip"), group("image"))
    adapters.attach(base_of("clip"))
    try:
        with pytest.raises(ModelError, match=r"attached to .*clip already: detach them first"):
            adapters.attach(base_of("clip"))
    finally:
        adapters.detach()
    adapters.detach()
    with pytest.raises(ModelError, match=r"do not fit .*roberta: its image\.layers\.0 is not that of their own base"):
        make(base_of("starter"), group("image")).attach(base_of("clip+roberta"))
    assert not hooks_of(base_of("clip+roberta"))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alpha_must_be_finite(alpha: float, base_of: Load) -> None:
    adapters = make(base_of("clip"), group("image"))
    with adapters.attach(base_of("clip")):
        with pytest.raises(RecipeError, match="must be a finite number"):
            adapters.alpha = alpha
        assert len(hooks_of(base_of("clip"))) == 3
    assert adapters.alpha == 1


@torch.no_grad()
def test_an_error_in_a_pass_leaves_nothing_behind(base_of: Load) -> None:
    base = base_of("clip")
    adapters = make(base, group("image"))
    with pytest.raises(Exception, match=r".+"), adapters.attach(base):
        base.pixel_features({"pixel_values": torch.zeros(1, 3, 5, 5)})
    assert not hooks_of(base)
    with adapters.attach(base):
        pass


# Wrong cuts


def test_adapters_below_a_cut_are_refused(base_of: Load) -> None:
    base = base_of("starter")
    layers, blocks = sites(base, "image", "layers"), sites(base, "image", "blocks")
    high = make(base, group("image", first=1))
    conv = make(base, group("image", "conv", first=16))
    refuse_wrong_cut(TowerCut(base, "image", layers[1]), high)
    refuse_wrong_cut(TowerCut(base, "image", blocks[16]), nn.ModuleList([high, conv]))
    refuse_wrong_cut(TowerCut(base, "text", None), [high, conv])
    wrong: list[tuple[Site | None, str]] = [(layers[0], r"adapter at image\.blocks\.16"), (None, r"image\.layers\.1")]
    for site, message in wrong:
        with pytest.raises(RecipeError, match=message):
            refuse_wrong_cut(TowerCut(base, "image", site), nn.ModuleDict({"a": nn.ModuleList([high, conv])}))
    high.requires_grad_(False)
    refuse_wrong_cut(TowerCut(base, "image", None), high)


# As one object


@pytest.fixture
def adapted(base_of: Load) -> DomainAdapted:
    base = base_of("clip")
    return DomainAdapted(base, make(base, group("image"), group("text", "transformer")), logit_scale=25.0)


def test_base_and_adapted_side_by_side(adapted: DomainAdapted, two: list[Image.Image]) -> None:
    base = adapted.base
    images, texts = base.encode_image(two), base.encode_text(TEXTS)
    assert np.abs(adapted.encode_image(two) - images).max() > 1e-2
    assert np.abs(adapted.encode_text(TEXTS) - texts).max() > 1e-2
    assert np.array_equal(base.encode_image(two), images)
    assert np.array_equal(base.encode_text(TEXTS), texts)
    with adapted.adapters.attach(base):
        expected = base.encode_text(TEXTS)
    assert np.array_equal(adapted.encode_text(TEXTS), expected)
    assert adapted.similarity(two, TEXTS).shape == (2, 4)
    assert adapted.logit_scale == 25
    assert base.logit_scale != 25
    assert DomainAdapted(base, adapted.adapters).logit_scale == base.logit_scale


@pytest.mark.parametrize("name", ["clip", "starter"])
def test_the_dial(name: str, base_of: Load, two: list[Image.Image]) -> None:
    """At alpha = 0 nothing differs in a single bit, under `inference_mode` with its own kernels too."""
    base = base_of(name)
    adapted = DomainAdapted(base, make(base, group("image"), group("text", "transformer")))
    full, digest = adapted.encode_image(two), adapted.fingerprint
    adapted.alpha = 0
    assert np.array_equal(adapted.encode_image(two), base.encode_image(two))
    assert np.array_equal(adapted.encode_text(TEXTS), base.encode_text(TEXTS))
    assert adapted.fingerprint not in (digest, base.fingerprint)
    adapted.alpha = 0.5
    half = adapted.encode_image(two)
    assert not np.array_equal(half, full)
    assert not np.array_equal(half, base.encode_image(two))
    adapted.alpha = 1
    assert np.array_equal(adapted.encode_image(two), full)
    assert adapted.fingerprint == digest


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["clip", "siglip2", "starter"])
def test_what_lies_below_is_passed_once_for_all_models(
    name: str, gated: bool, base_of: Load, two: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(name)
    # A gate that lets the first picture through alone.
    first = base.encode_image(two[:1])
    gate = DomainGate(torch.from_numpy(first), 0.999, 0.9999) if gated else None
    models = [DomainAdapted(base, make(base, group("image", first=-1), seed=seed), gate=gate) for seed in (0, 1)]
    apart = [model.encode_image(two) for model in models]
    passed: list[int] = []
    lower = TowerCut.lower

    def counted(cut: TowerCut, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        passed.append(len(inputs["pixel_values"]))
        return lower(cut, inputs)

    monkeypatch.setattr(TowerCut, "lower", counted)
    shared = StatesBelow()
    for model, expected in zip(models, apart, strict=True):
        model.states_below = shared
        np.testing.assert_allclose(model.encode_image(two), expected, atol=1e-6)
    models[1].alpha = 0.5
    assert not np.array_equal(models[1].encode_image(two), apart[1])
    assert sum(passed) == len(shared) == 2
    models[0].encode_image([*two[1:], two[0].rotate(90)])
    assert (sum(passed), len(shared)) == (3, 3)
    models[0].states_below = twice = StatesBelow()
    models[0].encode_image([two[0], two[0]])
    assert (sum(passed), len(twice)) == (4, 1)  # one pass for a picture that stands twice in a batch
    models[0].states_below = full = StatesBelow(most_bytes=0)
    np.testing.assert_allclose(models[0].encode_image(two), apart[0], atol=1e-6)
    assert len(full) == 0


@torch.no_grad()
def test_threads_wait_for_each_other(adapted: DomainAdapted) -> None:
    tokens = adapted.text_inputs(TEXTS)
    expected = adapted.token_features(tokens)
    results: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            results.extend(adapted.token_features(tokens) for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    assert all(torch.equal(result, expected) for result in results)


def test_fingerprints_tell_weights_and_places_apart(base_of: Load) -> None:
    base = base_of("clip")
    made = [
        DomainAdapted(base, make(base, group("image"))),
        DomainAdapted(base, make(base, group("image"), seed=1)),
        DomainAdapted(base, make(base, group("text"))),
        DomainAdapted(base, make(base, group("image")), logit_scale=2.0),
    ]
    swapped = make(base, group("image"))
    first, second = (adapter.state_dict() for _, adapter in make(base, group("image")).placed())
    for (_, adapter), state in zip(swapped.placed(), (second, first), strict=True):
        adapter.load_state_dict(state)
    made.append(DomainAdapted(base, swapped))
    assert len({one.fingerprint for one in made} | {base.fingerprint}) == 6
    assert DomainAdapted(base, make(base, group("image"))).fingerprint == made[0].fingerprint


def test_the_precision_of_the_base_is_not_part_of_the_fingerprint(base_of: Load) -> None:
    base = base_of("clip")
    narrow = load_base(base.name, device="cpu", dtype="bfloat16")
    assert narrow.logit_scale != base.logit_scale
    for scale in (None, 17.25):
        wide, rounded = (DomainAdapted(one, make(one, group("image")), logit_scale=scale) for one in (base, narrow))
        assert wide.fingerprint == rounded.fingerprint


def test_adapters_stay_frozen_in_a_finished_model(adapted: DomainAdapted) -> None:
    assert not any(parameter.requires_grad for parameter in adapted.adapters.parameters())
    assert adapted.to("cpu") is adapted


# Files


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("clip", [group("image"), group("text", "transformer", first=-1)]),
        ("starter", [group("image", "conv", first=-2), group("image"), group("text")]),
        ("clip-resnet", [group("image", "conv", first=-2), group("text")]),
        ("siglip2", [group("image", "transformer")]),
        ("flava", [group("text", "transformer"), group("image")]),
    ],
)
def test_saved_and_loaded_is_exact(
    name: str, groups: list[DomainAdapterConfig], base_of: Load, two: list[Image.Image], tmp_path: Path
) -> None:
    base = base_of(name)
    adapters = make(base, *groups)
    model = DomainAdapted(base, adapters, logit_scale=17.25)
    folder = save_domain(tmp_path / "a", adapters, base=base, logit_scale=17.25, metrics={"top1": 61.5}, card="# c\n")
    by_name, shared = trimtab.load(folder, device="cpu"), trimtab.load(folder, base=base)
    for again in (by_name, shared):
        assert isinstance(again, DomainAdapted)
        assert again.adapters.groups == tuple(groups)
        assert again.fingerprint == model.fingerprint
        assert again.logit_scale == 17.25
        assert np.array_equal(again.encode_image(two), model.encode_image(two))
        assert np.array_equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    assert shared.base is base
    assert read_adapter(folder).link == "domain"
    small = sum(path.stat().st_size for path in folder.iterdir())
    assert small < 4 * adapters.trained_parameters + 40_000


def test_without_a_trained_logit_scale_the_base_keeps_its_own(base_of: Load, tmp_path: Path) -> None:
    base = base_of("clip")
    folder = save_domain(tmp_path / "a", make(base, group("image")), base=base)
    assert trimtab.load(folder, base=base).logit_scale == base.logit_scale


def test_an_option_of_a_newer_version_asks_for_an_upgrade(base_of: Load, tmp_path: Path) -> None:
    base = base_of("clip")
    path = save_domain(tmp_path / "d", make(base, group("image")), base=base) / "adapter.json"
    about = json.loads(path.read_text())
    about["config"]["adapters"][0]["later"] = 1
    path.write_text(json.dumps({**about, "versions": {"trimtab": "9.9"}}))
    with pytest.raises(ModelError, match=r"'later'.* written by trimtab 9\.9: upgrade"):
        trimtab.load(tmp_path / "d", base=base)


def test_saving_again_keeps_the_dial(base_of: Load, tmp_path: Path) -> None:
    base = base_of("clip")
    folder = save_domain(tmp_path / "a", make(base, group("image")), base=base, card="# 卡\n")
    (folder / "notes.txt").write_text("private")
    model = trimtab.load(folder, base=base)
    copy = model.save_pretrained(tmp_path / "copy")
    assert {path.name for path in copy.iterdir()} == {"adapter.json", "adapter.safetensors", "README.md"}
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in copy.iterdir())
    model.alpha = 0.5
    turned = trimtab.load(model.save_pretrained(tmp_path / "turned"), base=base)
    assert turned.alpha == 0.5
    assert turned.fingerprint == model.fingerprint
    with pytest.raises(TrimtabError, match="was never saved"):
        DomainAdapted(base, make(base, group("image"))).save_pretrained(tmp_path / "b")


def test_another_base_is_refused(base_of: Load, tmp_path: Path) -> None:
    folder = save_domain(tmp_path / "a", make(base_of("clip"), group("image")), base=base_of("clip"))
    twin = tiny_models.build_clip(tmp_path / "twin", seed=1)  # the same sizes, other weights
    for other in (twin, base_of("siglip"), trimtab.load(folder, base=base_of("clip"))):
        with pytest.raises(ModelError, match="was trained on the base"):
            trimtab.load(folder, base=other, device="cpu")
    with pytest.raises(ModelError, match="no language link"):
        trimtab.load(folder, base=base_of("clip"), student="bert")


def test_damaged_descriptions_are_refused(base_of: Load, tmp_path: Path) -> None:
    base = base_of("clip")
    folder = save_domain(tmp_path / "a", make(base, group("image")), base=base, logit_scale=2.0)
    path = folder / "adapter.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    one = whole["config"]["adapters"][0]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"alpha": 1.0}, "lacks config 'adapters'"),
        ({"adapters": [one]}, "lacks config 'alpha'"),
        ({"adapters": [one], "alpha": None}, "has a wrong value"),
        ({"adapters": 3, "alpha": 1.0}, "has a wrong value"),
        ({"adapters": [], "alpha": 1.0}, "at least one group"),
        ({"adapters": [{**one, "depth": 1}], "alpha": 1.0}, "depth"),
        ({"adapters": [{**one, "width": 5}], "alpha": 1.0}, "does not fit the domain adapter"),
        ({"adapters": [{**one, "width": 10**13}], "alpha": 1.0}, "does not fit the domain adapter|wrong size"),
        ({"adapters": [{**one, "width": 10**30}], "alpha": 1.0}, "wrong size"),
        ({"adapters": [{**one, "last": 9}], "alpha": 1.0}, "is no range of the 2 layers"),
    ]
    for config, message in cases:
        path.write_text(json.dumps({**whole, "config": config}), encoding="utf-8")
        with pytest.raises(TrimtabError, match=message):
            trimtab.load(folder, base=base)
    for scale in (-1.0, 0.0):
        folder = save_domain(tmp_path / "b", make(base, group("image")), base=base, logit_scale=scale)
        with pytest.raises(ModelError, match="logit_scale that is no number above 0"):
            trimtab.load(folder, base=base)


# The configuration


def test_a_configuration_survives_writing() -> None:
    for config in (group("image", "conv", first=-4), group("text", "transformer", layers=1)):
        assert from_mapping(DomainAdapterConfig, to_mapping(config), "x") == config
    assert from_mapping(DomainAdapterConfig, {"tower": "text"}, "x").kind == "bottleneck"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "tower"),
        ({"tower": "audio"}, "tower"),
        ({"tower": "image", "kind": "lora"}, "kind"),
        ({"tower": "image", "width": 0}, "width=0 must be at least 1"),
        ({"tower": "image", "first": 3, "last": 1}, "last=1 must be at or after first=3"),
        ({"tower": "image", "first": -1, "last": -2}, "last=-2 must be at or after first=-1"),
        ({"tower": "image", "kind": "transformer", "layers": 3}, "layers=3 must be 1 or 2"),
        ({"tower": "image", "kind": "transformer", "layers": 0}, "layers=0 must be 1 or 2"),
        ({"tower": "image", "kind": "transformer", "heads": 0}, "heads=0 must be at least 1"),
        ({"tower": "image", "kind": "transformer", "width": 30}, "width=30 must be a multiple of heads=4"),
        ({"tower": "image", "layers": 2}, "layers=2 must be left out: only kind=transformer has it"),
        ({"tower": "image", "kind": "conv", "heads": 2}, "heads=2 must be left out"),
        ({"tower": "text", "kind": "conv"}, "tower='text' must be image for kind=conv"),
    ],
)
def test_impossible_configurations_are_refused(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        from_mapping(DomainAdapterConfig, mapping, "recipe.yaml")


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_norm_of_a_picture_in_any_memory_layout(layout: torch.memory_format, needs_gradient: bool) -> None:
    norm = PictureNorm(1, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    maps = torch.randn(3, 6, 5, 4)
    x = maps.contiguous(memory_format=layout).requires_grad_(needs_gradient)
    found = norm(x)
    expected = torch.nn.functional.group_norm(maps, 1, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert norm.weight.grad is not None
    assert found.is_contiguous(memory_format=layout)
