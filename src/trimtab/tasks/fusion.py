"""The language link on a fusion model: a batch of cached states to named loss terms.

Two kinds of term, neither of which pairs up positions of two languages:

- ``pooled_*``: the summaries that do correspond, CLS and the mean of the other states, by distillation.
- ``fused_*``: the sequence as the frozen fusion transformer reads it. The teacher's states and the resampled ones
  are each fused with the same image; the outputs are compared where both have the same position, at the fusion's
  own CLS token and at the image tokens. Their error is in units of the variance that texts cause there: an output
  that knows the image but of the text only the average scores about 1.

The images are probes: they need not belong to the texts, which stay the only supervision, but they should look like
those of the use to come, because FLAVA's fusion never saw text without an image. Without any (and with
``fused_image`` 0) text is fused alone, which is defined but further from what the fusion was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.adapters.resampler import FusionAdapter, summaries
from trimtab.config import DistillationConfig
from trimtab.errors import RecipeError
from trimtab.objectives.distillation import Standardiser, distillation_terms
from trimtab.towers.fusion import fuse

if TYPE_CHECKING:
    from transformers import FlavaModel


@dataclass(frozen=True)
class FusionObjective:
    """Weights of the terms; a term of weight 0 is not computed.

    Attributes:
        pooled: distillation of the two summaries.
        fused_cls: error at the fusion's CLS token.
        fused_image: mean error over the image tokens; it needs images in every batch.
    """

    pooled: DistillationConfig = field(default_factory=DistillationConfig)
    fused_cls: float = 1.0
    fused_image: float = 1.0

    def __post_init__(self) -> None:
        for name in ("fused_cls", "fused_image"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"{name}={getattr(self, name)!r} must be at least 0")


class FusionTask:
    """Loss terms of a `FusionAdapter` under a frozen FLAVA; call it as the step of `trimtab.training.train`.

    A batch is a dict of tensors of one length B, all of them of frozen models and so fit for a cache:

    - ``states`` (B, T, S), ``mask`` (B, T) bool: the student's token states of the target-language texts;
    - ``teacher`` (B, L, H), ``teacher_mask`` (B, L) bool: `teacher_sequence` of their English translations;
    - ``images`` (B, P, width), optional: `image_sequence` of any images;
    - ``weights`` (B,), optional: instance weights that average one.

    Args:
        standardiser: of the teacher's summaries, (2H,).
        cls_variance, image_variance: squared distance that texts cause at the fusion's CLS and at an image token;
            `measured` finds all three.

    Raises:
        RecipeError: ``fused_cls`` for a fusion transformer that has no CLS token.
    """

    def __init__(
        self,
        model: FlavaModel,
        adapter: FusionAdapter,
        objective: FusionObjective,
        *,
        standardiser: Standardiser,
        cls_variance: float = 1.0,
        image_variance: float = 1.0,
    ) -> None:
        if objective.fused_cls > 0 and not model.multimodal_model.use_cls_token:
            raise RecipeError("this fusion transformer has no CLS token: set fused_cls=0")
        self.model = model
        self.adapter = adapter
        self.objective = objective
        self.standardiser = standardiser.to(next(model.parameters()).device)
        self.variances = {"fused_cls": cls_variance, "fused_image": image_variance}

    @classmethod
    @torch.no_grad()
    def measured(
        cls, model: FlavaModel, adapter: FusionAdapter, objective: FusionObjective, sample: Mapping[str, Tensor]
    ) -> FusionTask:
        """A task whose units are measured on a sample: a batch of two or more different texts.

        Raises:
            RecipeError: the sample has fewer than two texts.
        """
        teacher, mask = sample["teacher"], sample["teacher_mask"]
        if len(teacher) < 2:
            raise RecipeError(f"a sample of {len(teacher)} texts has no variance: give at least 2")
        pooled = summaries(teacher.float(), mask)
        task = cls(model, adapter, objective, standardiser=Standardiser.fit(pooled))
        here = task._read(teacher, mask, sample.get("images"))
        other = task._read(teacher.roll(1, 0), mask.roll(1, 0), sample.get("images"))  # same image, another text
        for name, output in here.items():
            # Two draws differ by twice the variance.
            task.variances[name] = max(_error(output, other[name]).mean().item() / 2, 1e-12)
        return task

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named terms, each already multiplied by its weight."""
        weights = batch.get("weights")
        teacher, teacher_mask = batch["teacher"], batch["teacher_mask"]
        pooled, sequence, counted = self.adapter(batch["states"], batch["mask"])
        target = summaries(teacher.float(), teacher_mask)
        named = distillation_terms(
            pooled, target, self.objective.pooled, standardiser=self.standardiser, weights=weights
        )
        terms = {f"pooled_{name}": term for name, term in named.items()}

        with torch.no_grad():
            wanted = self._read(teacher, teacher_mask, batch.get("images"))
        if wanted:
            given = self._read(sequence, counted, batch.get("images"))
            for name, output in given.items():
                rows = _error(output, wanted[name]) / self.variances[name]  # (B,)
                rows = rows if weights is None else rows * weights
                terms[name] = getattr(self.objective, name) * rows.mean()
        return terms

    def _read(self, text: Tensor, mask: Tensor, images: Tensor | None) -> dict[str, Tensor]:
        """The fusion's outputs that are compared: CLS (B, 1, F) and image tokens (B, P, F)."""
        names = [name for name in ("fused_cls", "fused_image") if getattr(self.objective, name) > 0]
        if not names:
            return {}
        if images is None:
            if "fused_image" in names:
                raise RecipeError("fused_image needs images in every batch: add probe images, or set fused_image=0")
            images = text.new_zeros(len(text), 0, self.model.image_to_mm_projection.in_features)
        dtype = self.model.text_to_mm_projection.weight.dtype
        fused = fuse(self.model, text.to(dtype), mask, images.to(dtype))
        first = int(self.model.multimodal_model.use_cls_token)
        parts = {"fused_cls": fused[:, :first], "fused_image": fused[:, first : first + images.shape[1]]}
        return {name: parts[name].float() for name in names}


def _error(a: Tensor, b: Tensor) -> Tensor:  # (B, N, F), (B, N, F) -> (B,)
    """Squared distance per position, mean over positions."""
    return (a - b).square().sum(dim=-1).mean(dim=-1)
