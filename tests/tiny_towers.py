"""Tiny dual encoders for all kinds of towers that layers are known of: more than one per family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

import tiny_models
from tiny_starter import build_starter
from trimtab.towers.dual_encoder import DualEncoder, _stack
from trimtab.towers.layers import TowerName

_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
# The longest is neither first nor last, so that a batch has padding of several lengths.
TEXTS = ["a cat", "a photo of a small red car on the road", "two apples", "the moon over the sea"]


def _pair(folder: Path, vision: Any, text: Any, tokenizer: Any) -> Path:
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    config = VisionTextDualEncoderConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=tiny_models.EMBEDDING_DIM
    )
    model = tiny_models.randomised(VisionTextDualEncoderModel(config))
    return tiny_models._save(folder, model, tokenizer, tiny_models._clip_processor())


def build_clip_with_roberta(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, RobertaConfig

    tokenizer = tiny_models.xlmr_tokenizer()
    vision = CLIPVisionConfig(**_SIZES, image_size=tiny_models.IMAGE_SIZE, patch_size=tiny_models.PATCH_SIZE)
    text = RobertaConfig(**_SIZES, vocab_size=len(tokenizer), max_position_embeddings=tiny_models.CONTEXT + 2)
    return _pair(folder, vision, text, tokenizer)


def build_vit_with_xlmr(folder: Path) -> Path:
    from transformers import ViTConfig, XLMRobertaConfig

    tokenizer = tiny_models.xlmr_tokenizer()
    vision = ViTConfig(**_SIZES, image_size=tiny_models.IMAGE_SIZE, patch_size=tiny_models.PATCH_SIZE)
    text = XLMRobertaConfig(**_SIZES, vocab_size=len(tokenizer), max_position_embeddings=tiny_models.CONTEXT + 2)
    return _pair(folder, vision, text, tokenizer)


def build_vit_with_clip_text(folder: Path) -> Path:
    from transformers import CLIPTextConfig, ViTConfig

    tokenizer = tiny_models.clip_tokenizer()
    vision = ViTConfig(**_SIZES, image_size=tiny_models.IMAGE_SIZE, patch_size=tiny_models.PATCH_SIZE)
    text = CLIPTextConfig(
        **_SIZES, vocab_size=len(tokenizer), max_position_embeddings=tiny_models.CONTEXT,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return _pair(folder, vision, text, tokenizer)


def build_dinov2_with_bert(folder: Path, registers: int = 0) -> Path:
    from transformers import BertConfig, Dinov2Config, Dinov2WithRegistersConfig

    tokenizer = tiny_models.bert_tokenizer()
    sizes = {name: size for name, size in _SIZES.items() if name != "intermediate_size"}
    sizes |= {"mlp_ratio": 2, "image_size": tiny_models.IMAGE_SIZE, "patch_size": tiny_models.PATCH_SIZE}
    vision = Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers) if registers else Dinov2Config(**sizes)
    text = BertConfig(**_SIZES, vocab_size=len(tokenizer), max_position_embeddings=64)
    return _pair(folder, vision, text, tokenizer)


def build_registers_with_bert(folder: Path) -> Path:
    return build_dinov2_with_bert(folder, registers=2)


def build_clip_resnet(folder: Path, *, width: int = 8, side: int = 64) -> Path:
    """CLIP's residual image tower beside its text tower, with the statistics of its norms drawn too."""
    from transformers import CLIPImageProcessorPil, CLIPTextConfig, VisionTextDualEncoderConfig
    from transformers import VisionTextDualEncoderModel as Model

    from trimtab.towers.clip_resnet import ClipResNetVisionConfig

    dim, tokenizer = tiny_models.EMBEDDING_DIM, tiny_models.clip_tokenizer()
    vision = ClipResNetVisionConfig(dim, depths=(1, 2, 1, 2), width=width, num_attention_heads=4, image_size=side)
    text = CLIPTextConfig(
        **_SIZES, vocab_size=len(tokenizer), max_position_embeddings=tiny_models.CONTEXT, hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = VisionTextDualEncoderConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=dim)
    model = tiny_models.randomised(Model(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.visual_projection.weight.copy_(torch.eye(dim))
        for module in model.modules():  # so drawn that maps stay of one size through all blocks
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
                module.weight /= module.weight[0].numel() ** 0.5
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)
    return tiny_models._save(folder, model, tokenizer, processor)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    **tiny_models.DUAL_ENCODERS,
    "starter": build_starter,
    "clip+roberta": build_clip_with_roberta,
    "vit+xlm-roberta": build_vit_with_xlmr,
    "vit+clip-text": build_vit_with_clip_text,
    "clip-resnet": build_clip_resnet,
    "dinov2+bert": build_dinov2_with_bert,
    "dinov2-registers+bert": build_registers_with_bert,
}
TOWERS: list[tuple[str, TowerName]] = [(name, tower) for name in BUILDERS for tower in ("image", "text")]


def inputs_of(base: DualEncoder, tower: TowerName, pictures: list[Image.Image], texts: list[str] = TEXTS) -> Any:
    """A batch of the tower's input tensors."""
    if tower == "text":
        return base.text_inputs(texts)
    return _stack([base.preprocess(picture) for picture in pictures])


def features_of(base: DualEncoder, tower: TowerName, inputs: Any) -> Any:
    """The tower's features (B, D)."""
    return base.token_features(inputs) if tower == "text" else base.pixel_features(inputs)
