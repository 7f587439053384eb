"""The benchmark of the domain link judges by its runs alone, and repeats none."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.config import DomainRecipe, GateConfig, load_recipe
from trimtab.data.captions import read_entries
from trimtab.recipes.folders import recipe_digest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import domain  # noqa: E402
import domain_elsewhere  # noqa: E402
import domain_scenes  # noqa: E402
import domain_study  # noqa: E402
import domain_tables  # noqa: E402


def finished(row: str, fine: float, seed: int = 1, **changes: Any) -> dict[str, Any]:
    points = {"full": 4.0, "adapter_hard": 0.5}.get(row, 0.0)
    return {
        "row": row, "seed": seed, "share": 1.0, "set": [], "setting": "a", "warm": False,
        "val": {"fine": fine, "coarse": fine}, "test": {"fine": fine, "coarse": fine + 5},
        "general": {"after": 30.0, "points": points}, "alpha": [],
        "trained_parameters": 2, "base_parameters": 100, "minutes": 9.0 if row == "full" else 2.0,
        **changes,
    }  # fmt: skip


@pytest.mark.parametrize("module", ["domain", "fewshot", "language_seeds"])
def test_seeds_that_are_no_numbers_are_refused_by_name(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    what = {"domain": ["--data", "photos"], "fewshot": ["sweep"]}.get(module, [])
    monkeypatch.setattr(sys, "argv", [module, *what, "--seeds", "1,a"])
    with pytest.raises(SystemExit):
        importlib.import_module(module).main()
    assert "argument --seeds: invalid numbers value: '1,a'" in capsys.readouterr().err


def test_goals_are_computed_by_seed() -> None:
    runs = [finished(row, fine + seed, seed) for seed in (1, 2, 3)
            for row, fine in (("full", 70.0), ("adapter", 71.0), ("adapter_negatives", 71.5), ("adapter_hard", 72.0))
            ]  # fmt: skip
    runs.append(finished("adapter_hard", 72.0, 1, share=0.25))
    found = domain_tables.goals(domain_tables.latest(runs), "test")
    assert [one.reached for one in found] == [True, False, True, True, True, True, True]
    assert [one.found for one in found[:3]] == ["+2.00 ± 0.00 points", "+0.50 ± 0.00 points", "+1.00 ± 0.00 points"]
    assert found[5].found == "22.2% (2.0 of 9.0 min)"
    text = domain_tables.report(runs)
    assert "| Continual fine-tuning | 72.0 ± 1.0 | 77.0 ± 1.0 | 30.0 ± 0.0 | 4.0 ± 0.0 |" in text
    assert "| Adapter, hard sampling − Adapter, no bank | +1.0 ± 0.0 | – |" in text
    assert "| Adapter, hard sampling − Adapter, no hard sampling (hard negatives alone) | +0.5 ± 0.0 | – |" in text


def test_the_error_over_classes_is_that_of_drawing_other_classes() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(5, 40, 60)
    ours, theirs = (rng.binomial(pictures, rate) for rate in (0.8, 0.75))
    runs = [
        finished(
            row, 70.0, seed, test={"fine": 70.0, "coarse": 75.0, "by_class": np.stack([right, pictures], 1).tolist()}
        )
        for row, right in (("adapter_hard", ours), ("full", theirs))
        for seed in (1, 2)
    ] + [finished("full", 70.0, 3)]
    found = domain_tables.latest(runs)
    mine, others = found["adapter_hard", 1.0, ()], found["full", 1.0, ()]
    error = domain_tables.error_over_classes(mine, others, "test")
    draws = rng.integers(0, 60, (4000, 60))
    leads = 100 * (ours - theirs)[draws].sum(1) / pictures[draws].sum(1)
    assert error == pytest.approx(leads.std(), rel=0.1)
    assert f"| ± {error:.1f} |" in domain_tables.difference_table(found, "test")
    assert domain_tables.error_over_classes(mine, {3: others[3]}, "test") is None


def test_goals_without_figures_are_not_reached() -> None:
    found = domain_tables.goals(domain_tables.latest([finished("adapter_hard", 70.0)]), "test")
    assert [one.reached for one in found] == [None, None, None, None, True, None, None]
    warm = [finished("full", 70.0), finished("adapter_hard", 80.0, warm=True)]
    assert domain_tables.goals(domain_tables.latest(warm), "test")[5].reached is None
    elsewhere = [finished("full", 70.0, machine="slow"), finished("adapter_hard", 80.0, machine="fast")]
    assert domain_tables.goals(domain_tables.latest(elsewhere), "test")[5].reached is None


def test_minutes_of_disturbed_runs_do_not_count() -> None:
    runs = [finished("full", 70.0), finished("adapter_hard", 80.0, disturbed=True)]
    assert domain_tables.goals(domain_tables.latest(runs), "test")[5].reached is None


def test_minutes_are_compared_by_seed() -> None:
    runs = [finished("full", 70.0, seed, minutes=minutes) for seed, minutes in ((1, 9.0), (2, 90.0))]
    runs += [finished("adapter_hard", 80.0, 1), finished("adapter_hard", 80.0, 2, warm=True)]
    assert domain_tables.goals(domain_tables.latest(runs), "test")[5].found == "22.2% (2.0 of 9.0 min)"


def test_a_run_without_its_curve_keeps_the_one_before() -> None:
    curve = [{"alpha": 0.0, "domain": 10.0, "general": 30.0}, {"alpha": 1.0, "domain": 70.0, "general": 20.0}]
    runs = [finished("full", 50.0, alpha=curve), finished("full", 70.0), finished("full", 71.0, seed=2)]
    (seeds,) = domain_tables.latest(runs).values()
    assert [(run["test"]["fine"], run["alpha"]) for run in seeds.values()] == [(70.0, curve), (71.0, [])]
    other = finished("full", 60.0, setting="b")
    (seeds,) = domain_tables.latest([*runs, other]).values()
    assert seeds[1]["alpha"] == []  # of another recipe


def test_forgetting_nothing_is_no_share() -> None:
    runs = [finished("full", 70.0, general={"after": 31.0, "points": -1.0}), finished("adapter_hard", 72.0)]
    found = domain_tables.goals(domain_tables.latest(runs), "test")[3]
    assert found.reached is False
    assert "forgot nothing" in found.found


def test_runs_of_older_recipes_are_left_out() -> None:
    runs = [finished("full", 50.0, 1), finished("full", 50.0, 2), finished("full", 70.0, 1, setting="b")]
    (seeds,) = domain_tables.latest(runs).values()
    assert [run["test"]["fine"] for run in seeds.values()] == [70.0]


def test_without_a_test_split_validation_is_shown() -> None:
    text = domain_tables.report([finished("adapter", 61.25, test=None)])
    assert "on validation pictures" in text
    assert "61.2" in text


def grocery_folder(folder: Path) -> Path:
    (folder / "oat.txt").write_text("A white drink. Good in coffee.", encoding="utf-8")
    names = ["Oat-Milk,0,Milk,0,,/oat.txt", "Sour_Milk,1,Milk,0,,", "Leek,2,Vegetable,1,,"]
    (folder / "classes.csv").write_text("\n".join(["name,id,coarse,id,a,b", *names]) + "\n", encoding="utf-8")
    for split in ("train", "val"):
        lines = [f"{split}/a, b/{fine}.jpg, {fine}, {int(fine == 2)}" for fine in range(3)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_the_lists_become_tables(tmp_path: Path) -> None:
    grocery = domain.Grocery.prepare(grocery_folder(tmp_path), tmp_path / "work")  # no test.txt is needed yet
    assert grocery.classes == ["Oat Milk", "Sour Milk", "Leek"]
    assert grocery.coarse.tolist() == [0, 0, 1]
    lines = (tmp_path / "work" / "train.csv").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["image,text", '"train/a, b/0.jpg",a photo of Oat Milk']
    assert (tmp_path / "work" / "val-labels.csv").read_text(encoding="utf-8").splitlines()[3].endswith(",Leek")
    assert (tmp_path / "work" / "descriptions.csv").read_text(encoding="utf-8").splitlines() == [
        "class,description", "Oat Milk,A white drink.", "Sour Milk,a photo of Sour Milk", "Leek,a photo of Leek",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=r"has no train\.txt"):
        domain.Grocery.prepare(tmp_path / "absent", tmp_path / "work")


def asked(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    options = {
        "recipe": domain.RECIPE,
        "share": 1.0,
        "described": False,
        "set": [],
        "set_row": [],
        "out": tmp_path / "runs.jsonl",
    }
    return argparse.Namespace(**{**options, "validation_only": False, "no_general": False, "warm": False, **changes})


def test_a_run_is_repeated_only_if_something_changed(tmp_path: Path) -> None:
    grocery = domain.Grocery.prepare(grocery_folder(tmp_path), tmp_path / "work")
    options = asked(tmp_path)
    job = domain.make_job(options, grocery, "adapter_hard", 1, "base")
    moved = domain.Grocery.prepare(tmp_path, tmp_path / "elsewhere")
    assert domain.make_job(options, moved, "adapter_hard", 2, "base").setting == job.setting
    domain.append(options.out, finished("adapter_hard", 70.0, setting=job.setting, warm=True))
    with options.out.open("a", encoding="utf-8") as stream:
        stream.write('{"row": "adap')  # killed while writing
    assert not domain.is_done(options, job)  # its time is not known
    assert domain.is_done(asked(tmp_path, warm=True), job)
    domain.append(options.out, finished("adapter_hard", 70.0, setting=job.setting))
    assert len(domain.read_runs(options.out)) == 2
    assert domain.is_done(options, job)
    other = asked(tmp_path, set=["bank.gamma=2"])
    assert not domain.is_done(other, domain.make_job(other, grocery, "adapter_hard", 1, "base"))
    assert not domain.is_done(options, domain.make_job(options, grocery, "adapter_hard", 1, "another base"))


def test_descriptions_are_captions_of_another_run(tmp_path: Path) -> None:
    grocery = domain.Grocery.prepare(grocery_folder(tmp_path), tmp_path / "work")
    named, described = (
        domain.make_job(asked(tmp_path, described=flag), grocery, "adapter_hard", 1, "base") for flag in (False, True)
    )
    assert named.setting != described.setting
    (source,) = described.recipe.data.train
    captions = {text for entry in read_entries(source) for text in entry.texts}
    assert captions == {"a photo of Oat Milk", "A white drink.", "a photo of Sour Milk", "a photo of Leek"}


@pytest.mark.parametrize("row", [row for row in domain.ROWS if row not in ("base", "linear_probe")])
def test_every_row_draws_as_many_pairs(row: str, tmp_path: Path) -> None:
    grocery = domain.Grocery.prepare(grocery_folder(tmp_path), tmp_path / "work")
    jobs = [domain.make_job(asked(tmp_path, share=share), grocery, row, 3, "base") for share in (1.0, 0.25)]
    reference = domain.load_recipe(domain.RECIPE)
    assert isinstance(reference, DomainRecipe)
    for job in jobs:
        drawn = job.recipe.training.epochs * job.recipe.bank.epoch_share * job.share
        assert drawn == reference.training.epochs * reference.bank.epoch_share
        assert job.recipe.seed == 3
    assert jobs[0].recipe.bank.enabled == row.endswith(("_hard", "_negatives"))


def test_logistic_regression_finds_what_can_be_separated() -> None:
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    labels = features[:, :3].argmax(1)
    weak, strong = (domain.fit_logistic(features, labels, 3, penalty) for penalty in (1e-4, 10.0))
    assert ((features @ weak[:-1] + weak[-1]).argmax(1) == labels).float().mean() > 0.95
    assert weak[:-1].norm() > 10 * strong[:-1].norm()


def test_a_gate_is_shown_with_and_without() -> None:
    ungated = {"test": {"fine": 73.0, "coarse": 80.0}, "general": {"after": 20.0, "points": 9.5}}
    text = domain_tables.report([finished("adapter_hard", 72.0, ungated=ungated)])
    assert "| The same, every picture adapted | 73.0 | 80.0 | 20.0 | 9.5 |" in text
    assert "| **Adapter, hard sampling** | 72.0 | 77.0 | 30.0 | 0.5 |" in text


def test_a_baseline_is_not_run_again_because_adapters_changed(tmp_path: Path) -> None:
    grocery = domain.Grocery.prepare(grocery_folder(tmp_path), tmp_path / "work")
    jobs = [
        domain.make_job(asked(tmp_path, set_row=[("full", one), ("adapter_hard", one)]), grocery, row, 1, "base")
        for row in ("full", "adapter_hard")
        for one in ("bank.gamma=3", "bank.gamma=4")
    ]
    assert jobs[0].setting == jobs[1].setting
    assert jobs[2].setting != jobs[3].setting


# Scenes that are held out


def test_the_group_least_like_the_others_is_held_out() -> None:
    rng = np.random.default_rng(0)
    near, far, small = np.eye(8)[:3]
    sizes = [(near, 9), (far + 0.6 * near, 3), (near + 0.5 * small, 4)]
    rows = np.concatenate([place + 0.02 * rng.standard_normal((count, 8)) for place, count in sizes])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    order = rng.permutation(len(rows))
    features = np.concatenate([rows[order], np.eye(8)[3:5]])
    labels = np.array([0] * len(rows) + [1, 2])  # the others have one picture each
    out = domain_scenes.held_out(features, labels)
    assert out.tolist() == [9 <= number < 12 for number in order] + [False, False]


def test_groups_are_parts_of_the_whole() -> None:
    rows = np.random.default_rng(1).standard_normal((12, 4))
    cosines = rows @ rows.T
    found = domain_scenes.partitions(cosines)
    assert [len(groups) for groups in found] == [9, 8, 7, 6, 5, 4, 3, 2]
    assert all((np.sum(groups, axis=0) == 1).all() for groups in found)
    # Average linkage joins the two groups with the highest mean cosine.
    for before, after in pairwise(found):
        ids = [{tuple(np.flatnonzero(group)) for group in groups} for groups in (before, after)]
        joined = next(iter(ids[1] - ids[0]))
        parts = [group for group in before if set(np.flatnonzero(group)) <= set(joined)]
        means = {(a, b): cosines[np.ix_(before[a], before[b])].mean() for a in range(len(before)) for b in range(a)}
        assert cosines[np.ix_(*parts)].mean() == pytest.approx(max(means.values()))


def test_held_out_scenes_are_no_training_pictures(tmp_path: Path) -> None:
    lines = [f"train/{number}.jpg, {number % 2}, 0" for number in range(6)]
    for name, text in {"train.txt": lines, "val.txt": ["val/0.jpg, 0, 0"], "test.txt": ["test/0.jpg, 1, 0"]}.items():
        (tmp_path / name).write_text("\n".join(text), encoding="utf-8")
    classes = ["name,id,coarse,coarse id,picture,text", "Red-Apple,0,Apple,0,a,b", "Oat-Milk,1,Milk,1,a,b"]
    (tmp_path / "classes.csv").write_text("\n".join(classes), encoding="utf-8")
    whole = domain.Grocery.prepare(tmp_path, tmp_path / "work")
    held = domain.Grocery.prepare(tmp_path, tmp_path / "work", frozenset({"train/1.jpg", "train/4.jpg"}))
    assert held.listed("scenes") == [("train/1.jpg", 1), ("train/4.jpg", 0)]
    assert sorted(held.listed("train") + held.listed("scenes")) == sorted(whole.listed("train"))
    assert held.digest != whole.digest
    assert len((tmp_path / "work" / "train.csv").read_text(encoding="utf-8").splitlines()) == 5
    assert held.labels("scenes").read_text(encoding="utf-8").splitlines()[1] == "train/1.jpg,Oat Milk"


def test_tables_name_the_pictures_that_they_are_of() -> None:
    run = finished("adapter_hard", 70.0, test=None, scenes={"fine": 66.0, "coarse": 67.0})
    assert "held out" in domain_tables.report([run])
    assert "66.0" in domain_tables.report([run])
    assert "on validation pictures" in domain_tables.report([finished("adapter_hard", 70.0, test=None)])


@pytest.mark.parametrize("name", domain_study.VARIANTS)
def test_rows_of_the_study_are_recipes_of_their_own(name: str, tmp_path: Path) -> None:
    grocery = domain.Grocery.prepare(grocery_folder(tmp_path), tmp_path / "work")
    options = argparse.Namespace(out=tmp_path / "study.jsonl", work=tmp_path / "work")
    settings = {}
    for one in (name, domain_study.AS_IT_IS):
        variant = domain_study.VARIANTS[one]
        job = domain.make_job(domain_study.as_domain_asks(options, one), grocery, variant.row, 1, "base")
        assert job.changes == variant.changes
        settings[one] = job.setting
    assert len(set(settings.values())) == len(settings)


def test_the_study_compares_with_the_recipe_of_the_same_seeds() -> None:
    def run(name: str, seed: int, scenes: float, validation: float, setting: str = "now") -> dict[str, Any]:
        fine = {"scenes": {"fine": scenes}, "val": {"fine": validation}, "setting": setting}
        return {"change": name, "seed": seed, "trained_parameters": 2, "base_parameters": 100, **fine}

    older = run(domain_study.AS_IT_IS, 3, 10.0, 10.0, "before")
    known = [older, run(domain_study.AS_IT_IS, 1, 80.0, 70.0), run(domain_study.AS_IT_IS, 2, 90.0, 80.0)]
    table = domain_study.as_table([run("20 epochs", 2, 91.0, 82.0), run("logit_scale 20", 3, 50.0, 60.0), *known])
    assert table.splitlines()[2:] == [
        "| recipe as it is | 85.0 | 75.0 |  | 2.00 | 1, 2 |",
        "| logit_scale 20 | 50.0 | 60.0 |  | 2.00 | 3 |",
        "| 20 epochs | 91.0 | 82.0 | +1.5 | 2.00 | 2 |",
    ]
    cropped = domain_study.CROPPED
    with_crops = [run(cropped, 1, 60.0, 50.0), run(f"{cropped}: 20 epochs", 1, 61.0, 52.0)]
    first, second = domain_study.as_table([*known, *with_crops]).split(f"\nOn {cropped}:\n\n")
    assert first.splitlines()[3:] == [f"| {cropped} | 60.0 | 50.0 | -20.0 | 2.00 | 1 |"]
    assert second.splitlines()[2:] == [
        f"| {cropped} | 60.0 | 50.0 |  | 2.00 | 1 |",
        "| 20 epochs | 61.0 | 52.0 | +1.5 | 2.00 | 1 |",
    ]


def test_other_domains_are_learned_by_the_recipe_as_it_is(tmp_path: Path) -> None:
    where = domain_elsewhere.Elsewhere("mR", tmp_path / "train.csv", tmp_path / "validation.csv", lambda model: 0.0)
    rows, seeds, recipes = zip(*domain_elsewhere.recipes(where, domain_elsewhere.SHOWN, [1, 2]), strict=True)
    assert (rows, seeds) == (("base", *(row for row in domain_elsewhere.SHOWN[1:] for _ in range(2))), (0, *[1, 2] * 3))
    by_row = dict(zip(rows, recipes, strict=True))
    assert {one.training.epochs for one in recipes} == {load_recipe(domain.RECIPE).training.epochs}
    assert {one.bank.epoch_share for one in recipes} == {by_row["adapter_hard"].bank.epoch_share}
    assert [by_row[row].bank.enabled for row in ("full", "adapter", "adapter_hard")] == [False, False, True]
    assert by_row["full"].method == "full"
    assert by_row["adapter_hard"].data.train[0].path == str(where.train)
    assert len({recipe_digest(one) for one in recipes[1:]}) == 6
    # Neither the seed nor the place of the tables makes another setting.
    copies = [tmp_path, tmp_path / "copy"]
    for folder in copies:
        folder.mkdir(exist_ok=True)
        (folder / "train.csv").write_text("image,text\n", encoding="utf-8")
    places = [
        domain_elsewhere.Elsewhere("mR", folder / "train.csv", folder / "validation.csv", lambda model: 0.0)
        for folder in copies
    ]
    found = [
        {
            domain_elsewhere.setting_of(recipe, one, "base")
            for _, _, recipe in domain_elsewhere.recipes(one, [row], [1, 2])
        }
        for one in places
        for row in ("full", "adapter", "adapter_hard")
    ]
    assert [len(one) for one in found] == [1] * 6
    assert found[:3] == found[3:]
    assert len(set.union(*found)) == 3


def test_elsewhere_a_baseline_is_not_run_again_because_adapters_changed(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("image,text\n", encoding="utf-8")
    where = domain_elsewhere.Elsewhere("mR", tmp_path / "train.csv", tmp_path / "validation.csv", lambda model: 0.0)
    settings = {
        row: {
            domain_elsewhere.setting_of(one, where, "base")
            for one in (recipe, replace(recipe, gate=GateConfig("none")))
        }
        for row, _, recipe in domain_elsewhere.recipes(where, ["full", "adapter_hard"], [1])
    }
    assert [len(one) for one in settings.values()] == [1, 2]
    [(_, _, recipe)] = domain_elsewhere.recipes(where, ["full"], [1])
    assert domain_elsewhere.setting_of(recipe, where, "other base") not in settings["full"]


def test_the_tables_of_other_domains_compare_seed_by_seed() -> None:
    def run(row: str, seed: int, score: float) -> dict[str, Any]:
        figures = {"score": score, "trained": 2.0, "steps": 600, "setting": "now"}
        return {"set": "clothes", "metric": "top-1", "row": row, "seed": seed, **figures}

    base = {**run("base", 0, 30.0), "trained": None, "steps": None}
    older = {**run("adapter_hard", 2, 50.0), "setting": "before"}
    table = domain_elsewhere.as_tables([older, base, run("full", 1, 80.0), run("adapter_hard", 1, 83.0)])
    assert "| Clothes | top-1 |" in table
    assert "| Base, zero-shot | 30.0 | – | – | – |" in table
    assert "| **Adapter, hard sampling** | 83.0 | 2.00 | 600 | 1 |" in table
    assert "− Continual fine-tuning | +3.0 | 1 of 1 |" in table
    assert "− Adapter, no bank | – | 0 of 0 |" in table
