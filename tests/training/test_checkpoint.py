"""Checkpoint files: whole or absent, exact, and free of pickle."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.errors import RecipeError, TrimtabError
from trimtab.training import checkpoint
from trimtab.training.checkpoint import Checkpoint, CheckpointFolder


def some(step: int) -> Checkpoint:
    tensors = {
        "model/a": torch.full((2, 3), float(step)),
        "model/scalar": torch.tensor(float("nan")),
        "model/half": torch.ones(3, dtype=torch.bfloat16),
        "model/none": torch.zeros(0, 4),
        "best/flag": torch.tensor([True, False]),
    }
    return Checkpoint(tensors, {"step": step, "note": "汉语", "x": 0.1 + 0.2})


def test_round_trip_is_exact_and_keeps_the_last_two(tmp_path):
    folder = CheckpointFolder(tmp_path)
    assert folder.load_newest() is None
    for step in (1, 20, 300):
        folder.save(step, some(step))
    assert [path.name for path in folder.files()] == ["step-00000020.safetensors", "step-00000300.safetensors"]
    loaded = folder.load_newest()
    assert loaded is not None
    assert loaded.state == some(300).state
    assert loaded.part("best").keys() == {"flag"}
    for name, tensor in some(300).tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name].nan_to_num(), tensor.nan_to_num())


def test_another_digest_is_refused_by_the_header(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path / "new")
    folder.check("recipe-1")  # nothing is there, nor made
    assert not folder.folder.exists()
    folder = CheckpointFolder(tmp_path)
    for step, digest in ((1, "recipe-1"), (2, "recipe-2")):
        folder.save(step, Checkpoint(some(step).tensors, {"step": step, "digest": digest}))
    with pytest.raises(RecipeError, match=r"another recipe \(step 2\).*choose another out=.*delete that folder"):
        folder.check("recipe-1")
    monkeypatch.setattr(checkpoint, "read", None)  # tensors are large
    folder.check("recipe-2")


@pytest.mark.parametrize("harm", ["empty", "digest"])
def test_damage_is_no_other_recipe(tmp_path, harm):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        path = folder.save(step, Checkpoint(some(step).tensors, {"step": step, "digest": "recipe-1"}))
    path.write_bytes(b"" if harm == "empty" else path.read_bytes().replace(b"recipe-1", b"recipe-3"))
    folder.check("recipe-1")
    assert path in folder.files()  # setting it aside is the run's
    with pytest.raises(RecipeError, match=r"step 1"):
        folder.check("recipe-2")


def test_shared_memory_can_be_saved(tmp_path):
    weight = torch.ones(2)
    CheckpointFolder(tmp_path).save(1, Checkpoint({"a": weight, "b": weight, "c": weight[1:]}, {}))
    assert len(checkpoint.read(tmp_path / "step-00000001.safetensors").tensors) == 3


@pytest.mark.parametrize("harm", ["empty", "short", "header", "document", "foreign"])
def test_any_damage_is_noticed(tmp_path, harm):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, some(1))
    path = folder.save(2, some(2))
    data = path.read_bytes()
    if harm == "empty":
        data = b""
    elif harm == "short":
        data = data[:-5]
    elif harm == "header":
        data = b"\xff" * 20 + data[20:]
    elif harm == "document":
        data = data.replace(b"0.30000000000000004", b"0.30000000000000005")
    path.write_bytes(data)
    if harm == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.ones(1)}, path)
    with pytest.warns(UserWarning, match="step-00000002.* is damaged"):
        loaded = folder.load_newest()
    assert loaded is not None
    assert loaded.state["step"] == 1
    assert [p.name for p in folder.files()] == ["step-00000001.safetensors"]
    assert (tmp_path / "step-00000002.safetensors.damaged").exists()


def test_nothing_but_damage_is_an_error(tmp_path):
    (tmp_path / "step-00000001.safetensors").write_bytes(b"no")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(TrimtabError, match=r"every checkpoint in .* is damaged; delete"),
    ):
        CheckpointFolder(tmp_path).load_newest()


def test_later_schema_is_refused(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_SCHEMA", 2)
        folder.save(1, some(1))
    with pytest.raises(TrimtabError, match="later version of trimtab"):
        folder.load_newest()


def test_lock_clears_leftovers_and_is_released(tmp_path):
    (tmp_path / ".step-00000009.safetensors.abc.tmp").write_bytes(b"half")
    folder = CheckpointFolder(tmp_path)
    with folder.locked():
        assert not list(tmp_path.glob(".step*"))
        with pytest.raises(TrimtabError, match="another run"), folder.locked():
            pass
    with folder.locked():
        pass


def test_random_states_round_trip():
    checkpoint.seed_everything(1)
    random.gauss(0, 1)  # leaves a spare behind
    np.random.standard_normal()
    saved = checkpoint.rng_tensors()

    def draw() -> list[float]:
        return [random.gauss(0, 1), np.random.standard_normal(), np.random.rand(), torch.rand(1).item()]

    first = draw() + draw()
    checkpoint.restore_rng(saved)
    assert draw() + draw() == first


@pytest.mark.parametrize(("name", "where"), [("cuda", "torch.cuda"), ("mps", "torch.backends.mps")])
def test_the_generator_of_a_gpu_is_kept_and_comes_back(monkeypatch, name, where):
    state, restored = torch.arange(8, dtype=torch.uint8), []
    monkeypatch.setattr(f"{where}.is_available", lambda: True)
    monkeypatch.setattr(f"torch.{name}.get_rng_state", lambda: state)
    monkeypatch.setattr(f"torch.{name}.set_rng_state", restored.append)
    checkpoint.restore_rng(checkpoint.rng_tensors())
    assert [one.tolist() for one in restored] == [state.tolist()]


def test_optimizer_state_round_trip():
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer, dict]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        named = dict(model.named_parameters())
        model[1].bias.requires_grad_(False)  # never gets state
        return model, torch.optim.AdamW(model.parameters(), lr=0.1), named

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    model, optimizer, named = make()
    step(model, optimizer)
    other, fresh, other_named = make()
    other.load_state_dict(model.state_dict())
    checkpoint.load_optimizer(fresh, other_named, checkpoint.optimizer_tensors(optimizer, named))
    step(model, optimizer)
    step(other, fresh)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_generators_come_back_from_a_row_of_several_ranks():
    torch.manual_seed(3)
    torch.randn(5)
    states = {name: torch.stack([torch.zeros_like(one), one]) for name, one in checkpoint.rng_tensors().items()}
    expected = torch.randn(4)
    checkpoint.restore_rng({name: both[1] for name, both in states.items()})
    assert torch.equal(torch.randn(4), expected)


MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.is_file(), reason="no list of mapped files")
def test_what_was_read_maps_no_file(tmp_path):
    """Windows lets nobody replace or delete a file that is mapped, and a resumed run does both."""
    folder = CheckpointFolder(tmp_path)
    folder.save(1, some(1))
    loaded = folder.load_newest()
    assert loaded is not None
    assert str(tmp_path) not in MAPS.read_text()
