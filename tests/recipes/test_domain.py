"""The domain link end to end on tiny models: what a run learns, writes, remembers, refuses, and how it survives."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny_domain
import tiny_pairs
import trimtab
from full_disk import check_full_disk_is_named
from tiny_domain import CAPTIONS, toy_mapping, write_pairs
from tiny_language import merged, never, recipe_writer
from tiny_towers import BUILDERS
from trimtab.cli import app
from trimtab.config import load_recipe, recipe_from_mapping
from trimtab.data.sampling import draw_hard_epoch
from trimtab.errors import DataError, RecipeError, TrimtabError
from trimtab.recipes import domain
from trimtab.recipes.adapt import adapt
from trimtab.recipes.domain_methods import METHODS
from trimtab.recipes.domain_plan import checkpoint_bytes
from trimtab.recipes.domain_report import hardest_rows
from trimtab.recipes.domain_states import FrozenStates
from trimtab.recipes.info import describe
from trimtab.tasks.domain import DomainTask
from trimtab.towers.memory import PairMemory
from trimtab.towers.tokens import TextInputs

FAMILY = "clip"
CHANCE = 100 / len(CAPTIONS)
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


@pytest.fixture(scope="module")
def places(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base, training and validation pairs of the toy domain."""
    folder = tmp_path_factory.mktemp("toy")
    train, validation = write_pairs(folder / "train", 96), write_pairs(folder / "val", 24, first=96)
    return tiny_folder(FAMILY), train, validation


@pytest.fixture(scope="module")
def finished(places: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that nothing disturbed, with general pictures, and what it had in memory."""
    folder = tmp_path_factory.mktemp("finished")
    mapping = merged(toy_mapping(*places, folder / "out"), {"general": [str(places[2])], "alphas": [0, 0.5, 1]})
    recipe = recipe_from_mapping(mapping, "toy")
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(folder / "cache"))
        original = domain.save

        def save(recipe: Any, method: Any, *rest: Any) -> None:
            seen["method"] = method
            original(recipe, method, *rest)

        def report(recipe: Any, pairs: Any, hardness: Any, *rest: Any) -> Path:
            seen["pairs"], seen["hardness"] = pairs, hardness
            return written(recipe, pairs, hardness, *rest)

        written = domain.write_domain_report
        patch.setattr(domain, "save", save)
        patch.setattr(domain, "write_domain_report", report)
        outcome = adapt(recipe)
    assert outcome is not None
    return {"recipe": recipe, "out": folder / "out", "cache": folder / "cache", "outcome": outcome, **seen}


@pytest.fixture
def toy(places: tuple[Path, Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """Write the toy recipe with changes, its output in `tmp_path`; returns the YAML file."""
    return recipe_writer(tmp_path / "recipe.yaml", toy_mapping(*places, tmp_path / "out"))


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    never(monkeypatch.setattr, DomainTask, "step", "a step was trained")


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    never(monkeypatch.setattr, domain, "load_base", "a model was loaded")


def weights(out: Path) -> dict[str, torch.Tensor]:
    name = "adapter.safetensors" if (out / "adapter.json").exists() else "model.safetensors"
    return load_file(out / name)


def assert_same_weights(out: Path, other: Path, **tolerance: float) -> None:
    mine, theirs = weights(out), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def process(*arguments: Any, **environment: str) -> subprocess.Popen[str]:
    places = [str(Path(tiny_domain.__file__).parent), str(Path(trimtab.__file__).parents[1])]
    search = {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, tiny_domain.__file__, *map(str, arguments)],
        env={**os.environ, **search, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def two_ranks(recipe: Path, *last: Any) -> list[subprocess.Popen[str]]:
    """Both ranks of a run; `last` goes to the second alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        process(recipe, *(last if rank else ()), RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)
    ]


# What a run does


def test_it_learns_the_domain(finished: dict[str, Any]) -> None:
    outcome = finished["outcome"]
    assert outcome["validation"]["top1"] > 3 * CHANCE
    recall = [record["mR"] for record in outcome["history"] if record["kind"] == "validation"]
    assert max(recall) > recall[0] + 15  # of 12 pictures, so top-1 moves in steps of 8 points
    tops = [record["top1"] for record in outcome["history"] if record["kind"] == "validation"]
    # The latest of those that 24 pictures cannot tell from the best.
    error = math.sqrt(max(tops) * (100 - max(tops)) / 24)
    # The first is before training.
    assert outcome["validation"]["epoch"] == max(at for at, top in enumerate(tops) if top >= max(tops) - error) - 1
    assert outcome["validation_before"] == {"top1": tops[0], "mR": recall[0]}
    assert (outcome["pairs"], outcome["images"], outcome["captions"]) == (96, 96, 12)
    assert outcome["steps"] == 12 * 4  # half of the pairs in batches of 12
    assert outcome["difficulty"]["after"]["50%"] < outcome["difficulty"]["before"]["50%"]
    assert 0 < outcome["trained_parameters"] < outcome["base_parameters"]
    assert set(outcome["seconds"]) == {"encoding", "training", "total"}


def test_the_loaded_model_is_the_one_in_training(finished: dict[str, Any], places: Any) -> None:
    model = trimtab.load(str(finished["out"]))
    pictures = sorted(places[2].parent.glob("*.png"))
    similarity = model.similarity(pictures, CAPTIONS)
    top1 = 100 * np.mean(similarity.argmax(1) == np.arange(96, 120) % len(CAPTIONS))
    assert top1 == pytest.approx(finished["outcome"]["validation"]["top1"], abs=5)  # caches are half precise
    with finished["method"].at_alpha(1.0, finished["outcome"]["logit_scale"]) as trained:
        np.testing.assert_array_equal(model.encode_image(pictures), trained.encode_image(pictures))
        np.testing.assert_array_equal(model.encode_text(CAPTIONS), trained.encode_text(CAPTIONS))
    assert model.logit_scale == pytest.approx(finished["outcome"]["logit_scale"])
    assert model.logit_scale != trimtab.load(str(places[0])).logit_scale


def test_it_tells_what_was_forgotten_and_what_alpha_does(finished: dict[str, Any]) -> None:
    outcome = finished["outcome"]
    general = outcome["general"]
    assert general["before"].keys() == general["after"].keys() == {"pairs"}
    assert general["forgetting"]["points"] == pytest.approx(general["before"]["pairs"] - general["after"]["pairs"])
    points = outcome["alpha"]
    assert [point["alpha"] for point in points] == [0, 0.5, 1]
    assert points[0]["general"] == pytest.approx(general["before"]["pairs"])
    assert points[2]["general"] == pytest.approx(general["after"]["pairs"])
    assert points[2]["domain"] > points[0]["domain"]


def test_the_folder_says_what_it_is(finished: dict[str, Any]) -> None:
    out = finished["out"]
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter.json", "adapter.safetensors"]
    described = json.loads((out / "adapter.json").read_text(encoding="utf-8"))
    assert described["link"] == "domain"
    assert Path(described["base"]["name"]).is_absolute()
    assert described["metrics"]["top1"] == finished["outcome"]["validation"]["top1"]
    assert described["data"]["pairs"] == 96
    assert recipe_from_mapping(described["recipe"], "adapter.json") == finished["recipe"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "trimtab"
    assert "96 pairs of 96 pictures and 12\ncaptions" in card
    assert str(out.parent) not in card


def test_info_describes_it(finished: dict[str, Any]) -> None:
    facts = describe(finished["out"])
    assert facts["adapters"] == {
        "bottleneck beside image layers 0 to -1": "width 8",
        "bottleneck beside text layers -1 to -1": "width 8",
    }
    assert facts["adapter"]["numbers"] == finished["outcome"]["trained_parameters"] + 1  # and logit_scale
    assert not {"languages", "english", "student"} & facts.keys()


def test_the_report_shows_the_hardest_pairs(finished: dict[str, Any]) -> None:
    folder = Path(f"{finished['out']}.training")
    with (folder / "hardest-pairs.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["file", "row", "image", "caption", "prefers", "before", "now", "drawn"]
    assert len(rows) == 96
    now = [float(row["now"]) for row in rows]
    assert now == sorted(now, reverse=True)
    assert rows[0]["prefers"] not in ("", rows[0]["caption"])
    assert all(row["prefers"] == "" for row in rows if float(row["now"]) < 0.49)
    line = Path(rows[0]["file"]).read_text(encoding="utf-8").splitlines()[int(rows[0]["row"]) - 1]
    assert line == f"{Path(rows[0]['image']).name},{rows[0]['caption']}"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") >= 24
    for words in ("Hardest pairs", "How hard the training pairs are", "The dial alpha", "Pairs read", "Make it again"):
        assert words in page
    assert rows[0]["caption"] in (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_a_report_that_fails_takes_nothing_along(method: str, toy: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any) -> Path:
        raise OSError("no page")

    monkeypatch.setattr(domain, "write_domain_report", fail)
    with pytest.raises(OSError, match="no page"):
        adapt(toy(method=method, training={"epochs": 1}))
    assert trimtab.load(tmp_path / "out").encode_text(["red"]).shape[0] == 1


def test_the_hardest_are_compared_a_few_at_a_time(finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, hardness = finished["pairs"], finished["hardness"]
    whole = hardest_rows(pairs, hardness)
    monkeypatch.setattr("trimtab.recipes.domain_report._AT_ONCE", 7)
    assert hardest_rows(pairs, hardness) == whole


def test_texts_that_are_cached_whole_are_not_tokenised_in_a_step(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    original, before = TextInputs.__call__, DomainTask.step

    def step(self: DomainTask, batch: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TextInputs, "__call__", lambda inputs, texts: told.append(1) or original(inputs, texts))
            return before(self, batch)

    monkeypatch.setattr(DomainTask, "step", step)
    adapt(toy(adapters=[{"tower": "image", "width": 8}], training={"epochs": 1}))
    assert not told
    adapt(toy(out=str(toy().parent / "both"), training={"epochs": 1}))
    assert told, "adapters in the text tower read tokens"


def test_towers_are_left_as_they_were(finished: dict[str, Any], places: Any) -> None:
    base, fresh = finished["method"].base, trimtab.load(str(places[0]))
    for name, tensor in fresh.model.state_dict().items():
        assert torch.equal(base.model.state_dict()[name], tensor), name
    assert not any(module._forward_hooks for module in base.model.modules())


@pytest.mark.parametrize("method", ["full", "lora", "probe"])
def test_baselines_write_whole_models_and_come_back(method: str, toy: Any, tmp_path: Path, places: Any) -> None:
    rate = 1e-3 if method == "full" else 2e-2
    path = toy(method=method, training={"epochs": 6, "learning_rate": rate}, general=[str(places[2])], alphas=[0, 1])
    first = adapt(path)
    assert first is not None
    assert first["alpha"][1]["domain"] == pytest.approx(first["validation"]["top1"], abs=5)
    out = tmp_path / "out"
    before = weights(out)
    model = trimtab.load(str(out))
    similarity = model.similarity(sorted(places[2].parent.glob("*.png")), CAPTIONS)
    top1 = 100 * np.mean(similarity.argmax(1) == np.arange(96, 120) % len(CAPTIONS))
    assert top1 == pytest.approx(first["alpha"][1]["domain"])
    again = adapt(path)  # the folder is its own
    assert again is not None
    assert again["validation"] == first["validation"]
    assert all(torch.equal(before[name], one) for name, one in weights(out).items())


@pytest.mark.parametrize("family", ["vision-text-dual-encoder", "siglip", "flava"])
def test_any_base(family: str, toy: Any, tiny_folder: Any, tmp_path: Path) -> None:
    outcome = adapt(toy(base=str(tiny_folder(family)), training={"epochs": 2}, objective={"hard_negatives": 4}))
    assert outcome is not None
    assert trimtab.load(str(tmp_path / "out")).encode_text(CAPTIONS).shape[0] == len(CAPTIONS)


def siglip_of_117(tiny_folder: Any, folder: Path) -> Path:
    """With the scale and bias of SigLIP's checkpoints."""
    shutil.copytree(tiny_folder("siglip"), folder)
    weights = load_file(folder / "model.safetensors")
    weights |= {"logit_scale": torch.tensor([117.3]).log(), "logit_bias": torch.tensor([-12.9])}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_scale_above_that_of_clip_is_learned_from_where_it_is(
    toy: Any, tiny_folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(siglip_of_117(tiny_folder, tmp_path / "siglip"))
    starts, original = [], domain.make_task

    def make_task(*args: Any) -> DomainTask:
        task = original(*args)
        starts.append(task.logit_scale.item())
        return task

    monkeypatch.setattr(domain, "make_task", make_task)
    outcome = adapt(toy(base=base, training={"epochs": 1, "learning_rate": 1e-4}))
    assert starts == [pytest.approx(117.3, abs=0.01)]
    assert outcome is not None
    assert 116 < outcome["logit_scale"] < 117.31
    assert "has a logit_bias, which stays as it is" in caplog.text
    given = {"learn_logit_scale": False, "logit_scale": 117.0}
    caplog.clear()
    outcome = adapt(toy(base=base, out=str(tmp_path / "given"), training={"epochs": 1}, objective=given))
    assert outcome is not None
    assert outcome["logit_scale"] == pytest.approx(117.0)
    assert "logit_bias" not in caplog.text


@pytest.mark.parametrize(("family", "largest"), [("clip", "100"), ("siglip", r"117\.3")])
def test_a_scale_above_the_bound_is_refused(
    family: str, largest: str, toy: Any, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_training(monkeypatch)
    base = tiny_folder(family) if family == "clip" else siglip_of_117(tiny_folder, tmp_path / "siglip")
    with pytest.raises(RecipeError, match=rf"objective\.logit_scale=118 must be above 0 to {largest}, or null"):
        adapt(toy(base=str(base), objective={"logit_scale": 118}))


@pytest.mark.parametrize(
    "bank", [{"difficulty": "learnability"}, {"difficulty": "rank", "importance": 1.0, "instance_weight": 0.5}]
)
def test_other_signals_of_the_bank(bank: dict[str, Any], toy: Any) -> None:
    assert adapt(toy(bank=bank, training={"epochs": 2})) is not None


def in_spellings(table: Path, folder: Path) -> Path:
    """A copy with pictures in which every fifth caption is in upper case."""
    shutil.copytree(table.parent, folder)
    header, *rows = table.read_text(encoding="utf-8").splitlines()
    spelt = [f"{row.split(',')[0]},{row.split(',')[1].upper()}" if at % 5 == 0 else row for at, row in enumerate(rows)]
    (folder / table.name).write_text("\n".join([header, *spelt]) + "\n", encoding="utf-8")
    return folder / table.name


@pytest.mark.parametrize("method", ["adapter", "full"])
def test_captions_that_the_base_reads_alike_are_one(
    method: str, toy: Any, places: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = {"method": method, "training": {"epochs": 2, "learning_rate": 1e-3}, "objective": {"hard_negatives": 4}}
    plain = adapt(toy(**few))
    assert "as it reads others" not in caplog.text
    _, train, validation = places
    data = {
        "train": str(in_spellings(train, tmp_path / "train")),
        "validation": str(in_spellings(validation, tmp_path / "val")),
    }
    spelt = adapt(toy(**few, data=data, out=str(tmp_path / "spelt")))
    assert plain is not None
    assert spelt is not None
    assert (spelt["captions"], spelt["validation"], spelt["difficulty"]) == (
        12, plain["validation"], plain["difficulty"],
    )  # fmt: skip
    assert_same_weights(tmp_path / "spelt", tmp_path / "out")
    for side, count in (("training", 24), ("validation", 17)):
        assert re.search(rf"reads \d+ of the {count} {side} captions as it reads others, for example '", caplog.text)
    assert "language link" not in caplog.text


# What is drawn


def drawn_by(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    probabilities, views = [], []

    def draw(probability: np.ndarray, **options: Any) -> Any:
        probabilities.append(probability)
        return draw_hard_epoch(probability, **options)

    original = DomainTask.step

    def step(self: Any, batch: Any) -> Any:
        views.append(batch[1])
        return original(self, batch)

    monkeypatch.setattr(domain, "draw_hard_epoch", draw)
    monkeypatch.setattr(DomainTask, "step", step)
    adapt(recipe)
    return probabilities, views


def test_hard_pairs_are_drawn_more_often_and_views_vary(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities, views = drawn_by(monkeypatch, toy(data={"views": 2}, training={"epochs": 3}))
    assert len(probabilities) == 3
    assert all(one.max() > 1.05 * one.min() for one in probabilities)
    assert not np.array_equal(probabilities[0], probabilities[1])
    assert set(np.concatenate(views).tolist()) == {0, 1, 2}


def test_without_the_bank_all_pairs_are_alike(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toy(bank={"enabled": False, "instance_weight": 1.0}, data={"views": 0}, training={"epochs": 2})
    probabilities, views = drawn_by(monkeypatch, path)
    assert all(np.ptp(one) == 0 for one in probabilities)
    assert not np.concatenate(views).any()


def test_fewer_pairs_than_a_batch_are_one_short_batch(toy: Any, tmp_path: Path) -> None:
    few = write_pairs(tmp_path / "few", 7)
    outcome = adapt(toy(data={"train": str(few)}, bank={"epoch_share": 1.0}, training={"epochs": 2}))
    assert outcome is not None
    assert outcome["steps"] == 2


# 96 pairs: 4 batches of 12 in an epoch
@pytest.mark.parametrize(("least", "epochs", "every"), [(0, 2, 1), (8, 2, 1), (9, 3, 2), (40, 10, 5)])
def test_few_pairs_are_seen_for_more_epochs_and_judged_no_more_often(
    least: int, epochs: int, every: int, toy: Any
) -> None:
    training = domain.long_enough(load_recipe(toy(least_steps=least, training={"epochs": 2})), 96).training
    assert (training.epochs, training.validate_every) == (epochs, every)


def test_a_run_that_only_harms_keeps_the_base(
    toy: Any, places: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scores = iter([60.0, 0.0, 0.0])
    monkeypatch.setattr(domain, "validate", lambda *_: {"top1": next(scores), "mR": 50.0})
    path = toy(training={"epochs": 2})
    outcome = adapt(path)
    assert outcome is not None
    assert outcome["validation"]["epoch"] == -1
    assert "worse after every epoch" in caplog.text
    out = load_recipe(path).out
    texts = ["a red square", "something else"]
    assert np.array_equal(trimtab.load(out).encode_text(texts), trimtab.load(places[0]).encode_text(texts))
    assert "| top1 | 60 | 60 |" in (Path(out) / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("captions", "judge"), [(1, "top1"), (12, "top1"), (13, "mR"), (24, "mR")])
def test_mean_recall_judges_where_most_pictures_have_their_own_caption(captions: int, judge: str) -> None:
    rows = [(f"{number}.png", f"caption {number % captions}") for number in range(24)]
    validation = SimpleNamespace(images=rows, captions=sorted({caption for _, caption in rows}))
    found = domain.judged_by(validation)  # type: ignore[arg-type]
    assert found.metric == judge
    if judge == "top1":
        assert found.counted == 24
    else:  # an error of the mean of two percentages, each of its own number of questions
        draws = np.random.default_rng(0).binomial([24, captions], 0.5, (100_000, 2)) / [24, captions]
        assert 0.5 / np.sqrt(found.counted) == pytest.approx(draws.mean(1).std(), rel=0.02)


def test_validation_is_split_off_where_none_is_given(toy: Any) -> None:
    outcome = adapt(toy(data={"validation": [], "validation_share": 0.25}, training={"epochs": 1}))
    assert outcome is not None
    assert outcome["pairs"] == 72
    assert outcome["counts"]["training"]["for validation"] == 24


def test_a_gate_leaves_pictures_from_elsewhere_to_the_base(toy: Any, tmp_path: Path, places: Any) -> None:
    noise = tmp_path / "noise"
    noise.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(noise / f"{number}.png")
    elsewhere = tiny_pairs.write_table(
        noise / "noise.csv", [(f"{number}.png", CAPTIONS[number]) for number in range(6)]
    )
    image_only = {"adapters": [{"tower": "image", "width": 8}], "training": {"epochs": 4}}
    outcome = adapt(toy(**image_only, gate="hard", general=[str(elsewhere)], alphas=[1]))
    assert outcome is not None
    assert outcome["general"]["forgetting"]["points"] == 0
    assert outcome["gate"]["validation"] >= 99
    assert "all of the adapters" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert describe(tmp_path / "out")["gate"] == "hard"
    model, base = trimtab.load(str(tmp_path / "out")), trimtab.load(str(places[0]))
    pictures = sorted(noise.glob("*.png"))
    np.testing.assert_allclose(model.encode_image(pictures), base.encode_image(pictures), atol=1e-6)
    # What was selected in training is what the finished model does.
    shown = sorted(places[2].parent.glob("*.png"))
    right = model.similarity(shown, CAPTIONS).argmax(1) == np.arange(96, 120) % len(CAPTIONS)
    assert 100 * right.mean() == pytest.approx(outcome["validation"]["top1"], abs=5)


def test_training_pictures_are_remembered_if_validation_bears_it(
    toy: Any, tmp_path: Path, places: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = adapt(toy(memory=40))
    assert outcome is not None
    memory = outcome["memory"]
    assert (memory["pictures"], memory["kept"]) == (40, memory["with"]["top1"] >= memory["without"]["top1"])
    assert outcome["validation"]["top1"] == memory["with" if memory["kept"] else "without"]["top1"]
    model = trimtab.load(str(tmp_path / "out"))
    assert (model.memory is not None) == memory["kept"]
    # What validation says of the run is what the folder does.
    shown = sorted(places[2].parent.glob("*.png"))
    right = model.similarity(shown, CAPTIONS).argmax(1) == np.arange(96, 120) % len(CAPTIONS)
    assert 100 * right.mean() == pytest.approx(outcome["validation"]["top1"], abs=5)


def test_a_memory_by_which_validation_falls_is_not_kept(toy: Any, tmp_path: Path, monkeypatch: Any) -> None:
    class Wrong(PairMemory):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return -torch.nn.functional.normalize(features, dim=-1)

    monkeypatch.setattr(domain, "PairMemory", Wrong)
    outcome = adapt(toy(memory=40))
    assert outcome is not None
    memory = outcome["memory"]
    assert memory["with"]["top1"] < memory["without"]["top1"] == outcome["validation"]["top1"]
    assert not memory["kept"]
    assert trimtab.load(str(tmp_path / "out")).memory is None


def test_a_memory_that_ties_may_not_cost_the_other_figure(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = domain.validate
    for cost in (1.0, 0.0):

        def validate(frozen: Any, pairs: Any, gated: Any = None, memory: Any = None, cost: float = cost) -> Any:
            found = original(frozen, pairs, gated)
            return found if memory is None else found | {"mR": found["mR"] - cost}

        monkeypatch.setattr(domain, "validate", validate)
        outcome = adapt(toy(memory=40, training={"epochs": 1}))
        assert outcome is not None
        memory = outcome["memory"]
        assert memory["with"]["top1"] == memory["without"]["top1"]
        assert memory["kept"] is (cost == 0)


def test_what_passes_the_gate_is_told_of_whole_pictures(toy: Any, places: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate is fitted on cached states, which here differ from those of whole pictures by more than they do."""
    gates, embed = [], domain.embed

    def rounded(*arguments: Any) -> torch.Tensor:
        rows = embed(*arguments)
        return torch.nn.functional.normalize(rows + 0.2 * torch.randn_like(rows), dim=-1)

    def fit_gate(*arguments: Any) -> Any:
        gates.append((original(*arguments), arguments[-1]))
        return gates[-1][0]

    original = domain.fit_gate
    monkeypatch.setattr(domain, "embed", rounded)
    monkeypatch.setattr(domain, "fit_gate", fit_gate)
    image_only = {"adapters": [{"tower": "image", "width": 8}], "training": {"epochs": 1}}
    outcome = adapt(toy(**image_only, gate={"kind": "hard", "keep": 0.5}))
    assert outcome is not None
    ((gate, cached),) = gates
    pictures = sorted(places[2].parent.glob("*.png"))
    whole = torch.from_numpy(trimtab.load(str(places[0])).encode_image(pictures))
    assert outcome["gate"]["validation"] == pytest.approx(100 * gate(whole).mean().item())
    assert gate(whole).mean() != gate(cached).mean()


def test_one_model_has_one_figure(toy: Any, places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached states may say something else of the validation pictures than the dial, which passes them whole."""
    scores = iter([10.0, 90.0])
    monkeypatch.setattr(domain, "validate", lambda *_: {"top1": next(scores), "mR": 50.0})
    outcome = adapt(toy(training={"epochs": 1}, general=[str(places[2])], alphas=[0, 1]))
    assert outcome is not None
    start, end = (point["domain"] for point in outcome["alpha"])
    assert (outcome["validation_before"]["top1"], outcome["validation"]["top1"]) == (start, end)
    assert outcome["validation"]["epoch"] == 0
    assert outcome["history"][-1]["top1"] == 90.0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| top1 | {start:.3g} | {end:.3g} |" in card
    shown = trimtab.load(str(tmp_path / "out")).similarity(sorted(places[2].parent.glob("*.png")), CAPTIONS)
    assert 100 * np.mean(shown.argmax(1) == np.arange(96, 120) % len(CAPTIONS)) == pytest.approx(end)


# What a run says and refuses


def test_dry_run_says_all_and_does_nothing(toy: Any, tmp_path: Path, monkeypatch: Any, finished: Any) -> None:
    no_training(monkeypatch)
    result = CliRunner().invoke(app, ["adapt", str(toy()), "training.epochs=3", "--dry-run"])
    assert result.exit_code == 0, result.output
    for words in (
        "96 to train on (96 pictures, 12 captions), 24 for validation",
        f"{finished['outcome']['trained_parameters']:,} trained",
        "image tower  frozen below image.layers.0",
        "text tower   frozen below text.layers.1",
        "gate         none: every picture is adapted",
        "3 epochs of 48 pairs",
        "to validate (3 times)",
        "GB each at most, two of them in ",
        "GB for weights, gradients and moments",
    ):
        assert words in result.stdout
    assert "steps at least" not in result.stdout
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.training").exists()


def test_a_disk_without_room_for_the_cache_is_named_before_the_work(
    toy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    check_full_disk_is_named(toy(data={"views": 1}, training={"epochs": 1}), monkeypatch, caplog, capsys)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_plan(method: str, toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt(toy(method=method), dry_run=True) is None
    assert ("nothing is cached" in capsys.readouterr().out) == (method == "full")


def test_a_plan_says_why_there_are_more_epochs_than_were_asked_for(toy: Any, capsys: Any) -> None:
    assert adapt(toy(least_steps=40, training={"epochs": 1}), dry_run=True) is None
    assert "(10 epochs of 48 pairs, 40 steps at least)" in capsys.readouterr().out


def test_checkpoints_take_what_the_plan_says(toy: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = toy(method="full", training={"epochs": 2})
    asked: list[Any] = []
    monkeypatch.setattr(domain, "plan", lambda *arguments: asked.extend(arguments) or "")
    adapt(path, dry_run=True)
    adapt(path)
    largest = max(file.stat().st_size for file in (tmp_path / "out.training").glob("step-*"))
    assert largest == pytest.approx(checkpoint_bytes(*asked[:3]), rel=0.3)


def test_the_command_prints_an_outcome_without_its_history(toy: Any) -> None:
    result = CliRunner().invoke(app, ["adapt", str(toy(training={"epochs": 1}))])
    assert result.exit_code == 0, result.output
    assert "report.html" in result.stdout
    assert "history" not in result.stdout


@pytest.mark.parametrize("name", ["domain-grocery.yaml", "domain-clip.yaml"])
def test_recipes_for_products_take_tables_by_path(name: str, places: Any, tmp_path: Path) -> None:
    overrides = [f"data.train={places[1]}", f"data.validation={places[2]}", f"out={tmp_path / 'out'}"]
    recipe = load_recipe(ROOT / "recipes" / name, overrides)
    assert [source.path for source in recipe.data.train] == [str(places[1])]
    assert [source.path for source in recipe.data.validation] == [str(places[2])]
    small = [f"base={places[0]}", "adapters=[{tower: image, width: 4}]", "training.epochs=1", "least_steps=2"]
    small += ["data.map_augmentation={}", "training.trackers=[]"]
    assert adapt(ROOT / "recipes" / name, [*overrides, *small]) is not None


def test_bad_data_are_refused_before_a_model_is_loaded(toy: Any, tmp_path: Path, monkeypatch: Any) -> None:
    no_model(monkeypatch)
    same = [(f"{n}.png", "a cat") for n in range(6)]
    tiny_pairs.save_pictures(tmp_path, [name for name, _ in same])
    equal = tiny_pairs.write_table(tmp_path / "equal.csv", same)
    with pytest.raises(DataError, match="all 6 pictures have the same caption"):
        adapt(toy(data={"train": str(equal)}))
    half = tiny_pairs.write_table(tmp_path / "half.csv", [(f"{n}.png", "" if n < 4 else f"cat {n}") for n in range(6)])
    with pytest.raises(DataError, match="4 without caption"):
        adapt(toy(data={"train": str(half)}))
    with pytest.raises(DataError, match=r"general: .*nowhere.csv"):
        adapt(toy(general=[str(tmp_path / "nowhere.csv")]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(RecipeError, match="holds other files"):
        adapt(toy())


@pytest.mark.parametrize(("method", "rate"), [("adapter", 1e-2), ("lora", 1e-2), ("full", 1e-3)])
def test_a_residual_tower_learns(
    method: str, rate: float, places: tuple[Path, Path, Path], tmp_path: Path, pictures: list[Image.Image]
) -> None:
    folder = BUILDERS["clip-resnet"](tmp_path / "base")
    changes: dict[str, Any] = {
        "method": method,
        "adapters": [{"tower": "image", "kind": "conv", "first": 3, "width": 8}],
        "lora": {"targets": ["conv1", "conv3"], "first_block": 3},
        "training": {"epochs": 3, "learning_rate": rate},
    }
    adapt(recipe_from_mapping(merged(toy_mapping(folder, *places[1:], tmp_path / "out"), changes), "toy"))
    model, base = trimtab.load(tmp_path / "out", device="cpu"), trimtab.load(folder, device="cpu")
    assert not np.allclose(model.encode_image(pictures), base.encode_image(pictures), atol=1e-3)
    kept = [name for name in base.model.state_dict() if "running" in name]  # what its norms have counted
    assert kept
    assert all(torch.equal(model.model.state_dict()[name], base.model.state_dict()[name]) for name in kept)


@pytest.mark.parametrize("adapters", [[{"tower": "image", "kind": "conv"}], [{"tower": "text", "first": 7, "last": 9}]])
def test_adapters_that_do_not_fit_are_refused(adapters: Any, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    no_training(monkeypatch)
    with pytest.raises(RecipeError, match=r"no convolutional blocks|no range of the 2 layers"):
        adapt(toy(adapters=adapters))


def test_another_number_of_processes_is_refused_early(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    no_model(monkeypatch)
    with pytest.raises(TrimtabError, match="asks for 2 processes"):
        adapt(toy(training={"processes": 2}))


# Again, and after a stop


def test_the_same_recipe_again_returns_at_once(finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished["out"] / "adapter.safetensors").read_bytes()
    monkeypatch.setenv("TRIMTAB_CACHE", str(finished["cache"]))
    no_training(monkeypatch)
    again = adapt(finished["recipe"])
    assert again is not None
    assert again["history"] == finished["outcome"]["history"]
    assert (finished["out"] / "adapter.safetensors").read_bytes() == before


@pytest.mark.parametrize("what", ["gamma", "caption", "image processor"])
def test_another_recipe_or_data_in_the_same_folder_are_refused(
    what: str, toy: Any, places: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = write_pairs(tmp_path / "mine", 30)
    base = shutil.copytree(places[0], tmp_path / "base")
    path = toy(base=str(base), data={"train": str(mine)}, training={"epochs": 1})
    adapt(path)
    monkeypatch.setattr(FrozenStates, "fill", None)  # before anything is encoded
    if what == "image processor":
        settings = json.loads((base / "preprocessor_config.json").read_text(encoding="utf-8"))
        settings["image_mean"] = [0.4, 0.4, 0.4]
        (base / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if what == "caption":
        mine.write_text(mine.read_text(encoding="utf-8").replace("a red", "a black"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"out\.training holds a run of another recipe"):
        adapt(path, ["bank.gamma=2"] if what == "gamma" else [])


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_kill_9_then_resume(method: str, toy: Any, tmp_path: Path, finished: dict[str, Any], capfd: Any) -> None:
    recipe = toy(method=method, training={"checkpoint_every": 3, "epochs": 12 if method == "adapter" else 4})
    step = 36 if method == "adapter" else 12
    killed = process(recipe, step, "SIGKILL")  # in the middle of an epoch of four steps
    _, errors = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, errors
    assert not (tmp_path / "out").exists()
    other = finished["out"]
    if method == "lora":
        other = tmp_path / "undisturbed"
        adapt(recipe, [f"out={other}"])
        capfd.readouterr()
    assert adapt(recipe) is not None
    assert f"resuming at step {step - 3 if method == 'adapter' else 9}" in capfd.readouterr().err
    assert_same_weights(tmp_path / "out", other)


@pytest.mark.slow
def test_two_processes_train_as_one(toy: Any, tmp_path: Path) -> None:
    """Batches of 6 on each of two are one batch of 12; the bank is the same."""
    recipe = toy(training={"epochs": 3, "precision": "fp32"}, objective={"hard_negatives": 3})
    adapt(recipe, [f"out={tmp_path / 'one'}"])
    ranks = two_ranks(recipe)
    try:
        errors = [rank.communicate(timeout=180)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert_same_weights(tmp_path / "out", tmp_path / "one", rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_other_and_both_go_on_later(toy: Any, tmp_path: Path) -> None:
    recipe = toy(training={"epochs": 3, "checkpoint_every": 2, "precision": "fp32"})
    errors = []
    for last in ((7, "SIGKILL"), ()):
        ranks = two_ranks(recipe, *last)
        try:
            errors = [rank.communicate(timeout=180)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        codes = [rank.returncode for rank in ranks]
        if last:
            assert codes[1] == -signal.SIGKILL, errors
            assert codes[0] != 0, "the first rank must not wait for ever, nor call the run finished"
            assert not (tmp_path / "out").exists()
    assert codes == [0, 0], errors
    assert "resuming at step" in errors[0]
