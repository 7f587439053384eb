"""The contrastive objective of image-text pairs: tensors in, named terms out.

Symmetric InfoNCE (Radford et al. 2021, arXiv 2103.00020) with several positives: an image may have several
captions and a caption several images, and none of them is a negative. The texts of a batch are unique, so each
caption passes through its tower once however many images it has.

Of the two ways to write several positives, the mean of their log-probabilities is taken and not the logarithm of
their summed probability (``L_out`` and ``L_in`` of Khosla et al. 2020, arXiv 2004.11362, who find the former better
and train with it; so does UniCL, Yang et al. 2022, arXiv 2204.03610). The gradient tells why: the summed form is
content when the easiest positive is found and leaves the others alone, which are the pairs that hard sampling is
for; the mean asks for every positive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from trimtab.config import ContrastiveConfig


def contrastive_terms(
    image_features: Tensor,
    text_features: Tensor,
    positives: Tensor,
    logit_scale: Tensor | float,
    config: ContrastiveConfig,
    *,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms that `config` gives a weight above 0, each already multiplied by it; all in float32.

    With P the positives, p the softmax over candidates and w the weights (all one by default):

    - ``i2t``: image b loses ``l_b = -mean over t in P(b) of log p(t | b)``, among all texts; the term is
      ``sum w_b l_b / sum w_b``.
    - ``t2i``: text t loses ``l_t = -sum over b in P(t) of w_b log p(b | t) / sum over b in P(t) of w_b``, among all
      images, and weighs ``v_t``, the mean weight of its images; the term is ``sum v_t l_t / sum v_t``. Texts
      without an image count in ``i2t`` alone: that is how hard negatives are given.

    So weights are divided by their mean in the batch: only their ratios matter, and a batch of many heavy pairs
    takes no larger step. Several positives of one candidate share its probability, so perfect features score the
    logarithm of their number, not 0. A bias on all logits, such as SigLIP's, would cancel and is not asked for.

    With several processes the features are those of the global batch; see `training.distributed.gather_rows`.

    Args:
        image_features: (B, D) with gradient.
        text_features: (T, D) of different texts, with gradient.
        positives: (B,) the text of each image, or (B, T) which texts belong to an image.
        logit_scale: multiplies cosines; a tensor with gradient where it is learned.
        weights: (B,) instance weights of the images' pairs, at least 0.

    Raises:
        ValueError: an image without a text, or shapes that do not fit.
    """
    count, texts = len(image_features), len(text_features)
    if positives.ndim == 1:
        positives = positives[:, None] == torch.arange(texts, device=positives.device)
    if positives.shape != (count, texts):
        raise ValueError(f"positives {tuple(positives.shape)} must be ({count},) or ({count}, {texts})")
    if not bool(positives.any(1).all()):
        raise ValueError("every image of a batch needs a text among text_features")
    with torch.autocast(image_features.device.type, enabled=False):
        images = F.normalize(image_features.float(), dim=-1)  # (B, D)
        captions = F.normalize(text_features.float(), dim=-1)  # (T, D)
        logits = logit_scale * images @ captions.T  # (B, T)
        weight = torch.ones_like(logits[:, 0]) if weights is None else weights.detach().to(logits)  # (B,)
        terms: dict[str, Tensor] = {}
        if config.image_to_text > 0:
            targets = positives.float()  # (B, T)
            loss = _cross_entropy(logits, targets, weight, config.label_smoothing)
            terms["i2t"] = config.image_to_text * loss
        if config.text_to_image > 0:
            with_image = positives.any(0)  # (T,)
            targets = positives.T[with_image] * weight  # (T', B)
            of_texts = targets.sum(1) / positives.T[with_image].sum(1)  # (T',)
            loss = _cross_entropy(logits.T[with_image], targets, of_texts, config.label_smoothing)
            terms["t2i"] = config.text_to_image * loss
    return terms


def unique_rows(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The different numbers in ascending order (T,) and the first row of each (T,).

    ``ids, first = unique_rows(caption_ids); features = features[first]`` leaves one row per caption. Where ranks
    encoded the same caption twice, the features are equal, so the gradient is that of encoding it once.
    """
    unique, inverse = numbers.unique(return_inverse=True)
    rows = torch.arange(len(numbers), device=numbers.device)
    return unique, torch.full_like(unique, len(numbers)).scatter_reduce(0, inverse, rows, "amin")


def _cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Weighted mean over rows; targets (N, M) are scaled to sum to one. A row of weight 0 may have none."""
    tiny = torch.finfo(logits.dtype).tiny
    targets = targets / targets.sum(1, keepdim=True).clamp_min(tiny)
    rows = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)  # (N,)
    return (rows * weights).sum() / weights.sum().clamp_min(tiny)
