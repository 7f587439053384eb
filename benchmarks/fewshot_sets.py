"""Sets of labelled pictures for the few-shot benchmarks, as the tables that a user of `trimtab fewshot` would have.

The groceries are read from a folder that is given. All others come out of packages of public registries.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.data.corpora import cldr_annotations, emoji_table
from trimtab.data.fashion import write_fashion
from trimtab.data.packages import fetch
from trimtab.data.pictures import EMOJI_VENDORS, render_svg, vendor_files
from trimtab.files import digest_of, write_text

POOL = 16  # emoji of a group, and stamps of a kind, to learn from
HELD = 4  # and to choose by
MOST_STAMPS = 28  # of a kind that are not tested

EMOJI_GROUPS = {
    "animal-mammal": "mammal",
    "av-symbol": "audio or video symbol",
    "clothing": "piece of clothing",
    "face-concerned": "worried face",
    "family": "family",
    "food-prepared": "prepared dish",
    "game": "game",
    "geometric": "geometric shape",
    "heart": "heart",
    "household": "household item",
    "person-activity": "person doing something",
    "person-fantasy": "fantasy figure",
    "person-gesture": "person making a gesture",
    "person-role": "person at work",
    "person-sport": "person doing sport",
    "place-building": "building",
    "sky-weather": "sky or weather",
    "sport": "sports equipment",
    "time": "clock",
    "tool": "tool",
    "transport-ground": "land vehicle",
}
"""Subgroups of emoji with more than `POOL + HELD` members that pictures tell apart, and how people call them."""

STAMPS = {
    "animals": "animal",
    "food": "food",
    "household": "household item",
    "plants": "plant",
    "seasonal": "holiday decoration",
    "town": "building or street sign",
    "vehicles": "vehicle",
}
"""Folders of Tux Paint's stamps with more than `POOL + HELD` of them, and how people call them."""


@dataclass(frozen=True)
class PhotoSet:
    """Tables with the columns image and label, and a file of class names."""

    train: Path
    validation: Path
    test: Path
    classes: Path
    root: Path

    def overrides(self) -> list[str]:
        """As `key=value` for a recipe of the prompt link."""
        found = [
            f'data.{name}=[{{"path": "{getattr(self, name)}", "root": "{self.root}"}}]'
            for name in ("train", "validation", "test")
        ]
        return [*found, f"data.classes={self.classes}"]


def grocery(work: Path, photos: Path | None, *, coarse: bool = False) -> PhotoSet:
    """Photos of goods in shops (arXiv 1901.00711): 81 kinds, or 43 groups of them, in the set's own splits."""
    if photos is None or not (photos / "classes.csv").is_file():
        raise SystemExit(
            "the groceries need --grocery, the folder of their photos (github.com/marcusklasson/GroceryStoreDataset), "
            f"which this benchmark does not fetch; {photos} has no classes.csv"
        )
    with (photos / "classes.csv").open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.reader(stream))[1:]
    column = 3 if coarse else 1
    names = {int(row[column]): re.sub(r"[-_]+", " ", row[column - 1]).strip() for row in rows}
    tables = {}
    for split, file in (("train", "train.txt"), ("validation", "val.txt"), ("test", "test.txt")):
        lines = (photos / file).read_text(encoding="utf-8").splitlines()
        cells = [[cell.strip() for cell in line.rsplit(",", 2)] for line in lines if line.strip()]
        tables[split] = [(path, names[int(ids[coarse])]) for path, *ids in cells]
    return _write(
        work / ("grocery-coarse" if coarse else "grocery"), tables, [names[at] for at in sorted(names)], photos
    )


def grocery_coarse(work: Path, photos: Path | None) -> PhotoSet:
    """The 43 groups."""
    return grocery(work, photos, coarse=True)


def fashion(work: Path, photos: Path | None = None) -> PhotoSet:
    """Fashion-MNIST: of each class 100 pictures to draw shots from, 20 to choose by, and 250 of its test split."""
    folder = work / "fashion"
    files = write_fashion(folder, train=1000, validation=200, test=2500)
    return PhotoSet(files.train, files.validation, files.test, files.classes, folder)


def emoji(work: Path, photos: Path | None = None) -> PhotoSet:
    """Unicode's subgroups of emoji. Google and Twitter drew those to learn from and to choose by, OpenMoji those of the
    test, and no emoji is on both sides."""
    folder = work / "emoji"
    members = defaultdict(list)
    table = emoji_table()
    drawn = _drawn(table)
    del drawn["fluent"]
    tested = drawn.pop("openmoji")
    for symbol, group in table.items():
        if group in EMOJI_GROUPS and symbol in tested and all(symbol in files for files in drawn.values()):
            members[group].append(symbol)
    tables: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for group, symbols in sorted(members.items()):
        ranked = sorted(symbols, key=lambda symbol: digest_of("few-shot", symbol))
        for at, symbol in enumerate(ranked):
            if at < POOL + HELD:
                for vendor, files in drawn.items():
                    link = _link(folder / "pictures" / f"{vendor}-{files[symbol].name}", files[symbol])
                    split = "train" if at < POOL else "validation"
                    tables[split].append((link.relative_to(folder).as_posix(), EMOJI_GROUPS[group]))
            else:
                path = render_svg(tested[symbol], folder / "pictures" / f"openmoji-{tested[symbol].stem}.png")
                tables["test"].append((path.relative_to(folder).as_posix(), EMOJI_GROUPS[group]))
    return _write(folder, tables, sorted(EMOJI_GROUPS.values()), folder)


def emoji_names(work: Path, classes: int, tested: int) -> PhotoSet:
    """Emoji by name, of those that four vendors draw: Google's and Twitter's to learn from, Microsoft's to choose by,
    OpenMoji's of the first `tested` classes for the test."""
    folder = work / "emoji-names"
    table, names = emoji_table(), cldr_annotations("en")
    drawn = _drawn(table)
    symbols = [symbol for symbol in table if symbol in names and all(symbol in files for files in drawn.values())]
    by_text = {names[symbol][0]: symbol for symbol in symbols}  # a name that two emoji have stands for the second
    chosen = sorted(by_text.items(), key=lambda item: digest_of("top-k", item[1]))[:classes]
    tables: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for at, (name, symbol) in enumerate(chosen):
        for vendor, split in (("google", "train"), ("twitter", "train"), ("fluent", "validation")):
            source = drawn[vendor][symbol]
            link = _link(folder / f"{vendor}-{source.name}", source)
            tables[split].append((link.name, name))
        if at < tested:
            source = drawn["openmoji"][symbol]
            tables["test"].append((render_svg(source, folder / f"openmoji-{source.stem}.png").name, name))
    return _write(folder, tables, [name for name, _ in chosen], folder)


def tuxpaint(work: Path, photos: Path | None = None) -> PhotoSet:
    """Tux Paint's stamps, photos and drawings, by the kind of thing they show."""
    folder = work / "tuxpaint"
    root = next(path for path in fetch("tuxpaint-stamps").rglob("stamps") if path.is_dir())
    tables: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for kind, name in STAMPS.items():
        pictures = sorted((root / kind).rglob("*.png"))
        pictures = [one for one in pictures if not one.stem.endswith(("_mirror", "_flip", "_mirror_flip"))]
        ranked = sorted(pictures, key=lambda path: digest_of("few-shot", path.relative_to(root).as_posix()))
        pool = min(MOST_STAMPS, max(POOL + HELD, len(ranked) // 2))
        for at, path in enumerate(ranked):
            split = "test" if at >= pool else "validation" if at >= pool - HELD else "train"
            tables[split].append((path.relative_to(root).as_posix(), name))
    return _write(folder, tables, sorted(STAMPS.values()), root)


SETS: dict[str, Callable[[Path, Path | None], PhotoSet]] = {
    "grocery": grocery,
    "grocery_coarse": grocery_coarse,
    "fashion": fashion,
    "emoji": emoji,
    "tuxpaint": tuxpaint,
}


def _drawn(table: Iterable[str]) -> dict[str, dict[str, Path]]:
    """What every vendor draws of these emoji, OpenMoji's among them."""
    packages = {**EMOJI_VENDORS, "openmoji": ("openmoji", "package/color/svg", ".svg")}
    return {
        vendor: vendor_files(fetch(package) / place, suffix, table)
        for vendor, (package, place, suffix) in packages.items()
    }


def _write(folder: Path, tables: dict[str, list[tuple[str, str]]], classes: Sequence[str], root: Path) -> PhotoSet:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in tables.items():
        write_table(folder / f"{split}.csv", rows)
    write_text(folder / "classes.txt", "".join(f"{name}\n" for name in classes))
    return PhotoSet(
        *(folder / f"{split}.csv" for split in ("train", "validation", "test")), folder / "classes.txt", root.resolve()
    )


def write_table(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """A table of pictures and labels."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "label"])
        writer.writerows(rows)


def _link(target: Path, source: Path) -> Path:
    """A copy of a small picture under a name that says whose it is."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return target
