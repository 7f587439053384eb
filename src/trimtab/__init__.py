"""Trimtab: steer a frozen vision-language model to a new language, domain or objective by training a small part.

>>> import trimtab
>>> model = trimtab.load("starter")
>>> model.similarity(["dog.jpg"], ["a photo of a dog"])  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab import adapters as adapters
    from trimtab import config as config
    from trimtab import data as data
    from trimtab import errors as errors
    from trimtab import evaluation as evaluation
    from trimtab import objectives as objectives
    from trimtab import recipes as recipes
    from trimtab import serve as serve
    from trimtab import tasks as tasks
    from trimtab import towers as towers
    from trimtab import training as training
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


if not TYPE_CHECKING:  # to a type checker every name would be there

    def __getattr__(name: str) -> Any:
        if name not in _ROOMS and name not in _PLACES:
            raise AttributeError(f"module 'trimtab' has no attribute {name!r}; it has {', '.join(__all__)}")
        drawn = random.getstate()  # rich draws numbers when it is imported
        try:
            if name in _ROOMS:
                return importlib.import_module(f"trimtab.{name}")
            return getattr(importlib.import_module(_PLACES[name]), name)
        finally:
            random.setstate(drawn)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
