"""The language adapter of a fusion model: a student's token states to the text states that the fusion reads.

Sentences and their translations differ in length and order, so the teacher's states cannot be regressed
position by position. Two summaries do correspond, the CLS state and the mean of the other states: the
`LanguageAdapter` regresses both. `Resampler` adds what a mean lacks: learned queries attend over the adapter's
token states (after Flamingo's Perceiver resampler, arXiv 2204.14198) and give each of M tokens its deviation from
the mean. FLAVA's fusion transformer has no positions, so to it these tokens are a set. But its softmax counts them:
twice as many text tokens draw twice the attention from the image. So a mask leaves as many tokens of the M as the
English text would have had, estimated from the number of the student's tokens.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.adapters.language import LanguageAdapter, masked_mean
from trimtab.config import LanguageAdapterConfig
from trimtab.errors import RecipeError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResamplerConfig:
    """Learned queries -> layers of cross-attention -> Up linear.

    Attributes:
        tokens: M, most states given to the fusion transformer beside CLS: about as many as the tokens of a long
            English text.
        layers: cross-attention layers, 1 to 12.
        heads: must divide the adapter's width.
        feedforward: inner width of the feed-forward block as a multiple of the adapter's width.
    """

    tokens: int = 32
    layers: int = 2
    heads: int = 6
    feedforward: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "feedforward"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)!r} must be at least 1")
        if not 1 <= self.layers <= 12:
            raise RecipeError(f"layers={self.layers!r} must be from 1 to 12")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout={self.dropout!r} must be at least 0 and below 1")


class CrossLayer(nn.Module):
    """A pre-norm layer whose queries attend over the token states and over each other."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, M, W), (B, T, W), (B, 1, 1, T + M) -> (B, M, W)."""
        batch, count, width = x.shape
        queries = self.attention_norm(x)
        memory = torch.cat([tokens, queries], dim=1)  # (B, T + M, W)
        q = self.query(queries).view(batch, count, self.heads, -1).transpose(1, 2)  # (B, heads, M, W / heads)
        k, v = self.key_value(memory).view(batch, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, count, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.feedforward_norm(x)))))


class Resampler(nn.Module):
    """Token states (B, T, W) of any length to deviations (B, M, H) of M tokens; all zero in a new one.

    A new one also counts every token; `fit_lengths` changes that.

    Args:
        width: W of the token states.
        output_dim: H, width of the teacher's states.

    Raises:
        RecipeError: the heads do not divide the width.
    """

    def __init__(self, config: ResamplerConfig, *, width: int, output_dim: int) -> None:
        super().__init__()
        if width % config.heads:
            raise RecipeError(f"resampler heads={config.heads} must divide the adapter's width={width}")
        self.config = config
        # How far the teacher's tokens lie from the mean of their sentence: the unit of the output.
        self.register_buffer("scale", torch.ones(output_dim))
        self.scale: Tensor
        # Tokens that count = offset + slope * the student's tokens.
        self.register_buffer("length", torch.tensor([float(config.tokens), 0.0]))
        self.length: Tensor
        self.queries = nn.Parameter(torch.randn(config.tokens, width) / math.sqrt(width))
        inner = width * config.feedforward
        self.layers = nn.ModuleList(
            CrossLayer(width, config.heads, inner, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, output_dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:  # (B, T, W), (B, T) bool -> (B, M, H)
        x = self.queries.expand(len(tokens), -1, -1)
        mask = F.pad(mask, (0, len(self.queries)), value=True)[:, None, None, :]  # (B, 1, 1, T + M)
        for layer in self.layers:
            x = layer(x, tokens, mask)
        return self.up(self.norm(x)).float() * self.scale

    def counted(self, mask: Tensor) -> Tensor:  # (B, T) bool -> (B, M) bool
        """The tokens that the fusion transformer should see: the first n, at least one."""
        count = (self.length[0] + self.length[1] * mask.sum(dim=1)).round().clamp_min(1)  # (B,)
        return torch.arange(self.config.tokens, device=mask.device) < count[:, None]

    @torch.no_grad()
    def fit_lengths(self, student: Tensor, teacher: Tensor) -> None:
        """Fit the number of tokens that count, by least squares, on numbers of tokens (N,) of sentence pairs."""
        x, y = student.cpu().double(), teacher.cpu().double()
        variance = (x - x.mean()).square().mean()
        slope = ((x - x.mean()) * (y - y.mean())).mean() / variance if variance > 0 else x.new_zeros(())
        self.length.copy_(torch.stack([y.mean() - slope * x.mean(), slope]))
        if long := int((teacher > self.config.tokens).sum()):
            logger.warning(
                "%d of %d English texts have more tokens than the resampler's %d: a higher resampler.tokens would "
                "keep their weight beside the image", long, len(teacher), self.config.tokens,
            )  # fmt: skip


class FusionAdapter(nn.Module):
    """What ships for a fusion model: a `LanguageAdapter` for the two summaries, and a `Resampler`.

    Args:
        input_dim: width of the student's states, all chosen layers together.
        output_dim: H, width of the teacher's states.

    Raises:
        RecipeError: a translation memory is asked for.
    """

    def __init__(
        self,
        language: LanguageAdapterConfig,
        resampler: ResamplerConfig,
        *,
        input_dim: int,
        output_dim: int,
    ) -> None:
        super().__init__()
        if language.memory:
            raise RecipeError(
                f"adapter.memory={language.memory}: a translation memory holds features, while a fusion model is fed "
                "states: set adapter.memory=0"
            )
        self.output_dim = output_dim
        self.language = LanguageAdapter(language, input_dim=input_dim, output_dim=2 * output_dim)
        self.resampler = Resampler(resampler, width=language.width, output_dim=output_dim)

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Summaries and text states of a batch.

        Args:
            states: (B, T, S) token states of the student.
            mask: (B, T) bool, true for real tokens.

        Returns:
            The summaries (B, 2H), estimates of `summaries` of the teacher; the text states (B, 1 + M, H), CLS
            first; and the mask (B, 1 + M) bool of those that count.
        """
        states = self.language.standardised(states)
        tokens = self.language.token_states(states, mask)  # (B, T, W)
        pooled = self.language.features(tokens, states, mask)  # (B, 2H)
        cls, mean = pooled.split(self.output_dim, dim=-1)
        others = mean[:, None, :] + self.resampler(tokens, mask)  # (B, M, H)
        counted = F.pad(self.resampler.counted(mask), (1, 0), value=True)  # (B, 1 + M)
        return pooled, torch.cat([cls[:, None, :], others], dim=1), counted

    @torch.no_grad()
    def fit(self, states: Tensor, mask: Tensor, teacher: Tensor, teacher_mask: Tensor, *, ridge: float = 0.01) -> None:
        """Set the units of both ends, the number of tokens that count, and the closed-form start: CLS and copies
        of the mean by ridge regression.

        Args:
            states: (N, T, S) token states of the student for a sample of sentences, with `mask` (N, T).
            teacher: (N, L, H) states of the teacher for their translations, with `teacher_mask` (N, L).
            ridge: see `LanguageAdapter.fit_linear`.

        Raises:
            RecipeError: fewer than two sentences.
        """
        if len(states) < 2:
            raise RecipeError(f"{len(states)} sentences are too few to start from: give at least 2")
        mask, teacher_mask = mask.bool(), teacher_mask.bool()
        states, teacher = states.float(), teacher.float()
        targets = summaries(teacher, teacher_mask)  # (N, 2H)
        self.language.set_statistics(states[mask], targets)
        if self.language.config.init == "ridge":
            self.language.fit_linear(masked_mean(states, mask), targets, ridge=ridge)
        self.resampler.fit_lengths(mask.sum(dim=1), teacher_mask[:, 1:].sum(dim=1))
        mean = targets[:, None, self.output_dim :]  # (N, 1, H)
        spread = (teacher - mean)[:, 1:][teacher_mask[:, 1:]].square().mean(dim=0).sqrt()  # (H,)
        self.resampler.scale.copy_(spread.clamp_min(1e-2 * spread.mean()))


def summaries(teacher: Tensor, mask: Tensor) -> Tensor:
    """The part of a teacher's text states that is the same for every language: CLS, and the mean of the others.

    Args:
        teacher: (B, L, H) from `trimtab.towers.fusion.teacher_sequence`.
        mask: (B, L), true or 1 for real tokens.

    Returns:
        (B, 2H).
    """
    return torch.cat([teacher[:, 0], masked_mean(teacher[:, 1:], mask[:, 1:])], dim=-1)
