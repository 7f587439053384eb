from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
HEAVY = ("torch", "transformers", "numpy", "pyarrow", "PIL", "accelerate", "safetensors")


@pytest.mark.parametrize("module", ["trimtab", "trimtab.config", "trimtab.errors", "trimtab.files", "trimtab.cli"])
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", trimtab.__all__)
def test_public_names_are_there_on_first_use(name: str) -> None:
    value = getattr(trimtab, name)
    assert callable(value)
    assert value.__name__ == name
    assert value.__doc__


def test_public_names_are_listed() -> None:
    assert set(trimtab.__all__) <= set(dir(trimtab))
    assert set(trimtab.__all__) == trimtab._PLACES.keys()
    assert trimtab.__version__


def test_type_checkers_know_all_names_and_no_others() -> None:
    tree = ast.parse(Path(trimtab.__file__).read_text(encoding="utf-8"))
    checked = next(one for one in tree.body if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING")
    names = [name.name for one in checked.body if isinstance(one, ast.ImportFrom) for name in one.names]
    assert sorted(names) == sorted([*trimtab._PLACES, *trimtab._ROOMS])
    assert not any(isinstance(one, ast.FunctionDef) and one.name == "__getattr__" for one in tree.body)


def test_first_use_leaves_the_random_numbers_of_the_caller() -> None:
    code = "import random, trimtab; random.seed(0); trimtab.adapt; print(random.random())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert float(out.stdout) == random.Random(0).random()


def test_unknown_names_are_told_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'lod'; it has .*load"):
        trimtab.lod  # noqa: B018
    assert not hasattr(trimtab, "nothing_of_that_name")


def test_rooms_are_there_without_an_import_of_their_own() -> None:
    code = "import trimtab; print(trimtab.errors.DataError.__name__, trimtab.config.load_recipe.__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert out.stdout.split() == ["DataError", "load_recipe"]
