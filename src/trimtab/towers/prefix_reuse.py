"""Prompts of many classes that begin alike, through a causal text tower: the common beginning runs once.

In a causal tower no token sees those after it. So the states of [start][learned tokens] are the same for every class
of an image: their keys and values are computed once per image, and only the tokens from the class name on run per
class. This is exact, not an approximation. It needs a pass of its own over the modules of the family's layers, since
attention must take keys and values from two places; equality with the plain pass is tested.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.layers import tower_module
from trimtab.towers.prompting import PromptLayout, PromptTower, passes, put

_PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "layer_norm1",
    "layer_norm2",
    "mlp",
)


def can_reuse(tower: PromptTower) -> bool:
    """Whether the tower is causal, made of layers whose modules are known, and nothing is attached to it."""
    if not tower.causal or type(tower.base).token_features is not DualEncoder.token_features or tower.padded_left:
        return False
    module: Any = tower_module(tower.base, "text")
    layer = module.encoder.layers[0]
    hooked = any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())
    return not hooked and all(_has(layer, name) for name in _PARTS) and hasattr(tower.base.model, "text_projection")


def reused_features(
    tower: PromptTower, layout: PromptLayout, prompt: Tensor, chosen: Tensor | None = None, extra: Tensor | None = None
) -> Tensor:
    """Features of prompts by image and class, as `PromptTower.features` gives them row by row.

    Args:
        layout: of C classes.
        prompt: (B, P, W) learned tokens of each image.
        chosen: (B, k) classes of each image; None for all C.
        extra: (C, E, W) class-specific tokens.

    Returns:
        (B, k or C, D).
    """
    text: Any = tower_module(tower.base, "text")
    layers = text.encoder.layers
    start = int(layout.name_at[0])  # rows are padded on the right, so it is that of all
    length = layout.length - start
    positions = text.embeddings.position_embedding.weight[: layout.length]
    states = layout.states if extra is None else put(layout.states, layout.extra_at, extra)
    endings = (states[:, start:] + positions[start:]).to(tower.base.dtype)  # (C, Ts, W)
    ends = layout.end_at - start
    begin = states[:1, :start].expand(len(prompt), -1, -1)
    begin = put(begin, layout.prompt_at[:1].expand(len(prompt), -1), prompt) + positions[:start]
    kept = _prefix(begin.to(tower.base.dtype), layers)
    chosen = torch.arange(len(layout), device=tower.device).expand(len(prompt), -1) if chosen is None else chosen

    def run(job: tuple[slice, slice]) -> Tensor:
        images, some = job
        classes = chosen[images, some]  # (b, k)
        x = endings[classes]  # (b, k, Ts, W)
        for layer, (keys, values) in zip(layers, kept, strict=True):
            x = _ending(layer, x, keys[images], values[images])
        x = x.gather(2, ends[classes][:, :, None, None].expand(-1, -1, 1, x.shape[3]))[:, :, 0]
        return tower.base.model.text_projection(text.final_layer_norm(x))  # (b, k, D)

    of_classes = tower.spans(chosen.shape[1], length)
    size = of_classes[0].stop
    of_images = tower.spans(len(prompt), length * size)
    jobs = [(images, some) for images in of_images for some in of_classes]
    parts = passes(run, jobs)
    wide = len(of_classes)
    return torch.cat([torch.cat(parts[at : at + wide], dim=1) for at in range(0, len(parts), wide)])


def _prefix(x: Tensor, layers: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (B, heads, Tp, d) of the common beginning (B, Tp, W) in every layer."""
    kept = []
    for at, layer in enumerate(layers):
        q, k, v = _heads(layer, layer.layer_norm1(x))
        kept.append((k, v))
        if at + 1 < len(layers):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = _rest(layer, x, attended.transpose(1, 2).flatten(2))
    return kept


def _ending(layer: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One layer of endings (b, k, Ts, W) that see the beginning of their image, and themselves up to each token."""
    b, k, length, _ = x.shape
    q, own_keys, own_values = _heads(layer, layer.layer_norm1(x))  # (b, k, heads, Ts, d)
    heads, depth = q.shape[2], q.shape[4]
    # The endings of one image stand side by side as queries, so that its beginning need not be copied for each.
    beside = q.transpose(1, 2).reshape(b, heads, k * length, depth)
    to_prefix = (beside @ keys.transpose(-1, -2)).view(b, heads, k, length, -1).transpose(1, 2)  # (b, k, h, Ts, Tp)
    to_own = q @ own_keys.transpose(-1, -2)  # (b, k, h, Ts, Ts)
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    to_own = to_own.masked_fill(later, torch.finfo(to_own.dtype).min)
    weights = (torch.cat([to_prefix, to_own], dim=-1) / math.sqrt(depth)).softmax(dim=-1)
    on_prefix, on_own = weights.split([keys.shape[2], length], dim=-1)
    seen = on_prefix.transpose(1, 2).reshape(b, heads, k * length, -1) @ values
    seen = seen.view(b, heads, k, length, depth).transpose(1, 2) + on_own @ own_values
    return _rest(layer, x, seen.transpose(2, 3).flatten(3))


def _heads(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (..., heads, T, d) of states (..., T, W)."""
    attention = layer.self_attn
    shape = (*x.shape[:-1], attention.num_heads, -1)
    q, k, v = (
        project(x).view(shape).transpose(-2, -3) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return q, k, v


def _rest(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """What a layer does with the result of its attention, (..., T, W) both."""
    x = x + layer.self_attn.out_proj(attended)
    return x + layer.mlp(layer.layer_norm2(x))


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
