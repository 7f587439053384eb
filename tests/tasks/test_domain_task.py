"""The domain link's training step on stand-in towers, and with a real tower cut in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tiny_starter import build_starter
from trimtab.config import LARGEST_SCALE, ContrastiveConfig, MemoryBankConfig
from trimtab.objectives.contrastive import contrastive_terms
from trimtab.objectives.memory_bank import MemoryBank
from trimtab.tasks.domain import DomainTask, Side
from trimtab.towers.hf import load_base

# Five pairs of four pictures and three captions: picture 0 has two captions, caption 1 two pictures.
IMAGE_OF = np.array([0, 0, 1, 2, 3])
CAPTION_OF = np.array([0, 1, 1, 2, 2])
BELONG = np.zeros((4, 3), bool)
BELONG[IMAGE_OF, CAPTION_OF] = True
DIM = 4


class Stand(nn.Module):
    """Linear towers on numbered inputs, in place of a base; counts what goes through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleDict({"image": nn.Linear(6, DIM), "text": nn.Linear(6, DIM)})
        self.inputs = {"image": torch.randn(4, 3, 6), "text": torch.randn(3, 1, 6)}  # item, view
        self.seen: list[tuple[str, list[int], list[int]]] = []
        self.numbers: dict[str, np.ndarray | None] = {}
        self.model = nn.Identity()
        self.device = torch.device("cpu")

    def pixel_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.towers["image"](inputs["x"])

    def token_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.towers["text"](inputs["x"])

    def side(self, tower: Any) -> Side:
        def lookup(items: np.ndarray, views: np.ndarray, numbers: np.ndarray | None = None) -> dict[str, Tensor]:
            self.seen.append((tower, items.tolist(), views.tolist()))
            self.numbers[tower] = numbers
            return {"x": self.inputs[tower][torch.from_numpy(items), torch.from_numpy(views)]}

        return Side(self, tower, None, lookup)  # type: ignore[arg-type]


def make(
    objective: ContrastiveConfig | None = None,
    *,
    logit_scale: float = 10.0,
    largest_scale: float = LARGEST_SCALE,
    **bank: Any,
) -> tuple[Stand, DomainTask]:
    stand = Stand()
    config = MemoryBankConfig(momentum=0.0, **bank)
    captions = torch.from_numpy(CAPTION_OF)
    held = MemoryBank(config, captions, torch.eye(3, DIM), torch.full((5,), 0.5), logit_scale=10.0)
    return stand, DomainTask(
        stand,
        image=stand.side("image"),
        text=stand.side("text"),
        image_of=IMAGE_OF,
        caption_of=CAPTION_OF,
        belong=lambda images, captions: BELONG[np.ix_(images, captions)],
        objective=objective or ContrastiveConfig(),
        bank=held,
        logit_scale=logit_scale,
        largest_scale=largest_scale,
    )


def batch(*pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.array(pairs), np.arange(len(pairs)) % 3, np.array(pairs)[:, None] / 10


def test_terms_are_those_of_the_features() -> None:
    stand, task = make()
    terms = task.step(batch(0, 2, 4))
    images = stand.pixel_features(
        {"x": torch.stack([stand.inputs["image"][i, v] for i, v in [(0, 0), (1, 1), (3, 2)]])}
    )
    texts = stand.token_features({"x": stand.inputs["text"][:, 0]})
    positives = torch.from_numpy(BELONG[[0, 1, 3]])  # picture 0 belongs to caption 1 as well
    expected = contrastive_terms(images, texts, positives, 10.0, ContrastiveConfig())
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_each_caption_passes_once_and_pictures_in_their_views() -> None:
    stand, task = make()
    task.step(batch(1, 2, 4, 3))
    assert ("image", [0, 1, 3, 2], [0, 1, 2, 0]) in stand.seen
    assert ("text", [1, 2], [0, 0]) in stand.seen
    assert np.array_equal(stand.numbers["image"], [[0.1], [0.2], [0.4], [0.3]])
    assert stand.numbers["text"] is None


def test_the_bank_learns_what_the_step_saw() -> None:
    _, task = make()
    task.step(batch(0, 2))
    assert task.bank.seen.tolist() == [1, 0, 1, 0, 0]
    assert task.bank.running[[1, 3, 4]].tolist() == [0.5] * 3
    assert not torch.equal(task.bank.text_embeddings[:2], torch.eye(3, DIM)[:2])
    assert torch.equal(task.bank.text_embeddings[2], torch.eye(3, DIM)[2])


def test_weights_of_the_epoch_count() -> None:
    _, task = make()
    plain = task.step(batch(0, 2, 4))
    task.bank.pair_weights[4] = 9
    weighed = task.step(batch(0, 2, 4))
    assert not torch.allclose(plain["i2t"], weighed["i2t"])


def test_hard_negatives_widen_the_choice_of_captions() -> None:
    _, plain = make()
    _, task = make(ContrastiveConfig(hard_negatives=5))
    with_one = task.step(batch(2))
    assert with_one["i2t"] > plain.step(batch(2))["i2t"] + 1e-4
    torch.testing.assert_close(with_one["t2i"], torch.zeros(()))  # one picture, nothing to confuse
    _, without_bank = make(ContrastiveConfig(hard_negatives=5), enabled=False)
    torch.testing.assert_close(without_bank.step(batch(2))["i2t"], plain.step(batch(2))["i2t"])


def test_everything_trained_gets_a_gradient() -> None:
    stand, task = make(ContrastiveConfig(learn_logit_scale=True))
    sum(task.step(batch(0, 2, 4)).values(), torch.zeros(())).backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in stand.parameters())
    assert task.log_scale.grad is not None


@pytest.mark.parametrize("start", [LARGEST_SCALE, 117.5])
def test_a_learned_logit_scale_comes_down_from_its_ceiling(start: float) -> None:
    """CLIP's own checkpoints have 100."""
    _, task = make(ContrastiveConfig(learn_logit_scale=True), logit_scale=start)
    assert task.logit_scale.item() == pytest.approx(LARGEST_SCALE)
    sum(task.step(batch(0, 2, 4)).values(), torch.zeros(())).backward()
    assert task.log_scale.grad is not None
    assert task.log_scale.grad.abs() > 0


def test_a_learned_logit_scale_starts_at_the_own_of_a_base_that_has_more() -> None:
    """SigLIP's checkpoints have 117."""
    _, task = make(ContrastiveConfig(learn_logit_scale=True), logit_scale=117.5, largest_scale=117.5)
    assert task.logit_scale.item() == pytest.approx(117.5)
    with torch.no_grad():
        task.log_scale.add_(1)
    assert task.logit_scale.item() == pytest.approx(117.5)


def test_a_logit_scale_that_is_not_learned_stays_as_it_is() -> None:
    _, task = make(logit_scale=117.5)
    assert not task.log_scale.requires_grad
    assert task.logit_scale.item() == pytest.approx(117.5)


def test_a_head_sits_on_cached_features(tiny_base: Any) -> None:
    from trimtab.towers.layers import TowerCut

    base = tiny_base("clip")
    head = nn.Linear(base.embedding_dim, base.embedding_dim, bias=False)
    features = torch.randn(3, base.embedding_dim)
    side = Side(base, "image", TowerCut(base, "image", None), lambda *_: {"features": features.half()}, head=head)
    torch.testing.assert_close(side.features(np.arange(3)), head(features.half().float()))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_towers_without_depthwise_convolutions_follow_autocast(tower: Any, tiny_base: Any) -> None:
    assert Side(tiny_base("clip"), tower, None, lambda *_: {})._in_fp32 is False


@pytest.mark.parametrize("fast", [False, True])
def test_starter_is_trained_in_bf16_where_that_is_in_hardware(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.precision.has_fast_bf16", lambda _: fast)
    base = load_base(str(build_starter(tmp_path / "starter")), device="cpu")
    pixels = base.preprocess(Image.new("RGB", (64, 64), (90, 120, 60)))
    in_fp32 = base.pixel_features(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        found = Side(base, "image", None, lambda *_: {}).upper(pixels, None)
    if fast:
        assert found.dtype == torch.bfloat16
        assert torch.cosine_similarity(found.float(), in_fp32) > 0.99
    else:
        torch.testing.assert_close(found, in_fp32)
