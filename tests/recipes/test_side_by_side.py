"""Runs of every kind are read, what is none is named, and the page says what may be said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_adapted import save_tiny_adapted
from trimtab.errors import TrimtabError
from trimtab.evaluation.report import render_html
from trimtab.evaluation.side_by_side import RunResult, Score, differences, side_by_side, verdict
from trimtab.recipes.side_by_side import read_runs, report_runs, short_names
from trimtab.towers.text_encoder import TextEncoder
from trimtab.training.checkpoint import Checkpoint, CheckpointFolder

HISTORY = [
    {"kind": "train", "step": 1, "loss": 2.0},
    {"kind": "train", "step": 2, "loss": 1.0},
    {"kind": "validation", "step": 1, "epoch": 0, "match": 40.0},
    {"kind": "validation", "step": 2, "epoch": 1, "match": 46.5},
]


@pytest.fixture
def adapted(tmp_path: Path, tiny_base: Callable[[str], Any], tiny_folder: Callable[[str], Path]) -> Callable[..., Path]:
    student = TextEncoder.load(str(tiny_folder("bert")), device="cpu")

    def make(name: str, **changes: Any) -> Path:
        metrics = changes.pop("metrics", {"match": 46.5})
        return save_tiny_adapted(tmp_path / name, tiny_base("clip"), student, metrics=metrics, **changes)

    return make


def test_an_adapted_folder_with_its_curves(adapted: Callable[..., Path], tmp_path: Path) -> None:
    folder = adapted("one")
    CheckpointFolder(tmp_path / "one.training").save(2, Checkpoint({}, {"history": HISTORY}))
    [run], unreadable = read_runs([folder])
    assert unreadable == []
    assert (run.name, run.kind, run.figures) == ("one", "language link", {"match": 46.5})
    assert run.history == HISTORY
    assert run.recipe["link"] == "language"
    assert run.headline == ("Translation match", 46.5, "on validation data")
    assert dict(run.facts)["pairs"] == 30000


def test_validation_figures_of_prompts_are_found_and_their_test_figures_left(adapted: Callable[..., Path]) -> None:
    [run], _ = read_runs([adapted("few", metrics={"validation top1": 87.5, "validation loss": 0.4, "test top1": 80.0})])
    assert run.headline == ("Top-1", 87.5, "on validation data")


def test_a_training_folder_stands_for_its_run_once(adapted: Callable[..., Path], tmp_path: Path) -> None:
    folder = adapted("one")
    CheckpointFolder(tmp_path / "one.training").save(2, Checkpoint({}, {"history": HISTORY}))
    runs, _ = read_runs([folder, tmp_path / "one.training"])
    assert [run.kind for run in runs] == ["language link"]
    CheckpointFolder(tmp_path / "other.training").save(2, Checkpoint({}, {"history": HISTORY}))
    [run], _ = read_runs([tmp_path / "other.training"])
    assert (run.name, run.kind, run.figures) == ("other", "not finished", {"match": 46.5})


def test_results_of_a_quickstart(tmp_path: Path) -> None:
    rows = [
        {"row": "english_base", "dataset": "photos", "metric": "mR", "value": 35.4},
        {"row": "adapted_target", "dataset": "photos", "metric": "mR", "value": 24.5},
        {"row": "adapted_target", "dataset": "photos", "metric": "i2t R@1", "value": 3.0},
        {"row": "adapted_target", "dataset": "photos", "metric": "top1", "value": float("nan")},
    ]
    domain = [{"row": "adapter_hard", "dataset": "clothes", "metric": "top1", "value": 80.0, "seed": 0}]
    found = {"language": {"rows": rows}, "domain": {"rows": domain}, "seed": 0, "seconds": {"all": 60.4}}
    (tmp_path / "results.json").write_text(json.dumps(found), encoding="utf-8")
    [run], _ = read_runs([tmp_path])
    assert run.headline == ("mR", 24.5, "Target language, adapted, on photos")
    assert {(score.dataset, score.metric) for score in run.scores} == {("photos", "mR"), ("clothes", "top1")}
    assert dict(run.facts)["all, s"] == 60


def test_results_of_evaluate_and_of_few_shot_runs(tmp_path: Path) -> None:
    evaluation = {"task": "classification", "model": "runs/a", "manifest": "data/shop.csv", "top1": 71.5, "top5": 90.0}
    (tmp_path / "a.json").write_text(json.dumps(evaluation), encoding="utf-8")
    lines = [{"method": "coop", "shots": 4, "seed": seed, "top1": value} for seed, value in ((1, 60.0), (2, 62.0))]
    text = "\n".join([*map(json.dumps, lines), "[" * 100_000, '{"method": "coop", "sho'])
    (tmp_path / "b.jsonl").write_text(text, encoding="utf-8")
    first, second = read_runs([tmp_path / "a.json", tmp_path / "b.jsonl"])[0]
    assert first.headline == ("Top-1", 71.5, "model, on shop")
    assert second.scores == [Score("test", "coop, 4 shots", "top1", 61.0)]


def test_few_shot_runs_of_other_settings_and_bases_are_not_averaged(tmp_path: Path) -> None:
    common = {"dataset": "shop", "base": "starter"}
    lines = [
        {"method": "template", "shots": 1, "seed": 1, "top1": 20.0},
        {"method": "structured", "shots": 4, "seed": 1, "top1": 40.0},
        {"method": "structured", "shots": 4, "seed": 2, "top1": 60.0},
        {"method": "coop", "shots": 4, "seed": 1, "top1": 45.0},
        {"method": "coop", "shots": 4, "seed": 2, "top1": float("nan")},
        {"method": "structured", "shots": 4, "seed": 1, "top1": 70.0},  # the same after its options were changed
    ]
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(json.dumps({**common, **line}) for line in lines), encoding="utf-8")
    [found], _ = read_runs([path])
    assert {score.row: score.value for score in found.scores} == {
        "template, 1 shot": 20.0,
        "structured, 4 shots": 65.0,
        "coop, 4 shots": 45.0,
    }
    assert found.headline == ("Top-1", 65.0, "structured, 4 shots, on shop")
    assert (dict(found.facts)["runs"], dict(found.facts)["runs that were done again"]) == (4, 1)
    with path.open("a", encoding="utf-8") as stream:
        stream.write("\n" + json.dumps({**common, **lines[1], "base": "runs/domain", "top1": 90.0}))
    [found], _ = read_runs([path])
    values = {score.row: score.value for score in found.scores}
    assert values["structured, 4 shots, base starter"] == 65.0
    assert values["structured, 4 shots, base runs/domain"] == 90.0


def test_few_shot_runs_of_a_changed_recipe_or_test_set_have_rows_and_columns_of_their_own(tmp_path: Path) -> None:
    common = {"method": "linear_probe", "dataset": "shop", "shots": 2, "base": "starter", "n_train": 6}
    first = {"views": 2, "n_test": 14, "setting": "a" * 16, "data": "1" * 16}
    lines = [
        *({**first, "seed": seed, "top1": 60.0} for seed in (1, 2, 3)),
        {**first, "seed": 1, "top1": 90.0, "views": 8, "setting": "b" * 16},
        {**first, "seed": 1, "top1": 100.0, "n_test": 3, "data": "2" * 16},
    ]
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(json.dumps({**common, **line}) for line in lines), encoding="utf-8")
    [found], _ = read_runs([path])
    assert {(score.dataset, score.row): score.value for score in found.scores} == {
        ("shop (test pictures 14; data 11111111)", "linear probe, 2 shots, views 2, setting aaaaaaaa"): 60.0,
        ("shop (test pictures 14; data 11111111)", "linear probe, 2 shots, views 8, setting bbbbbbbb"): 90.0,
        ("shop (test pictures 3; data 22222222)", "linear probe, 2 shots, views 2, setting aaaaaaaa"): 100.0,
    }
    old = [{key: value for key, value in line.items() if key not in ("setting", "data")} for line in lines]
    path.write_text("\n".join(json.dumps({**common, **line}) for line in old), encoding="utf-8")
    [found], _ = read_runs([path])
    assert sorted(score.value for score in found.scores) == [60.0, 90.0, 100.0]
    assert dict(found.facts)["runs"] == 5


def test_evaluations_with_other_templates_say_so(tmp_path: Path) -> None:
    found = {"task": "classification", "manifest": "shop.csv", "manifest_sha256": "a" * 64, "skipped": []}
    one = {**found, "top1": 70.0, "templates": ["{}"], "templates_for": "given"}
    other = {**found, "top1": 80.0, "templates": ["a photo of a {}, on white", "a {}"], "templates_for": "given"}
    for name, content in (("a", one), ("b", other), ("c", one)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    runs, _ = read_runs([tmp_path / "a.json", tmp_path / "b.json"])
    assert verdict(runs) == "`b.json` has the highest top-1, 80.0%, on shop."
    rows = ["model, templates: {}", "model, templates: a photo of a {}, on white; a {}"]
    assert [run.scores[0].row for run in runs] == rows
    page = render_html(side_by_side(runs))
    assert page.count("a photo of a {}, on white; a {}") > 2, "in its row, its tile and its facts"
    runs, _ = read_runs([tmp_path / "a.json", tmp_path / "c.json"])
    assert [run.scores[0].row for run in runs] == ["model", "model"]
    assert dict(runs[0].facts)["templates"] == "{}"
    (tmp_path / "d.json").write_text(json.dumps({**found, "task": "retrieval", "mR": 50.0}), encoding="utf-8")
    runs, _ = read_runs([tmp_path / "a.json", tmp_path / "d.json"])
    assert [run.scores[0].row for run in runs] == ["model", "model"]


def test_figures_that_are_level_as_shown_are_marked_alike() -> None:
    runs = [
        RunResult(name, "evaluation", scores=[Score("shop", "model", "top1", value)])
        for name, value in (("a", 86.2), ("b", 86.19999885559082), ("c", 80.0))
    ]
    assert render_html(side_by_side(runs)).count('class="value good"') == 2


def test_transductive_figures_are_named(tmp_path: Path) -> None:
    found = {"task": "retrieval", "manifest": "shop.csv", "mR": 50.0, "hubness": "none"}
    (tmp_path / "a.json").write_text(json.dumps(found), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps({**found, "hubness": "csls"}), encoding="utf-8")
    runs, _ = read_runs([tmp_path / "a.json", tmp_path / "b.json"])
    assert [run.scores[0].dataset for run in runs] == ["shop", "shop (transductive: csls)"]
    assert "different kinds" in verdict(runs)
    assert verdict(runs[1:]) == "mR 50.0%, model, on shop (transductive: csls)."


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "`b` has the highest top-1, 80.0%, on test."),
        ({"manifest_sha256": "f" * 64}, "different kinds"),
        ({"classes_digest": "f" * 64}, "different kinds"),
        ({"skipped": [{"source": "1.png", "reason": "no such file"}]}, "different kinds"),
        ({"model": "runs/b", "fingerprint": "f" * 64, "seconds": 9.0}, "`b` has the highest"),
    ],
)
def test_evaluations_compare_on_the_same_test_set_alone(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    found = {"task": "classification", "manifest": "x/test.csv", "manifest_sha256": "a" * 64, "skipped": []}
    for name, own in (("a", {"top1": 70.0}), ("b", {"top1": 80.0, "manifest": "y/test.csv", **changes})):
        content = json.dumps({**found, "classes_digest": "b" * 64, **own})
        (tmp_path / f"{name}.json").write_text(content, encoding="utf-8")
    runs, _ = read_runs([tmp_path / "a.json", tmp_path / "b.json"])
    assert told in verdict(runs).replace(".json", "")
    datasets = {score.dataset for run in runs for score in run.scores}
    assert len(datasets) == (2 if "kinds" in told else 1)
    page = render_html(side_by_side(runs))
    assert ("the highest is marked" in page) == ("kinds" not in told)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "{"),
        ("a.json", "[1, 2]"),
        ("a.json", "{}"),
        ("a.json", '{"rows": [{"row": "a"}]}'),
        ("a.json", '{"rows": [3]}'),
        ("a.json", "[" * 100_000),
        ("a.jsonl", "nothing\n"),
        ("a.jsonl", ""),
        ("folder/adapter.json", "{}"),
        ("folder/adapter.json", '{"schema_version": 99}'),
        ("folder/composed.json", "{}"),
        ("folder/other.txt", ""),
        ("folder.training/step-00000001.safetensors", "damaged"),
    ],
)
def test_what_is_no_run_is_named_and_costs_nothing(
    adapted: Callable[..., Path], tmp_path: Path, name: str, content: str
) -> None:
    good = adapted("good")
    path = tmp_path / "bad" / name
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    wrong = path.parent if "/" in name else path
    outcome = report_runs([wrong, good, tmp_path / "missing"], tmp_path / "page.html")
    assert outcome["runs"] == ["good"]
    assert outcome["unreadable"] == [str(wrong), str(tmp_path / "missing")]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert str(wrong) in page
    assert "no such file or folder" in page


def test_nothing_but_bad_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match=r"none of these.*\n.*missing: no such file"):
        report_runs([tmp_path / "missing"], tmp_path / "page.html")
    with pytest.raises(TrimtabError, match=r"must be an \.html file"):
        report_runs([tmp_path], tmp_path / "page.pdf")
    assert not (tmp_path / "page.html").exists()


def test_a_page_below_a_file_is_refused(adapted: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text", encoding="utf-8")
    with pytest.raises(TrimtabError, match=r"page\.html: it is, or lies below, a file"):
        report_runs([adapted("good")], tmp_path / "file" / "page.html")


def test_names_are_short_and_differ() -> None:
    assert short_names(["runs/a", "runs/b/", "/x/c.training"]) == ["a", "b", "c"]
    assert short_names(["x/runs/a", "y/runs/a", "b"]) == ["x/runs/a", "y/runs/a", "b"]
    assert short_names(["a", "a"]) == ["a", "a"]
    assert short_names(["."]) == ["."]


def run(name: str, value: float, **changes: Any) -> RunResult:
    return RunResult(name, "domain link", figures={"top1": value}, **{"data_digest": "d", **changes})


def test_the_best_is_named_only_where_it_can_be() -> None:
    assert verdict([run("a", 80.0), run("b", 82.5)]) == "`b` has the highest top-1, 82.5%, on validation data."
    assert "different data" in verdict([run("a", 80.0), run("b", 82.5, data_digest="e")])
    level = [run("a", 82.5), run("b", 80.0), run("c", 82.52)]
    assert verdict(level) == "`a` and `c` are level at the highest top-1, 82.5%, on validation data."
    other = RunResult("c", "language link", figures={"match": 90.0})
    assert "different kinds" in verdict([run("a", 80.0), other])
    assert "different kinds" in verdict([run("a", 80.0), RunResult("c", "not finished")])
    assert "None" in verdict([RunResult("c", "not finished")])
    tested = [RunResult(name, "evaluation", scores=[Score("shop", "model", "top1", 70.0)]) for name in "ab"]
    assert "on shop" in verdict(tested)
    elsewhere = RunResult("c", "evaluation", scores=[Score("street", "model", "top1", 90.0)])
    assert "different kinds" in verdict([*tested, elsewhere])


def test_recipes_are_compared_key_by_key() -> None:
    first = run("a", 1.0, recipe={"seed": 0, "bank": {"enabled": True, "gamma": 0.5}, "list": [1]})
    second = run("b", 1.0, recipe={"seed": 0, "bank": {"enabled": False}, "list": [1], "new": {"key": None}})
    assert differences([first, second]) == {"bank.enabled": [True, False], "bank.gamma": [0.5, None]}


def test_the_page_escapes_what_runs_hold() -> None:
    evil = "<script>alert(1)</script>"
    runs = [run(evil, 50.0, recipe={evil: evil}, recipe_text=evil, history=HISTORY), run("b", 60.0, recipe={"x": 1})]
    page = render_html(side_by_side(runs, [(evil, evil)]))
    assert evil not in page
    assert "&lt;script&gt;" in page
