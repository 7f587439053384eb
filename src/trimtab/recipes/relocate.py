"""Say where the base and the student of an adapted folder are now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.adapters.adapted import load
from trimtab.adapters.composing import read_composed
from trimtab.adapters.files import COMPOSED_FILE, DESCRIPTION_FILE, is_adapted_folder, is_composed_folder
from trimtab.errors import ModelError
from trimtab.files import write_json
from trimtab.towers.hf import portable


def relocate(
    folder: str | Path, *, base: str | Path | None = None, student: str | Path | None = None
) -> dict[str, dict[str, str]]:
    """Write other places of base and student into an adapted or composed folder, once they are known to be the same.

    The model is loaded as it will be, so fingerprints, tokenizers and image processors are compared; its tensors stay
    as they are.

    Args:
        base, student: folder or hub id; None leaves what the adapted folder says.

    Returns:
        By file: what it names now.

    Raises:
        ModelError: neither is given, it is no adapted folder, it has no student, or one of them is another model;
            nothing has been written then.
        TrimtabError: the folder cannot be written.
    """
    folder = Path(folder)
    if not (is_adapted_folder(folder) or is_composed_folder(folder)):
        raise ModelError(f"{folder} is neither an adapted nor a composed folder on this machine")
    places = {role: portable(str(place)) for role, place in (("base", base), ("student", student)) if place is not None}
    if not places:
        raise ModelError(f"say where the models of {folder} are now: the base, the student or both")
    described = {path: _read(path) for path in _descriptions(folder)}
    where: dict[str, Any] = dict(places)
    load(folder, device="cpu", **where)
    # Prompts of a composed folder may name another link's folder as their base: that stays.
    old = list(described.values())[-1]["base"]["name"]
    named: dict[str, dict[str, str]] = {}
    for path, content in described.items():
        found = {role: content[role] for role in places if content.get(role)}
        found = {role: one for role, one in found.items() if role == "student" or one["name"] == old}
        for role, one in found.items():
            one["name"] = places[role]
        if found:
            write_json(path, content)
            named[str(path)] = {role: one["name"] for role, one in found.items()}
    return named


def _descriptions(folder: Path) -> list[Path]:
    """The files that name models; that of the folder itself comes last."""
    if not is_composed_folder(folder):
        return [folder / DESCRIPTION_FILE]
    links = [folder / name / DESCRIPTION_FILE for name in read_composed(folder)["links"]]
    return [*links, folder / COMPOSED_FILE]


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}): copy the folder again") from error
