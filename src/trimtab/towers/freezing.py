"""Freeze a model for good, and name it by its content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from trimtab.files import digest_of

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Keys that differ between two copies of one model, or that an encoder in eval mode never reads.
VOLATILE_CONFIG_KEYS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_name_or_path", "architectures", "attention_dropout", "attention_probs_dropout_prob", "auto_map",
    "classifier_dropout", "dtype", "finetuning_task", "hidden_dropout_prob", "id2label",
    "init_codebook", "initializer_factor", "initializer_range", "label2id", "logit_scale_init_value",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict", "return_loss",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip

# How an image processor was made, not what it does.
_VOLATILE_PROCESSOR_KEYS = frozenset({
    "_processor_class", "auto_map", "feature_extractor_type", "image_processor_type", "processor_class",
    "transformers_version",
})  # fmt: skip

# Common words, case, accents, digits, scripts and odd spaces: two tokenizers that agree on the vocabulary but
# not on how text is normalised or wrapped in special tokens differ on one of these.
_PROBES = (
    "a photo of a cat",
    "A Photo, of: 2 CATS!",
    "café naïve Straße",
    "一张猫的照片",
    "猫の写真",
    " a\tb  c\n",
    "",
)


def freeze(model: ModuleT) -> ModuleT:
    """Take all parameters out of training and keep the model in eval mode.

    It stays in eval mode when a parent's ``.train()`` walks over it, or over any part of it: dropout and
    batch statistics of a frozen tower must never depend on what a trainer does.
    """
    model.requires_grad_(False)
    model.eval()
    for module in model.modules():
        module.train = partial(_stay_in_eval, module)  # type: ignore[method-assign]
    return model


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def fingerprint(model: nn.Module, config: PreTrainedConfig | None = None, *, exclude: Iterable[str] = ()) -> str:
    """SHA-256 over a model's weights and the part of its configuration that changes its output.

    Weights are hashed as float32 values with their shapes but without their names, and only those settings
    count that differ from the defaults of their class. So the result survives saving again (also in another
    precision that holds the values), and the renamed modules and new settings of later transformers versions.

    Args:
        model: in the precision it is stored in or a wider one; casting it down first gives another result.
        config: defaults to ``model.config``.
        exclude: prefixes of parameter names that are no part of the encoder.
    """
    config = getattr(model, "config", None) if config is None else config
    prefixes = tuple(exclude)
    tensors = [value for name, value in model.state_dict().items() if not (prefixes and name.startswith(prefixes))]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]  # integer buffers hold no weights
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter lock
        weights = sorted(pool.map(_tensor_digest, floating))
    settings = json.dumps({} if config is None else _settings(config), sort_keys=True, default=str)
    return digest_of(settings, *weights)


def _tensor_digest(tensor: Tensor) -> str:
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    digest = hashlib.sha256(repr(tuple(values.shape)).encode())
    digest.update(values.reshape(-1).view("uint8").data)
    return digest.hexdigest()


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Settings that differ from their class's defaults, sub-configurations nested."""
    nested = [name for name in type(config).sub_configs if hasattr(getattr(config, name, None), "to_dict")]
    try:
        defaults = type(config)().to_dict()
    except Exception:  # a user's class may have required arguments
        defaults = {}
    settings: dict[str, Any] = {
        key: value
        for key, value in config.to_dict().items()
        if key not in nested and key not in VOLATILE_CONFIG_KEYS and (key not in defaults or defaults[key] != value)
    }
    settings["model_type"] = config.model_type
    for name in nested:
        settings[name] = _settings(getattr(config, name))
    return settings


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over a tokenizer's vocabulary and what it does to a few probe texts.

    Not over its files, whose layout changes from version to version while the token ids do not.
    """
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])))
    probes = [list(tokenizer(text, verbose=False)["input_ids"]) for text in _PROBES]
    return digest_of(vocabulary, json.dumps(probes))


def image_processor_digest(processor: BaseImageProcessor) -> str:
    """SHA-256 over the settings of an image processor that differ from the defaults of its class.

    So the result survives saving again, and new settings of later transformers versions.
    """
    kind = re.sub(r"(Fast|Pil)$", "", type(processor).__name__)  # the same in every backend
    try:
        defaults = _plain(type(processor)().to_dict())
    except Exception:  # a user's class may have required arguments
        defaults = {}
    settings = {
        key: value
        for key, value in _plain(processor.to_dict()).items()
        if key not in _VOLATILE_PROCESSOR_KEYS and defaults.get(key) != value
    }
    return digest_of(kind, json.dumps(settings, sort_keys=True, default=str))


def _plain(value: Any) -> Any:
    """As JSON would hold it: numbers as floats, no tuples, nothing that is None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, (int, float)) else value
