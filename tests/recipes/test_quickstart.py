"""The quickstart's own steps, on a tiny base, a tiny student and a handful of pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tiny_language import toy_pairs
from trimtab.adapters.adapted import load
from trimtab.config import recipe_from_mapping
from trimtab.data.fashion import CHINESE, FashionFiles
from trimtab.data.pictures import Captioned
from trimtab.errors import DataError, RecipeError
from trimtab.evaluation.blocks import Cell, as_cell
from trimtab.evaluation.markdown import block_markdown
from trimtab.recipes import quickstart as module
from trimtab.recipes import quickstart_language, quickstart_prompt, quickstart_together
from trimtab.recipes.compose import compose
from trimtab.recipes.quickstart_domain import domain_sentence

CLASSES = ("bag", "coat", "dress")
WORDS = {"猫": "A cat.", "狗": "A dog.", "花": "A flower.", "车": "A car."}


def write_clothes(folder: Path) -> FashionFiles:
    """In the place of `write_fashion`: grey squares, twelve to train on, six each for validation and test."""
    files = FashionFiles(*(folder / name for name in ("train.csv", "validation.csv", "test.csv", "classes.txt")))
    grey = 0
    for path, count in ((files.train, 12), (files.validation, 6), (files.test, 6)):
        (folder / path.stem).mkdir(parents=True)
        lines = ["image,label" if path == files.test else "image,text,label"]
        for number in range(count):
            name, grey = CLASSES[number % 3], grey + 9
            image = f"{path.stem}/{number}.png"
            Image.new("L", (28, 28), grey).save(folder / image)
            lines.append(f"{image},{name}" if path == files.test else f"{image},a photo of a {name},{name}")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    files.classes.write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Path:
    """What the quickstart leaves, run once with everything big replaced. Shared: do not change anything."""
    tmp_path = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as monkeypatch:
        _replace_everything_big(monkeypatch, tmp_path, tiny_folder)
        module.quickstart(tmp_path / "out")
    return tmp_path / "out"


def _replace_everything_big(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    items = []
    for number, (target, english) in enumerate(WORDS.items()):
        path = tmp_path / "source" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (60 * number, 90, 200 - 40 * number)).save(path)
        items.append(Captioned(path, english, target))
    pairs = tmp_path / "pairs.csv"
    # The test words themselves are among the pairs: the quickstart has to keep them out.
    rows = [*toy_pairs(200), *((target, english) for target, english in WORDS.items())]
    pairs.write_text("target,english\n" + "\n".join(",".join(row) for row in rows), encoding="utf-8")

    def recipe(path: str | Path, overrides: list[str]) -> Any:
        if Path(path).name == "domain-fashion.yaml":
            domain = {
                "link": "domain",
                "base": str(tiny_folder("clip")),
                "data": {"train": ["nowhere.csv"]},
                "adapters": [{"tower": "image", "width": 4}],
                "training": {"epochs": 2, "batch_size": 3, "log_every": 1},
            }
            return recipe_from_mapping(domain, "test", overrides)
        if Path(path).name == "prompt-fewshot.yaml":
            prompt = {
                "link": "prompt",
                "base": str(tiny_folder("clip")),
                "data": {"train": ["nowhere.csv"]},
                "prompt": {"instance": {"width": 8, "heads": 2}},
                "steps": 4,
                "training": {"epochs": 2, "batch_size": 6, "log_every": 1, "trackers": []},
            }
            return recipe_from_mapping(prompt, "test", overrides)
        mapping = {
            "link": "language",
            "base": str(tiny_folder("clip")),
            "student": str(tiny_folder("bert")),
            "data": {"train": [str(pairs)], "validation_size": 20},
            "adapter": {"width": 16, "heads": 2, "layers": 1},
            "training": {"epochs": 1, "batch_size": 32, "collapse_at": 1},
        }
        return recipe_from_mapping(mapping, "test", overrides)

    def pictures(*_: Any, **__: Any) -> Iterator[Captioned]:
        yield from items

    monkeypatch.setattr(module, "load_recipe", recipe)
    monkeypatch.setattr(quickstart_prompt, "SHOTS", (1, 2))
    monkeypatch.setattr(module, "fetch", lambda key: tmp_path)
    monkeypatch.setattr(module, "import_renderer", lambda: None)
    monkeypatch.setattr(module, "write_fashion", write_clothes)
    monkeypatch.setattr(quickstart_language, "tuxpaint_photos", lambda locale: items)
    monkeypatch.setattr(quickstart_language, "openmoji_pictures", pictures)


def test_without_the_renderer_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.setattr(module, "fetch", lambda key: pytest.fail(f"fetched {key}"))
    with pytest.raises(DataError, match=r"pip install 'trimtab\[quickstart\]'"):
        module.quickstart(tmp_path / "out")


def test_a_file_in_the_way_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("text", encoding="utf-8")
    monkeypatch.setattr(module, "fetch", lambda key: pytest.fail(f"fetched {key}"))
    with pytest.raises(RecipeError, match="is a file; choose another folder"):
        module.quickstart(tmp_path / "file")


def test_quickstart_leaves_everything_a_reader_needs(out: Path) -> None:
    assert {path.name for path in (out / "language-zh").iterdir()} == {
        "adapter.safetensors",
        "adapter.json",
        "README.md",
    }
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = {(row["row"], row["dataset"], row["metric"]): row["value"] for row in results["language"]["rows"]}
    for name in ("english_base", "target_raw", "adapted_target", "adapted_english"):
        for dataset in ("tuxpaint", "openmoji"):
            assert 0 <= rows[name, dataset, "mR"] <= 100
    assert rows["adapted_english", "tuxpaint", "mR"] == rows["english_base", "tuxpaint", "mR"]
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "data:image/" in html
    assert "猫" in html
    assert "Retrieval on pictures" in (out / "report.md").read_text(encoding="utf-8")


def test_the_domain_part_has_its_rows(out: Path) -> None:
    for folder in ("domain", "domain-uniform"):
        assert {path.name for path in (out / folder).iterdir()} == {"adapter.safetensors", "adapter.json", "README.md"}
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = results["domain"]["rows"]
    found = {(row["row"], row["dataset"], row["metric"]): row["value"] for row in rows}
    assert len(found) == len(rows)
    english = {row["dataset"]: row["value"] for row in results["language"]["rows"] if _is_english_mr(row)}
    for row, seed in (("base", None), ("adapter", 0), ("adapter_hard", 0)):
        assert {entry["seed"] for entry in rows if entry["row"] == row} == {seed}
        assert 0 <= found[row, "fashion", "top1"] <= 100
        assert found[row, "general", "score"] == pytest.approx(
            (found[row, "tuxpaint", "mR"] + found[row, "openmoji", "mR"]) / 2
        )
    for dataset, value in english.items():  # measured on the pictures as the language part embedded them
        assert found["base", dataset, "mR"] == value
    assert found["adapter", "training", "parameters"] == found["adapter_hard", "training", "parameters"] > 0
    lost = found["base", "general", "score"] - found["adapter_hard", "general", "score"]
    assert found["adapter_hard", "general", "forgetting"] == pytest.approx(lost)

    assert results["domain"]["seconds"].keys() == {"adapter", "adapter_hard", "all"}
    assert results["seconds"]["domain"] == results["domain"]["seconds"]["all"] < results["seconds"]["all"]

    points = {point["alpha"]: point for point in results["domain"]["alpha"]}
    assert list(points) == [0.0, 0.5, 1.0]
    for alpha, row in ((0.0, "base"), (1.0, "adapter_hard")):
        assert points[alpha]["domain"] == found[row, "fashion", "top1"]
        assert points[alpha]["general"] == pytest.approx(found[row, "general", "score"])


def test_the_prompt_part_has_its_rows_and_its_folder(out: Path) -> None:
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = results["prompt"]["rows"]
    assert {row["row"] for row in rows} == set(quickstart_prompt.COMPARED)
    assert {(row["dataset"], row["metric"], row["seed"]) for row in rows} == {("fashion", "top1", 1)}
    assert {row["shots"] for row in rows} == {1, 2}
    assert all(0 <= row["value"] <= 100 for row in rows)
    assert {path.name for path in (out / "prompt").iterdir()} == {"adapter.safetensors", "adapter.json", "README.md"}
    assert results["seconds"]["prompt"] == results["prompt"]["seconds"]["all"]
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "Few pictures: clothes from a few pictures" in text
    assert text.index("The dial alpha") < text.index("Few pictures") < text.index("Make it again")
    assert "learns prompts that name" in text


@pytest.mark.parametrize(("top1", "caution"), [(86.2, True), (87.8, False), (90.0, False)])
def test_the_prompt_part_says_what_templates_name_on_the_same_base(top1: float, caution: bool) -> None:
    runs = [
        {"method": method, "dataset": "fashion", "shots": shots, "seed": 1, "top1": 50.0}
        for method in quickstart_prompt.COMPARED
        for shots in quickstart_prompt.SHOTS
    ]
    recipe = recipe_from_mapping(
        {"link": "prompt", "out": "runs/q/prompt", "base": "runs/q/domain", "seed": 1,
         "data": {"train": "train.csv", "shots": 16}},
        "test",
    )  # fmt: skip
    adapted = {"test": {"top1": top1, "zero_shot": 87.8}}
    part = quickstart_prompt.PromptPart({"adapted": adapted}, runs, recipe)
    told = block_markdown(quickstart_prompt.prompt_section(part))
    assert f"they name {top1}% of the test pictures, hand templates on that link 87.8%" in told
    assert ("fewer pictures right than hand templates" in told) == caution
    shown = told.partition("```yaml")[2]
    assert all(line in shown for line in ("base: runs/q/domain", "seed: 1", "shots: 16")), "the run's own recipe"


def test_its_three_folders_go_together(out: Path) -> None:
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    found = {(row["row"], row["metric"]): row["value"] for row in results["together"]["rows"]}
    assert {row for row, _ in found} == set(quickstart_together.LABELS)
    assert found["base", "top1"] == found["language", "top1"]  # English keeps the base's tower
    clothes = {row["row"]: row["value"] for row in results["domain"]["rows"] if row["metric"] == "top1"}
    assert found["domain", "top1"] == clothes["adapter_hard"]
    assert found["language+domain+prompt", "top1"] == results["prompt"]["adapted"]["test"]["top1"]

    folders = [out / name for name in ("language-zh", "domain", "prompt")]
    names = out / "pictures/fashion/names.csv"
    compose(folders, out.parent / "all", names=names, device="cpu")
    model: Any = load(out.parent / "all", device="cpu")
    assert set(model.links) == {"domain", "language", "prompt"}
    rows = [line.split(",") for line in (out / "pictures/fashion/test.csv").read_text().splitlines()[1:]]
    paths = [str(out / "pictures/fashion" / path) for path, _ in rows]
    for given in (CLASSES, [CHINESE[name] for name in CLASSES]):
        best = model.classifier(given).scores(paths).argmax(axis=1)
        right = [CLASSES[at] == label for at, (_, label) in zip(best, rows, strict=True)]
        assert 100 * sum(right) / len(right) == pytest.approx(found["language+domain+prompt", "top1"])
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text.index("Few pictures") < text.index("All links in one model") < text.index("Make it again")
    assert f"--names {names}" in text


def _is_english_mr(row: dict[str, Any]) -> bool:
    return (row["row"], row["metric"]) == ("english_base", "mR")


def test_the_two_domain_runs_differ_in_hard_sampling_alone(out: Path) -> None:
    recipes = [
        json.loads((out / name / "adapter.json").read_text(encoding="utf-8"))["recipe"]
        for name in ("domain", "domain-uniform")
    ]
    assert [recipe["bank"].pop("enabled") for recipe in recipes] == [True, False]
    for recipe in recipes:
        recipe.pop("out")
    assert recipes[0] == recipes[1]


def test_the_report_tells_of_both_links(out: Path) -> None:
    text = (out / "report.md").read_text(encoding="utf-8")
    headings = ("A domain: clothes, shoes and bags", "Same pictures, same number of steps", "The dial alpha")
    for heading in (*headings, "Hardest training pairs", "How hard the test pictures are to name", "Make it again"):
        assert heading in text
    assert text.index("Where the pairs came from") < text.index(headings[0]) < text.index("Make it again")
    verdict = text.partition("\n\n")[2][:600]
    assert "Chinese text finds pictures" in verdict
    assert "it learns to name" in verdict


@pytest.mark.parametrize(
    ("lost", "words"), [(1.26, "loses 1.3 points"), (-0.4, "gains 0.4 points"), (0.01, "stays as good as it was")]
)
def test_the_sentence_says_what_was_lost(lost: float, words: str) -> None:
    values = {
        ("base", "fashion", "top1"): 28.4,
        ("adapter_hard", "fashion", "top1"): 81.0,
        ("adapter_hard", "general", "forgetting"): lost,
    }
    rows = [
        {"row": row, "dataset": dataset, "metric": metric, "value": value, "seed": 0}
        for (row, dataset, metric), value in values.items()
    ]
    sentence = domain_sentence({"rows": rows, "sizes": {"train": 1500, "test": 1000}})
    assert sentence == (
        "From 1,500 pictures of clothes, shoes and bags it learns to name 81% of 1,000 others, 28% before; "
        f"elsewhere it {words}."
    )


def test_rules_that_dropped_pairs_stand_below_their_number() -> None:
    counts = {
        "cedict": {"kept": 90, "empty": 0, "too_long": 1204, "duplicate": 6},
        "excluded as test texts": {"kept": 80, "dropped": 10},
        "nouns in templates": {"kept": 5},
    }
    table = quickstart_language.counts_table(counts)
    assert [[as_cell(cell) for cell in row.cells] for row in table.rows] == [
        [Cell("cedict"), Cell(90), Cell(1210, "too long 1,204, duplicate 6")],
        [Cell("excluded as test texts"), Cell(80), Cell(10)],
        [Cell("nouns in templates"), Cell(5), Cell(0)],
    ]


def test_test_texts_are_kept_out_of_training(out: Path) -> None:
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["counts"]["excluded as test texts"]["dropped"] >= len(WORDS)


def test_manifests_evaluate_on_their_own(out: Path) -> None:
    from trimtab.recipes.evaluate import evaluate_retrieval

    result = evaluate_retrieval(out / "language-zh", out / "pictures" / "tuxpaint-zh.csv")
    assert result["n_images"] == len(WORDS)


def test_the_committed_recipe_is_found_and_loads(tmp_path: Path) -> None:
    recipe = module.quickstart_recipe(tmp_path)
    assert recipe.out == str(tmp_path / "language-zh")
    assert len(recipe.data.exclude) == 2


def test_the_committed_domain_recipe_reads_what_the_quickstart_writes(tmp_path: Path) -> None:
    files = FashionFiles(*(tmp_path / name for name in ("train.csv", "validation.csv", "test.csv", "classes.txt")))
    recipe = module.domain_recipe(tmp_path, files)
    assert recipe.out == str(tmp_path / "domain")
    assert [source.path for source in (*recipe.data.train, *recipe.data.validation)] == [
        str(files.train),
        str(files.validation),
    ]
    assert (recipe.base, recipe.bank.enabled, recipe.method) == ("starter", True, "adapter")
    assert str(files.test) not in str(recipe)
