"""Fashion-MNIST (Xiao et al., arXiv 1708.07747) as a small domain: pictures, captions and class names.

The pictures are 28 x 28 pixels, grey on black, and ten kinds of clothes, shoes and bags. They come in a package and
are written as PNG files with ordinary manifests, so that the domain link reads them as it reads a user's own. Each
tower's image processor enlarges them as it does every picture.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from trimtab.data.packages import fetch_file
from trimtab.data.templates import fill
from trimtab.errors import DataError
from trimtab.files import atomic_path, write_text

CLASSES = (
    *("t-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
"""Everyday names of the classes, in the order of the labels."""

CHINESE = dict(
    zip(CLASSES, ("T恤", "裤子", "套头毛衣", "连衣裙", "外套", "凉鞋", "衬衫", "运动鞋", "包", "短靴"), strict=True)
)
"""The same names in Chinese, by us."""

CAPTION = "a photo of a {}"
SIDE = 28
_BYTE = 8  # code of unsigned bytes in an idx file
_REMEDY = "remove the folder of this package from the cache, and it is fetched again"


@dataclass(frozen=True, eq=False)
class FashionPictures:
    """One split of the package: pixels (N, 28, 28) uint8, 0 is the background; labels (N,) below 10."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class FashionFiles:
    """Manifests with the columns image, text and label (training, validation) or image and label (test)."""

    train: Path
    validation: Path
    test: Path
    classes: Path


def read_fashion(split: Literal["train", "test"]) -> FashionPictures:
    """All pictures of one of the package's own splits.

    Raises:
        DataError: as `fetch` and `read_idx`, or pictures and labels do not fit each other.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    images, labels = (
        fetch_file("fashion-mnist", f"*/{prefix}-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1")
    )
    pixels, kinds = read_idx(images), read_idx(labels)
    if pixels.shape != (len(kinds), SIDE, SIDE) or kinds.shape != (len(pixels),) or not len(kinds):
        raise DataError(
            f"{images} has the shape {pixels.shape} and {labels.name} {kinds.shape}, but expected are some pictures of "
            f"{SIDE} x {SIDE} pixels and a label for each: {_REMEDY}"
        )
    if kinds.max() >= len(CLASSES):
        raise DataError(f"{labels} has label {kinds.max()}, but there are {len(CLASSES)} classes: {_REMEDY}")
    return FashionPictures(pixels, kinds)


def read_idx(path: str | Path) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes: two zeros, a type, the number of axes, their sizes, the values.

    Raises:
        DataError: the file is missing, is no such file, or is shorter or longer than it says.
    """
    path = Path(path)
    try:
        with gzip.open(path) as stream:
            data = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as gzip ({error}): {_REMEDY}") from error
    if len(data) < 4 or data[:3] != bytes([0, 0, _BYTE]):
        raise DataError(f"{path}: starts with {data[:4].hex() or 'nothing'}, no idx file of bytes: {_REMEDY}")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise DataError(f"{path}: ends within its header of {start} bytes: {_REMEDY}")
    shape = tuple(np.frombuffer(data, ">u4", count=data[3], offset=4).tolist())
    if len(data) - start != math.prod(shape):
        raise DataError(f"{path}: has {len(data) - start} values, but its header says {shape}: {_REMEDY}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def write_fashion(
    folder: str | Path, *, train: int = 1500, validation: int = 300, test: int = 1000, seed: int = 0
) -> FashionFiles:
    """Write a subset as PNG files with manifests; the same arguments write the same bytes.

    Every class has the same number of pictures, or one more than another. Training and validation pictures are
    different ones of the package's training split, test pictures are from its test split.

    Args:
        folder: gets `train/`, `validation/`, `test/`, a manifest of each and `classes.txt`.
        train, validation, test: numbers of pictures.

    Raises:
        DataError: as `read_fashion`, or a class has fewer pictures than asked for.
    """
    folder = Path(folder)
    files = FashionFiles(*(folder / name for name in ("train.csv", "validation.csv", "test.csv", "classes.txt")))
    seen, unseen = read_fashion("train"), read_fashion("test")
    for_training, for_validation = _choose(seen.labels, (train, validation), seed)
    (for_test,) = _choose(unseen.labels, (test,), seed)
    for name, pictures, chosen in (
        ("train", seen, for_training),
        ("validation", seen, for_validation),
        ("test", unseen, for_test),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        images = [f"{name}/{number:05d}.png" for number in chosen]
        for image, number in zip(images, chosen, strict=True):
            # Inverted, dark on white as photos of goods are: the base finds the right class of 28% of 400 training
            # pictures, and of 18% as they are.
            Image.fromarray(255 - pictures.pixels[number]).save(folder / image)
        names = [CLASSES[label] for label in pictures.labels[chosen]]
        if name == "test":
            _write_manifest(files.test, ("image", "label"), zip(images, names, strict=True))
        else:  # for the domain link and for the prompt link
            captions = [fill(CAPTION, one) for one in names]
            rows = zip(images, captions, names, strict=True)
            _write_manifest(folder / f"{name}.csv", ("image", "text", "label"), rows)
    write_text(files.classes, "".join(f"{name}\n" for name in CLASSES))
    return files


def _choose(labels: np.ndarray, sizes: Sequence[int], seed: int) -> list[list[int]]:
    """Positions of disjoint subsets of the given sizes, every class alike, each in the order of the positions."""
    subsets: list[list[int]] = [[] for _ in sizes]
    for label, name in enumerate(CLASSES):
        places = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label)).tolist()
        counts = [size // len(CLASSES) + (label < size % len(CLASSES)) for size in sizes]
        if sum(counts) > len(places):
            raise DataError(
                f"{sum(counts)} pictures of {name!r} are asked for, but there are {len(places)}: ask for fewer"
            )
        for subset, count in zip(subsets, counts, strict=True):
            subset += places[:count]
            del places[:count]
    return [sorted(subset) for subset in subsets]


def _write_manifest(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(rows)
