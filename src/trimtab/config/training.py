"""Options of the training loop, whatever the link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.config.checks import require


@dataclass(frozen=True)
class TrainingConfig:
    """What the one training loop needs to know, whatever the link.

    Attributes:
        optimizer: ``adamw``, or ``muon`` for matrices with AdamW for all else, at the same learning rate.
        batch_size: items per optimiser step over all processes together.
        warmup: fraction of all steps in which the learning rate rises from 0.
        clip: largest gradient norm; null never clips.
        precision: ``auto`` is bf16 where the device computes in it (newer GPUs and CPUs), else fp32.
        validate_every: epochs between validations; the last epoch always ends with one.
        checkpoint_every: optimiser steps between checkpoints; every epoch ends with one too.
        log_every: optimiser steps between records for trackers and history.
        ema: decay of an exponential moving average of the weights that is validated and kept instead of
            them; null for none.
        bell: centre and width of a Gaussian over the run, as shares of its steps: the mean of the weights of all steps
            under it is validated and kept instead of them (PromptSRC: Khattak et al., arXiv 2307.06948), for example
            ``[0.8, 0.2]``; null for none.
        collapse_at: training stops when validation reports a collapse above this: 0 is as spread out as the
            teacher's features, 1 a constant output.
        processes: number of processes expected; null takes what the launcher gives.
    """

    epochs: int = 10
    optimizer: Literal["adamw", "muon"] = "adamw"
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    validate_every: int = 1
    checkpoint_every: int = 500
    log_every: int = 20
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    ema: float | None = None
    bell: tuple[float, ...] | None = None
    collapse_at: float = 0.95
    processes: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "validate_every", "checkpoint_every", "log_every"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "learning_rate", self.learning_rate > 0, "above 0")
        require(self, "weight_decay", self.weight_decay >= 0, "at least 0")
        require(self, "warmup", 0 <= self.warmup < 1, "a fraction of the steps, at least 0 and below 1")
        require(self, "clip", self.clip is None or self.clip > 0, "above 0, or null for no clipping")
        require(self, "trackers", len(set(self.trackers)) == len(self.trackers), "without repeats")
        require(self, "ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1, or null for none")
        bell = self.bell
        fits = bell is None or (len(bell) == 2 and 0 <= bell[0] <= 1 and bell[1] > 0)
        require(self, "bell", fits, "two numbers, the first from 0 to 1 and the second above 0, or null for none")
        require(self, "bell", bell is None or self.ema is None, "null beside ema")
        require(self, "collapse_at", 0 < self.collapse_at <= 1, "above 0 and at most 1")
        require(self, "processes", self.processes is None or self.processes >= 1, "at least 1, or null")
