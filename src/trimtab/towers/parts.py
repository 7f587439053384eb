"""The parts of a transformers folder, each loaded strictly.

Where transformers would go on with random weights or an empty vocabulary, these say what is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trimtab.errors import ModelError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

# Buffers that older checkpoints hold or lack, computed anew in either case.
_HARMLESS_MISSING = re.compile(r"(^|\.)(position_ids|token_type_ids)$")
_VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.bpe", "tekken.json")
_TOKENIZERS_WITHOUT_FILES = {"ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"}


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the configuration of a model folder.

    Raises:
        ModelError: there is none, it is damaged, or the model needs code of its own that is not trusted.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if (folder / "adapter.json").is_file():
        raise ModelError(
            f"{folder} is an adapted folder, not a base; trimtab.load() reads it. To adapt further, take the base that "
            f"`trimtab info {folder}` names, with the old data and the new"
        )
    if not path.is_file():
        hint = ""
        if list(folder.glob("open_clip_*")):
            hint = "; it holds an OpenCLIP checkpoint: turn it into one with `trimtab convert`"
        elif folder.suffix == ".training":
            hint = f": it is the training folder of {folder.with_suffix('')}, give that"
        raise ModelError(f"{folder} has no config.json, so it is not a transformers model folder{hint}")
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
        model_type = raw.get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not a JSON object ({error}): fetch it again") from error
    if '"trimtab_' in text:
        _register_own_types()  # which imports half of transformers
    if raw.get("auto_map") and not trust_remote_code and model_type not in _known_model_types():
        raise ModelError(
            f"{folder} brings Python code of its own (model type {model_type!r}), which is not run. If you "
            "trust its author, pass trust_remote_code=True"
        )
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validation errors of many kinds
        if not model_type:
            raise ModelError(f"{path} has no model_type, so it is not a transformers model folder") from error
        raise ModelError(f"{path} cannot be used (model type {model_type!r}): {error}") from error


def load_weights(
    model_class: str,
    folder: Path,
    config: PreTrainedConfig,
    *,
    trust_remote_code: bool = False,
    may_miss: str | None = None,
    hub_id: str | None = None,
) -> Any:
    """Load a model in float32 from safetensors and refuse one that is not complete.

    Args:
        model_class: name of a transformers class.
        may_miss: a pattern of parameter names that the caller does not use.
        hub_id: what the folder was fetched by from the model hub, for messages.

    Raises:
        ModelError: no safetensors, a damaged file, or missing or misshapen weights, which transformers would
            fill at random.
    """
    import transformers

    files = sorted(folder.glob("*.safetensors"))
    if not files and hub_id:
        raise ModelError(
            f"{hub_id} has no safetensors weights on the model hub, and no other format is read, as it can run code: "
            "load it with transformers where you trust it, call save_pretrained(folder) on its model, tokenizer and "
            "image processor, and give that folder"
        )
    if not files:
        unsafe = [
            path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5") for path in folder.glob(pattern)
        ]
        if unsafe:
            raise ModelError(
                f"{folder} has its weights only in {', '.join(sorted(unsafe))}, a format that can run code "
                "when it is read. Save them as safetensors first: load it with transformers where you trust "
                "it, then model.save_pretrained(folder)"
            )
        raise ModelError(f"{folder} has no *.safetensors file, so there are no weights to load")
    loader = getattr(transformers, model_class)
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        # What a file lacks, such as a pooler that is not used, starts with random weights: not the caller's draw.
        with quiet(), torch.random.fork_rng(devices=[]):
            model, report = loader.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the report names them; refused below
                **options,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # from reading files, or from a configuration that does not fit together
        for path in files:
            if reason := _damage(path):
                raise ModelError(f"{path} is damaged or cut short ({reason}): fetch it again") from error
        if reason := _incomplete(folder, [path.name for path in files]):
            raise ModelError(reason) from error
        raise ModelError(f"{folder} cannot be loaded as {model_class}: {error}") from error
    missing = sorted(key for key in report["missing_keys"] if not _HARMLESS_MISSING.search(key))
    if may_miss:
        missing = [key for key in missing if not re.search(may_miss, key)]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the weights of {model_class}: {_some(missing)}. transformers "
            "would fill them at random; get the complete model"
        )
    misshapen = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    if misshapen:
        raise ModelError(
            f"{folder} has {len(misshapen)} weights of another shape than its config.json says: "
            f"{_some(misshapen)}. The weights and config.json belong to different models"
        )
    return model


def load_tokenizer(
    folder: Path, text_config: PreTrainedConfig, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        ModelError: there is none (transformers would make an empty one), it is damaged, or it has more tokens
            than the text tower has embeddings.
    """
    from transformers import AutoTokenizer

    declared = _read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    has_files = any(list(folder.glob(pattern)) for pattern in _VOCABULARY_FILES)
    if not has_files and declared not in _TOKENIZERS_WITHOUT_FILES and not trust_remote_code:
        raise ModelError(
            f"{folder} has no tokenizer (one of {', '.join(_VOCABULARY_FILES)}): copy the tokenizer files of "
            "the original model into it, or call tokenizer.save_pretrained(folder)"
        )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception on damaged files
        if _lacks_sentencepiece(folder, error):
            raise ModelError(
                f'the tokenizer of {folder} needs the package sentencepiece: pip install "trimtab[siglip]"'
            ) from error
        if isinstance(error, ImportError):
            raise ModelError(f"the tokenizer of {folder} needs another package: {str(error).strip()}") from error
        raise ModelError(f"the tokenizer of {folder} cannot be loaded: {error}") from error
    embeddings = getattr(text_config, "vocab_size", None)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if isinstance(embeddings, int) and largest >= embeddings:
        raise ModelError(
            f"the tokenizer of {folder} has token ids up to {largest}, but the text tower only has "
            f"{embeddings} embeddings: the tokenizer belongs to another model"
        )
    if largest < 1:
        raise ModelError(f"the tokenizer of {folder} has an empty vocabulary: copy the original model's files")
    return tokenizer


def load_image_processor(folder: Path, *, trust_remote_code: bool = False) -> BaseImageProcessor:
    """Load the image processor of a model folder, in its Pillow version: torchvision is not needed.

    Raises:
        ModelError: there is none or it is not a transformers image processor.
    """
    import transformers

    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        settings = _read_json(path)
        settings = settings.get("image_processor", settings if path.name.startswith("pre") else {})
        if settings:
            break
    else:
        raise ModelError(
            f"{folder} has no image processor (preprocessor_config.json): copy it from the original model, "
            "or call image_processor.save_pretrained(folder)"
        )
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    try:
        with quiet():
            if (processor_class := image_processor_class(str(kind))) is not None:
                return processor_class.from_dict(settings)
            if trust_remote_code:
                return transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:
        raise ModelError(f"the image processor of {path} cannot be made: {error}") from error
    raise ModelError(
        f"{path} asks for the image processor {kind!r}, which transformers does not have; set "
        "image_processor_type to one that it has, such as CLIPImageProcessor"
    )


def image_processor_class(kind: str) -> Any:
    """transformers' image processor class of that name, in its Pillow version; None if there is none."""
    import transformers

    stem = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "ImageProcessor", kind)
    if not re.fullmatch(r"\w+ImageProcessor", stem):  # a class by name, never a path
        return None
    # Earlier transformers 5 have no *Pil names; the plain class is the Pillow one there.
    return getattr(transformers, stem + "Pil", None) or getattr(transformers, stem, None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and notes for a while; what matters is raised as an error."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _lacks_sentencepiece(folder: Path, error: Exception) -> bool:
    if importlib.util.find_spec("sentencepiece") is not None:
        return False
    unread = any(folder.glob("*.model")) and not (folder / "tokenizer.json").is_file()
    return unread or "sentencepiece" in str(error).lower()


def _register_own_types() -> None:
    # They register their model types with transformers.
    import trimtab.towers.clip_resnet
    import trimtab.towers.starter_model  # noqa: F401


def _known_model_types() -> set[str]:
    from transformers import CONFIG_MAPPING

    return set(CONFIG_MAPPING.keys())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object: fetch it again")
    return value


def _incomplete(folder: Path, found: list[str]) -> str | None:
    """What is missing of a folder's safetensors files, with the remedy, or None."""
    whole = "model.safetensors"
    if whole in found:
        return None
    index = folder / f"{whole}.index.json"
    if not index.is_file():
        return (
            f"{folder} has neither {whole} nor the {index.name} of a model in several files, only {_some(found)}: "
            f"fetch what is missing, or name the file that holds all weights {whole}"
        )
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        return f"{index} has no weight_map: fetch it again"
    missing = sorted({str(name) for name in listed.values()} - set(found))
    return f"{folder} lacks {_some(missing)}, which {index.name} lists: fetch the complete model" if missing else None


def _damage(path: Path) -> str | None:
    """Why a safetensors file cannot be opened, or None."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error)


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
