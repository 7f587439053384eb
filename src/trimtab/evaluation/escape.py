"""Users' text made safe for HTML and Markdown, and the little structure that prose in blocks may have."""

from __future__ import annotations

import html
import re
from typing import NamedTuple

from trimtab.controls import CONTROLS

# Besides what HTML forbids, and lone surrogates, which cannot be written as UTF-8.
_UNPRINTABLE = re.compile(f"[{CONTROLS}\ud800-\udfff\ufffe\uffff]")
_MARKS = re.compile(r"([\\`*\[\]|~])|(?<!\w)(_)|(_)(?!\w)")


def printable(text: str) -> str:
    """Text with forbidden characters shown as U+FFFD."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def escape(text: str) -> str:
    """Text for HTML, in content or in a quoted attribute."""
    return html.escape(printable(text), quote=True)


def escape_markdown(text: str) -> str:
    """Text for one line of Markdown, also inside a table; line breaks become spaces."""
    flat = " ".join(printable(text).split())
    flat = _MARKS.sub(r"\\\g<0>", flat)
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shortened(text: str, letters: int) -> str:
    """Text of at most so many letters, with an ellipsis where it was cut."""
    return text if len(text) <= letters else text[:letters].rstrip() + "…"


class Passage(NamedTuple):
    """A paragraph (one line) or a list (a line per item)."""

    kind: str
    lines: list[str]


def passages(text: str) -> list[Passage]:
    """Paragraphs, which blank lines part, and runs of lines that start with "- "."""
    found: list[Passage] = []
    fresh = True
    for line in text.splitlines():
        line = line.strip()
        if not line:
            fresh = True
        elif line.startswith("- "):
            if fresh or not found or found[-1].kind != "list":
                found.append(Passage("list", []))
            found[-1].lines.append(line[2:].strip())
            fresh = False
        elif fresh or not found:
            found.append(Passage("paragraph", [line]))
            fresh = False
        elif found[-1].kind == "list":
            found[-1].lines[-1] += " " + line
        else:
            found[-1].lines[0] += " " + line
    return found


def code_spans(line: str) -> list[tuple[bool, str]]:
    """The line in pieces, each with whether it stood in back-quotes; an unpaired back-quote stays."""
    pieces = line.split("`")
    if len(pieces) % 2 == 0:
        pieces[-2:] = [f"{pieces[-2]}`{pieces[-1]}"]
    return [(at % 2 == 1, piece) for at, piece in enumerate(pieces) if piece]
