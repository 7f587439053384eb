"""Chinese class names beside English ones: groceries, clothes, 1,000 emoji, and 1,000 names without pictures.

    python benchmarks/language_classes.py --model runs/quickstart/language-zh --grocery path/to/grocery

Zero-shot top-1 and top-5 of the base with English names, of the base with Chinese names as they are, and of the adapted
model with Chinese names. Every name stands in the default templates of its language.

- `fashion`: 10 classes, every fifth test picture of Fashion-MNIST, which come in a package.
- `openmoji`: 1,000 emoji names of CLDR with their picture by a vendor that no training saw. The Chinese names of 200 of
  them were kept from training, those of the others stood in its pairs, as dictionary words do in any real use.
- `grocery-coarse`, `grocery-fine`: photos of the Grocery Store dataset, in no package; its folder is an argument.
  Training and validation pictures alone: neither teaches a language, and its test split is left to the domain link.
- `names`, `imagenet-1k`: no pictures. How often the vector of a Chinese name is nearest to that of its own English name
  among 1,000 things with one entry in CC-CEDICT, and among the classes of ImageNet-1k that CC-CEDICT translates.

`--write-held-out FILE` writes the Chinese names of `names` and `openmoji` as a manifest for `data.exclude`, so that a
model can be trained that never saw them:

    python benchmarks/language_classes.py --write-held-out names.csv
    trimtab adapt recipes/language-zh.yaml "data.exclude=[names.csv]" out=runs/held-out
    python benchmarks/language_classes.py --model runs/held-out --out benchmarks/results/language_classes_held_out.json
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trimtab.adapters.adapted import LanguageAdapted, load_adapted
from trimtab.adapters.files import read_adapter
from trimtab.data.corpora import (
    cedict_pairs,
    cldr_annotations,
    concrete_nouns,
    emoji_table,
    held_out_emoji,
    imagenet_classes,
)
from trimtab.data.fashion import CLASSES as FASHION_CLASSES
from trimtab.data.fashion import read_fashion
from trimtab.data.pictures import openmoji_pictures
from trimtab.data.templates import DEFAULT_TEMPLATES
from trimtab.evaluation.classification import classify, embed_classes
from trimtab.evaluation.embedding import embed_images
from trimtab.evaluation.matching import translation_match
from trimtab.files import cache_home, digest_of, write_json, write_text

NAMES = Path(__file__).parent / "data" / "class_names_zh.csv"
COUNT = 1000
EVERY = 5  # of the test pictures of Fashion-MNIST
ROWS = ("english_base", "target_raw", "adapted_target")


@dataclass(frozen=True)
class ClassTest:
    """Pictures with the number of their class; names of the classes in both languages."""

    name: str
    pictures: Sequence[tuple[Any, int]]
    english: Sequence[str]
    chinese: Sequence[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="adapted folder")
    parser.add_argument("--grocery", type=Path, help="folder of the Grocery Store dataset; left out without it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/language_classes.json"))
    parser.add_argument("--write-held-out", type=Path, metavar="FILE", help="write the names and stop")
    arguments = parser.parse_args()
    emoji = openmoji()
    if arguments.write_held_out:
        write_names(arguments.write_held_out, [*emoji.chinese, *(chinese for _, chinese in named_things())])
        return
    if not arguments.model:
        parser.error("--model is needed")
    model = load_adapted(arguments.model)
    tests = [fashion(), emoji]
    if arguments.grocery:
        tests += [grocery(arguments.grocery, level) for level in ("coarse", "fine")]
    rows = [row for test in tests for row in with_pictures(model, test)]
    rows += without_pictures(model, "names", named_things())
    rows += without_pictures(model, "imagenet-1k", imagenet_names())
    pairs = read_adapter(arguments.model).data["pairs"]
    write_json(arguments.out, {"base": model.base.fingerprint, "pairs": pairs, "rows": rows})
    write_text(arguments.out.with_suffix(".md"), as_table(rows))
    print(as_table(rows))


# ------------------------------------------------------------------------------------------------- figures


def encoders(model: LanguageAdapted) -> dict[str, tuple[Any, str]]:
    """Who reads the names of each row, and in which language they are."""
    return dict(zip(ROWS, ((model.base, "en"), (model.base, "zh"), (model, "zh")), strict=True))


def with_pictures(model: LanguageAdapted, test: ClassTest) -> list[dict[str, Any]]:
    names = {"en": test.english, "zh": test.chinese}
    pictures = embed_images(model, [picture for picture, _ in test.pictures])
    rows = []
    for row, (encoder, language) in encoders(model).items():
        templates = DEFAULT_TEMPLATES[language]
        found = classify(encoder, test.pictures, names[language], templates, images=pictures)
        figures = {"top1": found.top1, "top5": found.top5, "n": found.n, "classes": len(test.english)}
        rows.append({"test": test.name, "row": row, **figures})
        print(f"{test.name} {row}: top-1 {found.top1:.1f}, top-5 {found.top5:.1f}", flush=True)
    return rows


def without_pictures(model: LanguageAdapted, name: str, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Top-1 of Chinese names among the English ones."""
    english = embed_classes(model.base, [pair[0] for pair in pairs], DEFAULT_TEMPLATES["en"])
    rows = []
    for row, (encoder, language) in encoders(model).items():
        if language == "zh":
            chinese = embed_classes(encoder, [pair[1] for pair in pairs], DEFAULT_TEMPLATES["zh"])
            found = translation_match(chinese, english)
            figures = {"top1": found.student_to_teacher, "n": len(pairs), "classes": len(pairs)}
            rows.append({"test": name, "row": row, **figures})
            print(f"{name} {row}: {found.student_to_teacher:.1f} of {len(pairs)} names", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------- tests' data


def table(name: str) -> list[Mapping[str, str]]:
    with NAMES.open(encoding="utf-8", newline="") as stream:
        return [row for row in csv.DictReader(stream) if row["set"] == name]


def fashion() -> ClassTest:
    split = read_fashion("test")
    rows = {row["class"]: row for row in table("fashion")}
    chosen = list(zip(split.pixels, split.labels, strict=True))[::EVERY]
    pictures = [(Image.fromarray(np.asarray(one)), int(label)) for one, label in chosen]
    return ClassTest("fashion", pictures, FASHION_CLASSES, [rows[name]["chinese"] for name in FASHION_CLASSES])


def grocery(folder: Path, level: str) -> ClassTest:
    """Training and validation pictures at one level of the dataset's names."""
    rows = table(f"grocery-{level}")
    numbers = {row["class"]: number for number, row in enumerate(rows)}
    with (folder / "classes.csv").open(encoding="utf-8", newline="") as stream:
        known = list(csv.reader(stream))[1:]
    label = {int(row[1]): numbers[row[0 if level == "fine" else 2]] for row in known}  # by the fine class's number
    pictures = []
    for split in ("train", "val"):
        for line in (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines():
            path, fine, _ = line.split(",")
            pictures.append((folder / path.strip(), label[int(fine)]))
    return ClassTest(f"grocery-{level}", pictures, [row["english"] for row in rows], [row["chinese"] for row in rows])


def openmoji() -> ClassTest:
    """The held-out names and others up to `COUNT`, chosen by digest; of equal names the first."""
    english, chinese = cldr_annotations("en"), cldr_annotations("zh")
    names = {
        english[s][0]: chinese[s][0] for s in held_out_emoji() | emoji_table().keys() if s in english and s in chinese
    }
    held_out = {english[symbol][0] for symbol in held_out_emoji()}
    captioned = {one.english: one for one in openmoji_pictures("zh", cache_home() / "openmoji", held_out_only=False)}
    chosen: dict[str, str] = {}
    for name in sorted(captioned, key=lambda name: (name not in held_out, digest_of("class", name))):
        if len(chosen) < COUNT and names[name] not in chosen.values():
            chosen[name] = names[name]
    pictures = [(captioned[name].path, number) for number, name in enumerate(chosen)]
    return ClassTest("openmoji", pictures, list(chosen), list(chosen.values()))


def translations() -> dict[str, str]:
    """English names of visible things with the Chinese entry that has them as first gloss; the shortest of several."""
    chinese: dict[str, str] = {}
    seen: set[str] = set()
    for target, english, _ in cedict_pairs():
        if target not in seen and (known := chinese.get(english.lower(), target)) and len(target) <= len(known):
            chinese[english.lower()] = target
        seen.add(target)
    return chinese


def named_things() -> list[tuple[str, str]]:
    """`COUNT` names of ImageNet-21k with their Chinese ones, all different, chosen by digest."""
    chinese = translations()
    pairs: dict[str, str] = {}
    for name in sorted(concrete_nouns() & chinese.keys(), key=lambda name: digest_of("class", name)):
        if len(pairs) < COUNT and chinese[name] not in pairs.values():
            pairs[name] = chinese[name]
    return list(pairs.items())


def imagenet_names() -> list[tuple[str, str]]:
    """Classes of ImageNet-1k whose first translated name is an entry of CC-CEDICT."""
    chinese = translations()
    pairs: dict[str, str] = {}
    for names, _ in imagenet_classes():
        known = [name for name in names if name.lower() in chinese]
        if known and chinese[known[0].lower()] not in pairs.values():
            pairs[known[0]] = chinese[known[0].lower()]
    return list(pairs.items())


def write_names(path: Path, names: Sequence[str]) -> None:
    """A manifest for `data.exclude`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text"])
        writer.writerows([name] for name in dict.fromkeys(names))


# ------------------------------------------------------------------------------------------------- table


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| test | classes | pictures | English, base | Chinese, base | Chinese, adapted | of English |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for test in dict.fromkeys(row["test"] for row in rows):
        mine = {row["row"]: row for row in rows if row["test"] == test}
        english = mine.get("english_base")
        adapted, raw = mine["adapted_target"], mine["target_raw"]
        shown = [f"{one['top1']:.1f}" if one else "–" for one in (english, raw, adapted)]
        kept = f"{100 * adapted['top1'] / english['top1']:.0f}%" if english and english["top1"] else "–"
        pictures = f"{adapted['n']:,}" if english else "none"
        lines.append(f"| {test} | {adapted['classes']:,} | {pictures} | {' | '.join(shown)} | {kept} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
