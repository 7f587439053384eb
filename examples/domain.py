"""Teach a base brands that it cannot know: from pictures and captions to a model that tells the packets apart.

    python examples/domain.py
    python examples/domain.py --out runs/tea --base path/to/clip

It draws its packets of tea itself, so that it is quick once `starter` is built. The names mean nothing to the base,
which can but guess. Use it to see the steps, then give the recipe a table of your own products.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from PIL import Image, ImageDraw

import trimtab

BRANDS = {
    "Velora": ("crimson", "disc"),
    "Tannik": ("crimson", "bars"),
    "Osmund": ("seagreen", "disc"),
    "Birkel": ("seagreen", "bars"),
    "Quellan": ("royalblue", "disc"),
    "Harrow": ("royalblue", "bars"),
}
TEMPLATE = "a packet of {} tea"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/example-domain"), help="the adapted folder to write")
    parser.add_argument("--base", default="starter")
    parser.add_argument("--pictures", type=int, default=20, help="of each brand, to train on")
    parser.add_argument("--epochs", type=int, default=20)
    chosen = parser.parse_args(arguments)

    folder = chosen.out.parent / "example-packets"
    train = write_table(folder, "train", "text", chosen.pictures)
    validation = write_table(folder, "validation", "text", 6)
    test = write_table(folder, "test", "label", 10)
    outcome = trimtab.adapt(
        Path(__file__).parents[1] / "recipes" / "domain-grocery.yaml",
        [
            f"data.train={train}",
            f"data.validation={validation}",
            "data.views=1",
            "data.map_augmentation={}",  # the recipe's is for adapters in a convolutional trunk
            # The last layers of any base. Names are new here, so the text tower has an adapter too; a gate would need
            # it frozen.
            "adapters=[{tower: image, first: -2, last: -1}, {tower: text, first: -1, last: -1}]",
            "gate=none",
            f"base={chosen.base}",
            f"out={chosen.out}",
            f"training.epochs={chosen.epochs}",
            "least_steps=0",  # the recipe's own would be more epochs for so few pictures
            "training.batch_size=16",
        ],
    )
    assert outcome is not None  # None comes from the other processes of a distributed run
    for name in (chosen.base, outcome["folder"]):
        result = trimtab.evaluate_classification(name, test, list(BRANDS), templates=[TEMPLATE])
        print(f"{name}: {result['top1']:.0f}% of {result['n']} new packets get their brand")
    print(f"the hardest pairs, where wrong captions would show up: {outcome['report']}")


def write_table(folder: Path, split: str, column: str, count: int) -> Path:
    """Pictures of every brand and their table, with captions in `text` or names in `label`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", column])
        for brand, (colour, mark) in BRANDS.items():
            for number in range(count):
                image = f"{split}-{brand}-{number}.png"
                draw_packet(colour, mark, random.Random(image)).save(folder / image)
                writer.writerow([image, brand if column == "label" else TEMPLATE.format(brand)])
    return path


def draw_packet(colour: str, mark: str, rng: random.Random) -> Image.Image:
    """A packet somewhere on a grey shelf, in some light."""
    shelf = rng.randint(120, 220)
    picture = Image.new("RGB", (160, 160), (shelf, shelf, shelf - 15))
    draw = ImageDraw.Draw(picture)
    x, y, width, height = rng.randint(15, 45), rng.randint(5, 25), rng.randint(70, 95), rng.randint(100, 125)
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    if mark == "disc":
        side = width // 2
        left, top = x + width // 4, y + height // 3
        draw.ellipse((left, top, left + side, top + side), fill="white")
    else:
        for part in (3, 5, 7):
            draw.rectangle((x, y + part * height // 10, x + width, y + (part + 1) * height // 10), fill="white")
    return picture


if __name__ == "__main__":
    main()
