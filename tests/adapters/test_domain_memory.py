"""A memory of training pictures behind the adapters: what it moves, and that it goes where the adapters go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models import randomised
from trimtab.adapters.adapted import load
from trimtab.adapters.domain import DomainAdapted, DomainAdapters, save_domain
from trimtab.adapters.gate import DomainGate
from trimtab.config import DomainAdapterConfig
from trimtab.errors import ModelError
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.hf import load_base
from trimtab.towers.memory import PairMemory
from trimtab.towers.prompting import image_tokens


@pytest.fixture
def base(tiny_folder: Callable[[str], Path]) -> DualEncoder:
    return load_base(str(tiny_folder("clip")), device="cpu")


@pytest.fixture
def plain(base: DualEncoder) -> DomainAdapted:
    torch.manual_seed(0)
    adapters = DomainAdapters(base, [DomainAdapterConfig("image", first=-1, width=4)])
    return DomainAdapted(base, randomised(adapters, 1))  # type: ignore[arg-type]


def memory_of(model: DualEncoder, pictures: list[Image.Image], texts: list[str]) -> PairMemory:
    """Nearly as sharp as can be, so that only pictures that are in it are moved."""
    memory = PairMemory(len(pictures), model.embedding_dim)
    memory.fill(torch.from_numpy(model.encode_image(pictures)), torch.from_numpy(model.encode_text(texts)))
    memory.sharpness.fill_(300.0)
    memory.weight.fill_(1.0)
    return memory


def with_memory(plain: DomainAdapted, memory: PairMemory, gate: DomainGate | None = None) -> DomainAdapted:
    return DomainAdapted(plain.base, plain.adapters, gate=gate, memory=memory, name=plain.name)


def test_known_pictures_move_to_their_captions_and_texts_stay(
    plain: DomainAdapted, pictures: list[Image.Image]
) -> None:
    texts = ["a red car", "a cat"]
    model = with_memory(plain, memory_of(plain, pictures[:2], texts))
    before, after = plain.encode_image(pictures), model.encode_image(pictures)
    captions = plain.encode_text(texts)
    gained = np.sum((after - before)[:2] * captions, axis=1)
    assert (gained > 0.01).all()
    assert np.abs(after - before)[:2].max() > 10 * np.abs(after - before)[2:].max()
    np.testing.assert_array_equal(model.encode_text(texts), captions)
    assert model.fingerprint != plain.fingerprint


def test_lengths_of_features_stay(plain: DomainAdapted, pictures: list[Image.Image]) -> None:
    model = with_memory(plain, memory_of(plain, pictures[:2], ["a red car", "a cat"]))
    pixels = plain.preprocess(pictures[0])
    moved, found = model.pixel_features(pixels), plain.pixel_features(pixels)
    torch.testing.assert_close(moved.norm(dim=-1), found.norm(dim=-1))
    assert not torch.allclose(moved, found, atol=1e-3)


def test_taken_out_it_is_another_model(plain: DomainAdapted, pictures: list[Image.Image]) -> None:
    model = with_memory(plain, memory_of(plain, pictures[:2], ["a red car", "a cat"]))
    model.memory = None
    assert model.fingerprint == plain.fingerprint
    np.testing.assert_array_equal(model.encode_image(pictures), plain.encode_image(pictures))


def test_the_dial_turns_it_too(plain: DomainAdapted, pictures: list[Image.Image]) -> None:
    model = with_memory(plain, memory_of(plain, pictures[:2], ["a red car", "a cat"]))
    model.alpha = 0.0
    np.testing.assert_array_equal(model.encode_image(pictures), plain.base.encode_image(pictures))


def test_with_prompts_and_gates_it_moves_as_much(plain: DomainAdapted, pictures: list[Image.Image]) -> None:
    memory = memory_of(plain, pictures[:2], ["a red car", "a cat"])
    pixels = plain.preprocess(pictures[0])
    for gate in (None, DomainGate(torch.from_numpy(plain.base.encode_image(pictures[:1])), -1.0, -1.0)):
        model = with_memory(plain, memory, gate)
        tokens = image_tokens(model, pixels)
        torch.testing.assert_close(tokens.features, model.pixel_features(pixels), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens.features, with_memory(plain, memory).pixel_features(pixels))
        assert torch.equal(tokens.tokens, image_tokens(with_memory(plain, memory), pixels).tokens)


def test_pictures_outside_the_gate_are_not_moved(plain: DomainAdapted, pictures: list[Image.Image]) -> None:
    centre = torch.from_numpy(plain.base.encode_image(pictures[:1]))
    model = with_memory(plain, memory_of(plain, pictures, ["a cat"] * len(pictures)), DomainGate(-centre, 0.9, 0.9))
    np.testing.assert_allclose(model.encode_image(pictures[:1]), plain.base.encode_image(pictures[:1]), atol=1e-6)


def test_saved_and_loaded_is_exact(
    base: DualEncoder, plain: DomainAdapted, pictures: list[Image.Image], tmp_path: Path
) -> None:
    memory = memory_of(plain, pictures[:2], ["a red car", "a cat"])
    folder = save_domain(tmp_path / "shop", plain.adapters, base=base, memory=memory)
    model = load(folder, base=base)
    again = with_memory(plain, memory)
    np.testing.assert_array_equal(model.encode_image(pictures), again.encode_image(pictures))
    assert model.fingerprint == again.fingerprint
    model.save_pretrained(tmp_path / "copy")
    np.testing.assert_array_equal(
        load(tmp_path / "copy", base=base).encode_image(pictures), again.encode_image(pictures)
    )
    # What was taken out is not in a copy either.
    model.memory, model.gate = None, DomainGate(torch.eye(base.embedding_dim)[:3], 0.2, 0.2)
    model.save_pretrained(tmp_path / "gated")
    gated = load(tmp_path / "gated", base=base)
    assert gated.memory is None
    assert gated.fingerprint == model.fingerprint != again.fingerprint


def test_a_memory_of_another_space_is_refused(base: DualEncoder, plain: DomainAdapted, tmp_path: Path) -> None:
    folder = save_domain(tmp_path / "shop", plain.adapters, base=base, memory=PairMemory(2, base.embedding_dim + 1))
    with pytest.raises(ModelError, match="memory that does not fit"):
        load(folder, base=base)


@pytest.mark.parametrize("shape", [(10**13, 0), ()], ids=str)
def test_a_memory_of_nothing_takes_no_memory(
    base: DualEncoder, plain: DomainAdapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    memory = PairMemory(2, base.embedding_dim)
    memory.keys = torch.zeros(shape, dtype=torch.int8)
    monkeypatch.setattr(PairMemory, "__len__", lambda _: 2)
    folder = save_domain(tmp_path / "shop", plain.adapters, base=base, memory=memory)
    with pytest.raises(ModelError, match="memory that does not fit"):
        load(folder, base=base)
