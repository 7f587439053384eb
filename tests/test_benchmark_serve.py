"""What the server is compared with counts the items that were passed, whatever the size of the batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import serve as benchmark


class Counting:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def encode_text(self, texts: list[str], *, batch_size: int) -> None:
        self.sizes.append(len(texts))


@pytest.mark.parametrize("batch", [1, 5, 8, 16, 20])
def test_every_pass_is_full(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: Any = iter(range(1000))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(seconds))
    model = Counting()
    rate = benchmark.bare(model, "text", ["a"] * 8, 10, batch)
    assert set(model.sizes) == {batch}
    assert rate == sum(model.sizes[1:]) / 11
