"""What a training step of the domain link costs: beside LoRA with `peft`, beside the step without a cache, beside all
weights, and beside what its arithmetic alone would take.

    python benchmarks/domain_speed.py

Each row runs in a process of its own, on the same random pictures with the settings of `recipes/domain-grocery.yaml`. A
step is forward, backward and update for one batch, from the states below the lowest trained layer; "no cache" begins at
the pixels. Decoding pictures is left out everywhere. LoRA is once in the layers that have adapters, at a rank that
makes it as large as they are, and once at the recipe's `lora.targets`, the baseline of `domain.py`: in those layers and
in the attention of the text tower, which the adapters leave alone, so that part of its step is work that they do not
have.

The floor is the step's FLOPs over the rate of a large matrix product on the same threads. No step can reach it: a third
of the layers are depthwise convolutions, which move more numbers than they multiply.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from domain import ROWS as METHOD_ROWS
from domain_study import WIDER_LORA
from torch.utils.flop_counter import FlopCounterMode

from trimtab.config import DomainRecipe, load_recipe
from trimtab.files import write_text
from trimtab.objectives.memory_bank import MemoryBank, global_difficulty
from trimtab.precision import fast_training, has_fast_bf16, tune_allocator
from trimtab.recipes.domain_methods import METHODS, Method
from trimtab.tasks.domain import DomainTask, Side
from trimtab.towers.hf import load_base
from trimtab.towers.map_views import NUMBERS
from trimtab.training.optimiser import make_optimizer, trainable

RECIPE = Path(__file__).parents[1] / "recipes" / "domain-grocery.yaml"
CLASSES = 81


class Row(NamedTuple):
    """What is measured: `cached` where the states below the lowest trained layer are given."""

    title: str
    method: str
    cached: bool
    changes: tuple[str, ...] = ()


ROWS = {
    "adapter": Row("Adapters, cached", "adapter", cached=True),
    "lora_same": Row("LoRA by peft in the same layers, cached", "lora", cached=True, changes=WIDER_LORA),
    "lora": Row("LoRA by peft, as compared with, cached", "lora", cached=True),
    "adapter_uncached": Row("Adapters, no cache", "adapter", cached=False),
    "lora_same_uncached": Row("LoRA by peft in the same layers, no cache", "lora", cached=False, changes=WIDER_LORA),
    "lora_uncached": Row("LoRA by peft, as compared with, no cache", "lora", cached=False),
    "full": Row("All weights", "full", cached=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--steps", type=int, default=5, help="measured, after one that is not")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/domain_speed.json"))
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.recipe, arguments.steps)))
        return
    found = {}
    for row in arguments.rows.split(","):
        command = [sys.executable, __file__, "--one", row, "--recipe", str(arguments.recipe)]
        command += ["--steps", str(arguments.steps)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[row] = json.loads(done.stdout.splitlines()[-1])
        print(row, found[row], flush=True)
    facts = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "fast_bf16": has_fast_bf16(torch.device("cpu")),
    }
    write_text(arguments.out, json.dumps({"rows": found, **facts}, indent=2) + "\n")
    write_text(arguments.out.with_suffix(".md"), table(found))
    print(table(found))


def measure(row: str, path: Path, steps: int) -> dict[str, Any]:
    """Times and memory of one row."""
    tune_allocator()
    torch.manual_seed(0)
    _, name, cached, own = ROWS[row]
    # The methods of others know no bank, so no captions but the batch's pass through their text tower.
    changes = METHOD_ROWS["adapter_hard" if name == "adapter" else name]
    recipe = load_recipe(path, ["data.train=train.csv", *changes, *own])
    assert isinstance(recipe, DomainRecipe)
    base = load_base(recipe.base, device="cpu")
    method = METHODS[name](base, recipe)
    size = recipe.training.batch_size
    pixels = base.preprocess(_grey())
    pixels = {key: torch.rand(size, *one.shape[1:]) for key, one in pixels.items()}
    task = make_task(recipe, method, pixels, cached=cached)
    parameters = trainable(task)
    optimiser = make_optimizer(parameters, recipe.training)
    batch = np.arange(size), np.zeros(size, int), np.zeros((size, NUMBERS))

    def step() -> None:
        with method.at_work():
            with fast_training(recipe.training.precision, base.device):
                loss = torch.stack([*task.step(batch).values()]).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()

    step()
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: backward_flops}
    ) as counter:
        step()
    seconds = []
    for _ in range(steps):
        clock = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - clock)
    return {
        "seconds": min(seconds),
        "trained_parameters": method.trained_parameters,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "batch_size": size,
        "flops": counter.get_total_flops(),
        "matrix_rate_flops": matrix_rate(),
    }


def backward_flops(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[Any]
) -> int:
    """Of the backward pass of a convolution: as many for the input as for the weights, as in the forward pass.

    PyTorch's own count takes the groups of a depthwise convolution for connected.
    """
    once = 2 * math.prod(gradient) * math.prod(weight[1:])
    return once * sum(one is not None for one in out_shape[:2])


def matrix_rate(repeats: int = 10, size: int = 1536) -> float:
    """FLOP per second of the fastest of several large products, in bf16 where the machine is fast in it."""
    kind = torch.bfloat16 if has_fast_bf16(torch.device("cpu")) else torch.float32
    a, b = (torch.randn(size, size).to(kind) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        clock = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - clock)
    return 2 * size**3 / min(seconds)


def make_task(recipe: DomainRecipe, method: Method, pixels: dict[str, torch.Tensor], *, cached: bool) -> DomainTask:
    """A training step on pictures that need no decoding; one caption for each of as many classes as grocery has."""
    base, size = method.base, recipe.training.batch_size
    captions = [f"a photo of product {number}" for number in range(CLASSES)]
    image_cut, text_cut = method.cut("image"), method.cut("text")
    tokens = base.text_inputs(captions)

    def tokens_of(items: np.ndarray) -> dict[str, torch.Tensor]:
        return {name: one[items] for name, one in tokens.items()}

    below = image_cut.lower(pixels) if image_cut and cached else {}
    states = text_cut.lower(tokens) if text_cut else {}

    def pictures(items: np.ndarray, views: np.ndarray, numbers: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        if image_cut is None:
            return pixels
        return dict(below) if cached else image_cut.lower(pixels)

    def texts(items: np.ndarray, views: np.ndarray, numbers: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        return {name: one[items] for name, one in states.items()} if text_cut else tokens_of(items)

    image = Side(base, "image", image_cut, pictures, head=method.head("image"))
    text = Side(base, "text", text_cut, texts, tokens_of, head=method.head("text"))
    caption_of = np.arange(size) % CLASSES
    numbers = torch.from_numpy(caption_of)
    with torch.no_grad():
        embeddings = base.token_features(tokens)
        difficulty = global_difficulty(torch.randn(size, embeddings.shape[1]), embeddings, numbers, logit_scale=50.0)
    return DomainTask(
        method,
        image=image,
        text=text,
        image_of=np.arange(size),
        caption_of=caption_of,
        belong=lambda images, texts: caption_of[images][:, None] == texts[None],
        objective=recipe.objective,
        bank=MemoryBank(recipe.bank, numbers, embeddings, difficulty, logit_scale=50.0),
        logit_scale=50.0,
    )


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| Step | seconds | of adapters, cached | GFLOP | times the floor | peak memory, MB | trained |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    reference = found.get("adapter", {}).get("seconds")
    for row, one in found.items():
        times = f"{one['seconds'] / reference:.2f}" if reference else "–"
        floor = one["flops"] / one["matrix_rate_flops"]
        lines.append(
            f"| {ROWS[row].title} | {one['seconds']:.2f} | {times} | {one['flops'] / 1e9:,.0f} | "
            f"{one['seconds'] / floor:.1f} | {one['peak_megabytes']:,.0f} | {one['trained_parameters']:,} |"
        )
    size = next(iter(found.values()))["batch_size"]
    fastest = max(one["matrix_rate_flops"] for one in found.values()) / 1e9
    note = (
        f"Batches of {size}; the fastest of several steps, as the machine may have other work. "
        f"Floor: matrix products at {fastest:,.0f} GFLOP/s at most, measured beside each row."
    )
    return "\n".join([*lines, "", note]) + "\n"


def _grey() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64), (128, 128, 128))


if __name__ == "__main__":
    main()
