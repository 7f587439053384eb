"""From few-shot runs to blocks: curves with their spread, and a table of means.

A run is a mapping with ``method``, ``dataset``, ``shots``, ``seed`` and ``top1`` in percent, as `trimtab fewshot`
writes it, a line each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from trimtab.evaluation.blocks import PALETTE_SIZE, Cell, Column, LinePanel, Lines, Series, Table, TableRow
from trimtab.evaluation.domain_summaries import Spread, spread

Run = Mapping[str, Any]

METHODS = {
    "template": ("Hand template", "zero-shot, one sentence"),
    "ensemble": ("Template ensemble", "zero-shot, several sentences"),
    "linear_probe": ("Linear probe", "logistic regression on frozen features"),
    "linear_probe_patches": ("Linear probe, patches too", "on embeddings and mean patch tokens"),
    "lp_plus_plus": ("LP++", "visual and text prototypes, blended"),
    "tip_adapter_f": ("Tip-Adapter-F", "a trained cache of the shots"),
    "clip_lora": ("CLIP-LoRA", "low-rank updates in both towers, few steps"),
    "coop": ("CoOp", "learned context"),
    "cocoop": ("CoCoOp", "learned context, shifted by each picture"),
    "general": ("General", "learned context, kept near the templates"),
    "general_instance": ("General + Instance", "without Domain"),
    "general_domain": ("General + Domain", "without Instance"),
    "structured": ("Structured prompt", "General, Instance and Domain"),
    "structured_context": ("Structured, General first", "General learns alone before the others"),
}
"""Names and explanations, in the order of tables."""

MAIN_METHOD = "structured"
MEAN = "mean of the data sets"
_COLORS = {"template": 0, "structured": 1, "lp_plus_plus": 2, "linear_probe": 3, "coop": 4, "tip_adapter_f": 5}


def found_values(runs: Iterable[Run]) -> dict[tuple[str, str, int], dict[int, float]]:
    """Top-1 by seed, of each data set, method and number of shots; the last of equal runs counts."""
    found: dict[tuple[str, str, int], dict[int, float]] = {}
    for run in runs:
        place = (run["dataset"], run["method"], int(run["shots"]))
        found.setdefault(place, {})[int(run["seed"])] = float(run["top1"])
    return found


def mean_over_sets(runs: Sequence[Run], method: str, shots: int, datasets: Sequence[str]) -> Spread | None:
    """Mean over data sets, and the deviation over seeds of that mean; None where a data set has no run.

    Only seeds that every data set has count.
    """
    values = found_values(runs)
    parts = [values.get((dataset, method, shots), {}) for dataset in datasets]
    seeds = set.intersection(*(set(part) for part in parts)) if parts else set()
    return spread(fmean(part[seed] for part in parts) for seed in sorted(seeds))


def spread_of(runs: Sequence[Run], dataset: str, method: str, shots: int) -> Spread | None:
    """Mean and deviation over the seeds of one data set, or of `MEAN`."""
    if dataset == MEAN:
        return mean_over_sets(runs, method, shots, names_of(runs, "dataset"))
    return spread(found_values(runs).get((dataset, method, shots), {}).values())


def names_of(runs: Iterable[Run], key: str) -> list[Any]:
    """Different values of a key: methods in the order of `METHODS`, numbers ascending, others as they come."""
    values = list(dict.fromkeys(run[key] for run in runs))
    if key == "method":
        order = list(METHODS)
        return sorted(values, key=lambda one: order.index(one) if one in METHODS else len(order))
    return sorted(values) if key in ("shots", "seed") else values


def fewshot_curves(runs: Sequence[Run], *, title: str = "Few-shot curves", note: str = "") -> Lines:
    """Top-1 over shots, a panel per data set, whiskers of one standard deviation over seeds.

    Other methods than those that have a colour of their own take the colours that are left; a note names the rest.
    """
    datasets = names_of(runs, "dataset")
    colors = {name: _COLORS[name] for name in names_of(runs, "method") if name in _COLORS}
    left = [color for color in range(1, PALETTE_SIZE) if color not in colors.values()]
    others = [name for name in names_of(runs, "method") if name not in _COLORS]
    colors |= dict(zip(others, left, strict=False))
    if hidden := [METHODS.get(name, (name,))[0] for name in others if name not in colors]:
        told = f"Not drawn, as more lines could not be told apart: {', '.join(hidden)}. See the tables."
        note = f"{note}\n\n{told}".strip()
    panels = []
    for dataset in [*datasets, *([MEAN] if len(datasets) > 1 else [])]:
        series = []
        for method in [name for name in names_of(runs, "method") if name in colors]:
            points = [(shots, spread_of(runs, dataset, method, shots)) for shots in names_of(runs, "shots")]
            known = [(shots, found) for shots, found in points if found is not None]
            if known:
                series.append(
                    Series(
                        METHODS.get(method, (method,))[0],
                        [float(shots) for shots, _ in known],
                        [found.mean for _, found in known],
                        color=colors[method],
                        spread=[found.deviation or 0.0 for _, found in known],
                    )
                )
        if series:
            panels.append(LinePanel(series, dataset, "pictures per class", "top-1, %", log_x=True, digits=1, tall=True))
    return Lines(panels, title=title, note=note)


def fewshot_table(runs: Sequence[Run], dataset: str, *, title: str = "") -> Table:
    """Methods by shots: mean over seeds, deviation in small print, the best of each column marked."""
    counts = names_of(runs, "shots")
    methods = names_of(runs, "method")
    cells = {(method, shots): spread_of(runs, dataset, method, shots) for method in methods for shots in counts}
    best = {
        shots: max((found.mean for method in methods if (found := cells[method, shots])), default=None)
        for shots in counts
    }
    rows = []
    for method in methods:
        label, meaning = METHODS.get(method, (method, ""))
        shown: list[Cell | None] = [Cell(label, note=meaning)]
        for shots in counts:
            found = cells[method, shots]
            if found is None:
                shown.append(None)
                continue
            top = best[shots] is not None and found.mean == best[shots] and len(methods) > 1
            small = "one seed" if found.deviation is None else f"± {found.deviation:.1f}"
            shown.append(Cell(found.mean, note=f"{small}{', best' if top else ''}", tone="good" if top else "plain"))
        rows.append(TableRow(shown, strong=method == MAIN_METHOD))
    columns = [Column("Method", numeric=False), *(Column(f"{shots}", "pictures per class") for shots in counts)]
    return Table(columns, rows, title=title or dataset)
