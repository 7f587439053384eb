"""The one training loop: it sees callables and tensors, never a vision-language model.

`train` is written to be read from top to bottom. `Run` is all that changes and is saved; checkpoints,
processes, the optimiser and trackers have a module each.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trimtab.config import TrainingConfig
from trimtab.errors import Interrupted, RecipeError, TrainingStopped, is_out_of_memory
from trimtab.precision import fast_training
from trimtab.training import distributed
from trimtab.training.checkpoint import CheckpointFolder
from trimtab.training.run import Run, Selection
from trimtab.training.trackers import Terminal, open_trackers


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run has to say; `modules` were left holding the weights it speaks of.

    Attributes:
        history: records in order, ``kind`` is "train" (means since the last one) or "validation".
        best: the validation record of the weights in `modules`, or None without selection.
        steps: optimiser steps in all.
        seconds: time in training over all starts, validation and checkpoints included.
        resumed_from: step at which this start took over, 0 for a fresh run.
    """

    history: list[dict[str, Any]]
    best: dict[str, Any] | None
    steps: int
    seconds: float
    resumed_from: int


def train(
    step: Callable[[Any], Mapping[str, Tensor]],
    modules: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    *,
    steps_per_epoch: int,
    settings: TrainingConfig,
    checkpoint_dir: str | Path | None,
    digest: str,
    seed: int = 0,
    validate: Callable[[int], Mapping[str, float]] | None = None,
    select: Selection | None = None,
    shard: Callable[[Any, int, int], tuple[Any, float]] = distributed.rank_slice,
    run_config: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
    show_progress: bool = True,
    last: bool = True,
) -> TrainingResult:
    """Train `modules`, or go on from the newest checkpoint in `checkpoint_dir`.

    An interrupted run that is started again with the same arguments ends with the same weights, bit for bit
    on the CPU, as one that was never interrupted.

    Args:
        step: batch -> named loss terms (scalars that are means over the batch's rows); their sum is minimised.
        modules: what is trained and saved; only parameters with requires_grad get updates. Buffers are saved
            with it. It is moved to the accelerator's device.
        batches: epoch -> its global batches, a function of the epoch alone.
        steps_per_epoch: number of batches in every epoch.
        checkpoint_dir: one run's own folder; None keeps nothing, so that a run which stops begins anew.
        digest: names the recipe and data; a checkpoint of another digest is refused, and so are ranks with different
            ones.
        validate: epoch -> named numbers, called in eval mode without gradients after every epoch, or as many as
            ``settings.validate_every``. The key ``collapse`` is compared with ``settings.collapse_at``.
        select: keeps the best weights by a number of `validate`; without it the last weights count.
        shard: (batch, rank, size) -> this rank's part and its weight; see `distributed.rank_slice`.
        run_config: the resolved recipe, for trackers.
        last: nothing is trained after this. If something is, a request to stop in the last step stops here too.

    Raises:
        TrainingStopped: NaN or infinite loss, collapse, out of memory.
        Interrupted: Ctrl-C or a scheduler's signal, after a checkpoint.
        RecipeError: the checkpoints are of another recipe.
        TrimtabError: the folder is in use, the disk is full, a tracker is missing, ranks read different things.
    """
    accelerator = accelerator or distributed.make_accelerator()
    world = distributed.announce_world(settings.processes, accelerator)
    if settings.batch_size < world.size:
        raise RecipeError(f"batch_size={settings.batch_size} must be at least the {world.size} processes")
    distributed.check_alike(digest, world)
    modules.to(world.device)
    precision = distributed.agreed_precision(settings.precision, world)
    autocast = fast_training(precision, world.device)

    with contextlib.ExitStack() as stack:
        place = checkpoint_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="trimtab-"))
        folder = CheckpointFolder(place, lasting=checkpoint_dir is not None)
        run = Run(modules, settings, steps_per_epoch * settings.epochs, digest, world, folder, precision)
        if world.is_main:
            stack.enter_context(folder.locked())
        run.start_or_resume(seed)
        resumed_from = run.step
        trackers = stack.enter_context(
            open_trackers(settings.trackers if world.is_main else (), folder.folder, run_config or {}, run.step)
        )
        shown = show_progress and world.is_main
        terminal = stack.enter_context(Terminal(run.total, run.step, settings.batch_size, enabled=shown))
        interrupt = stack.enter_context(_Interrupt())
        stack.enter_context(_explain_out_of_memory(run))
        if resumed_from:
            terminal.say(f"resuming at step {run.step} of {run.total}")
        elif validate and select and select.with_start:
            with _explain_out_of_memory(run, in_validation=True):
                record = run.validate(validate, -1, select)
            _log(trackers, "validation", record)
            terminal.say(f"start  {_numbers(record)}")

        for epoch in range(run.epochs_done, settings.epochs):
            modules.train()
            for batch in itertools.islice(batches(epoch), run.step - epoch * steps_per_epoch, None):
                part, share = shard(batch, world.rank, world.size)
                with autocast:
                    terms = dict(step(part))
                    loss = sum(terms.values(), torch.zeros((), device=world.device))
                run.optimizer.zero_grad(set_to_none=True)
                # Not Accelerate's own: settings of its launcher would scale gradients that are unscaled nowhere here.
                (loss * share).backward()
                distributed.average_gradients(run.trained, world)
                norm = torch.nn.utils.clip_grad_norm_(run.trained, settings.clip or math.inf)
                values, stop = run.agree({**terms, "loss": loss}, share, norm, interrupt.asked)
                run.refuse_non_finite(values, epoch)
                run.set_learning_rate()
                run.optimizer.step()
                run.count(values)

                terminal.advance(run.step, epoch, settings.epochs)
                if run.step % settings.log_every == 0 or run.step == run.total:
                    record = run.record(epoch)
                    terminal.numbers({name: record[name] for name in values}, run.step)
                    _log(trackers, "train", record)
                finished = run.step == (epoch + 1) * steps_per_epoch
                if stop and (run.step < run.total or not last):
                    run.save()
                    _interrupted(run)
                if run.step % settings.checkpoint_every == 0 and not finished:
                    run.save()

            if run.step != (epoch + 1) * steps_per_epoch:
                done = run.step - epoch * steps_per_epoch
                raise ValueError(f"epoch {epoch} gave {done} batches, not steps_per_epoch={steps_per_epoch}")
            due = (epoch + 1) % settings.validate_every == 0 or epoch + 1 == settings.epochs
            if validate and due:
                if run.save_is_due(interrupt.asked):  # validation may take longer than a scheduler waits, or fail
                    run.save()
                with _explain_out_of_memory(run, in_validation=True):
                    record = run.validate(validate, epoch, select)
                _log(trackers, "validation", record)
                terminal.say(f"epoch {epoch + 1}/{settings.epochs}  {_numbers(record)}")
            run.epochs_done = epoch + 1
            stop = run.agree({}, 1.0, None, interrupt.asked)[1] and (run.epochs_done < settings.epochs or not last)
            if due or stop or run.save_is_due():
                run.save()
            if stop:
                _interrupted(run)

        run.adopt_best()
        return TrainingResult(run.history, run.best, run.step, run.seconds, resumed_from)


class _Interrupt:
    """Ctrl-C, or a signal of a scheduler, asks to stop after the current step; a second Ctrl-C stops at once."""

    asked = False

    def __enter__(self) -> _Interrupt:
        self.previous: dict[int, Any] = {}
        self.by_hand = False
        if threading.current_thread() is threading.main_thread():
            # Schedulers send these two on request; a program around this one may listen to them.
            on_request = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
            free = [number for number in on_request if signal.getsignal(number) == signal.SIG_DFL]
            for number in (signal.SIGINT, signal.SIGTERM, *free):
                self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        # Others than Ctrl-C may come twice for one request: a launcher passes on what its processes got as well.
        by_hand = number == signal.SIGINT
        if by_hand and self.by_hand:
            raise KeyboardInterrupt
        if by_hand or not self.asked:
            once_more = b"; Ctrl-C once more stops at once, without a checkpoint" if by_hand else b""
            # Not print: a handler may run inside another print.
            os.write(2, b"\nstopping after this step or validation" + once_more + b"\n")
        self.asked = True
        self.by_hand |= by_hand


def _interrupted(run: Run) -> NoReturn:
    distributed.wait(run.world)  # until the main process has written the checkpoint
    again = "Start the same command again to resume." if run.folder.lasting else "Start the same command again."
    raise Interrupted(
        f"interrupted at step {run.step} of {run.total}; {run.kept()}. {again}", told=not run.world.is_main
    )


@contextlib.contextmanager
def _explain_out_of_memory(run: Run, *, in_validation: bool = False) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if in_validation:
            raise TrainingStopped(
                f"out of memory in validation after step {run.step}; {run.kept()}. training.batch_size does not change "
                "what validation takes. Free memory of the device or take a larger one and start the same command "
                f"again, or validate on less data. {run.start_again()}"
            ) from error
        raise TrainingStopped(
            f"out of memory at step {run.step + 1}; {run.kept()}. Try a lower training.batch_size, or more processes, "
            f"which share a batch, where the link takes several. {run.start_again()}"
        ) from error


def _log(trackers: Iterable[Any], prefix: str, record: Mapping[str, Any]) -> None:
    values = {f"{prefix}/{k}": v for k, v in record.items() if k not in ("kind", "step", "epoch")}
    for tracker in trackers:
        tracker.log(values, record["step"])


def _numbers(record: Mapping[str, Any]) -> str:
    return "  ".join(f"{k} {v:.4g}" for k, v in record.items() if k not in ("kind", "step", "epoch"))
