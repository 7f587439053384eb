"""How long a run will take and what room there is, in words, for `--dry-run`."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)


def about(seconds: float) -> str:
    """Whole minutes, as nobody can measure more from a few items."""
    return f"about {seconds / 60:.0f} min" if seconds >= 60 else "under a minute"


def room_on_disk(folder: Path, needed: float, *, views: int = 0) -> str:
    """What is free on the disk of a folder, which need not exist; a warning where `needed` bytes are more.

    Args:
        views: of each picture that are to be cached beside it.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        logger.warning(
            "the cache needs about %.1f GB more, the disk of %s has %.1f GB: free some space, %sor choose another "
            "folder in TRIMTAB_CACHE",
            needed / 1e9,
            folder,
            free / 1e9,
            f"give fewer data.views (now {views}), " if views else "",
        )
    return f"{free / 1e9:.2f} GB"
