"""The language link end to end on tiny models: what a run prints, learns, writes, and how it survives."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny_language
import trimtab
from tiny_language import (
    in_small_chunks,
    never,
    recipe_writer,
    signal_at,
    toy_mapping,
    toy_pairs,
    toy_recipe,
    write_pairs,
)
from trimtab.adapters.adapted import LanguageAdapted
from trimtab.cli import app
from trimtab.config import load_recipe, recipe_from_mapping, to_yaml
from trimtab.errors import ModelError, RecipeError, TrimtabError
from trimtab.evaluation.matching import translation_match
from trimtab.recipes import language
from trimtab.recipes.adapt import adapt
from trimtab.tasks.language import LanguageTask

FILES = ["README.md", "adapter.json", "adapter.safetensors"]
PAIRS = toy_pairs(400)
OTHERS = [pair for pair in toy_pairs(700) if pair not in PAIRS]  # never trained on
CHANCE = 100 / 50  # validation has 50 pairs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def places(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base (of the starter's family), student and pairs of the toy link."""
    pairs = write_pairs(tmp_path_factory.mktemp("toy") / "pairs.csv", PAIRS)
    return tiny_folder("vision-text-dual-encoder"), tiny_folder("bert"), pairs


@pytest.fixture(autouse=True)
def cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    in_small_chunks(monkeypatch.setattr)
    return cache


@pytest.fixture(scope="module")
def finished(places: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that nothing disturbed: its recipe, outcome, and the modules it had in memory."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = toy_recipe(*places, folder / "out")
    seen: dict[str, Any] = {}
    original_check, original_save = language.check_pairing, language.save

    def check_pairing(recipe: Any, base: Any, student: Any, train: Any) -> None:
        seen["before"] = [state_of(base), state_of(student)]
        original_check(recipe, base, student, train)

    def save(recipe: Any, adapter: Any, base: Any, student: Any, *rest: Any) -> None:
        seen.update(adapter=adapter, base=base, student=student)
        original_save(recipe, adapter, base, student, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(folder / "cache"))
        in_small_chunks(patch.setattr)
        patch.setattr(language, "check_pairing", check_pairing)
        patch.setattr(language, "save", save)
        outcome = adapt(recipe)
    assert outcome is not None
    return {"recipe": recipe, "out": folder / "out", "cache": folder / "cache", "outcome": outcome, **seen}


@pytest.fixture
def toy(places: tuple[Path, Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """Write the toy recipe with changes, its output in `tmp_path`; returns the YAML file."""
    return recipe_writer(tmp_path / "recipe.yaml", toy_mapping(*places, tmp_path / "out"))


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    never(monkeypatch.setattr, LanguageTask, "step", "a step was trained")


def state_of(tower: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tower.model.state_dict().items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


def assert_same_weights(folder: Path, other: Path) -> None:
    mine, theirs = weights(folder), weights(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert different == []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def process(*arguments: Any, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, tiny_language.__file__, *map(str, arguments)]
    search = {"PYTHONPATH": str(Path(tiny_language.__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env={**os.environ, **search, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# What a run says and does


def test_dry_run_says_all_and_does_nothing(
    toy: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, finished: dict[str, Any]
) -> None:
    no_training(monkeypatch)
    path = toy()
    overrides = ["training.epochs=3", "adapter.width=16"]
    result = CliRunner().invoke(app, ["adapt", str(path), *overrides, "--dry-run"])
    assert result.exit_code == 0, result.output
    printed = result.stdout[: result.stdout.index("\npairs ")]
    expected = load_recipe(path, overrides)
    assert (expected.training.epochs, expected.adapter.width) == (3, 16)
    assert printed.strip() == to_yaml(expected).strip()
    for words in (
        "350 to train on, 50 for validation",
        "GB in " + str(cache),
        "under a minute to encode once",
        "3 epochs of 350",
    ):
        assert words in result.stdout
    frozen = sum(p.numel() for m in (finished["base"], finished["student"]) for p in m.model.parameters())
    assert f"trained, {frozen:,} frozen" in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


def test_dry_run_knows_what_is_cached_and_what_room_there_is(
    finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    adapt(finished["recipe"], dry_run=True)
    printed = capsys.readouterr().out
    assert "free         0.00 GB on its disk\n" in printed
    assert "of it are there" not in printed
    assert not caplog.records  # the toy cache is smaller still
    usage = usage._replace(free=10)
    adapt(finished["recipe"], dry_run=True)
    assert "the cache needs about 0.0 GB more" in caplog.text
    caplog.clear()
    capsys.readouterr()
    monkeypatch.setenv("TRIMTAB_CACHE", str(finished["cache"]))
    adapt(finished["recipe"], dry_run=True)
    printed = capsys.readouterr().out
    assert "GB of it are there\n" in printed
    assert "time         all is cached, under a minute to train" in printed
    assert not caplog.records  # what is there needs no room
    changed = replace(finished["recipe"], student=replace(finished["recipe"].student, layers=(0,)), out="elsewhere")
    adapt(changed, dry_run=True)
    assert "under a minute to encode once" in capsys.readouterr().out  # the teacher's are there, the student's not


def test_dry_run_counts_the_parameters_that_train(places: Any, finished: dict[str, Any], capsys: Any) -> None:
    assert adapt(finished["recipe"], dry_run=True) is None
    adapter = finished["adapter"]
    solved = sum(p.numel() for p in adapter.linear.parameters())  # in closed form, not trained
    trained = sum(p.numel() for p in adapter.parameters()) - solved
    assert f"parameters   {trained:,} trained" in capsys.readouterr().out


def test_it_learns(finished: dict[str, Any]) -> None:
    outcome = finished["outcome"]
    assert outcome["validation"]["match"] > 20 * CHANCE
    losses = [record["loss"] for record in outcome["history"] if record["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]
    assert (outcome["pairs"], outcome["steps"]) == (350, 100)
    assert "match_zh" not in outcome["validation"]  # one language needs no figure of its own
    assert outcome["languages"] == {"zh": 350}
    assert outcome["validation"]["match"] == max(
        record["match"] for record in outcome["history"] if record["kind"] == "validation"
    )


def test_the_loaded_model_matches_translations_it_never_saw(finished: dict[str, Any]) -> None:
    model = trimtab.load(str(finished["out"]))
    student = model.encode_text([target for target, _ in OTHERS[:100]])
    teacher = model.encode_text([english for _, english in OTHERS[:100]])  # routed to the base
    assert translation_match(student, teacher).accuracy > 30  # of 100, chance is 1


def test_the_folder_holds_three_files_and_loads_to_the_same_model(finished: dict[str, Any]) -> None:
    assert sorted(path.name for path in finished["out"].iterdir()) == FILES
    trained = LanguageAdapted(finished["base"], finished["student"], finished["adapter"], layers=(0, -1))
    loaded = trimtab.load(str(finished["out"]))
    texts = [text for pair in OTHERS[:20] for text in pair]
    assert np.array_equal(loaded.encode_text(texts), trained.encode_text(texts))


def test_the_folder_says_what_it_is(finished: dict[str, Any]) -> None:
    described = json.loads((finished["out"] / "adapter.json").read_text(encoding="utf-8"))
    base, student = described["base"], described["student"]
    assert (base["fingerprint"], student["fingerprint"]) == (
        finished["base"].fingerprint,
        finished["student"].fingerprint,
    )
    assert Path(base["name"]).is_absolute()
    assert student["layers"] == [0, -1]
    assert described["metrics"]["match"] == finished["outcome"]["validation"]["match"]
    assert described["data"]["pairs"] == 350
    assert described["data"]["counts"]["all sources"]["kept"] == 400
    assert recipe_from_mapping(described["recipe"], "adapter.json") == finished["recipe"]
    card = (finished["out"] / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["language"] == ["zh", "en"]
    assert "350 pairs of parallel text" in card


def test_towers_are_left_as_they_were(finished: dict[str, Any]) -> None:
    for before, tower in zip(finished["before"], (finished["base"], finished["student"]), strict=True):
        after = state_of(tower)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not any(module.training for module in tower.model.modules())
        assert all(p.grad is None and not p.requires_grad for p in tower.model.parameters())


@pytest.mark.parametrize("family", ["clip", "siglip", "flava"])
def test_any_base_teaches(family: str, toy: Any, tiny_folder: Any, tmp_path: Path) -> None:
    base = tiny_folder(family)
    recipe = toy(base=str(base), training={"epochs": 2}, objective={"cosine": 1.0, "infonce": 0.5, "gram": 0.5})
    outcome = adapt(recipe)
    assert outcome is not None
    model = trimtab.load(str(tmp_path / "out"))
    embeddings = model.encode_text(["小猫", "a cat"])
    assert embeddings.shape == (2, trimtab.load(str(base)).embedding_dim)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


# English


def test_routed_english_is_the_base_to_the_last_bit(finished: dict[str, Any]) -> None:
    texts = [english for _, english in OTHERS[:20]]
    adapted, base = trimtab.load(str(finished["out"])), trimtab.load(str(finished["recipe"].base))
    assert np.array_equal(adapted.encode_text(texts), base.encode_text(texts))


def test_english_through_the_adapter_is_learnt_and_measured(toy: Any, tmp_path: Path) -> None:
    outcome = adapt(toy(english="adapter", data={"english_share": 0.4}))
    assert outcome is not None
    assert outcome["languages"]["en"] == pytest.approx(350 * 0.4 / 0.6, abs=1)
    assert outcome["validation"]["english_match"] > 5 * CHANCE
    described = json.loads((tmp_path / "out" / "adapter.json").read_text(encoding="utf-8"))
    assert described["metrics"]["english_match"] == outcome["validation"]["english_match"]
    adapted = trimtab.load(str(tmp_path / "out"))
    base = trimtab.load(described["base"]["name"])
    texts = [english for _, english in OTHERS[:50]]
    mine, theirs = adapted.encode_text(texts), base.encode_text(texts)
    assert not np.array_equal(mine, theirs)
    assert translation_match(mine, theirs).accuracy > 5 * CHANCE


def test_several_languages_are_drawn_in_balance(
    toy: Any, tmp_path: Path, places: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reversed_words = write_pairs(tmp_path / "ja.csv", [(target[::-1], english) for target, english in OTHERS[:100]])
    sources = [str(places[2]), {"path": str(reversed_words), "language": "ja"}]
    drawn: list[np.ndarray] = []
    original = language.draw_epoch

    def draw(*arguments: Any, **options: Any) -> Any:
        epoch = original(*arguments, **options)
        drawn.append(epoch.ravel())
        return epoch

    monkeypatch.setattr(language, "draw_epoch", draw)
    outcome = adapt(toy(data={"train": sources, "language_balance": 0.0}))
    assert outcome is not None
    counts = outcome["languages"]
    assert counts["zh"] > 3 * counts["ja"] > 0
    assert outcome["validation"]["match"] > 10 * CHANCE
    assert outcome["validation_languages"] == {"zh": 40, "ja": 10}
    one, other = outcome["validation"]["match_zh"], outcome["validation"]["match_ja"]
    assert outcome["validation"]["match"] == (one + other) / 2
    described = json.loads((tmp_path / "out" / "adapter.json").read_text(encoding="utf-8"))
    assert described["metrics"]["match_ja"] == other
    assert described["data"]["validation_languages"] == {"zh": 40, "ja": 10}
    # Training pairs keep the order of their sources: Chinese first.
    assert np.mean(np.concatenate(drawn) >= counts["zh"]) == pytest.approx(0.5, abs=0.01)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["language"] == ["zh", "ja", "en"]
    model = trimtab.load(str(tmp_path / "out"))
    assert model.encode_text(["猫小"]).shape == (1, model.embedding_dim)


# Again, and after a stop


def test_the_same_recipe_again_returns_at_once(finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(finished["out"])
    monkeypatch.setenv("TRIMTAB_CACHE", str(finished["cache"]))
    no_training(monkeypatch)
    monkeypatch.setattr(language.TextEncoder, "token_states", None)  # nothing is encoded either
    again = adapt(finished["recipe"])
    assert again is not None
    assert again["history"] == finished["outcome"]["history"]
    after = contents(finished["out"])
    assert after["adapter.safetensors"] == before["adapter.safetensors"]
    assert after.keys() == before.keys()


@pytest.mark.parametrize("what", ["seed", "pairs"])
def test_another_recipe_in_the_same_folder_is_refused(what: str, toy: Any, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "mine.csv", PAIRS)
    recipe = toy(data={"train": [str(pairs)]}, training={"epochs": 1})
    adapt(recipe)
    before = contents(tmp_path / "out")
    if what == "pairs":
        write_pairs(pairs, PAIRS[1:])
    with pytest.raises(RecipeError, match=r"out\.training holds a run of another recipe.*choose another out="):
        adapt(recipe, ["seed=1"] if what == "seed" else [])
    assert contents(tmp_path / "out") == before


def test_overrides_go_with_whatever_the_recipe_is(toy: Any, capfd: Any) -> None:
    mapping = yaml.safe_load(toy().read_text(encoding="utf-8"))
    recipe = recipe_from_mapping(mapping, "the recipe")
    for given in (mapping, recipe):
        adapt(given, ["seed=7"], dry_run=True)
        assert "seed: 7" in "".join(capfd.readouterr())
        with pytest.raises(RecipeError, match="no_such_key"):
            adapt(given, ["no_such_key=1"], dry_run=True)
    with pytest.raises(RecipeError, match="overrides are a list"):
        adapt(recipe, "seed=7")


def test_a_run_leaves_the_callers_generators_as_they_were(toy: Any) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), np.random.random(), torch.rand(1).item()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    adapt(toy(training={"epochs": 1}))
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected


@pytest.mark.parametrize("dry_run", [False, True])
def test_mistakes_that_cost_hours_are_refused_before_encoding(
    dry_run: bool, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy(training={"epochs": 1})
    adapt(recipe)
    monkeypatch.setattr(language, "encode", None)
    monkeypatch.setattr(language, "plan", None)
    with pytest.raises(RecipeError, match=r"out\.training holds a run of another recipe"):
        adapt(recipe, ["training.epochs=2"], dry_run=dry_run)
    with pytest.raises(ModelError, match=r"layers=\[7\]: .* has layers 0 to"):
        adapt(recipe, ["student.layers=[7]", f"out={tmp_path / 'other'}"], dry_run=dry_run)


def test_kill_9_in_training_then_resume(toy: Any, tmp_path: Path, finished: dict[str, Any], capfd: Any) -> None:
    recipe = toy(training={"checkpoint_every": 4})
    killed = process(recipe, "step", 37, "SIGKILL")
    _, errors = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, errors
    assert not (tmp_path / "out").exists()
    assert adapt(recipe) is not None
    assert "resuming at step 36 of 100" in capfd.readouterr().err
    assert_same_weights(tmp_path / "out", finished["out"])


def test_kill_9_while_caching_then_resume(
    toy: Any, tmp_path: Path, cache: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy()
    killed = process(recipe, "student", 4, "SIGKILL")
    _, errors = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, errors
    (part,) = (cache / "features").glob("*.part")
    assert json.loads((part / "progress.json").read_text())["done"] == 3 * tiny_language.CHUNK
    calls: list[int] = []
    original = language.TextEncoder.token_states

    def counted(self: Any, texts: list[str], *arguments: Any, **options: Any) -> Any:
        calls.append(len(texts))
        return original(self, texts, *arguments, **options)

    monkeypatch.setattr(language.TextEncoder, "token_states", counted)
    assert adapt(recipe) is not None
    assert sum(calls) == 400 + 50 - 3 * tiny_language.CHUNK  # targets and validation English, less what was there
    assert_same_weights(tmp_path / "out", finished["out"])


def test_ctrl_c_in_training_then_the_same_command(toy: Any, tmp_path: Path, finished: dict[str, Any]) -> None:
    recipe = toy()
    stopped = process(recipe, "step", 23, "SIGINT")
    _, errors = stopped.communicate(timeout=120)
    assert stopped.returncode == 2, errors
    assert "interrupted at step 23 of 100" in errors
    assert "Start the same command again to resume" in errors
    assert "Traceback" not in errors
    result = CliRunner().invoke(app, ["adapt", str(recipe)])
    assert result.exit_code == 0, result.output
    assert_same_weights(tmp_path / "out", finished["out"])


def test_a_tracker_that_is_not_installed_is_named_before_any_work(
    toy: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = CliRunner().invoke(app, ["adapt", str(toy()), "training.trackers=[wandb]"])
    assert result.exit_code == 2, result.output
    assert "pip install 'trimtab[wandb]'" in result.output.replace("\n", " ")
    assert not (cache / "features").exists()


@pytest.mark.parametrize("where", ["teacher", "student"])
def test_ctrl_c_while_caching_then_the_same_command(
    where: str, toy: Any, tmp_path: Path, cache: Path, finished: dict[str, Any]
) -> None:
    recipe = toy()
    with pytest.MonkeyPatch.context() as patch:
        signal_at(where, 3, signal.SIGINT, patch.setattr)
        result = CliRunner().invoke(app, ["adapt", str(recipe)])
    assert result.exit_code == 130, result.output
    assert "the same command continues" in result.output
    assert len(list((cache / "features").glob("*.part"))) == 1
    assert CliRunner().invoke(app, ["adapt", str(recipe)]).exit_code == 0
    assert_same_weights(tmp_path / "out", finished["out"])


@pytest.mark.slow
def test_two_processes_end_where_one_does(toy: Any, tmp_path: Path, finished: dict[str, Any]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    recipe = toy(training={"epochs": 3, "precision": "fp32"})
    alone = adapt(recipe, [f"out={tmp_path / 'alone'}"])
    assert alone is not None
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [process(recipe, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=180) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "training with 2 processes on cpu" in said[0][1]
    assert said[1][0] == ""  # only the main process reports and writes
    one, two = (trimtab.load(str(tmp_path / name)) for name in ("alone", "out"))
    mine, theirs = (dict(model.adapter.named_parameters()) for model in (one, two))
    for name in mine:
        # The bias of keys shifts all scores alike, so its gradient is nothing but rounding, which Adam makes steps of.
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(
                mine[name], theirs[name], atol=1e-3, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}"
            )
    texts = [target for target, _ in OTHERS[:50]]
    np.testing.assert_allclose(one.encode_text(texts), two.encode_text(texts), atol=1e-3)


# Disks


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory; the test is skipped where mounting is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_at_the_end_leaves_the_old_folder(
    toy: Any, tmp_path: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished["out"], out)
    before = contents(out)
    recipe = toy(seed=1, training={"epochs": 1})
    original = language.save

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def save(*arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trimtab.files.os.fsync", full)
            original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(language, "save", save)
        with pytest.raises(TrimtabError, match=r"cannot write .*out/.*disk is full.*free some space"):
            adapt(recipe)
    assert contents(out) == before
    trimtab.load(str(out))
    no_training(monkeypatch)  # the work was not lost: with room again, only the folder is written
    assert adapt(recipe) is not None
    assert contents(out)["adapter.safetensors"] != before["adapter.safetensors"]


@pytest.mark.parametrize("full", ["cache", "checkpoints"])
def test_a_full_disk_on_the_way(full: str, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy(adapter={"width": 64})
    with mounted(tmp_path / "small", "size=64k") as small:
        out = tmp_path / "out"
        if full == "cache":
            monkeypatch.setenv("TRIMTAB_CACHE", str(small))
        else:
            out = small / "out"
        with pytest.raises(TrimtabError, match=r"cannot write .*small.*free some space"):
            adapt(recipe, [f"out={out}"])
        assert not out.exists()
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    assert adapt(recipe, ["training.epochs=1"]) is not None


def test_a_read_only_place_is_refused_before_any_work(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "load_base", None)
    with (
        mounted(tmp_path / "fixed", "ro") as fixed,
        pytest.raises(RecipeError, match=r"fixed cannot be written \(read-only.*choose another folder"),
    ):
        adapt(toy(), [f"out={fixed / 'runs' / 'out'}"])
