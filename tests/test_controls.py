from __future__ import annotations

import pytest

from trimtab.controls import without_controls

SHOWN = "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "control", ["\x1b", "\x9b", "\x07", "\x08", "\x00", "\x7f", "\u202e", "\u202a", "\u2066", "\u2069", "\r"], ids=repr
)
def test_what_steers_a_terminal_is_shown(control: str) -> None:
    assert without_controls(f"a{control}b") == f"a{SHOWN}b"


@pytest.mark.parametrize("text", ["", "a\tb\nc\r\n", "图 עברית العربية é 👩‍🚀", "\udcb0", "[red]"])
def test_other_text_stays(text: str) -> None:
    assert without_controls(text) == text
