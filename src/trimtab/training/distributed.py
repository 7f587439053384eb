"""Several processes: who is there, which part of a batch is whose, and the sums between them.

Data parallelism by hand rather than by DistributedDataParallel, because the step is any callable: each
process takes its slice of the global batch and the gradients are averaged after backward. For losses that
are means over rows, N processes with B / N rows each take the same steps as one process with B.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from trimtab.errors import TrimtabError
from trimtab.files import digest_of
from trimtab.precision import resolved_precision

logger = logging.getLogger(__name__)

_TORCHRUN = "torchrun --nproc_per_node {n} --no-python trimtab adapt RECIPE.yaml"
_LONGEST_WAIT = timedelta(days=7)
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # where Accelerate looks
# What the configuration of ``accelerate launch`` leaves in the environment.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_MIXED_PRECISION": "fp8",
}
_IGNORED = {"ACCELERATE_USE_FSDP": ("true",), "ACCELERATE_MIXED_PRECISION": ("fp16", "bf16")}


@dataclass(frozen=True)
class World:
    """The processes of a run, as seen from one of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def make_accelerator(*, cpu: bool = False) -> Accelerator:
    """Accelerate on the GPU of this process, or on the CPU (gloo between processes) when there is none.

    Args:
        cpu: take the CPU in any case.

    Raises:
        TrimtabError: the environment speaks of several processes and does not say where they meet, or asks for a way of
            training that is not Trimtab's.
    """
    check_launcher(os.environ)
    found = next((name for name in _SIZES if os.environ.get(name, "").isdigit()), None)
    size = os.environ[found] if found else ""  # before Accelerate sets WORLD_SIZE from the others
    joined = dist.is_available() and dist.is_initialized() and not _made
    # The first process measures alone, for as long as that takes; of a process that dies the others hear at once.
    patient = InitProcessGroupKwargs(timeout=_LONGEST_WAIT)
    try:
        accelerator = Accelerator(cpu=cpu or not torch.accelerator.is_available(), kwargs_handlers=[patient])
    except ValueError as error:
        if found is None or "MASTER_ADDR" in os.environ:
            raise
        # As a cluster's scheduler leaves it to a program that was started without the launcher.
        raise TrimtabError(
            f"{found} asks for {size} processes, but MASTER_ADDR is not set, so they cannot meet; start it with: "
            f"{_TORCHRUN.format(n=size)}, or unset {found}"
        ) from error
    if not joined:
        _made.append(accelerator.num_processes)
    elif accelerator.num_processes > 1 and accelerator.is_main_process:
        logger.warning(
            "the process group was made before trimtab, so its own timeout ends the run if one process works alone for "
            "longer (encoding, reports): make it with timeout=timedelta(days=7), or let trimtab.adapt make it"
        )
    atexit.register(_leave_gloo)
    return accelerator


_made: list[int] = []  # sizes of the process groups that were made here, so with `_LONGEST_WAIT`


def check_launcher(environment: Mapping[str, str]) -> None:
    """Refuse what the configuration of ``accelerate launch`` asks for and would fail; warn of what changes nothing.

    Raises:
        TrimtabError: with the variable.
    """
    for name, value in _REFUSED.items():
        if environment.get(name, "").lower() == value:
            raise TrimtabError(
                f"{name}={environment[name]} is set, which trimtab does not train with: unset it, or start it with: "
                f"{_TORCHRUN.format(n=environment.get('WORLD_SIZE', '2'))}"
            )
    for name, values in _IGNORED.items():
        if environment.get(name, "").lower() in values and environment.get("RANK", "0") == "0":
            logger.warning(
                "%s=%s changes nothing here: training.precision says in what is trained, and each process holds all of "
                "the model",
                name,
                environment[name],
            )


@contextlib.contextmanager
def explain_lost_processes() -> Iterator[None]:
    """Say of a message between processes that failed what it most likely means.

    Raises:
        TrimtabError: in place of the error of torch.
    """
    try:
        yield
    except RuntimeError as error:
        if not dist.is_available() or not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
            raise
        reason = " ".join(str(error).split())[:400]
        if "EADDRINUSE" in reason:
            raise TrimtabError(
                f"MASTER_PORT={os.environ.get('MASTER_PORT')} is taken, so that the processes cannot meet there: give "
                f"another one to all of them ({reason})"
            ) from error
        raise TrimtabError(
            "another process of this run ended or does not answer: look at its message, which may stand above, and "
            f"start the same command again to resume ({reason})"
        ) from error


def _leave_gloo() -> None:
    """End gloo's threads: a process that exits with them running is aborted now and then, after all was done."""
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_backend() == "gloo":
        group.destroy_process_group()


def checked_world(accelerator: Accelerator, requested: int | None = None) -> World:
    """The processes that an accelerator found, after checking that it is the number that was asked for.

    Raises:
        TrimtabError: as `announce_world`.
    """
    world = World(accelerator.process_index, accelerator.num_processes, accelerator.device)
    check_world(world.size, requested, os.environ)
    return world


def announce_world(requested: int | None = None, accelerator: Accelerator | None = None) -> World:
    """Print how many processes train, after checking that it is the number that was asked for.

    ``accelerate launch --cpu --num_processes 2`` starts one process without a word; it does leave
    MASTER_ADDR in the environment, which gives it away.

    Args:
        requested: the number from the recipe, if it states one.

    Raises:
        TrimtabError: fewer or more processes run than `requested` or the launcher's environment says.
    """
    world = checked_world(accelerator or make_accelerator(), requested)
    if world.is_main:
        processes = "1 process" if world.size == 1 else f"{world.size} processes"
        print(f"training with {processes} on {world.device.type}", file=sys.stderr)
    return world


def check_world(actual: int, requested: int | None, environment: Mapping[str, str]) -> None:
    """Compare the number of processes with the recipe's and the launcher's; see `announce_world`."""
    claims: list[tuple[str, int]] = []
    if requested is not None:
        claims.append(("training.processes", requested))
    for name in ("WORLD_SIZE", "ACCELERATE_NUM_PROCESSES"):
        if environment.get(name, "").isdigit():
            claims.append((name, int(environment[name])))
    for source, claimed in claims:
        if claimed != actual:
            remedy = f"start it with: {_TORCHRUN.format(n=claimed)}"
            if claimed == 1:
                remedy = "start it without a launcher" + ("" if source.isupper() else f", or set {source}")
            raise TrimtabError(f"{source} asks for {claimed} processes but {actual} run; {remedy}")
    launched = "ACCELERATE_USE_CPU" in environment or "ACCELERATE_MIXED_PRECISION" in environment
    if actual == 1 and launched and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise TrimtabError(
            "accelerate launch was asked for several processes but started one (it does so with --cpu); "
            f"start it with: {_TORCHRUN.format(n=2)}"
        )


def check_alike(digest: str, world: World) -> None:
    """Refuse ranks that would train on different things, such as copies of the data on several machines.

    Args:
        digest: of recipe, data and models.

    Raises:
        TrimtabError: it differs; on all ranks.
    """
    number = int(digest_of(digest)[:15], 16)  # what fits into a tensor of 64 bits with a sign
    numbers = stack_over_ranks(torch.tensor(number), world).tolist()
    if others := [rank for rank, one in enumerate(numbers) if one != numbers[0]]:
        raise TrimtabError(
            f"process {others[0]} reads another recipe, other data or other models than process 0: give every machine "
            "the same files, or one place that all of them see"
        )


def agreed_precision(asked: str, world: World) -> str:
    """``bf16`` or ``fp32``, the same on all ranks: `asked` is a recipe's `training.precision`, and ``auto`` takes bf16
    where it is fast for all of them."""
    own = resolved_precision(asked, world.device)
    fast = stack_over_ranks(torch.tensor(own == "bf16"), world)
    if fast.any() == fast.all():
        return own
    if world.is_main:
        logger.warning(
            "bf16 is fast on some of the processes' devices only, so all train in fp32; each encodes in the precision "
            "of its own device: start as many on devices of one kind for exact results"
        )
    return "fp32"


def check_alone(what: str, environment: Mapping[str, str]) -> None:
    """Refuse a launcher's further processes where each would do, and write, the whole of the work.

    Args:
        what: runs in one process.

    Raises:
        TrimtabError: there are several.
    """
    size = environment.get("WORLD_SIZE", "")
    if size.isdigit() and int(size) > 1:
        raise TrimtabError(f"{what} in one process, but {size} were started: start it without torchrun")


def rank_slice(batch: Any, rank: int, size: int) -> tuple[Any, float]:
    """This rank's part of a global batch and its weight in the mean over ranks.

    The weight is rows here * size / rows in all, so that the mean over ranks of weight * (mean over rows)
    is the mean over all rows even when they do not divide evenly. With fewer rows than ranks, every rank
    takes all of them.

    Args:
        batch: anything that can be sliced (tensor, array, list), or a dict or tuple of such things of one
            length.

    Raises:
        ValueError: parts of different lengths.
    """
    if size == 1:
        return batch, 1.0
    count = _rows(batch)
    if count < size:
        return batch, 1.0
    start, stop = count * rank // size, count * (rank + 1) // size
    return _cut(batch, start, stop), (stop - start) * size / count


def _rows(batch: Any) -> int:
    parts: Sequence[Any] = (
        list(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else [batch]
    )
    counts = {len(part) for part in parts}
    if len(counts) != 1:
        raise ValueError(f"the parts of a batch must have one length to be split, not {sorted(counts)}")
    return counts.pop()


def _cut(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, Mapping):
        return {key: part[start:stop] for key, part in batch.items()}
    if isinstance(batch, tuple):
        return tuple(part[start:stop] for part in batch)
    return batch[start:stop]


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Replace every gradient by its mean over ranks, in one message; no gradient counts as zero."""
    if world.size == 1:
        return
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in parameters])
    dist.all_reduce(flat)
    flat /= world.size
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def average(values: Tensor, world: World) -> Tensor:
    """Mean over ranks of a small tensor; NaN on one rank is NaN on all."""
    if world.size == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world.size


def gather_rows(tensor: Tensor, world: World) -> Tensor:
    """The rows of all ranks in rank order, with gradient: (n, ...) on each rank -> (sum of n, ...) on every rank.

    For losses over the global batch. **The rule:** every rank computes the same loss from the gathered rows, as one
    process would from its whole batch, and returns it as it is. Then the gradient after `average_gradients` is the
    one of a single process: the shares of `rank_slice` sum to ``size``; backward here adds up what all ranks' losses,
    each times its share, want of a row, which is ``size`` times the gradient; the mean over ranks takes that factor
    away again. A parameter used after gathering (a learned logit_scale), or in rows that every rank computes alike
    (hard negatives), gets share times its gradient on each rank, and the mean is right as well. So nothing else
    may be scaled by the number of processes, and each rank must not take the mean over its own rows alone.

    Every rank must call this in the same order and use the result in its loss. Numbers of rows may differ. With
    fewer rows than ranks, where `rank_slice` gives all rows to each, every row comes ``size`` times: gradients of
    contrastive terms stay the same.

    Written as an autograd function over the two basic collectives, because torch's own differentiable one changed
    its place and name between the versions supported here.

    Raises:
        ValueError: ranks that disagree in the shape or dtype of a row or on whether there is a gradient, on all of
            them.
    """
    if world.size == 1:
        return tensor
    with_gradient = tensor.requires_grad and torch.is_grad_enabled()
    kind = zlib.crc32(str(tensor.dtype).encode())
    facts = torch.tensor([len(tensor), tensor.shape[1:].numel(), with_gradient, kind])
    told = stack_over_ranks(facts, world)  # (size, 4)
    # A rank without the backward of the others would leave them waiting for ever: find it here.
    if (told[:, 1:] != told[0, 1:]).any():
        kinds = f"; in {tensor.dtype} here, not everywhere" if (told[:, 3] != kind).any() else ""
        raise ValueError(
            f"ranks gather different rows: (rows, numbers in each, with gradient) = {told[:, :3].tolist()}{kinds}"
        )
    return _GatherRows.apply(tensor, told[:, 0].tolist(), world.rank)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        # Sums of halves lose digits.
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total)
        start = sum(ctx.counts[: ctx.rank])
        return total[start : start + ctx.counts[ctx.rank]].to(gradient.dtype), None, None


def wait(world: World) -> None:
    """Go on when every rank is here."""
    if world.size > 1:
        dist.barrier()


@torch.no_grad()
def copy_from_main(modules: nn.Module, world: World) -> None:
    """Give every rank the main process's parameters and buffers."""
    if world.size > 1:
        for tensor in [*modules.parameters(), *modules.buffers()]:
            dist.broadcast(tensor.detach(), src=0)


def stack_over_ranks(tensor: Tensor, world: World) -> Tensor:
    """(...) on each rank -> (size, ...) on every rank, on the CPU; rank by rank."""
    if world.size == 1:
        return tensor[None].cpu()
    parts = [torch.empty_like(tensor, device=world.device) for _ in range(world.size)]
    dist.all_gather(parts, tensor.to(world.device).contiguous())
    return torch.stack(parts).cpu()
