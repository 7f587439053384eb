"""Training and validation pairs, and pictures outside the domain as evaluation gets them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_domain import toy_recipe
from tiny_pairs import picture_bytes, save_pictures, write_shard, write_table
from trimtab.config import PairSource
from trimtab.data.pairs import load_pairs, shared_images
from trimtab.errors import DataError, RecipeError
from trimtab.evaluation.embedding import embed_images
from trimtab.evaluation.forgetting import measure
from trimtab.recipes.domain_pairs import general_sets, read_pairs


def test_pictures_of_shards_stay_where_they_are(tmp_path: Path, tiny_base: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    colours = [0, 1000, 2000, 3000]
    members = {
        f"{at}.{kind}": content
        for at, colour in enumerate(colours)
        for kind, content in (("png", picture_bytes(colour, (40, 30))), ("txt", f"colour {colour}"))
    }
    shard = write_shard(tmp_path / "s.tar", members)
    (general,) = general_sets([PairSource(str(shard))], seed=0)
    assert not any(isinstance(image, bytes) for image in general.sources)
    base = tiny_base("clip")
    found = embed_images(base, general.sources)
    assert np.allclose(found.embeddings, base.encode_image([members[f"{at}.png"] for at in range(4)]), atol=1e-5)
    assert measure(base, [general]).keys() == {"s"}

    shard.write_bytes(shard.read_bytes().replace(members["2.png"][:8], b"damaged!"))
    with pytest.raises(DataError, match=r"none of the 4 images .*s\.tar: 0\.png: not an image"):
        embed_images(base, general.sources)


@pytest.mark.parametrize("check", [True, False])
def test_a_picture_under_two_names_is_not_split(check: bool, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    names = [f"{number:03}.png" for number in range(20)]
    save_pictures(tmp_path, names)
    for name in names:
        shutil.copy(tmp_path / name, tmp_path / f"copy-{name}")
    rows = [(prefix + name, f"caption {int(name[:3]) % 4}") for name in names for prefix in ("", "copy-")]
    table = write_table(tmp_path / "all.csv", rows)
    data = {"validation": [], "validation_share": 0.2, "check_duplicates": check}
    pairs = read_pairs(toy_recipe(tmp_path, table, table, tmp_path / "out", data=data))
    assert bool(shared_images(pairs.train, pairs.validation)) is not check
    assert "training pictures are in validation too" in caplog.text
    counts = pairs.counts["training"]
    assert counts["kept"] == len(pairs.train)
    assert counts["for validation"] == len(pairs.validation) == 8
    assert sum(counts.values()) == 40
    assert (counts["set_aside"] > 0) is check


def test_general_pictures_that_are_trained_on_are_named(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    names = ["one.png", "two.png", "three.png", "other.png"]
    save_pictures(tmp_path, names)
    train = load_pairs([PairSource(str(write_table(tmp_path / "t.csv", [(name, name[0]) for name in names[:3]])))], 0)
    shutil.copy(tmp_path / "two.png", tmp_path / "everyday.png")
    rows = [("everyday.png", "a known picture"), ("other.png", "a new one")]
    general = PairSource(str(write_table(tmp_path / "everyday.csv", rows)))
    general_sets([general], seed=0, train=train)
    assert "1 of 2 pictures of general" in caplog.text
    assert "everyday.png (there: " in caplog.text


@pytest.mark.parametrize("alphas", [[1e30], [-0.5], ["nan"]])
def test_settings_of_the_dial_are_checked_before_training(alphas: list[Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="alphas"):
        toy_recipe(tmp_path, tmp_path, tmp_path, tmp_path, alphas=alphas)
