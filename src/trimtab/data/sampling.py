"""Which pairs an epoch sees, and in which batches: a function of seed and epoch alone."""

from __future__ import annotations

import numpy as np

# Batches whose texts are sorted by length together: enough to save padding, few enough to stay random.
_BUCKET = 20


def steps_per_epoch(pairs: int, batch_size: int) -> int:
    """Full batches in an epoch of `pairs` draws, at least one."""
    return max(1, pairs // batch_size)


def draw_epoch(
    probability: np.ndarray, lengths: np.ndarray, *, pairs: int, batch_size: int, seed: int, epoch: int
) -> np.ndarray:
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
    return rng.permutation(np.concatenate(batches))


def pairs_per_epoch(pairs: int, share: float, batch_size: int) -> int:
    """How many pairs `draw_hard_epoch` draws: ``share`` of them in full batches, or one short batch of them all."""
    wanted = max(1, round(share * pairs))
    return wanted - wanted % batch_size if wanted > batch_size else wanted


def draw_hard_epoch(
    probability: np.ndarray,
    *,
    share: float,
    batch_size: int,
    seed: int,
    epoch: int,
    captions: np.ndarray | None = None,
) -> np.ndarray:
    """Draw `pairs_per_epoch` different pairs, the likelier the higher their probability, as batches in random order.

    Each pair's clock rings after an exponential time of rate `probability` and the first to ring are drawn
    (Efraimidis & Spirakis 2006, "Weighted random sampling with a reservoir"; the same draw as the Gumbel top-k
    of Kool et al. 2019, arXiv 1903.06059): every draw is in proportion to `probability` among the pairs not yet
    drawn. Equal probabilities give a plain random subset. How likely a pair is to be in the epoch is not
    ``pairs * probability``; see `objectives.memory_bank.inclusion_probability`.

    Args:
        probability: (N,) that sums to 1.
        share: fraction of the pairs to draw, above 0 and at most 1.
        captions: (N,) caption number of each pair: pairs of one caption are spread over the batches as evenly
            as they go, so that a batch has many captions to tell apart.

    Raises:
        ValueError: no probabilities, or fewer above 0 than pairs to draw.
    """
    probability = np.asarray(probability, np.float64)
    if not (probability >= 0).all() or abs(probability.sum() - 1) > 1e-6:
        raise ValueError(f"probability must be at least 0 and sum to 1, not to {probability.sum()}")
    count = pairs_per_epoch(len(probability), share, batch_size)
    if np.count_nonzero(probability) < count:
        raise ValueError(f"{count} pairs to draw, but only {np.count_nonzero(probability)} of probability above 0")
    rng = np.random.default_rng([seed, epoch])
    with np.errstate(divide="ignore"):
        rings = rng.standard_exponential(len(probability)) / probability
    drawn = np.argsort(rings, kind="stable")[:count]
    if captions is not None:
        order = rng.permutation(int(captions.max()) + 1)
        drawn = drawn[np.argsort(order[captions[drawn]], kind="stable")]
    # Dealt out like cards, one to each batch in turn: neighbours (early clocks, equal captions) are kept apart.
    dealt = drawn.reshape(-1, steps_per_epoch(count, batch_size)).T  # (steps, B)
    return rng.permutation(dealt)
