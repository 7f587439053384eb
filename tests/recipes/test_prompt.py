"""The prompt link end to end on tiny models: what a run learns, writes, refuses, and how it survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import trimtab
from full_disk import check_full_disk_is_named
from tiny_language import merged, never, recipe_writer
from tiny_links import save_tiny_domain, save_tiny_prompt
from tiny_pictures import signal_at
from tiny_prompt import NAMES, picture, toy_mapping, toy_recipe, write_labelled
from trimtab.adapters.adapted import load_adapted
from trimtab.adapters.composing import load_composed
from trimtab.config import ContextConfig, recipe_from_mapping
from trimtab.errors import DataError, ModelError, RecipeError, TrainingStopped, TrimtabError
from trimtab.evaluation.blocks import Lines
from trimtab.recipes import prompt as prompt_recipe
from trimtab.recipes.adapt import adapt
from trimtab.recipes.evaluate import evaluate_classification
from trimtab.recipes.folders import recipe_digest
from trimtab.recipes.prompt_fit import LabelledFeatures, fit_prompt, settled
from trimtab.recipes.prompt_report import as_seen, curves
from trimtab.tasks.prompt import PromptTask
from trimtab.towers.prompting import PromptTower, _no_patches

FAMILY = "vision-text-dual-encoder"
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


@pytest.fixture(scope="module")
def places(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and training pictures."""
    return tiny_folder(FAMILY), write_labelled(tmp_path_factory.mktemp("toy"), 40)


@pytest.fixture(scope="module")
def finished(places: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that nothing disturbed, with a test set."""
    folder = tmp_path_factory.mktemp("finished")
    test = write_labelled(folder / "test", 20, first=100)
    mapping = merged(toy_mapping(*places, folder / "out"), {"data": {"test": str(test)}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(folder / "cache"))
        outcome = adapt(recipe_from_mapping(mapping, "toy"))
    assert outcome is not None
    return {"mapping": mapping, "out": folder / "out", "outcome": outcome, "test": test}


@pytest.fixture
def toy(places: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """Write the toy recipe with changes, its output in `tmp_path`; returns the YAML file."""
    return recipe_writer(tmp_path / "recipe.yaml", toy_mapping(*places, tmp_path / "out"))


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    never(monkeypatch.setattr, prompt_recipe, "load", "a model was loaded")


def test_it_learns_and_says_what_it_did(finished: dict[str, Any]) -> None:
    outcome = finished["outcome"]
    assert outcome["test"]["top1"] > max(60, outcome["test"]["zero_shot"])
    assert (outcome["classes"], outcome["steps"], outcome["method"]) == (4, 24, "structured")
    assert outcome["pictures"] == {"train": 16, "validation": 16, "test": 20}
    described = json.loads((finished["out"] / "adapter.json").read_text())
    assert described["link"] == "prompt"
    assert described["config"]["classes"] == sorted(NAMES)
    assert described["data"]["pictures"]["train"] == 16
    assert described["metrics"]["test top1"] == outcome["test"]["top1"]
    page = Path(outcome["report"]).read_text(encoding="utf-8")
    assert "4 classes from 16 pictures" in page
    assert "trimtab adapt RECIPE.yaml" in page
    assert "<img" in page  # pictures with what the instance queries look at
    assert "classifier.add_classes" in (finished["out"] / "README.md").read_text()


def test_losses_of_training_and_validation_are_lines_of_their_own() -> None:
    history: list[dict[str, Any]] = [
        {"kind": "validation", "step": 0, "loss": 0.5, "top1": 50.0},
        {"kind": "train", "step": 10, "loss": 0.02},
        {"kind": "train", "step": 20, "loss": 0.01},
        {"kind": "validation", "step": 20, "loss": 0.4, "top1": 75.0},
    ]
    [lines] = curves(history)
    assert isinstance(lines, Lines)
    found = {
        f"{panel.title}, {panel.y_label}": (list(line.xs), list(line.ys))
        for panel in lines.panels
        for line in panel.series
    }
    assert found == {
        "Loss, training": ([10, 20], [0.02, 0.01]),
        "Loss, validation": ([0, 20], [0.5, 0.4]),
        "Top-1, %, validation": ([0, 20], [50.0, 75.0]),
    }
    assert curves([]) == []


def test_maps_of_attention_lie_over_what_the_tower_sees(tiny_base: Callable[[str], Any]) -> None:
    pixels = np.zeros((60, 180, 3), np.uint8)
    pixels[:, :60, 0], pixels[:, 60:120, 1], pixels[:, 120:, 2] = 250, 200, 250
    wide = Image.fromarray(pixels)
    cropped = np.asarray(as_seen(tiny_base("clip"), wide))  # its processor takes the middle
    side = len(cropped)
    assert cropped.shape == (side, side, 3)
    assert np.abs(cropped[:, 3:-3].astype(int) - (0, 200, 0)).max() <= 2
    whole = np.asarray(as_seen(tiny_base("chinese_clip"), wide)).astype(int)
    assert np.abs(whole[side // 2, [0, side // 2, -1]] - [(250, 0, 0), (0, 200, 0), (0, 0, 250)]).max() <= 2


def test_the_folder_classifies_as_it_was_measured(finished: dict[str, Any]) -> None:
    model = trimtab.load(finished["out"], device="cpu")
    pictures = [finished["test"].parent / f"{number:03d}.png" for number in range(100, 120)]
    scores = model.classifier().scores(pictures, batch_size=7)
    labels = [sorted(NAMES).index(NAMES[number % 4]) for number in range(100, 120)]
    assert 100 * np.mean(scores.argmax(axis=1) == labels) == pytest.approx(finished["outcome"]["test"]["top1"])
    loss = -np.log(scores[np.arange(20), labels]).mean()
    assert loss == pytest.approx(finished["outcome"]["test"]["loss"], abs=2e-2)  # features are cached in fp16
    assert model.classifier().predict([picture(0)])[0][0].label == "red"
    evaluated = evaluate_classification(model, finished["test"], sorted(NAMES))
    assert evaluated["top1"] == pytest.approx(finished["outcome"]["test"]["top1"])


def test_images_and_texts_are_encoded_as_by_the_base(finished: dict[str, Any], places: tuple[Path, Path]) -> None:
    model, base = trimtab.load(finished["out"], device="cpu"), trimtab.load(places[0], device="cpu")
    np.testing.assert_array_equal(model.encode_image([picture(1)]), base.encode_image([picture(1)]))
    np.testing.assert_array_equal(model.encode_text(["a red car"]), base.encode_text(["a red car"]))
    assert model.fingerprint == base.fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_works_in_half_precision(dtype: str, finished: dict[str, Any]) -> None:
    classifiers = [trimtab.load(finished["out"], device="cpu", dtype=one).classifier() for one in ("float32", dtype)]
    whole, half = (one.scores([picture(number) for number in range(4)]) for one in classifiers)
    np.testing.assert_allclose(half, whole, atol=0.1)


@pytest.mark.parametrize("method", ["coop", "cocoop"])
def test_coop_and_cocoop_are_recipes_of_the_same_code(method: str, toy: Callable[..., Path]) -> None:
    outcome = adapt(toy(method=method))
    assert outcome is not None
    tensors = load_file(Path(outcome["folder"]) / "adapter.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"general", "text_weight"} | (
        {"instance"} if method == "cocoop" else set()
    )
    assert {key for record in outcome["history"] if record["kind"] == "train" for key in record} >= {"cross_entropy"}
    assert not any("template" in record for record in outcome["history"])
    classifier = trimtab.load(outcome["folder"], device="cpu").classifier()
    assert classifier.scores([picture(0), picture(1)]).shape == (2, 4)


def test_a_report_that_fails_takes_nothing_along(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Path:
        raise OSError("no page")

    monkeypatch.setattr(prompt_recipe, "write_prompt_report", fail)
    with pytest.raises(OSError, match="no page"):
        adapt(toy(training={"epochs": 1}))
    assert load_adapted(tmp_path / "out").classifier().predict([picture(0)])


def test_killed_and_started_again_it_ends_the_same(toy: Callable[..., Path], tmp_path: Path) -> None:
    path = toy(training={"checkpoint_every": 2})
    command = [sys.executable, str(ROOT / "tests/tiny_prompt.py"), str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    killed = subprocess.run([*command, "13", "SIGKILL"], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    outcome = adapt(path)
    assert outcome is not None
    assert outcome["steps"] == 24
    whole = adapt(toy(out=str(tmp_path / "whole"), training={"checkpoint_every": 2}))
    assert whole is not None
    mine, theirs = (load_file(Path(one["folder"]) / "adapter.safetensors") for one in (outcome, whole))
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_another_recipe_in_the_same_folder_is_refused_before_encoding(
    toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy(context={"steps": 5}, training={"epochs": 1})
    with monkeypatch.context() as patch:
        patch.setattr(PromptTask, "step", PromptTask.step)  # to be put back
        signal_at(PromptTask, 3, signal.SIGTERM)
        with pytest.raises(TrainingStopped, match="step 3 of 5"):
            adapt(path)
    with monkeypatch.context() as patch:
        patch.setattr(prompt_recipe, "frozen_features", None)
        with pytest.raises(RecipeError, match=r"out\.training/context holds a run of another recipe \(step 3\)"):
            adapt(path, ["seed=1"])
    assert adapt(path) is not None
    monkeypatch.setattr(prompt_recipe, "frozen_features", None)
    for dry_run in (False, True):
        with pytest.raises(RecipeError, match=r"out\.training holds a run of another recipe"):
            adapt(path, ["seed=1", "context=null"], dry_run=dry_run)


def test_the_context_may_learn_first(places: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = toy_recipe(*places, tmp_path / "out", prompt={"domain": {"tokens": 1}}, context={"steps": 8})
    base = trimtab.load(places[0])
    sets = prompt_recipe.read_sets(recipe)
    features = {name: part.fill() for name, part in prompt_recipe.frozen_features(recipe, base, sets).items()}
    train, validation = (
        LabelledFeatures(features[name], sets.as_dict()[name].labels) for name in ("train", "validation")
    )
    kept = replace(recipe, select="loss", training=replace(recipe.training, learning_rate=1e-12))
    fitted = fit_prompt(base, kept, train, validation, NAMES)
    plain = fit_prompt(base, replace(kept, context=None), train, validation, NAMES)
    alone = fit_prompt(base, recipe.of_context(), train, validation, NAMES)
    torch.testing.assert_close(fitted.prompt.general, alone.prompt.general, atol=1e-6, rtol=0)
    assert not torch.allclose(fitted.prompt.general, plain.prompt.general, atol=1e-4)
    assert alone.steps == 8
    assert alone.prompt.instance is None
    assert not alone.prompt.vectors()


def test_a_request_to_stop_in_the_last_step_of_the_context_is_heeded(
    toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy(context={"steps": 5})
    with monkeypatch.context() as patch:
        patch.setattr(PromptTask, "step", PromptTask.step)  # to be put back
        signal_at(PromptTask, 5, signal.SIGTERM)
        with pytest.raises(TrainingStopped, match="interrupted at step 5 of 5"):
            adapt(path)
    outcome = adapt(path)
    assert outcome is not None
    assert outcome["steps"] == 24


def test_a_fit_that_keeps_nothing_promises_nothing(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_recipe(*places, tmp_path / "out", steps=6)
    base = trimtab.load(places[0])
    sets = prompt_recipe.read_sets(recipe)
    features = prompt_recipe.frozen_features(recipe, base, sets)["train"].fill()
    monkeypatch.setattr(PromptTask, "step", PromptTask.step)  # to be put back
    signal_at(PromptTask, 3, signal.SIGTERM)
    with pytest.raises(TrainingStopped) as caught:
        fit_prompt(base, recipe, LabelledFeatures(features, sets.train.labels), None, NAMES)
    assert str(caught.value).startswith("interrupted at step 3 of")
    assert str(caught.value).endswith("; nothing of it is kept. Start the same command again.")


def test_a_domain_is_known_alone_and_among_other_links(places: tuple[Path, Path], tmp_path: Path) -> None:
    base = trimtab.load(places[0])
    domain = save_tiny_domain(tmp_path / "domain", base)
    assert not prompt_recipe.knows_domain(base)
    assert prompt_recipe.knows_domain(load_adapted(domain, base=base))
    assert prompt_recipe.knows_domain(load_composed([domain], base=base))


def test_training_that_only_harms_is_undone(places: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = replace(toy_recipe(*places, tmp_path / "out", prompt={"domain": {"solve": False}}), select="loss")
    base = trimtab.load(places[0])
    sets = prompt_recipe.read_sets(recipe)
    features = {name: part.fill() for name, part in prompt_recipe.frozen_features(recipe, base, sets).items()}
    train = LabelledFeatures(features["train"], (sets.train.labels + 1) % len(NAMES))  # all of them wrong
    validation = LabelledFeatures(features["validation"], sets.validation.labels)
    fitted = fit_prompt(base, recipe, train, validation, NAMES)
    before, *after = (one["loss"] for one in fitted.history if one["kind"] == "validation")
    assert before < min(after)
    assert fitted.validation["loss"] == pytest.approx(before)
    untrained = prompt_recipe.new_prompt(recipe, PromptTower(base), train.features.patch_width, len(NAMES))
    assert torch.equal(fitted.prompt.general, untrained.general)


def test_other_pictures_have_the_loss_of_the_scores_that_they_get(places: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = toy_recipe(*places, tmp_path / "out", steps=3)
    base = trimtab.load(places[0])
    sets = prompt_recipe.read_sets(recipe)
    features = {name: part.fill() for name, part in prompt_recipe.frozen_features(recipe, base, sets).items()}
    train, validation = (
        LabelledFeatures(features[name], sets.as_dict()[name].labels) for name in ("train", "validation")
    )
    fitted = fit_prompt(base, recipe, train, validation, NAMES)
    labels = validation.labels.copy()
    labels[::2] = (labels[::2] + 1) % len(NAMES)  # pictures on which it is far too sure of itself
    logarithms = torch.from_numpy(fitted.logits(features["validation"])).double().log_softmax(dim=1).numpy()
    found = fitted.figures(LabelledFeatures(features["validation"], labels))
    assert found["loss"] == pytest.approx(-logarithms[np.arange(len(labels)), labels].mean(), rel=1e-4)
    assert found["loss"] > np.log(len(NAMES)) + 0.1  # at the scale that suits these labels it would not be above


def test_a_context_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="steps=0"):
        ContextConfig(steps=0)


def test_a_dry_run_says_what_it_would_do(
    toy: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("trimtab.recipes.prompt.fit_prompt", None)
    assert adapt(toy(), dry_run=True) is None
    said = capsys.readouterr().out
    for part in ("link: prompt", "16 for train, 16 for validation; 4 classes", "trained (", "to train (24 steps)"):
        assert part in said
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_for_the_cache_is_named_before_the_work(
    toy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    check_full_disk_is_named(toy(data={"views": 1}, training={"epochs": 1}), monkeypatch, caplog, capsys)


def test_prompts_that_add_nothing_are_named(
    toy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert prompt_recipe.adds_nothing({"top1": 87.66666, "zero_shot": 87.66667})
    assert not prompt_recipe.adds_nothing({"top1": 90.0, "zero_shot": 87.0})
    assert not prompt_recipe.adds_nothing({"top1": 100.0, "zero_shot": 100.0})
    monkeypatch.setattr(prompt_recipe, "adds_nothing", lambda _: True)
    adapt(toy(training={"epochs": 1}))
    assert "no more of the validation pictures right than hand templates" in caplog.text


def test_a_prompt_may_stand_on_an_adapted_domain(
    toy: Callable[..., Path],
    places: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from trimtab.adapters.domain import DomainAdapters, save_domain
    from trimtab.config import DomainAdapterConfig

    base = trimtab.load(places[0], device="cpu")
    groups = [DomainAdapterConfig("image", width=4), DomainAdapterConfig("text", width=4)]
    adapters = DomainAdapters(base, groups)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    domain = save_domain(tmp_path / "domain", adapters, base=base)
    outcome = adapt(toy(base=str(domain)))
    assert outcome is not None
    assert not caplog.records
    with monkeypatch.context() as patch:  # as if the domain had seen these pictures
        patch.setattr(prompt_recipe, "zero_shot", lambda *_: 100.0)
        adapt(toy(base=str(domain), out=str(tmp_path / "again")))
        assert "100% of the validation pictures right without a prompt" in caplog.text
        caplog.clear()
        adapt(toy(out=str(tmp_path / "plain")))  # a base that is simply good
    assert not caplog.records
    model = trimtab.load(outcome["folder"], device="cpu")
    assert model.fingerprint == trimtab.load(domain, device="cpu").fingerprint != base.fingerprint
    plain = base.encode_image([picture(0)])
    assert np.abs(model.encode_image([picture(0)]) - plain).max() > 1e-3
    scores = model.classifier().scores([picture(number) for number in range(8)])
    assert np.mean(scores.argmax(1) == [sorted(NAMES).index(NAMES[number % 4]) for number in range(8)]) > 0.5
    with pytest.raises(ModelError, match="was trained on the base"):
        trimtab.load(outcome["folder"], base=base)


def test_mistakes_are_refused_before_a_model_is_loaded(
    toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_model(monkeypatch)
    items = write_labelled(tmp_path / "few", 8)
    with pytest.raises(DataError, match=r"16 shots are asked for, but 4 of 4 classes have fewer"):
        adapt(toy(data={"train": str(items), "shots": 16}))
    with pytest.raises(DataError, match=r"all 8 validation pictures .* data\.validation or in data\.test"):
        adapt(toy(data={"validation": str(items), "test": str(items)}))
    classes = tmp_path / "classes.txt"
    classes.write_text("red\nyellow\nblue\ngreen\nblack\n")
    with pytest.raises(DataError, match=r"1 of 5 classes have no picture: black"):
        adapt(toy(data={"classes": str(classes)}))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    with pytest.raises(RecipeError, match="holds other files"):
        adapt(toy(out=str(tmp_path / "taken")))
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    with pytest.raises(TrimtabError, match="prompts train in one process, but 2"):
        adapt(toy())


def test_prompts_are_not_trained_on_prompts(
    toy: Callable[..., Path], tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("clip")
    prompt, domain = save_tiny_prompt(tmp_path / "prompt", base), save_tiny_domain(tmp_path / "shop", base)
    on_domain = save_tiny_prompt(tmp_path / "domain-prompt", load_adapted(domain, base=base))
    alone, both = tmp_path / "alone", tmp_path / "both"
    load_composed([prompt], base=base).save_pretrained(alone)
    load_composed([domain, on_domain], base=base).save_pretrained(both)
    no_model(monkeypatch)
    for folder, remedy in ((prompt, base.name), (alone, f"take {base.name}"), (both, f"take {both}/domain")):
        with pytest.raises(RecipeError, match=rf"(?s)base={folder} holds prompts.*{remedy}"):
            adapt(toy(base=str(folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": {"instance": {"layer": 9}}}, r"instance\.layer=9, but the text tower .* has the layers 0 to 1"),
        (
            {"prompt": {"instance": {"tokens": 9}}},
            r"instance\.tokens=9 shift as many context tokens, but general has 3",
        ),
        ({"prompt": {"instance": {"width": None, "heads": 3}}}, r"instance\.heads=3 does not divide the width 16"),
        ({"prompt": {"general": {"tokens": 2}}}, r"general\.tokens=2, but init='photo of a' has 3 tokens"),
    ],
)
def test_parts_that_do_not_go_together(toy: Callable[..., Path], changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        adapt(toy(**changes))


def test_parts_that_do_not_go_together_are_refused_before_pictures_are_encoded(
    toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.recipes.prompt_features.PictureFeatures.fill", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(RecipeError, match=r"prompt\.instance\.layer=9,.*\(or -1 to -2\): set prompt\.instance\.layer"):
        adapt(toy(prompt={"instance": {"layer": 9}}))


def test_names_and_base_settle_what_a_recipe_leaves_to_them(places: tuple[Path, Path], tmp_path: Path) -> None:
    given = toy_recipe(*places, tmp_path, prompt={"general": {"init": "a photo of a"}, "instance": {"layer": 1}})
    left = toy_recipe(*places, tmp_path, prompt={"general": {"init": "auto"}, "instance": {"layer": -1}})
    assert recipe_digest(settled(left, ["cat", "dog"], 2)) == recipe_digest(given)
    assert settled(given, ["猫"], 2) == given
    assert settled(left, ["猫", "狗"], 2).prompt.general.init == "这张图片里有"


def test_a_tower_without_patches_takes_no_instance_prompts(
    toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise _no_patches(type("Base", (), {"name": "a pooled net"})(), "it gives nothing else")

    monkeypatch.setattr("trimtab.recipes.prompt_features.image_tokens", refuse)
    with pytest.raises(RecipeError, match=r"a pooled net has no patch tokens .*set prompt\.instance to null"):
        adapt(toy())
    assert adapt(toy(prompt={"instance": None, "domain": {"patches": False}}))
