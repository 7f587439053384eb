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
from trimtab.recipes.domain_pairs import DomainPairs, as_read, general_sets, read_pairs


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


def captioned(folder: Path, texts: list[str]) -> DomainPairs:
    """A picture per text, and the same pairs for validation."""
    names = [f"{number}.png" for number in range(len(texts))]
    save_pictures(folder, names)
    pairs = load_pairs([PairSource(str(write_table(folder / "t.csv", list(zip(names, texts)))))])
    return DomainPairs(pairs, pairs, {})


def test_captions_that_differ_for_the_base_stay_as_they_are(tmp_path: Path, tiny_base: Any, caplog: Any) -> None:
    pairs = captioned(tmp_path, ["a cat", "a dog", "a cat and a dog"])
    read = as_read(pairs, tiny_base("clip"))
    assert (read.train is pairs.train, read.validation is pairs.validation) == (True, True)
    assert not caplog.text


def test_captions_of_equal_tokens_become_the_first_of_them(tmp_path: Path, tiny_base: Any, caplog: Any) -> None:
    base = tiny_base("clip")
    long = "the moon over the sea" * 3
    texts = ["Red", "blue", "RED", f"{long} red", "red", f"{long} blue", "BLUE"]
    read = as_read(captioned(tmp_path, texts), base)
    assert read.train.captions == ("Red", "blue", f"{long} red")
    assert read.train.caption_index.tolist() == [0, 1, 0, 2, 0, 2, 1]
    assert [read.train.origin(row)[1] for row in range(7)] == list(range(2, 9))
    assert read.train.belong(np.arange(3), np.arange(3)).tolist() == np.eye(3, dtype=bool)[[0, 1, 0]].tolist()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3
    assert (
        "reads 4 of the 7 training captions as it reads others, for example 'RED' as 'Red'; 'red' as 'Red'" in told[0]
    )
    assert "of the 7 validation captions" in told[1]
    assert "4 of 14 captions are longer than the 24 tokens that" in told[2]


def test_scripts_that_the_base_does_not_know_are_named(tmp_path: Path, tiny_base: Any, caplog: Any) -> None:
    base = tiny_base("chinese_clip")
    as_read(captioned(tmp_path, ["一只猫的照片", "кошка", "собака", "a cat"]), base)
    assert "'собака' as 'кошка'" in caplog.text
    assert "adapt a language link first, then compose" in caplog.text
    with pytest.raises(
        DataError, match=r"as .* reads them: .*all 3 pictures have the same caption 'кошка': .*language"
    ):
        as_read(captioned(tmp_path / "all", ["кошка", "собака", "птица"]), base)


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
