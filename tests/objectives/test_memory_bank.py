"""The memory bank: difficulties known by hand, bounds of probabilities, weights, resume and several ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_ranks
from trimtab.config import MemoryBankConfig
from trimtab.data.sampling import draw_hard_epoch, pairs_per_epoch
from trimtab.errors import DataError, RecipeError
from trimtab.objectives import memory_bank
from trimtab.objectives.memory_bank import (
    MemoryBank,
    global_difficulty,
    inclusion_probability,
    instance_weights,
    sampling_probability,
)

SCALE = 4.0
MEASURES = ("margin", "rank", "loss")


def at_angles(*degrees: float) -> Tensor:
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1)


def cos(degrees: float) -> float:
    return math.cos(math.radians(degrees))


def difficulty(images: Tensor, texts: Tensor, captions: list[int], measure: Any = "margin", **options: Any) -> Tensor:
    return global_difficulty(images, texts, torch.tensor(captions), measure, logit_scale=SCALE, **options)


def make_bank(config: MemoryBankConfig | None = None, *, pairs: int = 12, texts: int = 4, **options: Any) -> MemoryBank:
    generator = torch.Generator().manual_seed(0)
    images, stored = torch.randn(pairs, 3, generator=generator), torch.randn(texts, 3, generator=generator)
    config = config or MemoryBankConfig()
    captions = torch.arange(pairs) % texts
    base = global_difficulty(images, stored, captions, MemoryBank.measure(config), logit_scale=SCALE)
    return MemoryBank(config, captions, stored, base, logit_scale=SCALE, **options)


def update(bank: MemoryBank, *indices: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    captions = bank.captions[list(indices)]
    rows = len(indices)
    images, texts = torch.randn(rows, 3, generator=generator), torch.randn(rows, 3, generator=generator)
    bank.update(torch.tensor(indices), images, captions, texts)


# -- difficulty


def test_margin_rank_and_loss_by_hand():
    # Texts at 0, 30 and 90 degrees. Image 0 lies on its caption; image 1, at 20, is nearer to text 1 than to its own.
    images, texts, captions = at_angles(0, 20, 90), at_angles(0, 30, 90), [0, 0, 1]
    margins = [cos(30) - 1, cos(10) - cos(20), 1 - cos(60)]
    expected = [1 / (1 + math.exp(-SCALE * margin)) for margin in margins]
    assert difficulty(images, texts, captions, "margin").tolist() == pytest.approx(expected, abs=1e-6)
    ranks = [math.log(1 + ahead) / math.log(3) for ahead in (0, 1, 1)]
    assert difficulty(images, texts, captions, "rank").tolist() == pytest.approx(ranks, abs=1e-6)
    cosines = [[cos(0), cos(30), cos(90)], [cos(20), cos(10), cos(70)], [cos(60), cos(90), cos(0)]]
    losses = [math.log(sum(math.exp(SCALE * (c - row[0])) for c in row)) for row in cosines]
    expected = [loss / (loss + math.log(3)) for loss in losses]
    assert difficulty(images, texts, captions, "loss").tolist() == pytest.approx(expected, abs=1e-6)


def test_captions_of_a_group_are_not_wrong():
    images, texts = at_angles(0, 0, 90), at_angles(10, 0, 90)
    assert difficulty(images, texts, [0, 1, 2], "rank").tolist() == pytest.approx([math.log(2) / math.log(3), 0, 0])
    grouped = difficulty(images, texts, [0, 1, 2], "rank", groups=torch.tensor([7, 7, 2]))
    assert grouped.tolist() == [0, 0, 0]
    margin = difficulty(images, texts, [0, 1, 2], "margin", groups=torch.tensor([7, 7, 2]))
    assert margin[0].item() == pytest.approx(1 / (1 + math.exp(SCALE * cos(10))), abs=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_without_a_wrong_caption_nothing_is_hard(measure: str):
    images, texts = at_angles(0, 50), at_angles(10, 80)
    assert difficulty(images, texts, [0, 1], measure, groups=torch.tensor([1, 1])).tolist() == [0, 0]


@pytest.mark.parametrize("measure", MEASURES)
def test_a_collapsed_model_finds_nothing_easy(measure: str):
    constant = F.normalize(torch.ones(6, 5) + 1e-8 * torch.randn(6, 5), dim=-1)
    found = difficulty(constant, constant[:4], [0, 1, 2, 3, 0, 1], measure)
    assert found.tolist() == pytest.approx([1.0 if measure == "rank" else 0.5] * 6, abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(pairs=st.integers(1, 12), texts=st.integers(2, 9), seed=st.integers(0, 1000), measure=st.sampled_from(MEASURES))
def test_difficulty_is_that_of_the_whole_matrix_whatever_the_chunk(pairs: int, texts: int, seed: int, measure: str):
    generator = torch.Generator().manual_seed(seed)
    images, stored = torch.randn(pairs, 4, generator=generator), torch.randn(texts, 4, generator=generator)
    captions = torch.randint(texts, (pairs,), generator=generator)
    groups = torch.randint(5, (pairs,), generator=generator)
    options: dict[str, Any] = {"logit_scale": SCALE, "groups": groups}
    found = global_difficulty(3 * images, stored, captions, measure, **options)
    for chunk in (1, 7):
        torch.testing.assert_close(global_difficulty(images, stored, captions, measure, chunk=chunk, **options), found)
    assert ((found >= 0) & (found <= 1)).all()
    cosines = F.normalize(images, dim=-1) @ F.normalize(stored, dim=-1).T
    for pair in range(pairs):
        right = set(captions[groups == groups[pair]].tolist())
        wrong = torch.tensor([cosines[pair, t].item() for t in range(texts) if t not in right])
        partner = cosines[pair, captions[pair]]
        if not len(wrong):
            expected = 0.0
        elif measure == "margin":
            expected = torch.sigmoid(SCALE * (wrong.max() - partner)).item()
        elif measure == "rank":
            expected = math.log(1 + int((wrong > partner).sum())) / math.log(1 + len(wrong))
        else:
            loss = -(SCALE * torch.cat([partner[None], wrong])).log_softmax(0)[0].item()
            expected = loss / (loss + math.log(1 + len(wrong)))
        assert found[pair].item() == pytest.approx(expected, abs=1e-5)


# -- probabilities and weights

DIFFICULTIES = st.lists(st.floats(0, 1), min_size=1, max_size=60).map(torch.tensor)
CONFIGS = st.builds(
    MemoryBankConfig,
    gamma=st.floats(0, 10),
    eps=st.floats(1e-6, 2),
    floor=st.floats(0, 1),
    cap=st.none() | st.floats(1, 20),
    tail=st.floats(0, 0.9),
    importance=st.floats(0, 1),
    instance_weight=st.floats(0, 1),
)


@example(found=torch.tensor([0.0, 1.0, 1.0]), config=MemoryBankConfig(gamma=9.0, eps=1e-6, floor=0.0, cap=None))
@settings(deadline=None, max_examples=200)
@given(found=DIFFICULTIES, config=CONFIGS)
def test_probabilities_sum_to_one_within_their_bounds_and_rise_with_difficulty(found: Tensor, config: MemoryBankConfig):
    p = sampling_probability(found, config)
    count = len(found)
    assert p.dtype == torch.float64
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    assert p.min().item() * count >= config.floor - 1e-9
    assert p.max().item() * count <= (config.cap or count) + 1e-9
    assert (p[found.argsort()].diff() >= -1e-12).all()
    # Between the bounds nothing but a factor is changed.
    between = (p * count > config.floor + 1e-9) & (p * count < (config.cap or count) - 1e-9)
    spared = int(config.tail * count + 1e-9)
    lowered = found.double().clamp_max(found.double().sort().values[count - 1 - spared].item())
    ratio = p[between] / (config.eps + lowered[between]) ** config.gamma
    if len(ratio):
        assert (ratio.max() / ratio.min()).item() == pytest.approx(1, rel=1e-9)


def test_probabilities_by_hand():
    plain = MemoryBankConfig(gamma=2, eps=0.5, floor=0, cap=None, tail=0)
    found = torch.tensor([0.0, 0.5, 0.0, 1.0])
    assert sampling_probability(found, plain).tolist() == pytest.approx([1 / 15, 4 / 15, 1 / 15, 9 / 15])
    # The cap takes 2 / 4 for the hardest; the rest is shared as 1 : 4 : 1.
    capped = MemoryBankConfig(gamma=2, eps=0.5, floor=0, cap=2, tail=0)
    assert sampling_probability(found, capped).tolist() == pytest.approx([1 / 12, 1 / 3, 1 / 12, 1 / 2])
    # The floor gives 0.5 / 4 to each of the easy ones as well; one pair is left to take what remains.
    both = MemoryBankConfig(gamma=2, eps=0.5, floor=0.5, cap=2, tail=0)
    assert sampling_probability(found, both).tolist() == pytest.approx([1 / 8, 1 / 4, 1 / 8, 1 / 2])
    tail = MemoryBankConfig(gamma=1, eps=0.5, floor=0, cap=None, tail=0.25)  # one pair of four
    assert sampling_probability(found, tail).tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 6, 1 / 3])
    off = MemoryBankConfig(gamma=0)
    assert sampling_probability(found, off).tolist() == pytest.approx([0.25] * 4)


@settings(deadline=None, max_examples=100)
@given(found=DIFFICULTIES, config=CONFIGS, share=st.floats(0, 1))
def test_inclusion_and_weights_are_in_bounds(found: Tensor, config: MemoryBankConfig, share: float):
    p = sampling_probability(found, config)
    drawn = max(1, round(share * len(found)))
    inclusion = inclusion_probability(p, drawn)
    assert inclusion.sum().item() == pytest.approx(drawn, rel=1e-6)
    assert ((inclusion > 0) & (inclusion <= 1)).all()
    assert (inclusion[p.argsort()].diff() >= -1e-9).all()
    weights = instance_weights(found, config, drawn)
    assert (weights.isfinite() & (weights >= 0)).all()
    off = MemoryBankConfig(gamma=config.gamma, importance=0, instance_weight=0)
    assert instance_weights(found, off, drawn).tolist() == [1.0] * len(found)


def test_inclusion_is_how_often_pairs_are_drawn():
    p = sampling_probability(torch.linspace(0, 1, 40), MemoryBankConfig(gamma=2, floor=0.1, cap=None, tail=0))
    drawn, epochs = pairs_per_epoch(40, 0.5, 5), 1500
    batches = [list(draw_hard_epoch(p.numpy(), share=0.5, batch_size=5, seed=0, epoch=e)) for e in range(epochs)]
    often = torch.tensor(np.bincount(np.concatenate(batches).ravel(), minlength=40) / epochs)
    expected = inclusion_probability(p, drawn)
    noise = 4.5 * (expected * (1 - expected) / epochs).sqrt()
    assert ((often - expected).abs() < noise + 0.01).all()  # 0.01: the rule is for many pairs
    assert (often - drawn * p).abs().max() > 0.2  # what it is better than


def test_importance_weights_undo_the_sampling():
    found = torch.rand(200, generator=torch.Generator().manual_seed(0))
    config = MemoryBankConfig(gamma=2, importance=1, tail=0)
    p = sampling_probability(found, config).numpy()
    weights = instance_weights(found, config, 100).numpy()
    values = found.numpy() ** 2
    means, plain = [], []
    for epoch in range(300):
        drawn = np.concatenate(list(draw_hard_epoch(p, share=0.5, batch_size=20, seed=0, epoch=epoch)))
        means.append((weights[drawn] * values[drawn]).mean())
        plain.append(values[drawn].mean())
    assert np.mean(plain) > 1.2 * values.mean()
    assert np.mean(means) == pytest.approx(values.mean(), rel=0.01)


def test_instance_weights_by_hand():
    found = torch.tensor([0.0, 0.2, 0.4])
    half = MemoryBankConfig(instance_weight=0.5, tail=0)
    assert instance_weights(found, half, 2).tolist() == pytest.approx([0.5, 1.0, 1.5])
    full = MemoryBankConfig(instance_weight=1, tail=0.4)  # the hardest of three is as hard as the next
    assert instance_weights(found, full, 2).tolist() == pytest.approx([0, 1.5, 1.5])
    assert instance_weights(torch.zeros(3), full, 2).tolist() == [1, 1, 1]


# -- the bank


def test_an_update_stores_captions_and_averages_difficulty():
    bank = make_bank(MemoryBankConfig(momentum=0.75))
    before, stored = bank.running.clone(), bank.text_embeddings.clone()
    images, texts = torch.randn(2, 3), torch.randn(3, 3)
    # Pairs 5 and 2 with captions 1 and 2; caption 1 comes twice, caption 3 is a hard negative.
    bank.update(torch.tensor([5, 2]), images, torch.tensor([1, 2, 3]), 7 * texts)
    stored[1:] = F.normalize(texts, dim=-1)
    torch.testing.assert_close(bank.text_embeddings, stored)
    now = global_difficulty(images, stored, torch.tensor([1, 2]), logit_scale=SCALE)
    torch.testing.assert_close(bank.running[[5, 2]], 0.75 * before[[5, 2]] + 0.25 * now)
    untouched = [i for i in range(12) if i not in (2, 5)]
    assert torch.equal(bank.running[untouched], before[untouched])
    assert bank.seen.nonzero().flatten().tolist() == [2, 5]
    assert torch.equal(bank.base, before)


def test_rows_that_come_twice_count_once_and_broken_features_not_at_all():
    once, twice = make_bank(), make_bank()
    images, texts = torch.randn(2, 3), torch.randn(2, 3)
    once.update(torch.tensor([5, 2]), images, torch.tensor([1, 2]), texts)
    rows = [0, 1, 0, 1]
    twice.update(torch.tensor([5, 2])[rows], images[rows], torch.tensor([1, 2])[rows], texts[rows])
    assert_equal_state(once, twice)
    other, broken = torch.randn(2, 3), torch.randn(2, 3)
    broken[0, 0] = math.nan
    for images, texts in ((broken, other), (other, broken)):
        twice.update(torch.tensor([5, 2]), images, torch.tensor([1, 2]), texts)
        assert_equal_state(once, twice)


def test_an_update_is_exact_under_autocast_and_keeps_no_graph():
    plain, cast = make_bank(), make_bank()
    images, texts = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    plain.update(torch.tensor([5, 2]), images, torch.tensor([1, 2]), texts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.update(torch.tensor([5, 2]), images, torch.tensor([1, 2]), texts)
        assert cast.hard_negatives(torch.tensor([5]), 2).tolist() == plain.hard_negatives(torch.tensor([5]), 2).tolist()
    assert_equal_state(plain, cast)
    assert not any(buffer.requires_grad for buffer in plain.buffers())


def test_learnability_is_what_the_reference_does_better():
    config = MemoryBankConfig(difficulty="learnability", momentum=0.0)
    reference = torch.linspace(0, 1, 12)
    bank = make_bank(config, reference=reference)
    torch.testing.assert_close(bank.difficulty(), (bank.base - reference).clamp_min(0))
    assert torch.equal(make_bank(config).difficulty(), torch.zeros(12))  # the base is its own reference
    images = torch.randn(1, 3)
    bank.update(torch.tensor([3]), images, torch.tensor([3]), torch.randn(1, 3))
    now = global_difficulty(images, bank.text_embeddings, torch.tensor([3]), "loss", logit_scale=SCALE).item()
    assert bank.difficulty()[3].item() == pytest.approx(max(0, now - reference[3].item()), abs=1e-6)


def test_hardest_pairs_come_first():
    bank = make_bank()
    bank.running.copy_(torch.tensor([0.1, 0.9, 0.5, 0.9] + [0.0] * 8))
    indices, found = bank.hardest(3)
    assert indices.tolist() == [1, 3, 2]
    assert found.tolist() == pytest.approx([0.9, 0.9, 0.5])


def test_hard_negatives_are_the_captions_closest_to_those_of_the_batch():
    texts = at_angles(0, 10, 90, 45, 0, 180)  # caption 4 equals caption 0
    captions = torch.tensor([0, 1, 2, 3, 4, 5])
    bank = MemoryBank(MemoryBankConfig(), captions, texts, torch.zeros(6), logit_scale=SCALE)
    assert bank.hard_negatives(torch.tensor([0]), 2).tolist() == [1, 3]
    assert bank.hard_negatives(torch.tensor([0]), 99).tolist() == [1, 3, 2, 5]
    assert bank.hard_negatives(torch.tensor([0, 2]), 2).tolist() == [1, 3]
    assert bank.hard_negatives(torch.tensor([0]), 0).tolist() == []
    groups = torch.tensor([0, 0, 2, 3, 4, 5])  # captions 0 and 1 belong to one image
    grouped = MemoryBank(MemoryBankConfig(), captions, texts, torch.zeros(6), logit_scale=SCALE, groups=groups)
    assert grouped.hard_negatives(torch.tensor([0]), 2).tolist() == [3, 2]


def test_of_many_that_are_equal_the_first_are_taken():
    texts, captions = at_angles(0, *[90] * 200), torch.arange(201)
    bank = MemoryBank(MemoryBankConfig(), captions, texts, torch.zeros(201), logit_scale=SCALE)
    assert bank.hard_negatives(torch.tensor([0]), 5).tolist() == [1, 2, 3, 4, 5]
    assert bank.hardest(5)[0].tolist() == [0, 1, 2, 3, 4]


def test_an_epoch_is_drawn_by_what_was_known_at_its_start_also_after_a_resume(tmp_path):
    config = MemoryBankConfig(gamma=2, importance=0.5, instance_weight=0.5, momentum=0.2)
    bank = make_bank(config)
    update(bank, 0, 1, 2)
    first = bank.start_epoch(0, 6)
    torch.testing.assert_close(first, sampling_probability(bank.running, config))
    weights = bank.weights(torch.tensor([3, 0]))
    torch.testing.assert_close(weights, instance_weights(bank.running, config, 6)[[3, 0]].float())
    update(bank, 3, 4, 5, seed=2)
    assert torch.equal(bank.probability(), first)
    assert torch.equal(bank.weights(torch.tensor([3, 0])), weights)

    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    resumed = make_bank(config)
    resumed.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    assert torch.equal(resumed.start_epoch(0, 6), first)
    for each in (bank, resumed):
        update(each, 6, 7, seed=3)
    assert_equal_state(bank, resumed)
    assert torch.equal(bank.start_epoch(1, 6), resumed.start_epoch(1, 6))
    assert not torch.equal(bank.probability(), first)
    assert_equal_state(bank, resumed)


def test_a_bank_of_other_pairs_is_refused():
    saved = make_bank().state_dict()
    with pytest.raises(RuntimeError, match="saved for other pairs"):
        make_bank(pairs=11).load_state_dict(saved)
    with pytest.raises(RuntimeError, match="saved for other pairs"):
        make_bank(groups=torch.arange(12)).load_state_dict(saved)
    with pytest.raises(RuntimeError, match="seen"):
        make_bank().load_state_dict({name: value for name, value in saved.items() if name != "seen"})


def test_data_that_cannot_be_used_is_refused():
    with pytest.raises(DataError, match="at least two different captions"):
        make_bank(texts=1)
    images = torch.randn(4, 3)
    images[2, 1] = math.nan
    with pytest.raises(DataError, match=r"1 of 4 image embeddings are not finite, row 2 first; delete the cache"):
        difficulty(images, torch.randn(2, 3), [0, 1, 0, 1])
    with pytest.raises(DataError, match="text embeddings"):
        difficulty(torch.randn(2, 3), torch.full((2, 3), math.inf), [0, 1])
    for captions in ([0, 2], [-1, 0], []):
        with pytest.raises(ValueError, match="numbers of the 2 text embeddings"):
            difficulty(torch.randn(2, 3), torch.randn(2, 3), captions)
    with pytest.raises(ValueError, match="3 image embeddings for 2 pairs"):
        difficulty(torch.randn(3, 3), torch.randn(2, 3), [0, 1])
    with pytest.raises(ValueError, match="groups"):
        difficulty(torch.randn(2, 3), torch.randn(2, 3), [0, 1], groups=torch.arange(3))
    with pytest.raises(ValueError, match="measure='guess' must be one of margin, rank, loss"):
        difficulty(torch.randn(2, 3), torch.randn(2, 3), [0, 1], "guess")
    with pytest.raises(ValueError, match="reference"):
        make_bank(reference=torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1}, "gamma=-1 must be from 0 to 10"),
        ({"eps": 0.0}, "eps=0.0 must be from 1e-6"),
        ({"floor": 1.1}, "floor=1.1 must be from 0 to 1"),
        ({"cap": 0.5}, "cap=0.5 must be at least 1, or null"),
        ({"tail": 1.0}, "at least 0 and below 1"),
        ({"momentum": 1.0}, "at least 0 and below 1"),
        ({"importance": math.nan}, "importance=nan must be from 0 to 1"),
        ({"instance_weight": 2}, "from 0 to 1"),
        ({"epoch_share": 0.0}, "above 0 and at most 1"),
    ],
)
def test_impossible_banks_are_refused(options: dict[str, float], message: str):
    with pytest.raises(RecipeError, match=message):
        MemoryBankConfig(**options)


def test_banks_of_two_ranks_are_one_bank(tmp_path):
    alone = tiny_ranks.bank(tiny_ranks.ALONE, tmp_path)
    first, second = tiny_ranks.run_ranks("bank", tmp_path)["bank"]
    assert first.keys() == alone.keys()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, atol=1e-6, rtol=1e-5)
    assert alone["seen"].sum() == len(alone["order"])


def assert_equal_state(one: MemoryBank, other: MemoryBank) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


# -- very many captions, and a bank that is not enabled


@pytest.mark.parametrize("measure", MEASURES)
def test_of_very_many_captions_some_stand_for_all(measure: str, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(30, 3, generator=generator), torch.randn(20, 3, generator=generator)
    captions = torch.arange(30) % 20
    monkeypatch.setattr(memory_bank, "MOST_COMPARED", 7)
    bank = MemoryBank(MemoryBankConfig(), captions, texts, torch.zeros(30), logit_scale=SCALE)
    among = bank.positives.among
    assert among is not None
    assert len(set(among.tolist())) == 7
    told: list[tuple[int, int]] = []
    found = global_difficulty(
        images, texts, captions, measure, logit_scale=SCALE, chunk=8, report=lambda *at: told.append(at)
    )
    assert told == [(8, 30), (16, 30), (24, 30), (30, 30)]
    monkeypatch.undo()
    for pair in range(30):  # its own caption and those drawn, and no others
        own = int(captions[pair])
        kept = [own, *(number for number in among.tolist() if number != own)]
        alone = difficulty(images[pair : pair + 1], texts[kept], [0], measure)
        assert found[pair].item() == pytest.approx(alone.item(), abs=1e-5)


def test_hard_negatives_are_looked_for_among_those_compared(monkeypatch: pytest.MonkeyPatch):
    angles = [0.4 * number**2 for number in range(20)]  # no two are as far apart as two others
    texts, captions = at_angles(*angles), torch.arange(20)
    monkeypatch.setattr(memory_bank, "MOST_COMPARED", 7)
    bank = MemoryBank(MemoryBankConfig(), captions, texts, torch.zeros(20), logit_scale=SCALE)
    among = bank.positives.among.tolist()
    for pair in range(20):
        nearest = sorted((abs(angles[number] - angles[pair]), number) for number in among if number != pair)
        assert bank.hard_negatives(torch.tensor([pair]), 3).tolist() == [number for _, number in nearest[:3]]


def test_a_bank_that_is_not_enabled_counts_and_keeps_no_captions():
    bank = make_bank(MemoryBankConfig(enabled=False))
    before = bank.running.clone()
    update(bank, 0, 0, 5)
    assert bank.seen.tolist() == [1, 0, 0, 0, 0, 1] + [0] * 6
    assert torch.equal(bank.running, before)
    assert bank.text_embeddings.shape == (0, 3)


def test_float64_is_made_on_the_cpu_alone():
    """Apple's GPUs refuse it; a device that keeps no numbers stands for one."""
    made: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.float64:
                made.append(result.device.type)
            return result

    with FakeTensorMode(), Watch():
        sampled = memory_bank._lower_tail(torch.zeros(9, device="cuda"), 0.2)
    assert sampled.dtype == torch.float64
    assert set(made) == {"cpu"}


def test_captions_that_differ_in_rounding_alone_tie():
    """A collapsed model gives all texts one vector, up to rounding; it must not look perfect."""
    image, nearly = at_angles(60), at_angles(0, 0)
    nearly[1] *= 1 + 1e-7
    cosines = F.normalize(nearly, dim=-1) @ image[0]
    assert (cosines[0] - cosines[1]).abs() < 1e-6
    assert difficulty(image, nearly, [0], "rank").item() == pytest.approx(1)
    close = torch.tensor([[1.0, 0.0], [1.0, 5e-7]])
    across = torch.tensor([[0.0, -1.0]])  # the wrong caption is further by half of what counts as equal
    assert difficulty(across, close, [0], "rank").item() == pytest.approx(1)


@pytest.mark.parametrize(("count", "tail", "spared"), [(100, 0.29, 29), (50, 0.58, 29), (10, 0.05, 0)])
def test_the_tail_is_a_share_of_the_pairs_whatever_rounding_says(count: int, tail: float, spared: int):
    lowered = memory_bank._lower_tail(torch.arange(count, dtype=torch.float32), tail)
    assert int((lowered == lowered.max()).sum()) == spared + 1
