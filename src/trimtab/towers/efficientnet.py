"""EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946; the Lite variants drop squeeze-excitation and use ReLU6).

A plain module with readable names, so that later links can hang adapters beside its blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (repeats, kernel, stride, expansion, channels) of each stage, from the paper's table for width and depth 1.0.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
CLASSES = 1000


def channels_last(x: Tensor) -> Tensor:  # (B, C, H, W), the same values in another order in memory
    """What enters a convolution, laid out as its CPU kernels are fastest: nearly twice as fast as by channel."""
    return x.contiguous(memory_format=torch.channels_last)


class SamePadConv(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: odd remainders go to the bottom and right."""

    avoids_slow_bf16 = True  # in its backward pass on a CPU; see `trimtab.precision.slow_in_bf16`

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / s), ceil(W / s)), by the weights given, which need not be its own."""
        if self._slow_in_halves(x):
            with torch.autocast("cpu", enabled=False):
                return self._padded(x.float(), weight, bias).to(x.dtype)
        return self._padded(x, weight, bias)

    def _slow_in_halves(self, x: Tensor) -> bool:
        """Where the CPU's backward pass of a depthwise convolution takes 3 to 10 times as long in bf16 as in fp32."""
        if x.device.type != "cpu" or x.dtype != torch.bfloat16 or self.weight.dtype != torch.float32:
            return False
        if self.groups == 1 or not torch.is_grad_enabled():
            return False
        return self.stride[0] > 1 or (self.kernel_size[0] > 3 and self.weight.requires_grad)

    def _copying_is_slow(self, x: Tensor) -> bool:
        """Where a padded copy of the map takes longer than a larger kernel: on a CPU, for kernels of few products.

        An exported convolution pads by itself, any side as it likes.
        """
        traced = torch.jit.is_tracing()
        return x.device.type == "cpu" and x.dtype == torch.float32 and self.groups > 1 and not traced

    def _padded(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        height, width = x.shape[-2:]
        down = max((-(-height // stride) - 1) * stride + kernel - height, 0)
        right = max((-(-width // stride) - 1) * stride + kernel - width, 0)
        if (down % 2 or right % 2) and self._copying_is_slow(x):
            # A row or column of zeros before the kernel stands for the side that has one less to pad.
            weight = F.pad(weight, (right % 2, 0, down % 2, 0))
            down, right = down + down % 2, right + right % 2
        if down % 2 == right % 2 == 0:  # the convolution's own padding copies nothing
            sides = (down // 2, right // 2)
            return F.conv2d(x, weight, bias, self.stride, sides, self.dilation, self.groups)
        x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and, where it is given, an activation.

    With the norm's statistics fixed the norm is part of the convolution's weights: maps are passed over once instead of
    three times, forward and back. The weights are scaled anew in each pass, which costs little beside the maps, so
    they may be trained, mixed or loaded at any time.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H / s, W / s)
        conv, norm, *after = self
        plain = type(conv) in (nn.Conv2d, SamePadConv)  # LoRA wraps convolutions
        if not plain or norm.training:
            return super().forward(x)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # (C',)
        shift = norm.bias - norm.running_mean * scale
        x = conv._conv_forward(x, conv.weight * scale[:, None, None, None], shift)
        for module in after:
            x = module(x)
        return x


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise, project 1x1; the input is added where shapes allow."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = ConvNorm(nn.Conv2d(channels_in, inner, 1, bias=False), _norm(inner), nn.ReLU6(inplace=True))
        self.depthwise = ConvNorm(
            SamePadConv(inner, inner, kernel, stride, groups=inner, bias=False), _norm(inner), nn.ReLU6(inplace=True)
        )
        self.project = ConvNorm(nn.Conv2d(inner, channels_out, 1, bias=False), _norm(channels_out))
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H / s, W / s)
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Trunk with its ImageNet head: pixels to a feature map and to class logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(
            SamePadConv(3, STEM_CHANNELS, 3, 2, bias=False), _norm(STEM_CHANNELS), nn.ReLU6(inplace=True)
        )
        blocks, channels = [], STEM_CHANNELS
        for repeats, kernel, stride, expansion, width in STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(channels, width, kernel, stride if i == 0 else 1, expansion))
                channels = width
        self.blocks = nn.ModuleList(blocks)
        self.head = ConvNorm(
            nn.Conv2d(channels, HEAD_CHANNELS, 1, bias=False), _norm(HEAD_CHANNELS), nn.ReLU6(inplace=True)
        )
        self.classifier = nn.Linear(HEAD_CHANNELS, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:  # (B, 3, 224, 224) -> (B, 1280, 7, 7)
        x = self.stem(channels_last(pixels))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def logits(self, feature_map: Tensor) -> Tensor:  # (B, 1280, 7, 7) -> (B, 1000)
        return self.classifier(feature_map.mean(dim=(2, 3)))


def from_packaged_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the packaged checkpoint's tensors (`_blocks.3._bn1.weight`) to this module's."""
    renamed = {}
    for name, value in state.items():
        block, rest = "", name
        if name.startswith("_blocks."):
            _, index, rest = name.split(".", 2)
            block = f"blocks.{index}."
        part, _, leaf = rest.partition(".")
        places = {
            "_expand_conv": "expand.0",
            "_bn0": "expand.1" if block else "stem.1",
            "_depthwise_conv": "depthwise.0",
            "_bn1": "depthwise.1" if block else "head.1",
            "_project_conv": "project.0",
            "_bn2": "project.1",
            "_conv_stem": "stem.0",
            "_conv_head": "head.0",
            "_fc": "classifier",
        }
        renamed[f"{block}{places[part]}.{leaf}"] = value
    return renamed


def load_packaged(path: str) -> EfficientNetLite0:
    """Build the trunk and fill it from the packaged checkpoint (tensors only, no pickled code)."""
    trunk = EfficientNetLite0()
    trunk.load_state_dict(from_packaged_names(torch.load(path, map_location="cpu", weights_only=True)))
    return trunk
