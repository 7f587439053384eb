"""The contrastive objective: values known by hand, several positives, weights, and what must not be a negative."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.config import ContrastiveConfig
from trimtab.errors import RecipeError
from trimtab.objectives.contrastive import contrastive_terms, unique_rows

BOTH = ContrastiveConfig(image_to_text=1.0, text_to_image=1.0)
SCALE = 3.0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def at_angles(*degrees: float) -> Tensor:
    """Unit vectors of the plane, (N, 2): their cosines are easy to know."""
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1)


def log_softmax(right: float, *others: float) -> float:
    """Log-probability of the first of some cosines."""
    return SCALE * right - math.log(sum(math.exp(SCALE * c) for c in (right, *others)))


def test_one_caption_each_is_the_loss_of_clip():
    images, texts = torch.randn(7, 4), torch.randn(7, 4)
    logits = SCALE * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    labels = torch.arange(7)
    terms = contrastive_terms(images, texts, labels, SCALE, ContrastiveConfig())
    assert list(terms) == ["i2t", "t2i"]
    torch.testing.assert_close(terms["i2t"], F.cross_entropy(logits, labels) / 2)
    torch.testing.assert_close(terms["t2i"], F.cross_entropy(logits.T, labels) / 2)


def test_equal_captions_by_hand():
    # Images 0 and 1 share text 0. Cosines: image 0 (1, 0), image 1 (.5, .866), image 2 (0, 1).
    images, texts = at_angles(0, 60, 90), at_angles(0, 90)
    half, root = 0.5, math.sqrt(0.75)
    terms = contrastive_terms(images, texts, torch.tensor([0, 0, 1]), SCALE, BOTH)
    i2t = -(log_softmax(1, 0) + log_softmax(half, root) + log_softmax(1, 0)) / 3
    first = -(log_softmax(1, half, 0) + log_softmax(half, 1, 0)) / 2  # of two images: the mean of logarithms
    t2i = (first - log_softmax(1, 0, root)) / 2  # texts alike, however many images
    assert terms["i2t"].item() == pytest.approx(i2t, abs=1e-6)
    assert terms["t2i"].item() == pytest.approx(t2i, abs=1e-6)


def test_weights_by_hand():
    images, texts = at_angles(0, 60, 90), at_angles(0, 90)
    half, root = 0.5, math.sqrt(0.75)
    weights = torch.tensor([1.0, 3.0, 4.0])
    terms = contrastive_terms(images, texts, torch.tensor([0, 0, 1]), SCALE, BOTH, weights=weights)
    i2t = -(1 * log_softmax(1, 0) + 3 * log_softmax(half, root) + 4 * log_softmax(1, 0)) / 8
    first = -(1 * log_softmax(1, half, 0) + 3 * log_softmax(half, 1, 0)) / 4
    t2i = (2 * first - 4 * log_softmax(1, 0, root)) / 6  # a text weighs the mean of its images: 2 and 4
    assert terms["i2t"].item() == pytest.approx(i2t, abs=1e-6)
    assert terms["t2i"].item() == pytest.approx(t2i, abs=1e-6)


def test_several_captions_of_an_image_by_hand():
    images, texts = at_angles(0, 90), at_angles(0, 60, 90)
    positives = torch.tensor([[True, True, False], [False, False, True]])
    root = math.sqrt(0.75)
    terms = contrastive_terms(images, texts, positives, SCALE, BOTH)
    image_0 = -(log_softmax(1, 0.5, 0) + log_softmax(0.5, 1, 0)) / 2
    assert terms["i2t"].item() == pytest.approx((image_0 - log_softmax(1, root, 0)) / 2, abs=1e-6)
    t2i = -(log_softmax(1, 0) + log_softmax(0.5, root) + log_softmax(1, 0)) / 3
    assert terms["t2i"].item() == pytest.approx(t2i, abs=1e-6)


def test_every_positive_is_asked_for_the_hard_one_most():
    # One text, an easy and a hard image of it, and a wrong image in between.
    images = at_angles(10, 80, 45).requires_grad_()
    positives = torch.tensor([[True, False], [True, False], [False, True]])
    only = ContrastiveConfig(image_to_text=0.0, text_to_image=1.0)
    terms = contrastive_terms(images, at_angles(0, 45), positives, 10.0, only, weights=torch.tensor([1.0, 1.0, 0.0]))
    (gradient,) = torch.autograd.grad(terms["t2i"], images)
    assert gradient[1].norm() > 2 * gradient[0].norm()


def test_hard_negatives_count_in_one_direction_only():
    images, texts, extra = torch.randn(4, 3), torch.randn(4, 3), torch.randn(2, 3, requires_grad=True)
    own = torch.arange(4)
    plain = contrastive_terms(images, texts, own, SCALE, BOTH)
    more = contrastive_terms(images, torch.cat([texts, extra]), own, SCALE, BOTH)
    assert more["i2t"] > plain["i2t"]
    torch.testing.assert_close(more["t2i"], plain["t2i"])
    more["i2t"].backward()
    assert extra.grad is not None
    assert (extra.grad.abs().sum(1) > 0).all()


def test_label_smoothing_spreads_a_share_over_all_candidates():
    images, texts = at_angles(0, 90), at_angles(0, 90)
    config = ContrastiveConfig(image_to_text=1.0, text_to_image=0.0, label_smoothing=0.2)
    terms = contrastive_terms(images, texts, torch.tensor([0, 1]), SCALE, config)
    assert terms["i2t"].item() == pytest.approx(-0.9 * log_softmax(1, 0) - 0.1 * log_softmax(0, 1), abs=1e-6)
    images, texts, own = torch.randn(5, 3), torch.randn(5, 3), torch.arange(5)
    config = ContrastiveConfig(image_to_text=0.0, text_to_image=1.0, label_smoothing=0.2)
    terms = contrastive_terms(images, texts, own, SCALE, config)
    logits = SCALE * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    torch.testing.assert_close(terms["t2i"], F.cross_entropy(logits.T, own, label_smoothing=0.2))


def test_weight_multiplies_term_and_zero_leaves_it_out():
    images, texts, own = torch.randn(5, 3), torch.randn(5, 3), torch.arange(5)
    once = contrastive_terms(images, texts, own, SCALE, ContrastiveConfig(image_to_text=0, text_to_image=1))
    thrice = contrastive_terms(images, texts, own, SCALE, ContrastiveConfig(image_to_text=0, text_to_image=3))
    assert list(thrice) == ["t2i"]
    torch.testing.assert_close(thrice["t2i"], 3 * once["t2i"])


@settings(deadline=None, max_examples=30)
@given(factor=st.floats(0.01, 100), seed=st.integers(0, 1000), rows=st.integers(1, 9))
def test_only_ratios_of_weights_matter(factor: float, seed: int, rows: int):
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(rows, 3, generator=generator), torch.randn(4, 3, generator=generator)
    own = torch.randint(4, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator) + 0.01
    once = contrastive_terms(images, texts, own, SCALE, BOTH, weights=weights)
    scaled = contrastive_terms(images, texts, own, SCALE, BOTH, weights=factor * weights)
    alike = contrastive_terms(images, texts, own, SCALE, BOTH, weights=torch.full((rows,), factor))
    plain = contrastive_terms(images, texts, own, SCALE, BOTH)
    for name in plain:
        torch.testing.assert_close(scaled[name], once[name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alike[name], plain[name], atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=10))
def test_a_pair_of_weight_two_is_that_pair_twice_for_the_images(captions: list[int]):
    own = torch.tensor(captions)
    images, texts = torch.randn(len(own), 3), torch.randn(5, 3)
    weights = torch.ones(len(own))
    weights[0] = 2
    only = ContrastiveConfig(image_to_text=1.0, text_to_image=0.0)
    heavy = contrastive_terms(images, texts, own, SCALE, only, weights=weights)
    twice = contrastive_terms(torch.cat([images[:1], images]), texts, torch.cat([own[:1], own]), SCALE, only)
    torch.testing.assert_close(heavy["i2t"], twice["i2t"])


def test_a_pair_without_weight_gives_no_gradient_but_stays_a_negative():
    images, texts = torch.randn(4, 3, requires_grad=True), torch.randn(3, 3)
    weights = torch.tensor([0.0, 0.0, 1.0, 1.0])
    own = torch.tensor([0, 0, 1, 2])
    terms = contrastive_terms(images, texts, own, SCALE, BOTH, weights=weights)
    (of_images,) = torch.autograd.grad(terms["i2t"], images, retain_graph=True)
    assert of_images[:2].abs().sum() == 0
    (of_texts,) = torch.autograd.grad(terms["t2i"], images)
    assert of_texts.isfinite().all()
    assert (of_texts[:2].abs().sum(1) > 0).all()
    nothing = contrastive_terms(images, texts, own, SCALE, BOTH, weights=torch.zeros(4))
    assert [value.item() for value in nothing.values()] == [0, 0]


def test_logit_scale_learns_and_autocast_changes_nothing():
    images, texts, own = torch.randn(4, 3), torch.randn(4, 3), torch.arange(4)
    scale = torch.tensor(SCALE, requires_grad=True)
    expected = contrastive_terms(images.half(), texts.half(), own, SCALE, BOTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = contrastive_terms(images.half(), texts.half(), own, scale, BOTH)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])
    sum(terms.values()).backward()
    assert scale.grad is not None
    assert scale.grad != 0


def test_a_batch_of_one_has_nothing_to_learn():
    image = torch.randn(1, 3, requires_grad=True)
    sum(contrastive_terms(image, torch.randn(1, 3), torch.tensor([0]), SCALE, BOTH).values()).backward()
    assert image.grad is not None
    assert image.grad.abs().sum() == 0


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="needs a text"):
        contrastive_terms(torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0, 2]), SCALE, BOTH)
    with pytest.raises(ValueError, match=r"\(2, 3\) must be \(2,\) or \(2, 2\)"):
        contrastive_terms(torch.randn(2, 3), torch.randn(2, 3), torch.ones(2, 3).bool(), SCALE, BOTH)


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=50))
def test_unique_rows_are_first_ones_in_order(numbers: list[int]):
    unique, first = unique_rows(torch.tensor(numbers))
    assert unique.tolist() == sorted(set(numbers))
    assert first.tolist() == [numbers.index(number) for number in sorted(set(numbers))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_to_text": -1.0}, "image_to_text=-1.0 must be at least 0"),
        ({"image_to_text": 0.0, "text_to_image": 0.0}, "must be above 0, or text_to_image"),
        ({"logit_scale": 0.0}, "logit_scale=0.0 must be above 0 to 100, or null"),
        ({"label_smoothing": 1.0}, "at least 0 and below 1"),
        ({"hard_negatives": -1}, "at least 0"),
        ({"hard_negatives": 4, "image_to_text": 0.0}, "the only term that uses them"),
        ({"text_to_image": math.nan}, "text_to_image=nan"),
    ],
)
def test_impossible_objectives_are_refused(options: dict[str, float], message: str):
    with pytest.raises(RecipeError, match=message):
        ContrastiveConfig(**options)


def test_weights_get_no_gradient():
    weights = torch.ones(3, requires_grad=True)
    images = torch.randn(3, 4, requires_grad=True)
    terms = contrastive_terms(images, torch.randn(3, 4), torch.arange(3), SCALE, BOTH, weights=weights)
    sum(terms.values(), torch.zeros(())).backward()
    assert weights.grad is None
    assert images.grad is not None
