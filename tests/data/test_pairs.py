"""Image-text pairs: what is kept, counted, chosen, split, and what stops a run."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tiny_pairs import picture_bytes, save_pictures, write_shard, write_table
from trimtab.config import DomainData, PairSource, ViewsConfig, from_mapping, to_mapping
from trimtab.data.pairs import (
    ImageTextPairs,
    PairCounts,
    _choose,
    _Pair,
    _places,
    keep_apart,
    load_pairs,
    shared_images,
    split_off,
)
from trimtab.data.shards import PictureFile
from trimtab.errors import DataError, RecipeError


def listed(pairs: ImageTextPairs) -> list[tuple[str, str]]:
    """Every pair as (name of the picture, caption)."""
    return [
        (pairs.images[image].name, pairs.captions[caption])
        for image, caption in zip(pairs.image_index, pairs.caption_index)
    ]


def unread(captions_of: list[set[int]]) -> ImageTextPairs:
    """Pairs of pictures that are not on disk, from the captions of each."""
    index = [(image, caption) for image, captions in enumerate(captions_of) for caption in sorted(captions)]
    images, captions = np.array(index, np.int64).reshape(-1, 2).T
    _, captions = np.unique(captions, return_inverse=True)
    return ImageTextPairs(
        tuple(PictureFile(Path(f"{i}.png"), f"{i}.png") for i in range(len(captions_of))),
        tuple(map(str, range(captions.max() + 1))),
        images,
        captions,
        ("t.csv",),
        np.stack([np.zeros(len(index), np.int64), np.arange(len(index)) + 2], axis=1),
        PairCounts(kept=len(index)),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pictures(tmp_path, [f"{i:03}.png" for i in range(12)])
    return tmp_path


def test_pictures_and_captions_are_unique_and_know_their_rows(folder: Path) -> None:
    rows = [("001.png", "a dog"), ("./001.png", " the\u3000dog "), ("000.png", "a dog"), ("001.png", "a\x00 dog\n")]
    first = write_table(folder / "t.jsonl", rows)
    second = write_table(folder / "u.csv", [("002.png", "a cat"), ("001.png", "a dog")])
    pairs = load_pairs([PairSource(str(first)), PairSource(str(second))], seed=0)
    assert listed(pairs) == [
        ("001.png", "a dog"),
        ("001.png", "the dog"),
        ("000.png", "a dog"),
        ("002.png", "a cat"),
    ]
    assert pairs.captions == ("a dog", "the dog", "a cat")
    assert [pairs.origin(i) for i in range(4)] == [(str(first), 1), (str(first), 2), (str(first), 3), (str(second), 2)]
    assert pairs.counts == PairCounts(kept=4, duplicate=2)
    assert (pairs.image_index.dtype, pairs.caption_index.dtype) == (np.int64, np.int64)
    assert pairs.caption_sets.tolist() == [0, 1, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        pairs.images = ()  # type: ignore[misc]


def test_what_is_unusable_is_counted_listed_and_survived(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "003.png").write_bytes(b"")
    (folder / "004.png").write_bytes(picture_bytes(4, (100, 100), "BMP")[:-500])
    (folder / "005.png").unlink()
    (folder / "005.png").mkdir()
    rows = [(f"{i:03}.png", f"caption {i}") for i in range(9)]
    rows += [("007.png", "\u200b \ufeff\x00\ufe0f"), ("gone.png", "x"), ("", "y"), ("007.png", "a second one")]
    table = write_table(folder / "t.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        pairs = load_pairs([PairSource(str(table))])
    assert pairs.counts == PairCounts(kept=7, empty=1, missing=3, unreadable=2)
    assert [image.name for image in pairs.images] == [f"{i:03}.png" for i in (0, 1, 2, 6, 7, 8)]
    reasons = {drop.row: drop.reason for drop in pairs.dropped}
    assert sorted(reasons) == [4, 5, 6, 10, 11, 12]
    assert reasons[4].endswith("003.png: the file is empty")
    assert "cut off" in reasons[5]
    assert reasons[11].endswith("gone.png: no such file")
    assert reasons[10] == "the caption is empty"
    assert reasons[12] == "the column 'image' is empty"
    assert "6 of 13 pairs cannot be used (1 without caption, 3 without picture, 2 with a picture that" in caplog.text


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_lists_that_are_filled_up_lack_nothing(folder: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[tuple[str, list[str | None]]] = [(f"{i:03}.png", [f"caption {i}", None, " ", None]) for i in range(6)]
    pairs = load_pairs([PairSource(str(write_table(folder / f"t{suffix}", rows)))])
    assert (pairs.counts, pairs.dropped) == (PairCounts(kept=6), ())
    assert not caplog.text
    pairs = load_pairs([PairSource(str(write_table(folder / f"t{suffix}", [*rows, ("006.png", [None, ""])])))])
    assert pairs.counts == PairCounts(kept=6, empty=1)


def test_punctuation_is_no_caption(folder: Path) -> None:
    texts = ["!!!", "---", "…。", "a", "7", "+", "❤️", "👍🏽", "#️⃣", "‼️", "狗", "?!", "€"]
    rows = [(f"{number % 12:03}.png", text) for number, text in enumerate(texts)]
    pairs = load_pairs([PairSource(str(write_table(folder / "t.csv", rows)))])
    assert list(pairs.captions) == ["a", "7", "+", "❤️", "👍🏽", "#️⃣", "‼️", "狗", "€"]
    assert [drop.row for drop in pairs.dropped] == [2, 3, 4, 13]
    assert pairs.dropped[0].reason == "the caption '!!!' has no letter, digit or symbol"


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([("000.png", "a"), ("001.png", "b"), ("002.png", ""), ("003.png", " "), ("004.png", "\u200b")], "3 without c"),
        ([("000.png", "a"), ("001.png", "b"), ("x.png", "c"), ("y.png", "d"), ("", "e")], "3 without picture"),
        ([("000.png", "a"), ("001.png", "b"), ("t.jsonl", "c"), ("x.png", "c"), ("002.png", "")], "1 with a picture"),
    ],
    ids=["captions", "pictures", "both"],
)
def test_more_than_half_unusable_is_an_error(folder: Path, rows: list[tuple[str, str]], problem: str) -> None:
    table = write_table(folder / "t.jsonl", rows)
    with pytest.raises(DataError, match=rf"t\.jsonl: 3 of 5 pairs cannot be used \(.*{problem}.*row 3: .*check the"):
        load_pairs([PairSource(str(table))])
    assert len(load_pairs([PairSource(str(write_table(table, rows[:4])))])) == 2, "exactly half is survived"


def test_half_is_judged_by_what_was_tried(folder: Path) -> None:
    rows = [(f"{i:03}.png", f"caption {i}" if i % 3 else "") for i in range(12)]
    table = write_table(folder / "t.jsonl", rows)
    pairs = load_pairs([PairSource(str(table), limit=2)])
    assert (len(pairs), pairs.counts.empty, pairs.counts.set_aside) == (2, 4, 6)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (
            [("000.png", "same"), ("001.png", "same"), ("002.png", " same ")],
            "all 3 pictures have the same caption 'same'",
        ),
        ([("000.png", ["a", "b"]), ("001.png", ["b", "a"])], "all 2 pictures have the same caption 'a'"),
        ([("000.png", "a"), ("000.png", "b")], "there are 1 usable pictures"),
    ],
    ids=["captions", "sets", "pictures"],
)
def test_what_cannot_be_told_apart_is_refused(folder: Path, rows: list[tuple[str, str]], problem: str) -> None:
    table = write_table(folder / "t.jsonl", rows)
    with pytest.raises(DataError, match=rf"t\.jsonl: contrastive training tells pairs apart, and {problem}: give more"):
        load_pairs([PairSource(str(table))])


def test_one_class_is_refused_however_many_templates(folder: Path) -> None:
    save_pictures(folder / "classes", ["dog/a.png", "dog/b.png"])
    with pytest.raises(DataError, match="all 2 pictures have the same caption"):
        load_pairs([PairSource(str(folder / "classes"), templates=("a {}", "the {}"))])
    with pytest.raises(DataError, match="no source given"):
        load_pairs([])


def test_shards_give_pairs(tmp_path: Path) -> None:
    for shard in range(2):
        members: dict[str, bytes | str] = {}
        for i in range(3):
            members |= {f"{i}.png": picture_bytes(3 * shard + i), f"{i}.txt": f"caption {shard} {i}"}
        write_shard(tmp_path / f"s-{shard:02}.tar", members)
    cut = tmp_path / "s-01.tar"
    content = bytearray(cut.read_bytes())
    content[content.index(picture_bytes(4)) + 40] ^= 0xFF
    cut.write_bytes(content[: content.index(b"2.txt")])
    pairs = load_pairs([PairSource(f"{tmp_path}/s-{{00..01}}.tar")])
    assert listed(pairs) == [
        ("s-00.tar/0.png", "caption 0 0"),
        ("s-00.tar/1.png", "caption 0 1"),
        ("s-00.tar/2.png", "caption 0 2"),
        ("s-01.tar/0.png", "caption 1 0"),
    ]
    assert pairs.counts == PairCounts(kept=4, empty=1, missing=1, unreadable=1)
    assert pairs.origin(3) == (str(cut), 1)
    assert [drop.row for drop in pairs.dropped] == [3, 4, 2]
    assert pairs.images[3].read().size == (6, 5)


def test_the_digest_follows_content_not_place(folder: Path) -> None:
    rows = [(f"{i:03}.png", f"caption {i % 3}") for i in range(6)]
    pairs = load_pairs([PairSource(str(write_table(folder / "t.csv", rows)))])
    copy = folder / "copy"
    copy.mkdir()
    for path in folder.glob("*.png"):
        shutil.copy(path, copy / path.name)
    source = PairSource(str(write_table(copy / "other.jsonl", [*rows, ("none.png", "x")])))
    assert load_pairs([source]).digest == pairs.digest
    others = {pairs.digest}
    (copy / "000.png").write_bytes(picture_bytes(99))
    others.add(load_pairs([source]).digest)
    write_table(copy / "other.jsonl", [*rows[:5], ("005.png", "another")])
    others.add(load_pairs([source]).digest)
    write_table(copy / "other.jsonl", [rows[1], rows[0], *rows[2:]])
    others.add(load_pairs([source]).digest)
    write_table(copy / "other.jsonl", [*rows[:5], ("005.png", "caption 0")])  # the same pictures and captions
    others.add(load_pairs([source]).digest)
    write_table(copy / "other.jsonl", [(name, text.replace("2", "7")) for name, text in rows])
    others.add(load_pairs([source]).digest)
    assert len(others) == 6

    gone = load_pairs([source])
    (copy / "002.png").unlink()
    with pytest.raises(DataError, match=r"002\.png: cannot be read any more"):
        _ = gone.digest


def test_pairs_anywhere_are_no_negatives(folder: Path) -> None:
    rows = [("000.png", "a"), ("000.png", "b"), ("001.png", "b"), ("002.png", "c")]
    pairs = load_pairs([PairSource(str(write_table(folder / "t.csv", rows)))])
    expected = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], bool)
    np.testing.assert_array_equal(pairs.belong(np.arange(3), np.arange(3)), expected)
    np.testing.assert_array_equal(pairs.belong(np.array([2, 0]), np.array([1])), [[False], [True]])


def test_validation_is_kept_apart(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(folder / "001.png", folder / "copy-of-1.png")
    (folder / "link.png").symlink_to(folder / "002.png")
    write_shard(
        folder / "s.tar", {"0.png": picture_bytes(3), "0.txt": "three", "1.png": picture_bytes(50), "1.txt": "x"}
    )
    rows = [(f"{i:03}.png", f"caption {i}") for i in range(6)]
    train = load_pairs([PairSource(str(write_table(folder / "train.csv", rows)))])
    rows = [("copy-of-1.png", "x"), ("link.png", "y"), ("011.png", "z")]
    sources = [PairSource(str(write_table(folder / "val.csv", rows))), PairSource(str(folder / "s.tar"))]
    validation = load_pairs(sources)
    assert shared_images(train, validation) == {1: 0, 2: 1, 3: 3}
    with caplog.at_level(logging.WARNING):
        same, count = keep_apart(train, validation, remove=False)
    assert (same, count) == (train, 3)
    assert "3 of 6 training pictures are in validation too, for example" in caplog.text
    assert "001.png (there: " in caplog.text
    rest, count = keep_apart(train, validation, remove=True)
    assert (count, rest.counts) == (3, PairCounts(kept=3, set_aside=3))
    assert [image.name for image in rest.images] == ["000.png", "004.png", "005.png"]
    assert rest.take_images(np.array([True, True, False])).counts == PairCounts(kept=2, set_aside=4)
    assert keep_apart(rest, validation, remove=True) == (rest, 0)
    with pytest.raises(DataError, match=r"training without the pictures of validation: .* 0 usable pictures"):
        keep_apart(train, train, remove=True)
    (folder / "000.png").unlink()
    with pytest.raises(DataError, match=r"000\.png: cannot be read any more .*: start again"):
        keep_apart(train, validation, remove=True)


def test_a_split_that_leaves_too_little_is_refused(folder: Path) -> None:
    rows = [("000.png", "a"), ("001.png", "b"), ("002.png", "b")]
    pairs = load_pairs([PairSource(str(write_table(folder / "t.csv", rows)))])
    with pytest.raises(DataError, match=r"after a split of 3 pictures at 0\.1: .*change validation_share, or give"):
        split_off(pairs, 0.1, seed=0)


def test_a_small_share_is_two_pictures() -> None:
    pairs = unread([{number} for number in range(12)])
    assert {len(split_off(pairs, 0.1, seed)[1].images) for seed in range(9)} == {2}


def test_the_second_run_does_not_decode_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "003.png").write_bytes(b"nothing")
    source = PairSource(str(write_table(folder / "t.csv", [(f"{i:03}.png", f"caption {i}") for i in range(6)])))
    pairs = load_pairs([source], notes=folder / "notes")
    for way in ("check", "read"):
        monkeypatch.setattr(PictureFile, way, lambda self: pytest.fail("decoded again"))
    again = load_pairs([source], notes=folder / "notes")
    assert listed(again) == listed(pairs)
    assert (again.counts, again.dropped, again.digest) == (pairs.counts, pairs.dropped, pairs.digest)


STRATA = st.lists(st.integers(0, 6), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(STRATA, st.lists(st.floats(0.01, 1), min_size=2, max_size=2), st.integers(0, 9))
def test_shares_are_nested_and_stratified(strata: list[int], shares: list[float], seed: int) -> None:
    pairs = [_Pair(PictureFile(Path(f"{i}"), f"{i}"), f"{s}", "t.csv", i) for i, s in enumerate(strata)]
    small, large = (set(_choose(pairs, share, None, seed)) for share in sorted(shares))
    assert small
    assert small <= large
    if len(large) > 1:
        taken = Counter(pair.caption for pair in pairs if pair.picture in large)
        for caption, count in Counter(pair.caption for pair in pairs).items():
            assert abs(taken[caption] - max(shares) * count) < 1
    assert set(_choose(pairs, 1.0, None, seed)) == {pair.picture for pair in pairs}
    limited = set(_choose(pairs, max(shares), 3, seed))
    assert limited <= large
    assert len(limited) == min(3, len(large))
    assert set(_choose(pairs, max(shares), 3, seed)) == limited


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0.01, 0.99), st.integers(0, 99))
def test_a_share_of_captions_that_stand_once(count: int, share: float, seed: int) -> None:
    below = (_places(range(count), np.random.default_rng(seed)) < share).sum()
    assert abs(below - share * count) <= 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=3), min_size=2, max_size=40),
    st.floats(0.05, 0.5),
    st.integers(0, 9),
)
def test_splits_are_partitions(captions_of: list[set[int]], share: float, seed: int) -> None:
    pairs = unread(captions_of)
    try:
        train, validation = split_off(pairs, share, seed)
    except DataError:
        assume(False)
    assert sorted(listed(train) + listed(validation)) == sorted(listed(pairs))
    assert not set(train.images) & set(validation.images)
    for part in (train, validation):
        assert part.counts == PairCounts(kept=len(part), set_aside=len(pairs) - len(part))
        assert set(part.caption_index.tolist()) == set(range(len(part.captions)))
        assert set(part.image_index.tolist()) == set(range(len(part.images)))
        rows = {(pair, pairs.origin(i)) for i, pair in enumerate(listed(pairs))}
        assert {(pair, part.origin(i)) for i, pair in enumerate(listed(part))} <= rows
        np.testing.assert_array_equal(
            part.belong(np.arange(len(part.images)), np.arange(len(part.captions))),
            [[(image.name, text) in set(listed(part)) for text in part.captions] for image in part.images],
        )
    again = split_off(pairs, share, seed)
    assert [listed(part) for part in again] == [listed(train), listed(validation)]
    if len(validation.images) > 2:
        sets = pairs.caption_sets
        held_out = np.isin(np.arange(len(pairs.images)), [int(image.name[:-4]) for image in validation.images])
        for code, size in enumerate(np.bincount(sets)):
            assert abs(held_out[sets == code].sum() - share * size) < 1


def says_something(char: str) -> bool:
    return unicodedata.category(char)[0] in "LNS" or char in "‼⁉〰\u20e3"


TEXTS = st.one_of(st.none(), st.text(st.characters(exclude_categories=("Cs",)), max_size=6))
NAMES = st.sampled_from([*(f"{i}.png" for i in range(5)), "none.png", "broken.png", "", None])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.lists(TEXTS, max_size=2)), min_size=1, max_size=12),
    st.sampled_from([".jsonl", ".parquet"]),
    st.sampled_from([0.3, 1.0]),
)
def test_counts_add_up_for_any_table(rows: list[tuple[str | None, list[str]]], suffix: str, share: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_pictures(Path(folder), [f"{i}.png" for i in range(5)])
        (Path(folder) / "broken.png").write_bytes(b"broken")
        rows = [(f"{i}.png", [f"caption {i}"]) for i in range(5)] + rows  # so that most tables are good enough
        table = write_table(Path(folder) / f"t{suffix}", rows)
        try:
            pairs = load_pairs([PairSource(str(table), share=share)], seed=1)
        except DataError:
            return
        counts = pairs.counts
        usable = [sum(1 for text in texts if text and any(map(says_something, text))) for _, texts in rows]
        read = sum(counts.as_dict().values())
        assert read == sum(max(1, count) for count in usable)
        assert counts.kept == len(pairs) == len(set(listed(pairs)))
        assert len(pairs.dropped) == counts.empty + counts.missing + counts.unreadable <= read
        assert all(caption == " ".join(caption.split()) != "" for caption in pairs.captions)
        assert all(image.read().size == (6, 5) for image in pairs.images)
        assert load_pairs([PairSource(str(table), share=share)], seed=1).digest == pairs.digest


# The section of the recipe


def test_sources_in_recipes() -> None:
    data = from_mapping(
        DomainData,
        {
            "train": ["train.csv", {"path": "photos/", "templates": "a {}", "share": "0.25"}],
            "validation": "val.csv",
            "views": "4",
            "augmentation": {"flip": "no"},
        },
        "x",
    )
    assert data.train == (PairSource("train.csv"), PairSource("photos/", templates=("a {}",), share=0.25))
    assert data.validation == (PairSource("val.csv"),)
    assert (data.views, data.augmentation) == (4, ViewsConfig(flip=False))
    assert from_mapping(DomainData, to_mapping(data), "x") == data


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (PairSource, {"path": " "}, "path=' ' must be non-empty text"),
        (PairSource, {"label": ""}, "label='' must be non-empty text, or null"),
        (PairSource, {"text": "image"}, "text='image' must be another column than image='image'"),
        (PairSource, {"label": "image"}, "label='image' must be another column"),
        (PairSource, {"templates": ()}, r"templates=\(\) must be one or more texts with exactly one \{\}"),
        (PairSource, {"templates": ("a {}", "a {} {}")}, "templates=.* exactly one"),
        (PairSource, {"share": 0.0}, r"share=0\.0 must be above 0 and at most 1"),
        (PairSource, {"share": 1.5}, r"share=1\.5 must be"),
        (PairSource, {"limit": 0}, "limit=0 must be at least 1, or null for all"),
        (ViewsConfig, {"crop_min": 0.0}, r"crop_min=0\.0 must be above 0 and at most 1"),
        (ViewsConfig, {"colour": 1.0}, r"colour=1\.0 must be at least 0 and below 1"),
        (DomainData, {"train": ()}, r"train=\(\) must be at least one source"),
        (DomainData, {"validation_share": 0.6}, r"validation_share=0\.6 must be above 0 and at most 0\.5"),
        (DomainData, {"views": -1}, "views=-1 must be at least 0"),
    ],
)
def test_impossible_options_are_refused(cls: type, options: dict[str, object], message: str) -> None:
    required: dict[type, dict[str, object]] = {
        PairSource: {"path": "t.csv"},
        DomainData: {"train": (PairSource("t.csv"),)},
        ViewsConfig: {},
    }
    with pytest.raises(RecipeError, match=message):
        cls(**(required[cls] | options))


def test_pictures_of_one_size_are_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are not compressed all have the same size: they are told apart by their ends, then as a whole."""
    heads = {"a": b"one", "b": b"two", "c": b"one", "d": b"two"}
    for name, head in heads.items():
        middle = (b"same" if name != "c" else b"else") * 3000
        (folder / f"{name}.jpg").write_bytes(b"\xff\xd8\xff" + head + b"\0" * 5000 + middle + b"\0" * 5000)
    read: list[str] = []
    original = PictureFile.read_bytes

    def counted(self: PictureFile) -> bytes:
        read.append(self.name)
        return original(self)

    def of(*names: str) -> Any:
        return SimpleNamespace(images=[PictureFile(folder / f"{name}.jpg", f"{name}.jpg") for name in names])

    shutil.copy(folder / "a.jpg", folder / "again.jpg")
    shutil.copy(folder / "a.jpg", folder / "once-more.jpg")
    monkeypatch.setattr(PictureFile, "read_bytes", counted)
    assert shared_images(of("a", "b"), of("c")) == {}, "they begin and end alike, and are not the same"
    assert sorted(read) == ["a.jpg", "c.jpg"]
    read.clear()
    assert shared_images(of("b", "a"), of("c", "again", "once-more")) == {1: 1}, "the first of two"
    assert "b.jpg" not in read
    assert len(read) == len(set(read))


def test_another_seed_sets_others_aside(folder: Path) -> None:
    rows = [(f"{i:03}.png", f"caption {i % 2}") for i in range(12)]
    pairs = load_pairs([PairSource(str(write_table(folder / "t.csv", rows)))])
    chosen = {seed: tuple(image.name for image in split_off(pairs, 0.3, seed)[1].images) for seed in range(8)}
    assert len(set(chosen.values())) > 3
