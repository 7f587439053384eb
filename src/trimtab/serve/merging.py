"""A model as an ordinary transformers folder, where its weights can hold what was learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import ModelError
from trimtab.serve.export import TEXTS, made_pictures
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.hf import load_base

_TOLERANCE = 1e-5
_OURS = "trimtab_"  # how the kinds of our own towers start
_INSTEAD = "`trimtab export --format onnx` writes it with everything inside"


def merge(model: DualEncoder, out: str | Path) -> dict[str, Any]:
    """Write a transformers folder that gives the same embeddings.

    What the domain link's methods `full`, `lora` and `probe` trained lies in the weights of the base already. Adapters
    and prompts do not, see `why_not`.

    Raises:
        ModelError: it cannot be merged, with the reason; or what was written gives other embeddings.
    """
    if reason := why_not(model):
        raise ModelError(f"{model.name} cannot be merged: {reason}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} holds other files: choose another folder")
    plain: DualEncoder = getattr(model, "base", model)
    folder = plain.save_pretrained(out)
    again = load_base(folder, device="cpu")
    plain.to("cpu")
    worst = max(
        float(np.abs(plain.encode_image(made_pictures()) - again.encode_image(made_pictures())).max()),
        float(np.abs(plain.encode_text(TEXTS) - again.encode_text(TEXTS)).max()),
    )
    if not worst <= _TOLERANCE:
        raise ModelError(f"{folder} gives other embeddings than {model.name} (by {worst:.1e}): do not use it")
    return {
        "folder": str(folder),
        "load_with": f"transformers.{type(plain.model).__name__}.from_pretrained({str(folder)!r})",
        "largest difference": f"{worst:.1e}",
    }


def why_not(model: Any) -> str:
    """Why no weights of the base can hold what a model learned; empty if they do."""
    config = model.model.config
    kinds = [getattr(getattr(config, name, None), "model_type", "") for name in ("vision_config", "text_config")]
    if any(str(kind).startswith(_OURS) for kind in kinds):
        return f"its towers are of kinds that transformers does not have ({', '.join(kinds)}). {_INSTEAD}"
    links = model.links if hasattr(model, "core") else {"": model}
    for link in links.values():
        if hasattr(link, "prompt_tower"):
            return (
                "its prompts are inputs of the text tower and vectors of classes, which a folder of weights has no "
                f"place for. {_INSTEAD}, with the class vectors where no prompt looks at the picture"
            )
        if hasattr(link, "student"):
            return (
                "its texts go through another encoder and an adapter with layers of its own, which no architecture of "
                f"transformers or sentence-transformers has. {_INSTEAD}"
            )
        if hasattr(link, "adapters") and link.alpha != 0:
            return (
                "its adapters bend (norm, Down, GELU, Up) beside whole layers, and no change of a layer's weights does "
                f"the same. {_INSTEAD}; or train with method=lora, full or probe, which write a transformers folder"
            )
    return ""
