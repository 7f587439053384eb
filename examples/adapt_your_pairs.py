"""From a CSV of sentence pairs to a model that reads the language: the whole of it, on a small scale.

    python examples/adapt_your_pairs.py
    python examples/adapt_your_pairs.py --out runs/mine --base path/to/clip --student path/to/bert

It writes a CSV of a few hundred pairs itself, so that it is quick once `starter` and `e5-small` are built. So few pairs
teach the adapter these words and little else; use it to see the steps, then give it your file.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path

import trimtab

THINGS = {
    "猫": "cat", "狗": "dog", "马": "horse", "鸟": "bird", "鱼": "fish", "青蛙": "frog", "蝴蝶": "butterfly",
    "熊": "bear", "苹果": "apple", "香蕉": "banana", "蛋糕": "cake", "花": "flower", "树": "tree", "汽车": "car",
    "自行车": "bicycle", "飞机": "airplane", "船": "boat", "房子": "house", "椅子": "chair", "书": "book",
    "钟": "clock", "桥": "bridge",
}  # fmt: skip
SENTENCES = {
    "{}": "a {}", "一张{}的照片": "a photo of a {}", "红色的{}": "a red {}", "蓝色的{}": "a blue {}",
    "白色的{}": "a white {}", "小{}": "a small {}", "{}的特写": "a close-up of a {}", "桌子上的{}": "a {} on a table",
    "一幅{}的画": "a drawing of a {}", "带花的{}": "a {} with flowers", "很大的{}": "a very big {}",
    "窗边的{}": "a {} by the window",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/example"), help="the adapted folder to write")
    parser.add_argument("--base", default="starter")
    parser.add_argument("--student", default="e5-small")
    parser.add_argument("--epochs", type=int, default=20)
    chosen = parser.parse_args(arguments)

    table = chosen.out.parent / "example-pairs.csv"
    write_pairs(table)
    recipe = Path(__file__).parents[1] / "recipes" / "language-csv.yaml"
    outcome = trimtab.adapt(
        recipe,
        [
            f"data.train={table}",
            "data.validation_size=40",
            f"base={chosen.base}",
            f"student={chosen.student}",  # its last layer alone
            f"out={chosen.out}",
            f"training.epochs={chosen.epochs}",
            "training.batch_size=32",
        ],
    )
    assert outcome is not None  # None comes from the other processes of a distributed run
    print(f"translation match on pairs kept aside: {outcome['validation']['match']:.0f}%")

    model = trimtab.load(outcome["folder"])
    texts = ["一只红色的鸟", "a red bird", "a slice of bread"]
    cosines = model.encode_text(texts) @ model.encode_text(texts).T
    print(f"{texts[0]} and {texts[1]}: {cosines[0, 1]:.2f}; {texts[0]} and {texts[2]}: {cosines[0, 2]:.2f}")


def write_pairs(path: Path) -> None:
    """Every thing in every sentence, with the columns `target` and `english`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["target", "english"])
        for (target, english), (pattern, translation) in itertools.product(THINGS.items(), SENTENCES.items()):
            writer.writerow([pattern.format(target), translation.format(english)])


if __name__ == "__main__":
    main()
