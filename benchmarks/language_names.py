"""How much of its English the quickstart's model keeps on names whose English its pairs had, and on those they had not.

    python benchmarks/language_names.py runs/quickstart

The drawings of OpenMoji that test the language link have names whose Chinese stands in no training pair. The English of
some does, beside a synonym. Both groups of names are ranked here among all drawings of the test.
"""

from __future__ import annotations

import argparse
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.adapters.adapted import load_adapted
from trimtab.data.manifests import read_retrieval
from trimtab.evaluation.ranking import Ranks, rank_embeddings
from trimtab.files import write_json, write_text
from trimtab.recipes.quickstart import quickstart_recipe
from trimtab.recipes.sources import prepare

KNOWN, UNKNOWN = "in a training pair, beside a synonym", "in no training pair"
RESULT = Path(__file__).parent / "results" / "language_names.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="folder of the quickstart")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    pairs = prepare(quickstart_recipe(arguments.quickstart)).train
    english, chinese = (
        read_retrieval(arguments.quickstart / "pictures" / f"openmoji-{language}.csv") for language in ("en", "zh")
    )
    # One drawing, one name and one translation each, in one order.
    assert english.positives == chinese.positives == [(at, at) for at in range(len(english.images))]
    assert not set(map(plain, chinese.texts)) & set(map(plain, pairs.targets))
    known = stands_in(english.texts, pairs.english)
    model = load_adapted(arguments.quickstart / "language-zh")
    pictures = model.encode_image(english.images)
    ranks = {
        name: rank_embeddings(model.encode_text(texts), pictures, np.array(english.positives))
        for name, texts in (("english", english.texts), ("chinese", chinese.texts))
    }
    rows = [
        {"names": name, "count": int(group.sum()), **{side: mean_recall(found, group) for side, found in ranks.items()}}
        for name, group in ((KNOWN, known), (UNKNOWN, ~known), ("all", np.ones(len(known), bool)))
    ]
    write_json(arguments.out, {"pairs": len(pairs), "rows": rows})
    write_text(arguments.out.with_suffix(".md"), as_table(rows))


def plain(text: str) -> str:
    """A name without case, punctuation, blanks and article."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        del words[0]
    return "".join(one for one in "".join(words) if one.isalnum())


def stands_in(names: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Which names (N,) are one of the texts."""
    known = set(map(plain, texts))
    return np.array([plain(name) in known for name in names])


def mean_recall(ranks: Ranks, group: np.ndarray) -> float:
    """mR of the names and drawings of a group, among all of them."""
    return 100 * float(np.mean([side[group] <= k for side in (ranks.rows, ranks.columns) for k in (1, 5, 10)]))


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| English name | names | English, base: mR | Chinese, adapted: mR | of English |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for row in rows:
        english, chinese = row["english"], row["chinese"]
        cells = [row["names"], row["count"], f"{english:.1f}", f"{chinese:.1f}", f"{100 * chinese / english:.0f}%"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
