"""Characters that steer what shows a text: in file names, tables and descriptions they are somebody else's."""

from __future__ import annotations

import re

CONTROLS = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069"
"""For a set of a regular expression: C0 and C1 without tabs and line ends, and what turns the direction of a text."""
_OF_TERMINALS = re.compile(f"[{CONTROLS}]|\r(?!\n)")  # a lone return would write over what stands in the line


def without_controls(text: str) -> str:
    """Text for a terminal, with U+FFFD for what would clear it, hide a line or turn letters around."""
    return _OF_TERMINALS.sub("\N{REPLACEMENT CHARACTER}", text)
