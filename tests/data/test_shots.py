"""Few-shot draws: nested, the same in any order and place, and apart from validation."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.data.labelled import LabelledPictures
from trimtab.data.shards import PictureFile
from trimtab.data.shots import Shots, apart, draw_shots, take_share, warn_of_copies, warn_of_unjudged
from trimtab.errors import DataError

CLASSES = ("cat", "dog", "bird")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files, no two alike."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in [*(f"{at}.png" for at in range(100)), *(f"v{at}.png" for at in range(15))]:
        (folder / name).write_text(name)
    return folder


def pictures(
    folder: Path, counts: tuple[int, ...], *, prefix: str = "", order: np.ndarray | None = None
) -> LabelledPictures:
    labels = np.repeat(np.arange(len(counts)), counts)
    images = [PictureFile(folder / f"{prefix}{at}.png", f"{prefix}{at}.png") for at in range(len(labels))]
    order = np.arange(len(labels)) if order is None else order
    return LabelledPictures(tuple(images[at] for at in order), labels[order], CLASSES[: len(counts)])


def names(part: LabelledPictures) -> set[str]:
    return {image.name for image in part.images}


def drawn(found: Shots) -> tuple[set[str], set[str]]:
    return names(found.train), names(found.validation)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.tuples(*[st.integers(9, 14)] * 3),
    shots=st.integers(1, 4),
    more=st.integers(0, 1),
    seed=st.integers(0, 5),
    shuffle=st.integers(0, 9),
    given_validation=st.booleans(),
)
def test_draws_are_nested_balanced_apart_and_independent_of_order(
    folder: Path, counts: tuple[int, ...], shots: int, more: int, seed: int, shuffle: int, given_validation: bool
) -> None:
    data = pictures(folder, counts)
    held = pictures(folder, (5, 5, 5), prefix="v") if given_validation else None
    found = draw_shots(data, held, shots, seed)
    assert np.bincount(found.train.labels).tolist() == [shots] * 3
    assert np.bincount(found.validation.labels).tolist() == [min(shots, 4)] * 3
    assert not names(found.train) & names(found.validation)
    assert names(found.train) <= names(draw_shots(data, held, shots + more, seed).train)
    other = pictures(folder, counts, order=np.random.default_rng(shuffle).permutation(sum(counts)))
    assert drawn(draw_shots(other, held, shots, seed)) == drawn(found)


def test_another_seed_draws_other_pictures(folder: Path) -> None:
    data = pictures(folder, (50, 50))
    assert drawn(draw_shots(data, None, 4, 1)) != drawn(draw_shots(data, None, 4, 2))


def test_a_class_with_fewer_pictures_is_named_or_taken_whole(folder: Path) -> None:
    data = pictures(folder, (9, 3, 9))
    with pytest.raises(DataError, match=r"1 of 3 classes have fewer training pictures: 'dog' \(3\).*allow_fewer"):
        draw_shots(data, None, 4, 0)
    found = draw_shots(data, None, 4, 0, allow_fewer=True)
    assert np.bincount(found.train.labels).tolist() == [4, 3, 4]
    assert np.bincount(found.validation.labels, minlength=3).tolist() == [4, 0, 4]
    with pytest.raises(DataError, match=r"1 shot is asked for, but 1 of 3 classes .* 'dog' \(0\); add pictures, or"):
        draw_shots(pictures(folder, (9, 0, 9)), None, 1, 0)


def test_without_a_picture_left_validation_is_asked_for(folder: Path) -> None:
    with pytest.raises(DataError, match=r"none is left to choose by: give data\.validation"):
        draw_shots(pictures(folder, (4, 4)), None, 4, 0)
    assert len(draw_shots(pictures(folder, (4, 4)), pictures(folder, (1, 1), prefix="v"), 4, 0).validation) == 2


@settings(max_examples=40, deadline=None)
@given(counts=st.tuples(*[st.integers(1, 14)] * 3), shots=st.sampled_from([None, 1, 4, 16]), seed=st.integers(0, 5))
def test_some_of_every_class_are_reserved_for_validation(
    folder: Path, counts: tuple[int, ...], shots: int | None, seed: int
) -> None:
    data = pictures(folder, counts)
    if max(counts) == 1:
        with pytest.raises(DataError, match="none is left to choose by"):
            draw_shots(data, None, shots, seed, allow_fewer=True, reserve=True)
        return
    found = draw_shots(data, None, shots, seed, allow_fewer=True, reserve=True)
    assert not names(found.train) & names(found.validation)
    learnt, held = (np.bincount(part.labels, minlength=3) for part in (found.train, found.validation))
    for count, mine, theirs in zip(counts, learnt, held, strict=True):
        assert 1 <= mine <= (shots or count)
        assert min(1, count // 2, shots or 4) <= theirs <= min(shots or 4, 4)
        assert shots in (1, 4) or count < 8 or theirs >= 2
    plenty = pictures(folder, (9, 9, 9))
    same = draw_shots(plenty, None, 4, seed, reserve=True)  # where there is enough, nothing changes
    assert drawn(same) == drawn(draw_shots(plenty, None, 4, seed))


@pytest.mark.parametrize("shots", [None, 2])
def test_a_picture_under_two_names_is_not_on_both_sides(tmp_path: Path, shots: int | None) -> None:
    contents = ["a", "b", "b", "c", "c", "d", "a"]  # the last has another class than its copy
    for at, content in enumerate(contents):
        (tmp_path / f"{at}.png").write_text(content)
    data = pictures(tmp_path, (4, 3))
    left_out = 0
    for seed in range(20):
        found = draw_shots(data, None, shots, seed)
        sides = [{image.path.read_text() for image in part.images} for part in (found.train, found.validation)]
        assert not sides[0] & sides[1]
        left_out += 7 - len(found.train) - len(found.validation)
    assert left_out
    (tmp_path / "3.png").write_text("b")
    for at in (4, 5, 6):
        (tmp_path / f"{at}.png").write_text("c")
    with pytest.raises(DataError, match=r"copies aside, so none is left.*give data\.validation"):
        draw_shots(data.take(np.array([1, 2, 3, 4, 5, 6])), None, shots, 0)


def test_all_pictures_and_shares_of_them(folder: Path) -> None:
    data = pictures(folder, (8, 16))
    assert len(draw_shots(data, pictures(folder, (2, 2), prefix="v"), None, 0).train) == 24
    whole = draw_shots(data, None, None, 0)
    assert (len(whole.train), len(whole.validation)) == (18, 6)
    small = draw_shots(pictures(folder, (5, 40, 3)), None, None, 0)  # of a small class most is learnt from
    assert np.bincount(small.train.labels).tolist() == [4, 36, 2]
    assert np.bincount(small.validation.labels).tolist() == [1, 4, 1]
    shares = [take_share(data, share, 0) for share in (0.01, 0.125, 0.5, 1.0)]
    assert [np.bincount(one.labels).tolist() for one in shares] == [[1, 1], [1, 2], [4, 8], [8, 16]]
    assert all(names(small) <= names(large) for small, large in itertools.pairwise(shares))
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="share"):
            take_share(data, share, 0)
    with pytest.raises(ValueError, match="shots=0"):
        draw_shots(data, None, 0, 0)


def test_pictures_of_the_test_set_are_left_out_of_training(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, test = pictures(folder, (3, 3)), pictures(folder, (2, 0))
    kept = apart(data, test, name="training", where="test")
    assert names(kept) == {"2.png", "3.png", "4.png", "5.png"}
    assert "2 of 6 training pictures are among those of test too" in caplog.text
    assert apart(kept, test, name="training", where="test").images == kept.images
    with pytest.raises(DataError, match=r"all 2 training pictures .*0\.png: none is left.* data\.train or"):
        apart(test, data, name="training", where="test")
    nothing = test.take(np.zeros(0, np.int64))
    assert len(apart(nothing, data, name="validation", where="test")) == 0


def test_the_place_of_the_pictures_does_not_matter(tmp_path: Path) -> None:
    def lying_in(folder: Path, prefix: str) -> LabelledPictures:
        images = tuple(PictureFile(folder / f"{at}.bin", f"{prefix}{at}.bin") for at in range(12))
        return LabelledPictures(images, np.arange(12) % 2, CLASSES[:2])

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    for at in range(12):
        (first / f"{at}.bin").write_bytes(b"picture %d" % at)
    shutil.copytree(first, second)
    found = [
        {image.path.name for image in draw_shots(lying_in(folder, prefix), None, 2, 7).train.images}
        for folder, prefix in ((first, ""), (second, "below/"))
    ]
    assert found[0] == found[1]
    (second / "3.bin").unlink()
    with pytest.raises(DataError, match=r"3\.bin: cannot be read any more"):
        draw_shots(lying_in(second, "x"), None, 2, 7)


def test_copies_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for at, content in enumerate(["a", "b", "b", "c", "a", "d"]):
        (tmp_path / f"{at}.png").write_text(content)
    warn_of_copies(pictures(tmp_path, (3, 3)).take(np.array([0, 1, 3, 5])), name="training")
    assert not caplog.records
    warn_of_copies(pictures(tmp_path, (3, 3)), name="training")
    torn, again = (record.getMessage() for record in caplog.records)
    assert "1 of 6 training pictures are there under another class too" in torn
    assert "0.png as 'cat' and " in torn
    assert "4.png as 'dog'" in torn
    assert "1 of 6 training pictures are copies of others of their class" in again


def test_only_pictures_of_equal_size_are_read_for_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(6):
        (tmp_path / f"{at}.png").write_text("x" * (at or 1))
    read = []
    monkeypatch.setattr(PictureFile, "digest", lambda self: read.append(self.path.name) or self.path.name)
    warn_of_copies(pictures(tmp_path, (3, 3)), name="test")
    assert read == ["0.png", "1.png"]


def test_classes_that_nothing_judges_are_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = pictures(folder, (4, 4))
    warn_of_unjudged(Shots(data, data))
    assert not caplog.records
    warn_of_unjudged(Shots(data, data.take(np.array([0]))))
    assert "1 of 2 classes have no validation picture, 'dog' for one" in caplog.text
