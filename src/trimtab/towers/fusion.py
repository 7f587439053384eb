"""FLAVA (Singh et al., arXiv 2112.04482) as a fusion base: what its fusion transformer reads, and running it.

FLAVA fuses the hidden states of both towers from *before* their final LayerNorm. A language link replaces the
text side: it learns `teacher_sequence`'s space, and `fuse` runs the frozen fusion transformer on its output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import ModelError

if TYPE_CHECKING:
    from transformers import FlavaModel


def teacher_sequence(model: FlavaModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Text states that FLAVA fuses, from before the final LayerNorm.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T), 1 for real tokens.

    Returns:
        (B, T, H) with H the text tower's width; [:, 0] is the CLS token.
    """
    output = model.text_model(
        input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, return_dict=True
    )
    return output.hidden_states[-1]


def image_sequence(model: FlavaModel, pixel_values: Tensor) -> Tensor:
    """Image states that FLAVA fuses, from before the final LayerNorm: (B, 1 + patches, width)."""
    output = model.image_model(pixel_values=pixel_values, output_hidden_states=True, return_dict=True)
    return output.hidden_states[-1]


def fuse(model: FlavaModel, text_states: Tensor, text_mask: Tensor | None, image_states: Tensor) -> Tensor:
    """Run the fusion transformer on the states of both sides; gradients reach the text states.

    Args:
        text_states: (B, M, H) in the space of `teacher_sequence`; M need not be a tokenizer's length.
        text_mask: (B, M), true for states that count; None for all.
        image_states: (B, P, width) from `image_sequence`.

    Returns:
        (B, 1 + P + M, fused width): the fusion CLS token (where the model has one), image, text.

    Raises:
        ModelError: the text states have another width than the text tower.
    """
    width = model.text_to_mm_projection.in_features
    if text_states.shape[-1] != width:
        raise ModelError(f"text states are {text_states.shape[-1]} wide; the fusion transformer takes {width}")
    image = model.image_to_mm_projection(image_states)  # (B, P, fused)
    text = model.text_to_mm_projection(text_states)  # (B, M, fused)
    mask = None
    if text_mask is not None:
        seen = image.shape[1] + int(model.multimodal_model.use_cls_token)
        ones = torch.ones(len(image), seen, device=image.device)
        mask = torch.cat([ones, text_mask.to(ones)], dim=1)  # (B, 1 + P + M)
    fused = model.multimodal_model(torch.cat([image, text], dim=1), attention_mask=mask, return_dict=True)
    return fused.last_hidden_state
