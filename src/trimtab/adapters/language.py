"""The language adapter: token states of a frozen student to the feature space of a frozen teacher.

Down linear -> Transformer layers -> pooling -> Up linear, beside a linear path from the mean-pooled states that
`fit_linear` sets in closed form and, where asked for, a wide network of one hidden layer on the same pooled states,
which learns single words by heart. Both start at zero, so a new adapter is exactly the closed-form map. A translation
memory may follow when all is trained.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.adapters.ridge import RidgeSums
from trimtab.config import LanguageAdapterConfig
from trimtab.towers.memory import PairMemory

_SHORT = 128  # tokens up to which the (T, T) scores of a batch are small beside its other activations


class Layer(nn.Module):
    """A pre-norm Transformer layer (Vaswani et al., arXiv 1706.03762; pre-norm: arXiv 2002.04745)."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (B, T, W), (B, 1, 1, T) -> (B, T, W)
        batch, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, W / heads)
        mixed = attend(q, k, v, mask)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, tokens, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.feedforward_norm(x)))))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # (B, heads, T, C), ... (B, 1, 1, T)
    """Attention. Short bf16 sequences on a CPU are multiplied out: there the fused backward takes 8 times as long."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[-2] > _SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = torch.matmul(q / math.sqrt(q.shape[-1]), k.transpose(-1, -2))  # (B, heads, T, T)
    return torch.matmul(scores.float().masked_fill(~mask, -torch.inf).softmax(dim=-1).to(v.dtype), v)


class LanguageAdapter(nn.Module):
    """Token states (B, T, H) of a student and their mask (B, T) to features (B, D) of the teacher's space.

    Args:
        input_dim: H, width of the student's states, all chosen layers together.
        output_dim: D, width of the teacher's features.
    """

    def __init__(self, config: LanguageAdapterConfig, *, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.config = config
        # Students have a few dimensions of huge variance; without this they drown the others.
        self.register_buffer("input_mean", torch.zeros(input_dim))
        self.register_buffer("input_std", torch.ones(input_dim))
        # The layers work in standardised units on both ends: a learning rate then means the same for every base.
        self.register_buffer("output_mean", torch.zeros(output_dim))
        self.register_buffer("output_std", torch.ones(output_dim))
        self.input_mean: Tensor
        self.input_std: Tensor
        self.output_mean: Tensor
        self.output_std: Tensor
        self.down = nn.Linear(input_dim, config.width)
        inner = config.width * config.feedforward
        self.layers = nn.ModuleList(
            Layer(config.width, config.heads, inner, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        if config.pooling == "attention":
            self.query = nn.Parameter(torch.zeros(config.width))
        self.up = nn.Linear(config.width, output_dim)
        if config.hidden:
            self.word_norm = nn.LayerNorm(input_dim)
            self.word_in = nn.Linear(input_dim, config.hidden)
            self.word_out = nn.Linear(config.hidden, output_dim, bias=False)
            nn.init.zeros_(self.word_out.weight)
        if config.init == "ridge":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
            # Solved, not trained: gradient steps on it undo the solution faster than they improve it.
            self.linear = nn.Linear(input_dim, output_dim).requires_grad_(False)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        self.memory = PairMemory(config.memory, output_dim) if config.memory else None

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:  # (B, T, H), (B, T) bool -> (B, D)
        states = self.standardised(states)
        features = self.features(self.token_states(states, mask), states, mask)
        return features if self.memory is None else self.memory(features)

    def standardised(self, states: Tensor) -> Tensor:  # (B, T, H) -> (B, T, H)
        return (states - self.input_mean).div_(self.input_std)

    def token_states(self, states: Tensor, mask: Tensor) -> Tensor:  # (B, T, H), (B, T) -> (B, T, W)
        """What the layers make of the student's states in `standardised` units."""
        x = self.down(states)  # (B, T, W)
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        return self.norm(x)

    def features(self, tokens: Tensor, states: Tensor, mask: Tensor) -> Tensor:  # (B, T, W), (B, T, H) ... -> (B, D)
        """Features in the teacher's units, of `token_states` and of the states that they were made of."""
        output = self.up(self.pool(tokens, mask))
        mean = masked_mean(states, mask)  # (B, H)
        if self.config.hidden:
            output = output + self.word_out(F.gelu(self.word_in(self.word_norm(mean))))
        if self.config.init == "ridge":
            output = output + self.linear(mean)
        return output.float() * self.output_std + self.output_mean

    def pool(self, x: Tensor, mask: Tensor) -> Tensor:  # (B, T, W), (B, T) -> (B, W)
        if self.config.pooling == "cls":
            return x[:, 0]
        if self.config.pooling == "mean":
            return masked_mean(x, mask)
        scores = (x @ self.query) / math.sqrt(x.shape[-1])  # (B, T)
        return torch.einsum("bt,btw->bw", scores.masked_fill(~mask, -torch.inf).softmax(dim=-1), x)

    @torch.no_grad()
    def set_statistics(self, states: Tensor, features: Tensor) -> None:
        """Fix the units of both ends, from a sample of token states (N, H) and of the teacher's features (M, D).

        On the CPU, as `RidgeSums`. What is there in float64 already is not copied.
        """
        for mean, std, sample in (
            (self.input_mean, self.input_std, states),
            (self.output_mean, self.output_std, features),
        ):
            wide = sample.cpu().double()
            spread = wide.std(dim=0)
            mean.copy_(wide.mean(dim=0))
            # Some towers have dimensions that never vary; texts that are all alike have no others.
            std.copy_(spread.clamp_min(1e-2 * spread.mean() if spread.any() else 1))

    @torch.no_grad()
    def fit_linear(self, pooled: Tensor, targets: Tensor, *, ridge: float, weights: Tensor | None = None) -> None:
        """Set the linear path to the ridge regression from mean-pooled states to features.

        Args:
            pooled: (N, H) means of the token states, as the student gives them.
            targets: (N, D) features that `forward` should return.
            ridge: penalty, relative to the mean variance of `pooled`.
            weights: (N,) importance of each row.
        """
        sums = RidgeSums(len(self.input_mean), len(self.output_mean))
        self.add_to(sums, pooled.cpu().double(), targets.cpu().double(), weights)
        self.set_linear(sums, ridge=ridge)

    @torch.no_grad()
    def add_to(self, sums: RidgeSums, pooled: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch to what `set_linear` solves; arguments as for `fit_linear`."""
        x = (pooled - self.input_mean.to(pooled.device)) / self.input_std.to(pooled.device)
        sums.add(x, (targets - self.output_mean.to(targets.device)) / self.output_std.to(targets.device), weights)

    @torch.no_grad()
    def set_linear(self, sums: RidgeSums, *, ridge: float) -> None:
        """Set the linear path to the solution of what `add_to` collected."""
        weight, bias = sums.solve(ridge)
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(bias)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:  # (B, T, W), (B, T) bool -> (B, W)
    weights = mask.to(x.dtype).unsqueeze(-1)
    return (x * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
