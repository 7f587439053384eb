"""How long a run will take, in words, for `--dry-run`."""

from __future__ import annotations


def about(seconds: float) -> str:
    """Whole minutes, as nobody can measure more from a few items."""
    return f"about {seconds / 60:.0f} min" if seconds >= 60 else "under a minute"
