"""How long few-shot prompts take here and in a plain CoOp loop, with how much memory; and 1,000 classes at once.

    python benchmarks/prompt.py [--grocery path/to/grocery]

The plain loop does in every step what the published code of CoOp (arXiv 2109.01134) does: it decodes and augments the
pictures of the batch, runs the image tower on them and the text tower on the prompts of all classes, in fp32, and goes
back through the text tower. Its full run is as many epochs as CoOp's protocol has, each as long as the steps that were
timed. Seconds are those of the processor, so that other work on the machine does not count; give it one thread
(OMP_NUM_THREADS=1). Each part runs in a process of its own, one after
the other, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fewshot import RECIPE, recipe_for
from fewshot_sets import SETS

from trimtab.adapters.adapted import load
from trimtab.adapters.prompt import Pictures, PromptedClasses, StructuredPrompt
from trimtab.config import InstanceConfig, PromptRecipe
from trimtab.data.corpora import imagenet21k_texts
from trimtab.data.shots import Shots, draw_shots
from trimtab.data.views import make_view
from trimtab.files import write_json, write_text
from trimtab.recipes.fewshot import read_fewshot
from trimtab.recipes.fewshot_methods import CHANGES
from trimtab.recipes.prompt_features import PictureFeatures
from trimtab.recipes.prompt_fit import LabelledFeatures, fit_prompt
from trimtab.towers.prompting import PromptTower, image_tokens

SHOTS, SEED, BATCH = 16, 1, 32
EPOCHS = 200  # of CoOp's protocol at 16 shots
PARTS = ("plain", "coop", "structured", "classes")
RESULT = Path(__file__).parent / "results" / "prompt.json"
CLASSES, LEAST_SPEEDUP, MOST_MEMORY = 1000, 20.0, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grocery", type=Path, help="folder of the photos of groceries; clothes without it")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-fewshot"))
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--steps", type=int, default=4, help="of the plain loop that are timed")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--part", choices=PARTS, help="used by itself")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(measure(arguments)))
        return
    found = {}
    for part in PARTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found[part] = json.loads(done.stdout.strip().splitlines()[-1])
        print(part, found[part], flush=True)
    write_json(arguments.out, found)
    write_text(arguments.out.with_suffix(".md"), table(found))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One part, with the peak memory of this process."""
    torch.manual_seed(0)
    if arguments.part == "classes":
        result = thousand_classes()
    else:
        recipe, draw, test = task(arguments)
        result = (
            plain(recipe, draw, arguments.steps) if arguments.part == "plain" else ours(recipe, draw, test, arguments)
        )
    return {**result, "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}


def task(arguments: argparse.Namespace) -> tuple[PromptRecipe, Shots, Any]:
    """The recipe, one draw, and the test pictures."""
    name = "grocery" if arguments.grocery else "fashion"
    recipe = recipe_for(arguments.recipe, SETS[name](arguments.work, arguments.grocery), [])
    data = read_fewshot(recipe)
    return recipe, draw_shots(data.train, data.validation, SHOTS, SEED), data.test


def plain(recipe: PromptRecipe, draw: Shots, steps: int) -> dict[str, Any]:
    """Seconds of a step in which nothing is kept from the step before."""
    base = load(recipe.base)
    tower = PromptTower(base)
    coop = CHANGES["coop"](recipe).resolved()
    names = draw.train.classes
    classes = PromptedClasses(tower, StructuredPrompt(coop.prompt, tower, patch_width=0, classes=len(names)), names)
    optimiser = torch.optim.SGD(classes.prompt.parameters(), lr=2e-3)
    rng = np.random.default_rng(SEED)
    clocks = []
    for step in range(steps + 1):
        started = time.process_time()
        items = rng.choice(len(draw.train), min(BATCH, len(draw.train)), replace=False)
        pictures = [draw.train.images[at] for at in items]
        views = [
            make_view(one.read(), step + 1, seed=SEED, key=one.name, options=recipe.data.augmentation)
            for one in pictures
        ]
        with torch.no_grad():
            images = F.normalize(base.image_features(views), dim=-1)
        logits = base.logit_scale * images @ classes.embeddings().T
        loss = F.cross_entropy(logits, torch.from_numpy(draw.train.labels[items]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        clocks.append(time.process_time() - started)
    per_step = float(np.median(clocks[1:]))  # the first one warms up
    per_epoch = per_step * max(1, len(draw.train) // BATCH)
    return {
        "classes": len(draw.train.classes), "pictures": len(draw.train), "seconds_per_step": per_step,
        "seconds_per_epoch": per_epoch, "epochs": EPOCHS, "seconds_to_the_end": EPOCHS * per_epoch,
    }  # fmt: skip


def ours(recipe: PromptRecipe, draw: Shots, test: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run to its end: encoding every picture and view once, then training on what was kept."""
    base = load(recipe.base)
    changed = replace(CHANGES[arguments.part](recipe), seed=SEED)
    tokens = changed.resolved().prompt.reads_patches
    started = time.process_time()
    some = draw.train.take(np.arange(min(256, len(draw.train))))
    PictureFeatures(base, some.images, tokens=tokens).encode()
    encoding = (time.process_time() - started) / len(some) * len(draw.train) * (1 + recipe.data.views)
    views = {"views": recipe.data.views, "options": recipe.data.augmentation}
    sets = [
        LabelledFeatures(PictureFeatures(base, part.images, tokens=tokens, **more).fill(), part.labels)
        for part, more in ((draw.train, views), (draw.validation, {}))
    ]
    started = time.process_time()
    fitted = fit_prompt(base, changed, sets[0], sets[1], draw.train.classes, SEED)
    seconds = time.process_time() - started
    measured = LabelledFeatures(PictureFeatures(base, test.images, tokens=tokens).fill(), test.labels)
    epoch = max(1, len(draw.train) // BATCH)
    return {
        "steps": fitted.steps, "seconds_training": seconds, "seconds_encoding": encoding,
        "seconds_per_epoch": seconds / fitted.steps * epoch, "seconds_to_the_end": seconds + encoding,
        "top1": fitted.top1(measured),
    }  # fmt: skip


def thousand_classes() -> dict[str, Any]:
    """Instance prompts of 1,000 class names for a few pictures, every class scored with each picture's own prompt."""
    base = load("starter")
    names = list(dict.fromkeys(text.split(",")[0].strip() for text, _ in imagenet21k_texts()))[:CLASSES]
    recipe = recipe_for(RECIPE, SETS["fashion"](Path("runs/benchmark-fewshot"), None), [])
    config = replace(recipe.prompt, instance=replace(recipe.prompt.instance or InstanceConfig(), top_k=None))
    tower = PromptTower(base)
    width = int(base.model.config.vision_config.width)
    classes = PromptedClasses(tower, StructuredPrompt(config, tower, patch_width=width, classes=len(names)), names)
    pixels = base.preprocess(next(read_fewshot(recipe).test.images[at].read() for at in (0,)))
    started = time.process_time()
    with torch.no_grad():
        features, tokens, mask = image_tokens(base, pixels)
        embeddings = classes.embeddings()
        scores = classes.scores(Pictures(F.normalize(features, dim=-1), tokens, mask), embeddings)
    return {"classes": len(names), "pictures": 1, "seconds": time.process_time() - started, "scores": scores.shape[1]}


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    loop = found["plain"]
    end = f"{loop['seconds_to_the_end'] / 60:.0f} min ({EPOCHS} epochs)"
    rows = [f"| plain CoOp loop | {loop['seconds_per_epoch']:.1f} | {end} | 1 | 1 | – | {loop['peak_gib']:.1f} |"]
    for name in ("coop", "structured"):
        one = found[name]
        end = (
            f"{one['seconds_to_the_end'] / 60:.1f} min ({one['steps']} steps, "
            f"encoding {one['seconds_encoding'] / 60:.1f})"
        )
        times = [f"{loop[key] / one[key]:.0f}" for key in ("seconds_per_epoch", "seconds_to_the_end")]
        cells = [name, f"{one['seconds_per_epoch']:.1f}", end, *times, f"{one['top1']:.1f}", f"{one['peak_gib']:.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
    many = found["classes"]
    speedup = loop["seconds_to_the_end"] / found["coop"]["seconds_to_the_end"]
    marks = ["reached" if ok else "NOT reached" for ok in (speedup >= LEAST_SPEEDUP, many["peak_gib"] <= MOST_MEMORY)]
    return "\n".join([
        "# Few-shot prompts by the clock",
        "",
        f"{loop['classes']} classes, {loop['pictures']} pictures, batches of {BATCH}, by `benchmarks/prompt.py`.",
        "",
        "| | s per epoch | to the end | times faster, epoch | to the end | top-1 | peak GiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
        f"{many['classes']:,} classes with instance prompts, one picture: {many['seconds']:.1f} s, peak "
        f"{many['peak_gib']:.2f} GiB.",
        "",
        f"- {marks[0]}: {LEAST_SPEEDUP:g} times faster than the plain loop",
        f"- {marks[1]}: {CLASSES:,} classes within {MOST_MEMORY:g} GiB",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
