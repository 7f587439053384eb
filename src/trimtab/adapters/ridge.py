"""Ridge regression from sums that are collected batch by batch, so that no number of pairs is too many."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

_ROUNDING = torch.finfo(torch.float32).eps


class RidgeSums:
    """Weighted moments of inputs and targets, from which `solve` gets the linear map between them.

    Products of a batch are taken in float32, on its device, and added up in float64 on the CPU: some GPUs have none.
    Rounding then matters only where inputs lie far from 0 for their spread: give them roughly centred.

    Args:
        input_dim: H.
        output_dim: D.
    """

    def __init__(self, input_dim: int, output_dim: int) -> None:
        self.input_dim = input_dim
        self.gram = torch.zeros(input_dim + 1, input_dim + 1, dtype=torch.float64)  # the last row and column are sums
        self.cross = torch.zeros(input_dim + 1, output_dim, dtype=torch.float64)

    def add(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch: (B, H), (B, D) and the importance (B,) of each row."""
        x = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)  # (B, H + 1)
        weighted = x if weights is None else x * weights.to(x).unsqueeze(-1)
        self.gram += (weighted.T @ x).cpu().double()
        self.cross += (weighted.T @ targets.to(x)).cpu().double()

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight (D, H) and bias (D,), float64; the bias is not penalised.

        Args:
            ridge: penalty, relative to the mean variance of the inputs. Directions in which the inputs do not vary get
                no weight where it is too small to settle them.
        """
        total = self.gram[-1, -1]
        x_mean, y_mean = self.gram[-1, :-1] / total, self.cross[-1] / total
        gram = self.gram[:-1, :-1] / total - torch.outer(x_mean, x_mean)  # (H, H)
        cross = self.cross[:-1] / total - torch.outer(x_mean, y_mean)  # (H, D)
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        solution = _solved(gram, cross, noise=_ROUNDING * float((self.gram.diagonal()[:-1] / total).max()))  # (H, D)
        return solution.T, y_mean - x_mean @ solution


def _solved(gram: Tensor, cross: Tensor, *, noise: float) -> Tensor:
    """The solution (H, D); of rows that are all but equal the smallest one.

    Args:
        noise: eigenvalues up to it are rounding of the products and tell nothing.
    """
    with contextlib.suppress(torch.linalg.LinAlgError):
        solution = torch.linalg.solve(gram, cross)
        if solution.isfinite().all() or not gram.isfinite().all():  # of NaN there is no other solution
            return solution
    return torch.linalg.pinv(gram, atol=noise, rtol=0.0, hermitian=True) @ cross
