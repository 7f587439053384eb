"""Where a run writes: what is refused before any work, and what names the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.config import recipe_from_mapping
from trimtab.errors import RecipeError
from trimtab.recipes.folders import ADAPTED_FILES, check_out, claim, recipe_digest, training_folder

DOMAIN = {"link": "domain", "method": "full", "data": {"train": "pairs.csv"}}


def test_a_new_or_empty_folder_will_do(tmp_path: Path) -> None:
    for own in (ADAPTED_FILES, None):
        check_out(str(tmp_path / "deep" / "new"), own)
        check_out(str(tmp_path), own)
    assert not (tmp_path / "deep").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"is a file; choose another"):
        check_out(str(tmp_path / "file" / "out"))


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(RecipeError, match=f"out=.*: {tmp_path} cannot be written .read-only, or permission denied"):
        check_out(str(tmp_path / "a" / "b"))


@pytest.mark.parametrize("holds", [[], ["README.md", ".adapter.json.x.tmp"], ["adapter.json", "notes.txt"]])
def test_own_adapted_folders_are_written_again(holds: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in holds:
        (out / name).touch()
    check_out(str(out))
    assert sorted(path.name for path in out.iterdir()) == sorted(holds)


def test_where_a_run_keeps_its_checkpoints(tmp_path: Path) -> None:
    assert training_folder(str(tmp_path / "out")) == tmp_path / "out.training"
    assert training_folder("runs/zh/") == Path("runs/zh.training")


@pytest.mark.parametrize("own", [ADAPTED_FILES, None])
def test_a_folder_of_other_things_is_refused(own: tuple[str, ...] | None, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RecipeError, match=r"holds other files \(thesis.tex"):
        check_out(str(tmp_path), own)


def test_a_whole_model_goes_nowhere_near_an_adapted_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_text("{}")
    check_out(str(tmp_path))
    with pytest.raises(RecipeError, match=r"adapter\.json"):
        check_out(str(tmp_path), None)


def test_a_run_may_write_its_model_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").touch()
    with pytest.raises(RecipeError, match=r"config\.json"):
        check_out(str(out), None)
    claim(str(out))
    check_out(str(out), None)
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert training_folder(f"{out}/").is_dir()


def test_the_digest_is_of_what_decides_the_weights() -> None:
    plain = recipe_digest(recipe_from_mapping(DOMAIN, "here"))
    for same in (
        {"out": "elsewhere"},
        {"general": "photos.csv"},
        {"alphas": [0.5]},
        {"training": {"log_every": 3, "checkpoint_every": 7, "trackers": [], "processes": 2}},
    ):
        assert recipe_digest(recipe_from_mapping({**DOMAIN, **same}, "here")) == plain
    for other in ({"seed": 1}, {"method": "probe"}, {"training": {"epochs": 3}}, {"bank": {"gamma": 2}}):
        assert recipe_digest(recipe_from_mapping({**DOMAIN, **other}, "here")) != plain


def test_captions_that_the_script_chooses_leave_the_digest_as_it_was() -> None:
    named = {"path": "pairs.csv", "label": "label", "templates": ["a photo of a {}"]}
    digests = {
        recipe_digest(recipe_from_mapping({**DOMAIN, "data": {"train": source, "validation": source}}, "here"))
        for source in (named, {"path": "pairs.csv", "label": "label"})
    }
    assert len(digests) == 1
