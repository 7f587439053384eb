"""The benchmark of few-shot prompts takes no part of another run for its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_prompt import toy_recipe, write_labelled

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import prompt


def test_parts_of_another_run_are_not_taken(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = [write_labelled(tmp_path / name, 30, first=first) for name, first in (("one", 0), ("other", 50))]
    test = [{"path": str(write_labelled(tmp_path / "test", 9, first=90))}]
    measured: list[str] = []

    def measure(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        measured.append(command[-1])
        return subprocess.CompletedProcess(command, 0, json.dumps({"part": command[-1]}), "")

    def parts_of(table: Path, *options: str, **changes: Any) -> int:
        """How many parts a call measures."""
        measured.clear()
        data = {"train": str(table), "test": test, "views": 1}
        recipe = toy_recipe(tiny_folder("clip"), table, tmp_path / "out", data=data, **changes)
        monkeypatch.setattr(prompt, "recipe_of", lambda arguments: recipe)
        out = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "prompt.json")]
        monkeypatch.setattr(sys, "argv", ["prompt", *out, *options])
        prompt.main()
        return len(measured)

    monkeypatch.setattr(subprocess, "run", measure)
    monkeypatch.setattr(prompt, "table", lambda found: "")
    every = len(prompt.PARTS)
    found = [parts_of(tables[0]), parts_of(tables[0]), parts_of(tables[1]), parts_of(tables[0], "--steps", "9")]
    assert [*found, parts_of(tables[0], steps=25)] == [every, 0, every, every, every]
