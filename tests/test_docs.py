"""The papers say what is so: links, commands, Python, recipes, tables of keys, the README's figures."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from PIL import Image

import trimtab
from trimtab.adapters.domain import DomainAdapted
from trimtab.cli import app
from trimtab.config import (
    DomainAdapterConfig,
    DomainRecipe,
    LabelSource,
    LanguageRecipe,
    PairSource,
    PromptRecipe,
    TextSource,
    load_recipe,
    recipe_from_mapping,
)
from trimtab.data.packages import PACKAGES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import update_readme  # noqa: E402
import update_tables  # noqa: E402

PAPERS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
SCRIPTS = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("scripts/*.py")])
WITH_COMMANDS = [*PAPERS, *RECIPES, *SCRIPTS]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, kind: str) -> list[str]:
    found = _FENCE.finditer(path.read_text(encoding="utf-8"))
    return [textwrap.dedent(match["body"]) for match in found if match["kind"] == kind]


def prose(path: Path) -> str:
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


# Links


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#{1,6} +(.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAPERS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    problems = []
    for link in _LINK.findall(prose(path)):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        if not target.exists():
            problems.append(f"{link} does not exist")
        elif not target.is_relative_to(ROOT):
            problems.append(f"{link} leads out of the repository")
        elif anchor and anchor not in anchors(target):
            problems.append(f"{link} has no such heading")
    assert not problems


@pytest.mark.parametrize("path", PAPERS, ids=name_of)
def test_files_that_prose_names_exist(path: Path) -> None:
    """Inline code such as `src/trimtab/cli.py` or `training/loop.py`; results of runs aside."""
    for text in _INLINE.findall(prose(path)):
        if not re.fullmatch(r"[\w./-]+/[\w.-]+\.(py|md|yaml|svg)", text) or text.startswith("runs/"):
            continue
        places = [ROOT / text, ROOT / "src/trimtab" / text]
        assert any(place.exists() for place in places), f"{name_of(path)}: {text} does not exist"


# Commands


def shell_lines(path: Path) -> Iterator[str]:
    """Command lines of bash blocks, of comments in recipes, of indented lines in docstrings."""
    if path.suffix == ".md":
        lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    elif path.suffix == ".yaml":
        lines = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#   ")]
    else:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines = text.replace("\\\n", " ").splitlines()
        lines = [line for line in lines if line.startswith("    python ")]
    yield from filter(None, (line.strip() for line in lines))


def trimtab_calls(path: Path) -> Iterator[list[str]]:
    """Arguments of every call of `trimtab`, behind launchers too."""
    for line in shell_lines(path):
        words = shlex.split(line, comments=True)
        if "trimtab" in words:
            yield words[words.index("trimtab") + 1 :]
    if path.suffix == ".md":
        for text in _INLINE.findall(prose(path)):
            if text.startswith("trimtab ") and len(text.split()) > 2:
                yield shlex.split(text)[1:]


def check_call(arguments: list[str], where: str) -> None:
    """Parse as the command line would, without running anything."""
    group: Any = typer.main.get_command(app)
    if arguments == ["--version"] or arguments == ["--help"]:
        return
    name, *rest = arguments
    command = group.commands.get(name)
    assert command is not None, f"{where}: there is no command `trimtab {name}`"
    if rest in (["--help"], ["..."]):
        return
    context = command.make_context(name, list(rest))  # raises for an option or value that does not exist
    recipe = context.params.get("recipe")
    if recipe is not None and recipe.parts[0] == "recipes":
        assert (ROOT / recipe).is_file(), f"{where}: {recipe} does not exist"
    for override in context.params.get("overrides") or ():
        if override == "KEY=VALUE":
            continue
        if recipe is not None and (ROOT / recipe).is_file():
            load_recipe(ROOT / recipe, [override])
        else:
            base = {"link": "language", "data": {"train": ["pairs.csv"]}}
            recipe_from_mapping(base, where, [override])


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_commands_exist(path: Path) -> None:
    for arguments in trimtab_calls(path):
        check_call(arguments, f"{name_of(path)}: trimtab {' '.join(arguments)}")


def test_a_command_that_does_not_exist_is_noticed() -> None:
    for wrong in (
        ["adept", "x.yaml"],
        ["evaluate", "m", "--retreival", "x.csv"],
        ["adapt", "x.yaml", "training.epoch=3"],
    ):
        with pytest.raises(Exception, match=r"no command|[Nn]o such option|epochs"):
            check_call(wrong, "here")


def test_there_are_commands_to_check() -> None:
    assert len([call for path in WITH_COMMANDS for call in trimtab_calls(path)]) > 20


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_make_targets_and_scripts_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    texts = [*shell_lines(path), *(_INLINE.findall(prose(path)) if path.suffix == ".md" else ())]
    for text in texts:
        if match := re.match(r"make ([a-z-]+)", text):
            assert match[1] in targets, f"{name_of(path)}: `{text}`"
        if match := re.match(r"python (\S+\.py)", text):
            assert (ROOT / match[1]).is_file(), f"{name_of(path)}: `{text}`"


def test_every_command_and_option_is_in_the_papers() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAPERS)
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        if command.hidden:
            continue
        assert f"`trimtab {name}" in text, name
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                if option.startswith("--") and option != "--help":
                    assert f"`{option}" in text or f" {option} " in text, f"{name} {option}"


# Python


def python_blocks() -> list[Any]:
    found = [(path, code) for path in PAPERS for code in blocks(path, "python")]
    return [pytest.param(path, code, id=f"{name_of(path)}-{at}") for at, (path, code) in enumerate(found)]


@pytest.mark.parametrize(("path", "code"), python_blocks())
def test_python_compiles_and_names_what_exists(path: Path, code: str) -> None:
    tree = ast.parse(code, name_of(path))
    compile(tree, name_of(path), "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trimtab"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            # The one with the most members: a `DualEncoder` with a dial.
            owner = {"trimtab": trimtab, "model": DomainAdapted if "trimtab.load(" in code else None}.get(node.value.id)
            if owner is not None:
                known = hasattr(owner, node.attr) or node.attr in ("logit_scale", "embedding_dim", "fingerprint")
                assert known, f"{node.value.id}.{node.attr}"


# Recipes and tables of keys


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipes_load_and_open_with_their_command(path: Path) -> None:
    assert load_recipe(path)
    calls = list(trimtab_calls(path))
    assert calls, f"{name_of(path)} does not open with its command"
    assert calls[0][0] in ("adapt", "fewshot")
    assert calls[0][1] == name_of(path)


def test_yaml_in_the_papers_is_a_recipe(tmp_path: Path) -> None:
    found = [(path, code) for path in PAPERS for code in blocks(path, "yaml")]
    assert found
    for path, code in found:
        (tmp_path / "recipe.yaml").write_text(code, encoding="utf-8")
        assert load_recipe(tmp_path / "recipe.yaml"), path


def keys_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a recipe and their defaults."""
    for field in dataclasses.fields(cls):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if field.name == "data":
            yield from keys_of(get_type_hints(cls)["data"], "data.")
        elif dataclasses.is_dataclass(made):
            yield from keys_of(type(made), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, made


def defaults_in(text: str) -> dict[str, str]:
    """Keys and defaults of the three-column tables in a text."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            names = re.findall(r"`([^`]+)`", cells[0])
            values = cells[1].split(", ") if len(names) > 1 else [cells[1]]
            found |= {name: value.strip("` ") for name, value in zip(names, values, strict=True)}
    return found


def as_shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def test_the_reference_has_every_key_with_its_default() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    links = r"^### (?:The language link|The domain link|The prompt link|Training)$"
    _, language, domain, prompt, training = re.split(links, text, flags=re.M)
    training = training.partition("\n## ")[0]
    recipe, text_source = language.split("\nA source in ")
    domain_recipe, rest = domain.split("\nA source in ")
    pair_source, group = rest.split("\nA group in ")
    prompt_recipe, label_source = prompt.split("\nA labelled source ")
    for cls, part in (
        (LanguageRecipe, recipe + training),
        (TextSource, text_source),
        (DomainRecipe, domain_recipe + training),
        (PairSource, pair_source),
        (DomainAdapterConfig, group),
        (PromptRecipe, prompt_recipe + training),
        (LabelSource, label_source),
    ):
        shown = defaults_in(part)
        for name, default in keys_of(cls):
            assert name in shown, f"docs/reference.md lacks {name}"
            if default is not dataclasses.MISSING and name != "link":
                assert shown[name] == as_shown(default), name


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    for name in trimtab.__all__:
        assert f"trimtab.{name}" in text, name
    for name in vars(trimtab.DualEncoder):
        if not name.startswith("_"):
            assert re.search(rf"`{name}\b", text), f"DualEncoder.{name}"


def test_the_model_card_has_every_package_and_licence() -> None:
    text = (ROOT / "docs/starter.md").read_text(encoding="utf-8")
    registries = {"pypi": "PyPI", "npm": "npm", "debian": "Debian"}
    for package in PACKAGES.values():
        row = f"| `{package.name}` | {package.version} | {registries[package.registry]} | {package.licence} |"
        assert row in text, row
    assert text.count("| PyPI |") + text.count("| npm |") + text.count("| Debian |") == len(PACKAGES)


@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_the_keys_of_results_are_documented(
    task: str, tiny_base: Any, pictures: list[Image.Image], tmp_path: Path
) -> None:
    for at, picture in enumerate(pictures[:2]):
        picture.save(tmp_path / f"{at}.png")
    column = "label" if task == "classification" else "text"
    (tmp_path / "items.csv").write_text(f"image,{column}\n0.png,cat\n1.png,dog\n", encoding="utf-8")
    if task == "classification":
        result = trimtab.evaluate_classification(tiny_base("clip"), tmp_path / "items.csv", ["cat", "dog"])
    else:
        result = trimtab.evaluate_retrieval(tiny_base("clip"), tmp_path / "items.csv")
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    assert [key for key in result if f"`{key}`" not in text] == []


def test_the_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    release, _, under_way = trimtab.__version__.partition(".dev")
    dated = re.search(rf"^## \[{re.escape(release)}\] - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE)
    assert bool(dated) == (not under_way), "what a version has that is under way stands below Unreleased"
    assert text.index("## [Unreleased]") < text.index("## [0.")


# The README's figures


def results() -> dict[str, Any]:
    values = {"english_base": 40.0, "target_raw": 2.0, "adapted_target": 30.0, "adapted_english": 39.96}
    rows = [
        {"row": row, "dataset": dataset, "metric": metric, "value": value}
        for row, value in {**values, "adapted_target_csls": 33.0}.items()
        for dataset in ("tuxpaint", "openmoji")
        for metric in ("mR", "i2t R@1")
    ]
    return {"language": {"rows": rows}, "pairs": 123456, "seed": 0, "seconds": {"all": 600.0}}


def test_the_table_holds_the_figures_of_the_file() -> None:
    text = update_readme.table(results())
    assert "| English, base | 40.0 | 100% | 40.0 | 100% |" in text
    assert "| **Chinese, adapted** | **30.0** | **75%** | **30.0** | **75%** |" in text
    assert "not measured" in text
    assert "123,456 pairs of text; 10 minutes in all on the machine that ran it; seed 0." in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda found: found["language"]["rows"].pop(0),
            "'english_base', dataset 'tuxpaint', metric 'mR' stands 0 times",
        ),
        (lambda found: found["language"]["rows"].append(found["language"]["rows"][0]), "stands 2 times"),
        (lambda found: found["language"]["rows"][0].update(value=float("nan")), "not a percentage"),
        (lambda found: found["language"]["rows"][0].update(value=None), "not a percentage"),
        (lambda found: found["language"]["rows"][0].update(value=0.0), "is 0"),
        (lambda found: found.pop("language"), "no list language.rows"),
        (lambda found: found["language"]["rows"][0].pop("metric"), "no list language.rows"),
    ],
)
def test_incomplete_results_leave_the_readme_alone(
    change: Any, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results()
    change(found)
    (tmp_path / "results.json").write_text(json.dumps(found), encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- figures:language -->\nold\n<!-- /figures -->\n", encoding="utf-8")
    assert update_readme.main([str(tmp_path / "results.json"), "--readme", str(readme)]) == 1
    assert expected in capsys.readouterr().err
    assert "old" in readme.read_text(encoding="utf-8")


def test_the_readme_is_updated_between_its_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results()), encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_bytes((ROOT / "README.md").read_bytes())
    arguments = [str(tmp_path / "results.json"), "--readme", str(readme)]
    assert update_readme.main([*arguments, "--check"]) == 1
    assert update_readme.main(arguments) == 0
    assert update_readme.main([*arguments, "--check"]) == 0
    old, new = ((ROOT / "README.md").read_text(encoding="utf-8"), readme.read_text(encoding="utf-8"))
    assert new.split("<!-- figures:language -->")[0] == old.split("<!-- figures:language -->")[0]
    assert new.split("<!-- /figures -->")[1] == old.split("<!-- /figures -->")[1]
    assert "| English, adapted | 40.0 | 100% |" in new


def test_a_readme_without_markers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results()), encoding="utf-8")
    (tmp_path / "README.md").write_text("nothing\n", encoding="utf-8")
    assert update_readme.main([str(tmp_path / "results.json"), "--readme", str(tmp_path / "README.md")]) == 1
    assert "markers 0 times" in capsys.readouterr().err


def test_pages_say_what_benchmarks_found() -> None:
    assert update_tables.main(["--check"]) == 0


def test_tables_are_copied_between_their_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, table = tmp_path / "page.md", tmp_path / "one.md"
    page.write_text("a\n<!-- benchmark:one -->\nold\n<!-- /benchmark:one -->\nb\n", encoding="utf-8")
    arguments = [str(page), "--results", str(tmp_path)]
    assert update_tables.main(arguments) == 1
    assert "benchmark:one has no table" in capsys.readouterr().err
    table.write_text("nothing was measured\n", encoding="utf-8")
    assert update_tables.main(arguments) == 1
    assert "no table in" in capsys.readouterr().err
    table.write_text("\n| Method | top-1 |\n|---|---:|\n| Adapter | 71.5 |\n", encoding="utf-8")
    assert update_tables.main([*arguments, "--check"]) == 1
    assert update_tables.main(arguments) == 0
    assert update_tables.main([*arguments, "--check"]) == 0
    copied = "| Method | top-1 |\n|---|---:|\n| Adapter | 71.5 |\n"
    marked = f"a\n<!-- benchmark:one -->\n{copied}<!-- /benchmark:one -->\nb\n"
    assert page.read_text(encoding="utf-8") == marked
    page.write_text("<!-- benchmark:one -->\nno end\n", encoding="utf-8")
    assert update_tables.main(arguments) == 1
    assert "is not closed" in capsys.readouterr().err
