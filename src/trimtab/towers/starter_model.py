"""The towers of `starter` as transformers models, and what is learned of them; see `trimtab.towers.starter`.

`trimtab export --format merged` copies this file and `efficientnet.py` into the folder that it writes. So they import
torch, transformers and each other alone.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert import BertConfig, BertModel

from trimtab.towers.efficientnet import CLASSES, HEAD_CHANNELS, EfficientNetLite0, channels_last

IMAGE_SIZE = 224
PATCHES = 49


class StarterVisionConfig(PretrainedConfig):
    """Sizes of the image tower.

    Args:
        hidden_size: width of `pooler_output`, that of the text tower.
        width: width of the Transformer layers over the patch tokens.
        sharpness: multiplies the trunk's class logits before the softmax of the knowledge path.
        dropout: in training only.
    """

    model_type = "trimtab_starter_vision"

    def __init__(
        self,
        hidden_size: int = 384,
        width: int = 256,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        intermediate_size: int = 1024,
        sharpness: float = 1.0,
        dropout: float = 0.0,
        image_size: int = IMAGE_SIZE,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.width = width
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.sharpness = sharpness
        self.dropout = dropout
        self.image_size = image_size


class AlignmentLayer(nn.TransformerEncoderLayer):
    """The same layer; what enters its attention lies in memory as the projection wants it.

    `MultiheadAttention` turns (B, T, D) to (T, B, D) without moving it. Of such a view the projection is a product per
    token, with a copy of the weights for each: with gradients a sixth of the time of a step of the domain link.
    """

    def _sa_block(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled():
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return super()._sa_block(x, *args, **kwargs)


class StarterAlignment(nn.Module):
    """What we train of the image tower: patch tokens and a CLS token through Transformer layers.

    The CLS token starts from the pooled feature map, which is what the trunk was trained to classify by.
    """

    def __init__(self, config: StarterVisionConfig) -> None:
        super().__init__()
        self.feature_mean = nn.Parameter(torch.zeros(HEAD_CHANNELS), requires_grad=False)
        self.feature_std = nn.Parameter(torch.ones(HEAD_CHANNELS), requires_grad=False)
        self.input_dropout = nn.Dropout(config.dropout)
        self.project = nn.Linear(HEAD_CHANNELS, config.width)
        self.project_pooled = nn.Linear(HEAD_CHANNELS, config.width)
        self.positions = nn.Parameter(torch.zeros(1, 1 + PATCHES, config.width))
        self.layers = nn.ModuleList(
            AlignmentLayer(
                config.width,
                config.num_attention_heads,
                config.intermediate_size,
                dropout=config.dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.hidden_size)
        self.class_embeddings = nn.Parameter(torch.zeros(CLASSES, config.hidden_size), requires_grad=False)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def embed(self, feature_map: Tensor) -> Tensor:
        """What enters the first layer: (B, 1280, 7, 7) to (B, 50, width)."""
        features = (feature_map.flatten(2).transpose(1, 2) - self.feature_mean) / self.feature_std  # (B, 49, 1280)
        cls = self.project_pooled(self.input_dropout(features.mean(dim=1, keepdim=True)))
        patches = self.project(self.input_dropout(features))
        return torch.cat([cls, patches], dim=1) + self.positions

    def tokens(self, feature_map: Tensor) -> list[Tensor]:
        """Hidden states before and after each layer, from (B, 1280, 7, 7) to (B, 50, width) each."""
        states = [self.embed(feature_map)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states

    def correction(self, states: Tensor) -> Tensor:  # (B, 50, width) -> (B, D)
        return self.output(self.norm(states[:, 0]))

    def forward(self, states: Tensor, class_probabilities: Tensor) -> Tensor:  # (B, 50, w), (B, 1000) -> (B, D)
        return class_probabilities @ self.class_embeddings + self.correction(states)


class StarterVisionModel(PreTrainedModel):
    """Trunk, Transformer layers over its patch tokens, and the knowledge of its class head."""

    config_class = StarterVisionConfig
    base_model_prefix = "starter_vision"
    main_input_name = "pixel_values"
    _no_split_modules = ["AlignmentLayer"]  # noqa: RUF012 - transformers declares it so

    def __init__(self, config: StarterVisionConfig) -> None:
        super().__init__(config)
        self.trunk = EfficientNetLite0()
        self.alignment = StarterAlignment(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every module initialises itself, and loading fills all of them."""

    def class_probabilities(self, feature_map: Tensor) -> Tensor:  # (B, 1280, 7, 7) -> (B, 1000)
        return (self.config.sharpness * self.trunk.logits(feature_map)).softmax(dim=-1)

    def lower(self, pixel_values: Tensor, part: Literal["blocks", "layers"], index: int) -> dict[str, Tensor]:
        """Run the tower up to a block of its trunk or a layer of its alignment.

        Args:
            index: which block (the trunk's head counts as the last one) or layer.

        Returns:
            For `upper`: ``states`` that enter it, (B, C, H, W) or (B, 50, width); for a layer also ``knowledge``
            (B, D), which the class head has by then said.
        """
        x = self.trunk.stem(channels_last(pixel_values))
        blocks = [*self.trunk.blocks, self.trunk.head]
        for block in blocks[:index] if part == "blocks" else blocks:
            x = block(x)
        if part == "blocks":
            return {"states": x}
        knowledge = self.class_probabilities(x) @ self.alignment.class_embeddings
        x = self.alignment.embed(x)
        for layer in self.alignment.layers[:index]:
            x = layer(x)
        return {"states": x, "knowledge": knowledge}

    def upper(self, below: dict[str, Tensor], part: Literal["blocks", "layers"], index: int) -> Tensor:
        """Run the rest of the tower on what `lower` gave, to `pooler_output` (B, D)."""
        x = below["states"]
        if part == "layers":
            for layer in self.alignment.layers[index:]:
                x = layer(x)
            return below["knowledge"] + self.alignment.correction(x)
        x = channels_last(x)
        for block in [*self.trunk.blocks, self.trunk.head][index:]:
            x = block(x)
        return self.alignment(self.alignment.tokens(x)[-1], self.class_probabilities(x))

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        feature_map = self.trunk(pixel_values)
        states = self.alignment.tokens(feature_map)
        pooled = self.alignment(states[-1], self.class_probabilities(feature_map))
        if return_dict is False:
            return (states[-1], pooled)
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=pooled,
            hidden_states=tuple(states) if output_hidden_states else None,
        )


class SentenceBertConfig(BertConfig):
    """A BERT whose `pooler_output` is the unit-norm mean of its tokens, less a constant centre."""

    model_type = "trimtab_sentence_bert"


class SentenceBertModel(BertModel):
    """Mean-pooled BERT (Reimers & Gurevych, arXiv 1908.10084) in the shape that a dual encoder expects."""

    config_class = SentenceBertConfig

    def __init__(self, config: SentenceBertConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer=False)
        # A parameter, not a buffer, so that it is counted, saved and checked as every other weight.
        self.centre = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Tensor, ...]:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        states = output.last_hidden_state  # (B, T, D)
        mask = torch.ones(states.shape[:2], device=states.device) if attention_mask is None else attention_mask
        weights = mask.to(states.dtype).unsqueeze(-1)
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
        output.pooler_output = F.normalize(mean, dim=-1) - self.centre
        return (output.last_hidden_state, output.pooler_output) if return_dict is False else output


class StarterConfig(VisionTextDualEncoderConfig):
    """Both towers; a folder that brings this file along names it, so that the kinds below are known."""


class StarterModel(VisionTextDualEncoderModel):
    """Both towers."""

    config_class = StarterConfig


AutoConfig.register(StarterVisionConfig.model_type, StarterVisionConfig, exist_ok=True)
AutoModel.register(StarterVisionConfig, StarterVisionModel, exist_ok=True)
AutoConfig.register(SentenceBertConfig.model_type, SentenceBertConfig, exist_ok=True)
AutoModel.register(SentenceBertConfig, SentenceBertModel, exist_ok=True)
