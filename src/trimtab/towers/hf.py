"""Load dual encoders from transformers folders and the model hub: safetensors only, complete or refused."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from trimtab.errors import ModelError
from trimtab.towers.dual_encoder import DualEncoder, Family
from trimtab.towers.freezing import fingerprint, freeze
from trimtab.towers.parts import load_config, load_image_processor, load_tokenizer, load_weights
from trimtab.towers.tokens import TextInputs, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FAMILIES: dict[str, Family] = {
    "clip": Family("CLIPModel", pools_end_token=True),
    "siglip": Family("SiglipModel", pad_to_limit=True, mask_by_tokenizer=True),  # also SigLIP 2 at a fixed resolution
    "siglip2": Family("Siglip2Model", pad_to_limit=True, mask_by_tokenizer=True),  # SigLIP 2 NaFlex
    "chinese_clip": Family("ChineseCLIPModel"),
    "altclip": Family("AltCLIPModel"),
    "vision-text-dual-encoder": Family("VisionTextDualEncoderModel"),
    "flava": Family("FlavaModel", projects_tokens=True),
}
_REMOTE = Family("AutoModel")  # a model with its own code, which the user has opted into

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BUILT_IN = ("starter", "e5-small")
"""Names of models that are built here; a folder of such a name is given as ``./starter``."""

_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.bpe", "README.md"]
_LINK_FILES = ["*/adapter.json", "*/adapter.safetensors", "*/README.md"]
_CHOICES = "give 'starter', the folder of a transformers model, or a model hub id such as 'owner/name'"


def load_base(
    name: str | Path, *, device: str = "auto", dtype: str = "float32", trust_remote_code: bool = False
) -> DualEncoder:
    """Load a frozen dual encoder.

    Args:
        name: "starter", a transformers folder, or a model hub id.
        device: "auto" takes a GPU where there is one; or a torch device.
        dtype: precision of weights and activations; embeddings are float32 in any case.
        trust_remote_code: run Python code from the model folder, for models that transformers does not know.

    Raises:
        ModelError: unknown, incomplete or damaged model; the message says what to do.
    """
    target_device, target_dtype = pick_device(device), pick_dtype(dtype)
    folder = resolve_folder(name, trust_remote_code=trust_remote_code)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    facts = FAMILIES.get(config.model_type, _REMOTE)
    if facts is _REMOTE and not trust_remote_code:
        raise ModelError(
            f"{name} is a {config.model_type!r} model; a base must be one of {', '.join(FAMILIES)}. "
            "A text encoder alone can be the student of a language link instead"
        )
    model = load_weights(
        facts.model_class,
        folder,
        config,
        trust_remote_code=trust_remote_code,
        hub_id=str(name) if is_hub_id(name) else None,
    )
    if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
        raise ModelError(f"{name} has no get_text_features and get_image_features: it is no dual encoder")
    freeze(model)
    digest = fingerprint(model, config)  # before a cast to lower precision
    model.to(target_device, target_dtype)

    text_config = getattr(config, "text_config", None) or config
    tokenizer = load_tokenizer(folder, text_config, trust_remote_code=trust_remote_code)
    if config.model_type == "siglip":
        _lowercase_gemma(tokenizer)
    if facts.pools_end_token:
        _warn_without_end_token(folder, tokenizer, text_config)
    text_tower = getattr(model, "text_model", model)
    limit = context_length(tokenizer, text_tower, text_config)
    # After padding on the left, positions (and the first token) would depend on the longest text of a batch.
    side = None if facts.pad_to_limit or facts is _REMOTE else "right"
    text_inputs = text_inputs_for(facts, tokenizer, limit, padding_side=side)
    image_processor = load_image_processor(folder, trust_remote_code=trust_remote_code)
    try:
        base = DualEncoder(
            model,
            text_inputs,
            image_processor,
            name=str(name),
            family=config.model_type,
            facts=facts,
            fingerprint=digest,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a combination of towers runs into that transformers does not try
        raise ModelError(
            f"the text tower of {folder} (model type {text_config.model_type!r}) cannot embed a text ({error}): "
            "a base needs one that pools its tokens, such as BERT's"
        ) from error
    _check_image_size(folder, base, config)
    return base


def text_inputs_for(facts: Family, tokenizer: PreTrainedTokenizerBase, limit: int, **options: Any) -> TextInputs:
    """How a family's text tower takes its tokens; `options` go to `TextInputs`."""
    use_mask = not facts.mask_by_tokenizer or "attention_mask" in tokenizer.model_input_names
    return TextInputs(tokenizer, limit, pad_to_limit=facts.pad_to_limit, use_mask=use_mask, **options)


def resolve_folder(name: str | Path, *, trust_remote_code: bool = False) -> Path:
    """The local folder of a model: built, given, or fetched from the model hub.

    Raises:
        ModelError: there is no such model, or the hub cannot be reached and holds no local copy.
    """
    if name == "starter":
        from trimtab.towers.starter import ensure_starter

        return ensure_starter()
    if name == "e5-small":
        from trimtab.towers.e5 import ensure_e5

        return ensure_e5()
    path = Path(name).expanduser()
    if str(name) and path.is_dir():
        return path
    if path.is_file():
        raise ModelError(
            f"{name} is a file; give the folder of a transformers model. "
            "An OpenCLIP checkpoint becomes one by `trimtab convert`"
        )
    if not could_be_hub_id(str(name)):
        raise ModelError(f"unknown model {str(name)!r}: there is no such folder; {_CHOICES}")

    patterns = [*_HUB_FILES, "*.py"] if trust_remote_code else _HUB_FILES
    return _fetched(str(name), patterns, ["*/*", "open_clip_*.safetensors"])


def fetch_links(name: str | Path) -> Path:
    """The local folder of a composed model of the hub, with the folders of its links.

    Raises:
        ModelError: as for `resolve_folder`.
    """
    return _fetched(str(name), _LINK_FILES, ["*/*/*"])


def could_be_hub_id(name: str) -> bool:
    """Whether a name is written as ids of the model hub are."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not name.startswith(".")


def is_hub_id(name: str | Path) -> bool:
    """Whether a name is looked up on the model hub: neither built in nor a path that is there."""
    return str(name) not in BUILT_IN and not Path(name).expanduser().exists()


def portable(name: str) -> str:
    """Names of local folders as absolute paths, so that they are found from anywhere on this machine."""
    return name if is_hub_id(name) or name in BUILT_IN else str(Path(name).expanduser().resolve())


def _fetched(name: str, patterns: list[str], without: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        fetched = huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=without)
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"unknown model {name!r}: there is no such folder, and the model hub cannot be reached (or "
            f"HF_HUB_OFFLINE is set) and no local copy of that id exists; {_CHOICES}"
        ) from error
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"unknown model {name!r}: no such folder, and the hub says: {reason}; {_CHOICES}") from error
    return Path(fetched)


def pick_device(device: str) -> torch.device:
    """The torch device for a name; "auto" is CUDA, then Apple's MPS, then the CPU."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except Exception as error:  # AssertionError, RuntimeError, NotImplementedError by backend
        reason = str(error).partition("\n")[0].partition(". ")[0]  # the rest lists what torch was built with
        raise ModelError(f"device {device!r} cannot be used here ({reason}): choose 'auto' or 'cpu'") from error
    return chosen


def pick_dtype(dtype: str) -> torch.dtype:
    """The torch precision for a name."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _warn_without_end_token(folder: Path, tokenizer: PreTrainedTokenizerBase, text_config: PreTrainedConfig) -> None:
    end = text_config.eos_token_id
    if end == 2:  # CLIP's first configurations: the tower reads the largest token id instead
        return
    if end not in tokenizer("a", verbose=False)["input_ids"]:
        logger.warning(
            "the tokenizer of %s does not write token %s, where the text tower reads the text's vector: it "
            "may belong to another model", folder, end,
        )  # fmt: skip


def _lowercase_gemma(tokenizer: PreTrainedTokenizerBase) -> None:
    """Lowercase what SigLIP 2 reads, as in its training; a tokenizer that was saved so is left as it is.

    Of a fixed resolution it is a SigLIP model with Gemma's tokenizer, and transformers lowercases for NaFlex alone.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__name__.startswith("Gemma"):
        return
    own = backend.normalizer
    if own is not None and own.normalize_str("A") == own.normalize_str("a"):
        return
    from tokenizers import normalizers

    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([] if own is None else [own])])


def _check_image_size(folder: Path, base: DualEncoder, config: PreTrainedConfig) -> None:
    """Refuse an image processor whose output the image tower cannot take or that lands in another space."""
    vision_config = getattr(config, "vision_config", None) or getattr(config, "image_config", None)
    size: Any = getattr(vision_config, "image_size", None)
    expected = (size, size) if isinstance(size, int) else tuple(size or ())
    grey = Image.new("RGB", (64, 48), (128, 128, 128))
    try:
        pixels = base.preprocess(grey)
        if tuple(pixels["pixel_values"].shape[-2:]) == expected:
            return  # spares a forward pass
        with torch.no_grad():
            features = base.pixel_features(pixels)
    except Exception as error:
        raise ModelError(
            f"the image processor of {folder} does not fit its image tower (config.json says images of "
            f"{expected or 'unknown size'}): {error}"
        ) from error
    if features.shape[-1] != base.embedding_dim:
        raise ModelError(
            f"{folder} gives images {features.shape[-1]} and texts {base.embedding_dim} dimensions: they share no space"
        )
