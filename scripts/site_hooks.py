"""Makes links out of docs/ work on the docs site too: a file of the repository that a page links to gets a page there.

MkDocs calls these functions; `mkdocs.yml` names this file.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", "": "docker"}
_FOLDER = "repository"


def page_of(target: Path) -> str:
    """Where the site shows a file of the repository."""
    return f"{_FOLDER}/{target.relative_to(ROOT).as_posix()}.md"


def targets(text: str, folder: Path) -> list[Path]:
    """Files of the repository outside docs/ that a page of `folder` links to."""
    found = []
    for _, place, _ in _LINK.findall(text):
        target = Path(os.path.normpath(folder / place))
        outside = target.is_relative_to(ROOT) and not target.is_relative_to(ROOT / "docs")
        if "://" not in place and outside and target.is_file():
            found.append(target)
    return found


def shown(target: Path) -> str:
    """A file as a page: Markdown without its links, whose targets may have no page; anything else as code."""
    text = target.read_text(encoding="utf-8")
    if target.suffix == ".md":
        return _LINK.sub(r"\1", re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text))
    fence = "`" * 6
    name, language = target.relative_to(ROOT).as_posix(), _LANGUAGES.get(target.suffix, "text")
    return f"# {name}\n\n{fence}{language}\n{text}\n{fence}\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File, InclusionLevel

    docs = Path(config["docs_dir"])
    pages = [file for file in files if file.src_uri.endswith(".md")]
    for file in pages:
        text = (docs / file.src_uri).read_text(encoding="utf-8")
        for target in targets(text, (docs / file.src_uri).parent):
            if files.get_file_from_path(page_of(target)) is None:
                added = File.generated(config, page_of(target), content=shown(target))
                added.inclusion = InclusionLevel.NOT_IN_NAV
                files.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at the pages."""
    folder = Path(config["docs_dir"]) / posixpath.dirname(page.file.src_uri)

    def changed(match: re.Match[str]) -> str:
        words, _, anchor = match.groups()
        found = targets(match[0], folder)
        if not found or page.file.src_uri.startswith(_FOLDER):
            return match[0]
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"[{words}]({posixpath.relpath(page_of(found[0]), here)}{anchor or ''})"

    return _LINK.sub(changed, markdown)
