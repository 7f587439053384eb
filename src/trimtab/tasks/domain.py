"""The domain link's training step: states of images and captions in, contrastive terms out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.config import LARGEST_SCALE, ContrastiveConfig
from trimtab.objectives.contrastive import contrastive_terms, unique_rows
from trimtab.objectives.memory_bank import MemoryBank
from trimtab.precision import slow_in_bf16
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.layers import TowerCut, TowerName

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Numbers of the pairs (B,), of the view of each pair's picture (B,), and (B, K) what its map's view is made of."""


class Lookup(Protocol):
    """Where a half-computed tower goes on: what `TowerCut.upper` takes, or what a whole tower takes."""

    def __call__(self, items: np.ndarray, views: np.ndarray, numbers: np.ndarray | None = None) -> dict[str, Tensor]:
        """Tensors of the items (B,), each in one of its views (B,); texts have but one.

        With `numbers` (B, K) cached maps are changed further, as `trimtab.towers.map_views` does.
        """


@dataclass(frozen=True, eq=False)
class Side:
    """One tower in training.

    Attributes:
        base: the tower runs here; what is trained is attached to it or part of it.
        cut: below it everything is frozen and cached; None passes whole inputs through the whole tower.
        lookup: gives what comes in from below.
        tokens: of texts, the token tensors that go with their states.
        head: applied to the features (B, D) of a tower that is cached whole.
    """

    base: DualEncoder
    tower: TowerName
    cut: TowerCut | None
    lookup: Lookup
    tokens: Callable[[np.ndarray], dict[str, Tensor]] | None = None
    head: nn.Module | None = None

    def features(self, items: np.ndarray, views: np.ndarray | None = None, numbers: np.ndarray | None = None) -> Tensor:
        """Features (B, D) of images or captions (B,); without `views` of the pictures themselves.

        Args:
            numbers: for the lookup.
        """
        below = self.lookup(items, np.zeros_like(items) if views is None else views, numbers)
        return self.upper(below, self.tokens(items) if self.tokens else None)

    def upper(self, below: dict[str, Tensor], tokens: dict[str, Tensor] | None) -> Tensor:
        """Features (B, D) from what comes in from below."""
        # Depthwise convolutions in bf16 are many times slower on a CPU than in fp32.
        with torch.autocast("cpu", enabled=False) if self._in_fp32 else contextlib.nullcontext():
            if self.cut is None:
                whole = self.base.pixel_features if self.tower == "image" else self.base.token_features
                return whole(below)
            features = self.cut.upper(below, tokens)
            return self.head(features.float()) if self.head else features

    @cached_property
    def _in_fp32(self) -> bool:
        site = self.cut.site if self.cut else None
        if self.tower == "text" or (self.cut and not site):
            return False
        return slow_in_bf16(
            self.base.model, self.base.device, self.base.model.get_submodule(site.path) if site else None
        )


class DomainTask(nn.Module):
    """What is trained (adapters, or the base's own weights), the objective over it and the memory bank.

    Args:
        trained: modules whose parameters that require gradients are trained and saved.
        belong: images (B,), captions (T,) -> (B, T), which are pairs anywhere in the data.
        image_of, caption_of: (N,) image and caption of each pair.
        logit_scale: to start from.
        largest_scale: bound of one that is learned.
        gather: rows of all ranks with gradient; see `trimtab.training.distributed.gather_rows`.
    """

    def __init__(
        self,
        trained: nn.Module,
        *,
        image: Side,
        text: Side,
        image_of: np.ndarray,
        caption_of: np.ndarray,
        belong: Callable[[np.ndarray, np.ndarray], np.ndarray],
        objective: ContrastiveConfig,
        bank: MemoryBank,
        logit_scale: float,
        largest_scale: float = LARGEST_SCALE,
        gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> None:
        super().__init__()
        self.trained = trained
        self.image, self.text = image, text
        self.image_of, self.caption_of = image_of, caption_of
        self.belong = belong
        self.objective = objective
        self.bank = bank
        self.gather = gather
        self.largest_scale = largest_scale
        self.log_scale = nn.Parameter(torch.tensor(logit_scale).log(), requires_grad=objective.learn_logit_scale)

    @property
    def logit_scale(self) -> Tensor:
        """The scale that multiplies cosines, with gradient if it is learned."""
        self._keep_scale()
        return self.log_scale.exp()

    def _keep_scale(self) -> None:
        # A bound on what is computed of it would have no gradient, and CLIP's checkpoints begin at the bound.
        if self.log_scale.requires_grad:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.largest_scale))

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Named loss terms of one batch; each caption passes through the text tower once."""
        pairs, views, of_maps = batch
        captions = np.unique(self.caption_of[pairs])
        images = self.gather(self.image.features(self.image_of[pairs], views, of_maps))  # (B, D)
        texts = self.gather(self.text.features(captions))  # (T, D)
        device = images.device
        rows = self.gather(torch.as_tensor(pairs, device=device))
        numbers, first = unique_rows(self.gather(torch.as_tensor(captions, device=device)))
        texts = texts[first]
        self.bank.update(rows, images.detach(), numbers, texts.detach())
        if self.objective.hard_negatives and self.bank.config.enabled:
            hard = self.bank.hard_negatives(rows, self.objective.hard_negatives)
            if len(hard):
                texts = torch.cat([texts, self.text.features(hard.cpu().numpy())])
                numbers = torch.cat([numbers, hard])
        positives = self.belong(self.image_of[rows.cpu().numpy()], numbers.cpu().numpy())
        return contrastive_terms(
            images,
            texts,
            torch.as_tensor(positives, device=device),
            self.logit_scale,
            self.objective,
            weights=self.bank.weights(rows),
        )
