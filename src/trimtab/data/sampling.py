"""Which pairs an epoch sees, and in which batches: a function of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Batches whose texts are sorted by length together: enough to save padding, few enough to stay random.
_BUCKET = 20


class EpochBatches:
    """Index batches (B,) of one epoch; `skip` lets a resumed run start in the middle without drawing anew."""

    def __init__(self, batches: np.ndarray) -> None:
        self.batches = batches  # (steps, B)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.batches)

    def skip(self, count: int) -> EpochBatches:
        return EpochBatches(self.batches[count:])


def steps_per_epoch(pairs: int, batch_size: int) -> int:
    """Full batches in an epoch of `pairs` draws, at least one."""
    return max(1, pairs // batch_size)


def draw_epoch(
    probability: np.ndarray, lengths: np.ndarray, *, pairs: int, batch_size: int, seed: int, epoch: int
) -> EpochBatches:
    """Draw `pairs` indices in proportion to `probability` and put texts of like length into one batch.

    The draw is systematic: an index with an expected count of 2.3 comes up two or three times, never none or
    nine, so an epoch covers the data as evenly as the weights allow.

    Args:
        probability: (N,) that sums to 1.
        lengths: (N,) tokens of each text.
    """
    rng = np.random.default_rng([seed, epoch])
    steps = steps_per_epoch(pairs, batch_size)
    count = steps * batch_size
    points = (np.arange(count) + rng.random()) / count
    order = rng.permutation(len(probability))
    drawn = order[np.searchsorted(np.cumsum(probability[order]), points, side="right").clip(max=len(order) - 1)]
    rng.shuffle(drawn)
    batches = []
    for start in range(0, count, batch_size * _BUCKET):
        part = drawn[start : start + batch_size * _BUCKET]
        by_length = part[np.argsort(lengths[part] + rng.random(len(part)), kind="stable")]
        batches.append(by_length.reshape(-1, batch_size))
    return EpochBatches(rng.permutation(np.concatenate(batches)))
