"""The language link beside sentence-transformers: the same pairs, student, teacher vectors and validation pairs.

    python benchmarks/language.py --minutes 12 --tuned-epochs 10

These are the options of the committed tables, whose `cold` and `warm` are of a second call, with `--peers` and nothing
behind it.

Every contestant runs alone in a process of its own, one after another. The clock starts once models are loaded, counts
the encoding of the teacher's vectors (and, for Trimtab, of the student's token states) and stops during evaluation.

- `make_multilingual`: sentence-transformers with the settings of its example script of that name: MSE, both languages,
  batches of 64, learning rate 2e-5, 10% warm-up, every weight of the student trained.
- `tuned`: the same with what serves it better here: translations alone (half the work per pair), cosine distance, a
  higher learning rate and more epochs (both options), bf16 and plain attention where the processor has fast bf16.
- `cold` and `warm`: Trimtab's recipe without and with the cache of frozen features.

Compares each contestant's translation match over time, throughput and peak memory, and Trimtab's later epochs with
their arithmetic floor: the adapter's FLOPs over the rate of plain matrix products of the same shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from language_tables import as_markdown, compare, show

ROOT = Path(__file__).parents[1]
PEERS: dict[str, dict[str, Any]] = {
    "make_multilingual": {"distance": "mse", "english": True, "tuned": False},
    "tuned": {"distance": "cosine", "english": False, "tuned": True},
}


@dataclass
class Settings:
    """What the contestants share; the fields are the command line's."""

    pairs: int = 5000
    validation: int = 500
    minutes: float = 10.0
    every: int = 20
    tuned_rate: float = 2e-4
    tuned_epochs: int = 20
    epochs: int = 20
    recipe: str = str(ROOT / "recipes" / "language-zh.yaml")
    base: str | None = None
    seed: int = 0
    change: list[str] = field(default_factory=list)


@dataclass
class Clock:
    """Seconds that count, and the match reached at each evaluation."""

    points: list[dict[str, float]] = field(default_factory=list)
    total: float = 0.0
    running_since: float | None = None

    def start(self) -> None:
        self.running_since = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.total + (time.perf_counter() - self.running_since if self.running_since is not None else 0.0)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        self.total, self.running_since = self.seconds, None
        yield
        self.start()

    def mark(self, pairs: float, match: float) -> None:
        self.points.append({"seconds": self.seconds, "pairs": pairs, "match": match})
        print(f"  {self.seconds:8.1f} s  {pairs:10,.0f} pairs  match {match:5.1f}", flush=True)


# -------------------------------------------------------------------------------------------- contestants


def recipe_for(settings: Settings, folder: Path) -> Any:
    """The recipe on the benchmark's pairs; what the options do not name is as in the file."""
    from trimtab.config import load_recipe, recipe_from_mapping

    overrides = [
        f"data.train=[{folder / 'train.csv'}]",
        f"data.validation=[{folder / 'validation.csv'}]",
        f"data.validation_size={settings.validation}",
        "data.exclude=[]",
        "data.phrases=0",
        "data.templates=0",
        "data.epoch_pairs=null",
        f"training.epochs={settings.epochs}",
        "training.trackers=[]",
        f"seed={settings.seed}",
        *([f"base={settings.base}"] if settings.base else []),
        *settings.change,
    ]
    if Path(settings.recipe).exists():
        return load_recipe(settings.recipe, overrides)
    plain = {"link": "language", "data": {"train": ["cedict"]}, "objective": {"infonce": 1.0, "mse": 0.3}}
    return recipe_from_mapping(plain, "benchmark", overrides)


def write_pairs(settings: Settings, folder: Path) -> dict[str, int]:
    """Sample CC-CEDICT and set validation pairs aside; both sides of the comparison read these files."""
    from trimtab.config import LanguageData, TextSource
    from trimtab.recipes.sources import prepare

    source = TextSource("cedict", limit=settings.pairs + settings.validation)
    data = LanguageData((source,), validation_size=settings.validation, english_share=0.0)
    text = prepare(replace(recipe_for(settings, folder), data=data))
    for name, part in (("train", text.train), ("validation", text.validation)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["target", "english"])
            writer.writerows(zip(part.targets, part.english, strict=True))
    return {"pairs": len(text.train), "validation_pairs": len(text.validation)}


def read_pairs(path: Path) -> tuple[list[str], list[str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row["target"] for row in rows], [row["english"] for row in rows]


def run_peer(settings: Settings, folder: Path, name: str) -> dict[str, Any]:
    """sentence-transformers' embedding distillation, stopped after `minutes` or its epochs."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
    from transformers import TrainerCallback

    from trimtab.evaluation.matching import translation_match
    from trimtab.precision import fast_inference, has_fast_bf16
    from trimtab.towers.e5 import ensure_e5
    from trimtab.towers.hf import load_base

    peer = PEERS[name]
    rate, epochs = (settings.tuned_rate, settings.tuned_epochs) if peer["tuned"] else (2e-5, 5)
    started = time.perf_counter()
    base = load_base(settings.base or "starter")
    bf16 = peer["tuned"] and has_fast_bf16(base.device)
    student = SentenceTransformer(
        str(ensure_e5()), model_kwargs={"attn_implementation": "eager"} if bf16 else {}, device=str(base.device)
    )
    student.max_seq_length = 128
    loading = time.perf_counter() - started
    targets, english = read_pairs(folder / "train.csv")
    held_targets, held_english = read_pairs(folder / "validation.csv")

    def teach(texts: list[str]) -> np.ndarray:
        """Each text once, rounded as Trimtab's cache does."""
        place = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        with fast_inference(base.device):
            vectors = base.encode_text(list(place)).astype(np.float16).astype(np.float32)
        return vectors[[place[text] for text in texts]]

    held_vectors = teach(held_english)
    clock = Clock()
    clock.start()
    columns = {"english": english} if peer["english"] else {}
    dataset = Dataset.from_dict({**columns, "non_english": targets, "label": teach(english)})
    encoding = clock.seconds
    pairs_done: list[tuple[float, float]] = [(0.0, clock.seconds)]

    def evaluate() -> None:
        with clock.stopped():
            vectors = student.encode(held_targets, batch_size=64, show_progress_bar=False)
            match = translation_match(vectors, held_vectors, groups=held_english).accuracy
            clock.mark(pairs_done[-1][0], match)

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            evaluate()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            last = state.global_step >= state.max_steps
            over = clock.seconds > 60 * settings.minutes
            pairs_done.append((state.epoch * len(targets), clock.seconds))
            if last or over or state.global_step % settings.every == 0:
                evaluate()
            control.should_training_stop = last or over

    arguments = Arguments(
        output_dir=str(folder / "peer"),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=rate,
        warmup_steps=0.1,  # a share of all steps
        bf16=bf16,
        use_cpu=base.device.type == "cpu",
        save_strategy="no",
        logging_steps=100,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=settings.seed,
    )
    trainer = SentenceTransformerTrainer(
        model=student,
        args=arguments,
        train_dataset=dataset,
        loss=EmbedDistillLoss(student, distance_metric=peer["distance"]),
        callbacks=[Watch()],
    )
    trainer.train()
    training = clock.seconds - encoding
    first = [(pairs, at) for pairs, at in pairs_done if pairs <= len(targets)]
    # Warm-up of the processor and its libraries falls into the first steps; the rest is as fast in every epoch.
    steady = pairs_done[min(3, len(pairs_done) - 2) :]
    return {
        "points": clock.points,
        "loading_seconds": loading,
        "encoding_seconds": encoding,
        "training_seconds": training,
        "first_epoch_pairs_per_second": first[-1][0] / first[-1][1],
        "later_epoch_pairs_per_second": (steady[-1][0] - steady[0][0]) / (steady[-1][1] - steady[0][1]),
        "trained_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
        "precision": "bf16" if bf16 else "fp32",
        "peak_memory_mb": peak_memory(),
    }


def run_ours(settings: Settings, folder: Path, name: str) -> dict[str, Any]:
    """`trimtab adapt`, watched: the clock starts where encoding does and stops while it validates."""
    from trimtab.data.sampling import steps_per_epoch
    from trimtab.recipes import language
    from trimtab.recipes.adapt import adapt
    from trimtab.tasks.language import LanguageTask

    recipe = recipe_for(settings, folder)
    clock = Clock()
    began = time.perf_counter()
    seen: dict[str, Any] = {"validations": 0}
    real_encode, real_start, real_validate = language.encode, language.start_adapter, language.validate

    def encode(recipe: Any, text: Any, *towers: Any) -> Any:
        seen.update(text=text, loading=time.perf_counter() - began)
        batch = recipe.training.batch_size
        seen["pairs"] = batch * steps_per_epoch(recipe.data.epoch_pairs or len(text.train), batch)  # of one epoch
        clock.start()
        seen["frozen"] = real_encode(recipe, text, *towers)
        seen["encoding"] = clock.seconds
        return seen["frozen"]

    def start_adapter(adapter: Any, frozen: Any, *rest: Any) -> Any:
        standardiser = real_start(adapter, frozen, *rest)
        with clock.stopped():
            task = LanguageTask(adapter, standardiser, recipe.objective, mock.Mock())
            clock.mark(0, real_validate(task, frozen, seen["text"])["match"])
        return standardiser

    def validate(task: Any, frozen: Any, text: Any) -> dict[str, float]:
        seen.update(task=task, validations=seen["validations"] + 1)
        with clock.stopped():
            figures = real_validate(task, frozen, text)
            clock.mark(seen["validations"] * seen["pairs"], figures["match"])
        return figures

    watched: dict[str, Any] = {
        "encode": encode,
        "start_adapter": start_adapter,
        "validate": validate,
        # Towers stay where they are; features go where no earlier run left any.
        "cache_home": lambda: folder / "cache",
    }
    with mock.patch.multiple(language, **watched):
        adapt(replace(recipe, out=str(folder / name)))
    at = [point["seconds"] for point in clock.points]
    pairs = seen["pairs"]
    result = {
        "points": clock.points,
        "loading_seconds": seen["loading"],
        "encoding_seconds": seen["encoding"],
        "training_seconds": at[-1] - seen["encoding"],
        "first_epoch_pairs_per_second": pairs / at[1],
        "later_epoch_pairs_per_second": pairs * (len(at) - 2) / (at[-1] - at[1]) if len(at) > 2 else None,
        "trained_parameters": sum(p.numel() for p in seen["task"].parameters() if p.requires_grad),
        "peak_memory_mb": peak_memory(),
    }
    if name == "warm" and result["later_epoch_pairs_per_second"]:
        result["arithmetic"] = arithmetic(recipe, seen, pairs / result["later_epoch_pairs_per_second"])
    return result


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --------------------------------------------------------------------------------------------- arithmetic


def arithmetic(recipe: Any, seen: dict[str, Any], epoch_seconds: float) -> dict[str, Any]:
    """What an epoch would take if it were nothing but its matrix products on real tokens, without padding."""
    import torch

    from trimtab.precision import has_fast_bf16

    adapter, states = seen["task"].adapter, seen["frozen"].states
    lengths = states.lengths[: len(seen["text"].train)]
    wanted = recipe.training.precision
    bf16 = wanted == "bf16" or (wanted == "auto" and has_fast_bf16(torch.device("cpu")))
    dtype = torch.bfloat16 if bf16 else torch.float32
    counts = Counter(lengths.tolist())
    flops = sum(count * adapter_flops(adapter, tokens, dtype) for tokens, count in counts.items())
    flops *= seen["pairs"] / len(lengths)  # an epoch draws evenly, and leaves out what fills no batch
    rows = int(recipe.training.batch_size * lengths.mean())
    rate = matrix_rate(adapter, rows, dtype)
    return {
        "precision": "bf16" if bf16 else "fp32",
        "flops_per_epoch": flops,
        "tokens_per_pair": float(lengths.mean()),
        "matrix_rate_flops": rate,
        "floor_seconds": flops / rate,
        "epoch_seconds": epoch_seconds,
        "times_the_floor": epoch_seconds / (flops / rate),
    }


def adapter_flops(adapter: Any, tokens: int, dtype: Any) -> int:
    """Forward and backward FLOPs of one text of that many tokens."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    states, mask = torch.zeros(1, tokens, len(adapter.input_mean)), torch.ones(1, tokens, dtype=torch.bool)
    adapter.train()
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = adapter(states, mask)
        output.sum().backward()
    return int(counter.get_total_flops())


def matrix_rate(adapter: Any, rows: int, dtype: Any, repeats: int = 15) -> float:
    """FLOP/s of the adapter's linear layers on `rows` tokens: forward and both backward products, best of several."""
    import torch
    from torch import nn

    work = seconds = 0.0
    for layer in adapter.layers.modules():
        if not isinstance(layer, nn.Linear):
            continue
        x = torch.randn(rows, layer.in_features).to(dtype)
        weight, grad = layer.weight.detach().to(dtype), torch.randn(rows, layer.out_features).to(dtype)
        for left, right in ((x, weight.T), (grad, weight), (grad.T, x)):
            best = float("inf")
            for _ in range(repeats):
                began = time.perf_counter()
                left @ right
                best = min(best, time.perf_counter() - began)
            work += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            seconds += best
    return work / seconds


def machine() -> dict[str, Any]:
    import torch
    import transformers

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sentence-transformers": importlib.metadata.version("sentence-transformers"),
        "python": platform.python_version(),
    }


# ---------------------------------------------------------------------------------------------- processes


def child(request: Path) -> None:
    """Do one part in this process and leave the answer beside the request."""
    from trimtab.files import write_json
    from trimtab.precision import tune_allocator

    asked = json.loads(request.read_text(encoding="utf-8"))
    settings, folder, part = Settings(**asked["settings"]), Path(asked["folder"]), asked["part"]
    tune_allocator()  # for both sides
    if part == "pairs":
        answer: dict[str, Any] = {**write_pairs(settings, folder), "machine": machine()}
    else:
        answer = (run_peer if part in PEERS else run_ours)(settings, folder, part)
    write_json(request.with_suffix(".answer"), answer)


def run_child(settings: Settings, folder: Path, part: str) -> dict[str, Any]:
    request = folder / f"{part}.json"
    request.write_text(json.dumps({"settings": asdict(settings), "folder": str(folder), "part": part}))
    print(f"\n{part}", flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, __file__, "--child", str(request)], check=True, env=environment)
    return json.loads(request.with_suffix(".answer").read_text(encoding="utf-8"))


def main() -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "language.json")
    parser.add_argument("--pairs", type=int, default=defaults.pairs, help="training pairs, of CC-CEDICT")
    parser.add_argument("--validation", type=int, default=defaults.validation, help="validation pairs")
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="budget of each peer")
    parser.add_argument("--tuned-rate", type=float, default=defaults.tuned_rate, help="learning rate of `tuned`")
    parser.add_argument("--tuned-epochs", type=int, default=defaults.tuned_epochs, help="what its schedule spans")
    parser.add_argument("--every", type=int, default=defaults.every, help="peer's steps between evaluations")
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="Trimtab's epochs")
    parser.add_argument("--recipe", default=defaults.recipe)
    parser.add_argument("--base", default=None, help="instead of starter; must have E5's width, 384")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--change", nargs="*", default=[], metavar="KEY=VALUE", help="on top of the recipe")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    request, out, peers = options.pop("child"), options.pop("out"), options.pop("peers")
    if request:
        child(request)
        return
    from trimtab.files import write_json, write_text

    settings = Settings(**options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        result = run_child(settings, folder, "pairs")
        print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
        result["runs"] = {part: run_child(settings, folder, part) for part in ("cold", "warm", *peers)}
    result["comparison"] = compare(result["runs"], peers)
    result["settings"] = {**asdict(settings), "recipe": Path(settings.recipe).name}
    write_json(out, result)
    write_text(out.with_suffix(".md"), as_markdown(result))
    show(result)


if __name__ == "__main__":
    main()
