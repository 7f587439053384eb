"""Tables of the few-shot benchmarks, and which goals they reach: made of the lines of finished runs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from trimtab.evaluation.fewshot_summaries import MEAN, METHODS, mean_over_sets, names_of, spread_of

Run = Mapping[str, Any]
SETS, SEEDS = 5, 3  # that a goal is measured on
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5% quantiles of t, by degrees of freedom from 1
RIVALS = ("coop", "cocoop", "linear_probe", "linear_probe_patches", "lp_plus_plus", "tip_adapter_f", "clip_lora")


def report(runs: Sequence[Run], new: Sequence[Run] = (), shares: Sequence[Run] = ()) -> str:
    """All tables as Markdown."""
    parts = ["# Few-shot benchmarks", "", "Written by `benchmarks/fewshot.py` from the lines beside this file.", ""]
    parts += ["A figure without ± is of one seed.", ""]
    if runs:
        sets = names_of(runs, "dataset")
        parts += goals(runs, new, shares)
        for dataset in [MEAN, *sets] if len(sets) > 1 else sets:
            parts += [f"## {dataset}: top-1, percent", "", *method_table(runs, dataset), ""]
        parts += ["## Structured prompts against each rival", "", *wins(runs), ""]
        parts += ["± is half of the 95% interval of a mean over sets (Student's t), as in the goal of base-to-new."]
        parts += ["Fine and coarse groceries are the same photos: five sets are rather four.", ""]
    if new:
        parts += ["## Base to new classes, 16 shots", "", *new_table(new), ""]
    if shares:
        parts += ["## Shares of the training pictures of the groceries", "", *share_table(shares), ""]
    return "\n".join(parts)


def method_table(runs: Sequence[Run], dataset: str) -> list[str]:
    """Mean and deviation over seeds; methods that were not run everywhere have no mean over sets."""
    counts = names_of(runs, "shots")
    rows = []
    for method in names_of(runs, "method"):
        cells = [spread_of(runs, dataset, method, shots) for shots in counts]
        if any(cells):
            shown = [
                "–" if one is None else f"{one.mean:.1f} ± {one.deviation:.1f}" if one.deviation is not None
                else f"{one.mean:.1f}" for one in cells
            ]  # fmt: skip
            rows.append(f"| {METHODS.get(method, (method,))[0]} | {' | '.join(shown)} |")
    return [f"| shots | {' | '.join(map(str, counts))} |", "|---|" + "---:|" * len(counts), *rows]


def wins(runs: Sequence[Run]) -> list[str]:
    """How far structured prompts are ahead, over the sets and seeds that both were run on, and how sure that is."""
    counts = names_of(runs, "shots")
    rows = []
    for rival in (one for one in RIVALS if one in names_of(runs, "method")):
        cells = []
        for shots in counts:
            found = paired([run for run in runs if run["shots"] == shots], rival)
            cells.append(over_sets(found) if found else "–")
        rows.append(f"| {METHODS[rival][0]} | {' | '.join(cells)} |")
    head = [f"| points ahead of (sets won) | {' | '.join(map(str, counts))} |", "|---|" + "---:|" * len(counts)]
    return [*head, *rows]


def over_sets(found: Mapping[str, Sequence[float]]) -> str:
    """Mean of the sets' own means, half of its 95% interval, and sets won."""
    ahead = [fmean(one) for one in found.values()]
    half = f" ± {STUDENT[len(ahead) - 2] * stdev(ahead) / len(ahead) ** 0.5:.1f}" if len(ahead) > 1 else ""
    return f"{fmean(ahead):+.1f}{half} ({sum(one > 0 for one in ahead)} of {len(ahead)})"


def paired(runs: Sequence[Run], rival: str, figure: str = "top1") -> dict[str, list[float]]:
    """Structured less rival on the same seed and set, by set."""
    mine: dict[tuple[str, int], dict[str, float]] = {}
    for run in runs:
        if run["method"] in ("structured", rival):
            mine.setdefault((run["dataset"], run["seed"]), {})[run["method"]] = run[figure]
    found: dict[str, list[float]] = {}
    for (dataset, _), values in mine.items():
        if len(values) == 2:
            found.setdefault(dataset, []).append(values["structured"] - values[rival])
    return found


def goals(runs: Sequence[Run], new: Sequence[Run], shares: Sequence[Run]) -> list[str]:
    """The goals that were set before the runs, and what came out."""
    counts = names_of(runs, "shots")
    lines = ["## Goals", ""]

    def told(name: str, rival: str, least: float, among: Sequence[int]) -> None:
        found = {
            shots: paired([run for run in runs if run["shots"] == shots], rival) for shots in among if shots in counts
        }
        ahead = {shots: fmean(fmean(one) for one in sets.values()) for shots, sets in found.items() if sets}
        if ahead:
            reached = all(value > least for value in ahead.values())
            shown = ", ".join(f"{shots}: {value:+.1f}" for shots, value in ahead.items())
            pairs = [len(one) for sets in found.values() for one in sets.values()]
            few = min(len(sets) for sets in found.values()) < SETS or min(pairs) < SEEDS
            mark = f"{'reached' if reached else 'NOT reached'}{' so far' if few else ''}"
            runs_of = f"{sum(pairs)} pairs of runs, {max(len(sets) for sets in found.values())} sets"
            lines.append(f"- {mark}: {name} (points ahead at {shown}; {runs_of})")

    told("above CoOp at each number of shots", "coop", 0.0, counts)
    told("above the linear probe up to 8 shots", "linear_probe", 0.0, [shots for shots in counts if shots <= 8])
    told("level with LP++ or above (at most half a point behind)", "lp_plus_plus", -0.5, counts)
    told("level with CLIP-LoRA or above, on the sets it was run on", "clip_lora", -0.5, counts)
    told("level with Tip-Adapter-F or above", "tip_adapter_f", -0.5, counts)
    if new:
        mean = {
            name: fmean(run["harmonic"] for run in new if run["method"] == name) for name in names_of(new, "method")
        }
        if {"structured", "coop"} <= mean.keys():
            ok = mean["structured"] > mean["coop"]
            few = len({(run["dataset"], run["seed"]) for run in new}) < SETS * SEEDS
            mark = f"{'reached' if ok else 'NOT reached'}{' so far' if few else ''}"
            lines.append(
                f"- {mark}: base-to-new harmonic mean above CoOp's ({mean['structured']:.1f} and {mean['coop']:.1f}; "
                f"points ahead, and sets won: {over_sets(paired(new, 'coop', 'harmonic'))})"
            )
    if shares:
        at = {(run["method"], run["share"]): run["top1"] for run in shares}
        mine, full = at.get(("structured", 0.125)), at.get(("resnet", 1.0))
        if mine is not None and full is not None:
            mark = "reached" if mine >= full else "NOT reached"
            lines.append(
                f"- {mark}: a ResNet's accuracy on all data with 12.5% of them ({mine:.1f}, ResNet {full:.1f})"
            )
    return [*lines, ""]


def new_table(runs: Sequence[Run]) -> list[str]:
    """Base, new and harmonic mean by set and method, means over seeds."""
    rows = []
    for dataset in names_of(runs, "dataset"):
        for method in names_of(runs, "method"):
            some = [run for run in runs if (run["dataset"], run["method"]) == (dataset, method)]
            if some:
                cells = [_mean([run[name] for run in some]) for name in ("base", "new", "harmonic")]
                rows.append(f"| {dataset} | {METHODS[method][0]} | {' | '.join(cells)} |")
    return ["| set | method | base | new | harmonic mean |", "|---|---|---:|---:|---:|", *rows]


def share_table(runs: Sequence[Run]) -> list[str]:
    """Top-1 by share."""
    shares = sorted({run["share"] for run in runs})
    names = {"resnet": "ResNet, from scratch", "trunk": "ImageNet trunk, fine-tuned"} | {
        key: name for key, (name, _) in METHODS.items()
    }
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        cells = []
        for share in shares:
            values = [run["top1"] for run in runs if (run["method"], run["share"]) == (method, share)]
            cells.append(_mean(values) if values else "–")
        rows.append(f"| {names.get(method, method)} | {' | '.join(cells)} |")
    head = [f"| share | {' | '.join(f'{100 * share:g}%' for share in shares)} |", "|---|" + "---:|" * len(shares)]
    return [*head, *rows]


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


__all__ = ["mean_over_sets", "report"]
