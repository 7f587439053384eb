from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny_models
from tiny_models import CORPUS
from trimtab.towers.early_exit import LayerStack
from trimtab.towers.text_encoder import TextEncoder


@pytest.mark.parametrize("name", sorted(tiny_models.BUILDERS))
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1), (1, 0)])
def test_lower_layers_equal_those_of_the_whole_encoder(
    name: str, layers: tuple[int, ...], tiny_folder: Callable[[str], Path]
) -> None:
    encoder = TextEncoder.load(tiny_folder(name), device="cpu")
    width = encoder.hidden_size
    lower = encoder.token_states(CORPUS, layers, batch_size=4)
    whole = encoder.token_states(CORPUS, (*layers, -1), batch_size=4)
    for one, all_layers in zip(lower, whole, strict=True):
        np.testing.assert_array_equal(one, all_layers[:, : width * len(layers)])


@pytest.mark.parametrize("name", sorted(tiny_models.TEXT_ENCODERS))
def test_layers_above_are_not_run(name: str, tiny_folder: Callable[[str], Path]) -> None:
    encoder = TextEncoder.load(tiny_folder(name), device="cpu")
    ran: list[int] = []
    assert encoder._stack is not None
    for number, layer in enumerate(encoder._stack.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    encoder.token_states(["一只猫"], (1,))
    assert ran == [1]
    encoder.token_states(["一只猫"], (0,))
    assert ran == [1]
    encoder.token_states(["一只猫"], (1, -1))
    assert ran == [1, 1, 2]


class Odd(nn.Module):
    """Two layers that keep their states to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        states = [x]
        for layer in self.layers:
            states.append(states[-1] + layer(states[-1]))
        return states


def test_models_without_such_a_list_are_run_whole() -> None:
    model = Odd()
    assert LayerStack.find(model, lambda: model(torch.ones(1, 2))) is None


def test_an_error_of_the_model_comes_through() -> None:
    stack = LayerStack([nn.Linear(2, 2), nn.Linear(2, 2)])

    def run() -> Any:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        stack.states(run, [1])
    assert not stack.layers[0]._forward_hooks
