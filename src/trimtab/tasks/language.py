"""The language link's training step: cached token states in, distance to the teacher out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.adapters.language import LanguageAdapter
from trimtab.config import DistillationConfig
from trimtab.objectives.distillation import Standardiser, distillation_terms

Lookup = Callable[[np.ndarray], tuple[Tensor, Tensor, Tensor]]
"""Indices (B,) to token states (B, T, H), their mask (B, T) and the teacher's features (B, D)."""


class LanguageTask(nn.Module):
    """Adapter and objective over frozen features; only the adapter has anything to train."""

    def __init__(
        self, adapter: LanguageAdapter, standardiser: Standardiser, objective: DistillationConfig, lookup: Lookup
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.standardiser = standardiser
        self.objective = objective
        self.lookup = lookup

    def step(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Named loss terms of one batch."""
        states, mask, teacher = (part.to(self.device) for part in self.lookup(indices))
        student = self.adapter(states.float(), mask)
        return distillation_terms(student, teacher.float(), self.objective, standardiser=self.standardiser)

    @property
    def device(self) -> torch.device:
        return self.adapter.input_mean.device

    @torch.no_grad()
    def features(self, states: Tensor, mask: Tensor) -> np.ndarray:
        """The adapter's features (B, D) of one batch."""
        return self.adapter(states.to(self.device).float(), mask.to(self.device)).float().cpu().numpy()
