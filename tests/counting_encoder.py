"""Texts to states that say which text they are of, by an encoder that counts what it is asked for."""

from __future__ import annotations

import numpy as np

from trimtab.data.cache import PackedStates

DIM = 5
ITEMS = [f"text {i}" + "x" * (i * 7 % 11) for i in range(50)]


def state_of(text: str) -> np.ndarray:
    """(len + 2, DIM), exact in float16 and different for every text used here."""
    codes = np.array([1, *map(ord, text), 2], np.float32) % 2048
    return codes[:, None] + np.arange(DIM, dtype=np.float32) / 2 * (codes[:, None] < 512)


def vectors_of(texts: list[str]) -> np.ndarray:
    """(n, DIM) sums of the states."""
    return np.stack([state_of(text).sum(axis=0) for text in texts])


class Encoder:
    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    @property
    def seen(self) -> list[str]:
        return [text for call in self.calls for text in call]

    def states(self, texts: list[str]) -> list[np.ndarray]:
        self.calls.append(texts)
        return [state_of(text) for text in texts]

    def vectors(self, texts: list[str]) -> np.ndarray:
        self.calls.append(texts)
        return vectors_of(texts)


def check_states(states: PackedStates, items: list[str]) -> None:
    assert len(states) == len(items)
    assert states.dim == DIM
    assert states.lengths.tolist() == [len(item) + 2 for item in items]
    indices = np.random.default_rng(0).permutation(len(items))
    batch, mask = states.rows(indices)
    for row, keep, index in zip(batch, mask, indices, strict=True):
        assert np.array_equal(row[keep], state_of(items[index]))
        assert not row[~keep].any()
        assert np.array_equal(states[index], state_of(items[index]))
