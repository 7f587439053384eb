"""A tiny adapted folder: an untrained language adapter between tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.files import BaseReference, StudentReference, save_adapter
from trimtab.adapters.language import LanguageAdapter
from trimtab.config import LanguageAdapterConfig, to_mapping
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.text_encoder import TextEncoder


def save_tiny_adapted(folder: Path, teacher: DualEncoder, encoder: TextEncoder, **changes: Any) -> Path:
    """Write the folder; `changes` replace arguments of `save_adapter`."""
    torch.manual_seed(0)
    config = LanguageAdapterConfig(width=12, layers=1, heads=2, init="random")
    adapter = LanguageAdapter(config, input_dim=encoder.hidden_size, output_dim=teacher.embedding_dim)
    options: dict[str, Any] = {
        "link": "language",
        "tensors": adapter.state_dict(),
        "config": {
            "adapter": to_mapping(config),
            "input_dim": encoder.hidden_size,
            "output_dim": teacher.embedding_dim,
            "english": "route",
        },
        "base": BaseReference.of(teacher),
        "student": StudentReference(encoder.name, encoder.fingerprint, encoder.prefix, (-1,), encoder.max_tokens),
        "recipe": {"link": "language", "data": {"train": [{"path": "词典.csv", "language": "zh"}]}},
        "data": {"digest": "d" * 64, "pairs": 30000},
        "metrics": {"translation_match": 46.5},
        "card": "# Chinese adapter\n",
    }
    return save_adapter(folder, **{**options, **changes})
