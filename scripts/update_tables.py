"""Copy the tables of benchmarks into the pages that show them, between their markers.

    python scripts/update_tables.py           # into README.md and docs/
    python scripts/update_tables.py --check   # write nothing; fail when a page says something else

A page asks for `benchmarks/results/NAME.md` by the comments `benchmark:NAME` and `/benchmark:NAME`.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPENING = re.compile(r"<!-- benchmark:(\w+) -->\n")


class Refused(Exception):  # noqa: N818 - it reads as what happened
    """A page cannot have its tables, and why."""


def update(page: str, results: Path) -> str:
    """The text of a page with the tables of `results`.

    Raises:
        Refused: there is no such table, or a marker is not closed.
    """
    parts, at = [], 0
    for opening in OPENING.finditer(page):
        name = opening[1]
        end = page.find(f"<!-- /benchmark:{name} -->", opening.end())
        if opening.start() < at or end < 0:
            raise Refused(f"the marker benchmark:{name} is not closed before the next, or at all")
        source = results / f"{name}.md"
        try:
            table = source.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise Refused(f"benchmark:{name} has no table: {error}") from error
        if "|---" not in table:
            raise Refused(f"there is no table in {source}: run its benchmark")
        parts += [page[at : opening.end()], table, "\n"]
        at = end
    return "".join([*parts, page[at:]])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="README.md and all of docs/ by default")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the tables")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page differs")
    chosen = parser.parse_args(arguments)
    differing = []
    for page in chosen.pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        try:
            before = page.read_text(encoding="utf-8")
            updated = update(before, chosen.results)
        except (OSError, UnicodeDecodeError, Refused) as error:
            print(f"error: {page}: {error}", file=sys.stderr)
            return 1
        if updated != before:
            differing.append(page)
            if not chosen.check:
                page.write_text(updated, encoding="utf-8")
    for page in differing:
        said = f"error: {page} does not say what its benchmarks found" if chosen.check else f"wrote {page}"
        print(said, file=sys.stderr if chosen.check else sys.stdout)
    return int(chosen.check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
