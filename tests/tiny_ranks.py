"""Work that several ranks do together and one process does alone, for tests to compare.

As a script, which `run_ranks` starts once per rank: ``python tiny_ranks.py JOB FOLDER``.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab import precision
from trimtab.config import ContrastiveConfig, MemoryBankConfig, TrainingConfig
from trimtab.data.sampling import draw_hard_epoch, pairs_per_epoch
from trimtab.errors import Interrupted, TrimtabError
from trimtab.objectives.contrastive import contrastive_terms, unique_rows
from trimtab.objectives.memory_bank import MemoryBank, global_difficulty
from trimtab.training import distributed, train
from trimtab.training.distributed import (
    World,
    agreed_precision,
    announce_world,
    average_gradients,
    check_alike,
    gather_rows,
    make_accelerator,
    rank_slice,
)

ALONE = World(0, 1, torch.device("cpu"))
PAIRS, CAPTIONS = 24, 6
CAPTION_OF = torch.arange(PAIRS) % CAPTIONS
GROUP_OF = torch.arange(PAIRS) % 8


def run_ranks(jobs: str, folder: Path, size: int = 2) -> dict[str, list[dict[str, Tensor]]]:
    """Each rank's results of the jobs, whose names have commas between them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, jobs, str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * size, errors
    return {job: [load_file(folder / f"{job}-{rank}.safetensors") for rank in range(size)] for job in jobs.split(",")}


# -- gathering


def gather(world: World, folder: Path) -> dict[str, Tensor]:
    """Rows of several kinds, 3 on the first rank and 1 on the second; and what disagreement raises."""
    count = 3 - 2 * world.rank
    rows = torch.arange(count * 2.0).reshape(count, 2) + 10 * world.rank
    leaf = rows.clone().requires_grad_()
    gathered = gather_rows(leaf, world)
    # A loss that differs between ranks: each row's gradient must be the sum of what the ranks want.
    (gathered * torch.arange(1.0, 5)[:, None] * (world.rank + 1)).sum().backward()
    assert leaf.grad is not None
    half = torch.ones(count, 2, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(half, world).sum().backward()
    assert half.grad is not None
    empty = gather_rows(rows[: count if world.is_main else 0], world)
    with torch.no_grad():
        quiet = gather_rows(leaf, world)
    messages = []
    for odd in (torch.zeros(2, 2 + world.rank), torch.zeros(2, 2, requires_grad=world.is_main)):
        try:
            gather_rows(odd, world)
        except ValueError as error:
            messages.append(str(error))
    return {
        "rows": gathered.detach(),
        "gradient": leaf.grad,
        "half_gradient": half.grad,
        "numbers": gather_rows(torch.arange(count) + 100 * world.rank, world),
        "flags": gather_rows(torch.full((count,), world.is_main), world),
        "empty": empty,
        "quiet": torch.tensor([quiet.requires_grad, gathered.requires_grad]),
        "messages": torch.tensor(list("\n".join(messages).encode()), dtype=torch.uint8),
    }


# -- two towers


@dataclass(frozen=True)
class Case:
    """A batch and an objective."""

    rows: int = 8
    objective: ContrastiveConfig = ContrastiveConfig()  # noqa: RUF009 - frozen
    weighted: bool = False
    grouped: bool = False
    negatives: tuple[int, ...] = ()


CASES = {
    "plain": Case(),
    "uneven": Case(rows=7, weighted=True),
    "weighted": Case(weighted=True, objective=ContrastiveConfig(label_smoothing=0.1)),
    "several captions": Case(rows=16, grouped=True),
    "hard negatives": Case(rows=5, negatives=(5,)),
    "one direction": Case(objective=ContrastiveConfig(image_to_text=0, text_to_image=2)),
    "fewer rows than ranks": Case(rows=1, negatives=(3, 4)),
}


class TwoTowers(nn.Module):
    """Trains as a task must: each rank encodes its rows, and all compute the loss of the global batch."""

    def __init__(self, world: World, case: Case) -> None:
        super().__init__()
        self.world, self.case = world, case
        generator = torch.Generator().manual_seed(0)
        self.pictures = torch.randn(PAIRS, 5, generator=generator)
        self.texts = torch.randn(CAPTIONS, 3, generator=generator)
        torch.manual_seed(1)
        self.image_tower = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.text_tower = nn.Linear(3, 4)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def step(self, indices: Tensor) -> dict[str, Tensor]:
        own_ids, _ = unique_rows(CAPTION_OF[indices])
        images = gather_rows(self.image_tower(self.pictures[indices]), self.world)
        texts = gather_rows(self.text_tower(self.texts[own_ids]), self.world)
        ids, first = unique_rows(gather_rows(own_ids, self.world))
        rows = gather_rows(indices, self.world)
        texts = texts[first]
        if self.case.negatives:
            extra = torch.tensor(self.case.negatives)
            ids, texts = torch.cat([ids, extra]), torch.cat([texts, self.text_tower(self.texts[extra])])
        own = (CAPTION_OF[rows, None] == ids).float()  # (B, T)
        groups = GROUP_OF[rows] if self.case.grouped else CAPTION_OF[rows]
        positives = (groups[:, None] == groups).float() @ own > 0  # all captions of a group belong to each of its rows
        weights = 1 + rows.float() / 3 if self.case.weighted else None
        return contrastive_terms(images, texts, positives, self.log_scale.exp(), self.case.objective, weights=weights)


def gradients(world: World, folder: Path) -> dict[str, Tensor]:
    """What `average_gradients` leaves of every case."""
    found: dict[str, Tensor] = {}
    for name, case in CASES.items():
        model = TwoTowers(world, case)
        batch = torch.arange(case.rows) * 5 % PAIRS  # captions come on both ranks
        if case.negatives:
            batch = torch.arange(case.rows)  # without the captions that are negatives
        part, share = rank_slice(batch, world.rank, world.size)
        loss = sum(model.step(part).values(), torch.zeros(()))
        (loss * share).backward()
        average_gradients(list(model.parameters()), world)
        found[f"{name}/loss"] = loss.detach()
        found |= {f"{name}/{key}": p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return found


def trained(world: World, folder: Path) -> dict[str, Tensor]:
    """Weights after three epochs of the training loop."""
    model = TwoTowers(world, Case(rows=12, weighted=True))
    train(
        model.step,
        model,
        lambda epoch: torch.tensor(np.random.default_rng(epoch).permutation(PAIRS)).split(12),
        steps_per_epoch=2,
        settings=TrainingConfig(epochs=3, batch_size=12, learning_rate=0.02, precision="fp32", trackers=()),
        checkpoint_dir=folder / f"run-{world.size}",
        digest="ranks",
        show_progress=False,
    )
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unlike(world: World, folder: Path) -> dict[str, Tensor]:
    """What a rank with other data hears, and the others."""
    check_alike("the same", world)
    try:
        check_alike(f"data of {world.rank}", world)
    except TrimtabError as error:
        return {"message": torch.tensor(list(str(error).encode()), dtype=torch.uint8)}
    raise AssertionError("ranks with different data went on")


def unlike_devices(world: World, folder: Path) -> dict[str, Tensor]:
    """What is trained in where bf16 is fast for the first rank alone, and what rows in two precisions raise."""
    precision.has_fast_bf16 = lambda device: world.is_main  # type: ignore[assignment]
    found = [agreed_precision(asked, world) for asked in ("auto", "bf16", "fp32")]
    precision.has_fast_bf16 = lambda device: True  # type: ignore[assignment]
    found.append(agreed_precision("auto", world))
    try:
        gather_rows(torch.zeros(2, 2, dtype=torch.bfloat16 if world.is_main else torch.float32), world)
    except ValueError as error:
        found.append(str(error))
    return {"found": torch.tensor(list("\n".join(found).encode()), dtype=torch.uint8)}


def joined(world: World, folder: Path) -> dict[str, Tensor]:
    """What is said of a process group that was made before."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("trimtab").addHandler(handler)
    make_accelerator()  # of this group, which was made here too
    assert not said
    distributed._made.clear()
    make_accelerator()
    return {"said": torch.tensor(list("\n".join(said).encode()), dtype=torch.uint8)}


def stopped(world: World, folder: Path) -> dict[str, Tensor]:
    """What each rank says when one of them is asked to stop in the second step."""
    model = TwoTowers(world, Case(rows=12))
    steps = 0

    def step(indices: Tensor) -> dict[str, Tensor]:
        nonlocal steps
        steps += 1
        if steps == 2 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return model.step(indices)

    try:
        train(
            step,
            model,
            lambda epoch: torch.arange(PAIRS).split(12),
            steps_per_epoch=2,
            settings=TrainingConfig(epochs=3, batch_size=12, precision="fp32", trackers=()),
            checkpoint_dir=folder / f"stopped-{world.size}",
            digest="ranks",
            show_progress=False,
        )
    except Interrupted as error:
        return {"told": torch.tensor(error.told), "message": torch.tensor(list(str(error).encode()), dtype=torch.uint8)}
    raise AssertionError("it was not heard")


# -- the memory bank


def bank(world: World, folder: Path) -> dict[str, Tensor]:
    """Two epochs of a bank whose features move, and what is drawn by it."""
    generator = torch.Generator().manual_seed(2)
    images, texts = torch.randn(PAIRS, 4, generator=generator), torch.randn(CAPTIONS, 4, generator=generator)
    config = MemoryBankConfig(gamma=2.0, epoch_share=0.7, importance=0.5, instance_weight=0.5)
    base = global_difficulty(images, texts, CAPTION_OF, logit_scale=5.0)
    held = MemoryBank(config, CAPTION_OF, texts, base, logit_scale=5.0)
    drawn = pairs_per_epoch(PAIRS, config.epoch_share, 5)  # an odd batch: ranks have two and three rows
    order = []
    for epoch in range(2):
        probability = held.start_epoch(epoch, drawn).numpy()
        for batch in draw_hard_epoch(probability, share=config.epoch_share, batch_size=5, seed=0, epoch=epoch):
            order.append(torch.tensor(batch))
            part, _ = rank_slice(torch.tensor(batch), world.rank, world.size)
            ids, _ = unique_rows(CAPTION_OF[part])
            held.update(
                *(gather_rows(tensor, world) for tensor in (part, images[part] + 0.1 * epoch)),
                *(gather_rows(tensor, world) for tensor in (ids, texts[ids] - 0.1 * (1 + epoch))),
            )
    return {**held.state_dict(), "order": torch.cat(order), "negatives": held.hard_negatives(order[-1][:1], 3)}


JOBS: dict[str, Callable[[World, Path], dict[str, Tensor]]] = {
    "gather": gather,
    "gradients": gradients,
    "trained": trained,
    "bank": bank,
    "unlike": unlike,
    "stopped": stopped,
    "unlike_devices": unlike_devices,
    "joined": joined,
}


if __name__ == "__main__":
    here = announce_world(accelerator=make_accelerator())
    try:
        for job in sys.argv[1].split(","):
            results = {name: tensor.contiguous() for name, tensor in JOBS[job](here, Path(sys.argv[2])).items()}
            save_file(results, Path(sys.argv[2]) / f"{job}-{here.rank}.safetensors")
        dist.barrier()  # none leaves before the others are done, as in `trimtab.recipes.adapt`
    finally:
        dist.destroy_process_group()  # gloo's threads end the process if they outlive it
