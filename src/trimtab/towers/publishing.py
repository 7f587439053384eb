"""What an adapted or composed folder says of the machine it was made on, and what of that is published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from trimtab.files import write_json

_DESCRIPTIONS = ("adapter.json", "composed.json")
# What the model works with: names of classes and templates may begin as a path does.
_KEPT = ("config", "tensors", "aliases")


def hide_places(folder: Path) -> None:
    """Leave of all absolute paths in a folder's descriptions the last part, behind a "/".

    So a base is still told from a hub id: it is looked for beside the folder, or named by `trimtab relocate`.
    """
    for path in sorted(folder.rglob("*.json")):
        if path.name in _DESCRIPTIONS:
            about = json.loads(path.read_text(encoding="utf-8"))
            hidden = {key: value if key in _KEPT else _hidden(value) for key, value in about.items()}
            if hidden != about:
                write_json(path, hidden)


def _hidden(value: Any) -> Any:
    if isinstance(value, str):
        return _last_part(value)
    if isinstance(value, list):
        return [_hidden(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    found: dict[str, Any] = {}
    for key, item in value.items():
        name, number = _last_part(key), 2
        while name in found:  # files of one name in two folders
            name, number = f"{_last_part(key)} ({number})", number + 1
        found[name] = _hidden(item)
    return found


def _last_part(text: str) -> str:
    """A path of this or another system without its parents; any other text as it is."""
    paths = (PurePosixPath(text), PureWindowsPath(text))
    path = next((path for path in paths if path.is_absolute() or path.parts[:1] in (("~",), ("..",))), None)
    return text if path is None else f"/{path.name}"
