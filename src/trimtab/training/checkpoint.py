"""Checkpoints: all that a run needs to go on as if it had never stopped, in safetensors and JSON.

A checkpoint is one file, ``step-00000120.safetensors``: tensors by name, with a JSON document and a SHA-256
of everything in its header. It is written beside its name and renamed, so a kill leaves the old files; the
last two are kept, and when the newest is damaged the one before it loads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from trimtab.errors import RecipeError, TrimtabError
from trimtab.files import atomic_path, explain_disk_errors

_SCHEMA = 1


@dataclass
class Checkpoint:
    """Tensors by name and a JSON-ready document."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def add(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        self.tensors.update({f"{prefix}/{name}": tensor for name, tensor in tensors.items()})

    def part(self, prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}/"
        return {name.removeprefix(start): t for name, t in self.tensors.items() if name.startswith(start)}


class CheckpointFolder:
    """The checkpoints of one run, newest last.

    Attributes:
        lasting: whether they outlive the run, so that it can be resumed.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, lasting: bool = True) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.lasting = lasting

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this run; the operating system lets go even after kill -9.

        Raises:
            TrimtabError: another process holds it.
        """
        with explain_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise TrimtabError(
                    f"another run is training in {self.folder}; wait for it or choose another folder (out=...)"
                ) from None
        try:
            for leftover in self.folder.glob(".step-*.tmp"):
                leftover.unlink()
            yield
        finally:
            lock.release()

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))

    def save(self, step: int, checkpoint: Checkpoint) -> Path:
        """Write the checkpoint of `step`, then drop all but the last `keep`.

        Raises:
            TrimtabError: no space or no permission; earlier checkpoints are intact.
        """
        tensors = _apart(checkpoint.tensors)
        document = json.dumps({"schema": _SCHEMA, **checkpoint.state}, ensure_ascii=False)
        header = {"document": document, "sha256": _digest(tensors, document)}
        target = self.folder / f"step-{step:08d}.safetensors"
        with atomic_path(target) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata=header)
        for old in self.files()[: -self.keep]:
            with contextlib.suppress(OSError):  # what another program has open goes next time
                old.unlink()
        return target

    def load_newest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint, or None when there is none at all.

        A damaged file is renamed to ``*.damaged`` with a warning.

        Raises:
            TrimtabError: every checkpoint is damaged, or the newest is from a later version of trimtab.
        """
        files = self.files()
        for path in reversed(files):
            try:
                return read(path)
            except _Damaged as error:
                warnings.warn(f"checkpoint {path} is damaged ({error}); trying the one before it", stacklevel=2)
                with contextlib.suppress(OSError):
                    path.replace(path.with_name(path.name + ".damaged"))
        if files:
            raise TrimtabError(f"every checkpoint in {self.folder} is damaged; delete the folder to start again")
        return None

    def check(self, digest: str) -> None:
        """Refuse, before hours of work, what `compare` would refuse after them. Nothing is written.

        Raises:
            RecipeError: the newest undamaged checkpoint is of another digest.
        """
        for path in reversed(self.files()):
            try:
                state = _document(path)
                if state.get("digest") != digest:
                    state = read(path).state  # all of it: a digest that was damaged is not another one
            except _Damaged:
                continue
            return self.compare(state, digest)

    def compare(self, state: Mapping[str, Any], digest: str) -> None:
        """Refuse a checkpoint's state of another digest.

        Raises:
            RecipeError: with what can be done.
        """
        if state["digest"] != digest:
            raise RecipeError(
                f"{self.folder} holds a run of another recipe (step {state['step']}), of other data or of another "
                "base; undo the change to resume it, or keep it and choose another out=..., or delete that folder to "
                "start again"
            )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each with memory of its own, as the format wants it; copied only where that is not so already."""
    found, taken = {}, set()
    for name, tensor in tensors.items():
        one = tensor.detach().cpu().contiguous()
        place = one.untyped_storage().data_ptr()
        if place in taken or one.untyped_storage().nbytes() != one.nbytes:
            one = one.clone()
        taken.add(place)
        found[name] = one
    return found


class _Damaged(Exception):  # noqa: N818 - never leaves this module
    pass


def _document(path: Path) -> dict[str, Any]:
    """A checkpoint's document as its header has it, without its tensors."""
    try:
        with safetensors.safe_open(path, framework="pt") as stream:
            document: dict[str, Any] = json.loads((stream.metadata() or {})["document"])
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise _Damaged(str(error)) from error
    return document


def read(path: Path) -> Checkpoint:
    try:
        with safetensors.safe_open(path, framework="pt") as stream:
            header = stream.metadata() or {}
            # Copied: they are of a mapped file, which Windows lets nobody replace or delete.
            tensors = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118 - no mapping
        document = json.loads(header["document"])
        if header["sha256"] != _digest(tensors, header["document"]):
            raise _Damaged("its checksum does not match")
        schema = document.pop("schema")
    except PermissionError as error:
        raise TrimtabError(f"checkpoint {path} may not be read: permission denied") from error
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from error
    if schema > _SCHEMA:
        raise TrimtabError(f"checkpoint {path} is from a later version of trimtab; update trimtab to resume")
    return Checkpoint(tensors, document)


def _digest(tensors: Mapping[str, Tensor], document: str) -> str:
    digest = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- optimiser state


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Optimiser state as ``<parameter>/<key>`` -> tensor; rates and decays come from the recipe instead."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`; moments go to their parameter's device, counters stay on the CPU."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    state: dict[int, dict[str, Tensor]] = {}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(order):
        start = f"{names[id(parameter)]}/"
        found = {key.removeprefix(start): t.clone() for key, t in tensors.items() if key.startswith(start)}
        if found:
            state[index] = found
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ---------------------------------------------------------------------------------------- random numbers


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def own_generators() -> Iterator[None]:
    """Give the global generators back as they were: a notebook that trains has seeds of its own."""
    before = rng_tensors()
    try:
        yield
    finally:
        restore_rng(before)


def rng_tensors() -> dict[str, Tensor]:
    """States of the global generators as tensors of fixed shape; float64 for Gaussian spares, NaN for none."""
    _, words, spare = random.getstate()
    legacy: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = legacy
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position], dtype=torch.int64),
        "spares": torch.tensor(
            [torch.nan if spare is None else spare, cached if has_gauss else torch.nan], dtype=torch.float64
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Inverse of `rng_tensors`."""
    python_spare, numpy_spare = states["spares"].tolist()
    words = tuple(states["python"].tolist())
    random.setstate((3, words, None if math.isnan(python_spare) else python_spare))
    *keys, position = states["numpy"].tolist()
    has_gauss = not math.isnan(numpy_spare)
    cached = numpy_spare if has_gauss else 0.0
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, int(has_gauss), cached))
    # Copied: PyTorch reads a row of several ranks' states at the wrong place, which can crash it.
    torch.set_rng_state(states["torch"].clone())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].clone())
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"].clone())
