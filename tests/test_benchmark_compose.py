"""The benchmark of composition runs each image tower once, and scores as the classifiers themselves do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiny_links import save_tiny_domain, save_tiny_prompt
from trimtab.adapters.adapted import load_adapted
from trimtab.adapters.composing import load_composed
from trimtab.towers import prompting

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
compose = pytest.importorskip("compose")


def test_each_image_tower_runs_once(
    tiny_base: Any, pictures: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("clip")
    domain = save_tiny_domain(tmp_path / "shop", base)
    prompt = save_tiny_prompt(tmp_path / "prompt", load_adapted(domain, base=base), instance=True)
    model = load_composed([domain, prompt], base=base)
    runs: list[Any] = []

    def counted(model: Any, pixels: Any) -> Any:
        runs.append(model)
        return prompting.image_tokens(model, pixels)

    monkeypatch.setattr(compose, "image_tokens", counted)
    seen = compose.Seen(pictures, batch_size=2)
    for one in (base, model, load_composed([domain], base=base), base):
        assert np.allclose(seen.by(one).embeddings.numpy(), one.encode_image(pictures), atol=1e-5)
    assert len(runs) == 2 * -(-len(pictures) // 2)
    classifier = model.classifier()
    logits = model.prompt.class_scale * seen.scored(model, classifier)
    found = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(found, classifier.scores(pictures), atol=1e-5)
