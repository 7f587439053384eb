"""A run in training: its weights, its counters, and how both are saved, resumed, judged and stopped."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.config import TrainingConfig
from trimtab.errors import ModelError, TrainingStopped, TrimtabError
from trimtab.training import distributed
from trimtab.training.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    load_optimizer,
    optimizer_tensors,
    restore_rng,
    rng_tensors,
    seed_everything,
)
from trimtab.training.distributed import World
from trimtab.training.optimiser import learning_rate, make_optimizer, trainable, weight_average

logger = logging.getLogger(__name__)

_LONGEST_UNSAVED = 60.0  # seconds


@dataclass(frozen=True)
class Selection:
    """The validation metric by which the best weights are kept, and its direction.

    Attributes:
        with_start: the weights before the first step are judged too, as those of epoch -1. Others are kept only if
            their value is no worse.
        counted: the metric is the percentage that is right of so many. What lies within one standard error of the best
            value counts as equal to it, and of equal ones the latest are kept: among many epochs the best of few
            pictures is mostly luck, and an early one has been trained for less. 0 takes the metric at its word.
    """

    metric: str
    greater_is_better: bool = True
    with_start: bool = False
    counted: int = 0

    def improves(self, new: float, before: Sequence[Mapping[str, Any]]) -> bool:
        """Whether weights of the value `new` are kept, after the validations `before`."""
        if not math.isfinite(new):
            return False
        found = [(one["epoch"], one[self.metric]) for one in before if math.isfinite(one[self.metric])]
        if not self.counted:
            return all(self._ahead(new, value) > 0 for _, value in found)
        # The start is no draw from many: training has to be worth it, however few are counted.
        if any(self._ahead(new, value) < 0 for epoch, value in found if epoch < 0):
            return False
        trained = [value for epoch, value in found if epoch >= 0]
        if not trained:
            return True
        best = max(trained) if self.greater_is_better else min(trained)
        return self._ahead(new, best) >= -math.sqrt(max(best * (100 - best), 0) / self.counted)

    def _ahead(self, new: float, old: float) -> float:
        return new - old if self.greater_is_better else old - new


@dataclass
class Run:
    """Everything that a checkpoint holds, and how it changes."""

    modules: nn.Module
    settings: TrainingConfig
    total: int
    digest: str
    world: World
    folder: CheckpointFolder
    precision: str

    step: int = 0
    epochs_done: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    best_tensors: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0
    earlier_seconds: float = 0.0
    saved_step: int = 0

    def __post_init__(self) -> None:
        self.named = trainable(self.modules)
        if not self.named:
            raise ValueError("nothing to train: no parameter of modules requires a gradient")
        self.trained = list(self.named.values())
        self.optimizer = make_optimizer(self.named, self.settings)
        self.average = weight_average(self.named, self.settings, self.total)
        self.rate = 0.0
        self.started = self.saved_at = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    # -- one step

    def set_learning_rate(self) -> None:
        self.rate = learning_rate(self.step, self.total, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def agree(
        self, terms: Mapping[str, Tensor], share: float, norm: Tensor | None, asked: bool
    ) -> tuple[dict[str, float], bool]:
        """Loss terms and gradient norm as means over ranks, and whether any rank was asked to stop."""
        scalars = [term.detach().float() * share for term in terms.values()]
        scalars.append(torch.zeros(()) if norm is None else norm.detach().float())
        scalars.append(torch.tensor(float(asked)))
        numbers = distributed.average(torch.stack([s.to(self.world.device) for s in scalars]), self.world)
        *values, gradient_norm, stop = numbers.tolist()
        return {**dict(zip(terms, values, strict=True)), "gradient_norm": gradient_norm}, stop > 0

    def refuse_non_finite(self, values: Mapping[str, float], epoch: int) -> None:
        bad = [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            return
        where = f"batch {self.step - epoch * (self.total // self.settings.epochs) + 1} of epoch {epoch + 1}"
        # The total and the gradient only repeat what a term says, unless no term says it.
        culprits = [name for name in bad if not name.startswith(("loss=", "gradient_norm="))] or bad
        raise TrainingStopped(
            f"training stopped at step {self.step + 1} ({where}): {', '.join(culprits)}. The weights were not "
            f"updated; {self.kept()}. Try a lower training.learning_rate, training.precision=fp32, a smaller "
            f"training.clip, or look for bad rows in that batch. {self.start_again()}"
        )

    def count(self, values: Mapping[str, float]) -> None:
        self.step += 1
        self.summed += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if self.average:
            self.average.update(self.step)

    def record(self, epoch: int) -> dict[str, Any]:
        """Add the means since the last record to the history."""
        means = {name: total / self.summed for name, total in self.sums.items()}
        entry = {"kind": "train", "step": self.step, "epoch": epoch, "learning_rate": self.rate, **means}
        self.history.append(entry)
        self.sums, self.summed = {}, 0
        return entry

    # -- after an epoch

    def validate(
        self, validate: Callable[[int], Mapping[str, float]], epoch: int, select: Selection | None
    ) -> dict[str, Any]:
        self.modules.eval()
        with torch.no_grad(), self.average.applied() if self.average else contextlib.nullcontext():
            try:
                metrics = {name: float(value) for name, value in validate(epoch).items()}
            except ModelError as error:
                if epoch < 0:
                    raise
                raise TrainingStopped(
                    f"training stopped after epoch {epoch + 1} (step {self.step}): with the trained weights the model "
                    f"cannot be used, most likely because training diverged; {self.kept()}. Try a lower "
                    f"training.learning_rate or training.precision=fp32. {self.start_again()}"
                ) from error
            if self.world.size > 1:  # ranks may differ in the last bit, but must decide alike
                numbers = torch.tensor(list(metrics.values()), device=self.world.device, dtype=torch.float32)
                metrics = dict(zip(metrics, distributed.average(numbers, self.world).tolist(), strict=True))
            entry = {"kind": "validation", "step": self.step, "epoch": epoch, **metrics}
            before = [one for one in self.history if one["kind"] == "validation"]
            self.history.append(entry)
            if (collapse := metrics.get("collapse")) is not None and not collapse <= self.settings.collapse_at:
                raise TrainingStopped(
                    f"training stopped after epoch {epoch + 1} (step {self.step}): the student's outputs have "
                    f"collapsed (narrowing {collapse:.3f} of 1, allowed {self.settings.collapse_at}); "
                    f"{self.kept()}. Try objective.targets=standardise, objective.infonce=1, a lower "
                    f"training.learning_rate, or a higher training.collapse_at. {self.start_again()}"
                )
            if select:
                if select.metric not in metrics:
                    raise ValueError(f"validate gave {sorted(metrics)}, not {select.metric!r}")
                if select.improves(metrics[select.metric], before):
                    self.best, self.best_tensors = entry, _copy(self.modules)
        return entry

    def adopt_best(self) -> None:
        """Put the weights that count into `modules`: the best, else the averaged, else the last."""
        if self.best:
            missing, unknown = self.modules.load_state_dict(self.best_tensors, strict=False)
            if unknown or not _of_training_alone(self.modules).issuperset(missing):
                raise TrimtabError(f"the best weights do not fit these modules ({[*missing, *unknown]})")
        elif self.average:
            with torch.no_grad():
                for name, parameter in self.named.items():
                    parameter.copy_(self.average.tensors[name])
        self.modules.eval()

    # -- saving and resuming

    def save_is_due(self, asked: bool = False) -> bool:
        """Whether an epoch is saved without or before validation: of few pairs it takes a second, and all weights are
        large. It is where a stop is `asked` for.

        All ranks must ask, and hear the same.
        """
        long_ago = asked or time.monotonic() - self.saved_at > _LONGEST_UNSAVED
        return self.step - self.saved_step >= self.settings.checkpoint_every or self.agree({}, 1.0, None, long_ago)[1]

    def save(self) -> None:
        self.saved_step, self.saved_at = self.step, time.monotonic()
        generators = {k: distributed.stack_over_ranks(t, self.world) for k, t in rng_tensors().items()}
        if not self.world.is_main:
            return
        saved = Checkpoint()
        saved.add("model", self.modules.state_dict())
        saved.add("optimizer", optimizer_tensors(self.optimizer, self.named))
        saved.add("average", self.average.tensors if self.average else {})
        saved.add("best", self.best_tensors)
        saved.add("generators", generators)
        saved.state = {
            "digest": self.digest,
            "step": self.step,
            "epochs_done": self.epochs_done,
            "best": self.best,
            "sums": self.sums,
            "summed": self.summed,
            "seconds": self.seconds,
            "precision": self.precision,
            "history": self.history,
        }
        self.folder.save(self.step, saved)

    def start_or_resume(self, seed: int) -> None:
        # The main process goes first: it may set a damaged file aside.
        saved = self.folder.load_newest() if self.world.is_main else None
        distributed.wait(self.world)
        saved = saved if self.world.is_main else self.folder.load_newest()
        self._agree_on_start(saved)
        seed_everything(seed + self.world.rank + (saved.state["step"] * self.world.size if saved else 0))
        if saved is None:
            distributed.copy_from_main(self.modules, self.world)
            if self.average:
                self.average = weight_average(self.named, self.settings, self.total)
            return
        self.folder.compare(saved.state, self.digest)
        try:
            self.modules.load_state_dict(saved.part("model"))
            load_optimizer(self.optimizer, self.named, saved.part("optimizer"))
        except (RuntimeError, ValueError, KeyError) as error:
            raise TrimtabError(
                f"the checkpoint in {self.folder.folder} does not fit these modules ({error}); it may be of another "
                "version of trimtab: delete the folder to start again"
            ) from error
        if self.average:
            for name, tensor in saved.part("average").items():
                self.average.tensors[name].copy_(tensor)
        state = saved.state
        before = state.get("precision", self.precision)  # checkpoints of 0.1 do not say it
        if before != self.precision and self.world.is_main:
            logger.warning(
                "the run was trained in %s so far and goes on in %s, as training.precision=auto follows the device: "
                "resume it on a device like the one before for the weights of a run that was never interrupted",
                before,
                self.precision,
            )
        self.step, self.epochs_done, self.history = state["step"], state["epochs_done"], state["history"]
        self.saved_step = self.step
        self.best, self.best_tensors = state["best"], saved.part("best")
        self.sums, self.summed, self.earlier_seconds = state["sums"], state["summed"], state["seconds"]
        generators = saved.part("generators")
        if len(generators["torch"]) == self.world.size:  # another number of ranks keeps the fresh seeds
            restore_rng({name: tensor[self.world.rank] for name, tensor in generators.items()})

    def _agree_on_start(self, saved: Checkpoint | None) -> None:
        step = torch.tensor([saved.state["step"] if saved else -1])
        if len(set(distributed.stack_over_ranks(step, self.world).flatten().tolist())) > 1:
            raise TrimtabError(
                f"the processes see different checkpoints in {self.folder.folder}; it must be on a disk they share"
            )

    def kept(self) -> str:
        if not self.folder.lasting:
            return "nothing of it is kept"
        files = self.folder.files()
        return f"the last checkpoint is {files[-1]}" if files else "no checkpoint was written yet"

    def start_again(self) -> str:
        if not self.folder.lasting:
            return "Start it again then."
        return f"A changed recipe needs another out=... or {self.folder.folder} deleted."


def _copy(modules: nn.Module) -> dict[str, Tensor]:
    left_out = _of_training_alone(modules)
    state = modules.state_dict().items()
    return {name: tensor.detach().cpu().clone() for name, tensor in state if name not in left_out}


def _of_training_alone(modules: nn.Module) -> set[str]:
    """Buffers that modules name in `of_training_alone`: a run needs them to go on, and they can be large."""
    return {
        f"{path}.{name}" if path else name
        for path, module in modules.named_modules()
        for name in getattr(module, "of_training_alone", ())
    }
