"""The few-shot sweep on a tiny model: what every method sees, what is repeated, what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import tiny_pairs
from tiny_prompt import NAMES, toy_mapping, toy_recipe, write_labelled
from trimtab.cli import app
from trimtab.config import PromptRecipe, load_recipe
from trimtab.errors import DataError, ModelError, RecipeError, TrimtabError
from trimtab.evaluation.classification import classify_embeddings
from trimtab.files import digest_of
from trimtab.precision import has_fast_bf16
from trimtab.recipes import fewshot as module
from trimtab.recipes import fewshot_methods as methods_module
from trimtab.recipes.fewshot import Plan, fewshot, mean_rows, read_fewshot, read_runs, setting
from trimtab.recipes.fewshot_methods import METHODS, PROMPT_METHODS, Episode, Fitted
from trimtab.recipes.prompt_fit import figures, right, settled

ROOT = Path(__file__).parents[2]
FAMILY = "vision-text-dual-encoder"
QUICK = (
    *("template", "ensemble", "linear_probe", "linear_probe_patches", "lp_plus_plus"),
    *("tip_adapter_f", "coop", "structured"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(home / "cache"))


@pytest.fixture(scope="module")
def tables(home: Path) -> dict[str, Path]:
    """Training and test pictures."""
    return {
        "train": write_labelled(home / "colours" / "train", 32),
        "test": write_labelled(home / "colours" / "test", 12, first=100),
    }


@pytest.fixture(scope="module")
def recipe(tiny_folder: Callable[[str], Path], tables: dict[str, Path], home: Path) -> PromptRecipe:
    return toy_recipe(
        tiny_folder(FAMILY), tables["train"], home / "out", data={"test": str(tables["test"])}, steps=6,
        training={"epochs": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def swept(recipe: PromptRecipe, home: Path) -> tuple[Path, list[dict[str, Any]]]:
    """One sweep over the quick methods."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(home / "cache"))
        patch.setattr(methods_module, "STRENGTHS", (50.0,))
        patch.setattr(methods_module, "BETAS", (1.0, 8.0))
        patch.setattr(methods_module, "ALPHAS", (0.0, 1.0))
        out = home / "runs.jsonl"
        return out, fewshot(recipe, Plan((1, 2), (1,), QUICK), out, progress=lambda _: None)


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Method and seed of every run from here on."""
    done: list[tuple[str, int]] = []
    original = module.run_once

    def counted(recipe: Any, method: str, pictures: Any, draw: Any, seed: int) -> Any:
        done.append((method, seed))
        return original(recipe, method, pictures, draw, seed)

    monkeypatch.setattr(module, "run_once", counted)
    return done


def test_a_run_is_a_line_with_what_is_worth_knowing(swept: tuple[Path, list[dict[str, Any]]]) -> None:
    out, runs = swept
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == len(runs) == 2 * len(QUICK)
    for run in lines:
        assert run["dataset"] == "colours"
        assert run["n_test"] == 12
        assert run["n_train"] == 4 * run["shots"]
        assert run["n_validation"] == 4 * run["shots"]
        assert 0 <= run["top1"] <= 100
        assert run["bf16"] is has_fast_bf16(torch.device("cpu"))
        assert run["data"] == lines[0]["data"]
    by_method = {(run["method"], run["setting"]) for run in lines}
    assert len(by_method) == len(QUICK), "shots and seeds are no part of a setting"
    by_name = {run["method"]: run for run in lines}
    assert by_name["template"]["trained_parameters"] == 0
    assert set(by_name["tip_adapter_f"]["chosen"]) == {"alpha", "beta", "epoch"}
    assert set(mean_rows(runs)) == set(QUICK)
    assert all(len(cells) == 2 for cells in mean_rows(runs).values())


def test_a_finished_run_is_not_repeated_and_an_interrupted_sweep_goes_on(
    recipe: PromptRecipe, swept: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, runs = swept
    plan = Plan((1, 2), (1,), QUICK)
    out = tmp_path / "runs.jsonl"
    lines = whole.read_text().splitlines()
    # A kill cut the last line off.
    out.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    done = count_runs(monkeypatch)
    again = fewshot(recipe, plan, out, progress=lambda _: None)
    assert done == [(QUICK[-1], 1)]
    assert [(run["method"], run["top1"]) for run in again] == [(run["method"], run["top1"]) for run in runs]
    assert len(read_runs(out)) == len(runs)
    fewshot(recipe, plan, out, progress=lambda _: None)
    assert len(done) == 1
    more = Plan((1, 2), (1, 3), ("template",))
    fewshot(recipe, more, out, progress=lambda _: None)
    assert done[1:] == [("template", 3)] * 2


def test_runs_of_a_base_that_read_pictures_otherwise_are_done_again(
    recipe: PromptRecipe, swept: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.loads(line) for line in swept[0].read_text().splitlines()]
    (template,) = (one for one in lines if one["method"] == "template" and one["shots"] == 1)
    out = tmp_path / "runs.jsonl"
    done = count_runs(monkeypatch)
    plan = Plan((1,), (1,), ("template",))
    older = {name: value for name, value in template.items() if name != "inputs"}  # as versions before wrote them
    for line, expected in ((template, 0), (older, 0), ({**template, "inputs": "other"}, 1)):
        out.write_text(json.dumps(line) + "\n")
        fewshot(recipe, plan, out, progress=lambda _: None)
        assert len(done) == expected
    assert len(read_runs(out)) == 2


def test_what_another_process_finished_meanwhile_is_not_done_again(
    recipe: PromptRecipe, swept: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = swept
    out = tmp_path / "runs.jsonl"
    done = count_runs(monkeypatch)
    counted = module.run_once

    def beside(*arguments: Any) -> Any:
        found = counted(*arguments)
        out.write_text(whole.read_text())
        return found

    monkeypatch.setattr(module, "run_once", beside)
    fewshot(recipe, Plan((1, 2), (1,), ("template",)), out, progress=lambda _: None)
    assert done == [("template", 1)]


def test_with_fewer_pictures_allowed_every_class_has_some_to_choose_by(
    recipe: PromptRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    drawn: list[Any] = []
    monkeypatch.setattr(
        module,
        "run_once",
        lambda recipe, method, pictures, draw, seed: drawn.append(draw) or {"top1": 0.0, "seconds": 0.0},
    )
    generous = replace(recipe, data=replace(recipe.data, allow_fewer=True))
    fewshot(generous, Plan((8,), (1,), ("template",)), tmp_path / "runs.jsonl", progress=lambda _: None)
    assert set(drawn[0].validation.labels.tolist()) == set(range(4))
    assert "no validation picture" not in caplog.text


def test_only_what_decides_a_method_makes_its_runs_new(recipe: PromptRecipe) -> None:
    from dataclasses import replace

    other = replace(recipe, steps=7, out="elsewhere", seed=5)
    assert module.setting(other, "linear_probe") == module.setting(recipe, "linear_probe")
    assert module.setting(other, "structured") != module.setting(recipe, "structured")
    assert module.setting(replace(recipe, out="elsewhere", seed=5), "coop") == module.setting(recipe, "coop")
    worded = replace(recipe, templates=("a drawing of a {}",))
    same = {name for name in METHODS if module.setting(worded, name) == module.setting(recipe, name)}
    assert same == {"linear_probe", "linear_probe_patches"}


def test_every_method_sees_the_same_pictures_and_none_of_the_test(
    recipe: PromptRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, tuple[list[str], list[str]]] = {}

    def spy(name: str) -> Callable[[Episode], Fitted]:
        def method(episode: Episode) -> Fitted:
            assert episode.train.embeddings.shape[0] == 2  # the picture and one view
            seen[name] = tuple(  # type: ignore[assignment]
                [picture.name for picture in part.features.files] for part in (episode.train, episode.validation)
            )
            assert [episode.classes[label] for label in episode.train.labels] == [
                NAMES[int(picture.removesuffix(".png")) % 4] for picture in seen[name][0]
            ]
            return Fitted(lambda pictures: torch.zeros(len(pictures), 4))

        return method

    for name in ("one", "two"):
        monkeypatch.setitem(METHODS, name, spy(name))
    fewshot(recipe, Plan((2,), (3,), ("one", "two")), tmp_path / "runs.jsonl", progress=lambda _: None)
    assert seen["one"] == seen["two"]
    train, validation = seen["one"]
    assert not set(train) & set(validation)
    assert all(int(name.removesuffix(".png")) < 100 for name in train + validation)


def test_ties_are_wrong() -> None:
    assert right(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)) == 0
    assert right(torch.eye(3), torch.arange(3)) == 100
    assert figures(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))["top1"] == 0, "also where prompts are chosen"
    assert module.mean_per_class(torch.zeros(4, 3), torch.tensor([0, 0, 1, 2])) == 0
    scores = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    assert module.mean_per_class(scores, torch.tensor([0, 0, 0, 1])) == pytest.approx((100 / 3 + 100) / 2)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equal_classes_tie_whatever_the_last_bits_of_their_products(scale: float) -> None:
    rng = torch.Generator().manual_seed(0)
    classes = torch.nn.functional.normalize(torch.randn(10, 128, generator=rng), dim=1)
    classes[-1] = classes[0]
    pictures = torch.nn.functional.normalize(classes[0] + 0.05 * torch.randn(997, 128, generator=rng), dim=1)
    logits, labels = scale * pictures @ classes.T, torch.zeros(997, dtype=torch.long)
    logits[::2, 0] += scale * 1e-7  # as far as sums in another order differ
    assert right(logits, labels, scale) == classify_embeddings(pictures.numpy(), classes.numpy(), labels.numpy()).top1
    assert module.mean_per_class(logits, labels, scale) == 0
    assert right(logits[:, :-1], labels, scale) == 100, "without its double the class is ahead of all"


def test_shares_are_the_percent_that_evaluate_writes() -> None:
    logits = torch.eye(2)[(torch.arange(1000) >= 862).long()]
    assert right(logits, torch.zeros(1000, dtype=torch.long)) == 86.2
    assert module.mean_per_class(logits, torch.zeros(1000, dtype=torch.long)) == 86.2


def test_equal_class_names_are_named(recipe: PromptRecipe, caplog: pytest.LogCaptureFixture) -> None:
    base = module.load(recipe.base, device="cpu")
    methods_module._class_texts(base, ("red", "green", "Red"), ("a photo of a {}",))
    assert "reads the class names 'red' and 'Red' alike" in caplog.text


def test_prompt_methods_are_the_recipe_less_some_parts(recipe: PromptRecipe) -> None:
    from trimtab.recipes.fewshot_methods import _parts

    assert _parts(recipe) == recipe
    assert _parts(recipe, instance=False).prompt.instance is None
    bare = _parts(recipe, domain=False).prompt.domain
    assert (bare.tokens, bare.residual, bare.patches) == (0, False, False)
    assert set(PROMPT_METHODS) <= set(METHODS)


def test_a_recipe_of_coop_is_compared_with_methods_that_see_patches(
    recipe: PromptRecipe, swept: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    methods = ("coop", "structured", "linear_probe_patches")
    found = fewshot(replace(recipe, method="coop"), Plan((1,), (1,), methods), tmp_path / "runs.jsonl")
    known = {run["method"]: run for run in swept[1] if run["shots"] == 1}
    assert [run["trained_parameters"] for run in found] == [known[name]["trained_parameters"] for name in methods]
    assert [run["key"] for run in found] == [known[name]["key"] for name in methods]


def test_later_options_leave_the_names_of_earlier_runs_alone() -> None:
    """Those of the committed lines of `benchmarks/results`, as far as the recipe is in them; CoOp's with 400 steps."""
    recipe = load_recipe(ROOT / "recipes" / "prompt-fewshot.yaml")
    assert isinstance(recipe, PromptRecipe)
    recipe = settled(recipe, ["cat", "dog"], 6)
    found = {
        name: digest_of(setting(recipe, name))[:16] for name in ("template", "structured", "general_domain", "coop")
    }
    assert found == {
        "template": "0f56ce71efc2b618",
        "structured": "d83705658629135a",
        "general_domain": "85f628fd5e54184e",
        "coop": "6b078d2246f9eac4",
    }
    averaged = replace(recipe, training=replace(recipe.training, bell=(0.8, 0.2)))
    assert setting(averaged, "structured") != setting(recipe, "structured")
    assert setting(recipe, "structured_context") != setting(recipe, "structured")


def changed(recipe: PromptRecipe, tables: dict[str, Path], **data: Any) -> PromptRecipe:
    mapping = toy_mapping(Path(recipe.base), tables["train"], Path(recipe.out))
    mapping["data"] |= {"test": str(tables["test"]), **data}
    return toy_recipe(Path(recipe.base), tables["train"], Path(recipe.out), data=mapping["data"])


def test_bad_data_is_refused_before_a_model_is_loaded(
    recipe: PromptRecipe, tables: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load", lambda *_: pytest.fail("a model was loaded"))
    out = tmp_path / "runs.jsonl"

    def refused(match: str, plan: Plan | None = None, **data: Any) -> None:
        with pytest.raises(DataError, match=match):
            fewshot(changed(recipe, tables, **data), plan or Plan((1,), (1,), ("template",)), out)

    refused("9 shots are asked for, but 4 of 4 classes have fewer", Plan((9,), (1,), ("template",)))
    refused("name them with data.test", test=[])
    wrong = tiny_pairs.write_table(
        tables["test"].parent / "wrong.csv", [("100.png", "purple")], columns=("image", "label")
    )
    refused("purple", test=str(wrong))
    refused("all 12 validation pictures are among those of test too", validation=str(tables["test"]))
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    with pytest.raises(TrimtabError, match="few-shot methods run in one process"):
        fewshot(recipe, Plan((1,), (1,), ("template",)), out)
    assert not out.exists()


def test_impossible_plans_are_refused() -> None:
    for arguments, match in (
        ({"methods": ("template", "guess")}, "no such method: guess; there are template"),
        ({"shots": ()}, "shots"),
        ({"shots": (0,)}, "at least 1"),
        ({"seeds": (1, 1)}, "without repeats"),
        ({"seeds": (-1,)}, "at least 0"),
    ):
        with pytest.raises(RecipeError, match=match):
            Plan(**arguments)  # type: ignore[arg-type]


def test_test_pictures_are_left_out_of_training(recipe: PromptRecipe, tables: dict[str, Path]) -> None:
    data = read_fewshot(changed(recipe, tables, test=str(tables["train"]), train=str(tables["test"])))
    assert len(data.train) == 12
    with pytest.raises(DataError):
        fewshot(changed(recipe, tables, test=str(tables["train"])), Plan((1,), (1,), ("template",)), "never.jsonl")


def test_the_command_prints_a_table_and_writes_lines_and_report(
    recipe: PromptRecipe, tables: dict[str, Path], tmp_path: Path
) -> None:
    mapping = toy_mapping(Path(recipe.base), tables["train"], tmp_path / "out")
    mapping["data"]["test"] = str(tables["test"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(mapping))
    arguments = ["fewshot", str(path), "--shots", "1,2", "--seeds", "1", "--methods", "template,linear_probe"]
    result = CliRunner().invoke(app, [*arguments, "--report", str(tmp_path / "report")])
    assert result.exit_code == 0, result.output
    assert "linear_probe" in result.output
    assert len(read_runs(tmp_path / "out.fewshot.jsonl")) == 4
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Linear probe" in page
    assert "<script" not in page
    for wrong, said in ((["--shots", "one"], "whole numbers"), (["--methods", "magic"], "no such method")):
        result = CliRunner().invoke(app, [*arguments[:2], *wrong])
        assert result.exit_code == 2
        assert said in result.output


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as a file of runs"):
        read_runs(path)
    assert read_runs(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("family", [FAMILY, "clip"])
def test_clip_lora_starts_as_the_template_and_leaves_the_base_alone(
    tiny_folder: Callable[[str], Path], tables: dict[str, Path], family: str
) -> None:
    pytest.importorskip("peft")
    import trimtab
    from trimtab.config import LabelSource, ViewsConfig
    from trimtab.data.labelled import load_labelled
    from trimtab.recipes.fewshot_lora import LowRank
    from trimtab.towers.classifier import class_vectors

    base = trimtab.load(tiny_folder(family))
    before = {name: one.clone() for name, one in base.model.state_dict().items()}
    pictures = load_labelled([LabelSource(str(tables["train"]))])
    images = pictures.images[:8]
    lora = LowRank(base, pictures.classes, "a photo of a {}", views=1, options=ViewsConfig())
    want = (
        base.logit_scale
        * base.encode_image([one.path for one in images])
        @ class_vectors(base, pictures.classes, ["a photo of a {}"]).T
    )
    assert np.allclose(lora.logits(images).numpy(), want, atol=2e-2 * base.logit_scale)
    assert 0 < lora.parameters < 2000
    lora.train(images, pictures.labels[:8], 0, steps=3)
    assert any(one.grad is not None for one in lora.updates)
    assert base.model.state_dict().keys() == before.keys()
    assert all(torch.equal(one, before[name]) for name, one in base.model.state_dict().items())


def test_without_peft_nothing_runs_before_clip_lora(
    monkeypatch: pytest.MonkeyPatch, recipe: PromptRecipe, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    plan = Plan(shots=(1,), seeds=(1,), methods=("template", "clip_lora"))
    with pytest.raises(ModelError, match=r"pip install 'trimtab\[peft\]'"):
        fewshot(recipe, plan, tmp_path / "runs.jsonl")
    assert not (tmp_path / "runs.jsonl").exists()


def test_clip_lora_takes_no_adapted_folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    import trimtab
    from tiny_links import save_tiny_domain
    from trimtab.config import ViewsConfig
    from trimtab.recipes.fewshot_lora import LowRank

    base = trimtab.load(tiny_folder(FAMILY), device="cpu")
    save_tiny_domain(tmp_path / "domain", base)
    adapted = trimtab.load(tmp_path / "domain", device="cpu")
    with pytest.raises(ModelError, match="domain is one with adapters or prompts: leave clip_lora out"):
        LowRank(adapted, ("cat", "dog"), "a photo of a {}", views=0, options=ViewsConfig())
