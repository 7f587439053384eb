"""How long few-shot prompts take here and in a plain CoOp loop, with how much memory; and 1,000 classes at once.

    python benchmarks/prompt.py [--grocery path/to/grocery]

The plain loop does in every step what the published code of CoOp (arXiv 2109.01134) does: it decodes and augments the
pictures of the batch, runs the image tower on them and the text tower on the prompts of all classes, in fp32, and goes
back through the text tower. At 16 shots its full run is as many epochs as CoOp's protocol has, each as long as the
steps that were timed. Ours takes fewer steps of more pictures, in bf16 where that is fast, so both are compared per
picture, to the end, and at as many steps. Whether both come out alike is seen with fewer shots, where both run to their
end: as many steps, with the same optimiser and rates, one batch of all pictures in each.

Seconds are those of the processor, so that other work on the machine does not count; give it one thread
(OMP_NUM_THREADS=1). Each part runs in a process of its own, one after the other, so that peak memory is its own;
a part that has ended is kept in the work folder, under `prompt-parts`, and is not repeated with the same recipe,
pictures and base. `starter` has a bidirectional text tower; a CLIP of random weights, with the text tower of ViT-B,
stands for causal ones.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fewshot import RECIPE, recipe_for
from fewshot_sets import SETS
from PIL import Image

from trimtab.adapters.adapted import load
from trimtab.adapters.prompt import Pictures, PromptedClasses, StructuredPrompt
from trimtab.config import GeneralConfig, InstanceConfig, PromptConfig, PromptRecipe
from trimtab.data.corpora import imagenet21k_texts
from trimtab.data.labelled import LabelledPictures
from trimtab.data.shots import Shots, draw_shots
from trimtab.data.views import make_view
from trimtab.files import digest_of, write_json, write_text
from trimtab.recipes.fewshot import read_fewshot
from trimtab.recipes.fewshot_methods import CHANGES
from trimtab.recipes.folders import recipe_digest
from trimtab.recipes.prompt_features import PictureFeatures
from trimtab.recipes.prompt_fit import LabelledFeatures, fit_prompt
from trimtab.towers.classifier import check_class_names
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.prompting import PromptTower, image_tokens
from trimtab.training.optimiser import learning_rate, make_optimizer, trainable

SHOTS, SEED, BATCH = 16, 1, 32
EPOCHS = 200  # of CoOp's protocol at 16 shots
FEW = 2  # shots of the runs that both end
PARTS = ("plain", "coop", "structured", "plain_few", "coop_few", "classes", "classes_causal")
RESULT = Path(__file__).parent / "results" / "prompt.json"
CLASSES, AT_ONCE = 1000, 2
LEAST_SPEEDUP, MOST_MEMORY, MOST_APART = 20.0, 2.0, 3.0  # times, GiB, points of top-1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grocery", type=Path, help="folder of the photos of groceries; clothes without it")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-fewshot"))
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--steps", type=int, default=4, help="of the plain loop that are timed")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--without", choices=["structured"], help="leave out a part that nothing rests on")
    parser.add_argument("--part", choices=PARTS, help="used by itself")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(measure(arguments)))
        return
    found, key = {}, key_of(arguments)
    for part in [part for part in PARTS if part != arguments.without]:
        kept = arguments.work / "prompt-parts" / f"{part}-{key}.json"
        if kept.is_file():
            found[part] = json.loads(kept.read_text(encoding="utf-8"))
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found[part] = json.loads(done.stdout.strip().splitlines()[-1])
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, found[part])
        print(part, found[part], flush=True)
    write_json(arguments.out, found)
    write_text(arguments.out.with_suffix(".md"), table(found))


def key_of(arguments: argparse.Namespace) -> str:
    """Names what the figures of all parts depend on."""
    recipe = recipe_of(arguments)
    facts = (recipe_digest(recipe), read_fewshot(recipe).digest, load(recipe.base).fingerprint, str(arguments.steps))
    return digest_of(*facts)[:16]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One part, with the peak memory of this process."""
    torch.manual_seed(0)
    part = arguments.part
    if part.startswith("classes"):
        result = thousand_classes(random_clip() if part == "classes_causal" else load("starter"))
    elif part.startswith("plain"):
        result = plain(*task(arguments), None if part == "plain_few" else arguments.steps)
    else:
        result = ours(*task(arguments), part.removesuffix("_few"))
    return {**result, "peak_gib": round(memory("VmHWM"), 2)}


def memory(what: str) -> float:
    """GiB of this process in main memory: now (VmRSS), or at most so far (VmHWM)."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**20


def task(arguments: argparse.Namespace) -> tuple[PromptRecipe, Shots, LabelledPictures]:
    """The recipe, one draw, and the test pictures."""
    recipe = recipe_of(arguments)
    data = read_fewshot(recipe)
    shots = FEW if arguments.part.endswith("_few") else SHOTS
    return recipe, draw_shots(data.train, data.validation, shots, SEED), data.test


def recipe_of(arguments: argparse.Namespace) -> PromptRecipe:
    name = "grocery" if arguments.grocery else "fashion"
    return recipe_for(arguments.recipe, SETS[name](arguments.work, arguments.grocery), [])


def plain(recipe: PromptRecipe, draw: Shots, test: LabelledPictures, timed: int | None) -> dict[str, Any]:
    """A loop in which nothing is kept from the step before; `timed` steps of it, or None for a run to its end."""
    base = load(recipe.base)
    tower = PromptTower(base)
    coop = CHANGES["coop"](recipe).resolved()
    names = draw.train.classes
    classes = PromptedClasses(tower, StructuredPrompt(coop.prompt, tower, patch_width=0, classes=len(names)), names)
    optimiser = make_optimizer(trainable(classes.prompt), coop.training)
    rng = np.random.default_rng(SEED)
    clocks = []
    steps = coop.steps
    assert steps is not None  # CoOp's budget does not depend on the pictures
    for step in range(steps if timed is None else timed + 1):
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
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, coop.training)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        clocks.append(time.process_time() - started)
    per_step = float(np.median(clocks[1:]))  # the first one warms up
    steps = max(1, len(draw.train) // BATCH)
    found = {
        "classes": len(names), "pictures": len(draw.train), "batch": min(BATCH, len(draw.train)),
        "seconds_per_step": per_step,
    }  # fmt: skip
    if timed is not None:
        return {**found, "epochs": EPOCHS, "seconds_to_the_end": EPOCHS * steps * per_step}
    features = PictureFeatures(base, test.images, tokens=False).fill().pictures().embeddings
    with torch.no_grad():
        taken = (features @ classes.embeddings().T).argmax(1).numpy()
    top1 = 100 * float((taken == test.labels).mean())
    return {**found, "steps": len(clocks), "seconds_to_the_end": sum(clocks), "top1": top1}


def ours(recipe: PromptRecipe, draw: Shots, test: LabelledPictures, method: str) -> dict[str, Any]:
    """A run to its end: encoding every picture and view once, then training on what was kept."""
    base = load(recipe.base)
    changed = replace(CHANGES[method](recipe), seed=SEED)
    tokens = changed.resolved().prompt.reads_patches
    views = {"views": recipe.data.views, "options": recipe.data.augmentation}
    sets = []
    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="trimtab-") as empty:
        for part, more in ((draw.train, views), (draw.validation, {})):
            features = PictureFeatures(base, part.images, tokens=tokens, **more).fill(Path(empty))
            sets.append(LabelledFeatures(features, part.labels))
    encoding = time.process_time() - started
    started = time.process_time()
    fitted = fit_prompt(base, changed, sets[0], sets[1], draw.train.classes, SEED)
    seconds = time.process_time() - started
    measured = LabelledFeatures(PictureFeatures(base, test.images, tokens=tokens).fill(), test.labels)
    return {
        "steps": fitted.steps, "batch": min(changed.training.batch_size, len(draw.train)),
        "seconds_training": seconds, "seconds_encoding": encoding, "seconds_to_the_end": seconds + encoding,
        "top1": fitted.top1(measured),
    }  # fmt: skip


def thousand_classes(base: DualEncoder) -> dict[str, Any]:
    """Instance prompts of 1,000 class names for two pictures, every class scored with each picture's own prompt."""
    found = dict.fromkeys(text.split(",")[0].strip() for text, _ in imagenet21k_texts())
    names = check_class_names(list(found)[:CLASSES])
    pictures = [Image.effect_noise((224, 224), 60 + 20 * at).convert("RGB") for at in range(AT_ONCE)]
    pixels = [base.preprocess(picture) for picture in pictures]
    before = memory("VmRSS")
    tower = PromptTower(base)
    started = time.process_time()
    with torch.no_grad():
        seen = image_tokens(base, {name: torch.cat([one[name] for one in pixels]) for name in pixels[0]})
        config = PromptConfig(GeneralConfig("a photo of a"), InstanceConfig(heads=4, width=64))
        prompt = StructuredPrompt(config, tower, patch_width=seen.tokens.shape[2], classes=len(names))
        classes = PromptedClasses(tower, prompt, names)
        scores = classes.scores(
            Pictures(F.normalize(seen.features, dim=-1), seen.tokens, seen.mask), classes.embeddings()
        )
    return {
        "base": base.name, "classes": len(names), "pictures": len(scores), "tokens": classes.layout.length,
        "seconds": time.process_time() - started, "loaded_gib": round(before, 2),
        "added_gib": round(memory("VmHWM") - before, 2),
    }  # fmt: skip


def random_clip() -> DualEncoder:
    """A CLIP whose towers are as large as those of ViT-B/32, with random weights. Its tokenizer knows letters alone, so
    that names have more tokens than usual."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: at for at, token in enumerate(tokens)}, merges=[], model_max_length=77)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        for part in (CLIPModel(CLIPConfig(text_config=ends)), tokenizer, CLIPImageProcessorPil()):
            part.save_pretrained(folder)
        base = load(folder)
    base.name = "random CLIP, ViT-B/32"
    return base


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    loop = found["plain"]
    end = f"{loop['seconds_to_the_end'] / 60:.0f} min ({EPOCHS} epochs)"
    per_step = loop["seconds_per_step"]
    rows = [f"| plain CoOp loop | {per_step:.2f} ({loop['batch']}) | {end} | 1 | 1 | 1 | – | {loop['peak_gib']:.1f} |"]
    for name in [name for name in ("coop", "structured") if name in found]:
        one = found[name]
        end = (
            f"{one['seconds_to_the_end'] / 60:.1f} min ({one['steps']} steps, "
            f"encoding {one['seconds_encoding'] / 60:.1f})"
        )
        step = one["seconds_training"] / one["steps"]
        times = [
            (per_step / loop["batch"]) / (step / one["batch"]),
            loop["seconds_to_the_end"] / one["seconds_to_the_end"],
            one["steps"] * per_step / one["seconds_to_the_end"],
        ]
        cells = [name, f"{step:.2f} ({one['batch']})", end, *(f"{each:.0f}" for each in times)]
        cells += [f"{one['top1']:.1f}", f"{one['peak_gib']:.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
    few = [found["plain_few"], found["coop_few"]]
    many = [found["classes"], found["classes_causal"]]
    speedup = loop["seconds_to_the_end"] / found["coop"]["seconds_to_the_end"]
    goals = {
        f"{LEAST_SPEEDUP:g} times faster to the end than the plain loop": speedup >= LEAST_SPEEDUP,
        f"top-1 at most {MOST_APART:g} points below the plain loop's": few[1]["top1"] >= few[0]["top1"] - MOST_APART,
        f"{CLASSES:,} classes within {MOST_MEMORY:g} GiB": all(one["peak_gib"] <= MOST_MEMORY for one in many),
    }
    return "\n".join([
        "# Few-shot prompts by the clock",
        "",
        f"Written by `benchmarks/prompt.py`. {loop['classes']} classes, {loop['pictures']} pictures. Seconds of one "
        "core; in brackets the pictures of a step.",
        "",
        "| | s per step | to the end | times faster, per picture | to the end | at as many steps | top-1 | peak GiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
        f"The plain loop was timed for a few steps; its end is that of CoOp's protocol at {SHOTS} shots. Ours has "
        "fewer steps, of more pictures, and counts its encoding to the end. The loop is in fp32, ours in bf16 where "
        "that is fast.",
        "",
        f"With {FEW} shots both ran to their end, {few[0]['steps']} steps with the same optimiser and one seed; the "
        f"plain loop draws new views in each step, ours are cached. Plain loop "
        f"{few[0]['seconds_to_the_end']:.0f} s, top-1 {few[0]['top1']:.1f}; here {few[1]['seconds_to_the_end']:.0f} s, "
        f"top-1 {few[1]['top1']:.1f}.",
        "",
        "## 1,000 classes, each picture with prompts of its own",
        "",
        "| base | pictures | tokens per prompt, at most | s | GiB, model loaded | added | peak |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {one['base']} | {one['pictures']} | {one['tokens']} | {one['seconds']:.0f} | {one['loaded_gib']:.2f} "
            f"| {one['added_gib']:.2f} | {one['peak_gib']:.2f} |"
            for one in many
        ),
        "",
        *(f"- {'reached' if reached else 'NOT reached'}: {goal}" for goal, reached in goals.items()),
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
