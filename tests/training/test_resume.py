"""A run that was stopped, in whatever way, ends as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

import tiny_run
from tiny_run import STEPS, Problem, settings
from trimtab.errors import Interrupted, ModelError, RecipeError, TrainingStopped, TrimtabError
from trimtab.training.checkpoint import CheckpointFolder


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Problem, list[dict]]:
    problem = Problem()
    result = problem.train(tmp_path_factory.mktemp("whole"))
    assert result.steps == 3 * STEPS
    return problem, result.history


def test_kill_9_in_mid_epoch_then_resume_is_bit_identical(tmp_path, uninterrupted):
    whole, history = uninterrupted
    script = [sys.executable, tiny_run.__file__, str(tmp_path), str(tmp_path / "never"), "12"]
    killed = subprocess.run(
        script, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()

    problem = Problem()
    torch.rand(7)  # whatever happened before must not matter
    result = problem.train(tmp_path)
    assert result.resumed_from == 9  # checkpoints at 3, 6, 7 (epoch), 9; the twelfth step was killed
    assert equal(problem.model, whole.model)
    assert result.history == history


@pytest.mark.parametrize(
    "average", [{"ema": 0.9}, {"ema": None}, {"ema": None, "bell": (0.8, 0.2)}, {"optimizer": "muon"}]
)
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path, average):
    whole = Problem()
    whole.train(tmp_path / "whole", settings=settings(**average), select=None)

    problem = Problem()
    problem.before_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 5 else None
    with pytest.raises(TrainingStopped, match=r"interrupted at step 5 of 21.*step-00000005.*same command"):
        problem.train(tmp_path / "run", settings=settings(**average), select=None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    again = Problem()
    assert again.train(tmp_path / "run", settings=settings(**average), select=None).resumed_from == 5
    assert equal(again.model, whole.model)


def test_ctrl_c_in_the_last_step_is_heeded_where_more_is_to_be_trained(tmp_path):
    problem = Problem()
    problem.before_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 21 else None
    with pytest.raises(TrainingStopped, match=r"interrupted at step 21 of 21.*same command"):
        problem.train(tmp_path / "phase", last=False)
    again = Problem()
    again.train(tmp_path / "phase", last=False)
    assert again.steps == 0

    alone = Problem()
    alone.before_step = problem.before_step
    assert alone.train(tmp_path / "alone").steps == 21
    assert equal(again.model, alone.model)


def test_second_ctrl_c_stops_at_once(tmp_path):
    problem = Problem()

    def twice(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    problem.before_step = twice
    with pytest.raises(KeyboardInterrupt):
        problem.train(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_schedulers_signal_may_come_twice(tmp_path, name):
    if (number := getattr(signal, name, None)) is None:
        pytest.skip(f"no {name} here")
    before = signal.getsignal(number)
    problem = Problem()

    def twice(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    problem.before_step = twice
    with pytest.raises(Interrupted, match=r"interrupted at step 5 of 21.*step-00000005"):
        problem.train(tmp_path)
    assert signal.getsignal(number) == before


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="needs POSIX signals")
def test_signals_that_somebody_else_listens_to_stay_theirs(tmp_path):
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    try:
        problem = Problem()
        problem.before_step = lambda step: os.kill(os.getpid(), signal.SIGUSR2) if step == 5 else None
        assert problem.train(tmp_path).steps == 21
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]


@pytest.mark.parametrize("asked_in", ["the last step of an epoch", "its validation"])
def test_an_epoch_is_saved_before_its_validation(tmp_path, uninterrupted, asked_in):
    whole, history = uninterrupted
    problem = Problem()
    looked: list[int] = []

    class Killed(BaseException):
        pass

    def validate(epoch: int) -> dict[str, float]:
        looked.append(epoch)
        if epoch == 1:
            raise Killed  # as by kill -9: nothing is saved any more
        return problem.validate(epoch)

    if asked_in == "its validation":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trimtab.training.run._LONGEST_UNSAVED", -1.0)
            with pytest.raises(Killed):
                problem.train(tmp_path, validate=validate)
    else:
        problem.before_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 14 else None
        with pytest.raises(Interrupted, match="step 14 of 21"):
            problem.train(tmp_path, validate=validate)
        assert looked == [0]  # it may take longer than a scheduler waits
    again = Problem()
    result = again.train(tmp_path)
    assert result.resumed_from == 14
    assert equal(again.model, whole.model)
    assert result.history == history


def test_asked_to_stop_in_the_last_step_the_run_is_saved_before_its_validation(tmp_path):
    problem = Problem()
    problem.before_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 21 else None
    found: list[str] = []

    def validate(epoch: int) -> dict[str, float]:
        found.append(CheckpointFolder(tmp_path).files()[-1].name if epoch else "")
        return problem.validate(epoch)

    problem.train(tmp_path, validate=validate, settings=settings(checkpoint_every=1000))
    assert found[-1] == "step-00000021.safetensors"


def test_finished_run_returns_its_result_again(tmp_path, uninterrupted):
    whole, history = uninterrupted
    Problem().train(tmp_path)
    again = Problem()
    result = again.train(tmp_path)
    assert again.steps == 0
    assert equal(again.model, whole.model)
    assert result.history == history
    assert result.best is not None


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, uninterrupted):
    whole, _ = uninterrupted
    problem = Problem()
    problem.before_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 11 else None
    with pytest.raises(TrainingStopped):
        problem.train(tmp_path)
    older, newest = CheckpointFolder(tmp_path).files()
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1  # one bit, in a tensor
    newest.write_bytes(data)

    again = Problem()
    with pytest.warns(UserWarning, match=r"step-00000011.* is damaged \(its checksum"):
        assert again.train(tmp_path).resumed_from == 9
    assert older.name == "step-00000009.safetensors"
    assert equal(again.model, whole.model)


def test_another_precision_is_told_when_a_run_goes_on(tmp_path, monkeypatch, caplog):
    for fast, said in ((True, 0), (True, 0), (False, 1)):
        monkeypatch.setattr("trimtab.precision.has_fast_bf16", lambda _, fast=fast: fast)
        problem = Problem()
        problem.before_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None
        with pytest.raises(Interrupted):
            problem.train(tmp_path, settings=settings(precision="auto"))
        assert len(caplog.records) == said
    assert "trained in bf16 so far and goes on in fp32" in caplog.text


def test_changed_recipe_is_refused(tmp_path):
    Problem().train(tmp_path, settings=settings(epochs=1))
    with pytest.raises(RecipeError, match=r"holds a run of another recipe \(step 7\).*out=.*delete that folder"):
        Problem().train(tmp_path, digest="recipe-2")


def test_a_model_that_validation_cannot_use_stops_the_run(tmp_path):
    def refuse(epoch: int) -> dict[str, float]:
        if epoch:
            raise ModelError("the embeddings are not finite")
        return {"error": 1.0}

    with pytest.raises(TrainingStopped, match=r"after epoch 2 .*checkpoint is .*training\.learning_rate"):
        Problem().train(tmp_path, validate=refuse, settings=settings(checkpoint_every=3))


def test_other_modules_are_refused(tmp_path):
    Problem().train(tmp_path, settings=settings(epochs=1))
    other = Problem()
    other.model[3] = torch.nn.Linear(8, 4)
    with pytest.raises(TrimtabError, match="does not fit these modules"):
        other.train(tmp_path)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with CheckpointFolder(tmp_path).locked(), pytest.raises(TrimtabError, match="another run is training in"):
        Problem().train(tmp_path)
    Problem().train(tmp_path, settings=settings(epochs=1))  # free again


def test_full_disk_keeps_earlier_checkpoints(tmp_path, monkeypatch):
    problem = Problem()
    original = safetensors.torch.save_file

    def full(*arguments: Any, **options: Any) -> None:
        if problem.steps >= 6:  # as it says it
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(*arguments, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(TrimtabError, match=r"step-00000006.*disk is full"):
        problem.train(tmp_path)
    assert [path.name for path in CheckpointFolder(tmp_path).files()] == ["step-00000003.safetensors"]
    assert not list(tmp_path.glob("*.tmp"))


def test_seconds_are_those_of_all_parts(tmp_path):
    Problem().train(tmp_path, settings=settings(epochs=2))
    newest = CheckpointFolder(tmp_path).load_newest()
    newest.state["seconds"] = 1000.0
    CheckpointFolder(tmp_path).save(newest.state["step"], newest)
    assert Problem().train(tmp_path, settings=settings(epochs=2)).seconds > 1000
