from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tiny_models import CORPUS, randomised
from trimtab.adapters.resampler import FusionAdapter, ResamplerConfig
from trimtab.config import DistillationConfig, LanguageAdapterConfig, TrainingConfig
from trimtab.errors import RecipeError
from trimtab.tasks.fusion import FusionObjective, FusionTask
from trimtab.towers.fusion import image_sequence, teacher_sequence
from trimtab.towers.text_encoder import TextEncoder
from trimtab.training import train

ENGLISH, CHINESE = CORPUS[:12], CORPUS[12:]
OBJECTIVE = FusionObjective()


@pytest.fixture(scope="module")
def student(tiny_folder: Any) -> TextEncoder:
    return TextEncoder.load(tiny_folder("bert"), device="cpu")


@pytest.fixture
def model(tiny_base: Any) -> Any:
    return tiny_base("flava").model


@pytest.fixture
def batch(tiny_base: Any, student: TextEncoder, pictures: list[Image.Image]) -> dict[str, Tensor]:
    """Twelve sentences in two languages; the probe images have nothing to do with them."""
    base = tiny_base("flava")
    with torch.no_grad():
        states, mask = student.states(CHINESE)
        tokens = base.text_inputs(ENGLISH)
        teacher = teacher_sequence(base.model, **tokens)
        pixels = torch.cat([base.preprocess(picture)["pixel_values"] for picture in pictures])
        images = image_sequence(base.model, pixels)[torch.arange(12) % len(pictures)]
    return {
        "states": states,
        "mask": mask,
        "teacher": teacher,
        "teacher_mask": tokens["attention_mask"].bool(),
        "images": images,
    }


def build(batch: dict[str, Tensor], tokens: int = 6) -> FusionAdapter:
    torch.manual_seed(0)
    adapter = FusionAdapter(
        LanguageAdapterConfig(width=32, heads=4, layers=1),
        ResamplerConfig(tokens=tokens, heads=4, layers=1),
        input_dim=batch["states"].shape[-1],
        output_dim=batch["teacher"].shape[-1],
    )
    adapter.fit(batch["states"], batch["mask"], batch["teacher"], batch["teacher_mask"], ridge=0.1)
    return adapter


class Fixed(torch.nn.Module):
    """In place of an adapter: gives a chosen sequence."""

    def __init__(self, pooled: Tensor, sequence: Tensor) -> None:
        super().__init__()
        self.outputs = pooled, sequence

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.outputs, torch.ones(self.outputs[1].shape[:2], dtype=torch.bool)


def alike(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The texts of the commonest length: none of them is padded."""
    rows = batch["teacher_mask"].sum(1) == batch["teacher_mask"].sum(1).mode().values
    length = int(batch["teacher_mask"][rows].sum(1)[0])
    found = {name: tensor[rows] for name, tensor in batch.items()}
    return {**found, "teacher": found["teacher"][:, :length], "teacher_mask": found["teacher_mask"][:, :length]}


def test_terms_are_named_and_weighted(model: Any, batch: dict[str, Tensor]) -> None:
    adapter = build(batch)
    plain = FusionTask.measured(model, adapter, OBJECTIVE, batch)(batch)
    assert list(plain) == ["pooled_mse", "fused_cls", "fused_image"]
    heavier = FusionObjective(DistillationConfig(mse=2, cosine=1), fused_cls=3, fused_image=0)
    weighted = FusionTask.measured(model, adapter, heavier, batch)(batch)
    assert list(weighted) == ["pooled_mse", "pooled_cosine", "fused_cls"]
    torch.testing.assert_close(weighted["pooled_mse"], 2 * plain["pooled_mse"])
    torch.testing.assert_close(weighted["fused_cls"], 3 * plain["fused_cls"])


def test_the_teachers_own_tokens_score_zero_in_any_order(model: Any, batch: dict[str, Tensor]) -> None:
    batch = alike(batch)
    assert len(batch["teacher"]) >= 2
    shuffled = batch["teacher"].flip(1)
    task = FusionTask.measured(model, build(batch), OBJECTIVE, batch)
    task.adapter = Fixed(torch.zeros(len(shuffled), 2 * shuffled.shape[-1]), shuffled)  # type: ignore[assignment]
    terms = task(batch)
    assert terms["fused_cls"] < 1e-6
    assert terms["fused_image"] < 1e-6


def test_another_text_scores_about_two(model: Any, batch: dict[str, Tensor]) -> None:
    batch = alike(batch)
    task = FusionTask.measured(model, build(batch), OBJECTIVE, batch)
    other = batch["teacher"].roll(1, 0)
    task.adapter = Fixed(torch.zeros(len(other), 2 * other.shape[-1]), other)  # type: ignore[assignment]
    terms = task(batch)
    torch.testing.assert_close(terms["fused_cls"], torch.tensor(2.0))
    torch.testing.assert_close(terms["fused_image"], torch.tensor(2.0))


def test_only_the_adapter_gets_gradients(model: Any, student: TextEncoder, batch: dict[str, Tensor]) -> None:
    adapter = randomised(build(batch))
    adapter.language.linear.requires_grad_(False)
    sum(FusionTask.measured(model, adapter, OBJECTIVE, batch)(batch).values()).backward()  # type: ignore[union-attr]
    for name, parameter in adapter.named_parameters():
        assert (parameter.grad is None) == name.startswith("language.linear."), name
    for frozen in (model, student.model):
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen.parameters())


def test_the_fused_terms_alone_reach_the_resampler(model: Any, batch: dict[str, Tensor]) -> None:
    adapter = build(batch)
    terms = FusionTask.measured(model, adapter, OBJECTIVE, batch)(batch)
    (terms["fused_cls"] + terms["fused_image"]).backward()
    # In a new one only Up has a gradient: it is zero, and hides the rest.
    assert adapter.resampler.up.weight.grad is not None
    assert adapter.resampler.up.weight.grad.abs().sum() > 0


def test_padding_of_either_side_changes_nothing(model: Any, batch: dict[str, Tensor]) -> None:
    task = FusionTask.measured(model, randomised(build(batch)), OBJECTIVE, batch)
    padded = dict(batch)
    for states, mask in (("states", "mask"), ("teacher", "teacher_mask")):
        filler = torch.full_like(batch[states][:, :3], 9.0)
        padded[states] = torch.where(batch[mask][..., None], batch[states], torch.tensor(-9.0))
        padded[states] = torch.cat([padded[states], filler], dim=1)
        padded[mask] = torch.nn.functional.pad(batch[mask], (0, 3))
    expected = task(batch)
    for name, term in task(padded).items():
        torch.testing.assert_close(term, expected[name], atol=1e-4, rtol=1e-4)


def test_tokens_that_do_not_count_are_not_read(
    model: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = FusionTask.measured(model, randomised(build(batch, tokens=20)), OBJECTIVE, batch)
    expected = task(batch)
    _, _, counted = task.adapter(batch["states"], batch["mask"])
    torch.testing.assert_close(  # a line through the lengths of the pairs
        counted.sum(1).float().mean(), batch["teacher_mask"].sum(1).float().mean(), atol=0.5, rtol=0
    )
    forward = task.adapter.forward

    def spoilt(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled, sequence, counted = forward(states, mask)
        return pooled, torch.where(counted[..., None], sequence, torch.tensor(50.0)), counted

    monkeypatch.setattr(task.adapter, "forward", spoilt)
    for name, term in task(batch).items():
        torch.testing.assert_close(term, expected[name], atol=1e-4, rtol=1e-4)


def test_weights_choose_rows(model: Any, batch: dict[str, Tensor]) -> None:
    task = FusionTask.measured(model, randomised(build(batch)), OBJECTIVE, batch)
    weights = torch.zeros(12)
    weights[:3] = 4.0
    expected = task({name: tensor[:3] for name, tensor in batch.items()})
    for name, term in task({**batch, "weights": weights}).items():
        torch.testing.assert_close(term, expected[name], atol=1e-4, rtol=1e-4)


def test_text_alone_needs_no_image(model: Any, batch: dict[str, Tensor]) -> None:
    batch.pop("images")
    objective = FusionObjective(fused_image=0)
    terms = FusionTask.measured(model, build(batch), objective, batch)(batch)
    assert list(terms) == ["pooled_mse", "fused_cls"]
    with pytest.raises(RecipeError, match="fused_image needs images"):
        FusionTask.measured(model, build(batch), OBJECTIVE, batch)


def test_summaries_alone_need_no_fusion(model: Any, batch: dict[str, Tensor]) -> None:
    batch.pop("images")
    objective = FusionObjective(fused_cls=0, fused_image=0)
    assert list(FusionTask.measured(model, build(batch), objective, batch)(batch)) == ["pooled_mse"]


def test_what_cannot_be_measured_is_refused(
    model: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="fused_cls=-1"):
        FusionObjective(fused_cls=-1)
    with pytest.raises(RecipeError, match="at least 2"):
        FusionTask.measured(model, build(batch), OBJECTIVE, {name: x[:1] for name, x in batch.items()})
    monkeypatch.setattr(model.multimodal_model, "use_cls_token", False)
    with pytest.raises(RecipeError, match="set fused_cls=0"):
        FusionTask.measured(model, build(batch), OBJECTIVE, batch)
    without = FusionTask.measured(model, build(batch), FusionObjective(fused_cls=0), batch)
    assert list(without(batch)) == ["pooled_mse", "fused_image"]


def test_training_brings_every_term_down(model: Any, batch: dict[str, Tensor], tmp_path: Path) -> None:
    adapter = build(batch)
    task = FusionTask.measured(model, adapter, OBJECTIVE, batch)
    with torch.no_grad():
        before = task(batch)
    settings = TrainingConfig(epochs=1, batch_size=12, learning_rate=5e-3, trackers=(), precision="fp32")
    train(
        task, adapter, lambda epoch: [batch] * 80, steps_per_epoch=80, settings=settings,
        checkpoint_dir=tmp_path, digest="fusion", show_progress=False,
    )  # fmt: skip
    with torch.no_grad():
        after = task(batch)
    ratios = {name: (after[name] / before[name]).item() for name in before}
    assert all(ratio < 0.5 for ratio in ratios.values()), ratios


def test_the_resampled_tokens_beat_copies_of_the_mean(model: Any, batch: dict[str, Tensor]) -> None:
    """What the sequence term buys: with the summaries as they are, the deviations alone lower the fused error."""
    adapter = build(batch)
    adapter.language.requires_grad_(False)
    task = FusionTask.measured(model, adapter, OBJECTIVE, batch)
    optimizer = torch.optim.Adam(adapter.resampler.parameters(), lr=1e-2)
    errors = []
    for _ in range(40):
        terms = task(batch)
        loss = terms["fused_cls"] + terms["fused_image"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.7 * errors[0]
