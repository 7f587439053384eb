"""Every family gives what transformers itself gives, whatever the batches, lengths and sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_models
from tiny_models import CORPUS, DUAL_ENCODERS
from trimtab.towers.parts import quiet

FAMILIES = sorted(DUAL_ENCODERS)


@pytest.fixture(scope="module")
def reference(tiny_folder: Callable[[str], Path]) -> Callable[[str], tuple[Any, Any, Any]]:
    """Model, tokenizer and image processor as a user of transformers loads them."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    def load(family: str) -> tuple[Any, Any, Any]:
        folder = tiny_folder(family)
        with quiet():
            return (
                AutoModel.from_pretrained(folder).eval(),
                AutoTokenizer.from_pretrained(folder),
                AutoImageProcessor.from_pretrained(folder, backend="pil"),
            )

    return load


def unit(output: Any, family: str) -> np.ndarray:
    features = output.pooler_output
    features = features[:, 0] if family == "flava" else features
    return torch.nn.functional.normalize(features, dim=-1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_match_transformers(family: str, tiny_base: Any, reference: Any) -> None:
    model, tokenizer, _ = reference(family)
    texts = [*CORPUS, "a photo of a cat " * 20, "An UNKNOWN word: ñandú", ""]
    padding = "max_length" if family.startswith("siglip") else True
    tokens = tokenizer(texts, padding=padding, truncation=True, max_length=tiny_models.CONTEXT, return_tensors="pt")
    with torch.no_grad():
        expected = unit(model.get_text_features(**tokens), family)

    actual = tiny_base(family).encode_text(texts, batch_size=5)

    assert actual.dtype == np.float32
    assert actual.shape == (len(texts), tiny_base(family).embedding_dim)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(actual, axis=1), 1, atol=1e-5)
    assert np.abs(actual[0] - actual[8]).max() > 1e-3  # the model is not constant, so the test sees differences


@pytest.mark.parametrize("family", FAMILIES)
def test_images_match_transformers(family: str, tiny_base: Any, reference: Any, pictures: list[Image.Image]) -> None:
    model, _, processor = reference(family)
    with torch.no_grad():
        expected = unit(model.get_image_features(**processor(images=pictures, return_tensors="pt")), family)

    actual = tiny_base(family).encode_image(pictures, batch_size=2)

    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert np.abs(actual[0] - actual[1]).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(family: str, tiny_base: Any, reference: Any, pictures: list[Image.Image]) -> None:
    if family == "flava":
        pytest.skip("FlavaModel computes no contrastive logits")
    model, tokenizer, processor = reference(family)
    padding = "max_length" if family.startswith("siglip") else True
    tokens = tokenizer(CORPUS[:4], padding=padding, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, **processor(images=pictures, return_tensors="pt"))

    base = tiny_base(family)
    logits = base.logit_scale * base.similarity(pictures, CORPUS[:4]) + base.logit_bias

    np.testing.assert_allclose(logits, output.logits_per_image.numpy(), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_keeps_embeddings_and_fingerprint(
    family: str, tiny_base: Any, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    from trimtab.towers.hf import load_base

    base = tiny_base(family)
    again = load_base(base.save_pretrained(tmp_path / "saved"), device="cpu")

    assert again.fingerprint == base.fingerprint
    np.testing.assert_allclose(again.encode_text(CORPUS), base.encode_text(CORPUS), atol=1e-6)
    np.testing.assert_allclose(again.encode_image(pictures), base.encode_image(pictures), atol=1e-6)
