"""The page of a few-shot sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trimtab
from trimtab.evaluation.blocks import Block, Tile
from trimtab.evaluation.fewshot_summaries import (
    MAIN_METHOD,
    MEAN,
    METHODS,
    fewshot_curves,
    fewshot_table,
    names_of,
    spread_of,
)
from trimtab.evaluation.report import Report, write_report

PROTOCOL = (
    "Every method learns from the same pictures of each class, chooses on the same validation pictures "
    "(as many as shots, at most 4 per class), and is measured once on the whole test set. Means over seeds; whiskers "
    "and small print are one standard deviation over seeds."
)


def write_fewshot_report(folder: str | Path, runs: Sequence[dict[str, Any]]) -> Path:
    """Write report.html and report.md; returns the page."""
    datasets = names_of(runs, "dataset")
    shown = MEAN if len(datasets) > 1 else datasets[0]
    verdict = fewshot_sentence(runs, shown)
    html, _ = write_report(
        folder,
        Report(
            "Few-shot learning, method by method",
            verdict,
            _tiles(runs, shown),
            fewshot_blocks(runs),
            context="trimtab fewshot",
            footer=f"trimtab {trimtab.__version__}",
        ),
    )
    return html


def fewshot_blocks(runs: Sequence[dict[str, Any]]) -> list[Block]:
    """Curves and a table for each data set."""
    datasets = names_of(runs, "dataset")
    tables = [fewshot_table(runs, one) for one in [*datasets, *([MEAN] if len(datasets) > 1 else [])]]
    return [fewshot_curves(runs, note=PROTOCOL), *tables]


def fewshot_sentence(runs: Sequence[dict[str, Any]], dataset: str) -> str:
    """Which method is best at the fewest and at the most shots."""
    counts = names_of(runs, "shots")
    told = []
    for shots in dict.fromkeys((counts[0], counts[-1])):
        found = {name: one for name in names_of(runs, "method") if (one := spread_of(runs, dataset, name, shots))}
        if found:
            best = max(found, key=lambda name: found[name].mean)
            plural = "picture" if shots == 1 else "pictures"
            told.append(
                f"With {shots} {plural} per class {METHODS.get(best, (best,))[0]} is best at {found[best].mean:.1f}%"
            )
    return ". ".join(told) + "."


def _tiles(runs: Sequence[dict[str, Any]], dataset: str) -> list[Tile]:
    counts = names_of(runs, "shots")
    methods = names_of(runs, "method")
    main = MAIN_METHOD if MAIN_METHOD in methods else methods[-1]
    tiles = []
    for shots in dict.fromkeys((counts[0], counts[-1])):
        found = spread_of(runs, dataset, main, shots)
        label = f"{METHODS.get(main, (main,))[0]}, {shots} shot{'s' if shots > 1 else ''}"
        tiles.append(Tile(label, found.mean if found else None, "%", str(dataset)))
    tiles.append(Tile("Runs", len(runs), "", f"{len(methods)} methods, {len(names_of(runs, 'seed'))} seeds"))
    return tiles
