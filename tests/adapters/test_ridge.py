from __future__ import annotations

import pytest
import torch

from trimtab.adapters.ridge import RidgeSums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_batches_give_what_all_rows_at_once_give(dtype: torch.dtype, weighted: bool) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(300, 5, dtype=dtype), torch.randn(300, 3, dtype=dtype)
    weights = torch.rand(300, dtype=dtype) if weighted else None
    sums = RidgeSums(5, 3)
    for rows in torch.randperm(300).split(70):
        sums.add(x[rows], y[rows], None if weights is None else weights[rows])

    w = torch.ones(300) if weights is None else weights
    w = (w / w.sum()).double().unsqueeze(-1)
    x, y = x.double(), y.double()
    x_mean, y_mean = (w * x).sum(0), (w * y).sum(0)
    gram = (x - x_mean).T @ (w * (x - x_mean))
    gram += 0.2 * gram.diagonal().mean() * torch.eye(5)
    expected = torch.linalg.solve(gram, (x - x_mean).T @ (w * (y - y_mean)))
    weight, bias = sums.solve(ridge=0.2)
    torch.testing.assert_close(weight, expected.T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bias, y_mean - x_mean @ expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e-7])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_rows_that_are_all_but_equal_give_their_target(spread: float, ridge: float) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(1, 6) + spread * torch.randn(20, 6), torch.randn(1, 3).expand(20, -1)
    sums = RidgeSums(6, 3)
    sums.add(x, y)
    weight, bias = sums.solve(ridge=ridge)
    assert weight.isfinite().all()
    torch.testing.assert_close(x.double() @ weight.T + bias, y.double(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rows_that_do_not_vary_get_no_weight(value: float) -> None:
    sums = RidgeSums(6, 3)
    sums.add(torch.full((20, 6), value), torch.tensor([1.0, 2.0, 3.0]).expand(20, -1))
    weight, bias = sums.solve(ridge=0.01)
    assert weight.abs().max() == 0
    torch.testing.assert_close(bias, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))


def test_nan_stays_nan() -> None:
    sums = RidgeSums(2, 1)
    sums.add(torch.full((5, 2), torch.nan), torch.ones(5, 1))
    assert sums.solve(ridge=0.01)[0].isnan().all()


def test_a_singular_system_has_its_smallest_solution() -> None:
    """Two inputs that are the same share the weight that one of them would have."""
    torch.manual_seed(0)
    one = torch.randn(50, 1)
    sums = RidgeSums(2, 1)
    sums.add(one.expand(-1, 2), 3 * one + 1)
    weight, bias = sums.solve(ridge=0.0)
    torch.testing.assert_close(weight, torch.full((1, 2), 1.5, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(bias, torch.ones(1, dtype=torch.float64), atol=1e-4, rtol=0)
