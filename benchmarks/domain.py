"""What the domain link gains on photos of groceries, and what it forgets, beside every method it is compared with.

    python benchmarks/domain.py --data path/to/grocery --seeds 1,2,3

Every row trains `recipes/domain-grocery.yaml` with one method on the same pairs and draws as many of them. It is
measured once on the test split (in bf16 where the machine is fast in it), on pictures of no particular domain before
and after, and by the clock, which starts with an empty cache. Each finished run is a line of the output file, and is
not repeated while the recipe stays the same. The table beside the file is made of them, and so is the answer to which
goals are reached.

    python benchmarks/domain.py --data path/to/grocery --validation-only --warm --set bank.gamma=2 --out study.jsonl

tunes: the test split stays closed, and cached features are used. With --scenes it is judged by training pictures in
scenes of their own, which are held out (`domain_scenes`), beside those of validation.

The photos are the data set of arXiv 1901.00711, as its repository lays them out: train.txt, val.txt and test.txt with
"path, fine id, coarse id" per line, and classes.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from domain_scenes import held_out
from domain_tables import Run, report
from options import numbers

from trimtab.adapters.adapted import load
from trimtab.adapters.domain import DomainAdapted
from trimtab.config import DomainRecipe, MapViewsConfig, PairSource, load_recipe, to_mapping
from trimtab.data.captions import split_sentences
from trimtab.data.manifests import read_classification
from trimtab.errors import TrimtabError
from trimtab.evaluation.classification import classify
from trimtab.evaluation.forgetting import forgetting, measure
from trimtab.files import cache_home, digest_of, write_text
from trimtab.precision import fast_inference, has_fast_bf16
from trimtab.recipes.adapt import adapt
from trimtab.recipes.domain_pairs import general_sets, read_pairs, readable
from trimtab.recipes.folders import recipe_digest, training_folder
from trimtab.recipes.quickstart import test_sets

RECIPE = Path(__file__).parents[1] / "recipes" / "domain-grocery.yaml"
TEMPLATE = "a photo of {}"
NAMES = ("train.txt", "val.txt", "classes.csv")  # test.txt is looked at when it is due
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
PENALTIES = tuple(10.0**power for power in range(-6, 2))

# Baselines draw all pairs alike and are trained by AdamW with the plain objective, as they are published. Where no maps
# are cached, pictures are augmented as views. Choose learning rates by --validation-only and --set-row.
UNIFORM = "bank.enabled=false"
PLAIN = ["training.optimizer=adamw", "objective.label_smoothing=0", "training.bell=null", "data.views=1"]
ROWS: dict[str, list[str]] = {
    "base": [],
    "full": ["method=full", *PLAIN, "training.learning_rate=3e-4", UNIFORM],
    "full_hard": ["method=full", *PLAIN, "training.learning_rate=3e-4"],
    "lora": ["method=lora", *PLAIN, "training.learning_rate=5e-3", UNIFORM],
    "probe": ["method=probe", *PLAIN, "training.learning_rate=5e-3", UNIFORM],
    "linear_probe": [],
    "adapter": [UNIFORM],
    "adapter_negatives": ["bank.gamma=0"],  # hard negatives from the bank, but pairs drawn alike
    "adapter_hard": [],
}
ADAPTERS = ("adapter", "adapter_negatives", "adapter_hard")
WITH_CURVE = ("adapter_hard", "full")


@dataclass(frozen=True)
class Grocery:
    """The data set, written as the tables that a user of the recipe would have.

    Attributes:
        root: folder of the pictures.
        work: gets the tables.
        classes: names of the fine classes.
        coarse: (C,) coarse class of each.
        digest: of classes, training and validation lists.
        scenes: training pictures that are held out.
    """

    root: Path
    work: Path
    classes: list[str]
    coarse: np.ndarray
    digest: str
    scenes: frozenset[str] = frozenset()

    @classmethod
    def prepare(cls, root: Path, work: Path, scenes: frozenset[str] = frozenset()) -> Grocery:
        """Read the lists and write the tables of pairs, those of classes, classes.txt and descriptions.csv."""
        require_lists(root)
        with (root / "classes.csv").open(encoding="utf-8-sig", newline="") as stream:
            rows = sorted(list(csv.reader(stream))[1:], key=lambda row: int(row[1]))
        classes = [re.sub(r"[-_]+", " ", row[0]).strip() for row in rows]
        coarse = np.array([int(row[3]) for row in rows])
        digest = digest_of(*((root / name).read_text(encoding="utf-8") for name in NAMES), *sorted(scenes))
        grocery = cls(root.resolve(), work, classes, coarse, digest, scenes)
        work.mkdir(parents=True, exist_ok=True)
        write_text(work / "classes.txt", "".join(f"{name}\n" for name in classes))
        for split in ("train", "val"):
            items = [(path, classes[fine]) for path, fine in grocery.listed(split)]
            grocery._write(f"{split}.csv", ("image", "text"), [(path, TEMPLATE.format(name)) for path, name in items])
            grocery._write(f"{split}-labels.csv", ("image", "label"), items)
        described = [(name, grocery._described(name, row[5])) for name, row in zip(classes, rows, strict=True)]
        grocery._write("descriptions.csv", ("class", "description"), described)
        return grocery

    def labels(self, split: str) -> Path:
        """The table of pictures and fine classes to measure on; only here is the test split read."""
        path = self.work / f"{split}-labels.csv"
        if split in ("test", "scenes"):
            items = [(path, self.classes[fine]) for path, fine in self.listed(split)]
            path = self._write(f"{split}.csv", ("image", "label"), items)
        return path

    def listed(self, split: str) -> list[tuple[str, int]]:
        """Path and fine class of each picture of a split; ``scenes`` are those of ``train`` that are held out."""
        if split in ("train", "scenes"):
            return [item for item in listed(self.root, "train") if (item[0] in self.scenes) == (split == "scenes")]
        return listed(self.root, split)

    def _described(self, name: str, place: str) -> str:
        """The first sentence of a class's description: later ones tell of coffee and vitamins, not of looks."""
        path = self.root / place.strip().lstrip("/")
        sentences = split_sentences(path.read_text(encoding="utf-8")) if path.is_file() else []
        return sentences[0] if sentences else TEMPLATE.format(name)

    def _write(self, name: str, columns: tuple[str, str], rows: Sequence[tuple[str, str]]) -> Path:
        with (self.work / name).open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            writer.writerows(rows)
        return self.work / name


def require_lists(root: Path) -> None:
    """Refuse a folder that is not that of the photos."""
    if lacking := [name for name in NAMES if not (root / name).is_file()]:
        raise SystemExit(
            f"{root} has no {lacking[0]}: --data must be the folder of the grocery photos "
            "(github.com/marcusklasson/GroceryStoreDataset), which this benchmark does not fetch"
        )


def listed(root: Path, split: str) -> list[tuple[str, int]]:
    """Path and fine class of each picture in a list of the data set."""
    lines = (root / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.rsplit(",", 2)] for line in lines if line.strip()]
    return [(path, int(fine)) for path, fine, _ in cells]


@dataclass(frozen=True)
class Job:
    """One run that is wanted.

    Attributes:
        overrides: of the row, then those that were asked for.
        setting: digest of recipe, data and base without the seed: runs of equal settings are averaged.
    """

    row: str
    seed: int
    share: float
    changes: tuple[str, ...]
    recipe: DomainRecipe
    setting: str

    @property
    def key(self) -> tuple[Any, ...]:
        return self.row, self.seed, self.share, self.changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the grocery photos")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--seeds", default="1,2,3", type=numbers)
    parser.add_argument("--rows", default="base,full,lora,probe,linear_probe,adapter,adapter_negatives,adapter_hard")
    parser.add_argument("--share", type=float, default=1.0, help="of the training pairs; as many are drawn in any case")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/domain.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-domain"), help="tables and runs in progress")
    parser.add_argument("--described", action="store_true", help="a first sentence of descriptions as a second caption")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for the rows of adapters")
    parser.add_argument(
        "--set-row", action="append", nargs=2, default=[], metavar=("ROW", "KEY=VALUE"), help="for one row"
    )
    parser.add_argument("--validation-only", action="store_true", help="never open the test split")
    parser.add_argument(
        "--scenes", action="store_true", help="hold out training pictures in scenes of their own; implies the former"
    )
    parser.add_argument("--no-general", action="store_true", help="do not measure what is forgotten")
    parser.add_argument(
        "--no-curve", action="store_true", help="do not measure the curve over alpha, which takes minutes"
    )
    parser.add_argument("--warm", action="store_true", help="use cached features; such times are not compared")
    arguments = parser.parse_args()
    rows = arguments.rows.split(",")
    if unknown := {*rows, *(row for row, _ in arguments.set_row)} - ROWS.keys():
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    arguments.validation_only |= arguments.scenes
    require_lists(arguments.data)
    try:
        base = load(load_recipe(arguments.recipe, arguments.set).base)
        scenes = scenes_of(base, arguments.data) if arguments.scenes else frozenset()
        grocery = Grocery.prepare(arguments.data, arguments.work, scenes)
        for row in rows:
            # No seed changes the base.
            for seed in [0] if row == "base" else arguments.seeds:
                job = make_job(arguments, grocery, row, seed, base.fingerprint)
                if is_done(arguments, job):
                    print(f"{row}, seed {seed}: there already", flush=True)
                    continue
                append(arguments.out, run(arguments, grocery, job))
                write_text(arguments.out.with_suffix(".md"), report(read_runs(arguments.out)))
    except TrimtabError as error:
        sys.exit(f"error: {error}")
    write_text(arguments.out.with_suffix(".md"), report(read_runs(arguments.out)))


def scenes_of(base: Any, root: Path) -> frozenset[str]:
    """The training pictures to hold out, as the base sees them."""
    pictures = listed(root, "train")
    with fast_inference(base.device):
        features = base.encode_image([root / path for path, _ in pictures])
    out = held_out(features, np.array([fine for _, fine in pictures]))
    return frozenset(pictures[number][0] for number in np.flatnonzero(out))


def make_job(arguments: argparse.Namespace, grocery: Grocery, row: str, seed: int, fingerprint: str) -> Job:
    """The recipe of a row, with as many drawn pairs whatever the share."""
    epochs = round(load_recipe(arguments.recipe).training.epochs / arguments.share)
    asked = [*(arguments.set if row in ADAPTERS else ()), *(value for name, value in arguments.set_row if name == row)]
    train = {"path": str(grocery.work / "train.csv"), "root": str(grocery.root), "share": arguments.share}
    if arguments.described:
        train |= {"path": str(grocery.work / "train-labels.csv"), "label": "label", "templates": [TEMPLATE]}
        train["descriptions"] = str(grocery.work / "descriptions.csv")
    validation = {"path": str(grocery.work / "val.csv"), "root": str(grocery.root)}
    places = [f"data.train={json.dumps([train])}", f"data.validation={json.dumps([validation])}"]
    # Not the places, but what they hold, decides whether a run is the same.
    named = [f"data.train={Path(str(train['path'])).name}", "data.validation=val.csv"]
    common = [f"training.epochs={epochs}", "least_steps=0", "training.trackers=[]", *ROWS[row], *asked]
    setting = load_recipe(arguments.recipe, [*common, *named])
    assert isinstance(setting, DomainRecipe)
    recipe = load_recipe(arguments.recipe, [*common, *places, f"seed={seed}"])
    assert isinstance(recipe, DomainRecipe)
    facts = (recipe_digest(what_counts(setting)), grocery.digest, fingerprint, str(arguments.share))
    return Job(row, seed, arguments.share, tuple(asked), recipe, digest_of(*facts)[:16])


def what_counts(recipe: DomainRecipe) -> DomainRecipe:
    """The recipe without what its method does not use: a baseline is not run again because adapters changed."""
    plain = DomainRecipe(data=recipe.data, adapters=recipe.adapters)
    if recipe.method in ("full", "probe"):
        recipe = replace(recipe, data=replace(recipe.data, map_augmentation=MapViewsConfig()))
    if recipe.method != "lora":
        recipe = replace(recipe, lora=plain.lora)
    if recipe.method != "adapter":
        recipe = replace(recipe, adapters=(), gate=plain.gate, memory=0)
    if recipe.method != "adapter" and not recipe.bank.enabled:
        recipe = replace(recipe, bank=replace(plain.bank, enabled=False, epoch_share=recipe.bank.epoch_share))
    return recipe


def run(arguments: argparse.Namespace, grocery: Grocery, job: Job) -> Run:
    """Train and measure one row with one seed."""
    general = () if arguments.no_general else general_manifests(arguments.work)
    print(f"{job.row}, seed {job.seed}, {100 * job.share:g}% of the pairs", *job.changes, flush=True)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(run_folder(arguments.work))
        if not arguments.warm:
            stack.enter_context(empty_cache(arguments.work))
        beside = ("scenes",) if grocery.scenes else () if arguments.validation_only else ("test",)
        one = partial(scores, grocery=grocery, splits=("val", *beside))
        if job.row == "base":
            found = as_it_came(job, general, one)
        elif job.row == "linear_probe":
            found = linear_probe(job, grocery, one)
        else:
            found = trained(job, out, general, one, curve=not arguments.no_curve)
    finished: Run = {
        "row": job.row, "seed": job.seed, "share": job.share, "set": list(job.changes), "setting": job.setting,
        "warm": arguments.warm, "machine": machine(), **found, "recipe": to_mapping(without_places(job.recipe)),
    }  # fmt: skip
    return finished


def machine() -> str:
    """What times depend on, as far as it can be told in a line."""
    fast = has_fast_bf16(torch.device("cpu"))
    return f"{platform.machine()}, {os.cpu_count()} cores, {'fast' if fast else 'slow'} bf16"


def without_places(recipe: DomainRecipe) -> DomainRecipe:
    """For publishing: where the tables lay on one machine is nobody's business."""
    data = recipe.data
    sources = {"train": data.train, "validation": data.validation}
    plain = {
        name: tuple(
            replace(
                one, path=Path(one.path).name, root=None, descriptions=one.descriptions and Path(one.descriptions).name
            )
            for one in found
        )
        for name, found in sources.items()
    }
    return replace(recipe, data=replace(data, **plain))


def trained(job: Job, out: Path, general: Sequence[str], score: Any, *, curve: bool) -> dict[str, Any]:
    """A row that a recipe trains."""
    alphas = ALPHAS if general and curve and job.row in WITH_CURVE else ()
    outcome = adapt(replace(job.recipe, out=str(out), general=sources_of(general), alphas=alphas))
    assert outcome is not None  # one process
    model = load(out)
    found = score(model)
    if isinstance(model, DomainAdapted) and model.gate is not None:
        # The same adapters with every picture adapted: what the gate costs in the domain and spares elsewhere.
        model.gate = None
        known = outcome.get("general")
        after = measure(model, general_sets(sources_of(general), 0)) if known else {}
        found["ungated"] = {**score(model), "general": forgetting(known["before"], after) if known else None}
    seconds = outcome["seconds"]
    # Where all is trained nothing need be encoded beforehand: that served the report alone.
    minutes = (seconds["training"] + (0 if job.recipe.method == "full" else seconds["encoding"])) / 60
    return {
        **found,
        "general": outcome.get("general", {}).get("forgetting"),
        "gate": outcome.get("gate"),
        "memory": outcome.get("memory"),
        "alpha": outcome.get("alpha", []),
        "validation_recall": outcome["validation"],
        "difficulty": outcome["difficulty"],
        "logit_scale": outcome["logit_scale"],
        "trained_parameters": outcome["trained_parameters"],
        "base_parameters": outcome["base_parameters"],
        "pairs": outcome["pairs"],
        "steps": outcome["steps"],
        "seconds": seconds,
        "minutes": minutes,
    }


def as_it_came(job: Job, general: Sequence[str], score: Any) -> dict[str, Any]:
    """The base, zero-shot."""
    base = load(job.recipe.base)
    before = measure(base, general_sets(sources_of(general), 0)) if general else {}
    return {**score(base), "general": forgetting(before, before) if general else None}


def linear_probe(job: Job, grocery: Grocery, score: Any) -> dict[str, Any]:
    """Multinomial logistic regression on the base's frozen features, as the field reports it: it knows these classes
    and nothing else, so it has no general score. The L2 penalty is chosen on validation."""
    started = time.monotonic()
    base = load(job.recipe.base)
    pairs = read_pairs(job.recipe).train
    place = {TEMPLATE.format(name): number for number, name in enumerate(grocery.classes)}
    features = torch.from_numpy(base.encode_image([readable(image) for image in pairs.images]))  # (N, D)
    labels = torch.empty(len(features), dtype=torch.long)
    labels[torch.from_numpy(pairs.image_index)] = torch.tensor(
        [place[pairs.captions[caption]] for caption in pairs.caption_index.tolist()]
    )
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)

    def standardised(images: np.ndarray) -> torch.Tensor:
        return (torch.from_numpy(images) - mean) / deviation

    validation = read_classification(grocery.labels("val"), grocery.classes, grocery.root)
    seen = standardised(base.encode_image([item.path for item in validation]))
    right = torch.tensor([item.label for item in validation])
    fitted = []
    for penalty in sorted(PENALTIES, reverse=True):
        weights = fit_logistic((features - mean) / deviation, labels, len(grocery.classes), penalty)
        correct = float(((seen @ weights[:-1] + weights[-1]).argmax(1) == right).float().mean())
        fitted.append((correct, penalty, weights))
    _, chosen, best = max(fitted, key=lambda one: one[0])  # of equal ones the strongest penalty
    minutes = (time.monotonic() - started) / 60
    return {
        **score(Classifier(base, standardised, best)),
        "general": None,
        "penalty": chosen,
        "trained_parameters": best.numel(),
        "base_parameters": sum(one.numel() for one in base.model.parameters()),
        "pairs": len(pairs),
        "minutes": minutes,
    }


def fit_logistic(features: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float) -> torch.Tensor:
    """Weights (D + 1, C), the last row the bias, of the smallest cross-entropy + penalty / 2 * squared weights."""
    weights = torch.zeros(features.shape[1] + 1, classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        logits = features @ weights[:-1] + weights[-1]
        loss = F.cross_entropy(logits, labels) + penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weights.detach()


@dataclass(frozen=True)
class Classifier:
    """The linear probe with a base to see with."""

    base: Any
    standardised: Any
    weights: torch.Tensor

    def predict(self, items: Sequence[Any]) -> np.ndarray:
        """(N,) classes."""
        features = self.standardised(self.base.encode_image([item.path for item in items]))
        return (features @ self.weights[:-1] + self.weights[-1]).argmax(1).numpy()


def scores(model: Any, *, grocery: Grocery, splits: Sequence[str]) -> dict[str, Any]:
    """Percent of the pictures of each split that get their own fine class, and their own coarse one.

    ``by_class`` has the right ones of each class and all of it, (C, 2).
    """
    found: dict[str, Any] = {"test": None}
    for split in splits:
        items = read_classification(grocery.labels(split), grocery.classes, grocery.root)
        if isinstance(model, Classifier):
            true, taken = np.array([item.label for item in items]), model.predict(items)
            counts = np.ones(len(items))
        else:
            with fast_inference(model.device):
                result = classify(model, items, grocery.classes, [TEMPLATE])
            cells = np.array(list(result.confusion)).reshape(-1, 2)
            true, taken, counts = cells[:, 0], cells[:, 1], np.array(list(result.confusion.values()))
            if result.skipped:
                raise SystemExit(f"{len(result.skipped)} pictures cannot be read, {result.skipped[0].source} first")
        right = {"fine": true == taken, "coarse": grocery.coarse[true] == grocery.coarse[taken]}
        found[split] = {name: 100 * float(np.average(same, weights=counts)) for name, same in right.items()}
        found[split]["n"] = int(counts.sum())
        # Pictures of a class are of a few places, and right or wrong together: classes tell how sure a lead is.
        of_class = [np.bincount(true, counts * part, len(grocery.classes)).astype(int) for part in (right["fine"], 1)]
        found[split]["by_class"] = np.stack(of_class, axis=1).tolist()
    return found


def general_manifests(work: Path) -> list[str]:
    """Tux Paint's photos and the held-out emoji of OpenMoji with their English texts."""
    folder = work / "general"
    return [str(folder / f"{one.name}-en.csv") for one in test_sets(folder)]


def sources_of(paths: Sequence[str]) -> tuple[PairSource, ...]:
    return tuple(PairSource(path) for path in paths)


# Files


@contextlib.contextmanager
def run_folder(work: Path) -> Iterator[Path]:
    """A folder to train into; it and its checkpoints are gone afterwards, so that no run goes on with another's."""
    out = work / f"run-{os.getpid()}"
    try:
        yield out
    finally:
        for folder in (out, training_folder(str(out))):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def empty_cache(work: Path) -> Iterator[None]:
    """Within it no features are cached, while packages and built models are."""
    home, before = cache_home(), os.environ.get("TRIMTAB_CACHE")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for entry in home.iterdir():
            if entry.name != "features":
                (Path(folder) / entry.name).symlink_to(entry.resolve())
        os.environ["TRIMTAB_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRIMTAB_CACHE"]
            else:
                os.environ["TRIMTAB_CACHE"] = before


def read_runs(path: Path) -> list[Run]:
    """Finished runs; a line that was cut off by a kill is none."""
    runs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            runs.append(json.loads(line))
    return runs


def append(path: Path, finished: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.exists() or not path.stat().st_size or path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as stream:
        stream.write(("" if whole else "\n") + json.dumps(finished, ensure_ascii=False) + "\n")


def is_done(arguments: argparse.Namespace, job: Job) -> bool:
    """Whether a run of the same setting has all that is asked for now."""
    return any(
        (one["row"], one["seed"], one["share"], tuple(one["set"])) == job.key
        and one["setting"] == job.setting
        and (arguments.validation_only or one["test"] is not None)
        and (arguments.no_general or one["general"] is not None or job.row == "linear_probe")
        and (arguments.warm or not one["warm"])
        for one in read_runs(arguments.out)
    )


if __name__ == "__main__":
    main()
