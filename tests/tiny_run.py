"""A tiny training run for tests: in this process, killed in a subprocess, or as one of several ranks.

As a script: ``python tiny_run.py FOLDER OUTPUT.safetensors [kill_at]``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.config import TrainingConfig
from trimtab.training import Selection, TrainingResult, train

ROWS, BATCH = 50, 8  # the seventh and last batch of an epoch has two rows
STEPS = -(-ROWS // BATCH)


def settings(**changes: Any) -> TrainingConfig:
    defaults: dict[str, Any] = {
        "precision": "fp32",
        "epochs": 3,
        "batch_size": BATCH,
        "learning_rate": 0.05,
        "checkpoint_every": 3,
        "log_every": 4,
        "trackers": (),
        "ema": 0.9,
    }
    return TrainingConfig(**{**defaults, **changes})


class Epoch:
    """Row numbers in a random order that depends on the epoch alone."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        order = np.random.default_rng([1, self.epoch]).permutation(ROWS)
        for start in range(0, ROWS, BATCH):
            yield torch.tensor(order[start : start + BATCH])


class Problem:
    """Linear regression with dropout; the step draws from all three global generators when `noise`."""

    def __init__(self, dropout: float = 0.2, noise: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS, 6, generator=generator)
        self.y = self.x @ torch.randn(6, 3, generator=generator)
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Dropout(dropout), nn.Linear(8, 3))
        self.noise = noise
        self.steps = 0
        self.before_step: Callable[[int], None] = lambda step: None

    def step(self, rows: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        self.before_step(self.steps)
        scale = 1 + 0.1 * random.gauss(0, 1) * np.random.standard_normal() if self.noise else 1.0
        error = self.model(self.x[rows]) - self.y[rows]
        return {"mse": scale * error.square().mean(), "small": 0.01 * error.abs().mean()}

    def validate(self, epoch: int) -> dict[str, float]:
        error = (self.model(self.x) - self.y).square().mean().item()
        return {"error": error, "collapse": 0.5}

    def train(self, folder: str | Path, **arguments: Any) -> TrainingResult:
        call: dict[str, Any] = {
            "steps_per_epoch": STEPS,
            "settings": settings(),
            "checkpoint_dir": folder,
            "digest": "recipe-1",
            "seed": 5,
            "validate": self.validate,
            "select": Selection("error", greater_is_better=False),
            "show_progress": False,
        }
        return train(self.step, self.model, Epoch, **{**call, **arguments})


def kill_at(step: int) -> Callable[[int], None]:
    def maybe(now: int) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return maybe


if __name__ == "__main__":
    folder, output, *rest = sys.argv[1:]
    problem = Problem()
    if rest == ["plain"]:  # one of several ranks: nothing random, so that all numbers of ranks agree
        problem = Problem(dropout=0.0, noise=False)
    elif rest:
        problem.before_step = kill_at(int(rest[0]))
    problem.train(folder)
    if os.environ.get("RANK", "0") == "0":
        save_file(problem.model.state_dict(), output)
    if rest == ["plain"]:  # as `trimtab.recipes.adapt` does; else a thread that waits may abort a finished rank
        dist.barrier()
        dist.destroy_process_group()
