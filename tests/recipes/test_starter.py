"""`make starter`: what is trained beside the packaged towers, and what it must leave alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trimtab.data.cache import CachedArrays, cached_arrays
from trimtab.recipes import starter
from trimtab.recipes.starter import TRUNK_FROM, AlignmentTask, TrunkUpdate, save_alignment
from trimtab.towers.efficientnet import EfficientNetLite0, channels_last
from trimtab.towers.starter import ADDED, added_to_trunk

CLASS_WIDTH = 384


@pytest.fixture
def trunk() -> EfficientNetLite0:
    torch.manual_seed(0)
    return EfficientNetLite0().eval()


@pytest.fixture
def maps(trunk: EfficientNetLite0) -> torch.Tensor:
    """What enters the first trained block, of five pictures of noise."""
    with torch.no_grad():
        x = trunk.stem(channels_last(torch.randn(5, 3, 224, 224)))
        for block in trunk.blocks[:TRUNK_FROM]:
            x = block(x)
    return x


@pytest.fixture
def task(trunk: EfficientNetLite0, maps: torch.Tensor, tmp_path: Path) -> AlignmentTask:
    return AlignmentTask(trunk, torch.randn(1000, CLASS_WIDTH), range(5), stored(maps, tmp_path))


def stored(maps: torch.Tensor, folder: Path) -> CachedArrays:
    items = [str(number) for number in range(len(maps))]
    return cached_arrays(folder, ("test",), items, lambda wanted: maps[[int(one) for one in wanted]].numpy())


def upper(trunk: EfficientNetLite0, maps: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        for block in [*trunk.blocks[TRUNK_FROM:], trunk.head]:
            maps = block(maps)
    return maps


def moved(update: TrunkUpdate) -> TrunkUpdate:
    with torch.no_grad():
        for value in update.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return update


def test_the_trunk_is_the_packaged_one_at_first(trunk: EfficientNetLite0, maps: torch.Tensor) -> None:
    update = TrunkUpdate(trunk)
    assert torch.equal(update(maps), update.before(maps))
    torch.testing.assert_close(update.before(maps), upper(trunk, maps))


def test_parts_of_a_batch_are_put_together_in_order(
    trunk: EfficientNetLite0, maps: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = moved(TrunkUpdate(trunk))
    expected = whole(maps)
    monkeypatch.setattr(starter, "PART", 2)
    torch.testing.assert_close(whole(maps), expected)


def test_what_is_added_to_the_packaged_weights_makes_the_trained_trunk(
    trunk: EfficientNetLite0, maps: torch.Tensor
) -> None:
    update = moved(TrunkUpdate(trunk))
    kept = copy.deepcopy(trunk.state_dict())
    now = update(maps)
    assert not torch.allclose(now, update.before(maps))
    assert all(torch.equal(value, kept[name]) for name, value in trunk.state_dict().items())

    added = added_to_trunk(update.named())
    state = trunk.state_dict()
    last = ("head", *(f"blocks.{block}" for block in range(TRUNK_FROM, len(trunk.blocks))))
    assert added.keys() == {name for name, _ in trunk.named_parameters() if name.startswith(last)}
    trained = EfficientNetLite0().eval()
    trained.load_state_dict(state | {name: state[name] + value for name, value in added.items()})
    torch.testing.assert_close(upper(trained, maps), now)


def test_only_the_alignment_and_the_update_learn(
    trunk: EfficientNetLite0, task: AlignmentTask, maps: torch.Tensor
) -> None:
    nn.init.normal_(task.alignment.output.weight, std=0.02)  # at its start the correction is zero, whatever goes in
    task.train()
    assert not any(module.training for module in trunk.modules())  # norms keep ImageNet's statistics
    batch = (maps[:3], maps[3:], torch.randn(3, CLASS_WIDTH), torch.arange(3), torch.arange(3))
    terms = task.step(batch)
    sum(terms.values()).backward()
    assert all(parameter.grad is None for parameter in trunk.parameters())
    learnt = {name for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert learnt == {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert all(value.grad.abs().max() > 0 for value in [*task.trunk.whole.values(), *task.trunk.up.values()])


def test_nothing_has_moved_on_photographs_at_first(task: AlignmentTask, maps: torch.Tensor) -> None:
    task.eval()
    batch = (maps[:3], maps[3:], torch.randn(3, CLASS_WIDTH), torch.arange(3), torch.arange(3))
    with torch.no_grad():
        first = task.step(batch)
        moved(task.trunk)
        later = task.step(batch)
    for name in ("kept_output", "kept_classes", "kept_map"):
        assert first[name] == pytest.approx(0, abs=1e-6), name
        assert later[name] > 10 * first[name].abs() + 1e-5, name


def test_what_is_saved(task: AlignmentTask, tmp_path: Path) -> None:
    moved(task.trunk)

    class Texts:
        centre = torch.ones(CLASS_WIDTH)

    save_alignment(tmp_path / "a.safetensors", task, Texts())
    found = load_file(tmp_path / "a.safetensors")
    named = task.trunk.named()
    assert {name for name in found if name.startswith(ADDED)} == named.keys()
    for name, value in named.items():
        assert torch.equal(found[name], value.half())
    assert {"text_model.centre", "logit_scale", "vision_model.alignment.class_embeddings"} <= found.keys()
