"""What a model is: a base by its towers, an adapted folder by its description alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.adapters.files import (
    TENSORS_FILE,
    AdapterFile,
    StudentReference,
    is_adapted_folder,
    is_composed_folder,
    read_adapter,
)
from trimtab.errors import ModelError

if TYPE_CHECKING:
    from trimtab.towers.dual_encoder import DualEncoder

_CLASSES_SHOWN = 5
# By the first word of a parameter's name.
_SIDES = {"vision": "image", "visual": "image", "image": "image", "text": "text"}


def describe(model: str | Path) -> dict[str, Any]:
    """Facts about a model, as a nested dictionary in reading order.

    An adapted folder on disk is described from its own files, without torch and without its base; a base is loaded.

    Args:
        model: what `trimtab.load` takes.

    Raises:
        ModelError: unknown, incomplete or damaged model.
    """
    folder = model
    if not (is_composed_folder(model) or is_adapted_folder(model)):
        from trimtab.adapters.adapted import local_folder  # needs torch, as bases do

        folder = local_folder(model)
    if is_composed_folder(folder):
        return {**_describe_composed(Path(folder)), "model": str(model)}
    if is_adapted_folder(folder):
        return {**_describe_adapted(read_adapter(folder, tensors=False)), "model": str(model)}
    return _describe_base(model)


def _describe_composed(folder: Path) -> dict[str, Any]:
    from trimtab.adapters.composing import read_composed

    about = read_composed(folder)
    links = {name: read_adapter(folder / name, tensors=False) for name in about["links"]}
    return {
        "model": str(folder),
        "links": ", ".join(links),
        **{name: {**_own(adapter), "metrics": adapter.metrics} for name, adapter in links.items()},
        "other names of classes": len(about["aliases"]),
        "base": about["base"],
        "fingerprint": about["fingerprint"],
        "versions": about["versions"],
    }


def _describe_base(name: str | Path) -> dict[str, Any]:
    from trimtab.towers.hf import load_base, resolve_folder

    base = load_base(name, device="cpu")
    image, text, other = _parameters(base)
    config = base.model.config
    image_config = getattr(config, "vision_config", None) or getattr(config, "image_config", None)
    text_config = getattr(config, "text_config", None)
    return {
        "model": base.name,
        "family": base.family,
        "embedding_dim": base.embedding_dim,
        "logit_scale": base.logit_scale,
        "logit_bias": base.logit_bias,
        "fingerprint": base.fingerprint,
        "image_tower": {**_sizes(image_config, ("image_size", "patch_size")), "parameters": image},
        "text_tower": {**_sizes(text_config, ("vocab_size",)), "context_length": base.max_tokens, "parameters": text},
        "parameters": {"image": image, "text": text, "other": other, "total": image + text + other},
        "file_bytes": _file_sizes(resolve_folder(name)),
    }


def _describe_adapted(adapter: AdapterFile) -> dict[str, Any]:
    return {
        "model": str(adapter.folder),
        "link": adapter.link,
        **_own(adapter),
        "base": {
            "name": adapter.base.name,
            "family": adapter.base.family,
            "embedding_dim": adapter.base.embedding_dim,
            "fingerprint": adapter.base.fingerprint,
        },
        **({"student": _student(adapter.student)} if adapter.student or adapter.link == "language" else {}),
        "adapter": {**_scalars(adapter.config.get("adapter")), "numbers": _count_numbers(adapter.folder)},
        "metrics": adapter.metrics,
        "data": adapter.data,
        "versions": adapter.versions,
        "file_bytes": _file_sizes(adapter.folder),
    }


def _own(adapter: AdapterFile) -> dict[str, Any]:
    """What folders of this link have and others have not."""
    config = adapter.config
    if adapter.link == "domain":
        return {
            "adapters": _groups(config.get("adapters")),
            "gate": config.get("gate", "none"),
            "alpha": config.get("alpha"),
        }
    if adapter.link == "prompt":
        classes = config.get("classes")
        classes = classes if isinstance(classes, list) else []
        return {
            "method": adapter.recipe.get("method"),
            "parts": _parts(config.get("prompt")),
            "classes": len(classes),
            "first classes": classes[:_CLASSES_SHOWN],
        }
    return {"languages": _languages(adapter), "english": config.get("english")}


def _parts(prompt: Any) -> list[str]:
    """The parts of a prompt that are switched on."""
    general, instance, domain = (
        part if isinstance(prompt, dict) and isinstance(part := prompt.get(name), dict) else {}
        for name in ("general", "instance", "domain")
    )
    init = f"general tokens from {general['init']!r}" if general.get("init") else "general tokens"
    parts = {
        init: general,
        f"instance tokens by {instance.get('kind')}": instance,
        "tokens behind class names": domain.get("tokens"),
        "class vectors": domain.get("residual"),
        "class vectors over patches": domain.get("patches"),
    }
    return [name for name, there in parts.items() if there]


def _student(student: StudentReference | None) -> dict[str, Any]:
    if student is None:
        return {}
    return {
        "name": student.name,
        "layers": list(student.layers),
        "prefix": student.prefix,
        "max_tokens": student.max_tokens,
        "fingerprint": student.fingerprint,
    }


def _groups(groups: Any) -> dict[str, str]:
    """Groups of domain adapters by kind and place."""
    found = {}
    for one in groups if isinstance(groups, list) else []:
        if isinstance(one, dict):
            part = "blocks" if one.get("kind") == "conv" else "layers"
            place = f"{one.get('tower')} {part} {one.get('first')} to {one.get('last')}"
            found[f"{one.get('kind')} beside {place}"] = f"width {one.get('width')}"
    return found


def _parameters(base: DualEncoder) -> tuple[int, int, int]:
    """Parameters of the image side, the text side, and the rest (logit_scale, fusion)."""
    counts: Counter[str] = Counter()
    for name, parameter in base.model.named_parameters():
        fusion = "_to_mm_" in name  # FLAVA's image_to_mm_projection and its twin
        counts["other" if fusion else _SIDES.get(name.split("_")[0], "other")] += parameter.numel()
    return counts["image"], counts["text"], counts["other"]


def _sizes(config: Any, extra: tuple[str, ...]) -> dict[str, Any]:
    """Sizes that a tower's configuration states, under the words that all families share."""
    names = {"model_type": "kind", "hidden_size": "width", "num_hidden_layers": "layers"}
    names |= {"num_attention_heads": "heads", **{name: name for name in extra}}
    return {word: getattr(config, name) for name, word in names.items() if getattr(config, name, None) is not None}


def _languages(adapter: AdapterFile) -> list[str]:
    """Languages that an adapter was trained on, from its data or else from its recipe."""
    found = adapter.data.get("languages")
    if not found:
        sources = (adapter.recipe.get("data") or {}).get("train") or []
        found = [source["language"] for source in sources if isinstance(source, dict) and source.get("language")]
    return list(dict.fromkeys(map(str, found)))


def _count_numbers(folder: Path) -> int:
    """Numbers in the adapter's tensors, from the head of the file."""
    from safetensors import SafetensorError, safe_open

    path = folder / TENSORS_FILE
    try:
        with safe_open(path, framework="numpy") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is missing, damaged or cut short ({error}): copy the folder again") from error


def _scalars(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        return {}
    return {key: value for key, value in values.items() if isinstance(value, (str, int, float))}


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files of a model folder, by name."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
