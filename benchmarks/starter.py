"""How good the base `starter` is at English: retrieval on pictures that its alignment never saw.

    python benchmarks/starter.py --photos path/to/grocery/train --out benchmarks/results/starter.json

Tux Paint's photos with their sentences; the 200 emoji names that were held out from alignment, as drawn by OpenMoji (a
vendor that alignment never saw) and by the three vendors whose other emoji it did see; and the same names with all
pictures of these three, each picture by itself, and each name by their mean. Takes a few minutes on 2 cores.

Photos of ImageNet are scarce in packages: twenty of its validation pictures lie in one. `starter` names them among the
1,000 classes, and so it does Tux Paint's pictures whose text is a name of a class, beside the classifier that its trunk
was packaged with. What any folder of photos can tell is how often the two agree.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.data.corpora import cldr_annotations, emoji_table, held_out_emoji, imagenet_classes
from trimtab.data.images import read_image
from trimtab.data.manifests import RetrievalPairs
from trimtab.data.packages import fetch, fetch_file
from trimtab.data.pictures import EMOJI_VENDORS, openmoji_pictures, tuxpaint_photos, vendor_files
from trimtab.evaluation.retrieval import recall_at_k, retrieve
from trimtab.files import cache_home, write_json, write_text
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.efficientnet import load_packaged
from trimtab.towers.hf import load_base

PHOTOS = 800
SURE = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/starter.json"))
    parser.add_argument("--photos", type=Path, help=f"a folder of photos (.jpg), of which {PHOTOS} are taken")
    arguments = parser.parse_args()
    photos = sorted(arguments.photos.rglob("*.jpg")) if arguments.photos else []
    if arguments.photos and not photos:
        parser.error(f"--photos {arguments.photos} holds no .jpg")
    base = load_base("starter")
    rows = []
    for name, items in test_sets().items():
        found = retrieve(base, as_pairs(items))
        rows.append({"set": name, "images": found.n_images, "texts": found.n_texts, **found.as_json()})
        print(f"{name}: {found.n_images} pictures, {found.n_texts} texts, mR {found.mR:.1f}", flush=True)
    rows.append(by_name(base))
    print(f"{rows[-1]['set']}: mR {rows[-1]['mR']:.1f}", flush=True)
    naming = Naming(base)
    named = [named_rightly(naming, name, items) for name, items in labelled_photos().items()]
    results: dict[str, Any] = {"base": base.fingerprint, "rows": rows, "named_rightly": named}
    if photos:
        photos = random.Random(0).sample(photos, min(len(photos), PHOTOS))
        results["named_as_the_classifier_does"] = named_as_the_classifier_does(naming, photos)
        print(f"named as the classifier does: {results['named_as_the_classifier_does']}", flush=True)
    write_json(arguments.out, results)
    write_text(arguments.out.with_suffix(".md"), as_table(rows))
    write_text(arguments.out.with_name(f"{arguments.out.stem}_named.md"), as_named_table(named))


def test_sets() -> dict[str, list[tuple[Path, str]]]:
    """Pictures with English texts, by the name of the set."""
    sets = {
        "Tux Paint photos": [(one.path, one.english) for one in tuxpaint_photos("zh_CN")],
        "held-out emoji names, OpenMoji (unseen vendor)": [
            (one.path, one.english) for one in openmoji_pictures("zh", cache_home() / "openmoji")
        ],
    }
    by_vendor = held_out_pictures()
    sets |= {f"held-out emoji names, {vendor}": items for vendor, items in by_vendor.items()}
    return sets | {"held-out emoji names, the three vendors": [one for items in by_vendor.values() for one in items]}


def held_out_pictures() -> dict[str, list[tuple[Path, str]]]:
    """Pictures of the held-out emoji with their English names, by vendor."""
    names = cldr_annotations("en")
    held_out = [symbol for symbol in emoji_table() if symbol in held_out_emoji() and symbol in names]
    return {
        vendor: [
            (path, names[symbol][0]) for symbol, path in vendor_files(fetch(package) / folder, suffix, held_out).items()
        ]
        for vendor, (package, folder, suffix) in EMOJI_VENDORS.items()
    }


def by_name(base: DualEncoder) -> dict[str, Any]:
    """Retrieval where each name has one vector for all of its pictures: their mean."""
    vectors: dict[str, list[np.ndarray]] = {}
    for items in held_out_pictures().values():
        for (_, name), vector in zip(items, base.encode_image([path for path, _ in items]), strict=True):
            vectors.setdefault(name, []).append(vector)
    means = np.stack([np.mean(several, axis=0) for several in vectors.values()])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    found = recall_at_k((means, base.encode_text(list(vectors))), [(at, at) for at in range(len(vectors))])
    set_name = "held-out emoji names, the three vendors' pictures as one"
    return {
        "set": set_name,
        "images": len(vectors),
        "texts": len(vectors),
        "mR": found.mR,
        "i2t": found.i2t,
        "t2i": found.t2i,
    }


class Naming:
    """Photos named among ImageNet's 1,000 classes, by `starter` and by what it is made of."""

    def __init__(self, base: DualEncoder) -> None:
        self.base = base
        self.texts = base.encode_text([f"a photo of a {names[0]}" for names, _ in imagenet_classes()])  # (1000, D)
        self.packaged = load_packaged(str(fetch_file("efficientnet-lite0", "*.pth"))).eval()

    @torch.inference_mode()
    def __call__(self, photos: Sequence[Path]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The class that each says, (N,), and how sure the packaged classifier is of its own."""
        pixels = torch.cat([self.base.preprocess(read_image(path))["pixel_values"] for path in photos])
        logits = torch.cat([self.packaged.logits(self.packaged(part)) for part in pixels.split(32)])  # (N, 1000)
        features = torch.cat([self.base.pixel_features({"pixel_values": part}) for part in pixels.split(32)])  # (N, D)
        sure, classes = logits.softmax(dim=-1).max(dim=-1)
        knowledge = logits.softmax(dim=-1) @ self.base.model.vision_model.alignment.class_embeddings
        said = {
            "packaged classifier": classes.numpy(),
            "starter": (features.numpy() @ self.texts.T).argmax(axis=1),
            "knowledge path, packaged trunk": (knowledge.numpy() @ self.texts.T).argmax(axis=1),
        }
        return said, sure.numpy()


def labelled_photos() -> dict[str, list[tuple[Path, set[int]]]]:
    """Photos with the classes of ImageNet that are right, by the name of the set."""
    numbers: dict[str, set[int]] = {}
    for number, (names, _) in enumerate(imagenet_classes()):
        for name in names:
            numbers.setdefault(name.lower(), set()).add(number)
    of_imagenet = [(path, {int(path.stem.rpartition("_")[2])}) for path in sorted(fetch("foolbox").rglob("*.jpg"))]
    stamps = [(one.path, re.sub(r"^(an?|the) ", "", one.english.lower().strip(" ."))) for one in tuxpaint_photos("de")]
    return {
        "validation photos of ImageNet": of_imagenet,
        "Tux Paint pictures called as a class": [(path, numbers[text]) for path, text in stamps if text in numbers],
    }


def named_rightly(naming: Naming, name: str, items: Sequence[tuple[Path, set[int]]]) -> dict[str, Any]:
    """Share of photos, in percent, whose class each says."""
    said, sure = naming([path for path, _ in items])
    right = {of: [one in known for one, (_, known) in zip(found, items, strict=True)] for of, found in said.items()}
    shares = {of: round(100 * float(np.mean(each)), 1) for of, each in right.items()}
    print(f"{name}, {len(items)} photos: {shares}", flush=True)
    return {"set": name, "images": len(items), "sure": sure_share(sure), **shares}


def sure_share(sure: np.ndarray) -> float:
    """Share of photos, in percent, of which the packaged classifier gives more than half to one class."""
    return round(100 * float(np.mean(sure > SURE)), 1)


def named_as_the_classifier_does(naming: Naming, photos: Sequence[Path]) -> dict[str, Any]:
    """Share of photos, in percent, for which another says what the packaged classifier does."""
    said, sure = naming(photos)
    classes = said.pop("packaged classifier")
    found: dict[str, Any] = {"images": len(photos), "sure": sure_share(sure)}
    for of, each in said.items():
        found[of] = round(100 * float(np.mean(each == classes)), 1)
        found[f"{of}, where it is sure"] = round(100 * float(np.mean((each == classes)[sure > SURE])), 1)
    return found


def as_pairs(items: list[tuple[Path, str]]) -> RetrievalPairs:
    texts = list(dict.fromkeys(text for _, text in items))
    place = {text: number for number, text in enumerate(texts)}
    return RetrievalPairs(
        [path for path, _ in items], texts, [(number, place[text]) for number, (_, text) in enumerate(items)]
    )


def as_table(rows: list[dict[str, object]]) -> str:
    lines = ["| pictures | number | texts | mR |", "|---|---|---|---|"]
    lines += [f"| {row['set']} | {row['images']} | {row['texts']} | {row['mR']:.1f} |" for row in rows]
    return "\n".join(lines) + "\n"


def as_named_table(rows: Sequence[Mapping[str, Any]]) -> str:
    kinds = [key for key in rows[0] if key not in ("set", "images", "sure")]
    lines = [f"| photos | number | {' | '.join(kinds)} |", "|---|---:|" + "---:|" * len(kinds)]
    lines += [
        f"| {row['set']} | {row['images']} | {' | '.join(f'{row[kind]:.1f}' for kind in kinds)} |" for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
