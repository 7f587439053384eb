"""Trackers and the terminal: what arrives, and what a missing package says."""

from __future__ import annotations

import sys
import types
from typing import get_args, get_type_hints

import pytest

from tiny_run import STEPS, Problem, settings
from trimtab.config import TrainingConfig
from trimtab.errors import Interrupted, RecipeError, TrainingStopped, TrimtabError
from trimtab.training.trackers import TRACKERS, Terminal, check_trackers, open_trackers


def test_config_names_the_trackers_that_exist():
    choices = get_args(get_args(get_type_hints(TrainingConfig)["trackers"])[0])
    assert set(choices) == set(TRACKERS)


def test_tensorboard_gets_terms_and_validation(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Problem().train(tmp_path, settings=settings(trackers=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/loss", "train/mse", "train/small", "train/learning_rate", "validation/error"} <= names
    assert [event.step for event in events.Scalars("validation/error")] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_tensorboard_of_a_resumed_run_has_every_point_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_trackers(["tensorboard"], tmp_path, {}) as (tracker,):
        for step in (4, 8, 11):  # the last after the checkpoint of step 8
            tracker.log({"error": float(step)}, step)
    with open_trackers(["tensorboard"], tmp_path, {}, first_step=8) as (tracker,):
        for step in (11, 12):
            tracker.log({"error": float(step)}, step)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("error")] == [4, 8, 11, 12]


def test_a_service_that_does_not_start_is_named(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("no server\nat all")

    monkeypatch.setitem(TRACKERS, "wandb", refuse)
    with (
        pytest.raises(TrimtabError, match=r"'wandb' could not start \(no server\).*training\.trackers"),
        open_trackers(["wandb"], tmp_path, {}),
    ):
        pass


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(TrimtabError, match=rf"{name}.*pip install 'trimtab\[{name}\]'.*training\.trackers"),
        open_trackers([name], tmp_path, {}),
    ):
        pass
    with pytest.raises(TrimtabError, match=rf"{name}.*pip install 'trimtab\[{name}\]'.*training\.trackers"):
        check_trackers(["tensorboard", name])


def test_unknown_tracker(tmp_path):
    with (
        pytest.raises(RecipeError, match="'excel' is unknown; known are tensorboard, wandb, mlflow"),
        open_trackers(["excel"], tmp_path, {}),
    ):
        pass


def test_services_are_called_as_their_packages_expect(tmp_path, monkeypatch):
    calls: list = []
    run = types.SimpleNamespace(
        id="w1",
        log=lambda values, step: calls.append(("log", values, step)),
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )
    fake_wandb = types.SimpleNamespace(init=lambda **given: calls.append(given) or run)
    fake_mlflow = types.SimpleNamespace(
        set_tracking_uri=lambda uri: calls.append(uri),
        start_run=lambda **given: calls.append(given) or types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1")),
        log_params=lambda values: calls.append(values),
        log_metrics=lambda values, step: calls.append((values, step)),
        end_run=lambda status: calls.append(("end", status)),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb)
    monkeypatch.setitem(sys.modules, "mlflow", fake_mlflow)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with open_trackers(["wandb", "mlflow"], tmp_path, {"seed": 1, "long": "x" * 900}) as trackers:
        for tracker in trackers:
            tracker.log({"train/loss": 0.5}, 3)
    assert calls[0] == {"project": "trimtab", "dir": str(tmp_path), "config": {"seed": 1, "long": "x" * 900}}
    assert calls[1] == f"sqlite:///{tmp_path}/mlflow.db"
    assert calls[2] == {"run_name": tmp_path.name}
    assert calls[3] == {"seed": "1", "long": "x" * 500}
    logged = [("log", {"train/loss": 0.5}, 3), ({"train/loss": 0.5}, 3)]
    assert calls[4:] == [*logged, ("end", "FINISHED"), ("finish", 0)]

    # A run that is resumed, and one that does not end well.
    for error, status, code in ((Interrupted("asked"), "KILLED", 255), (TrainingStopped("NaN"), "FAILED", 1)):
        calls.clear()
        with pytest.raises(type(error)), open_trackers(["wandb", "mlflow"], tmp_path, {"seed": 2}, first_step=4):
            raise error
        init, _, start, *rest = calls
        assert (init["id"], init["resume"]) == ("w1", "allow")
        assert start == {"run_id": "m1"}  # without parameters, which MLflow lets nobody change
        assert rest == [("end", status), ("finish", code)]

    # One that begins anew, as nothing was saved of the one before, whose steps are behind those that are there.
    calls.clear()
    with open_trackers(["wandb", "mlflow"], tmp_path, {"seed": 2}):
        pass
    assert "id" not in calls[0]
    assert calls[2:4] == [{"run_name": tmp_path.name}, {"seed": "2"}]


def test_a_run_of_mlflow_that_takes_no_parameters_is_closed(tmp_path, monkeypatch):
    calls: list = []

    def refuse(values):
        raise ValueError("too many parameters")

    fake = types.SimpleNamespace(
        set_tracking_uri=lambda uri: None,
        start_run=lambda run_name: (
            calls.append("start") or types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))
        ),
        log_params=refuse,
        end_run=calls.append,
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    with (
        pytest.raises(TrimtabError, match=r"could not start \(too many"),
        open_trackers(["mlflow"], tmp_path, {"a": 1}),
    ):
        pass
    assert calls == ["start", "FAILED"]


def test_trackers_close_when_training_fails(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setitem(TRACKERS, "wandb", lambda *_: types.SimpleNamespace(log=print, close=closed.append))
    with pytest.raises(RuntimeError), open_trackers(["wandb"], tmp_path, {}):
        raise RuntimeError
    assert closed == ["failed"]


def test_a_tracker_that_fails_in_the_middle_ends_no_run(tmp_path, monkeypatch, caplog):
    tries = []

    def refuse(*given: object) -> None:
        tries.append(given)
        raise ConnectionError("no answer\nafter 5 tries")

    monkeypatch.setitem(TRACKERS, "wandb", lambda *_: types.SimpleNamespace(log=refuse, close=refuse))
    result = Problem().train(tmp_path, settings=settings(trackers=("wandb", "tensorboard")))
    assert result.steps == 3 * STEPS
    assert len(tries) == 2  # once to log, once to close
    assert [record.getMessage() for record in caplog.records] == [
        "tracker 'wandb' failed (no answer): the run goes on without it"
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_terminal_without_a_tty_prints_plain_lines(capsys):
    with Terminal(100, 0, 8) as terminal:
        terminal.advance(1, 0, 2)
        terminal.last_line -= 60
        terminal.numbers({"loss": 0.123456}, 10)
        terminal.say("epoch 1/2  error [0.5]")
    err = capsys.readouterr().err
    assert "step 10/100  loss 0.1235" in err
    assert "items/s" in err
    assert "error [0.5]" in err
    with Terminal(100, 0, 8, enabled=False) as quiet:
        quiet.say("nothing")
    assert capsys.readouterr().err == ""
