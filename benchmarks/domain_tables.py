"""The tables and the goals of `benchmarks/domain.py`, from its finished runs alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from trimtab.evaluation.domain_summaries import Spread, spread

Run: TypeAlias = "dict[str, Any]"
"""One finished run, as a line of the output file holds it."""

Key: TypeAlias = "tuple[str, float, tuple[str, ...]]"
"""Row, share of the pairs, overrides that were asked for."""

NAMES = {
    "base": "Base, zero-shot",
    "full": "Continual fine-tuning",
    "full_hard": "Continual fine-tuning, hard sampling",
    "lora": "LoRA",
    "probe": "Linear maps on both towers",
    "linear_probe": "Linear classifier on frozen features",
    "adapter": "Adapter, no bank",
    "adapter_negatives": "Adapter, no hard sampling (hard negatives alone)",
    "adapter_hard": "**Adapter, hard sampling**",
    "adapter_hard_ungated": "The same, every picture adapted",
}
LEAD_OVER_FULL, LEAD_OVER_UNIFORM = 1.5, 0.7  # points of fine top-1
LARGEST_FORGETTING, LARGEST_SIZE, LARGEST_TIME = 1 / 4, 1 / 20, 1 / 3
SMALL_SHARE = 0.25

Figure: TypeAlias = "Callable[[Run], float | None]"


def latest(runs: Iterable[Run]) -> dict[Key, dict[int, Run]]:
    """By row and then by seed the runs of the setting that was run last; older recipes are left out.

    A run that was repeated without its curve over alpha keeps the curve of the run before.
    """
    every = [one for run in runs for one in (run, *without_gate(run))]
    found: dict[Key, dict[int, Run]] = {}
    for run in of_last_setting(every, key_of):
        seeds = found.setdefault(key_of(run), {})
        curve = run.get("alpha") or seeds.get(run["seed"], {}).get("alpha")
        seeds[run["seed"]] = {**run, "alpha": curve or []}
    order = list(NAMES)
    return dict(sorted(found.items(), key=lambda item: (-item[0][1], order.index(item[0][0]), item[0][2])))


def of_last_setting(runs: Sequence[Run], key: Callable[[Run], Hashable]) -> list[Run]:
    """Of the runs of each key those of the setting that was run last: older recipes are left out."""
    setting = {key(run): run["setting"] for run in runs}
    return [run for run in runs if run["setting"] == setting[key(run)]]


def without_gate(run: Run) -> list[Run]:
    """The row of the same adapters with the gate taken out, where a run has one; its alpha curve is the gated one's."""
    if run["row"] != "adapter_hard" or not run.get("ungated"):
        return []
    return [{**run, **run["ungated"], "row": f"{run['row']}_ungated", "alpha": []}]


def key_of(run: Run) -> Key:
    return run["row"], run["share"], tuple(run["set"])


def report(runs: Iterable[Run]) -> str:
    """Markdown: a table per share of the pairs, differences by seed, goals, the dial."""
    rows = latest(runs)
    measured = [run for seeds in rows.values() for run in seeds.values()]
    split = next((name for name in ("test", "scenes") if any(run.get(name) for run in measured)), "val")
    parts = []
    for share in dict.fromkeys(key[1] for key in rows):
        mine = {key: seeds for key, seeds in rows.items() if key[1] == share}
        parts.append(f"With {100 * share:g}% of the training pairs, {_on(split)}:\n\n{method_table(mine, split)}")
    parts += [difference_table(rows, split), goal_table(goals(rows, split), split), alpha_table(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def method_table(rows: dict[Key, dict[int, Run]], split: str) -> str:
    """A line per method: mean ± standard deviation over seeds; minutes only of runs that can be compared."""
    hard, full = (next((seeds for key, seeds in rows.items() if key[0] == row), {}) for row in ("adapter_hard", "full"))
    timed = timed_together(hard, full)
    lines = [
        "| Method | fine top-1 | coarse top-1 | general | forgotten, points | trained, % of base | minutes | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key, seeds in rows.items():
        figures: list[tuple[Figure, int]] = [
            (accuracy(split), 1),
            (accuracy(split, "coarse"), 1),
            (general_score, 1),
            (forgotten, 1),
            (size, 2),
            (minutes_of(timed), 1),
        ]
        found = [(over_seeds(seeds, figure), digits) for figure, digits in figures]
        cells = [shown(value, digits) for value, digits in found]
        lines.append(f"| {name_of(key)} | {' | '.join(cells)} | {'–' if key[0] == 'base' else len(seeds)} |")
    return "\n".join(lines)


def difference_table(rows: dict[Key, dict[int, Run]], split: str) -> str:
    """What hard sampling and the adapters gain, seed by seed."""
    lines = [
        "| Difference, paired by seed | fine top-1, points | error over classes | coarse top-1, points | seeds won |",
        "|---|---:|---:|---:|---:|",
    ]
    main = [key for key in rows if key[0] == "adapter_hard"]
    for key in main:
        without = [(row, key[1], key[2]) for row in ("adapter_negatives", "adapter")]
        for other in (("full", key[1], ()), *without, ("adapter_hard", key[1], ())):
            if other == key or other not in rows:
                continue
            fine = differences(rows[key], rows[other], accuracy(split))
            coarse = differences(rows[key], rows[other], accuracy(split, "coarse"))
            if fine:
                won = f"{sum(one > 0 for one in fine)} of {len(fine)}"
                error = error_over_classes(rows[key], rows[other], split)
                over_classes = "–" if error is None else f"± {error:.1f}"
                cells = [shown(spread(fine), 1, sign=True), over_classes, shown(spread(coarse), 1, sign=True), won]
                lines.append(f"| {name_of(key)} − {name_of(other)} | {' | '.join(cells)} |".replace("**", ""))
    return "\n".join(lines) if len(lines) > 2 else ""


def error_over_classes(mine: dict[int, Run], others: dict[int, Run], split: str) -> float | None:
    """Standard error of a difference in fine top-1 as the classes of the test vary, in points; None if not known.

    Of the seeds whose runs count right answers by class, averaged before. More seeds do not lower it: it is what this
    test set cannot tell. A class counts as one draw, since its pictures are of a few places and stand or fall together.
    """
    known = [seed for seed in mine if seed in others]
    known = [seed for seed in known if all((runs[seed].get(split) or {}).get("by_class") for runs in (mine, others))]
    if not known:
        return None
    counts = [[np.array(runs[seed][split]["by_class"], float) for seed in known] for runs in (mine, others)]
    ours, theirs = (np.mean(each, axis=0) for each in counts)  # (C, 2): right, all
    pictures = ours[:, 1]
    lead = ours[:, 0] - theirs[:, 0]
    residual = lead - lead.sum() / pictures.sum() * pictures
    classes = np.count_nonzero(pictures)
    return float(100 * np.sqrt(np.square(residual).sum() * classes / (classes - 1)) / pictures.sum())


@dataclass(frozen=True)
class Goal:
    """What was to be shown, what was found, and whether that is enough; None where a figure is missing."""

    wanted: str
    found: str
    reached: bool | None


def goals(rows: dict[Key, dict[int, Run]], split: str) -> list[Goal]:
    """The goals of the domain link, from the rows as the recipe has them."""
    hard, alike, uniform, full = (
        rows.get((row, 1.0, ()), {}) for row in ("adapter_hard", "adapter_negatives", "adapter", "full")
    )
    small = rows.get(("adapter_hard", SMALL_SHARE, ()), {})
    fine = accuracy(split)
    our_time, their_time = compared_minutes(hard, full)
    found = [
        _lead("continual fine-tuning", hard, full, fine, LEAD_OVER_FULL),
        # Of what the bank does, hard sampling is one part, and hard negatives the other.
        _lead("the adapter without hard sampling", hard, alike, fine, LEAD_OVER_UNIFORM),
        _lead("the adapter without the bank", hard, uniform, fine, LEAD_OVER_UNIFORM),
        _forgetting(hard, full),
        _ratio("trained parameters, of the base's", over_seeds(hard, size), Spread(100.0, None, 1), LARGEST_SIZE),
        _ratio("time, of continual fine-tuning's", our_time, their_time, LARGEST_TIME, " min"),
    ]
    little, whole = over_seeds(small, fine), over_seeds(full, fine)
    wanted = f"with {100 * SMALL_SHARE:g}% of the pairs at least continual fine-tuning with all"
    if little and whole:
        told = f"{shown(little, 1)} against {shown(whole, 1)}"
        return [*found, Goal(wanted, told, little.mean >= whole.mean)]
    return [*found, Goal(wanted, "not measured", None)]


def _lead(name: str, mine: dict[int, Run], others: dict[int, Run], figure: Figure, least: float) -> Goal:
    ahead = spread(differences(mine, others, figure))
    wanted = f"fine top-1 at least {least:g} points above {name}"
    return Goal(wanted, f"{shown(ahead, 2, sign=True)} points", ahead.mean >= least) if ahead else _unknown(wanted)


def _forgetting(mine: dict[int, Run], others: dict[int, Run]) -> Goal:
    wanted = "forgetting at most a quarter of continual fine-tuning's"
    ours, theirs = over_seeds(mine, forgotten), over_seeds(others, forgotten)
    if not ours or not theirs:
        return _unknown(wanted)
    told = f"{shown(ours, 2)} against {shown(theirs, 2)} points"
    if theirs.mean <= 0:  # a share of nothing
        return Goal(wanted, f"{told}: continual fine-tuning forgot nothing", ours.mean <= theirs.mean)
    return Goal(wanted, f"{told}, {100 * ours.mean / theirs.mean:.0f}%", ours.mean <= LARGEST_FORGETTING * theirs.mean)


def _ratio(name: str, mine: Spread | None, whole: Spread | None, most: float, unit: str = "") -> Goal:
    wanted = f"{name}: at most {100 * most:.3g}%"
    if not mine or not whole or not whole.mean:
        return _unknown(wanted)
    told = f" ({mine.mean:.1f} of {whole.mean:.1f}{unit})" if unit else ""
    return Goal(wanted, f"{100 * mine.mean / whole.mean:.3g}%{told}", mine.mean <= most * whole.mean)


def _unknown(wanted: str) -> Goal:
    return Goal(wanted, "not measured", None)


def goal_table(found: Sequence[Goal], split: str) -> str:
    says = {True: "yes", False: "no", None: "–"}
    where = {"test": "", "scenes": ", on held-out scenes"}.get(split, ", on validation")
    lines = [f"| Goal{where} | found | reached |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {one.wanted} | {one.found} | {says[one.reached]} |" for one in found)])


def alpha_table(rows: dict[Key, dict[int, Run]]) -> str:
    """Domain and general score along the dial; the domain's is that of validation, as the dial is a choice."""
    lines: list[str] = []
    for key, seeds in rows.items():
        curves = [{point["alpha"]: point for point in run["alpha"]} for run in seeds.values() if run.get("alpha")]
        if not curves:
            continue
        alphas = list(curves[0])
        if not lines:
            lines.append("| `alpha`: validation R@1, then general | " + " | ".join(f"{a:g}" for a in alphas) + " |")
            lines.append("|---|" + "---:|" * len(alphas))
        for side in ("domain", "general"):
            values = [spread([curve[alpha][side] for curve in curves if alpha in curve]) for alpha in alphas]
            lines.append(f"| {name_of(key)}, {side} | " + " | ".join(shown(value, 1) for value in values) + " |")
    return "\n".join(lines)


# Figures of a run; None where it has none


def accuracy(split: str, level: str = "fine") -> Figure:
    return lambda run: run[split][level] if run.get(split) else None


def general_score(run: Run) -> float | None:
    return run["general"]["after"] if run.get("general") else None


def forgotten(run: Run) -> float | None:
    return run["general"]["points"] if run.get("general") and run["row"] != "base" else None


def size(run: Run) -> float | None:
    """Trained parameters in percent of the base's."""
    return 100 * run["trained_parameters"] / run["base_parameters"] if "trained_parameters" in run else None


def timed_together(mine: dict[int, Run], others: dict[int, Run]) -> set[tuple[int, str | None]]:
    """Seeds, with their machine, that both were timed on one machine: their minutes can be compared."""
    clocks = [{(seed, run.get("machine")) for seed, run in seeds.items() if is_timed(run)} for seeds in (mine, others)]
    return clocks[0] & clocks[1]


def is_timed(run: Run) -> bool:
    """Not for runs that used cached features, nor for those marked by hand as `disturbed`, by others on their core."""
    return not run["warm"] and not run.get("disturbed")


def minutes_of(timed: set[tuple[int, str | None]]) -> Figure:
    """Of runs whose time counts, and only of those timed together if there are any."""
    return lambda run: (
        run.get("minutes") if is_timed(run) and (not timed or (run["seed"], run.get("machine")) in timed) else None
    )


def compared_minutes(mine: dict[int, Run], others: dict[int, Run]) -> tuple[Spread | None, Spread | None]:
    """Minutes of the seeds that were timed together."""
    timed = timed_together(mine, others)
    figure = minutes_of(timed)
    return (over_seeds(mine, figure), over_seeds(others, figure)) if timed else (None, None)


def over_seeds(seeds: dict[int, Run], figure: Figure) -> Spread | None:
    return spread([value for run in seeds.values() if (value := figure(run)) is not None])


def differences(mine: dict[int, Run], others: dict[int, Run], figure: Figure) -> list[float]:
    """By seed, where both were run: what varies with the seed alone falls out."""
    pairs = [(figure(mine[seed]), figure(others[seed])) for seed in mine if seed in others]
    return [a - b for a, b in pairs if a is not None and b is not None]


def shown(value: Spread | None, digits: int, *, sign: bool = False) -> str:
    if value is None:
        return "–"
    mean = round(value.mean, digits) + 0.0  # no minus before zero
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if value.deviation is None else f"{text} ± {value.deviation:.{digits}f}"


def name_of(key: Key) -> str:
    row, share, changes = key
    less = f" ({100 * share:g}% of the pairs)" if share != 1 else ""
    return f"{NAMES[row]}{less}{''.join(f', `{change}`' for change in changes)}"


def _on(split: str) -> str:
    return {"test": "on the test split", "scenes": "on training pictures in scenes of their own, held out"}.get(
        split, "on validation pictures"
    )
