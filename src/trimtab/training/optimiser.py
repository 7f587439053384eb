"""AdamW and Muon, the learning rate as a function of the step, and averaged weights."""

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


def make_optimizer(parameters: dict[str, nn.Parameter], settings: TrainingConfig) -> torch.optim.AdamW:
    """What the settings name, with decay on matrices only: biases, norm gains and scalars are left alone."""
    muon = settings.optimizer == "muon"
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for one in parameters.values():
        decay = settings.weight_decay if one.ndim >= 2 else 0.0
        groups.setdefault((decay, muon and is_matrix(one)), []).append(one)
    # One pass over each parameter instead of a dozen; not every device has it.
    fused = all(one.device.type in ("cpu", "cuda") for one in parameters.values())
    kind = Muon if muon else torch.optim.AdamW
    return kind(
        [{"params": found, "weight_decay": decay, "matrices": matrices} for (decay, matrices), found in groups.items()],
        lr=settings.learning_rate,
        fused=fused,
    )


def is_matrix(parameter: Tensor) -> bool:
    """Whether it maps vectors to vectors: linear layers and convolutions do, depthwise filters do not."""
    return parameter.ndim >= 2 and parameter.shape[1] > 1


class Muon(torch.optim.AdamW):
    """Momentum whose steps are made orthogonal (Jordan et al. 2024), on groups with `matrices`; AdamW on the others.

    Steps are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982), so one learning rate does for both.
    A step of an adapter's Down or Up moves all its directions alike, not only the few with large gradients.
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all groups; gradients of matrices are gone afterwards."""
        for group in self.param_groups:
            for one in group["params"] if group["matrices"] else ():
                if one.grad is None:
                    continue
                state = self.state[one]
                if not state:  # AdamW reads no state without a count
                    state.update(step=torch.zeros(()), momentum=torch.zeros_like(one))
                momentum = state["momentum"]
                momentum.mul_(self.MOMENTUM).add_(one.grad)
                ahead = one.grad.add(momentum, alpha=self.MOMENTUM).flatten(1)  # Nesterov's; (M, N)
                update = orthogonal(ahead) * (0.2 * math.sqrt(max(ahead.shape)))
                one.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update.view_as(one))
                one.grad = None  # so that AdamW passes it by
        super().step()


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix (M, N), roughly: its singular values come to between 0.7 and 1.2."""
    x = matrix.float()
    x = x / x.norm().clamp_min(1e-12)
    wide = x if len(x) <= x.shape[1] else x.T
    for _ in range(5):  # Newton-Schulz iteration with the coefficients of Jordan et al.
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return (wide if len(x) <= x.shape[1] else wide.T).to(matrix.dtype)


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
