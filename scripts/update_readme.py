"""Write the figures of a `results.json` into the README, between their markers.

    python scripts/update_readme.py                  # from runs/quickstart/results.json
    python scripts/update_readme.py OTHER.json --check

Every figure of the table comes from the file; one that is missing, double or no number ends the script with status 1
and leaves the README as it was. `--check` writes nothing and fails when the README says something else. Tables of
benchmarks are copied by `update_tables.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METRIC = "mR"
REFERENCE = "english_base"
DATASETS = {"tuxpaint": "Tux Paint photos", "openmoji": "OpenMoji, held-out names"}
ROWS = {
    "english_base": "English, base",
    "target_raw": "Chinese, base",
    "adapted_target": "**Chinese, adapted**",
    "adapted_english": "English, adapted",
}
TRANSLATION = "Chinese translated into English, base"
MARKED = re.compile(r"(<!-- figures:language -->\n).*?(<!-- /figures -->)", re.DOTALL)
MARKED_QUICKSTART_DOMAIN = re.compile(r"(<!-- figures:domain -->\n).*?(<!-- /figures:domain -->)", re.DOTALL)
DOMAIN_ROWS = {
    "base": "base, zero-shot",
    "adapter": "adapters, all pairs alike",
    "adapter_hard": "**adapters, hard pairs more often**",
}
DOMAIN_COLUMNS = {
    ("fashion", "top1"): ("Clothes: top-1", "{:.1f}"),
    ("general", "score"): ("General: mR", "{:.1f}"),
    ("general", "forgetting"): ("Forgotten, points", "{:+.1f}"),
    ("training", "percent_of_base"): ("Trained, of the base", "{:.2f}%"),
    ("training", "minutes"): ("Minutes", "{:.1f}"),
}


class Refused(Exception):  # noqa: N818 - it reads as what happened
    """The results cannot go into the README, and why."""


def cells(results: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """The values that the table shows, by row and dataset.

    Raises:
        Refused: one is missing, stands twice or is not a percentage.
    """
    try:
        entries = results["language"]["rows"]
        found: dict[tuple[str, str], list[Any]] = {}
        for entry in entries:
            if entry["metric"] == METRIC:
                found.setdefault((entry["row"], entry["dataset"]), []).append(entry["value"])
    except (KeyError, TypeError) as error:
        raise Refused(f"there is no list language.rows of row, dataset, metric and value ({error!r})") from error
    values = {}
    for row in ROWS:
        for dataset in DATASETS:
            given = found.get((row, dataset), [])
            where = f"row {row!r}, dataset {dataset!r}, metric {METRIC!r}"
            if len(given) != 1:
                raise Refused(f"{where} stands {len(given)} times, not once")
            value = given[0]
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not 0 <= value <= 100:
                raise Refused(f"{where} is {value!r}, not a percentage")
            values[row, dataset] = float(value)
    for dataset in DATASETS:
        if values[REFERENCE, dataset] == 0:
            raise Refused(f"row {REFERENCE!r}, dataset {dataset!r} is 0: shares of it have no meaning")
    return values


def table(results: Mapping[str, Any]) -> str:
    """The Markdown between the markers."""
    values = cells(results)
    lines = [
        "| Text | " + " | ".join(f"{title}: mR | of English" for title in DATASETS.values()) + " |",
        "|---|" + "---:|---:|" * len(DATASETS),
    ]
    for row, title in ROWS.items():
        shown = []
        for dataset in DATASETS:
            value = values[row, dataset]
            shown += [f"{value:.1f}", f"{100 * value / values[REFERENCE, dataset]:.0f}%"]
        if row == "adapted_target":
            lines.append(f"| {TRANSLATION} |" + " not measured | – |" * len(DATASETS))
            shown = [f"**{text}**" for text in shown]
        lines.append(f"| {title} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", origin(results), ""])


def origin(results: Mapping[str, Any]) -> str:
    """One sentence on where the figures come from, as far as the file tells."""
    facts = []
    sizes = results["language"].get("sizes") or {}
    for dataset, title in DATASETS.items():
        if size := sizes.get(dataset):
            facts.append(f"{title}: {size['images']:,} pictures, {size['target_texts']:,} Chinese texts")
    if pairs := results.get("pairs"):
        facts.append(f"{pairs:,} pairs of text")
    if seconds := (results.get("seconds") or {}).get("all"):
        facts.append(f"{seconds / 60:.0f} minutes in all on the machine that ran it")
    if (seed := results.get("seed")) is not None:
        facts.append(f"seed {seed}")
    told = f" {'; '.join(facts)}." if facts else ""
    return f"From `make quickstart`, by `scripts/update_readme.py`.{told}"


def update(readme: str, results: Mapping[str, Any]) -> str:
    """The README's text with the table of these results.

    Raises:
        Refused: the results lack a figure, or the README does not have the markers exactly once.
    """
    readme = between(MARKED, readme, table(results), "the README")
    if "domain" in results and MARKED_QUICKSTART_DOMAIN.search(readme):
        readme = between(MARKED_QUICKSTART_DOMAIN, readme, domain_table(results["domain"]), "the README")
    return readme


def domain_table(domain: Mapping[str, Any]) -> str:
    """The quickstart's domain rows as Markdown; what a method does not have is a dash.

    Raises:
        Refused: a row lacks its score on the domain.
    """
    values = {(one["row"], one["dataset"], one["metric"]): one["value"] for one in domain["rows"]}
    lines = [
        "| Model | " + " | ".join(title for title, _ in DOMAIN_COLUMNS.values()) + " |",
        "|---|" + "---:|" * len(DOMAIN_COLUMNS),
    ]
    for row, title in DOMAIN_ROWS.items():
        if (row, "fashion", "top1") not in values:
            raise Refused(f"row {row!r} of domain.rows has no top1 on fashion")
        shown = [
            form.format(values[(row, *place)]) if (row, *place) in values else "–"
            for place, (_, form) in DOMAIN_COLUMNS.items()
        ]
        lines.append(f"| {title} | {' | '.join(shown)} |")
    for point in domain.get("alpha", []):
        if 0 < point["alpha"] < 1:
            lost = values["base", "general", "score"] - point["general"]
            shown = [f"{point['domain']:.1f}", f"{point['general']:.1f}", f"{lost:+.1f}", "–", "–"]
            lines.append(f"| the same at alpha {point['alpha']:g} | {' | '.join(shown)} |")
    return "\n".join([*lines, ""])


def between(markers: re.Pattern[str], page: str, text: str, name: str) -> str:
    """A page with other text between its markers."""
    updated, count = markers.subn(lambda match: match[1] + text + match[2], page)
    if count != 1:
        raise Refused(f"{name} has the markers {count} times, not once")
    return updated


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "runs/quickstart/results.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the README differs")
    chosen = parser.parse_args(arguments)
    source, page = chosen.results, chosen.readme
    try:
        before, found = (path.read_text(encoding="utf-8") for path in (page, source))
        updated = update(before, json.loads(found))
    except (OSError, ValueError, Refused) as error:
        print(f"error: {source}: {error}", file=sys.stderr)
        return 1
    if chosen.check:
        if updated != before:
            print(f"error: {page} does not say what {source} says", file=sys.stderr)
        return int(updated != before)
    page.write_text(updated, encoding="utf-8")
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
