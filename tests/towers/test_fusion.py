from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tiny_models import CORPUS
from trimtab.errors import ModelError
from trimtab.towers.fusion import fuse, image_sequence, teacher_sequence


@pytest.fixture
def inputs(tiny_base: Any, pictures: list[Image.Image]) -> dict[str, Tensor]:
    base = tiny_base("flava")
    pixels = torch.cat([base.preprocess(picture)["pixel_values"] for picture in pictures])
    return {**base.text_inputs(CORPUS[: len(pictures)]), "pixel_values": pixels}


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
def test_fusing_the_models_own_states_gives_its_own_output(
    tiny_base: Any, inputs: dict[str, Tensor], masked: bool
) -> None:
    model = tiny_base("flava").model
    if not masked:
        inputs.pop("attention_mask")
    expected = model(**inputs).multimodal_embeddings
    mask = inputs.get("attention_mask")

    text = teacher_sequence(model, inputs["input_ids"], mask)
    fused = fuse(model, text, mask, image_sequence(model, inputs["pixel_values"]))

    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_teacher_sequence_is_from_before_the_last_norm(tiny_base: Any, inputs: dict[str, Tensor]) -> None:
    model = tiny_base("flava").model
    text = teacher_sequence(model, inputs["input_ids"], inputs["attention_mask"])
    output = model.text_model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(model.text_model.layernorm(text), output.last_hidden_state)


@torch.no_grad()
def test_masked_states_do_not_count(tiny_base: Any, inputs: dict[str, Tensor]) -> None:
    model = tiny_base("flava").model
    image = image_sequence(model, inputs["pixel_values"])
    text = torch.randn(len(image), 7, 16)
    mask = torch.arange(7).expand(len(image), 7) < 4
    changed = torch.where(mask[..., None], text, torch.randn_like(text))
    seen = image.shape[1] + 1 + 4
    first, second = fuse(model, text, mask, image), fuse(model, changed, mask, image)
    assert first.shape == (len(image), 1 + image.shape[1] + 7, 24)
    torch.testing.assert_close(first[:, :seen], second[:, :seen])


def test_gradients_reach_the_text_states_only(tiny_base: Any, inputs: dict[str, Tensor]) -> None:
    model = tiny_base("flava").model
    image = image_sequence(model, inputs["pixel_values"])
    text = torch.randn(len(image), 5, 16, requires_grad=True)
    fuse(model, text, None, image)[:, 0].sum().backward()
    assert text.grad is not None
    assert text.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_width_is_refused(tiny_base: Any) -> None:
    with pytest.raises(ModelError, match="text states are 9 wide; the fusion transformer takes 16"):
        fuse(tiny_base("flava").model, torch.zeros(1, 3, 9), None, torch.zeros(1, 17, 16))
