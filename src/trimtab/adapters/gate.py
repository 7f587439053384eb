"""A gate on domain adapters: pictures that do not look like the domain keep what the base says of them.

Adapters change the tower for every picture. The gate looks at the base's own embedding of a picture: how close does it
come to one of a few centres of the training pictures? What is far from all of them passes by the adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.config import GateConfig

_ROUNDS = 20
_SOFT_WIDTH = 0.25
# Of cosines: the picture that sets a bound passes, in whatever order its sums are taken. In half precision they differ
# by up to a few hundredths, so that a picture at the bound may change sides.
_ROUNDING = 1e-4
_PICTURES_PER_CENTRE = 8  # centres of fewer would know the training pictures by heart


class DomainGate(nn.Module):
    """How much of the adapters each picture gets, from 0 (the base) to 1; buffers only, nothing is trained.

    The measure is the highest cosine of a picture's base embedding with a centre. At `high` and above a picture gets
    all of the adapters. ``hard`` gives all others nothing; ``soft`` falls evenly to nothing at `low`.

    Args:
        centres: (K, D) of unit norm.
    """

    centres: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, centres: Tensor, low: float, high: float) -> None:
        super().__init__()
        self.register_buffer("centres", centres.detach().float().clone())
        self.register_buffer("low", torch.tensor(float(low)))
        self.register_buffer("high", torch.tensor(float(high)))

    @property
    def kind(self) -> str:
        """``soft`` or ``hard``."""
        return "soft" if self.low < self.high else "hard"

    def forward(self, features: Tensor) -> Tensor:  # base features (B, D) -> (B,)
        nearest = closeness(features, self.centres)
        if self.kind == "hard":
            return (nearest >= self.high).float()
        return ((nearest - self.low) / (self.high - self.low)).clamp(0, 1)


def fit_gate(config: GateConfig, train: Tensor, validation: Tensor) -> DomainGate:
    """Centres by spherical k-means (Dhillon & Modha 2001), bounds from pictures that no centre has seen.

    `high` lets ``config.keep`` of the validation pictures pass whole. ``soft`` ends below it, by a quarter of what the
    median of the validation pictures lies above it. Deterministic.

    Args:
        train: (N, D) the base's embeddings of the training pictures.
        validation: (V, D) those of the validation pictures.
    """
    train, validation = (F.normalize(each.detach().float(), dim=-1) for each in (train, validation))
    centres = _centres(train, max(1, min(config.centres, len(train) // _PICTURES_PER_CENTRE)))
    nearest = closeness(validation, centres)
    high = float(nearest.quantile(1 - config.keep, interpolation="lower")) - _ROUNDING
    width = _SOFT_WIDTH * (float(nearest.median()) - high) if config.kind == "soft" else 0.0
    return DomainGate(centres, high - width, high)


def closeness(features: Tensor, centres: Tensor) -> Tensor:
    """The highest cosine of each row (B, D) with a centre (K, D): (B,)."""
    with torch.autocast(features.device.type, enabled=False):
        return (F.normalize(features.float(), dim=-1) @ centres.T).amax(1)


def mixed(base: Tensor, adapted: Tensor, share: Tensor) -> Tensor:
    """Features (B, D) between the base's and the adapted ones, by ``share`` (B,) of the latter.

    The base's are brought to the length of the adapted ones, so that only directions are mixed; where the share is 1
    the adapted ones come out bit for bit.
    """
    with torch.autocast(adapted.device.type, enabled=False):  # which takes norms in one precision and leaves the rest
        start, end = base.float(), adapted.float()
        length = end.norm(dim=-1, keepdim=True) / start.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return torch.lerp(start * length, end, share[:, None].float()).to(adapted.dtype)


@dataclass(frozen=True, eq=False)
class Gated:
    """A gate with the base's embeddings of certain pictures, to which it is applied without running the base again.

    Attributes:
        embeddings: (N, D) of unit norm.
    """

    gate: DomainGate
    embeddings: Tensor

    def __call__(self, adapted: Tensor) -> Tensor:
        """Embeddings (N, D) as the gated model gives them, from those of the adapters."""
        share = self.gate(self.embeddings)
        return F.normalize(mixed(self.embeddings, adapted, share), dim=-1)


def _centres(rows: Tensor, count: int) -> Tensor:
    """(K, D) of unit norm. Starts from rows that are far from each other, so that small groups get one too."""
    chosen = [int((rows @ rows.mean(0)).argmax())]
    nearest = rows @ rows[chosen[0]]
    for _ in range(count - 1):
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, rows @ rows[chosen[-1]])
    centres = rows[chosen]
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(centres).index_add_(0, (rows @ centres.T).argmax(1), rows)
        length = sums.norm(dim=-1, keepdim=True)
        moved = torch.where(length > 1e-6, sums / length.clamp_min(1e-6), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
