"""Links that were trained one by one, put together in one folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.adapters.composed import Composed
from trimtab.adapters.composing import load_composed
from trimtab.data.manifests import read_text
from trimtab.errors import DataError
from trimtab.scripts import normal_form


def compose(
    parts: Sequence[str | Path], out: str | Path, *, names: str | Path | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Write a composed folder for `trimtab.load`.

    Args:
        parts: a base and adapted folders, in any order; without a base that which the folders name.
        names: CSV or TSV with a column ``class``, names that the prompts know; every other column holds other names.

    Returns:
        what was composed.

    Raises:
        ModelError: links that do not go together; the message says why.
        DataError: `names` cannot be used.
    """
    aliases = None if names is None else read_aliases(names)
    model: Composed = load_composed(list(parts), aliases=aliases, device=device)
    folder = model.save_pretrained(out)
    return {
        "folder": str(folder),
        "base": model.base.name,
        "links": {name: link.name for name, link in model.links.items()},
        "names": len(model.aliases),
        "fingerprint": model.fingerprint,
    }


def read_aliases(path: str | Path) -> dict[str, str]:
    """Other names and the classes that they stand for.

    Raises:
        DataError: no column ``class`` or two of them, no other column, or a name of two classes.
    """
    delimiter = "\t" if str(path).lower().endswith(".tsv") else ","
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    rows, start = [], 1  # with the line that each starts on
    for row in reader:
        if row:
            rows.append((start, row))
        start = reader.line_num + 1
    header = [name.strip() for name in rows[0][1]]
    if header.count("class") != 1 or len(header) < 2:
        raise DataError(
            f"{path}: needs one column 'class' and one with other names; columns found: {', '.join(header)}"
        )
    place = header.index("class")
    found: dict[str, str] = {}
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise DataError(f"{path}, row {number}: has {len(row)} fields, the header has {len(header)}")
        others = [normal_form(cell.strip()) for cell in row]  # as classes are when trained
        own = others.pop(place)
        for name in filter(None, others):
            if found.setdefault(name, own) != own:
                raise DataError(f"{path}, row {number}: {name!r} stands for {found[name]!r} and for {own!r}")
    return {name: own for name, own in found.items() if name != own}
