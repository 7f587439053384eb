"""A run on a disk where nothing is free, as the links that cache pictures must tell of it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimtab.recipes.adapt import adapt


def check_full_disk_is_named(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before the work and by `--dry-run`, with the remedies; no more once all is cached.

    Args:
        recipe: of one view of each picture, with an empty cache.
    """
    full = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr("trimtab.recipes.estimates.shutil", full)
    for dry_run in (True, False):
        caplog.clear()
        adapt(recipe, dry_run=dry_run)
        assert re.search(r"has 0\.0 GB: .* fewer data\.views \(now 1\), or .* TRIMTAB_CACHE", caplog.text)
    caplog.clear()
    capsys.readouterr()
    adapt(recipe, dry_run=True)
    assert "free         0.00 GB on its disk" in capsys.readouterr().out
    assert "TRIMTAB_CACHE" not in caplog.text  # by now all is cached
