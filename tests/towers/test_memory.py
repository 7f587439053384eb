"""The translation memory: words are looked up, everything else stays where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from trimtab.towers.memory import DIRECTIONS, PairMemory

WORDS, DIM, TEMPLATES = 40, 48, 5


def unit(count: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


def filled(weight: float = 8.0, variants: torch.Tensor | None = None) -> PairMemory:
    memory = PairMemory(WORDS, DIM)
    memory.fill(unit(WORDS, 0), unit(WORDS, 1), variants)
    memory.weight.fill_(weight)
    return memory


def in_templates(words: torch.Tensor, seed: int = 2) -> torch.Tensor:
    """(S, D) words to (S, T, D), each template a shift of its own."""
    return words[:, None, :] + 0.7 * unit(TEMPLATES, seed)[None]


def test_words_are_moved_to_their_translations() -> None:
    memory = filled()
    found = memory(unit(WORDS, 0))
    assert len(memory) == WORDS
    assert (found * unit(WORDS, 1)).sum(-1).min() > 0.95
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(WORDS))


def test_what_is_far_from_every_word_stays() -> None:
    memory = filled()
    memory.sharpness.fill_(100.0)
    others = unit(30, 7)
    torch.testing.assert_close(memory(3 * others), others, atol=1e-4, rtol=0)


def test_without_weight_nothing_moves() -> None:
    torch.testing.assert_close(filled(weight=0.0)(unit(9, 0)), unit(9, 0))


def test_a_word_is_known_in_every_template() -> None:
    words = unit(WORDS, 0)
    sentences = in_templates(words)
    translations = unit(WORDS, 1)
    cosines = {}
    for told in (False, True):
        memory = PairMemory(WORDS, DIM)
        memory.fill(sentences[:, 0], translations, sentences[:12] if told else None)
        memory.weight.fill_(8.0)
        cosines[told] = torch.stack([(memory(sentences[:, i]) * translations).sum(-1) for i in range(1, TEMPLATES)])
    assert cosines[True].mean() > cosines[False].mean() + 0.1
    assert cosines[True].min() > 0.85


@pytest.mark.parametrize("templates", [1, 2, DIRECTIONS + 5])
def test_directions_are_orthonormal_and_no_more_than_there_is_room_for(templates: int) -> None:
    memory = filled(variants=unit(3 * templates, 4).unflatten(0, (3, templates)))
    product = memory.directions.T @ memory.directions
    rank = min(templates - 1, DIRECTIONS)
    expected = torch.zeros(DIRECTIONS)
    expected[:rank] = 1
    torch.testing.assert_close(product, torch.diag(expected), atol=1e-5, rtol=0)


@given(st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=9), st.floats(0.1, 50))
def test_rows_do_not_depend_on_their_batch_or_length(rows: list[int], length: float) -> None:
    memory = filled()
    features = unit(WORDS, 0)[rows] + 0.2 * unit(WORDS, 3)[rows]
    together = memory(length * features)
    alone = torch.cat([memory(one[None]) for one in features])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_nothing_is_trained_and_all_is_saved(tmp_path: Path) -> None:
    memory = filled(variants=in_templates(unit(6, 5)))
    assert not list(memory.parameters())
    save_file(memory.state_dict(), tmp_path / "memory.safetensors")
    again = PairMemory(WORDS, DIM)
    again.load_state_dict(load_file(tmp_path / "memory.safetensors"))
    torch.testing.assert_close(again(unit(20, 6)), memory(unit(20, 6)), atol=0, rtol=0)


def test_what_is_kept_in_float_follows_every_change() -> None:
    memory = filled()
    before = memory(unit(9, 0))
    assert all(torch.equal(kept, whole.float()) for whole, _, kept in memory._floats.values())
    other = PairMemory(WORDS, DIM)
    other.fill(unit(WORDS, 0), unit(WORDS, 3))
    other.weight.fill_(8.0)
    memory.load_state_dict(other.state_dict())  # in place
    assert torch.equal(memory(unit(9, 0)), other(unit(9, 0)))
    memory.fill(unit(WORDS, 0), unit(WORDS, 1))
    assert torch.equal(memory(unit(9, 0)), before)
    memory.keys = other.keys.flip(0)  # another tensor
    assert not torch.equal(memory(unit(9, 0)), before)
    with torch.inference_mode():
        again = filled()
        assert torch.equal(again(unit(9, 0)), before)


def test_gradients_pass_after_a_search_without_them() -> None:
    memory = filled()
    with torch.inference_mode():
        memory(unit(3, 0))
    features = unit(3, 0).requires_grad_()
    memory(features).sum().backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0
