"""What the command lines of several benchmarks have in common."""

from __future__ import annotations


def numbers(text: str) -> tuple[int, ...]:
    """ "1,2,3" as numbers: the type of an argument, so that anything else is refused with its name."""
    return tuple(int(part) for part in text.split(","))
