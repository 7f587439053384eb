"""Turn an OpenCLIP checkpoint file into a transformers `CLIPModel` folder.

open_clip itself needs torchvision, so its state dict is renamed instead. ViT image towers with OpenCLIP's own
text tower keep every weight as it is; anything that `CLIPModel` cannot compute is refused with the reason.
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
    from transformers import CLIPConfig

StateDict = dict[str, Tensor]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HEAD_WIDTH = 64
# Of towers whose heads are 64 wide in every model of OpenCLIP; those of ViT-H, g and bigG are not.
_SURE_WIDTHS = (512, 768, 1024)
_TEXT_HEADS = 8  # of an OpenCLIP configuration that does not say, whatever the width

# What a state dict holds when the image or text tower is not the plain Transformer that CLIPModel computes.
_FOREIGN = {
    r"^visual\.layer1\.": "its image tower is a ResNet; only ViT image towers can be converted",
    r"^visual\.trunk\.": "its image tower comes from timm; only OpenCLIP's own ViT can be converted",
    r"^visual\.attn_pool\.": "its image tower pools by attention, which CLIPModel cannot",
    r"^text_decoder\.": "it is a CoCa model with a text decoder, which CLIPModel does not have",
    r"^text\.transformer\.(embeddings|encoder|shared|layer)\b": "its text tower is a Hugging Face model "
    "(`text.transformer.`); only OpenCLIP's own text tower can be converted",
    r"\.ls_[12]\.gamma$": "its layers are scaled (LayerScale), which CLIPModel cannot",
    r"^(text\.)?text_projection\.bias$": "its text projection has a bias, which CLIPModel's has not",
    r"^(text\.)?cls_emb$": "its text tower reads a CLS token rather than the end token",
    r"\.attn\.(ln_|logit_scale|in_proj\.|qkv\.)|\.mlp\.ln\.|\.ln_attn\.": "its layers are not CLIPModel's",
}
# All that a plain ViT of OpenCLIP has: any other tensor would change its vectors and find no place in CLIPModel.
_PLAIN_TENSORS = re.compile(
    r"(visual\.)?(positional_embedding|transformer\.resblocks\.\d+\..+)|visual\.(proj|class_embedding|conv1\.weight)"
    r"|(visual\.ln_pre|visual\.ln_post|ln_final)\.(weight|bias)|text_projection(\.weight)?|token_embedding\.weight"
    r"|logit_scale"
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
    """Write a `CLIPModel` folder that gives the embeddings of an OpenCLIP checkpoint.

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
        ModelError: not an OpenCLIP checkpoint, one that `CLIPModel` cannot compute, or a configuration with a value
            that cannot be.
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
    clip_config: Any = _clip_config(checkpoint, state, settings.get("model_cfg", {}), quick_gelu)
    clip_tokenizer = _load_tokenizer(checkpoint, tokenizer, clip_config)
    if (end := clip_tokenizer.eos_token_id) is not None:
        clip_config.text_config.eos_token_id = end
        clip_config.text_config.bos_token_id = clip_tokenizer.bos_token_id
        clip_config.text_config.pad_token_id = clip_tokenizer.pad_token_id

    from transformers import CLIPModel

    with quiet():
        model = CLIPModel(clip_config)
        weights = to_clip_names(state)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if wrong := [name for name, tensor in weights.items() if shapes.get(name, tensor.shape) != tensor.shape]:
            raise ModelError(
                f"{checkpoint} holds tensors whose shapes do not go together, after renaming {wrong[:5]}: it is "
                "damaged or no plain OpenCLIP ViT; fetch it again"
            )
        missing, unexpected = model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not name.endswith("position_ids")]
        if missing or unexpected:
            raise ModelError(
                f"{checkpoint} is not a plain OpenCLIP ViT: after renaming, "
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


def to_clip_names(state: StateDict) -> StateDict:
    """Rename OpenCLIP's tensors to those of `CLIPModel`; fused query-key-value projections are split."""
    renamed: StateDict = {
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_projection.weight": _text_projection(state),
        "logit_scale": state["logit_scale"].reshape(()),
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers spells it so
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    in_layer = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
                "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if stem in norms:
            renamed[f"{norms[stem]}.{kind}"] = tensor
        layer = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
        if layer is None:
            continue
        target = f"{'vision' if layer[1] else 'text'}_model.encoder.layers.{layer[2]}"
        if layer[3] in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = layer[3].removeprefix("attn.in_proj_")
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{target}.self_attn.{part}_proj.{kind}"] = values.contiguous()
        else:
            stem, _, kind = layer[3].rpartition(".")
            renamed[f"{target}.{in_layer.get(stem, stem)}.{kind}"] = tensor
    return {name: tensor.float() for name, tensor in renamed.items()}


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
            raise ModelError(f"{checkpoint} cannot become a CLIPModel: {reason}")
    if "logit_bias" in state:
        raise ModelError(f"{checkpoint} cannot become a CLIPModel: it has a logit bias (trained as SigLIP)")
    needed = ("visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding", "visual.proj",
              "visual.ln_pre.weight", "visual.ln_post.weight", "token_embedding.weight",
              "positional_embedding", "ln_final.weight", "logit_scale")  # fmt: skip
    missing = [name for name in needed if name not in state]
    if not ("text_projection" in state or "text_projection.weight" in state):
        missing.append("text_projection")
    if missing:
        raise ModelError(f"{checkpoint} is not an OpenCLIP checkpoint of a ViT: it lacks {', '.join(missing)}")
    other = [name for name in state if state[name].is_floating_point() and not _PLAIN_TENSORS.fullmatch(name)]
    if other:
        raise ModelError(
            f"{checkpoint} cannot become a CLIPModel, which has no place for {', '.join(sorted(other)[:5])}"
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

    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    for part, plain in _PLAIN.items():
        for key, fits in plain.items():
            if (value := model.get(part, {}).get(key, fits)) != fits:
                raise ModelError(
                    f"{checkpoint} cannot become a CLIPModel: {part}.{key} is {value!r}; only {fits!r} fits"
                )
    vision_heads, text_heads = _heads(checkpoint, state, model)
    if quick_gelu is None:
        if not model:
            raise ModelError(
                f"{checkpoint} comes without open_clip_config.json, and its weights do not tell the "
                "activation: say whether it uses QuickGELU (OpenAI's weights do, most later ones do not)"
            )
        quick_gelu = bool(model.get("quick_gelu", False))
    width, _, patch, patch_width = state["visual.conv1.weight"].shape
    positions = state["visual.positional_embedding"].shape[0] - 1
    grid = math.isqrt(positions)
    if patch != patch_width or grid * grid != positions:
        raise ModelError(f"{checkpoint} cannot become a CLIPModel: its images or patches are not square")
    text_width = state["token_embedding.weight"].shape[1]
    vocabulary, dimension = state["token_embedding.weight"].shape[0], state["visual.proj"].shape[1]
    return CLIPConfig(
        projection_dim=dimension,
        vision_config={
            "image_size": grid * patch,
            "patch_size": patch,
            "projection_dim": dimension,
            **_tower_config(checkpoint, state, "visual.", width, vision_heads, quick_gelu, vision),
        },
        text_config={
            "vocab_size": vocabulary,
            "max_position_embeddings": state["positional_embedding"].shape[0],
            "projection_dim": dimension,
            "eos_token_id": vocabulary - 1,
            "bos_token_id": vocabulary - 2,
            "pad_token_id": 0,
            **_tower_config(checkpoint, state, "", text_width, text_heads, quick_gelu, text),
        },
    )


def _heads(checkpoint: Path, state: StateDict, model: dict[str, Any]) -> tuple[int, int]:
    """Attention heads of the image and the text tower."""
    widths = {
        "vision_cfg": state["visual.conv1.weight"].shape[0],
        "text_cfg": state["token_embedding.weight"].shape[1],
    }
    for part, width in widths.items():
        if part not in model and width not in _SURE_WIDTHS:
            raise ModelError(
                f"{checkpoint}: the {'image' if part == 'vision_cfg' else 'text'} tower is {width} wide, and its "
                "weights do not tell the number of heads: pass its open_clip_config.json by --config"
            )
    image, text = widths.values()
    in_text = model.get("text_cfg", {}).get("heads", _TEXT_HEADS if "text_cfg" in model else text // _HEAD_WIDTH)
    return image // model.get("vision_cfg", {}).get("head_width", _HEAD_WIDTH), in_text


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
        raise ModelError(f"{checkpoint} is not an OpenCLIP checkpoint of a ViT: it lacks {inner}")
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
