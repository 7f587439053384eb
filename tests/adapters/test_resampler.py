from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import randomised
from trimtab.adapters.resampler import FusionAdapter, Resampler, ResamplerConfig, summaries
from trimtab.config import LanguageAdapterConfig
from trimtab.errors import RecipeError

STUDENT, TEACHER, TOKENS = 10, 6, 4


def build(**changes: Any) -> FusionAdapter:
    torch.manual_seed(0)
    return FusionAdapter(
        LanguageAdapterConfig(width=8, heads=2, layers=1, **changes),
        ResamplerConfig(tokens=TOKENS, heads=2, layers=2),
        input_dim=STUDENT,
        output_dim=TEACHER,
    )


def texts(count: int, longest: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """States of texts of 2 to `longest` tokens, zero where padded, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator)
    mask = torch.arange(longest) < lengths[:, None]
    return torch.randn(count, longest, width, generator=generator) * mask[..., None], mask


@pytest.mark.parametrize("length", [1, 3, 11])
def test_any_number_of_tokens_gives_a_sequence_of_one_length(length: int) -> None:
    adapter = build()
    pooled, sequence, counted = adapter(torch.randn(5, length, STUDENT), torch.ones(5, length, dtype=torch.bool))
    assert pooled.shape == (5, 2 * TEACHER)
    assert sequence.shape == (5, 1 + TOKENS, TEACHER)
    assert counted.shape == (5, 1 + TOKENS)
    assert counted.all()  # until lengths are fitted


def test_a_fitted_adapter_starts_as_its_closed_form_map() -> None:
    adapter = build()
    states, mask = texts(200, 7, STUDENT, 1)
    mean = states.sum(1) / mask.sum(1, keepdim=True)
    teacher_mask = torch.ones(200, 3, dtype=torch.bool)
    teacher = torch.randn(200, 3, TEACHER)
    target = mean @ torch.randn(STUDENT, 2 * TEACHER) + 3  # exactly linear in the student's mean
    teacher[:, 0] = target[:, :TEACHER]
    teacher[:, 1:] += (target[:, TEACHER:] - teacher[:, 1:].mean(1))[:, None]

    adapter.fit(states, mask, teacher, teacher_mask, ridge=1e-6)
    pooled, sequence, _ = adapter(states, mask)

    torch.testing.assert_close(pooled, target, atol=1e-3, rtol=0)
    torch.testing.assert_close(sequence[:, 0], target[:, :TEACHER], atol=1e-3, rtol=0)
    assert torch.equal(sequence[:, 1:], pooled[:, None, TEACHER:].expand(-1, TOKENS, -1))
    deviation = teacher[:, 1:] - target[:, None, TEACHER:]
    torch.testing.assert_close(adapter.resampler.scale, deviation.square().mean((0, 1)).sqrt())


@pytest.mark.parametrize("init", ["ridge", "random"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "attention"])
def test_the_summaries_are_what_the_language_adapter_gives(init: str, pooling: str) -> None:
    adapter = randomised(build(init=init, pooling=pooling))
    states, mask = texts(6, 5, STUDENT, 2)
    pooled, sequence, _ = adapter(states, mask)
    assert torch.equal(pooled, adapter.language(states, mask))
    assert torch.equal(sequence[:, 0], pooled[:, :TEACHER])


def test_padding_changes_nothing() -> None:
    adapter = randomised(build())
    states, mask = texts(6, 5, STUDENT, 3)
    wider = torch.full((6, 9, STUDENT), 1e3)
    wider[:, :5] = torch.where(mask[..., None], states, wider[:, :5])
    wider_mask = torch.zeros(6, 9, dtype=torch.bool)
    wider_mask[:, :5] = mask
    for first, second in zip(adapter(states, mask), adapter(wider, wider_mask), strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    other, (teacher, teacher_mask) = build(), texts(6, 4, TEACHER, 4)
    adapter = build()
    adapter.fit(states, mask, teacher, teacher_mask)
    other.fit(wider, wider_mask, teacher, teacher_mask)
    for name, tensor in adapter.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], atol=1e-4, rtol=1e-4)


def test_as_many_tokens_count_as_the_english_text_would_have(caplog: pytest.LogCaptureFixture) -> None:
    resampler = Resampler(ResamplerConfig(tokens=8, heads=2), width=8, output_dim=TEACHER)
    resampler.fit_lengths(torch.tensor([3, 4, 6, 9]), torch.tensor([2, 3, 5, 8]))  # one less than the student's
    mask = torch.arange(20) < torch.tensor([1, 2, 5, 9, 20])[:, None]
    assert resampler.counted(mask).sum(1).tolist() == [1, 1, 4, 8, 8]  # at least one and at most all
    assert not caplog.records
    resampler.fit_lengths(torch.tensor([5, 5, 5]), torch.tensor([4, 4, 10]))  # no slope to be found
    assert resampler.counted(mask).sum(1).tolist() == [6] * 5
    assert "1 of 3 English texts have more tokens than the resampler's 8" in caplog.text


def test_the_cls_of_the_english_text_is_no_token() -> None:
    adapter = build()
    states, mask = texts(40, TOKENS, STUDENT, 5)
    teacher_mask = torch.cat([torch.ones(40, 1, dtype=torch.bool), mask], dim=1)
    adapter.fit(states, mask, torch.randn(40, 1 + TOKENS, TEACHER), teacher_mask)
    _, _, counted = adapter(states, mask)
    assert torch.equal(counted.sum(dim=1), 1 + mask.sum(dim=1))


def test_tokens_deviate_from_their_mean_by_the_scale() -> None:
    adapter = randomised(build())
    states, mask = texts(6, 5, STUDENT, 2)
    found = []
    for factor in (1.0, 3.0):
        adapter.resampler.scale.mul_(factor)
        pooled, sequence, _ = adapter(states, mask)
        found.append(sequence[:, 1:] - pooled[:, None, TEACHER:])
    assert found[0].abs().max() > 0.1
    torch.testing.assert_close(found[1], 3 * found[0], atol=1e-4, rtol=1e-4)


def test_too_few_sentences_to_start_from() -> None:
    states, mask = texts(1, 5, STUDENT, 0)
    with pytest.raises(RecipeError, match="at least 2"):
        build().fit(states, mask, torch.randn(1, 3, TEACHER), torch.ones(1, 3, dtype=torch.bool))


def test_the_tokens_of_a_trained_resampler_differ_from_each_other_and_between_texts() -> None:
    adapter = randomised(build())
    states, mask = texts(6, 5, STUDENT, 4)
    sequence = adapter(states, mask)[1][:, 1:].flatten(0, 1)  # (6 * M, H)
    assert torch.pdist(sequence).min() > 1e-3


def test_gradients_reach_everything_but_the_closed_form_map() -> None:
    adapter = randomised(build())
    states, mask = texts(6, 5, STUDENT, 5)
    adapter(states, mask)[1].square().sum().backward()
    for name, parameter in adapter.named_parameters():
        if name.startswith("language.linear."):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0 or name.endswith(("qkv.bias", "key_value.bias")), name


def test_summaries_leave_padding_out() -> None:
    states, mask = texts(4, 6, TEACHER, 6)
    dirty = torch.where(mask[..., None], states, torch.tensor(7.0))
    found = summaries(dirty, mask.long())
    for row, text, length in zip(found, states, mask.sum(1), strict=True):
        torch.testing.assert_close(row, torch.cat([text[0], text[1:length].mean(0)]))


@pytest.mark.parametrize("changes", [{"tokens": 0}, {"layers": 0}, {"layers": 13}, {"heads": 0}, {"dropout": 1.0}])
def test_impossible_configurations_are_refused(changes: dict[str, Any]) -> None:
    (name, value), *_ = changes.items()
    with pytest.raises(RecipeError, match=f"{name}={value}"):
        ResamplerConfig(**changes)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(RecipeError, match="heads=3 must divide the adapter's width=8"):
        Resampler(ResamplerConfig(heads=3), width=8, output_dim=TEACHER)


def test_a_translation_memory_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"adapter\.memory=20000.*set adapter\.memory=0"):
        build(memory=20_000)
