"""Nothing imports upward: the arrows between the rooms of the house, read from the source without running it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import trimtab

SOURCE = Path(trimtab.__file__).parent
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))

GROUND = {"errors", "files", "controls", "scripts"}
CONFIG = {"config", "strict_yaml"}
TORCH = {"precision"}
LIGHT = {"__init__", "__main__", "cli"} | GROUND | CONFIG

# What each room may import of the package, itself apart. `recipes` alone composes everything.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "controls": set(),
    "scripts": set(),
    "files": {"errors"},
    "strict_yaml": {"errors"},
    "config": {"errors", "strict_yaml"},
    "precision": set(),
    "data": GROUND | CONFIG,
    "towers": GROUND | CONFIG | TORCH | {"data"},
    "adapters": GROUND | CONFIG | TORCH | {"towers"},
    "objectives": GROUND | CONFIG,
    "tasks": GROUND | CONFIG | TORCH | {"towers", "adapters", "objectives"},
    "training": GROUND | CONFIG | TORCH,
    "evaluation": GROUND | {"data"},
    "serve": GROUND | CONFIG | TORCH | {"data", "towers", "adapters"},
    "recipes": GROUND | CONFIG | TORCH | {"data", "towers", "adapters", "objectives", "tasks", "training", "evaluation"}
    | {"serve"},
    "cli": GROUND | {"config", "recipes", "serve"},
    "__main__": {"cli"},
    "__init__": {"adapters", "recipes", "towers"},
}  # fmt: skip

# An image source is a type that models and users share: it is named, never called.
# The package names its rooms for type checkers.
ANNOTATIONS: dict[str, set[str]] = {
    "adapters": {"trimtab.data.images"},
    "evaluation": {"trimtab.towers.dual_encoder"},
    "__init__": {f"trimtab.{room}" for room in ARROWS},
}
EXCEPTIONS = {
    ("cli/adapting.py", "trimtab.towers.open_clip"),  # a conversion is one call with nothing to compose
    ("recipes/starter.py", "transformers"),  # it makes a tower
    ("serve/merging.py", "transformers"),  # reads what it wrote as a program without Trimtab would
    ("serve/onnx_runtime.py", "transformers"),  # is itself a program without Trimtab
    ("serve/http/addresses.py", "urllib"),  # takes addresses apart; what is opened it decides itself
}

# Libraries that only some rooms know.
LIBRARIES: dict[str, set[str]] = {
    "torch": {"precision", "towers", "adapters", "objectives", "tasks", "training", "recipes", "serve"},
    "transformers": {"towers"},
    "open_clip": {"towers"},
    "timm": set(),
    "huggingface_hub": {"towers"},
    "tokenizers": {"towers", "serve"},
    "accelerate": {"training"},
    "safetensors": {"towers", "adapters", "training", "recipes"},
    "numpy": {"data", "towers", "adapters", "tasks", "training", "evaluation", "recipes", "serve"},
    "PIL": {"data", "towers", "evaluation", "recipes", "serve"},
    "pyarrow": {"data", "recipes", "serve"},
    "faiss": {"serve"},
    "fastapi": {"serve"},
    "pydantic": {"serve"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "onnx": {"serve"},
    "onnxruntime": {"serve"},
    "ray": {"serve"},
    "typer": {"cli"},
    "rich": {"cli", "towers", "training", "recipes"},
    "pickle": set(),
    "dill": set(),
    "joblib": set(),
    "requests": set(),
    "urllib": set(),
}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    annotation: bool
    """Under `if TYPE_CHECKING`."""


def imports_of(tree: ast.AST, annotation: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, annotation) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            # `from trimtab import strict_yaml` imports a module of that name
            packages = [f"trimtab.{alias.name}" for alias in node.names] if node.module == "trimtab" else [node.module]
            yield from (Import(name or "", node.lineno, annotation) for name in packages)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports_of(node, annotation=True)
        else:
            yield from imports_of(node, annotation)


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def read(path: Path) -> list[Import]:
    return list(imports_of(ast.parse((SOURCE / path).read_text(encoding="utf-8"))))


def test_every_room_is_on_the_plan() -> None:
    assert {room_of(path) for path in FILES} <= ARROWS.keys()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_arrows_between_rooms(path: Path) -> None:
    room = room_of(path)
    for found in read(path):
        _, _, inner = found.module.partition("trimtab.")
        if not found.module.startswith("trimtab.") or inner == "__version__":
            continue
        other = inner.split(".")[0]
        allowed = other == room or other in ARROWS[room] or (path.as_posix(), found.module) in EXCEPTIONS
        if found.annotation:
            allowed = allowed or found.module in ANNOTATIONS.get(room, set())
        assert allowed, f"{path}:{found.line}: {room} may not import {found.module}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    room = room_of(path)
    for found in read(path):
        library = found.module.split(".")[0]
        if found.annotation or library not in LIBRARIES or (path.as_posix(), library) in EXCEPTIONS:
            continue
        assert room in LIBRARIES[library], f"{path}:{found.line}: {room} may not import {library}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_code_out_of_text_or_paths(path: Path) -> None:
    """No `eval`, no `exec`, no import by a computed name but for the public names in a table."""
    for node in ast.walk(ast.parse((SOURCE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "compile", "__import__"), f"{path}:{node.lineno}: {name}"
            assert "import_module" not in name or path == Path("__init__.py"), f"{path}:{node.lineno}: {name}"
            if name == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{path}:{node.lineno}: unsafe torch.load"


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in LIGHT], ids=str)
def test_light_modules_import_only_light_ones_at_their_top(path: Path) -> None:
    light = {"trimtab", "yaml", "typer", "rich"} | set(sys.stdlib_module_names)
    own = ARROWS["__main__"] if path == Path("__main__.py") else set()
    tree = ast.parse((SOURCE / path).read_text(encoding="utf-8"))
    top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    for found in imports_of(top):
        assert found.module.split(".")[0] in light, f"{path}:{found.line}: {found.module} is heavy"
        if found.module.startswith("trimtab."):
            assert found.module.split(".")[1] in {*GROUND, *CONFIG, "__version__", room_of(path), *own}
