"""A small embeddings folder of made vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trimtab.serve.store import Description, ModelReference, Skipped, shard_file, write_description, write_shard

MODEL = ModelReference("tiny", "f" * 64, "e" * 64, "clip", 16)


def made(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Unit vectors (count, dim) around a few centres, as embeddings are."""
    centres = np.random.default_rng(99).normal(size=(8, dim))
    noise = np.random.default_rng(seed)
    vectors = centres[noise.integers(0, 8, count)] + 0.5 * noise.normal(size=(count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write_embeddings(folder: Path, vectors: np.ndarray, *, shard_size: int = 100, **changes: Any) -> Path:
    """Write the folder; `changes` replace fields of its description."""
    count, dim = vectors.shape
    format = changes.get("format", "parquet")
    notes = []
    for number, start in enumerate(range(0, count, shard_size)):
        part = vectors[start : start + shard_size]
        ids = [f"图{start + at}" for at in range(len(part))]
        columns = {"id": ids, "image": [f"{one}.jpg" for one in ids]}
        notes.append(write_shard(folder, number, columns, part, format=format, items="d"))
        assert notes[-1].file == shard_file(number, format)
    shards = tuple(one.described() for one in notes)
    options: dict[str, Any] = {
        "of": "images", "model": MODEL, "dim": dim, "dtype": "float32", "format": "parquet", "count": count,
        "skipped": 0, "columns": ("id", "image"), "shards": shards,
    }  # fmt: skip
    skipped = [Skipped("a", "a.jpg", "is empty")] * options["skipped"]
    write_description(folder, Description(**{**options, **changes}), skipped)
    return folder
