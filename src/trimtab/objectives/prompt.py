"""Terms of the prompt link: tensors in, named terms out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.config import PromptObjective


def prompt_terms(
    logits: Tensor,
    labels: Tensor,
    config: PromptObjective,
    *,
    classes: Tensor,
    templates: Tensor,
    frozen: Tensor,
    vectors: Sequence[Tensor] = (),
    penalty: float = 0.0,
) -> dict[str, Tensor]:
    """Named loss terms, weighted, their mean over the batch, in float32; a term of weight 0 is not computed.

    Args:
        logits: (B, C).
        labels: (B,) class of each picture.
        classes: (n, D) unit embeddings by General and Domain tokens, of the classes that got a gradient.
        templates: (n, D) unit embeddings of the same classes by hand templates, frozen.
        frozen: (B, C) logits of the hand templates.
        vectors: (C, any) vectors of classes that add to what names say.
        penalty: weight of their mean squared length.
    """
    terms = {"cross_entropy": F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)}
    if config.template:
        terms["template"] = config.template * template_distance(classes, templates)
    if config.separation:
        with torch.autocast(classes.device.type, enabled=False):  # cosines in bf16 would be too coarse
            terms["separation"] = config.separation * separation(classes, templates)
    if config.frozen:
        terms["frozen"] = config.frozen * divergence(logits, frozen)
    if penalty and vectors:
        lengths = [one.square().sum(dim=1).mean() for one in vectors]
        terms["residual"] = penalty * torch.stack(lengths).sum()
    return terms


def template_distance(classes: Tensor, templates: Tensor) -> Tensor:
    """Mean of 1 - cosine between class embeddings (n, D) and those of hand templates (KgCoOp: arXiv 2303.13283)."""
    return (1 - (classes * templates).sum(dim=1)).mean()


def separation(classes: Tensor, templates: Tensor) -> Tensor:
    """How much nearer classes (n, D) have come to each other than hand templates put them: mean squared excess."""
    if len(classes) < 2:
        return classes.sum() * 0
    excess = (classes @ classes.T - templates @ templates.T).clamp_min(0)
    off = ~torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    return excess[off].square().mean()


def divergence(logits: Tensor, frozen: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the prediction (B, C) from the frozen one, as a mean over pictures.

    PromptSRC (arXiv 2307.06948) ties predictions to the frozen model by such a term.
    """
    return F.kl_div(logits.log_softmax(dim=1), frozen.log_softmax(dim=1), reduction="batchmean", log_target=True)
