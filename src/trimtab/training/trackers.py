"""Where numbers go while training: trackers on disk or in a service, and the terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trimtab.errors import Interrupted, RecipeError, TrimtabError
from trimtab.files import write_text

logger = logging.getLogger(__name__)

Ending: TypeAlias = Literal["finished", "stopped", "failed"]


class Tracker(Protocol):
    """A sink of named numbers."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, ending: Ending) -> None: ...


class TensorBoard:
    """Event files in ``<folder>/tensorboard``; steps that a resumed run repeats are purged."""

    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # From the purged step on everything goes; what was logged at the step of the checkpoint is not logged again.
        purged = first_step + 1 if first_step else None
        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=purged)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, ending: Ending) -> None:
        self.writer.close()


class Wandb:
    """A Weights & Biases run, which a resumed run goes on in; mode and project come from the WANDB_* variables."""

    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        import wandb

        known = _run_id(folder, "wandb", first_step)
        self.run: Any = wandb.init(
            project=None if os.environ.get("WANDB_PROJECT") else "trimtab",
            dir=str(folder),
            config=dict(config),
            **({"id": known, "resume": "allow"} if known else {}),
        )
        _keep_run_id(folder, "wandb", self.run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self, ending: Ending) -> None:
        self.run.finish(exit_code={"finished": 0, "stopped": 255, "failed": 1}[ending])  # 255 as its own for Ctrl-C


class Mlflow:
    """An MLflow run, which a resumed run goes on in; server and experiment come from the MLFLOW_* variables."""

    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        import mlflow

        self.mlflow: Any = mlflow
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').absolute()}")
        if known := _run_id(folder, "mlflow", first_step):
            mlflow.start_run(run_id=known)
            return
        run = mlflow.start_run(run_name=folder.name)
        try:
            # MLflow caps the length of a parameter.
            mlflow.log_params({name: str(value)[:500] for name, value in config.items()})
        except Exception:
            mlflow.end_run("FAILED")
            raise
        _keep_run_id(folder, "mlflow", run.info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics({name: float(value) for name, value in values.items()}, step=step)

    def close(self, ending: Ending) -> None:
        self.mlflow.end_run({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ending])


def _run_id_file(folder: Path, service: str) -> Path:
    return folder / f"{service}-run"


def _run_id(folder: Path, service: str, first_step: int) -> str | None:
    """The service's id of the run that is resumed here; None of one that begins, though an earlier one left its id."""
    file = _run_id_file(folder, service)
    return file.read_text(encoding="utf-8").strip() if first_step and file.exists() else None


def _keep_run_id(folder: Path, service: str, run_id: str) -> None:
    write_text(_run_id_file(folder, service), f"{run_id}\n")


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


def check_trackers(names: Sequence[str]) -> None:
    """See that the packages of trackers are installed, before hours are spent.

    Raises:
        RecipeError: an unknown name.
        TrimtabError: a tracker whose package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise RecipeError(f"tracker {name!r} is unknown; known are {', '.join(TRACKERS)}")
        if find_spec(name) is None:  # a tracker has the name of its package
            raise _missing(name, f"No module named {name!r}")


def _missing(name: str, why: object) -> TrimtabError:
    return TrimtabError(
        f"tracker {name!r} needs a package that is not installed ({why}): "
        f"pip install 'trimtab[{name}]', or leave it out of training.trackers"
    )


@contextlib.contextmanager
def open_trackers(
    names: Sequence[str], folder: Path, config: Mapping[str, Any], first_step: int = 0
) -> Iterator[list[Tracker]]:
    """Open the named trackers and close them all at the end, whatever happens. One that fails is left out from then on.

    Args:
        folder: where trackers that write files put them.
        config: the resolved recipe, for services that show it.
        first_step: the step a resumed run goes on from.

    Raises:
        RecipeError: an unknown name.
        TrimtabError: a tracker whose package is not installed, or that does not start.
    """
    opened: list[Tracker] = []
    ending: Ending = "failed"
    try:
        for name in names:
            if name not in TRACKERS:
                raise RecipeError(f"tracker {name!r} is unknown; known are {', '.join(TRACKERS)}")
            try:
                tracker = TRACKERS[name](folder, config, first_step)
            except ImportError as error:
                raise _missing(name, error) from error
            except Exception as error:  # services fail in ways of their own
                known = _run_id(folder, name, first_step)
                again = f", delete {_run_id_file(folder, name)} to begin a new run there" if known else ""
                raise TrimtabError(
                    f"tracker {name!r} could not start ({_reason(error)}): mend its settings{again}, or leave it out "
                    "of training.trackers"
                ) from error
            opened.append(_Spared(name, tracker))
        yield opened
        ending = "finished"
    except (KeyboardInterrupt, Interrupted):
        ending = "stopped"
        raise
    finally:
        for tracker in reversed(opened):
            tracker.close(ending)


class _Spared:
    """A tracker whose failure does not end the run: hours of training are worth more than their curves."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.failed = False

    def log(self, values: Mapping[str, float], step: int) -> None:
        if not self.failed:
            with self._told():
                self.tracker.log(values, step)

    def close(self, ending: Ending) -> None:
        with self._told():
            self.tracker.close(ending)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # services fail in ways of their own
            if not self.failed:
                logger.warning("tracker %r failed (%s): the run goes on without it", self.name, _reason(error))
            self.failed = True


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Terminal:
    """A progress bar with the loss terms; plain lines now and then when the output is no terminal."""

    def __init__(self, total: int, first_step: int, batch_size: int, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.total = total
        self.batch_size = batch_size
        self.console = Console(stderr=True)
        self.first_step = first_step
        self.started = self.last_line = time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> Terminal:
        if self.enabled and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=self.total, completed=self.first_step, numbers="")
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, step: int, epoch: int, epochs: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step, description=f"epoch {epoch + 1}/{epochs}")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Show training numbers; `values` may hold any named floats."""
        now = time.monotonic()
        rate = (step - self.first_step) * self.batch_size / max(now - self.started, 1e-9)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items()) + f"  {rate:,.0f} items/s"
        if self.bar:
            self.bar.update(self.task, numbers=text)
        elif self.enabled and now - self.last_line > 30:
            self.last_line = now
            self.say(f"step {step}/{self.total}  {text}")

    def say(self, line: str) -> None:
        if self.enabled:
            (self.bar.console if self.bar else self.console).print(line, highlight=False, markup=False)
            sys.stderr.flush()


@contextlib.contextmanager
def progress_reporter(what: str, unit: str = "texts") -> Iterator[Callable[[int, int], None]]:
    """Yield a function told (done, total): a bar on a terminal, a line every half minute elsewhere."""
    console = Console(stderr=True)
    last = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{what}: {unit}", total=None)

        def report(done: int, total: int) -> None:
            nonlocal last
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - last > 30:
                last = time.monotonic()
                print(f"{what}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)

        yield report
