"""CLIP's residual image towers (Radford et al., arXiv 2103.00020, section 2.4) as a transformers model.

transformers has none of them. Beside CLIP's text tower they make an ordinary `VisionTextDualEncoderModel`, so that
whatever works for that works for RN50 and its larger kin; `trimtab convert` makes such a folder of a checkpoint.

`trimtab export --format merged` copies this file and `efficientnet.py` into the folder that it writes. So they import
torch, transformers and each other alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trimtab.towers.efficientnet import channels_last

EXPANSION = 4  # channels that leave a block, as a multiple of those within
SHRINKS = 32  # by which a picture's side is larger than its last map's


class ClipResNetVisionConfig(PretrainedConfig):
    """Sizes of the image tower; those of RN50 by default.

    Args:
        hidden_size: width of `pooler_output`, that of the shared space.
        depths: blocks in each of the stages.
        width: channels that leave the stem.
        num_attention_heads: of the pooling.
    """

    model_type = "trimtab_clip_resnet"

    def __init__(
        self,
        hidden_size: int = 1024,
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        num_attention_heads: int = 32,
        image_size: int = 224,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.depths = list(depths)
        self.width = width
        self.num_attention_heads = num_attention_heads
        self.image_size = image_size


class ResidualBlock(nn.Module):
    """1x1, 3x3, 1x1 beside a shortcut; where it shrinks the map, both average rather than skip places."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shrink = nn.AvgPool2d(stride)
        self.conv3 = nn.Conv2d(channels, EXPANSION * channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(EXPANSION * channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels_in != EXPANSION * channels:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride),
                nn.Conv2d(channels_in, EXPANSION * channels, 1, bias=False),
                nn.BatchNorm2d(EXPANSION * channels),
            )

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H / s, W / s)
        inner = F.relu(self.norm1(self.conv1(x)))
        inner = self.shrink(F.relu(self.norm2(self.conv2(inner))))
        return F.relu(self.norm3(self.conv3(inner)) + self.shortcut(x))


class AttentionPool(nn.Module):
    """The mean of the map's places attends to itself and to all of them."""

    def __init__(self, side: int, channels: int, heads: int, dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(side * side + 1, channels) * channels**-0.5)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, dim)

    def tokens(self, feature_map: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 1 + H * W, C)
        places = feature_map.flatten(2).transpose(1, 2)
        return torch.cat([places.mean(dim=1, keepdim=True), places], dim=1) + self.positions

    def forward(self, tokens: Tensor) -> Tensor:  # (B, 1 + N, C) -> (B, D)
        query, key, value = self.query(tokens[:, :1]), self.key(tokens), self.value(tokens)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        pooled = F.scaled_dot_product_attention(query, key, value)  # (B, heads, 1, C / heads)
        return self.output(pooled.transpose(1, 2).flatten(1))


class ClipResNetVisionModel(PreTrainedModel):
    """Stem, residual blocks, pooling by attention into the shared space."""

    config_class = ClipResNetVisionConfig
    base_model_prefix = "clip_resnet"
    main_input_name = "pixel_values"
    _no_split_modules = ["ResidualBlock", "AttentionPool"]  # noqa: RUF012 - transformers declares it so

    def __init__(self, config: ClipResNetVisionConfig) -> None:
        super().__init__(config)
        half = config.width // 2
        self.stem = nn.Sequential(
            *_convolution(3, half, stride=2), *_convolution(half, half), *_convolution(half, config.width),
            nn.AvgPool2d(2),
        )  # fmt: skip
        self.blocks = nn.ModuleList()
        channels_in = config.width
        for stage, depth in enumerate(config.depths):
            channels = config.width * 2**stage
            for number in range(depth):
                self.blocks.append(ResidualBlock(channels_in, channels, 2 if stage and number == 0 else 1))
                channels_in = EXPANSION * channels
        side = config.image_size // SHRINKS
        self.pool = AttentionPool(side, channels_in, config.num_attention_heads, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every module initialises itself, and loading fills all of them."""

    def lower(self, pixel_values: Tensor, part: Literal["blocks", "layers"], index: int) -> dict[str, Tensor]:
        """Run the tower up to a block: ``states`` (B, C, H, W) that enter it, for `upper`."""
        assert part == "blocks", "there are no Transformer layers"
        x = self.stem(channels_last(pixel_values))
        for block in self.blocks[:index]:
            x = block(x)
        return {"states": x}

    def upper(self, below: dict[str, Tensor], part: Literal["blocks", "layers"], index: int) -> Tensor:
        """Run the rest of the tower on what `lower` gave, to `pooler_output` (B, D)."""
        assert part == "blocks", "there are no Transformer layers"
        return self.pool(self._tokens(channels_last(below["states"]), index))

    def _tokens(self, x: Tensor, index: int = 0) -> Tensor:  # what enters block `index` -> (B, 1 + N, C)
        for block in self.blocks[index:]:
            x = block(x)
        return self.pool.tokens(x)

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None, **_: Any
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        tokens = self._tokens(self.stem(channels_last(pixel_values)))
        pooled = self.pool(tokens)
        if return_dict is False:
            return (tokens, pooled)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)


def _convolution(channels_in: int, channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class ClipResNetConfig(VisionTextDualEncoderConfig):
    """Both towers; a folder that brings this file along names it, so that the kind below is known."""


class ClipResNetModel(VisionTextDualEncoderModel):
    """Both towers."""

    config_class = ClipResNetConfig


AutoConfig.register(ClipResNetVisionConfig.model_type, ClipResNetVisionConfig, exist_ok=True)
AutoModel.register(ClipResNetVisionConfig, ClipResNetVisionModel, exist_ok=True)
