"""The few-shot protocol: methods x shots x seeds on one set of pictures, run by run. Read top to bottom.

Each run learns from the shots that `trimtab.data.shots` draws for its seed, the same for every method, chooses on the
validation pictures drawn beside them, and then looks at the whole test set, once. A finished run is one line of the
output file and is not repeated: a sweep that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

import trimtab
from trimtab.adapters.adapted import load
from trimtab.config import LabelSource, PromptRecipe
from trimtab.data.labelled import LabelledPictures, load_labelled
from trimtab.data.shards import PictureFile
from trimtab.data.shots import Shots, apart, draw_shots, warn_of_copies, warn_of_unjudged
from trimtab.errors import DataError, RecipeError
from trimtab.evaluation.fewshot_summaries import names_of, spread_of
from trimtab.files import digest_of, explain_disk_errors
from trimtab.precision import has_fast_bf16, tune_allocator
from trimtab.recipes.decoding import decoding
from trimtab.recipes.fewshot_lora import check_lora
from trimtab.recipes.fewshot_methods import CHANGES, METHODS, PROBES, PROMPT_METHODS, Episode, Split
from trimtab.recipes.folders import used
from trimtab.recipes.prompt_features import PictureFeatures
from trimtab.recipes.prompt_fit import ahead, right, settled
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.prompting import PromptTower
from trimtab.training.distributed import check_alone, make_accelerator
from trimtab.training.trackers import progress_reporter

logger = logging.getLogger(__name__)

SHOTS = (1, 2, 4, 8, 16)
SEEDS = (1, 2, 3)
DEFAULT_METHODS = ("template", "ensemble", "linear_probe", "lp_plus_plus", "tip_adapter_f", "coop", "structured")
VIEW_SEED = 0  # one set of views for all seeds: they are of the pictures, not of a run

Run = dict[str, Any]
"""One line of the output: method, dataset, shots, seed, top1 and what else is worth knowing."""


@dataclass(frozen=True)
class Plan:
    """What a sweep is asked for."""

    shots: tuple[int, ...] = SHOTS
    seeds: tuple[int, ...] = SEEDS
    methods: tuple[str, ...] = DEFAULT_METHODS
    dataset: str | None = None

    def __post_init__(self) -> None:
        for name in ("shots", "seeds", "methods"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise RecipeError(f"{name}={values!r} must be one or more values without repeats")
        if min(self.shots) < 1:
            raise RecipeError(f"shots={self.shots} must be at least 1 each")
        if min(self.seeds) < 0:
            raise RecipeError(f"seeds={self.seeds} must be at least 0 each")
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise RecipeError(f"no such method: {', '.join(unknown)}; there are {', '.join(METHODS)}")

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        """Seed, shots, method of each run."""
        return ((seed, shots, method) for shots in self.shots for seed in self.seeds for method in self.methods)


@dataclass(frozen=True, eq=False)
class FewShotData:
    """All three splits over the same classes, no picture in two of them."""

    train: LabelledPictures
    validation: LabelledPictures | None
    test: LabelledPictures

    @functools.cached_property
    def digest(self) -> str:
        """Names the classes and what the splits hold, in whatever order."""
        parts = (self.train, self.validation, self.test)
        found = [sorted(f"{i.digest()} {y}" for i, y in zip(p.images, p.labels.tolist())) if p else [] for p in parts]
        return digest_of(*self.train.classes, *(digest_of(*one) for one in found))


def fewshot(recipe: PromptRecipe, plan: Plan, out: str | Path, *, progress: Callable[[str], None] = print) -> list[Run]:
    """Run what of a sweep is not in the file yet.

    Args:
        recipe: data, base, views, and the options of methods that learn prompts; its `seed` and `data.shots` are not
            used.
        out: a JSONL file, which is appended to.
        progress: gets a line per run.

    Returns:
        All runs of the plan, those of earlier sweeps too.

    Raises:
        TrimtabError: whatever the user can mend, before anything is computed.
    """
    tune_allocator()
    check_alone("few-shot methods run", os.environ)
    out = Path(out)
    data = read_fewshot(recipe)
    fewer = recipe.data.allow_fewer
    draws = {
        (seed, shots): draw_shots(data.train, data.validation, shots, seed, allow_fewer=fewer, reserve=fewer)
        for shots in plan.shots
        for seed in plan.seeds
    }
    warn_of_copies(data.train, name="training")
    warn_of_unjudged(*draws.values())
    base = load(recipe.base, device=str(make_accelerator().device))
    if not set(plan.methods).isdisjoint(PROMPT_METHODS):
        recipe = settled(recipe, data.train.classes, PromptTower(base).layers)
    dataset = plan.dataset or dataset_name(recipe)
    drawn_by = ("reserve",) if fewer and data.validation is None else ()
    keys = {
        one: digest_of(setting(recipe, one[2]), data.digest, base.fingerprint, dataset, *map(str, one), *drawn_by)[:16]
        for one in plan
    }
    inputs = digest_of(*base.digests[1:])[:16]
    settings = {
        method: digest_of(setting(recipe, method), base.fingerprint, inputs, *drawn_by)[:16] for method in plan.methods
    }
    pictures = Pictures(recipe, plan, data, draws, base)
    known = _finished(out, inputs)
    if any(one[2] == "clip_lora" and key not in known for one, key in keys.items()):
        check_lora(base)
    for (seed, shots, method), key in keys.items():
        if key in known or key in (known := _finished(out, inputs)):  # by another process meanwhile
            continue
        fitted = run_once(recipe, method, pictures, draws[seed, shots], seed)
        run = {
            "method": method,
            "dataset": dataset,
            "shots": shots,
            "seed": seed,
            **fitted,
            "key": key,
            "inputs": inputs,
            "setting": settings[method],
            "data": data.digest[:16],
        }
        append_run(out, run)
        progress(f"{dataset}, {method}, {shots} shots, seed {seed}: {run['top1']:.1f}% in {run['seconds']:.0f} s")
    known = _finished(out, inputs)
    return [known[key] for key in keys.values()]


def _finished(out: Path, inputs: str) -> dict[str, Run]:
    """Runs in the file by their keys, but for those whose base read texts or pictures in another way.

    Args:
        inputs: digest of how it reads them now; older lines do not say.
    """
    return {run["key"]: run for run in read_runs(out) if "key" in run and run.get("inputs", inputs) == inputs}


def read_fewshot(recipe: PromptRecipe) -> FewShotData:
    """Read and check all splits.

    Raises:
        DataError: as `load_labelled`; no test pictures are named.
    """
    sources = recipe.data
    if not sources.test:
        raise DataError("few-shot runs are measured on test pictures: name them with data.test")
    with decoding() as how:
        train = load_labelled(sources.train, sources.classes, **how)
        others = [
            load_labelled(part, train.classes, every_class=False, **how) if part else None
            for part in (sources.validation, sources.test)
        ]
    validation, test = others
    assert test is not None
    train = apart(train, test, name="training", where="test")
    if validation is not None:
        train = apart(train, validation, name="training", where="validation")
        validation = apart(validation, test, name="validation", where="test")
    return FewShotData(train, validation, test)


class Pictures:
    """Features of all pictures that a sweep needs, encoded when the first run asks for them."""

    def __init__(
        self,
        recipe: PromptRecipe,
        plan: Plan,
        data: FewShotData,
        draws: Mapping[tuple[int, int], Shots],
        base: DualEncoder,
    ) -> None:
        self.recipe, self.data, self.base = recipe, data, base
        self.tokens = self._keep_tokens(plan)
        self._learnt = _once(draw.train for draw in draws.values())
        self._held = _once(draw.validation for draw in draws.values())

    def _keep_tokens(self, plan: Plan) -> bool:
        """Whether patch tokens are cached too: if the recipe's prompt reads them, so that all methods share a cache.

        A recipe of ``method: coop`` reads none by itself, but methods that learn other parts of its `prompt` may.

        Raises:
            RecipeError: a method of the plan reads them and the image tower has none.
        """
        recipes = [self.recipe, *(CHANGES[method](self.recipe) for method in plan.methods if method in CHANGES)]
        if not any(one.resolved().prompt.reads_patches for one in recipes):
            return False
        try:
            PictureFeatures(self.base, [], tokens=True)
        except RecipeError:
            if any(method in (*PROMPT_METHODS, "linear_probe_patches") for method in plan.methods):
                raise
            return False
        return True

    def shots(self, draw: Shots) -> tuple[Split, Split]:
        """Training and validation pictures of one draw."""
        train = [self._learnt[image] for image in draw.train.images]
        held = [self._held[image] for image in draw.validation.images]
        return (
            self._train.take(np.array(train), draw.train.labels),
            self._validation.take(np.array(held), draw.validation.labels),
        )

    @functools.cached_property
    def test(self) -> Split:
        """The whole test set."""
        return self._encoded(self.data.test.images, self.data.test.labels)

    @functools.cached_property
    def _train(self) -> Split:
        """Every picture that some run learns from, with its views."""
        return self._encoded(list(self._learnt), views=self.recipe.data.views)

    @functools.cached_property
    def _validation(self) -> Split:
        """Every picture that some run chooses by."""
        return self._encoded(list(self._held))

    def _encoded(self, images: Sequence[PictureFile], labels: np.ndarray | None = None, *, views: int = 0) -> Split:
        options = self.recipe.data.augmentation
        features = PictureFeatures(self.base, images, views=views, options=options, seed=VIEW_SEED, tokens=self.tokens)
        with progress_reporter("pictures", "pictures") as report:
            features.fill(progress=report)
        return Split.of(features, np.zeros(len(images), np.int64) if labels is None else labels)


def run_once(recipe: PromptRecipe, method: str, pictures: Pictures, draw: Shots, seed: int) -> Run:
    """Fit one method on one draw, then open the test set."""
    train, validation = pictures.shots(draw)
    episode = Episode(pictures.base, draw, train, validation, replace(recipe, seed=seed), seed)
    torch.manual_seed(seed)
    started = time.monotonic()
    fitted = METHODS[method](episode)
    seconds = time.monotonic() - started
    with torch.no_grad():
        held = right(fitted.logits(validation), validation.labels, fitted.scale)
        labels = pictures.test.labels
        logits = fitted.logits(pictures.test)
    return {
        "top1": right(logits, labels, fitted.scale),
        "mean_per_class": mean_per_class(logits, labels, fitted.scale),
        "validation_top1": held,
        "n_classes": len(draw.train.classes),
        "n_train": len(train),
        "n_validation": len(validation),
        "n_test": len(labels),
        "seconds": round(seconds, 2),
        "trained_parameters": fitted.parameters,
        "chosen": fitted.chosen,
        "base": recipe.base,
        "bf16": has_fast_bf16(pictures.base.device),
        "views": recipe.data.views,
        "trimtab": trimtab.__version__,
    }


def mean_per_class(logits: torch.Tensor, labels: torch.Tensor, scale: float = 1.0) -> float:
    """Mean of the classes' own top-1, in percent; classes without pictures do not count. `scale` as for `ahead`."""
    counts = torch.bincount(labels)
    correct = torch.bincount(labels[ahead(logits, labels, scale)], minlength=len(counts))
    return fmean(100 * some / of for some, of in zip(correct.tolist(), counts.tolist(), strict=True) if of)


def setting(recipe: PromptRecipe, method: str) -> str:
    """What of a recipe decides the outcome of a method, data and base apart."""
    mapping = used(CHANGES[method](recipe) if method in CHANGES else recipe)
    views = str([mapping["data"][name] for name in ("views", "augmentation", "allow_fewer")])
    if method not in PROMPT_METHODS:
        reads_names = method not in PROBES
        return views + (str(mapping["templates"]) if mapping["templates"] and reads_names else "")
    for name in ("out", "seed", "data", "base"):
        mapping.pop(name, None)
    for name in ("checkpoint_every", "log_every", "trackers", "processes"):
        mapping["training"].pop(name, None)
    return views + str(mapping)


def dataset_name(recipe: PromptRecipe) -> str:
    """What to call the data: the folder of the training table, or the folder that holds the class folders."""
    source: LabelSource = recipe.data.train[0]
    path = Path(source.path).absolute()
    folder = path if path.is_dir() else path.parent
    return folder.parent.name if folder.name.lower() in ("train", "training") else folder.name


def mean_rows(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Of each method, mean and deviation over seeds at each number of shots, as text."""
    dataset = runs[0]["dataset"]
    rows = {}
    for method in names_of(runs, "method"):
        found = [spread_of(runs, dataset, method, shots) for shots in names_of(runs, "shots")]
        rows[method] = [
            "–" if one is None else f"{one.mean:.1f}" + (f" ± {one.deviation:.1f}" if one.deviation is not None else "")
            for one in found
        ]
    return rows


# Files


def read_runs(path: str | Path) -> list[Run]:
    """Finished runs; a line that was cut off by a kill is none.

    Raises:
        DataError: the file cannot be read as text.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a file of runs ({error}); choose another --out") from error
    runs = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            run = json.loads(line)
            if isinstance(run, dict):
                runs.append(run)
    return runs


def append_run(path: Path, run: Run) -> None:
    """Append one line, as one write that is on disk when this returns."""
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = not path.exists() or not path.stat().st_size or path.read_bytes().endswith(b"\n")
        line = ("" if whole else "\n") + json.dumps(run, ensure_ascii=False) + "\n"
        with path.open("ab", buffering=0) as stream:
            stream.write(line.encode())
            os.fsync(stream.fileno())


def _once(parts: Iterator[LabelledPictures] | Any) -> dict[PictureFile, int]:
    """Places of all pictures, each once, in an order that does not depend on the runs."""
    images = {image for part in parts for image in part.images}
    return {image: at for at, image in enumerate(sorted(images, key=lambda image: (image.name, str(image.path))))}
