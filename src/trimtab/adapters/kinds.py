"""The kinds of adapters that sit beside a frozen layer or block.

Up starts at zero, so a new adapter changes nothing (Houlsby et al., arXiv 1902.00751; in parallel to the layer as
in AdaptFormer, Chen et al., arXiv 2205.13535).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.adapters.language import Layer
from trimtab.config import DomainAdapterConfig
from trimtab.towers.efficientnet import SamePadConv
from trimtab.towers.layers import PartName, Site

_FEEDFORWARD = 4  # inner width of a Transformer layer's feed-forward block, as a multiple of its width


class Bottleneck(nn.Module):
    """Norm, Down, GELU, Up on each token by itself."""

    def __init__(self, config: DomainAdapterConfig, site: Site) -> None:
        super().__init__()
        # Towers differ in the scale of their states; normalised, a learning rate means the same for all.
        self.norm = nn.LayerNorm(site.width_in)
        self.down = nn.Linear(site.width_in, config.width)
        self.up = _zeroed(nn.Linear(config.width, site.width_out))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (B, T, D), (B, T) -> (B, T, D)
        return self.up(F.gelu(self.down(self.norm(x))))


class NarrowTransformer(nn.Module):
    """Norm, Down, Transformer layers on the narrow width, Up.

    Tokens attend to real tokens only. In a causal tower each attends to itself and those before it, as in the
    tower: what comes after a prefix never changes the prefix.
    """

    def __init__(self, config: DomainAdapterConfig, site: Site) -> None:
        super().__init__()
        self.causal = site.causal
        self.norm = nn.LayerNorm(site.width_in)
        self.down = nn.Linear(site.width_in, config.width)
        self.layers = nn.ModuleList(
            Layer(config.width, config.heads, _FEEDFORWARD * config.width, dropout=0.0) for _ in range(config.layers)
        )
        self.last_norm = nn.LayerNorm(config.width)
        self.up = _zeroed(nn.Linear(config.width, site.width_out))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (B, T, D), (B, T) -> (B, T, D)
        visible = self._visible(x, mask)
        x = self.down(self.norm(x))  # (B, T, W)
        for layer in self.layers:
            x = layer(x, visible)
        return self.up(self.last_norm(x))

    def _visible(self, x: Tensor, mask: Tensor | None) -> Tensor:  # -> (B or 1, 1, T or 1, T)
        tokens = x.shape[1]
        visible = torch.ones(1, tokens, device=x.device) if mask is None else mask.to(x.device)
        visible = visible.bool()[:, None, None, :]
        if self.causal:
            square = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device)
            # Padding at the start sees nothing but itself; without that its softmax would be NaN.
            visible = (visible & square.tril()) | torch.eye(tokens, dtype=torch.bool, device=x.device)
        return visible


class PictureNorm(nn.GroupNorm):
    """Norm over one picture, in any memory layout.

    PyTorch's own kernel crashes on a CPU in the backward pass of maps in channels_last that need no gradient, which
    is what enters the first adapter above a cache. That of layer norm does not, and is faster than mean and variance
    by themselves; a trace has no numbers to give it for the shape.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> the same
        x = x.float()
        if x.is_contiguous(memory_format=torch.channels_last) and not torch.jit.is_tracing():
            x = x.permute(0, 2, 3, 1)  # as it lies in memory
            x = F.layer_norm(x, x.shape[1:], eps=self.eps)
            return (x * self.weight + self.bias).permute(0, 3, 1, 2)
        variance, mean = torch.var_mean(x, dim=(1, 2, 3), keepdim=True, correction=0)
        x = (x - mean) * (variance + self.eps).rsqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class ConvBottleneck(nn.Module):
    """Norm, 1x1 down, depthwise 3x3 with the block's stride, GELU, 1x1 up (after Conv-Adapter, arXiv 2208.07463).

    The padding is TensorFlow's, so that its grid lies on that of the trunk's blocks. The norm is over one picture:
    no statistics are kept that training would change.
    """

    def __init__(self, config: DomainAdapterConfig, site: Site) -> None:
        super().__init__()
        self.norm = PictureNorm(1, site.width_in)
        self.down = nn.Conv2d(site.width_in, config.width, 1)
        self.depthwise = SamePadConv(config.width, config.width, 3, site.stride, groups=config.width)
        self.up = _zeroed(nn.Conv2d(config.width, site.width_out, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (B, C, H, W) -> (B, C', H / s, W / s)
        return self.up(F.gelu(self.depthwise(self.down(self.norm(x)))))


def _zeroed(layer: Any) -> Any:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# What each kind sits beside, and what builds it.
KINDS: dict[str, tuple[PartName, Callable[[DomainAdapterConfig, Site], nn.Module]]] = {
    "bottleneck": ("layers", Bottleneck),
    "transformer": ("layers", NarrowTransformer),
    "conv": ("blocks", ConvBottleneck),
}
