"""A base like `starter` with random weights: its real trunk, and a tiny alignment and text tower."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import CLIPImageProcessorPil, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

import tiny_models
from trimtab.towers.starter_model import (
    IMAGE_SIZE,
    SentenceBertConfig,
    SentenceBertModel,
    StarterVisionConfig,
    StarterVisionModel,
)

_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def build_starter(folder: Path) -> Path:
    """Write it as an ordinary transformers folder."""
    torch.manual_seed(0)
    tokenizer = tiny_models.bert_tokenizer()
    vision = StarterVisionModel(
        StarterVisionConfig(
            hidden_size=16, width=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
    )  # fmt: skip
    spread_activations(vision.trunk)
    tiny_models.randomised(vision.alignment)
    text = SentenceBertModel(SentenceBertConfig(**_TEXT, vocab_size=len(tokenizer), max_position_embeddings=64))
    tiny_models.randomised(text)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision.config, text.config, projection_dim=12)
    model = VisionTextDualEncoderModel(config=config, vision_model=vision.eval(), text_model=text)
    for projection in (model.visual_projection, model.text_projection):
        tiny_models.randomised(projection)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return tiny_models._save(folder, model, tokenizer, CLIPImageProcessorPil(size=side, do_center_crop=False))


def spread_activations(trunk: nn.Module) -> None:
    """Set the statistics of an untrained trunk, through which nothing would get otherwise."""
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average
    with torch.no_grad():
        trunk.train()(torch.randn(4, 3, 64, 64))
    trunk.eval()
