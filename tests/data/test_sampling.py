from __future__ import annotations

import numpy as np
import pytest

from trimtab.data.parallel import ParallelText
from trimtab.data.sampling import EpochBatches, draw_epoch, steps_per_epoch


def draw(probability: np.ndarray | None = None, lengths: np.ndarray | None = None, **changes: int) -> np.ndarray:
    """(steps, B) of one epoch over 1,000 texts."""
    probability = np.full(1000, 1e-3) if probability is None else probability
    lengths = np.arange(len(probability)) % 30 if lengths is None else lengths
    options = {"pairs": len(probability), "batch_size": 20, "seed": 0, "epoch": 0, **changes}
    return np.array(list(draw_epoch(probability, lengths, **options)))


@pytest.mark.parametrize(("pairs", "batch_size", "steps"), [(100, 10, 10), (109, 10, 10), (3, 10, 1), (1, 1, 1)])
def test_steps_are_full_batches_and_at_least_one(pairs: int, batch_size: int, steps: int) -> None:
    assert steps_per_epoch(pairs, batch_size) == steps
    assert draw(pairs=pairs, batch_size=batch_size).shape == (steps, batch_size)


def test_an_epoch_of_equal_pairs_is_each_of_them_once() -> None:
    assert sorted(draw().ravel()) == list(range(1000))


def test_seed_and_epoch_alone_decide() -> None:
    assert np.array_equal(draw(epoch=3), draw(epoch=3))
    assert not np.array_equal(draw(epoch=3), draw(epoch=4))
    assert not np.array_equal(draw(epoch=3), draw(epoch=3, seed=1))
    np.random.seed(7)  # the global generator is not used
    assert np.array_equal(draw(epoch=3), draw(epoch=3))


def test_counts_are_within_one_of_what_probabilities_expect() -> None:
    weights = np.random.default_rng(0).random(500) ** 3
    probability = weights / weights.sum()
    for epoch in range(3):
        counts = np.bincount(draw(probability, pairs=2000, epoch=epoch).ravel(), minlength=500)
        assert counts.sum() == 2000
        assert (np.abs(counts - 2000 * probability) < 1).all()


def test_pairs_too_rare_for_one_epoch_come_up_over_several() -> None:
    seen = {index for epoch in range(40) for index in draw(pairs=100, epoch=epoch).ravel().tolist()}
    assert len(seen) > 950  # of 1,000, in 4,000 draws


def test_balance_decides_how_often_a_small_language_is_drawn() -> None:
    text = ParallelText.from_pairs([(str(i), "") for i in range(900)], "zh").concat(
        ParallelText.from_pairs([(str(i), "") for i in range(100)], "ja")
    )
    shares = {
        balance: np.mean(draw(text.sampling_weights(balance)) >= 900)  # rows of the small language
        for balance in (0.0, 0.5, 1.0)
    }
    assert shares == pytest.approx({0.0: 0.5, 0.5: 0.25, 1.0: 0.1}, abs=0.005)


def test_texts_of_like_length_share_a_batch_in_random_order() -> None:
    lengths = np.random.default_rng(1).integers(3, 60, 1000)
    batches = draw(lengths=lengths)
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 6  # of 57; about 50 without sorting
    # The batches themselves come in no order of length, which would be a curriculum nobody asked for.
    means = np.array([lengths[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


def test_skipping_leaves_the_rest_as_it_was() -> None:
    epoch = draw_epoch(np.full(100, 0.01), np.ones(100), pairs=100, batch_size=10, seed=0, epoch=0)
    assert isinstance(epoch, EpochBatches)
    whole = [batch.tolist() for batch in epoch]
    assert [batch.tolist() for batch in epoch.skip(4)] == whole[4:]
    assert [batch.tolist() for batch in epoch.skip(4).skip(5)] == whole[9:]
    assert list(epoch.skip(10)) == []


def test_rounding_of_probabilities_never_leaves_the_data() -> None:
    probability = np.full(7, 1 / 7) * (1 - 1e-12)
    for epoch in range(50):
        batches = draw(probability, pairs=70, batch_size=7, epoch=epoch)
        assert batches.min() >= 0
        assert batches.max() <= 6
