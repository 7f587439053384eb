"""The loop: it learns, keeps the best, logs, and stops with advice."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tiny_run import STEPS, Problem, settings
from trimtab.config import TrainingConfig
from trimtab.errors import RecipeError, TrainingStopped
from trimtab.training import Selection
from trimtab.training.checkpoint import CheckpointFolder
from trimtab.training.optimiser import BellAverage, MovingAverage, learning_rate, make_optimizer, trainable


def test_loss_falls_and_history_tells(tmp_path):
    problem = Problem(dropout=0.0, noise=False)
    before = problem.validate(0)["error"]
    result = problem.train(tmp_path, settings=settings(epochs=10, log_every=7, ema=None))
    assert problem.validate(0)["error"] < 0.3 * before
    assert not problem.model.training
    records = [record for record in result.history if record["kind"] == "train"]
    assert len(records) == 10
    first = records[0]
    assert first["loss"] == pytest.approx(first["mse"] + first["small"], rel=1e-5)
    assert first["gradient_norm"] > 0
    assert len([r for r in result.history if r["kind"] == "validation"]) == 10
    assert result.best is not None
    assert result.best["error"] == pytest.approx(problem.validate(0)["error"], rel=1e-4)


@pytest.mark.parametrize(("greater", "expected"), [(True, 1), (False, 2)])
def test_best_weights_by_the_direction_given(tmp_path, greater, expected):
    problem = Problem()
    seen = {}

    def validate(epoch: int) -> dict[str, float]:
        seen[epoch] = problem.model[0].weight.detach().clone()
        return {"score": [0.0, 3.0, -1.0, math.nan][epoch]}

    select = Selection("score", greater_is_better=greater)
    result = problem.train(tmp_path, settings=settings(epochs=4), validate=validate, select=select)
    assert result.best is not None
    assert result.best["epoch"] == expected
    assert torch.equal(problem.model[0].weight, seen[expected])


@pytest.mark.parametrize("counted", [0, 100])
def test_what_is_no_number_is_never_the_best(counted):
    select, before = Selection("score", counted=counted), [{"epoch": 0, "score": 50.0}]
    assert select.improves(51.0, before)
    assert not select.improves(math.nan, [])
    assert not select.improves(math.inf, before)


def test_without_validation_the_model_is_ready_for_use(tmp_path):
    problem = Problem()
    problem.train(tmp_path, settings=settings(epochs=1), validate=None, select=None)
    assert not problem.model.training


@pytest.mark.parametrize(
    ("counted", "scores", "expected"),
    [
        (0, [60.0, 70.0, 69.0, 70.0], 1),  # to the last digit, and the first of equal ones
        (100, [60.0, 70.0, 66.0, 65.0], 2),  # 100 pictures: 4.58 points at 70
        (100, [90.0, 70.0, 66.0, 65.0], 0),
        (400, [60.0, 70.0, 67.0, 68.5], 3),
        # Each is within an error of the one before, and the last is not of the best.
        (100, [60.0, 70.0, 66.0, 62.0], 2),
        (10, [math.nan, 0.0, 0.0, math.nan], 2),
        (10, [100.0, 100.0, 90.0, 100.0], 3),
    ],
)
def test_the_latest_of_those_that_validation_cannot_tell_apart(tmp_path, counted, scores, expected):
    result = Problem().train(
        tmp_path,
        settings=settings(epochs=4),
        validate=lambda epoch: {"score": scores[epoch]},
        select=Selection("score", counted=counted),
    )
    assert result.best is not None
    assert result.best["epoch"] == expected


@pytest.mark.parametrize(("start", "expected"), [(71.0, -1), (70.0, 0), (65.0, 2), (0.0, 3)])
def test_few_pictures_are_no_excuse_for_being_worse_than_the_start(tmp_path, start, expected):
    scores = {-1: start, 0: 70.0, 1: 64.0, 2: 67.0, 3: 64.0}
    result = Problem().train(
        tmp_path,
        settings=settings(epochs=4),
        validate=lambda epoch: {"score": scores[epoch]},
        select=Selection("score", with_start=True, counted=50),  # 6.5 points at 70
    )
    assert result.best is not None
    assert result.best["epoch"] == expected


@pytest.mark.parametrize(("start", "expected"), [(9.0, -1), (0.0, 1)])
def test_the_start_may_be_the_best(tmp_path, start, expected):
    problem = Problem()
    weights = problem.model[0].weight.detach().clone()
    scores = {-1: start, 0: 1.0, 1: 2.0}
    select = Selection("score", with_start=True)
    result = problem.train(
        tmp_path, settings=settings(epochs=2), validate=lambda epoch: {"score": scores[epoch]}, select=select
    )
    assert result.history[0]["kind"] == "validation"
    assert result.history[0]["step"] == 0
    assert result.best is not None
    assert result.best["epoch"] == expected
    assert torch.equal(problem.model[0].weight, weights) == (expected == -1)


@pytest.mark.parametrize(("every", "looks"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (9, [4])])
def test_validation_takes_place_as_often_as_asked_and_at_the_end(tmp_path, every, looks):
    seen = []
    result = Problem().train(
        tmp_path,
        settings=settings(epochs=5, validate_every=every),
        validate=lambda epoch: seen.append(epoch) or {"score": 1.0},
        select=Selection("score", counted=10),
    )
    assert seen == looks
    assert result.best is not None
    assert result.best["epoch"] == 4


def test_validation_sees_eval_mode_no_gradients_and_averaged_weights(tmp_path):
    problem = Problem()
    weights = []

    def validate(epoch: int) -> dict[str, float]:
        assert not problem.model.training
        assert not torch.is_grad_enabled()
        weights.append(problem.model[0].weight.detach().clone())
        return {}

    problem.train(tmp_path, validate=validate, select=None)
    assert torch.equal(problem.model[0].weight, weights[-1])
    last = CheckpointFolder(tmp_path).load_newest()
    assert last is not None
    assert torch.equal(last.part("average")["0.weight"], weights[-1])
    assert not torch.equal(last.part("model")["0.weight"], weights[-1])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_term_stops_before_the_update(tmp_path, poison):
    problem = Problem()
    clean = problem.step

    def step(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        terms = clean(rows)
        if problem.steps == 9:
            terms["small"] = terms["small"] * poison
        return terms

    problem.step = step  # type: ignore[method-assign]
    with pytest.raises(TrainingStopped) as caught:
        problem.train(tmp_path)
    message = str(caught.value)
    assert "step 9 (batch 2 of epoch 2): small=" in message
    assert "mse" not in message
    assert "step-00000007.safetensors" in message
    assert "training.learning_rate" in message
    assert all(parameter.isfinite().all() for parameter in problem.model.parameters())


def test_non_finite_gradient_of_a_finite_loss_stops(tmp_path):
    problem = Problem(noise=False)
    root = torch.zeros(1)

    def step(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"root": (problem.model(problem.x[rows]).sum() * 0 + root).sqrt().sum()}

    problem.step = step  # type: ignore[method-assign]
    with pytest.raises(TrainingStopped, match=r"step 1 .*gradient_norm=nan.*no checkpoint was written yet"):
        problem.train(tmp_path)


def test_collapse_stops_and_keeps_the_checkpoint_before(tmp_path):
    problem = Problem()
    collapse = {0: 0.5, 1: 0.99}
    with pytest.raises(TrainingStopped, match=r"epoch 2 .*collapsed .*0\.990.*step-00000012.*infonce"):
        problem.train(tmp_path, validate=lambda epoch: {"collapse": collapse[epoch]}, select=None)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA error: out of memory"),
        RuntimeError("CUDA error: out of memory"),  # the driver's own is no more than that
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_out_of_memory_gives_advice(tmp_path, error):
    problem = Problem()

    def step(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        raise error

    problem.step = step  # type: ignore[method-assign]
    with pytest.raises(TrainingStopped, match=r"out of memory at step 1;.*training\.batch_size"):
        problem.train(tmp_path)


def test_out_of_memory_in_validation_says_so_and_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("trimtab.training.run._LONGEST_UNSAVED", -1.0)
    full = torch.OutOfMemoryError("CUDA out of memory")

    def validate(epoch: int) -> dict[str, float]:
        raise full

    with pytest.raises(TrainingStopped, match=r"in validation after step 7;.*step-00000007.*same command again"):
        Problem().train(tmp_path, validate=validate, settings=settings(checkpoint_every=1000))
    assert Problem().train(tmp_path, settings=settings(checkpoint_every=1000)).resumed_from == 7


def test_wrong_number_of_batches_or_metric_is_a_bug_with_a_name(tmp_path):
    with pytest.raises(ValueError, match="epoch 0 gave 7 batches, not steps_per_epoch=9"):
        Problem().train(tmp_path / "a", steps_per_epoch=9)
    with pytest.raises(ValueError, match=r"gave .*'error'.*, not 'accuracy'"):
        Problem().train(tmp_path / "b", select=Selection("accuracy"))
    frozen = Problem()
    frozen.model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        frozen.train(tmp_path / "c")


def test_bf16_runs_and_keeps_float32_weights(tmp_path):
    problem = Problem(dropout=0.0, noise=False)
    seen = set()
    clean = problem.step

    def step(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.add(problem.model(problem.x[rows]).dtype)
        return clean(rows)

    problem.step = step  # type: ignore[method-assign]
    problem.train(tmp_path, settings=settings(precision="bf16"))
    assert seen == {torch.bfloat16}
    assert problem.model[0].weight.dtype == torch.float32


def test_schedule_warms_up_and_falls_to_zero():
    settings = TrainingConfig(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert learning_rate(99, 100, TrainingConfig(schedule="constant", warmup=0)) == 1e-3
    assert learning_rate(0, 1, TrainingConfig(warmup=0.5)) == 1e-3


def test_decay_spares_biases_and_norms():
    model = Problem().model
    model[0].bias.requires_grad_(False)
    named = trainable(model)
    assert "0.bias" not in named
    decayed, spared = make_optimizer(named, TrainingConfig()).param_groups
    assert {tuple(p.shape) for p in decayed["params"]} == {(8, 6), (3, 8)}
    assert len(spared["params"]) == 3
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)


def test_moving_average_restores_the_weights_after_use():
    model = torch.nn.Linear(2, 1, bias=False)
    average = MovingAverage(trainable(model), decay=0.5)
    with torch.no_grad():
        start = model.weight.clone()
        model.weight.add_(1)
    average.update(100)
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), start + 0.5)
    torch.testing.assert_close(model.weight.detach(), start + 1)


def test_moving_average_forgets_the_start_before_it_is_slow():
    average = MovingAverage(trainable(torch.nn.Linear(2, 1)), decay=0.999)
    assert average.share(1) == pytest.approx(9 / 11)
    assert average.share(10**6) == pytest.approx(1e-3)


@pytest.mark.parametrize(("centre", "width"), [(0.8, 0.2), (0.0, 0.1), (1.0, 1e-3)])
def test_bell_is_the_weighted_mean_of_all_steps(centre, width):
    model, steps = torch.nn.Linear(2, 1, bias=False), 12
    average = BellAverage(trainable(model), steps, centre, width)
    weights = average.weights
    assert float(weights.sum()) == pytest.approx(1)
    assert int(weights.argmax()) == max(0, round(centre * steps) - 1)
    expected = torch.zeros(1, 2, dtype=torch.float64)
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 2))
        average.update(step)
        expected += weights[step - 1] * model.weight.detach()
        so_far = expected / weights[:step].sum()  # the start has no part in it
        if weights[:step].sum() > 1e-30:
            torch.testing.assert_close(average.tensors["weight"].double(), so_far, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(average.tensors["weight"].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bell", [[0.5], [1.5, 0.1], [0.5, 0.0]])
def test_a_bell_that_is_none_is_refused(bell):
    with pytest.raises(RecipeError, match="bell"):
        TrainingConfig(bell=tuple(bell))
    with pytest.raises(RecipeError, match=r"bell.*ema"):
        TrainingConfig(bell=(0.8, 0.2), ema=0.9)


def test_more_processes_than_rows_is_refused(tmp_path, monkeypatch):
    from trimtab.training import distributed

    world = distributed.World(0, 4, torch.device("cpu"))
    monkeypatch.setattr(distributed, "announce_world", lambda *_: world)
    with pytest.raises(RecipeError, match="batch_size=2 must be at least the 4 processes"):
        Problem().train(tmp_path, settings=settings(batch_size=2))


def test_steps_constant_matches():
    assert STEPS == 7


class Remembering(nn.Module):
    """A buffer that a run needs to go on and a trained model does not."""

    of_training_alone = ("rows",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("rows", torch.zeros(1000))
        self.register_buffer("counts", torch.zeros(2))


def test_what_serves_training_alone_is_saved_once(tmp_path):
    problem = Problem()
    problem.model.append(Remembering())
    problem.model[-1].forward = lambda x: x + problem.model[-1].weight
    problem.train(tmp_path)
    saved = CheckpointFolder(tmp_path).load_newest()
    assert {name for name in saved.tensors if name.endswith("rows")} == {"model/4.rows"}
    assert {name for name in saved.tensors if name.endswith("counts")} == {"model/4.counts", "best/4.counts"}


def test_gradients_are_clipped(tmp_path):
    norms: list[float] = []
    for clip in (0.01, None):
        problem = Problem()
        original = torch.optim.AdamW.step

        def step(self: Any, *rest: Any, original: Any = original, problem: Problem = problem) -> Any:
            of = [parameter.grad for parameter in problem.model.parameters()]
            norms.append(torch.cat([one.flatten() for one in of]).norm().item())
            return original(self, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step)
            problem.train(tmp_path / str(clip), settings=settings(epochs=1, clip=clip))
    assert norms[:STEPS] == pytest.approx([0.01] * STEPS, rel=1e-3)
    assert min(norms[STEPS:]) > 0.02


def test_settings_of_the_launcher_change_no_gradient(tmp_path, monkeypatch):
    plain = Problem()
    plain.train(tmp_path / "plain", settings=settings(epochs=1, clip=None))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    again = Problem()
    again.train(tmp_path / "again", settings=settings(epochs=1, clip=None))
    norms = [[r["gradient_norm"] for r in CheckpointFolder(tmp_path / name).load_newest().state["history"]
              if r["kind"] == "train"] for name in ("plain", "again")]  # fmt: skip
    assert norms[0] == norms[1]


def test_a_collapse_that_is_no_number_stops(tmp_path):
    with pytest.raises(TrainingStopped, match="collapsed"):
        Problem().train(tmp_path, validate=lambda epoch: {"error": 1.0, "collapse": math.nan})


@pytest.mark.parametrize(
    ("every", "minutes", "expected"), [(1000, False, [35, 70]), (21, False, [21, 35, 56, 70]), (1000, True, 12)]
)
def test_epochs_that_are_not_validated_are_saved_when_it_is_time(tmp_path, monkeypatch, every, minutes, expected):
    saved: list[int] = []
    original = CheckpointFolder.save
    monkeypatch.setattr(
        CheckpointFolder, "save", lambda self, step, *rest: saved.append(step) or original(self, step, *rest)
    )
    if minutes:
        monkeypatch.setattr("trimtab.training.run._LONGEST_UNSAVED", -1.0)
    config = settings(epochs=10, validate_every=5, checkpoint_every=every)
    Problem().train(tmp_path, settings=config)
    assert (len(saved) if minutes else saved) == expected
