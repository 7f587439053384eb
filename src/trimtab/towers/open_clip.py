"""Turn an OpenCLIP checkpoint file into a transformers folder.

open_clip itself needs torchvision, so its state dict is renamed instead. ViT image towers with OpenCLIP's own
text tower become a `CLIPModel` and keep every weight as it is; with CLIP's ResNets they become a
`VisionTextDualEncoderModel`, as transformers has none of them (`trimtab.towers.clip_resnet`). Anything that these
cannot compute is refused with the reason.
Where the long side of a resized picture exceeds the crop by an odd number of pixels, transformers may take the middle
one pixel beside torchvision, so that its embedding differs a little from OpenCLIP's.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.errors import ModelError
from trimtab.files import explain_disk_errors, open_up
from trimtab.towers.hf import resolve_folder
from trimtab.towers.parts import image_processor_class, load_tokenizer, quiet

if TYPE_CHECKING:
    from transformers import CLIPConfig, VisionTextDualEncoderConfig

StateDict = dict[str, Tensor]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HEAD_WIDTH = 64
# Of towers whose heads are 64 wide in every model of OpenCLIP; those of ViT-H, g and bigG are not.
_SURE_WIDTHS = (512, 768, 1024)
_TEXT_HEADS = 8  # of an OpenCLIP configuration that does not say, whatever the width

# What a state dict holds when the image or text tower is not the plain Transformer that CLIPModel computes.
_FOREIGN = {
    r"^visual\.trunk\.": "its image tower comes from timm; only OpenCLIP's own ViT and ResNet can be converted",
    r"^visual\.attn_pool\.": "its image tower pools by attention, which CLIPModel cannot",
    r"^text_decoder\.": "it is a CoCa model with a text decoder, which CLIPModel does not have",
    r"^text\.transformer\.(embeddings|encoder|shared|layer)\b": "its text tower is a Hugging Face model "
    "(`text.transformer.`); only OpenCLIP's own text tower can be converted",
    r"\.ls_[12]\.gamma$": "its layers are scaled (LayerScale), which CLIPModel cannot",
    r"^(text\.)?text_projection\.bias$": "its text projection has a bias, which CLIPModel's has not",
    r"^(text\.)?cls_emb$": "its text tower reads a CLS token rather than the end token",
    r"\.attn\.(ln_|logit_scale|in_proj\.|qkv\.)|\.mlp\.ln\.|\.ln_attn\.": "its layers are not CLIPModel's",
}
# All that a plain model of OpenCLIP has: any other tensor would change its vectors and find no place.
_OF_TEXT = (
    r"positional_embedding|transformer\.resblocks\.\d+\..+|ln_final\.(weight|bias)|text_projection(\.weight)?"
    r"|token_embedding\.weight|logit_scale"
)
_OF_VIT = (
    r"visual\.(positional_embedding|transformer\.resblocks\.\d+\..+|proj|class_embedding|conv1\.weight)"
    r"|visual\.ln_(pre|post)\.(weight|bias)"
)
_OF_RESNET = (
    r"visual\.(conv[123]\.weight|bn[123]\..+|layer[1234]\.\d+\.(conv[123]|bn[123]|downsample\.[01])\..+)"
    r"|visual\.attnpool\.(positional_embedding|[qkvc]_proj\.(weight|bias))"
)
# Settings of an OpenCLIP configuration under which the same weights mean another computation.
_PLAIN = {
    "vision_cfg": {"pool_type": "tok", "attentional_pool": False, "no_ln_pre": False,
                   "pos_embed_type": "learnable", "timm_model_name": None},
    "text_cfg": {"pool_type": "argmax", "no_causal_mask": False, "embed_cls": False, "hf_model_name": None,
                 "proj_type": "linear", "proj_bias": False},
}  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_positive(value)


def _is_section(value: Any) -> bool:
    return isinstance(value, dict)


def _is_null_or(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _are(fits: Callable[[Any], bool], count: int) -> Callable[[Any], bool]:
    """One value, or `count` of them in a list."""
    return lambda value: fits(value) or (isinstance(value, list) and len(value) == count and all(map(fits, value)))


_INTERPOLATIONS = ("random", "nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
# What is read of a configuration: whether a value fits, and what would. Sections stand before what is in them.
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_cfg": (_is_section, "an object"),
    "model_cfg.quick_gelu": (lambda value: isinstance(value, bool), "true or false"),
    "model_cfg.vision_cfg": (_is_section, "an object"),
    "model_cfg.text_cfg": (_is_section, "an object"),
    "model_cfg.vision_cfg.head_width": (_is_count, "a whole number above 0"),
    "model_cfg.text_cfg.heads": (_is_count, "a whole number above 0"),
    **{
        f"model_cfg.{tower}.{name}": (_is_null_or(_is_section), "an object or null")
        for tower in ("vision_cfg", "text_cfg")
        for name in ("act_kwargs", "norm_kwargs")
    },
    "model_cfg.vision_cfg.norm_kwargs.eps": (_is_positive, "a number above 0"),
    "model_cfg.text_cfg.norm_kwargs.eps": (_is_positive, "a number above 0"),
    "preprocess_cfg": (_is_section, "an object"),
    "preprocess_cfg.size": (_are(_is_count, 2), "one or two whole numbers above 0"),
    "preprocess_cfg.mean": (_is_null_or(_are(_is_number, 3)), "one or three numbers, or null"),
    "preprocess_cfg.std": (_is_null_or(_are(_is_positive, 3)), "one or three numbers above 0, or null"),
    "preprocess_cfg.interpolation": (
        _is_null_or(lambda value: isinstance(value, str) and value in _INTERPOLATIONS),
        f"null or one of {', '.join(_INTERPOLATIONS)}",
    ),
}


def convert_open_clip(
    checkpoint: str | Path,
    out_folder: str | Path,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    quick_gelu: bool | None = None,
) -> Path:
    """Write a transformers folder that gives the embeddings of an OpenCLIP checkpoint.

    Args:
        checkpoint: ``open_clip_model.safetensors``, or a ``.bin`` or ``.pt`` state dict, which is read
            without running code.
        out_folder: a new or an empty folder.
        config: ``open_clip_config.json``; the one beside the checkpoint when None. Without any, sizes are
            read from the weights, of towers that are 512, 768 or 1024 wide: their heads are 64 wide.
        tokenizer: folder or hub id of the CLIP tokenizer; the folder of the checkpoint when None.
        quick_gelu: the activation, where no configuration tells. OpenAI's weights use QuickGELU, most later
            ones do not.

    Returns:
        `out_folder`.

    Raises:
        ModelError: not an OpenCLIP checkpoint, one with other towers, or a configuration with a value that cannot be.
    """
    checkpoint, out_folder = Path(checkpoint), Path(out_folder)
    if out_folder.is_file() or (out_folder.is_dir() and any(out_folder.iterdir())):
        raise ModelError(f"{out_folder} exists already: choose a new or an empty folder")
    if not (place := next(path for path in out_folder.absolute().parents if path.exists())).is_dir():
        raise ModelError(f"{out_folder} would lie below the file {place}: choose another folder")
    state = _normalise_names(read_state_dict(checkpoint))
    _refuse_foreign(checkpoint, state)
    beside = checkpoint.parent / "open_clip_config.json"
    config_path = Path(config) if config is not None else (beside if beside.is_file() else None)
    settings = _read_config(config_path) if config_path else {}
    configure = _resnet_config if is_resnet(state) else _clip_config
    clip_config: Any = configure(checkpoint, state, settings.get("model_cfg", {}), quick_gelu)
    clip_tokenizer = _load_tokenizer(checkpoint, tokenizer, clip_config)
    if (end := clip_tokenizer.eos_token_id) is not None:
        clip_config.text_config.eos_token_id = end
        clip_config.text_config.bos_token_id = clip_tokenizer.bos_token_id
        clip_config.text_config.pad_token_id = clip_tokenizer.pad_token_id

    with quiet():
        model, weights = _dual_encoder(clip_config, state) if is_resnet(state) else _clip_model(clip_config, state)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if wrong := [name for name, tensor in weights.items() if shapes.get(name, tensor.shape) != tensor.shape]:
            raise ModelError(
                f"{checkpoint} holds tensors whose shapes do not go together, after renaming {wrong[:5]}: it is "
                "damaged or no plain OpenCLIP model; fetch it again"
            )
        missing, unexpected = model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not name.endswith(("position_ids", "num_batches_tracked"))]
        if missing or unexpected:
            raise ModelError(
                f"{checkpoint} is not a plain OpenCLIP model: after renaming, "
                f"missing {missing[:5]}, unknown {unexpected[:5]}"
            )
        processor = _image_processor(settings.get("preprocess_cfg", {}), clip_config.vision_config.image_size)
        with explain_disk_errors(out_folder):
            out_folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out_folder.parent, prefix=f".{out_folder.name}.") as temporary:
                scratch = Path(temporary) / "model"
                for part in (model, clip_tokenizer, processor):
                    part.save_pretrained(scratch)
                open_up(scratch)
                if out_folder.is_dir():
                    out_folder.rmdir()  # it is empty; Windows replaces no folder
                scratch.replace(out_folder)
    return out_folder


def read_state_dict(checkpoint: Path) -> StateDict:
    """Read the tensors of a checkpoint file without running code from it.

    Raises:
        ModelError: missing, damaged, or a file that can only be read by running code.
    """
    if not checkpoint.is_file():
        raise ModelError(f"{checkpoint}: no such checkpoint file")
    if checkpoint.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(checkpoint)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{checkpoint} is damaged or cut short ({error}): fetch it again") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript archives, which are refused below
            loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip and TorchScript errors of many kinds
        raise ModelError(
            f"{checkpoint} is not a plain state dict (damaged, a TorchScript archive, or holding Python "
            "objects, which are not run): get the safetensors version, or save the state_dict alone where "
            "you trust the file"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):  # OpenCLIP's training checkpoints
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ModelError(f"{checkpoint} does not hold a state dict of tensors")
    return loaded


def is_resnet(state: StateDict) -> bool:
    """Whether the image tower is one of CLIP's ResNets."""
    return any(name.startswith("visual.layer1.") for name in state)


def _clip_model(config: Any, state: StateDict) -> tuple[Any, StateDict]:
    """A model to fill and the tensors by its names."""
    from transformers import CLIPModel

    return CLIPModel(config), to_clip_names(state)


def _dual_encoder(config: Any, state: StateDict) -> tuple[Any, StateDict]:
    """The same with CLIP's ResNet beside CLIP's text tower."""
    from transformers import VisionTextDualEncoderModel

    model = VisionTextDualEncoderModel(config)
    nested = any(name.startswith("text_model.text_model.") for name in model.state_dict())
    text = {
        name.replace("text_model.", "text_model.text_model.", 1) if nested else name: tensor
        for name, tensor in _text_names(state).items()
    }
    # The pooling ends in the shared space.
    projection = torch.eye(config.projection_dim)
    return model, {**_resnet_names(state), **text, "visual_projection.weight": projection}


def to_clip_names(state: StateDict) -> StateDict:
    """Rename OpenCLIP's tensors to those of `CLIPModel`; fused query-key-value projections are split."""
    renamed = {
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        **_layer_names(state, "visual.", "vision_model"),
    }
    norms = {"visual.ln_pre": "pre_layrnorm", "visual.ln_post": "post_layernorm"}  # transformers spells it so
    for norm, target in norms.items():
        for kind in ("weight", "bias"):
            if f"{norm}.{kind}" in state:
                renamed[f"vision_model.{target}.{kind}"] = state[f"{norm}.{kind}"]
    return {name: tensor.float() for name, tensor in renamed.items()} | _text_names(state)


def _text_names(state: StateDict) -> StateDict:
    """The text tower and the scale, which are the same beside any image tower."""
    renamed = {
        "text_projection.weight": _text_projection(state),
        "logit_scale": state["logit_scale"].reshape(()),
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        **_layer_names(state, "", "text_model"),
    }
    for kind in ("weight", "bias"):
        if f"ln_final.{kind}" in state:
            renamed[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
    return {name: tensor.float() for name, tensor in renamed.items()}


def _layer_names(state: StateDict, prefix: str, tower: str) -> StateDict:
    in_layer = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
                "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    renamed: StateDict = {}
    for name, tensor in state.items():
        layer = re.fullmatch(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.(.+)", name)
        if layer is None:
            continue
        target = f"{tower}.encoder.layers.{layer[1]}"
        if layer[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = layer[2].removeprefix("attn.in_proj_")
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{target}.self_attn.{part}_proj.{kind}"] = values.contiguous()
        else:
            stem, _, kind = layer[2].rpartition(".")
            renamed[f"{target}.{in_layer.get(stem, stem)}.{kind}"] = tensor
    return renamed


def _resnet_names(state: StateDict) -> StateDict:
    """Rename the tensors of the image tower to those of `ClipResNetVisionModel`, whose blocks are one list."""
    depths = _depths(state)
    stem = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4", "conv3": "6", "bn3": "7"}
    in_block = {"bn1": "norm1", "bn2": "norm2", "bn3": "norm3", "downsample.0": "shortcut.1",
                "downsample.1": "shortcut.2"}  # fmt: skip
    in_pool = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "c_proj": "output"}
    renamed: StateDict = {}
    for name, tensor in state.items():
        tower, _, rest = name.partition(".")
        if tower != "visual":
            continue
        place, _, kind = rest.rpartition(".")
        block = re.fullmatch(r"layer([1234])\.(\d+)\.(.+)", place)
        if rest == "attnpool.positional_embedding":
            target = "pool.positions"
        elif place.startswith("attnpool."):
            target = f"pool.{in_pool[place.removeprefix('attnpool.')]}.{kind}"
        elif block is not None:
            number = sum(depths[: int(block[1]) - 1]) + int(block[2])
            target = f"blocks.{number}.{in_block.get(block[3], block[3])}.{kind}"
        else:  # what is not known is named as it is, and refused
            target = f"stem.{stem[place]}.{kind}" if place in stem else rest
        renamed[f"vision_model.{target}"] = tensor.float() if tensor.is_floating_point() else tensor
    return renamed


def _depths(state: StateDict) -> list[int]:
    """Blocks in each stage of a ResNet."""
    found = {match.groups() for name in state if (match := re.match(r"visual\.layer(\d)\.(\d+)\.", name))}
    return [sum(stage == str(number) for stage, _ in found) for number in range(1, 5)]


def _text_projection(state: StateDict) -> Tensor:
    if "text_projection.weight" in state:  # a Linear, stored (out, in)
        return state["text_projection.weight"]
    return state["text_projection"].T.contiguous()


def _normalise_names(state: StateDict) -> StateDict:
    """Undo data-parallel and compile prefixes, and lift the text tower of `CustomTextCLIP` to the top."""
    # Each may lie within the other.
    while prefix := next((p for p in ("module.", "_orig_mod.") if state and all(n.startswith(p) for n in state)), ""):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    if "text.token_embedding.weight" in state:
        state = {name.removeprefix("text."): value for name, value in state.items()}
    return {name: value for name, value in state.items() if name not in ("attn_mask", "visual.attn_mask")}


def _refuse_foreign(checkpoint: Path, state: StateDict) -> None:
    for pattern, reason in _FOREIGN.items():
        if any(re.search(pattern, name) for name in state):
            raise ModelError(f"{checkpoint} cannot be converted: {reason}")
    if "logit_bias" in state:
        raise ModelError(f"{checkpoint} cannot be converted: it has a logit bias (trained as SigLIP)")
    of_image = (
        ("visual.conv1.weight", "visual.layer4.0.conv1.weight", "visual.attnpool.positional_embedding",
         "visual.attnpool.c_proj.weight")
        if is_resnet(state)
        else ("visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding", "visual.proj",
              "visual.ln_pre.weight", "visual.ln_post.weight")
    )  # fmt: skip
    needed = (*of_image, "token_embedding.weight", "positional_embedding", "ln_final.weight", "logit_scale")
    missing = [name for name in needed if name not in state]
    if not ("text_projection" in state or "text_projection.weight" in state):
        missing.append("text_projection")
    if missing:
        kind = "ResNet" if is_resnet(state) else "ViT"
        raise ModelError(f"{checkpoint} is not an OpenCLIP checkpoint of a {kind}: it lacks {', '.join(missing)}")
    plain = re.compile(f"{_OF_TEXT}|{_OF_RESNET if is_resnet(state) else _OF_VIT}")
    other = [name for name in state if state[name].is_floating_point() and not plain.fullmatch(name)]
    if other:
        raise ModelError(
            f"{checkpoint} cannot be converted, as there is no place for {', '.join(sorted(other)[:5])}"
            + (f" and {len(other) - 5} more" if len(other) > 5 else "")
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as an OpenCLIP configuration: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} is not an OpenCLIP configuration: it is no JSON object")
    # Files in OpenCLIP's model_configs folder hold the model part alone.
    settings = settings if "model_cfg" in settings else {"model_cfg": settings}
    for name, (fits, allowed) in _SETTINGS.items():
        *sections, key = name.split(".")
        values: Any = settings
        for section in sections:
            values = values.get(section) or {}
        if key in values and not fits(values[key]):
            short = name.removeprefix("model_cfg.")
            raise ModelError(f"{path}: {short} is {values[key]!r:.60}, but must be {allowed}: mend it, or leave it out")
    return settings


def _clip_config(checkpoint: Path, state: StateDict, model: dict[str, Any], quick_gelu: bool | None) -> CLIPConfig:
    """Sizes from the weights, and what the weights do not tell from the configuration."""
    from transformers import CLIPConfig

    _refuse_other_computations(checkpoint, model)
    heads, text_heads = _heads(checkpoint, state, model)
    quick_gelu = _uses_quick_gelu(checkpoint, model, quick_gelu)
    vision = model.get("vision_cfg", {})
    width, _, patch, patch_width = state["visual.conv1.weight"].shape
    grid = _grid(checkpoint, state["visual.positional_embedding"], square=patch == patch_width)
    dimension = state["visual.proj"].shape[1]
    return CLIPConfig(
        projection_dim=dimension,
        vision_config={
            "image_size": grid * patch,
            "patch_size": patch,
            "projection_dim": dimension,
            **_tower_config(checkpoint, state, "visual.", width, heads, quick_gelu, vision),
        },
        text_config=_text_config(checkpoint, state, model, dimension, text_heads, quick_gelu),
    )


def _resnet_config(
    checkpoint: Path, state: StateDict, model: dict[str, Any], quick_gelu: bool | None
) -> VisionTextDualEncoderConfig:
    """The same of a checkpoint with a ResNet."""
    from transformers import CLIPTextConfig, VisionTextDualEncoderConfig

    from trimtab.towers.clip_resnet import SHRINKS, ClipResNetVisionConfig

    _refuse_other_computations(checkpoint, model)
    heads, text_heads = _heads(checkpoint, state, model)
    quick_gelu = _uses_quick_gelu(checkpoint, model, quick_gelu)
    dimension, channels = state["visual.attnpool.c_proj.weight"].shape
    grid = _grid(checkpoint, state["visual.attnpool.positional_embedding"])
    if heads < 1 or channels % heads:
        raise ModelError(
            f"{checkpoint}: the image tower pools {channels} channels, which {heads} heads do not divide: pass its "
            "open_clip_config.json"
        )
    vision = ClipResNetVisionConfig(
        hidden_size=dimension,
        depths=_depths(state),
        width=2 * state["visual.conv1.weight"].shape[0],
        num_attention_heads=heads,
        image_size=grid * SHRINKS,
    )
    text = CLIPTextConfig(**_text_config(checkpoint, state, model, dimension, text_heads, quick_gelu))
    return VisionTextDualEncoderConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=dimension
    )


def _refuse_other_computations(checkpoint: Path, model: dict[str, Any]) -> None:
    for part, plain in _PLAIN.items():
        for key, fits in plain.items():
            if (value := model.get(part, {}).get(key, fits)) != fits:
                raise ModelError(f"{checkpoint} cannot be converted: {part}.{key} is {value!r}; only {fits!r} fits")


def _heads(checkpoint: Path, state: StateDict, model: dict[str, Any]) -> tuple[int, int]:
    """Attention heads of the image and the text tower; of a ResNet those of its pooling, in all of CLIP's 64 wide."""
    image, text = state["visual.conv1.weight"].shape[0], state["token_embedding.weight"].shape[1]
    if is_resnet(state):
        image = state["visual.attnpool.c_proj.weight"].shape[1]
    for part, width in (("vision_cfg", image), ("text_cfg", text)):
        sure = width in _SURE_WIDTHS or (part == "vision_cfg" and is_resnet(state))
        if part not in model and not sure:
            raise ModelError(
                f"{checkpoint}: the {'image' if part == 'vision_cfg' else 'text'} tower is {width} wide, and its "
                "weights do not tell the number of heads: pass its open_clip_config.json by --config"
            )
    in_text = model.get("text_cfg", {}).get("heads", _TEXT_HEADS if "text_cfg" in model else text // _HEAD_WIDTH)
    return image // model.get("vision_cfg", {}).get("head_width", _HEAD_WIDTH), in_text


def _uses_quick_gelu(checkpoint: Path, model: dict[str, Any], asked: bool | None) -> bool:
    if asked is not None:
        return asked
    if not model:
        raise ModelError(
            f"{checkpoint} comes without open_clip_config.json, and its weights do not tell the "
            "activation: say whether it uses QuickGELU (OpenAI's weights do, most later ones do not)"
        )
    return bool(model.get("quick_gelu", False))


def _grid(checkpoint: Path, positions: Tensor, *, square: bool = True) -> int:
    """Places on a side of the map, of which a position more is for the whole."""
    count = positions.shape[0] - 1
    grid = math.isqrt(count)
    if not square or grid * grid != count:
        raise ModelError(f"{checkpoint} cannot be converted: its images or patches are not square")
    return grid


def _text_config(
    checkpoint: Path, state: StateDict, model: dict[str, Any], dimension: int, heads: int, quick_gelu: bool
) -> dict[str, Any]:
    vocabulary, width = state["token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "max_position_embeddings": state["positional_embedding"].shape[0],
        "projection_dim": dimension,
        "eos_token_id": vocabulary - 1,
        "bos_token_id": vocabulary - 2,
        "pad_token_id": 0,
        **_tower_config(checkpoint, state, "", width, heads, quick_gelu, model.get("text_cfg", {})),
    }


def _tower_config(
    checkpoint: Path,
    state: StateDict,
    prefix: str,
    width: int,
    heads: int,
    quick_gelu: bool,
    given: dict[str, Any],
) -> dict[str, Any]:
    pattern = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    layers = {int(match[1]) for name in state if (match := pattern.match(name))}
    if not layers or heads < 1 or width % heads:
        raise ModelError(
            f"{checkpoint}: the {'image' if prefix else 'text'} tower has {len(layers)} layers of width "
            f"{width}, which {heads} heads do not divide: pass its open_clip_config.json"
        )
    inner = f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"
    if inner not in state:
        raise ModelError(f"{checkpoint} is not an OpenCLIP checkpoint: it lacks {inner}")
    tanh = (given.get("act_kwargs") or {}).get("approximate") == "tanh"
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": max(layers) + 1,
        "intermediate_size": state[inner].shape[0],
        "hidden_act": "quick_gelu" if quick_gelu else ("gelu_pytorch_tanh" if tanh else "gelu"),
        "layer_norm_eps": float((given.get("norm_kwargs") or {}).get("eps", 1e-5)),
    }


def _load_tokenizer(checkpoint: Path, tokenizer: str | Path | None, config: Any) -> Any:
    folder = resolve_folder(tokenizer) if tokenizer is not None else checkpoint.parent
    try:
        loaded = load_tokenizer(folder, config.text_config)
    except ModelError as error:
        if tokenizer is not None:
            raise
        raise ModelError(
            f"there is no usable tokenizer beside {checkpoint} ({error}): name the folder or hub id of the "
            "CLIP tokenizer it was trained with"
        ) from error
    ids = loaded("a", verbose=False)["input_ids"]
    if not ids or ids[-1] != max(loaded.get_vocab().values()):
        # OpenCLIP reads the text's vector at the largest id of the sequence, CLIPModel at the end token.
        raise ModelError(f"the tokenizer of {folder} does not end texts with its largest id, as CLIP's does")
    return loaded


def _image_processor(given: dict[str, Any], image_size: int) -> Any:
    from PIL.Image import Resampling

    size = given.get("size", image_size)
    size = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if size != [image_size, image_size]:
        raise ModelError(f"preprocess_cfg.size is {size}, but the weights are for {image_size}x{image_size} images")
    mode = given.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise ModelError(f"preprocess_cfg.resize_mode {mode!r} cannot be expressed; only 'shortest' and 'squash' can")
    interpolation = given.get("interpolation") or "bicubic"
    interpolation = "bicubic" if interpolation == "random" else interpolation
    square = {"height": image_size, "width": image_size}
    return image_processor_class("CLIPImageProcessor")(
        size=square if mode == "squash" else {"shortest_edge": image_size},
        do_center_crop=mode == "shortest",
        crop_size=square,
        image_mean=_of_channels(given.get("mean") or CLIP_MEAN),
        image_std=_of_channels(given.get("std") or CLIP_STD),
        resample=Resampling[interpolation.upper()],
        do_convert_rgb=True,
    )


def _of_channels(values: Any) -> list[float]:
    """A number for each of the three colours; as in OpenCLIP, one stands for all."""
    return [values] * 3 if isinstance(values, (int, float)) else list(values)
