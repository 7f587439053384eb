from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tiny_models import randomised
from tiny_starter import build_starter
from trimtab.adapters.adapted import load
from trimtab.adapters.domain import DomainAdapted, DomainAdapters, save_domain
from trimtab.adapters.files import read_adapter
from trimtab.adapters.gate import DomainGate, Gated, closeness, fit_gate, mixed
from trimtab.config import DomainAdapterConfig, GateConfig
from trimtab.errors import ModelError
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.hf import load_base
from trimtab.towers.prompting import image_tokens

FAMILIES = ["vision-text-dual-encoder", "siglip2", "flava"]


def around(direction: int, count: int, spread: float = 0.1, seed: int = 0) -> torch.Tensor:
    """Rows (count, 8) near one axis."""
    generator = torch.Generator().manual_seed(seed)
    rows = spread * torch.randn(count, 8, generator=generator)
    rows[:, direction] += 1
    return rows


@pytest.fixture
def base(tiny_folder: Callable[[str], Path]) -> DualEncoder:
    return load_base(str(tiny_folder("vision-text-dual-encoder")), device="cpu")


def pixels_of(base: DualEncoder, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    each = [base.preprocess(picture) for picture in pictures]
    return {name: torch.cat([one[name] for one in each]) for name in each[0]}


def adapted_with(base: DualEncoder, gate: DomainGate | None) -> DomainAdapted:
    torch.manual_seed(0)
    adapters = DomainAdapters(base, [DomainAdapterConfig("image", first=-1, width=4)])
    return DomainAdapted(base, randomised(adapters, 1), gate=gate)  # type: ignore[arg-type]


def gate_at(features: torch.Tensor, kind: str = "hard") -> DomainGate:
    """Lets the first row pass whole, and rows in other directions not at all."""
    centre = torch.nn.functional.normalize(features[:1].float(), dim=-1)
    return DomainGate(centre, 1 - 1e-4 if kind == "soft" else 1 - 1e-5, 1 - 1e-5)


# Fitting


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_it_knows_the_domain_from_elsewhere(kind: Any) -> None:
    train = torch.cat([around(0, 60), around(1, 60, seed=1)])
    validation = torch.cat([around(0, 50, seed=2), around(1, 50, seed=3)])
    gate = fit_gate(GateConfig(kind, keep=0.9), train, validation)
    assert gate.kind == kind
    share = gate(validation)
    assert 0.9 <= float((share == 1).float().mean()) < 1
    assert torch.equal(gate(around(5, 20)), torch.zeros(20))
    # The same data give the same gate, and a picture's length means nothing.
    again = fit_gate(GateConfig(kind, keep=0.9), train, validation)
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in gate.state_dict().items())
    torch.testing.assert_close(gate(3 * validation), share, atol=1e-4, rtol=0)


def test_soft_fades_and_hard_does_not() -> None:
    angles = torch.tensor([0.1, 0.4, 0.5, 0.7])
    rows = torch.stack([angles, (1 - angles**2).sqrt()], dim=1)
    for low, expected in ((0.2, [0, 0.5, 0.75, 1]), (0.6, [0, 0, 0, 1])):
        gate = DomainGate(torch.eye(2)[:1], low, 0.6)
        torch.testing.assert_close(gate(rows), torch.tensor(expected, dtype=torch.float32))


def test_soft_ends_a_quarter_of_the_way_to_the_median_below_its_bound() -> None:
    validation = around(0, 51, seed=2)
    gate = fit_gate(GateConfig("soft"), around(0, 60), validation)
    width = float(closeness(validation, gate.centres).median()) - float(gate.high)
    assert width > 0
    assert float(gate.high - gate.low) == pytest.approx(0.25 * width, rel=1e-3)


def test_small_groups_get_a_centre_of_their_own() -> None:
    train = torch.cat([around(0, 200), around(3, 5, seed=1)])
    gate = fit_gate(GateConfig("hard", centres=4), train, train)
    assert float(gate.centres[:, 3].max()) > 0.9
    # What is far from the last centre may be near to another.
    train = torch.cat([around(0, 200), -around(0, 150, seed=1), around(2, 5, seed=2)])
    gate = fit_gate(GateConfig("hard", centres=3), train, train)
    assert float(gate.centres[:, 2].max()) > 0.9


def test_few_pictures_have_few_centres() -> None:
    train = around(0, 20)
    assert len(fit_gate(GateConfig("hard"), train, train).centres) == 2
    assert len(fit_gate(GateConfig("hard"), train[:3], train[:1]).centres) == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.floats(0.5, 1.0), st.integers(0, 99))
def test_any_data_give_a_gate_that_keeps_its_share(count: int, held_out: int, keep: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    train = torch.randn(count, 4, generator=generator).round()  # equal rows and zeros too
    validation = torch.randn(held_out, 4, generator=generator).round()
    for kind in ("soft", "hard"):
        gate = fit_gate(GateConfig(kind, keep=keep), train, validation)  # type: ignore[arg-type]
        share = gate(validation)
        assert ((share >= 0) & (share <= 1)).all()
        assert float((share == 1).float().mean()) >= keep - 1e-6


def test_mixing_ends_at_both_features() -> None:
    base, adapted = torch.randn(3, 5), torch.randn(3, 5)
    found = mixed(base, adapted, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(found[2], adapted[2])
    torch.testing.assert_close(torch.nn.functional.normalize(found[:1]), torch.nn.functional.normalize(base[:1]))
    torch.testing.assert_close(found.norm(dim=-1)[::2], adapted.norm(dim=-1)[::2])


# At work


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_from_elsewhere_keep_the_base(
    family: str, tiny_folder: Callable[[str], Path], pictures: list[Image.Image]
) -> None:
    base = load_base(str(tiny_folder(family)), device="cpu")
    pixels = pixels_of(base, pictures[:3])
    before = base.pixel_features(pixels).detach()
    whole = adapted_with(base, None).pixel_features(pixels)
    model = adapted_with(base, gate_at(before))
    found = model.pixel_features(pixels)
    assert torch.equal(found[1:], before[1:])
    torch.testing.assert_close(found[0], whole[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], before[0], atol=1e-3)
    model.alpha = 0.0
    assert torch.equal(model.pixel_features(pixels), before)
    model.alpha = 1.0
    assert torch.equal(adapted_with(base, gate_at(-before)).pixel_features(pixels)[0], before[0])


@pytest.mark.parametrize(("kind", "first"), [("bottleneck", -1), ("conv", 3)])
def test_patch_tokens_are_those_of_two_whole_passes(
    kind: Any, first: int, pictures: list[Image.Image], tmp_path: Path
) -> None:
    base = load_base(str(build_starter(tmp_path / "starter")), device="cpu")
    pixels = pixels_of(base, pictures[:2])
    adapters = randomised(DomainAdapters(base, [DomainAdapterConfig("image", kind, first=first, width=4)]), 1)
    plain, open_to_all = image_tokens(base, pixels), DomainAdapted(base, adapters)  # type: ignore[arg-type]
    adapted = image_tokens(open_to_all, pixels)
    found = image_tokens(DomainAdapted(base, adapters, gate=gate_at(plain.features)), pixels)  # type: ignore[arg-type]
    for at, expected in ((0, adapted), (1, plain)):
        torch.testing.assert_close(found.tokens[at], expected.tokens[at], atol=1e-4, rtol=1e-4)
        one = torch.nn.functional.normalize(found.features[at], dim=-1)
        torch.testing.assert_close(
            one, torch.nn.functional.normalize(expected.features[at], dim=-1), atol=1e-4, rtol=1e-4
        )


def test_texts_pass_no_gate(base: DualEncoder, pictures: list[Image.Image]) -> None:
    gate = gate_at(base.pixel_features(pixels_of(base, pictures[:1])))
    texts = ["a red car", "a cat"]
    np.testing.assert_array_equal(adapted_with(base, gate).encode_text(texts), base.encode_text(texts))


def test_embeddings_in_training_are_those_of_the_finished_model(base: DualEncoder, pictures: list[Image.Image]) -> None:
    before = torch.from_numpy(base.encode_image(pictures))
    gate = DomainGate(before[:1], 0.0, 1.0)  # every picture gets a share of its own
    whole = torch.from_numpy(adapted_with(base, None).encode_image(pictures))
    found = adapted_with(base, gate).encode_image(pictures)
    torch.testing.assert_close(Gated(gate, before)(whole), torch.from_numpy(found), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_saved_and_loaded(kind: str, base: DualEncoder, pictures: list[Image.Image], tmp_path: Path) -> None:
    gate = gate_at(base.pixel_features(pixels_of(base, pictures[:1])), kind)
    model = adapted_with(base, gate)
    save_domain(tmp_path / "adapted", model.adapters, base=base, gate=gate)
    assert read_adapter(tmp_path / "adapted").config["gate"] == kind
    again = load(tmp_path / "adapted", device="cpu")
    assert isinstance(again, DomainAdapted)
    assert again.gate is not None
    assert again.gate.kind == kind
    assert again.fingerprint == model.fingerprint != adapted_with(base, None).fingerprint
    np.testing.assert_array_equal(again.encode_image(pictures), model.encode_image(pictures))
    again.save_pretrained(tmp_path / "copy")
    assert load(tmp_path / "copy", device="cpu").fingerprint == model.fingerprint


def test_a_gate_of_another_width_is_refused(base: DualEncoder, tmp_path: Path) -> None:
    model = adapted_with(base, None)
    save_domain(tmp_path / "adapted", model.adapters, base=base, gate=DomainGate(torch.eye(3), 0.1, 0.2))
    with pytest.raises(ModelError, match="a gate that does not fit"):
        load(tmp_path / "adapted", device="cpu")


def test_mixing_is_no_coarser_than_its_result() -> None:
    """Under autocast a norm may be of another precision than what it divides; CUDA's is."""
    base, adapted, share = torch.randn(4, 5).bfloat16(), torch.randn(4, 5).bfloat16(), torch.rand(4)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixed(base, adapted, share)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, mixed(base.float(), adapted.float(), share).bfloat16())
