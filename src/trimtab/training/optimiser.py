"""AdamW groups, the learning rate as a function of the step, and averaged weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trimtab.config import TrainingConfig


def trainable(modules: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name."""
    return {name: p for name, p in modules.named_parameters() if p.requires_grad}


def adamw(parameters: dict[str, nn.Parameter], settings: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only: biases, norm gains and scalars are left alone."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # One pass over each parameter instead of a dozen; not every device has it.
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, fused=fused)


def learning_rate(step: int, total: int, settings: TrainingConfig) -> float:
    """Rate for the update that leads from `step` to `step` + 1: linear warm-up, then cosine to 0."""
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - warmup) / max(total - warmup, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class MovingAverage:
    """Exponential moving average of trained weights.

    Early on the decay is (1 + step) / (10 + step), so that the average forgets the start within a short run.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after `step` updates, from 1 on."""
        share = self.share(step)
        for name, parameter in self.parameters.items():
            self.tensors[name].lerp_(parameter, share)

    def share(self, step: int) -> float:
        """Share that these weights get of the average; what it held before gets the rest."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters hold the averaged values."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._fill(self.tensors)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


class BellAverage(MovingAverage):
    """Mean of the weights after each step, weighted by a Gaussian over the run (PromptSRC: arXiv 2307.06948).

    It is the mean over the steps so far at any time, and the start has no part in it. Shares depend on the step
    alone, so a resumed run needs nothing but the tensors.

    Args:
        steps: of the whole run.
        centre, width: mean and standard deviation of the Gaussian, as shares of the run.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], steps: int, centre: float, width: float) -> None:
        super().__init__(parameters, decay=0.0)
        at = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        self.weights = (-0.5 * ((at - centre) / width) ** 2).softmax(dim=0)  # have the sum 1 whatever underflows
        total = self.weights.cumsum(dim=0)
        # Before the first weight that is no zero, the last weights are the average.
        self._shares = torch.where(total > 0, self.weights / total, 1.0).tolist()

    def share(self, step: int) -> float:
        return float(self._shares[step - 1])


def weight_average(parameters: dict[str, nn.Parameter], settings: TrainingConfig, steps: int) -> MovingAverage | None:
    """The average that the settings ask for, of a run of so many steps; None for none."""
    if settings.bell is not None:
        centre, width = settings.bell
        return BellAverage(parameters, steps, centre, width)
    return None if settings.ema is None else MovingAverage(parameters, settings.ema)
