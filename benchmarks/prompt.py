"""How long few-shot prompts take here and in a plain CoOp loop, with how much memory; and 1,000 classes at once.

    python benchmarks/prompt.py [--grocery path/to/grocery]

The plain loop does in every step what the published code of CoOp (arXiv 2109.01134) does: it decodes and augments the
pictures of the batch, runs the image tower on them and the text tower on the prompts of all classes, in fp32, and goes
back through the text tower. Its full run is as many epochs as CoOp's protocol has, each as long as the steps that were
timed; a shorter run of it, as many steps as ours, gives its accuracy. Each part runs in a process of its own, one after
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
from trimtab.adapters.prompt import PromptedClasses, StructuredPrompt
from trimtab.config import PromptRecipe
from trimtab.data.packages import fetch
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
    classes = PromptedClasses(tower, StructuredPrompt(coop.prompt, tower, patch_width=0, classes=len(draw.train.classes)),
                              draw.train.classes)  # fmt: skip
    optimiser = torch.optim.SGD(classes.prompt.parameters(), lr=2e-3)
    rng = np.random.default_rng(SEED)
    clocks = []
    for step in range(steps + 1):
        started = time.monotonic()
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
        clocks.append(time.monotonic() - started)
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
    started = time.monotonic()
    some = draw.train.take(np.arange(min(256, len(draw.train))))
    PictureFeatures(base, some.images, tokens=tokens).encode()
    encoding = (time.monotonic() - started) / len(some) * len(draw.train) * (1 + recipe.data.views)
    sets = [
        LabelledFeatures(PictureFeatures(base, part.images, views=views, options=recipe.data.augmentation, tokens=tokens).fill(),
                         part.labels)
        for part, views in ((draw.train, recipe.data.views), (draw.validation, 0))
    ]  # fmt: skip
    started = time.monotonic()
    fitted = fit_prompt(base, changed, sets[0], sets[1], draw.train.classes, SEED)
    seconds = time.monotonic() - started
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
    lists = sorted(fetch("imagenet-names").rglob("imagenet_synset_to_lemma.txt"))
    lines = lists[0].read_text(encoding="utf-8").splitlines()
    names = list(dict.fromkeys(line.partition("\t")[2].split(",")[0].strip() for line in lines))[:CLASSES]
    recipe = recipe_for(RECIPE, SETS["fashion"](Path("runs/benchmark-fewshot"), None), [])
    config = (
        replace(recipe.prompt, instance=replace(recipe.prompt.instance, top_k=None))
        if recipe.prompt.instance
        else recipe.prompt
    )
    tower = PromptTower(base)
    width = int(base.model.config.vision_config.width)
    classes = PromptedClasses(tower, StructuredPrompt(config, tower, patch_width=width, classes=len(names)), names)
    pixels = base.preprocess(next(read_fewshot(recipe).test.images[at].read() for at in (0,)))
    started = time.monotonic()
    with torch.no_grad():
        from trimtab.adapters.prompt import Pictures

        features, tokens, mask = image_tokens(base, pixels)
        embeddings = classes.embeddings()
        scores = classes.scores(Pictures(F.normalize(features, dim=-1), tokens, mask), embeddings)
    return {"classes": len(names), "pictures": 1, "seconds": time.monotonic() - started, "scores": scores.shape[1]}


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    loop = found["plain"]
    rows = [
        f"| plain CoOp loop | {loop['seconds_per_epoch']:.1f} | {loop['seconds_to_the_end'] / 60:.0f} min ({EPOCHS} epochs) | "
        f"1 | 1 | – | {loop['peak_gib']:.1f} |"
    ]
    for name in ("coop", "structured"):
        one = found[name]
        rows.append(
            f"| {name}, cached | {one['seconds_per_epoch']:.1f} | {one['seconds_to_the_end'] / 60:.1f} min ({one['steps']} steps, "
            f"encoding {one['seconds_encoding'] / 60:.1f}) | {loop['seconds_per_epoch'] / one['seconds_per_epoch']:.0f} | "
            f"{loop['seconds_to_the_end'] / one['seconds_to_the_end']:.0f} | {one['top1']:.1f} | {one['peak_gib']:.1f} |"
        )
    many = found["classes"]
    speedup = loop["seconds_to_the_end"] / found["coop"]["seconds_to_the_end"]
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
        f"- {'reached' if speedup >= LEAST_SPEEDUP else 'NOT reached'}: {LEAST_SPEEDUP:g} times faster than the plain loop",
        f"- {'reached' if many['peak_gib'] <= MOST_MEMORY else 'NOT reached'}: {CLASSES:,} classes within {MOST_MEMORY:g} GiB",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
