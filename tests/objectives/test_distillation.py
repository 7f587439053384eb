"""Distillation terms: values known by hand, gradients, and what must not be a negative."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trimtab.config import DistillationConfig
from trimtab.objectives import distillation
from trimtab.objectives.distillation import Standardiser, distillation_terms


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_mse_sums_over_dimensions():
    student, teacher = torch.zeros(3, 5), torch.ones(3, 5)
    assert distillation.mse(student, teacher).item() == pytest.approx(5.0)


def test_constant_output_scores_one_on_standardised_targets():
    teacher = torch.randn(4000, 16) * torch.linspace(0.1, 30, 16) + 5
    standardiser = Standardiser.fit(teacher)
    constant = teacher.mean(0).expand_as(teacher)
    terms = distillation_terms(constant, teacher, DistillationConfig(), standardiser=standardiser)
    assert terms["mse"].item() == pytest.approx(1.0, rel=1e-3)


def test_perfect_student_scores_zero():
    teacher = torch.randn(32, 8)
    config = DistillationConfig(mse=1, cosine=1, infonce=1, gram=1, logit_scale=1000, targets="sum")
    terms = distillation_terms(teacher.clone(), teacher, config)
    assert set(terms) == {"mse", "cosine", "infonce", "gram"}
    for value in terms.values():
        assert value.item() == pytest.approx(0.0, abs=1e-4)


def test_weight_multiplies_term_and_zero_leaves_it_out():
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    once = distillation_terms(student, teacher, DistillationConfig(mse=0, cosine=1))
    thrice = distillation_terms(student, teacher, DistillationConfig(mse=0, cosine=3))
    assert list(thrice) == ["cosine"]
    torch.testing.assert_close(thrice["cosine"], 3 * once["cosine"])


def test_infonce_is_cross_entropy_when_rows_differ():
    student, teacher = torch.randn(7, 4), torch.randn(7, 4)
    logits = 20 * F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).T
    labels = torch.arange(7)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(distillation.infonce(student, teacher), expected)


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_equal_teacher_rows_are_no_negatives(noise):
    teacher = torch.eye(4)[[0, 1, 2, 0]]
    teacher[3] += noise * torch.rand(4)  # as after a round trip through fp16
    aligned = distillation.infonce(teacher.clone(), teacher, logit_scale=50.0)
    assert aligned.item() == pytest.approx(0.0, abs=1e-3)  # would be log 2 / 2 if the twins repelled


@pytest.mark.parametrize("targets", ["sum", "standardise"])
def test_weights_scale_rows_and_zero_weight_gives_no_gradient(targets):
    teacher = torch.randn(4, 3)
    student = torch.randn(4, 3, requires_grad=True)
    weights = torch.tensor([0.0, 2.0, 1.0, 1.0])
    config = DistillationConfig(mse=1, cosine=1, targets=targets)
    standardiser = Standardiser.fit(teacher)
    terms = distillation_terms(student, teacher, config, standardiser=standardiser, weights=weights)
    sum(terms.values()).backward()
    assert student.grad is not None
    assert student.grad[0].abs().sum() == 0
    assert (student.grad[1:].abs().sum(1) > 0).all()


def test_gram_by_hand():
    assert distillation.gram(torch.eye(2), torch.ones(2, 2)).item() == pytest.approx(1.0)  # cosines 0 and 1
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    weights = [0.0, 2.0, 1.0, 1.0]
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    rows = [sum((s[i] @ s[j] - t[i] @ t[j]).item() ** 2 for j in range(4) if j != i) / 3 for i in range(4)]
    config = DistillationConfig(mse=0, gram=1)
    terms = distillation_terms(student, teacher, config, weights=torch.tensor(weights))
    assert terms["gram"].item() == pytest.approx(sum(w * row for w, row in zip(weights, rows)) / 4, rel=1e-4)


def test_no_gradient_reaches_the_teacher_and_halves_are_computed_in_float32():
    teacher = torch.randn(4, 3, requires_grad=True)
    student = torch.randn(4, 3, requires_grad=True)
    config = DistillationConfig(mse=1, cosine=1, infonce=1, gram=1, targets="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = distillation_terms(student, teacher.half(), config)
    assert {term.dtype for term in terms.values()} == {torch.float32}
    sum(terms.values()).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_batch_of_one_is_finite():
    one = torch.randn(1, 3, requires_grad=True)
    config = DistillationConfig(mse=0, infonce=1, gram=1)
    sum(distillation_terms(one, torch.randn(1, 3), config).values()).backward()
    assert one.grad is not None
    assert one.grad.abs().sum() == 0


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        distillation_terms(torch.zeros(2, 3), torch.zeros(2, 4), DistillationConfig())
    with pytest.raises(ValueError, match="needs a standardiser"):
        distillation_terms(torch.zeros(2, 3), torch.zeros(2, 3), DistillationConfig())
    with pytest.raises(ValueError, match="at least 2"):
        Standardiser.fit(torch.zeros(1, 3))


def test_standardiser_chunks_and_state(tmp_path):
    vectors = (np.random.default_rng(0).normal(3, 0.5, (100, 6))).astype(np.float16)
    vectors[:, 2] = 1.5  # never varies
    np.save(tmp_path / "vectors.npy", vectors)
    fitted = Standardiser.fit(np.load(tmp_path / "vectors.npy", mmap_mode="r"), chunk=7)
    x = torch.tensor(vectors).float()
    z = fitted(x)
    assert z.isfinite().all()
    torch.testing.assert_close(z.mean(0), torch.zeros(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(z[:, [0, 1, 3]].std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)
    copy = Standardiser(6)
    copy.load_state_dict(fitted.state_dict())
    torch.testing.assert_close(copy(x), z)


def test_a_dimension_that_hardly_varies_is_not_blown_up():
    teacher = torch.randn(500, 4)
    teacher[:, 2] = 1 + 1e-7 * torch.randn(500)
    std = Standardiser.fit(teacher).std
    assert std[2].item() == pytest.approx(1e-3 * teacher.std(0, correction=0).mean().item(), rel=1e-3)


def test_a_teacher_without_direction_gives_a_finite_loss():
    teacher = torch.randn(3, 4)
    teacher[1] = 0
    assert distillation.infonce(torch.randn(3, 4), teacher).isfinite()
