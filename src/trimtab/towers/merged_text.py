"""The text side of a language link as a model of its own: a frozen encoder, the adapter on it, unit vectors.

`trimtab export --format merged` writes this file, with `PairMemory` at its end, into its folder, where
transformers finds it:

    from transformers import AutoModel, AutoTokenizer
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    vectors = model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).pooler_output

So it needs torch and transformers alone, and only computes; training is in `trimtab.adapters.language`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trimtab.towers.memory import PairMemory


class AdaptedTextConfig(PretrainedConfig):
    """Sizes of encoder and adapter.

    Args:
        encoder: configuration of the encoder, with its `model_type`.
        states: which hidden states of the encoder the adapter reads, side by side; 0 is the embeddings.
        hidden_size: D of the unit vectors.
        adapter: `width`, `layers`, `heads`, `feedforward`, `hidden`, `pooling`, `init` and `memory`.
        prefix: to be set before every text; "" for none.
        prefix_span: columns [start, stop) of its tokens, whose states are left out.
    """

    model_type = "trimtab_adapted_text"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        states: Sequence[int] = (-1,),
        hidden_size: int = 0,
        adapter: dict[str, Any] | None = None,
        prefix: str = "",
        prefix_span: Sequence[int] = (0, 0),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.encoder = encoder or {}
        self.states = list(states)
        self.hidden_size = hidden_size
        self.adapter = adapter or {}
        self.prefix = prefix
        self.prefix_span = list(prefix_span)


class AdaptedTextModel(PreTrainedModel):
    """Token ids (B, T) and their mask, padded on the right, to unit vectors (B, D) in `pooler_output`."""

    config_class = AdaptedTextConfig
    base_model_prefix = "adapted_text"
    main_input_name = "input_ids"

    def __init__(self, config: AdaptedTextConfig) -> None:
        super().__init__(config)
        about = AutoConfig.for_model(**config.encoder)
        self.encoder = AutoModel.from_config(about)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # never read, and many checkpoints lack it
        self.adapter = _Adapter(config, about.hidden_size * len(config.states))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: loading fills everything."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output = self.encoder(input_ids=input_ids, attention_mask=seen, output_hidden_states=True, return_dict=True)
        found = [*output.hidden_states[:-1], output.last_hidden_state]
        states = torch.cat([found[layer] for layer in self.config.states], dim=-1).float()  # (B, T, H)
        start, stop = self.config.prefix_span
        states = torch.cat([states[:, :start], states[:, stop:]], dim=1)
        places = torch.arange(states.shape[1], device=states.device)
        mask = places < seen.sum(dim=1, keepdim=True) - (stop - start)  # (B, T)
        tokens, features = self.adapter(states, mask)
        unit = F.normalize(features, dim=-1)
        if return_dict is False:
            return (tokens, unit)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=unit)


class _Adapter(nn.Module):
    """Down, Transformer layers, pooling, Up, beside a linear path; names of weights as in an adapted folder."""

    def __init__(self, config: AdaptedTextConfig, input_dim: int) -> None:
        super().__init__()
        about, dim = config.adapter, config.hidden_size
        self.pooling: str = about["pooling"]
        for name, size in (("input", input_dim), ("output", dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.input_mean: Tensor
        self.input_std: Tensor
        self.output_mean: Tensor
        self.output_std: Tensor
        width = about["width"]
        self.down = nn.Linear(input_dim, width)
        self.layers = nn.ModuleList(
            _Layer(width, about["heads"], width * about["feedforward"]) for _ in range(about["layers"])
        )
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.zeros(width)) if self.pooling == "attention" else None
        self.up = nn.Linear(width, dim)
        self.hidden: int = about["hidden"]
        if self.hidden:
            self.word_norm = nn.LayerNorm(input_dim)
            self.word_in = nn.Linear(input_dim, self.hidden)
            self.word_out = nn.Linear(self.hidden, dim, bias=False)
        self.linear = nn.Linear(input_dim, dim) if about["init"] == "ridge" else None
        self.memory = PairMemory(about["memory"], dim) if about["memory"] else None

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, H) -> (B, T, W), (B, D)
        states = (states - self.input_mean) / self.input_std
        x = self.down(states)
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        x = self.norm(x)
        output = self.up(self._pooled(x, mask))
        mean = _mean(states, mask)  # (B, H)
        if self.hidden:
            output = output + self.word_out(F.gelu(self.word_in(self.word_norm(mean))))
        if self.linear is not None:
            output = output + self.linear(mean)
        features = output * self.output_std + self.output_mean
        return x, features if self.memory is None else self.memory(features)

    def _pooled(self, x: Tensor, mask: Tensor) -> Tensor:  # (B, T, W) -> (B, W)
        if self.pooling == "cls":
            return x[:, 0]
        if self.query is None:
            return _mean(x, mask)
        scores = (x @ self.query) / math.sqrt(x.shape[-1])  # (B, T)
        return torch.einsum("bt,btw->bw", scores.masked_fill(~mask, -torch.inf).softmax(dim=-1), x)


class _Layer(nn.Module):
    """A pre-norm Transformer layer."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (B, T, W), (B, 1, 1, T) -> (B, T, W)
        parts = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each (B, heads, T, W / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.feedforward_norm(x))))


def _mean(x: Tensor, mask: Tensor) -> Tensor:  # (B, T, W), (B, T) -> (B, W)
    weights = mask.to(x.dtype).unsqueeze(-1)
    return (x * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
