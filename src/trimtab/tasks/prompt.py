"""The prompt link's training step: cached features of pictures in, named terms out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.adapters.prompt import Pictures, PromptedClasses
from trimtab.config import PromptObjective
from trimtab.objectives.prompt import prompt_terms

Batch = tuple[np.ndarray, np.ndarray]
"""Positions of pictures (B,) and a view of each (B,)."""


class PromptTask(nn.Module):
    """Prompted classes and the objective over them.

    Args:
        classes: holds what is trained.
        lookup: features of pictures, each in one of its views.
        labels: (N,) class of each picture.
        templates: (C, D) unit class embeddings by hand templates.
        logit_scale: multiplies scores.

    Attributes:
        penalty: weight of the mean squared length of class vectors.
    """

    stale: Tensor
    templates: Tensor
    labels: Tensor

    def __init__(
        self,
        classes: PromptedClasses,
        *,
        lookup: Callable[[np.ndarray, np.ndarray], Pictures],
        labels: np.ndarray,
        templates: Tensor,
        objective: PromptObjective,
        logit_scale: float,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.lookup = lookup
        self.objective = objective
        self.logit_scale = logit_scale
        self.penalty = objective.residual or 0.0
        self.register_buffer("labels", torch.from_numpy(labels), persistent=False)
        self.register_buffer("templates", templates, persistent=False)
        # Class embeddings as they were when last computed.
        with torch.no_grad():
            self.register_buffer("stale", classes.embeddings())

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Named loss terms of one batch."""
        items, views = batch
        pictures = self.lookup(items, views)
        labels = self.labels[torch.as_tensor(items, device=self.labels.device)]
        fresh = self._fresh(labels)
        computed = self.classes.embeddings(fresh)  # (n, D)
        if fresh is None:
            embeddings, templates = computed, self.templates
        else:
            embeddings, templates = self.stale.index_copy(0, fresh, computed), self.templates[fresh]
        self.stale.copy_(embeddings.detach())
        with torch.autocast(labels.device.type, enabled=False):  # cosines in bf16 would be too coarse
            frozen = self.logit_scale * pictures.embeddings @ self.templates.T
        return prompt_terms(
            self.logit_scale * self.classes.scores(pictures, embeddings, labels),
            labels,
            self.objective,
            classes=computed,
            templates=templates,
            frozen=frozen,
            vectors=self.classes.prompt.vectors(),
            penalty=self.penalty,
        )

    def _fresh(self, labels: Tensor) -> Tensor | None:
        """Classes to compute with gradient, (n,): those of the batch and some others; None for all."""
        wanted = self.objective.classes_per_step
        if wanted is None or wanted >= len(self.classes):
            return None
        order = torch.randperm(len(self.classes)).to(labels.device)
        present = torch.zeros(len(self.classes), dtype=torch.bool, device=labels.device)
        present[labels] = True
        # Those of the batch first; the sort keeps the random order within both kinds.
        order = order[torch.argsort(~present[order], stable=True)]
        return order[:wanted]

    @torch.no_grad()
    def logits(self, pictures: Pictures, embeddings: Tensor | None = None) -> Tensor:
        """Logits (B, C) of pictures; with `embeddings` None class embeddings are computed for it."""
        if embeddings is None:
            embeddings = self.classes.embeddings()
        return self.logit_scale * self.classes.scores(pictures, embeddings)
