"""Hidden states of the lower layers of an encoder, without running the layers above them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Enough(Exception):  # noqa: N818  not an error: the layers above were not asked for
    """Ends a forward pass."""


class LayerStack:
    """The layers of an encoder, lowest first; `states` stops the encoder above the highest that is asked for.

    Attributes:
        layers: L modules. Layer 0 is what enters the first of them, layer i what leaves the i-th.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)

    @classmethod
    def find(cls, model: nn.Module, run: Callable[[], Sequence[Tensor]]) -> LayerStack | None:
        """The module list of `model` whose outputs are its hidden states, or None where no list has them.

        Args:
            run: passes a text through the model and returns its L + 1 hidden states. The last one is not looked
                at: models differ in what they do to it after the layers.
        """
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        seen: dict[nn.Module, Tensor] = {}
        hooks = [layer.register_forward_hook(_keep(seen, layer)) for some in lists for layer in some]
        try:
            states = run()
        finally:
            for hook in hooks:
                hook.remove()
        for some in lists:
            layers = list(some)
            if len(layers) == len(states) - 1 and all(
                layer in seen and torch.equal(seen[layer], state)
                for layer, state in zip(layers[:-1], states[1:-1], strict=True)
            ):
                return cls(layers)
        return None

    def states(self, run: Callable[[], Any], layers: Iterable[int]) -> dict[int, Tensor]:
        """Hidden states of layers below the last, each (B, T, H).

        Args:
            run: passes a batch through the model.
            layers: numbers from 0 to L - 1.
        """
        wanted = set(layers)
        top = max(wanted)
        seen: dict[int, Tensor] = {}

        def enter(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[0] = arguments[0] if arguments else named["hidden_states"]
            if top == 0:
                raise _Enough

        def leave(number: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                seen[number] = _first(output)
                if number == top:
                    raise _Enough

            return hook

        hooks = [self.layers[number - 1].register_forward_hook(leave(number)) for number in wanted - {0}]
        if 0 in wanted:
            hooks.append(self.layers[0].register_forward_pre_hook(enter, with_kwargs=True))
        try:
            run()
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return seen


def _keep(seen: dict[nn.Module, Tensor], layer: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(first := _first(output), Tensor):
            seen[layer] = first

    return hook


def _first(output: Any) -> Any:
    """Layers give their states alone, or first in a tuple, by family and version."""
    return output[0] if isinstance(output, tuple) else output
