"""How model cards of adapted folders begin, and how they name the models that a folder builds on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from trimtab.towers.hf import BUILT_IN, could_be_hub_id, is_hub_id


def card_head(
    tags: Sequence[str], *, models: Sequence[str], languages: Sequence[str] = (), relation: str = "adapter"
) -> str:
    """The YAML block that the model hub reads, with its lines of dashes.

    Args:
        models: places of base and student; the hub lists the folder at those that it has itself.
        languages: codes of ISO 639.
        relation: to them, in the hub's words; ``finetune`` for a whole model.
    """
    lines = ["library_name: trimtab"]
    if languages:
        lines.append(f"language: {json.dumps(list(languages))}")
    if on_hub := [name for name in models if is_hub_id(name) and could_be_hub_id(name)]:
        lines += [f"base_model: {json.dumps(on_hub)}", f"base_model_relation: {relation}"]
    return "\n".join(["---", *lines, f"tags: [{', '.join(tags)}]", "---"])


def shown_name(model: str) -> str:
    """A model as a card names it: a folder without its parents, which are nobody's business once the card is public."""
    return model if model in BUILT_IN or is_hub_id(model) else Path(model).expanduser().resolve().name
