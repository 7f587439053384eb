"""OpenCLIP cannot be imported here, so its checkpoints are made by inverting the renaming of a tiny CLIPModel."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny_models
from tiny_models import CORPUS, IMAGE_SIZE
from trimtab.errors import ModelError
from trimtab.towers import open_clip as module
from trimtab.towers.hf import load_base
from trimtab.towers.open_clip import convert_open_clip

State = dict[str, torch.Tensor]


def open_clip_state(folder: Path) -> State:
    """The tensors of a CLIPModel folder as OpenCLIP's `CLIP.state_dict()` names and shapes them."""
    clip = load_file(folder / "model.safetensors")
    state: State = {
        "positional_embedding": clip["text_model.embeddings.position_embedding.weight"],
        "text_projection": clip["text_projection.weight"].T.contiguous(),
        "logit_scale": clip["logit_scale"],
        "token_embedding.weight": clip["text_model.embeddings.token_embedding.weight"],
        "visual.class_embedding": clip["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": clip["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": clip["visual_projection.weight"].T.contiguous(),
        "visual.conv1.weight": clip["vision_model.embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"visual.ln_pre.{kind}"] = clip[f"vision_model.pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = clip[f"vision_model.post_layernorm.{kind}"]
        state[f"ln_final.{kind}"] = clip[f"text_model.final_layer_norm.{kind}"]
        for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
            for layer in range(2):
                source = f"{tower}.encoder.layers.{layer}"
                target = f"{prefix}transformer.resblocks.{layer}"
                qkv = [clip[f"{source}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                state[f"{target}.attn.in_proj_{kind}"] = torch.cat(qkv)
                for ours, theirs in (
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    state[f"{target}.{theirs}.{kind}"] = clip[f"{source}.{ours}.{kind}"]
    return state


MODEL_CFG: dict[str, Any] = {
    "embed_dim": tiny_models.EMBEDDING_DIM,
    "quick_gelu": True,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": tiny_models.CONTEXT, "width": 16, "heads": 2, "layers": 2},
}
PREPROCESS_CFG = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}


@pytest.fixture
def checkpoint(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint file from the tiny CLIP's weights, with or without its configuration."""

    def write(name: str = "open_clip_model.safetensors", *, config: bool = True, **changes: Any) -> Path:
        folder = tmp_path / "open_clip"
        folder.mkdir(exist_ok=True)
        state = {**open_clip_state(tiny_folder("clip")), **changes.pop("state", {})}
        for key in changes.pop("without", ()):
            del state[key]
        state = changes.pop("rename", lambda state: state)(state)
        path = folder / name
        if path.suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save(state, path)
        if config:
            settings = {"model_cfg": {**MODEL_CFG, **changes}, "preprocess_cfg": PREPROCESS_CFG}
            (folder / "open_clip_config.json").write_text(json.dumps(settings))
        return path

    return write


def convert(path: Path, tokenizer: Path, **options: Any) -> Any:
    out = path.parent.parent / "converted"
    return load_base(convert_open_clip(path, out, tokenizer=tokenizer, **options), device="cpu")


def training_checkpoint(state: State) -> dict[str, Any]:
    return {"epoch": 3, "name": "run", "state_dict": {f"module.{name}": value for name, value in state.items()}}


def compiled_around(state: State) -> State:
    return {f"_orig_mod.module.{name}": value for name, value in state.items()}


def custom_text(state: State) -> State:
    text = ("positional_embedding", "text_projection", "token_embedding", "transformer", "ln_final")
    return {f"text.{name}" if name.startswith(text) else name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("open_clip_model.safetensors", None),
        ("open_clip_pytorch_model.bin", None),
        ("epoch_3.pt", training_checkpoint),
        ("custom.safetensors", custom_text),
        ("compiled.safetensors", compiled_around),
    ],
)
def test_converted_embeddings_are_the_same(
    name: str,
    rename: Any,
    checkpoint: Any,
    tiny_base: Any,
    tiny_folder: Callable[[str], Path],
    pictures: list[Image.Image],
) -> None:
    base = tiny_base("clip")
    options = {"rename": rename} if rename else {}
    converted = convert(checkpoint(name, **options), tiny_folder("clip"))

    assert converted.family == "clip"
    assert converted.logit_scale == pytest.approx(base.logit_scale)
    np.testing.assert_allclose(converted.encode_text(CORPUS), base.encode_text(CORPUS), atol=1e-6)
    assert list(converted.image_processor.image_mean) == PREPROCESS_CFG["mean"]
    pixels = [base.preprocess(picture) for picture in pictures]
    with torch.no_grad():
        for one in pixels:
            torch.testing.assert_close(converted.pixel_features(one), base.pixel_features(one))


def test_sizes_are_read_from_the_weights(
    checkpoint: Any, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.towers.open_clip._HEAD_WIDTH", 8)  # 64 in real models
    monkeypatch.setattr("trimtab.towers.open_clip._SURE_WIDTHS", (16,))
    path = checkpoint(config=False)
    with pytest.raises(ModelError, match="QuickGELU"):
        convert(path, tiny_folder("clip"))
    converted = convert(path, tiny_folder("clip"), quick_gelu=True)
    original = json.loads((tiny_folder("clip") / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        made = getattr(converted.model.config, part)
        for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "hidden_act"):
            assert getattr(made, key) == original[part][key], (part, key)
    assert converted.image_processor.crop_size["height"] == IMAGE_SIZE


def test_heads_that_the_weights_do_not_tell_are_refused(checkpoint: Any, tiny_folder: Callable[[str], Path]) -> None:
    """16 wide stands for ViT-H, g and bigG, which are 1280, 1408 and 1664 wide with heads of 80, 88 and 104."""
    path = checkpoint(config=False)
    with pytest.raises(ModelError, match=r"image tower is 16 wide.*number of heads: pass .*by --config"):
        convert(path, tiny_folder("clip"), quick_gelu=True)
    without_text = {key: value for key, value in MODEL_CFG.items() if key != "text_cfg"}
    (path.parent / "open_clip_config.json").write_text(json.dumps(without_text))
    with pytest.raises(ModelError, match=r"text tower is 16 wide.*number of heads"):
        convert(path, tiny_folder("clip"))
    assert not (path.parent.parent / "converted").exists()


def test_widths_whose_heads_are_sure_are_those_of_64() -> None:
    state = {"visual.conv1.weight": torch.zeros(1024, 3, 1, 1), "token_embedding.weight": torch.zeros(2, 768)}
    assert module._heads(Path("a.pt"), state, {}) == (16, 12)
    state["visual.conv1.weight"] = torch.zeros(1280, 3, 1, 1)
    with pytest.raises(ModelError, match="1280 wide"):
        module._heads(Path("a.pt"), state, {})
    assert module._heads(Path("a.pt"), state, {"vision_cfg": {"head_width": 80}, "text_cfg": {"heads": 16}}) == (16, 16)


def test_activation_and_norms_come_from_the_configuration(
    checkpoint: Any, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    vision = {**MODEL_CFG["vision_cfg"], "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    path = checkpoint(quick_gelu=False, vision_cfg=vision)
    config = convert(path, tiny_folder("clip")).model.config
    assert config.vision_config.layer_norm_eps == 1e-6
    assert config.vision_config.hidden_act == "gelu_pytorch_tanh"
    assert config.text_config.hidden_act == "gelu"


def test_configuration_file_of_the_model_part_alone(
    checkpoint: Any, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint(config=False)
    (tmp_path / "ViT-tiny.json").write_text(json.dumps(MODEL_CFG))
    converted = convert(path, tiny_folder("clip"), config=tmp_path / "ViT-tiny.json")
    assert converted.model.config.text_config.hidden_act == "quick_gelu"


def test_shapes_that_do_not_go_together_are_named(checkpoint: Any, tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=r"shapes do not go together, after renaming .*final_layer_norm\.weight"):
        convert(checkpoint(state={"ln_final.weight": torch.ones(7)}), tiny_folder("clip"))


@pytest.mark.parametrize("name", ["visual.conv1.bias", "visual.register_tokens", "visual.patchnorm_pre_ln.weight"])
def test_tensors_without_a_place_are_refused(name: str, checkpoint: Any, tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=f"there is no place for {name}$"):
        convert(checkpoint(state={name: torch.ones(16)}), tiny_folder("clip"))


def test_counters_in_a_checkpoint_do_no_harm(checkpoint: Any, tiny_folder: Callable[[str], Path]) -> None:
    convert(checkpoint(state={"step": torch.tensor(7)}), tiny_folder("clip"))


def test_heads_that_a_configuration_leaves_out_are_those_of_openclip(
    checkpoint: Any, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.towers.open_clip._HEAD_WIDTH", 16)  # by which one head would be taken
    text = {key: value for key, value in MODEL_CFG["text_cfg"].items() if key != "heads"}
    assert convert(checkpoint(text_cfg=text), tiny_folder("clip")).model.config.text_config.num_attention_heads == 8


def test_tokenizer_beside_the_checkpoint(checkpoint: Any, tiny_folder: Callable[[str], Path]) -> None:
    path = checkpoint()
    with pytest.raises(ModelError, match="no usable tokenizer beside"):
        convert_open_clip(path, path.parent.parent / "out")
    tiny_models.clip_tokenizer().save_pretrained(path.parent)
    convert_open_clip(path, path.parent.parent / "out")


def test_wrong_tokenizer_is_refused(checkpoint: Any, tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="does not end texts with its largest id"):
        convert(checkpoint(), tiny_folder("bert"))


ONE = torch.zeros(1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": {"visual.layer1.0.conv1.weight": ONE}}, r"of a ResNet: it lacks visual\.layer4"),
        ({"state": {"visual.trunk.cls_token": ONE}}, "timm"),
        ({"state": {"text.transformer.embeddings.word_embeddings.weight": ONE}}, r"text\.transformer\."),
        ({"state": {"text_decoder.ln_final.weight": ONE}}, "CoCa"),
        ({"state": {"visual.transformer.resblocks.0.ls_1.gamma": ONE}}, "LayerScale"),
        ({"state": {"logit_bias": ONE}}, "logit bias"),
        ({"without": ["visual.proj"]}, "lacks visual.proj"),
        ({"without": ["transformer.resblocks.1.ln_1.bias"]}, r"missing \['text_model.encoder.layers.1"),
        ({"without": ["visual.transformer.resblocks.0.mlp.c_fc.weight"]}, r"lacks visual\.transformer\..*c_fc"),
        ({"state": {"visual.extra.weight": ONE}, "without": ["text_projection"]}, "lacks text_projection"),
        ({"text_cfg": {**MODEL_CFG["text_cfg"], "pool_type": "last"}}, "text_cfg.pool_type is 'last'"),
        ({"vision_cfg": {**MODEL_CFG["vision_cfg"], "pool_type": "avg"}}, "vision_cfg.pool_type is 'avg'"),
        ({"text_cfg": {**MODEL_CFG["text_cfg"], "heads": 3}}, "3 heads do not divide"),
    ],
)
def test_what_clip_cannot_compute_is_refused(
    changes: dict[str, Any], reason: str, checkpoint: Any, tiny_folder: Callable[[str], Path]
) -> None:
    path = checkpoint(**changes)
    with pytest.raises(ModelError, match=reason):
        convert(path, tiny_folder("clip"))
    assert not (path.parent.parent / "converted").exists()


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def test_pickled_objects_are_not_run(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a" / "evil.pt"
    path.parent.mkdir()
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(ModelError, match="are not run"):
        convert(path, tiny_folder("clip"))
    assert "must not run" not in capsys.readouterr().out


def test_a_torchscript_archive_is_refused_by_one_message(
    tiny_folder: Callable[[str], Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "a" / "ViT-B-32.pt"
    path.parent.mkdir()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    recwarn.clear()  # torch.jit is deprecated
    with pytest.raises(ModelError, match="TorchScript"):
        convert(path, tiny_folder("clip"))
    assert not recwarn.list


def test_unreadable_checkpoints_are_named(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"absent\.pt: no such checkpoint"):
        convert(folder / "absent.pt", tiny_folder("clip"))
    for name in ("short.safetensors", "short.bin"):
        (folder / name).write_bytes(b"\x10\x00")
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            convert(folder / name, tiny_folder("clip"))
    torch.save([1, 2], folder / "list.pt")
    with pytest.raises(ModelError, match="does not hold a state dict"):
        convert(folder / "list.pt", tiny_folder("clip"))


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("model_cfg", None, "model_cfg is None, but must be an object"),
        ("model_cfg", {"vision_cfg": None}, "vision_cfg is None, but must be an object: mend it, or leave it out"),
        ("model_cfg", {"text_cfg": "ViT"}, "text_cfg is 'ViT', but must be an object"),
        ("model_cfg", {"quick_gelu": "no"}, "quick_gelu is 'no', but must be true or false"),
        ("model_cfg", {"vision_cfg": {"head_width": 0}}, r"vision_cfg\.head_width is 0, but must be a whole number"),
        ("model_cfg", {"text_cfg": {"heads": "2"}}, r"text_cfg\.heads is '2', but"),
        ("model_cfg", {"text_cfg": {"norm_kwargs": {"eps": None}}}, r"text_cfg\.norm_kwargs\.eps is None, but"),
        ("model_cfg", {"vision_cfg": {"act_kwargs": [1]}}, r"vision_cfg\.act_kwargs is \[1\], but"),
        ("preprocess_cfg", [1], r"preprocess_cfg is \[1\], but must be an object"),
        ("preprocess_cfg", {"interpolation": "area"}, r"interpolation is 'area', but must be null or one of .*bicubic"),
        ("preprocess_cfg", {"mean": "x"}, "mean is 'x', but must be one or three numbers"),
        ("preprocess_cfg", {"mean": [0.5, 0.5]}, r"mean is \[0\.5, 0\.5\], but"),
        ("preprocess_cfg", {"std": 0}, "std is 0, but must be one or three numbers above 0"),
        ("preprocess_cfg", {"size": []}, r"size is \[\], but"),
    ],
)
def test_configurations_that_cannot_be_are_refused(
    part: str, changes: Any, reason: str, checkpoint: Any, tiny_folder: Callable[[str], Path]
) -> None:
    path = checkpoint()
    config = path.parent / "open_clip_config.json"
    config.write_text(json.dumps({"model_cfg": MODEL_CFG, part: changes}))
    with pytest.raises(ModelError, match=rf"open_clip_config\.json: .*{reason}"):
        convert(path, tiny_folder("clip"))
    assert not (path.parent.parent / "converted").exists()


def test_one_number_stands_for_all_colours(checkpoint: Any, tiny_folder: Callable[[str], Path]) -> None:
    path = checkpoint()
    preprocess = {"mean": 0.5, "std": 0.25, "interpolation": None}
    settings = {"model_cfg": MODEL_CFG, "preprocess_cfg": preprocess}
    (path.parent / "open_clip_config.json").write_text(json.dumps(settings))
    processor = convert(path, tiny_folder("clip")).image_processor
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.5] * 3, [0.25] * 3)


def test_written_files_can_be_read_by_others(checkpoint: Any, tiny_folder: Callable[[str], Path]) -> None:
    path = checkpoint()
    out = path.parent.parent / "empty"
    out.mkdir()
    convert_open_clip(path, out, tokenizer=tiny_folder("clip"))
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1
    with pytest.raises(ModelError, match=r"would lie below the file .*safetensors: choose another folder"):
        convert_open_clip(path, path / "below" / "it", tokenizer=tiny_folder("clip"))


def test_existing_folders_are_kept(checkpoint: Any, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "converted"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="exists already"):
        convert(checkpoint(), tiny_folder("clip"))
    assert (out / "notes.txt").read_text() == "mine"


def test_preprocessing_that_cannot_be_expressed_is_refused(checkpoint: Any, tiny_folder: Callable[[str], Path]) -> None:
    path = checkpoint()
    config = path.parent / "open_clip_config.json"
    for changes, reason in (({"resize_mode": "longest"}, "longest"), ({"size": 64}, r"\[64, 64\]")):
        config.write_text(json.dumps({"model_cfg": MODEL_CFG, "preprocess_cfg": {**PREPROCESS_CFG, **changes}}))
        with pytest.raises(ModelError, match=reason):
            convert(path, tiny_folder("clip"))
    squash = {**PREPROCESS_CFG, "resize_mode": "squash", "size": [IMAGE_SIZE, IMAGE_SIZE]}
    config.write_text(json.dumps({"model_cfg": MODEL_CFG, "preprocess_cfg": squash}))
    assert not convert(path, tiny_folder("clip")).image_processor.do_center_crop
