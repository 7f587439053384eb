"""OpenCLIP cannot be imported here, so what its ResNets compute is written out on the tensors of its checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from tiny_models import EMBEDDING_DIM, clip_tokenizer
from tiny_towers import TEXTS, build_clip_resnet
from trimtab.errors import ModelError
from trimtab.towers.clip_resnet import AttentionPool, ClipResNetVisionConfig, ClipResNetVisionModel
from trimtab.towers.hf import load_base
from trimtab.towers.layers import sites
from trimtab.towers.open_clip import convert_open_clip

State = dict[str, torch.Tensor]
DEPTHS = (1, 2, 1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip_resnet(tmp_path_factory.mktemp("base") / "clip-resnet", width=32)


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    return load_base(folder, device="cpu")


def open_clip_state(folder: Path) -> State:
    """The tensors of a folder as OpenCLIP's `CLIP.state_dict()` names and shapes them."""
    ours = load_file(folder / "model.safetensors")
    text = {name.replace("text_model.text_model.", "text_model."): tensor for name, tensor in ours.items()}
    state: State = {
        "positional_embedding": text["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": text["text_model.embeddings.token_embedding.weight"],
        "ln_final.weight": text["text_model.final_layer_norm.weight"],
        "ln_final.bias": text["text_model.final_layer_norm.bias"],
        "text_projection": ours["text_projection.weight"].T.contiguous(),
        "logit_scale": ours["logit_scale"],
    }
    renamed = {
        "layer_norm": "ln_", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    for layer in range(3):
        source, target = f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for name, tensor in text.items():
            if name.startswith(source) and not re.search("[qkv]_proj", name):
                rest = name.removeprefix(source)
                for theirs, name_there in renamed.items():
                    rest = rest.replace(theirs, name_there)
                state[target + rest] = tensor
        for kind in ("weight", "bias"):
            parts = [text[f"{source}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{target}attn.in_proj_{kind}"] = torch.cat(parts)
    blocks = [f"layer{stage}.{number}" for stage, depth in enumerate(DEPTHS, 1) for number in range(depth)]
    places = {"stem.0": "conv1", "stem.1": "bn1", "stem.3": "conv2", "stem.4": "bn2", "stem.6": "conv3"}
    places |= {"stem.7": "bn3", "pool.query": "attnpool.q_proj", "pool.key": "attnpool.k_proj"}
    places |= {"pool.value": "attnpool.v_proj", "pool.output": "attnpool.c_proj"}
    for name, tensor in ours.items():
        if not name.startswith("vision_model."):
            continue
        rest = name.removeprefix("vision_model.")
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", rest):
            inner = match[2].replace("norm", "bn").replace("shortcut.1", "downsample.0")
            rest = f"{blocks[int(match[1])]}.{inner.replace('shortcut.2', 'downsample.1')}"
        elif rest == "pool.positions":
            rest = "attnpool.positional_embedding"
        else:
            place, _, kind = rest.rpartition(".")
            rest = f"{places[place]}.{kind}"
        state[f"visual.{rest}"] = tensor
    return state


def reference(state: State, x: torch.Tensor, heads: int) -> torch.Tensor:
    """What the paper's modified ResNet makes of pixels (B, 3, S, S)."""

    def conv(x: torch.Tensor, conv: str, norm: str, **options: Any) -> torch.Tensor:
        x = F.conv2d(x, state[f"visual.{conv}.weight"], **options)
        mean, variance, weight, bias = (
            state[f"visual.{norm}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-5)

    for number in (1, 2, 3):
        x = conv(x, f"conv{number}", f"bn{number}", stride=2 if number == 1 else 1, padding=1).relu()
    x = F.avg_pool2d(x, 2)
    for stage, depth in enumerate(DEPTHS, 1):
        for number in range(depth):
            name, stride = f"layer{stage}.{number}", 2 if stage > 1 and number == 0 else 1
            inner = conv(x, f"{name}.conv1", f"{name}.bn1").relu()
            inner = conv(inner, f"{name}.conv2", f"{name}.bn2", padding=1).relu()
            inner = conv(F.avg_pool2d(inner, stride), f"{name}.conv3", f"{name}.bn3")
            if f"visual.{name}.downsample.0.weight" in state:
                x = conv(F.avg_pool2d(x, stride), f"{name}.downsample.0", f"{name}.downsample.1")
            x = (inner + x).relu()
    places = x.flatten(2).permute(2, 0, 1)  # (N, B, C)
    places = torch.cat([places.mean(dim=0, keepdim=True), places])
    places = places + state["visual.attnpool.positional_embedding"][:, None]
    weights = {f"{part}_proj_weight": state[f"visual.attnpool.{part}_proj.weight"] for part in "qkv"}
    pooled, _ = F.multi_head_attention_forward(
        places[:1], places, places, places.shape[2], heads, None,
        torch.cat([state[f"visual.attnpool.{part}_proj.bias"] for part in "qkv"]), None, None, False, 0.0,
        state["visual.attnpool.c_proj.weight"], state["visual.attnpool.c_proj.bias"],
        training=False, need_weights=False, use_separate_proj_weight=True, **weights,
    )  # fmt: skip
    return pooled[0]


CONFIG: dict[str, Any] = {
    "embed_dim": EMBEDDING_DIM,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": list(DEPTHS), "width": 32, "patch_size": None, "head_width": 256},
    "text_cfg": {"context_length": 24, "width": 16, "heads": 2, "layers": 3},
}


def checkpoint(folder: Path, state: State, config: dict[str, Any] | None = CONFIG) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    if config is not None:
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    clip_tokenizer().save_pretrained(folder)
    return folder / "open_clip_model.safetensors"


@torch.no_grad()
@pytest.mark.parametrize("counted", [True, False])
def test_a_converted_checkpoint_computes_what_open_clip_does(
    counted: bool, folder: Path, base: Any, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    state = open_clip_state(folder)
    if not counted:  # as in older checkpoints
        state = {name: one for name, one in state.items() if not name.endswith("num_batches_tracked")}
    converted = load_base(convert_open_clip(checkpoint(tmp_path / "a", state), tmp_path / "out"), device="cpu")
    assert converted.family == "vision-text-dual-encoder"
    assert converted.logit_scale == pytest.approx(base.logit_scale)
    np.testing.assert_allclose(converted.encode_text(TEXTS), base.encode_text(TEXTS), atol=1e-6)
    pixels = {"pixel_values": torch.cat([converted.preprocess(one)["pixel_values"] for one in pictures])}
    state = {name: one.double() for name, one in state.items()}
    expected = reference(state, pixels["pixel_values"].double(), heads=4)
    found = F.normalize(converted.pixel_features(pixels), dim=-1)
    torch.testing.assert_close(found, F.normalize(expected, dim=-1).float(), atol=1e-5, rtol=0)
    model: Any = converted.model.double()  # where rounding hides nothing
    exact = model.visual_projection(model.vision_model(pixels["pixel_values"].double()).pooler_output)
    torch.testing.assert_close(exact, expected, atol=1e-9, rtol=0)
    assert (expected - expected.mean(dim=0)).abs().max() > 0.01


def test_sizes_are_read_from_the_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.towers.open_clip._SURE_WIDTHS", (16,))
    monkeypatch.setattr("trimtab.towers.open_clip._HEAD_WIDTH", 8)
    path = checkpoint(tmp_path / "a", open_clip_state(folder), config=None)
    with pytest.raises(ModelError, match="QuickGELU"):
        convert_open_clip(path, tmp_path / "out")
    made = load_base(convert_open_clip(path, tmp_path / "out", quick_gelu=True), device="cpu").model.config
    vision, text = made.vision_config, made.text_config
    assert (vision.depths, vision.width, vision.image_size) == (list(DEPTHS), 32, 64)
    assert vision.num_attention_heads == 32 * 32 // 8
    assert (text.num_hidden_layers, text.hidden_size, text.hidden_act) == (3, 16, "quick_gelu")


@pytest.mark.parametrize(
    ("changes", "config", "reason"),
    [
        ({"visual.attnpool.c_proj.weight": None}, CONFIG, r"of a ResNet: it lacks visual\.attnpool\.c_proj\.weight"),
        ({"visual.layer2.1.bn3.weight": None}, CONFIG, r"after renaming, missing .*blocks\.2\.norm3\.weight"),
        ({"visual.layer2.1.se.weight": torch.zeros(1)}, CONFIG, r"no place for visual\.layer2\.1\.se\.weight"),
        ({"visual.proj": torch.zeros(1)}, CONFIG, r"no place for visual\.proj"),
        ({"visual.steps": torch.zeros(1, dtype=torch.int64)}, CONFIG, r"unknown \['vision_model\.steps'\]"),
        ({"visual.layer3.0.conv2.weight": torch.zeros(1, 1, 3, 3)}, CONFIG, "shapes do not go together"),
        ({"visual.attnpool.positional_embedding": torch.zeros(4, 1024)}, CONFIG, "not square"),
        ({}, {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "head_width": 300}}, "3 heads do not divide"),
        ({}, {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "head_width": 3000}}, "0 heads do not divide"),
        ({}, {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "pool_type": "last"}}, "text_cfg.pool_type is 'last'"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], config: dict[str, Any], reason: str, folder: Path, tmp_path: Path
) -> None:
    state = {**open_clip_state(folder), **changes}
    path = checkpoint(tmp_path / "a", {name: one for name, one in state.items() if one is not None}, config)
    with pytest.raises(ModelError, match=reason):
        convert_open_clip(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rn50_has_the_parameters_of_the_paper() -> None:
    """38,316,896 in the image tower, as OpenCLIP counts them."""
    with torch.device("meta"):
        model = ClipResNetVisionModel(ClipResNetVisionConfig())
    assert sum(one.numel() for one in model.parameters()) == 38_316_896
    assert len(model.blocks) == 16


@torch.no_grad()
def test_the_pool_reads_every_place() -> None:
    pool = AttentionPool(2, 8, 2, 3)
    feature_map = torch.randn(1, 8, 2, 2)
    plain = pool(pool.tokens(feature_map))
    for place in range(4):
        moved = feature_map.clone()
        moved.view(1, 8, 4)[..., place] += 1
        assert not torch.allclose(pool(pool.tokens(moved)), plain, atol=1e-4)


def test_blocks_are_where_the_map_shrinks(base_of: Callable[[str], Any]) -> None:
    found = sites(base_of("clip-resnet"), "image", "blocks")
    assert [site.stride for site in found] == [1, 2, 1, 2, 2, 1]
    assert [site.width_out for site in found] == [32, 64, 64, 128, 256, 256]
