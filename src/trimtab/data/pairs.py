"""Pictures with their captions, ready for contrastive training: read, checked, thinned, split.

A picture that is missing or cannot be decoded costs its own pairs, never the run: it is counted and listed. What
would make the run worthless is refused at once: more than half of the pairs unusable, or a single caption.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trimtab.config import PairSource
from trimtab.data.captions import read_entries
from trimtab.data.parallel import clean_text, says_nothing
from trimtab.data.shards import PictureFile, explain_vanished, find_damaged
from trimtab.errors import DataError
from trimtab.files import digest_of

logger = logging.getLogger(__name__)

_MOST_UNUSABLE = 0.5
_EMOJI = frozenset("\u203c\u2049\u3030\u20e3")  # two pairs of marks, a wavy dash, the frame of a key
_SHARE_STREAM, _SPLIT_STREAM = 1, 2  # so that a split is independent of the share that was taken before


class Dropped(NamedTuple):
    """A pair that was read and cannot be used, or what was found in its place."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True)
class PairCounts:
    """What became of the pairs read; the fields add up to their number.

    Attributes:
        empty: rows without caption.
        missing: without picture, or with one that is not there.
        unreadable: whose picture cannot be decoded.
        duplicate: seen before, with the same picture and caption.
        set_aside: left out by `share`, `limit`, a split, or since validation has the picture.
    """

    kept: int = 0
    empty: int = 0
    missing: int = 0
    unreadable: int = 0
    duplicate: int = 0
    set_aside: int = 0

    def as_dict(self) -> dict[str, int]:
        """For reports."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, eq=False)
class ImageTextPairs:
    """Pictures and captions, each once, and which belong together.

    Attributes:
        images: N pictures, in the order of the sources.
        captions: M texts, in the order of the sources.
        image_index: (P,) int64, the picture of each pair.
        caption_index: (P,) int64, its caption; several pairs may share one.
        files: tables, folders and shards that pairs came from.
        origins: (P, 2) int64, of each pair its place in `files` and its row there; see `origin`.
        counts: what became of all pairs that were read.
        dropped: the unusable ones.
    """

    images: tuple[PictureFile, ...]
    captions: tuple[str, ...]
    image_index: np.ndarray
    caption_index: np.ndarray
    files: tuple[str, ...]
    origins: np.ndarray
    counts: PairCounts = PairCounts()
    dropped: tuple[Dropped, ...] = ()

    def __len__(self) -> int:
        return len(self.image_index)

    def origin(self, pair: int) -> tuple[str, int]:
        """File and row that a pair came from; in a folder or shard, the position counted from 1."""
        file, row = self.origins[pair].tolist()
        return self.files[file], row

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the pictures' names and content, the captions, and which belong together.

        Of each picture it takes what `PictureFile.digest` does. Folders, times and what was dropped do not count:
        the digest stays when the data are moved or copied.
        """
        with explain_vanished():
            parts = [part for image in self.images for part in (image.name, image.digest())]
        indices = (np.ascontiguousarray(index, "<i8").tobytes() for index in (self.image_index, self.caption_index))
        return digest_of(str(len(self.images)), *parts, *self.captions, *indices)

    @functools.cached_property
    def caption_sets(self) -> np.ndarray:
        """(N,) int64, equal where pictures have the same captions, as those of one class have; counted from 0."""
        sets: list[set[int]] = [set() for _ in self.images]
        for image, caption in zip(self.image_index.tolist(), self.caption_index.tolist()):
            sets[image].add(caption)
        known: dict[frozenset[int], int] = {}
        return np.array([known.setdefault(frozenset(some), len(known)) for some in sets], np.int64)

    def belong(self, images: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Which of some pictures and captions are pairs anywhere in the data: such are no negatives of each other.

        Args:
            images: (A,) positions in `images`.
            captions: (B,) positions in `captions`.

        Returns:
            (A, B) bool.
        """
        wanted = np.asarray(images)[:, None] * len(self.captions) + np.asarray(captions)
        places = np.searchsorted(self._pair_keys, wanted).clip(max=len(self) - 1)
        return self._pair_keys[places] == wanted

    @functools.cached_property
    def _pair_keys(self) -> np.ndarray:
        return np.sort(self.image_index * len(self.captions) + self.caption_index)

    def merge_captions(self, first: Sequence[int], where: str, remedy: str) -> ImageTextPairs:
        """The pairs with some captions taken for one, so that these are no negatives of each other.

        Args:
            first: (M,) of each caption the number of the one that stands for it.
            where, remedy: for a message.

        Raises:
            DataError: fewer than 2 different captions would be left.
        """
        kept, caption = np.unique(np.asarray(first, np.int64), return_inverse=True)
        if len(kept) == len(self.captions):
            return self
        captions = tuple(self.captions[at] for at in kept.tolist())
        merged = dataclasses.replace(self, captions=captions, caption_index=caption[self.caption_index])
        _refuse_trivial(merged, where, remedy)
        return merged

    def take_images(self, chosen: np.ndarray) -> ImageTextPairs:
        """The pairs of some pictures, in order.

        Args:
            chosen: (N,) bool.
        """
        pairs = chosen[self.image_index]
        captions, caption_index = np.unique(self.caption_index[pairs], return_inverse=True)
        gone = len(self) - int(pairs.sum())
        counts = dataclasses.replace(self.counts, kept=len(self) - gone, set_aside=self.counts.set_aside + gone)
        return dataclasses.replace(
            self,
            images=tuple(self.images[i] for i in np.flatnonzero(chosen)),
            captions=tuple(self.captions[i] for i in captions),
            image_index=(np.cumsum(chosen) - 1)[self.image_index[pairs]],
            caption_index=caption_index,
            origins=self.origins[pairs],
            counts=counts,
        )


class _Pair(NamedTuple):
    picture: PictureFile
    caption: str
    file: str
    row: int


def load_pairs(
    sources: Sequence[PairSource],
    seed: int = 0,
    *,
    notes: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageTextPairs:
    """Read all sources, decode every picture once, keep what can be used.

    Args:
        seed: with which the sources' `share` and `limit` choose.
        notes: folder in which to note which pictures cannot be decoded, so that the next run on the same files
            need not decode them all again; None always decodes.
        progress: told how many pictures of how many were decoded, of one source after the other.

    Raises:
        DataError: a source cannot be used (file, row and remedy are named); more than half of its pairs lack
            caption or picture; fewer than 2 different captions or pictures are left.
        RecipeError: options that do not go with a source.
    """
    counts: Counter[str] = Counter()
    dropped: list[Dropped] = []
    images: dict[PictureFile, int] = {}
    captions: dict[str, int] = {}
    files: dict[str, int] = {}
    origins: dict[tuple[int, int], tuple[int, int]] = {}
    for source in sources:
        pairs, unusable, source_counts = _load(source, seed, notes, progress)
        dropped += unusable
        counts.update(source_counts)
        for pair in pairs:
            # The first picture of equal ones stays; its name is that of its own source.
            key = (images.setdefault(pair.picture, len(images)), captions.setdefault(pair.caption, len(captions)))
            counts["duplicate" if key in origins else "kept"] += 1
            origins.setdefault(key, (files.setdefault(pair.file, len(files)), pair.row))
    index = np.array(list(origins), np.int64).reshape(-1, 2)
    result = ImageTextPairs(
        tuple(images),
        tuple(captions),
        index[:, 0].copy(),
        index[:, 1].copy(),
        tuple(files),
        np.array(list(origins.values()), np.int64).reshape(-1, 2),
        PairCounts(**counts),
        tuple(dropped),
    )
    _refuse_trivial(result, ", ".join(source.path for source in sources) or "no source given", "give more data")
    return result


def split_off(pairs: ImageTextPairs, share: float, seed: int) -> tuple[ImageTextPairs, ImageTextPairs]:
    """Set a share of the pictures aside for validation, at least 2, the same share of every caption's.

    A picture goes with all its captions to one side; a caption may be on both.

    Returns:
        (training, validation), each in the order of `pairs`.

    Raises:
        DataError: fewer than 2 different captions or pictures would be left on a side.
    """
    places = _places(pairs.caption_sets.tolist(), np.random.default_rng([seed, _SPLIT_STREAM]))
    chosen = places < share
    if chosen.sum() < 2:
        chosen[np.argsort(places, kind="stable")[:2]] = True
    train, validation = pairs.take_images(~chosen), pairs.take_images(chosen)
    for part, name in ((train, "training"), (validation, "validation")):
        remedy = "change validation_share, or give validation data of its own"
        _refuse_trivial(part, f"{name} after a split of {len(pairs.images)} pictures at {share:g}", remedy)
    return train, validation


@explain_vanished()
def shared_images(train: ImageTextPairs, validation: ImageTextPairs) -> dict[int, int]:
    """Training pictures that validation has too: the same file, or another one with the same bytes.

    Returns:
        Positions in `train.images`, and for each a position in `validation.images`.

    Raises:
        DataError: a picture is gone or cannot be read any more.
    """
    same = {image: position for position, image in enumerate(validation.images)}
    shared = {i: same[image] for i, image in enumerate(train.images) if image in same}
    # Of very many pictures many have the same size; few of these begin and end alike, and they alone are read whole.
    by_size: dict[int, list[int]] = {}
    for position, image in enumerate(validation.images):
        by_size.setdefault(image.size(), []).append(position)
    alike: dict[int, dict[str, list[int]]] = {}  # size -> digest of a picture's ends -> validation
    whole: dict[str, dict[str, int]] = {}  # digest of the ends -> of all bytes -> validation, the first
    for position, image in enumerate(train.images):
        if position in shared or (size := image.size()) not in by_size:
            continue
        if size not in alike:
            alike[size] = {}
            for other in by_size[size]:
                alike[size].setdefault(validation.images[other].digest(), []).append(other)
        ends = image.digest()
        candidates = alike[size].get(ends, [])
        if candidates and ends not in whole:
            whole[ends] = {}
            for other in candidates:
                whole[ends].setdefault(digest_of(validation.images[other].read_bytes()), other)
        if candidates and (found := whole[ends].get(digest_of(image.read_bytes()))) is not None:
            shared[position] = found
    return dict(sorted(shared.items()))


def keep_apart(train: ImageTextPairs, validation: ImageTextPairs, *, remove: bool) -> tuple[ImageTextPairs, int]:
    """Warn of training pictures that validation has too, and leave them out of training if asked to.

    Returns:
        Training pairs, and the number of pictures that both sides have (or had).

    Raises:
        DataError: fewer than 2 different captions or pictures would be left for training.
    """
    shared = shared_images(train, validation)
    if not shared:
        return train, 0
    first, other = next(iter(shared.items()))
    logger.warning(
        "%d of %d training pictures are in validation too, for example %s (there: %s): %s",
        len(shared), len(train.images), train.images[first], validation.images[other],
        "they are left out of training" if remove else "validation looks better than it is",
    )  # fmt: skip
    if remove:
        keep = np.ones(len(train.images), bool)
        keep[list(shared)] = False
        train = train.take_images(keep)
        _refuse_trivial(train, "training without the pictures of validation", "give other pictures to validation")
    return train, len(shared)


def _load(
    source: PairSource, seed: int, notes: Path | None, progress: Callable[[int, int], None] | None
) -> tuple[list[_Pair], list[Dropped], dict[str, int]]:
    """Usable pairs of a source, the unusable ones, and counts without `kept` and `duplicate`."""
    dropped: list[Dropped] = []
    counts = dict.fromkeys(("empty", "missing", "unreadable", "set_aside"), 0)

    def drop(kind: str, file: str, row: int, reason: str) -> None:
        counts[kind] += 1
        dropped.append(Dropped(file, row, reason))

    pairs = []
    read = 0
    for entry in read_entries(source):
        # Lists of captions are often filled up with nulls: a row lacks a caption only if it has none at all.
        captions = [caption for text in entry.texts if not _names_nothing(caption := clean_text(text))]
        for caption in captions or [""]:
            read += 1
            if isinstance(entry.picture, str):
                drop("missing", entry.file, entry.row, entry.picture)
            elif not caption:
                written = " ".join(entry.texts)
                reason = "is empty" if says_nothing(written) else f"{written!r:.80} has no letter, digit or symbol"
                drop("empty", entry.file, entry.row, entry.problem or f"the caption {reason}")
            else:
                pairs.append(_Pair(entry.picture, caption, entry.file, entry.row))
    chosen = _choose(pairs, source.share, source.limit, seed)
    counts["set_aside"] = sum(pair.picture not in chosen for pair in pairs)
    absent = {picture for picture in chosen if not picture.exists()}
    damaged = find_damaged([picture for picture in chosen if picture not in absent], notes, progress)
    usable = []
    for pair in pairs:
        if pair.picture in absent:
            drop("missing", pair.file, pair.row, f"{pair.picture}: no such file")
        elif pair.picture in damaged:
            drop("unreadable", pair.file, pair.row, f"{pair.picture}: {damaged[pair.picture]}")
        elif pair.picture in chosen:
            usable.append(pair)
    if dropped:
        tried = sum(pair.picture in chosen for pair in pairs)
        # Whether pictures that were not chosen can be read is not known: take it that as many of them can.
        stop = len(pairs) * len(usable) < (1 - _MOST_UNUSABLE) * read * max(1, tried)
        _report(source, dropped, counts, read, stop=stop)
    return usable, dropped, counts


def _names_nothing(caption: str) -> bool:
    """Whether a caption is punctuation at most; emoji are symbols, the few that Unicode calls punctuation too."""
    return not any(unicodedata.category(char)[0] in "LNS" or char in _EMOJI for char in caption)


def _report(source: PairSource, dropped: list[Dropped], counts: dict[str, int], read: int, *, stop: bool) -> None:
    kinds = ", ".join(f"{counts[kind]} {text}" for kind, text in _KINDS.items() if counts[kind])
    some = "; ".join(f"{file}, row {row}: {reason}" for file, row, reason in dropped[:5])
    summary = f"{source.path}: {len(dropped)} of {read} pairs cannot be used ({kinds}): {some}"
    if stop:
        raise DataError(
            f"{summary}. More than half is too much to go on: check the columns image, text and label, the root, and "
            "the files"
        )
    logger.warning("%s%s", summary, f"; and {len(dropped) - 5} more" if len(dropped) > 5 else "")


_KINDS = {"empty": "without caption", "missing": "without picture", "unreadable": "with a picture that cannot be read"}


def _choose(pairs: list[_Pair], share: float, limit: int | None, seed: int) -> dict[PictureFile, None]:
    """The pictures that `share` and `limit` leave, every caption alike; fewer are always among more."""
    texts: dict[PictureFile, set[str]] = {}
    for pair in pairs:
        texts.setdefault(pair.picture, set()).add(pair.caption)
    if share >= 1 and (limit is None or limit >= len(texts)):
        return dict.fromkeys(texts)
    places = _places([frozenset(some) for some in texts.values()], np.random.default_rng([seed, _SHARE_STREAM]))
    order = np.argsort(places, kind="stable")
    count = max(1, int((places < share).sum()))
    chosen = set(order[: min(count, limit or count)].tolist())
    return dict.fromkeys(picture for position, picture in enumerate(texts) if position in chosen)


def _places(strata: Sequence[Hashable], rng: np.random.Generator) -> np.ndarray:
    """Numbers (N,) in [0, 1): the items below s are a share s of every stratum, give or take less than one item.

    Within a stratum of n the numbers are 1/n apart, in random order. Where they begin is spread evenly over the
    strata, so that of many strata of one item, too, a share s is below s.
    """
    known: dict[Hashable, int] = {}
    codes = np.array([known.setdefault(stratum, len(known)) for stratum in strata], np.int64)
    sizes = np.bincount(codes, minlength=len(known))
    shuffled = rng.permutation(len(codes))
    order = shuffled[np.argsort(codes[shuffled], kind="stable")]
    ranks = np.empty(len(codes), np.int64)
    ranks[order] = np.arange(len(codes)) - (np.cumsum(sizes) - sizes)[codes[order]]
    begin = (rng.permutation(len(sizes)) + rng.random(len(sizes))) / max(1, len(sizes))
    return (ranks + begin[codes]) / sizes[codes]


def _refuse_trivial(pairs: ImageTextPairs, where: str, remedy: str) -> None:
    if len(pairs.images) < 2:
        problem = f"there are {len(pairs.images)} usable pictures"
    elif pairs.caption_sets.max() == 0:
        problem = f"all {len(pairs.images)} pictures have the same caption {pairs.captions[0]!r:.80}"
    else:
        return
    raise DataError(f"{where}: contrastive training tells pairs apart, and {problem}: {remedy}")
