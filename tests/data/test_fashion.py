from __future__ import annotations

import csv
import gzip
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from real_packages import needs
from trimtab.data import fashion
from trimtab.data.fashion import CLASSES, SIDE, FashionFiles, read_fashion, read_idx, write_fashion
from trimtab.data.manifests import read_class_names, read_classification, read_retrieval
from trimtab.errors import DataError

FOLDER = "usr/share/datasets/fashion-mnist"


def idx(array: np.ndarray) -> bytes:
    """The array as an idx file, before compression."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(idx(array)))
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a small package: `each` pictures per class in the training split, half of them in the test split."""
    root = tmp_path / "package" / FOLDER
    monkeypatch.setattr(fashion, "fetch_file", lambda key, pattern: root / pattern.removeprefix("*/"))

    def write(each: int = 8) -> Path:
        for prefix, count in (("train", each), ("t10k", each // 2)):
            labels = np.random.default_rng(count).permutation(np.repeat(np.arange(len(CLASSES)), count))
            # The first pixels tell which picture of which split it is.
            pixels = np.zeros((len(labels), SIDE, SIDE), np.uint8)
            pixels[:, 0, 0], pixels[:, 0, 1], pixels[:, 0, 2] = np.arange(len(labels)), labels, prefix == "train"
            save(root / f"{prefix}-images-idx3-ubyte.gz", pixels)
            save(root / f"{prefix}-labels-idx1-ubyte.gz", labels)
        return root

    return write


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


# The format


@given(shape=st.lists(st.integers(0, 6), min_size=0, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_array_of_bytes_comes_back(tmp_path: Path, shape: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    found = read_idx(save(tmp_path / "any.gz", np.asarray(array)))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, array)


@given(cut=st.integers(0, 33))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, cut: int) -> None:
    whole = idx(np.arange(18).reshape(2, 3, 3))  # 16 bytes of header, 18 of values
    path = tmp_path / "short.gz"
    path.write_bytes(gzip.compress(whole[:cut]))
    with pytest.raises(DataError, match=r"short\.gz"):
        read_idx(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"no gzip at all", "cannot be read as gzip"),
        (gzip.compress(idx(np.arange(9)))[:-9], "cannot be read as gzip"),
        (gzip.compress(b""), "starts with nothing"),
        (gzip.compress(b"\0\0\x0d\x01\0\0\0\0"), "starts with 00000d01"),  # floats
        (gzip.compress(idx(np.arange(9)) + b"x"), "has 10 values, but its header says"),
        (gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12 + b"x"), "has 1 values"),  # sizes whose product is astronomic
    ],
    ids=["no gzip", "cut short", "empty", "floats", "a byte too many", "astronomic sizes"],  # gzip writes the time
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "damaged.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        read_idx(path)
    assert "damaged.gz" in str(caught.value)
    assert "fetched again" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.gz: cannot be read"):
        read_idx(tmp_path / "absent.gz")


def test_pictures_and_labels_must_fit(package: Callable[..., Path]) -> None:
    root = package()
    labels = root / "train-labels-idx1-ubyte.gz"
    for wrong in (np.zeros(79), np.zeros((80, 1)), np.zeros(0)):
        save(labels, wrong)
        with pytest.raises(DataError, match="expected are some pictures of 28 x 28"):
            read_fashion("train")
    save(labels, np.full(80, 10))
    with pytest.raises(DataError, match="label 10, but there are 10 classes"):
        read_fashion("train")


# The subset


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(train=st.integers(10, 47), validation=st.integers(10, 30), test=st.integers(10, 40), seed=st.integers(0, 3))
def test_splits_are_balanced_and_apart(
    package: Callable[..., Path], tmp_path: Path, train: int, validation: int, test: int, seed: int
) -> None:
    package()
    files = write_fashion(tmp_path / "out", train=train, validation=validation, test=test, seed=seed)
    seen = {}
    for path, column, size in (
        (files.train, "text", train),
        (files.validation, "text", validation),
        (files.test, "label", test),
    ):
        records = rows(path)
        counts = Counter(record[column] for record in records)
        assert sum(counts.values()) == size
        assert max(counts.values()) - min(counts.values()) <= 1
        assert len(counts) == len(CLASSES)
        pixels = [255 - np.asarray(Image.open(path.parent / record["image"])) for record in records]
        for record, picture in zip(records, pixels, strict=True):
            assert record[column].removeprefix("a photo of a ") == CLASSES[picture[0, 1]]
            assert picture[0, 2] == (path != files.test)
        seen[path] = {int(picture[0, 0]) for picture in pixels}
        assert len(seen[path]) == size
    assert not seen[files.train] & seen[files.validation]


def digests(files: FashionFiles) -> dict[str, bytes]:
    folder = files.train.parent
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_seed_alone_decides(package: Callable[..., Path], tmp_path: Path) -> None:
    package()
    sizes = {"train": 30, "validation": 20, "test": 20}
    first, again, other = (
        digests(write_fashion(tmp_path / name, **sizes, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first["train.csv"] != other["train.csv"]
    assert digests(write_fashion(tmp_path / "a", **sizes)) == first  # written over, not added to


def test_manifests_are_what_the_evaluation_reads(package: Callable[..., Path], tmp_path: Path) -> None:
    package()
    files = write_fashion(tmp_path / "out", train=20, validation=10, test=10)
    names = read_class_names(files.classes)
    assert tuple(names) == CLASSES
    assert len(read_classification(files.test, names)) == 10
    pairs = read_retrieval(files.train)
    assert (len(pairs.images), len(pairs.texts)) == (20, len(CLASSES))


def test_more_than_there_are_is_refused(package: Callable[..., Path], tmp_path: Path) -> None:
    package()
    with pytest.raises(DataError, match="9 pictures of 't-shirt' are asked for, but there are 8"):
        write_fashion(tmp_path / "out", train=50, validation=40, test=10)


@needs("fashion-mnist")
def test_the_package_is_what_the_reader_expects() -> None:
    test = read_fashion("test")
    assert test.pixels.shape == (10_000, SIDE, SIDE)
    assert np.bincount(test.labels).tolist() == [1000] * len(CLASSES)
    assert CLASSES[test.labels[0]] == "ankle boot"
