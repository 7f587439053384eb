from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.data.parallel import ParallelText
from trimtab.data.sampling import draw_epoch, draw_hard_epoch, pairs_per_epoch, steps_per_epoch


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
    assert abs(np.corrcoef(means[:20], np.arange(20))[0, 1]) < 0.6  # nor do those that were sorted together


def test_rounding_of_probabilities_never_leaves_the_data() -> None:
    probability = np.full(7, 1 / 7) * (1 - 1e-12)
    for epoch in range(50):
        batches = draw(probability, pairs=70, batch_size=7, epoch=epoch)
        assert batches.min() >= 0
        assert batches.max() <= 6


# -- weighted, without replacement


def draw_hard(probability: np.ndarray, **changes: Any) -> np.ndarray:
    """(steps, B) of one epoch."""
    options = {"share": 0.5, "batch_size": 8, "seed": 0, "epoch": 0, **changes}
    return np.array(list(draw_hard_epoch(probability, **options)))


def some_probability(count: int, seed: int = 0) -> np.ndarray:
    weights = np.random.default_rng(seed).random(count) ** 3 + 0.01
    return weights / weights.sum()


@settings(deadline=None)
@given(count=st.integers(1, 200), share=st.floats(0.01, 1), batch_size=st.integers(1, 50), seed=st.integers(0, 99))
def test_a_hard_epoch_has_its_share_of_different_pairs_in_full_batches(
    count: int, share: float, batch_size: int, seed: int
) -> None:
    probability = some_probability(count, seed)
    drawn = pairs_per_epoch(count, share, batch_size)
    batches = draw_hard(probability, share=share, batch_size=batch_size, seed=seed)
    assert batches.size == drawn == len(np.unique(batches))
    assert batches.min() >= 0
    assert batches.max() < count
    wanted = max(1, round(share * count))
    assert wanted - batch_size < drawn <= wanted
    assert len(batches) == steps_per_epoch(drawn, batch_size)
    assert batches.shape[1] == min(batch_size, wanted)  # less than a batch is one short batch


def test_seed_epoch_and_probability_decide_a_hard_epoch() -> None:
    probability = some_probability(100)
    first = draw_hard(probability)
    np.random.seed(7)  # the global generator is not used
    assert np.array_equal(first, draw_hard(probability))
    for other in (draw_hard(probability, epoch=1), draw_hard(probability, seed=1), draw_hard(some_probability(100, 1))):
        assert not np.array_equal(first, other)


def test_equal_probabilities_draw_all_alike_and_a_whole_epoch_has_each_once() -> None:
    uniform = np.full(40, 1 / 40)
    assert sorted(draw_hard(uniform, share=1.0).ravel()) == list(range(40))
    counts = np.bincount(np.concatenate([draw_hard(uniform, epoch=e).ravel() for e in range(1500)]), minlength=40)
    assert counts.sum() == 1500 * 16
    assert abs(counts / 1500 - 0.4).max() < 4.5 * (0.4 * 0.6 / 1500) ** 0.5


def test_the_first_drawn_are_drawn_in_proportion() -> None:
    probability = np.array([0.1, 0.2, 0.3, 0.4])
    single = [draw_hard(probability, share=0.25, batch_size=1, epoch=e).item() for e in range(4000)]
    assert abs(np.bincount(single) / 4000 - probability).max() < 4.5 * (0.25 / 4000) ** 0.5
    # Then among those that are left: {2, 3} is 3 before 2 or 2 before 3.
    pairs = [set(draw_hard(probability, share=0.5, batch_size=2, epoch=e).ravel().tolist()) for e in range(4000)]
    expected = 0.3 * 0.4 / 0.7 + 0.4 * 0.3 / 0.6
    assert abs(np.mean([pair == {2, 3} for pair in pairs]) - expected) < 4.5 * (0.25 / 4000) ** 0.5


def test_no_batch_has_all_the_hard_pairs() -> None:
    probability = np.arange(1, 401) / np.arange(1, 401).sum()
    means = np.array([draw_hard(probability, epoch=e).mean(1) for e in range(200)])  # (200, 25) batches
    assert np.ptp(means.mean(0)) < 0.1 * means.mean()  # at any place in the epoch
    assert means.std(1).mean() < 400 / 12**0.5 / 8**0.5  # within an epoch: less than batches at random would


@settings(deadline=None)
@given(captions=st.lists(st.integers(0, 12), min_size=16, max_size=120), seed=st.integers(0, 99))
def test_equal_captions_are_spread_over_batches(captions: list[int], seed: int) -> None:
    numbers = np.array(captions)
    probability = some_probability(len(numbers), seed)
    batches = draw_hard(probability, share=1.0, seed=seed, captions=numbers)
    assert sorted(batches.ravel()) == sorted(draw_hard(probability, share=1.0, seed=seed).ravel())
    for caption in set(captions):
        per_batch = (numbers[batches] == caption).sum(1)
        assert np.ptp(per_batch) <= 1


def test_captions_meet_others_in_every_epoch() -> None:
    probability, captions = np.full(256, 1 / 256), np.arange(256)
    epochs = [draw_hard(probability, share=1.0, batch_size=16, captions=captions, epoch=e) for e in (0, 1)]
    first, second = ({frozenset(batch.tolist()) for batch in batches} for batches in epochs)
    assert first.isdisjoint(second)


def test_impossible_probabilities_are_refused() -> None:
    for probability in ([0.5, 0.6], [1.5, -0.5], [np.nan, 1.0], []):
        with pytest.raises(ValueError, match="sum to 1"):
            draw_hard(np.array(probability))
    with pytest.raises(ValueError, match="2 pairs to draw, but only 1"):
        draw_hard(np.array([1.0, 0.0]), share=1.0, batch_size=1)
