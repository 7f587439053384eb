"""Trimtab: steer a frozen vision-language model to a new language, domain or objective by training a small part.

>>> import trimtab
>>> model = trimtab.load("starter")
>>> model.similarity(["dog.jpg"], ["a photo of a dog"])  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.adapters.adapted import load
    from trimtab.recipes.adapt import adapt
    from trimtab.recipes.evaluate import evaluate_classification, evaluate_retrieval
    from trimtab.towers.dual_encoder import DualEncoder

__version__ = "0.2.0.dev0"
__all__ = ["DualEncoder", "adapt", "evaluate_classification", "evaluate_retrieval", "load"]

# Looked up on first use, so that `import trimtab` and `trimtab --help` do not wait for torch.
_PLACES = {
    "load": "trimtab.adapters.adapted",
    "adapt": "trimtab.recipes.adapt",
    "evaluate_classification": "trimtab.recipes.evaluate",
    "evaluate_retrieval": "trimtab.recipes.evaluate",
    "DualEncoder": "trimtab.towers.dual_encoder",
}


_ROOMS = (
    "adapters",
    "config",
    "data",
    "errors",
    "evaluation",
    "objectives",
    "recipes",
    "serve",
    "tasks",
    "towers",
    "training",
)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"trimtab.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
