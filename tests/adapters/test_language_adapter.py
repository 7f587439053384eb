from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiny_models import CORPUS
from trimtab.adapters.language import LanguageAdapter, attend, masked_mean
from trimtab.config import LanguageAdapterConfig
from trimtab.errors import RecipeError
from trimtab.towers.text_encoder import TextEncoder

INPUT, OUTPUT = 10, 6
POOLINGS = ["mean", "cls", "attention"]


def adapter(*, trained: bool = False, seed: int = 0, **changes: Any) -> LanguageAdapter:
    """A new adapter, or one whose weights and buffers are all away from their start."""
    torch.manual_seed(seed)
    config = LanguageAdapterConfig(**{"width": 8, "layers": 2, "heads": 2, **changes})
    module = LanguageAdapter(config, input_dim=INPUT, output_dim=OUTPUT)
    if trained:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        module.set_statistics(torch.randn(50, INPUT) * 3 + 1, torch.randn(50, OUTPUT) * 2 - 1)
    return module.eval()


def batch(lengths: list[int], *, longest: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token states (B, T, INPUT) of the given lengths, arbitrary beyond them, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(length, INPUT, generator=generator) for length in lengths]
    longest = longest or max(lengths)
    states = torch.randn(len(lengths), longest, INPUT, generator=generator) * 9
    for i, row in enumerate(rows):
        states[i, : len(row)] = row
    return states, torch.arange(longest) < torch.tensor(lengths)[:, None]


# The start


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("layers", "hidden"), [(0, 0), (2, 0), (2, 12)])
def test_a_new_adapter_is_the_closed_form_map(pooling: str, layers: int, hidden: int) -> None:
    states, mask = batch([3, 5, 1])
    tokens, targets = torch.randn(60, INPUT) * 2 + 3, torch.randn(40, OUTPUT)
    module = adapter(pooling=pooling, layers=layers, hidden=hidden)
    module.set_statistics(tokens, targets)
    module.fit_linear(torch.randn(40, INPUT), targets, ridge=0.1)
    with torch.no_grad():
        pooled = torch.stack([row[keep].mean(dim=0) for row, keep in zip(states, mask, strict=True)])
        standard = (pooled - tokens.mean(dim=0)) / tokens.std(dim=0)
        expected = (standard @ module.linear.weight.T + module.linear.bias) * targets.std(dim=0) + targets.mean(dim=0)
        torch.testing.assert_close(module(states, mask), expected, atol=1e-4, rtol=1e-4)


def test_before_any_fit_it_gives_the_mean_feature() -> None:
    targets = torch.randn(40, OUTPUT) + 5
    module = adapter()
    module.set_statistics(torch.randn(9, INPUT), targets)
    with torch.no_grad():
        torch.testing.assert_close(module(*batch([3, 5])), targets.mean(dim=0).expand(2, -1))


def test_a_random_start_is_no_map_at_all() -> None:
    module = adapter(init="random")
    assert not hasattr(module, "linear")
    with torch.no_grad():
        output = module(*batch([3, 5]))
    assert output.abs().min() > 0
    assert not torch.allclose(output[0], output[1])


# Fitting


def known_map() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(OUTPUT, INPUT, generator=generator), torch.randn(OUTPUT, generator=generator) * 5
    return weight, bias, torch.randn(200, INPUT, generator=generator) * torch.linspace(0.1, 30, INPUT) + 2


def test_fitting_recovers_a_known_linear_map() -> None:
    weight, bias, pooled = known_map()
    targets = pooled @ weight.T + bias
    module = adapter()
    module.set_statistics(pooled, targets)
    module.fit_linear(pooled, targets, ridge=1e-9)
    states = torch.randn(4, 7, INPUT)
    with torch.no_grad():
        output = module(states, torch.ones(4, 7, dtype=torch.bool))
    torch.testing.assert_close(output, states.mean(dim=1) @ weight.T + bias, atol=1e-3, rtol=1e-3)


def test_rows_without_weight_do_not_count() -> None:
    weight, bias, pooled = known_map()
    targets = pooled @ weight.T + bias
    wrong = targets.clone()
    wrong[::2] = 1000.0
    weights = torch.tensor([0.0, 3.0]).repeat(100)
    module, right = adapter(), adapter()
    for one, given_targets, given_weights in ((module, wrong, weights), (right, targets, None)):
        one.set_statistics(pooled, targets)
        one.fit_linear(pooled, given_targets, ridge=1e-9, weights=given_weights)
    torch.testing.assert_close(module.linear.weight, right.linear.weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(module.linear.bias, right.linear.bias, atol=1e-3, rtol=1e-3)


@given(st.integers(0, 5), st.floats(0.5, 100))
@settings(max_examples=10, deadline=None)
def test_weights_are_relative_and_ridge_shrinks(seed: int, factor: float) -> None:
    torch.manual_seed(seed)
    pooled, targets, weights = torch.randn(30, INPUT), torch.randn(30, OUTPUT), torch.rand(30) + 0.1
    one, scaled, flat = adapter(), adapter(), adapter()
    one.fit_linear(pooled, targets, ridge=0.1, weights=weights)
    scaled.fit_linear(pooled, targets, ridge=0.1, weights=weights * factor)
    flat.fit_linear(pooled, targets, ridge=1e6, weights=weights)
    torch.testing.assert_close(one.linear.weight, scaled.linear.weight, atol=1e-5, rtol=1e-4)
    assert flat.linear.weight.abs().max() < 1e-4
    mean = (weights[:, None] * targets).sum(dim=0) / weights.sum()
    torch.testing.assert_close(flat.linear.bias, mean, atol=1e-3, rtol=1e-3)


def test_dimensions_that_never_vary_stay_finite() -> None:
    states, features = torch.randn(50, INPUT), torch.randn(50, OUTPUT)
    states[:, 3], features[:, 2] = 7.0, -1.0
    module = adapter()
    module.set_statistics(states, features)
    module.fit_linear(states, features, ridge=0.01)
    with torch.no_grad():
        output = module(states[:, None], torch.ones(50, 1, dtype=torch.bool))
    assert output.isfinite().all()
    torch.testing.assert_close(output[:, 2], torch.full((50,), -1.0), atol=1e-3, rtol=1e-3)


def test_dimensions_that_hardly_vary_are_not_blown_up() -> None:
    states = torch.randn(50, INPUT)
    states[:, 0] = 7 + 1e-6 * torch.randn(50)
    module = adapter()
    module.set_statistics(states, torch.randn(50, OUTPUT))
    assert module.input_std[0] >= 0.009 * states.std(dim=0).mean()


def test_pairs_that_are_all_alike_give_their_target() -> None:
    module = adapter()
    states, features = torch.full((1, INPUT), 0.3).expand(20, -1), torch.linspace(-1, 1, OUTPUT).expand(20, -1)
    module.set_statistics(states, features)
    module.fit_linear(states, features, ridge=0.01)
    found = module(states[:1, None], torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(found, features[:1], rtol=0, atol=1e-5)


def test_units_are_kept_with_the_weights() -> None:
    module = adapter(trained=True)
    again = adapter(seed=1)
    again.load_state_dict(module.state_dict())
    states, mask = batch([2, 4])
    with torch.no_grad():
        assert torch.equal(again(states, mask), module(states, mask))


# Padding and batches


@pytest.mark.parametrize("pooling", POOLINGS)
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), extra=st.integers(0, 5), layers=st.integers(0, 2))
def test_neither_padding_nor_neighbours_matter(pooling: str, lengths: list[int], extra: int, layers: int) -> None:
    module = adapter(trained=True, pooling=pooling, layers=layers, hidden=5)
    states, mask = batch(lengths, longest=max(lengths) + extra)
    with torch.no_grad():
        together = module(states, mask)
        for i, length in enumerate(lengths):
            alone = module(states[i : i + 1, :length], torch.ones(1, length, dtype=torch.bool))
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_are_what_their_names_say(pooling: str) -> None:
    module = adapter(trained=True, pooling=pooling)
    x, mask = torch.randn(2, 4, 8), torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        pooled = module.pool(x, mask)
        if pooling == "cls":
            assert torch.equal(pooled, x[:, 0])
        elif pooling == "mean":
            torch.testing.assert_close(pooled, torch.stack([x[0].mean(dim=0), x[1, :2].mean(dim=0)]))
        else:
            share = torch.softmax(x[1, :2] @ module.query / 8**0.5, dim=0)
            torch.testing.assert_close(pooled[1], share[0] * x[1, 0] + share[1] * x[1, 1])
            module.query.zero_()
            torch.testing.assert_close(module.pool(x, mask), masked_mean(x, mask))


def test_order_of_tokens_is_seen_only_through_the_student() -> None:
    """The adapter has no positions of its own: the student's states already hold them."""
    module = adapter(trained=True)
    states, mask = batch([4])
    with torch.no_grad():
        torch.testing.assert_close(module(states, mask), module(states.flip(1), mask), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_float32(dtype: torch.dtype) -> None:
    module = adapter(trained=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = module(*batch([3]))
    assert output.dtype == torch.float32


@pytest.mark.parametrize("tokens", [1, 5, 128, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_same_however_it_is_computed(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 4, generator=generator) for _ in range(3))
    mask = torch.arange(tokens) < torch.tensor([tokens, (tokens + 1) // 2])[:, None, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    found = attend(q.to(dtype), k.to(dtype), v.to(dtype), mask)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


# Training


@pytest.mark.parametrize("pooling", POOLINGS)
def test_only_the_adapter_is_trained(pooling: str, tiny_folder: Any) -> None:
    student = TextEncoder.load(tiny_folder("bert"), device="cpu")
    config = LanguageAdapterConfig(width=8, layers=1, heads=2, pooling=pooling)  # type: ignore[arg-type]
    module = LanguageAdapter(config, input_dim=student.hidden_size, output_dim=OUTPUT).train()
    torch.nn.init.normal_(module.up.weight)
    states, mask = student.states(CORPUS[:4])
    module(states, mask).square().mean().backward()
    assert all(parameter.grad is None for parameter in student.model.parameters())
    # The solved path stays as it was solved.
    assert {name for name, p in module.named_parameters() if p.grad is None} == {"linear.weight", "linear.bias"}
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_training_leaves_the_start() -> None:
    """Up starts at zero, yet a gradient gets through."""
    module = adapter().train()
    states, mask = batch([3, 5, 2, 4])
    targets = torch.randn(4, OUTPUT)
    optimiser = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(60):
        loss = (module(states, mask) - targets).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_dropout_only_in_training() -> None:
    module = adapter(trained=True, dropout=0.5)
    states, mask = batch([3, 5])
    with torch.no_grad():
        assert torch.equal(module(states, mask), module(states, mask))
        module.train()
        assert not torch.equal(module(states, mask), module(states, mask))


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(RecipeError, match="multiple of heads"):
        adapter(width=9)
