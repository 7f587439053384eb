"""What each link adds on photos of groceries, with English and with Chinese names, alone and together.

    python benchmarks/compose.py --data path/to/grocery --language runs/quickstart/language-zh

Trains the domain link (`recipes/domain-grocery.yaml`) and the prompt link, once on the base and once on the
domain-adapted base, unless their folders are there, then measures every combination on the test split: top-1 over the
81 fine classes. Names in Chinese are those of benchmarks/grocery_zh.csv, which prompts know as other names of their
classes. The photos are laid out as benchmarks/domain.py says.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from domain import Grocery

import trimtab
from trimtab.adapters.adapted import load, load_adapted
from trimtab.adapters.composed import Composed
from trimtab.adapters.composing import load_composed
from trimtab.adapters.prompt import Pictures
from trimtab.adapters.prompted import PromptClassifier
from trimtab.config import DomainRecipe, load_recipe, recipe_from_mapping
from trimtab.data.manifests import read_classification
from trimtab.files import write_json, write_text
from trimtab.recipes.compose import read_aliases
from trimtab.towers.classifier import Classifier
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.prompting import image_tokens

HERE = Path(__file__).parent
NAMES = HERE / "grocery_zh.csv"
RECIPE = HERE.parent / "recipes" / "domain-grocery.yaml"
ENGLISH = ("a photo of {}",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the grocery photos")
    parser.add_argument("--language", required=True, help="an adapted folder of the language link")
    parser.add_argument("--base", default="starter")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-compose"), help="tables and trained links")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "compose.json")
    parser.add_argument("--shots", type=int, default=8, help="pictures per class that prompts learn from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for the domain recipe")
    arguments = parser.parse_args()
    grocery = Grocery.prepare(arguments.data, arguments.work)
    folders = train(arguments, grocery)
    aliases = read_aliases(NAMES)
    chinese = {own: name for name, own in aliases.items()}
    if lacking := [name for name in grocery.classes if name not in chinese]:
        raise SystemExit(f"{NAMES} lacks {', '.join(lacking[:5])}")
    items = read_classification(grocery.labels("test"), grocery.classes, grocery.root)
    rows = measure(
        arguments.base, folders, grocery.classes, [chinese[name] for name in grocery.classes], aliases, items
    )
    facts = {
        "base": arguments.base,
        "language": Path(arguments.language).name,
        "seed": arguments.seed,
        "shots": arguments.shots,
        "set": arguments.set,
        "pictures": len(items),
        "classes": len(grocery.classes),
        "rows": rows,
    }
    write_json(arguments.out, facts)
    write_text(arguments.out.with_suffix(".md"), table(facts))
    print(table(facts))


def train(arguments: argparse.Namespace, grocery: Grocery) -> dict[str, Path]:
    """Folders of the links, trained where they are not there yet."""
    work = arguments.work
    folders = {"language": Path(arguments.language)}
    folders |= {name: work / name for name in ("domain", "prompt", "prompt-on-domain")}
    if not (folders["domain"] / "adapter.json").is_file():
        sources = {
            split: json.dumps([{"path": str(work / f"{split}.csv"), "root": str(grocery.root)}])
            for split in ("train", "val")
        }
        places = [f"data.train={sources['train']}", f"data.validation={sources['val']}", f"base={arguments.base}"]
        recipe = load_recipe(RECIPE, [*arguments.set, *places, f"out={folders['domain']}", f"seed={arguments.seed}"])
        assert isinstance(recipe, DomainRecipe)
        trimtab.adapt(recipe)
    labelled = work / "train-labels.csv"
    with labelled.open("w", encoding="utf-8", newline="") as stream:
        rows = [(path, grocery.classes[fine]) for path, fine in grocery.listed("train")]
        csv.writer(stream).writerows([("image", "label"), *rows])
    for name, base in (("prompt", arguments.base), ("prompt-on-domain", str(folders["domain"]))):
        if not (folders[name] / "adapter.json").is_file():
            recipe = {
                "link": "prompt",
                "base": base,
                "out": str(folders[name]),
                "seed": arguments.seed,
                "data": {
                    "train": [{"path": str(labelled), "root": str(grocery.root)}],
                    "classes": str(work / "classes.txt"),
                    "shots": arguments.shots,
                },
                # Prompts for each picture would mean 81 passes of the text tower for each.
                "prompt": {"instance": None},
                "training": {"trackers": []},
            }
            trimtab.adapt(recipe_from_mapping(recipe, "benchmarks/compose.py"))
    return folders


def measure(
    base_name: str,
    folders: dict[str, Path],
    english: list[str],
    chinese: list[str],
    aliases: dict[str, str],
    items: Sequence[Any],
) -> list[dict[str, Any]]:
    """Every combination: its links, and top-1 in percent by the way in which classes are named."""
    base = load(base_name)
    language = load_adapted(folders["language"], base=base)
    seen = Seen([item.path for item in items])
    rows = []
    for links in (
        (), ("language",), ("domain",), ("prompt",), ("language", "domain"), ("language", "prompt"),
        ("domain", "prompt-on-domain"), ("language", "domain", "prompt-on-domain"),
    ):  # fmt: skip
        prompted = any(name.startswith("prompt") for name in links)
        model: Any = base
        if links:
            known = aliases if prompted else None
            model = load_composed([folders[name] for name in links], base=base, student=language.student, aliases=known)
        rows.append({"links": list(links), **scores(model, english, chinese, items, prompted, seen)})
        print(rows[-1], flush=True)
    # What `trimtab compose` refuses: prompts of the base on towers that a domain has changed.
    domain = load_adapted(folders["domain"], base=base)
    prompt = load_adapted(folders["prompt"], base=base)
    moved = Composed(base, domain=domain, prompt=type(prompt)(
        domain, prompt.prompt, classes=prompt.classes, templates=prompt.templates, class_scale=prompt.class_scale
    ))  # fmt: skip
    rows.append({"links": ["domain", "prompt"], "refused": True, **scores(moved, english, chinese, items, True, seen)})
    print(rows[-1], flush=True)
    return rows


class Seen:
    """The test pictures, through each image tower once: combinations differ in it by the domain link alone."""

    def __init__(self, paths: Sequence[Path], *, batch_size: int = 32) -> None:
        self.paths, self.batch_size = list(paths), batch_size
        self._known: dict[str, Pictures] = {}

    @torch.no_grad()
    def by(self, model: DualEncoder) -> Pictures:
        """Embeddings (N, D) and patch tokens (N, P, W) of all pictures."""
        if (key := model.image_fingerprint) not in self._known:
            batches = model.pixel_batches(self.paths, batch_size=self.batch_size)
            found = [image_tokens(model, pixels) for pixels in batches]
            embeddings = torch.nn.functional.normalize(torch.cat([one.features for one in found]).float(), dim=-1)
            masks = [one.mask for one in found if one.mask is not None]
            tokens = torch.cat([one.tokens for one in found])
            self._known[key] = Pictures(embeddings, tokens, torch.cat(masks) if masks else None)
        return self._known[key]

    @torch.no_grad()
    def scored(self, model: DualEncoder, classifier: PromptClassifier) -> np.ndarray:
        """Scores (N, C) behind prompts, in the order of `classifier.scores` of the pictures themselves."""
        pictures, (_, (classes, embeddings)) = self.by(model), classifier._known
        parts = []
        for start in range(0, len(self.paths), self.batch_size):
            some = slice(start, start + self.batch_size)
            parts.append(classes.scores(Pictures(*(one if one is None else one[some] for one in pictures)), embeddings))
        return torch.cat(parts).cpu().numpy()


def scores(
    model: Any, english: list[str], chinese: list[str], items: Sequence[Any], prompted: bool, seen: Seen
) -> dict[str, float | None]:
    labels = np.array([item.label for item in items])
    images = seen.by(model).embeddings.cpu().numpy()

    def top1(classifier: Classifier) -> float:
        behind = isinstance(classifier, PromptClassifier)
        found = seen.scored(model, classifier) if behind else classifier.scores(images)
        return round(100 * float((found.argmax(axis=1) == labels).mean()), 1)

    reads_chinese = hasattr(model, "student") or getattr(model, "language", None) is not None
    found: dict[str, float | None] = {
        "english": top1(Classifier(model, english, templates=ENGLISH)),
        "chinese": top1(Classifier(model, chinese)),
        "english_prompts": None,
        "chinese_prompts": None,
    }
    if prompted:
        found["english_prompts"] = top1(model.classifier())
        if reads_chinese:
            found["chinese_prompts"] = top1(model.classifier(chinese))
    return found


def table(facts: dict[str, Any]) -> str:
    head = (
        f"Top-1 in percent on {facts['pictures']:,} test photos of {facts['classes']} groceries; base {facts['base']}, "
        f"{facts['shots']} pictures per class for the prompts, seed {facts['seed']}.\n\n"
        "| Links | English names | Chinese names | English names, prompts | Chinese names, prompts |\n"
        "|---|---:|---:|---:|---:|\n"
    )
    lines = []
    for row in facts["rows"]:
        name = " + ".join(row["links"]) or "none (the base)"
        name = name.replace("prompt-on-domain", "prompt").replace("prompt", "prompts")
        name += " of the base (refused)" if row.get("refused") else ""
        keys = ("english", "chinese", "english_prompts", "chinese_prompts")
        cells = ["–" if row[key] is None else f"{row[key]:.1f}" for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
