"""Pictures with class names.

Read strictly: a label that names no class, a class without a picture and numbers that are off by one are refused
before anything is trained. A picture that cannot be decoded is left out, counted and listed.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.config import LabelSource, PairSource
from trimtab.data.captions import Entry, fold_name, read_entries
from trimtab.data.manifests import close_match, index_classes, read_class_names
from trimtab.data.pairs import Dropped
from trimtab.data.parallel import clean_text
from trimtab.data.shards import PictureFile, explain_vanished, find_damaged
from trimtab.errors import DataError
from trimtab.files import digest_of

logger = logging.getLogger(__name__)

_MOST_UNUSABLE = 0.5
_NAMED = 5


@dataclass(frozen=True, eq=False)
class LabelledPictures:
    """Pictures and their classes.

    Attributes:
        images: N pictures, each once.
        labels: (N,) int64 class of each.
        classes: C names.
        dropped: what was read and cannot be used.
    """

    images: tuple[PictureFile, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    dropped: tuple[Dropped, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def counts(self) -> np.ndarray:
        """(C,) pictures of each class."""
        return np.bincount(self.labels, minlength=len(self.classes))

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the pictures' names and content, labels and class names; folders do not count."""
        with explain_vanished():
            parts = [part for image in self.images for part in (image.name, image.digest())]
        return digest_of(str(len(self)), *parts, *self.classes, np.ascontiguousarray(self.labels, "<i8").tobytes())

    def take(self, chosen: np.ndarray) -> LabelledPictures:
        """Some of the pictures, by position (or a mask), with the same classes."""
        positions = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        images = tuple(self.images[at] for at in positions)
        return dataclasses.replace(self, images=images, labels=self.labels[positions])


def load_labelled(
    sources: Sequence[LabelSource],
    classes: Sequence[str] | str | Path | None = None,
    *,
    notes: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    every_class: bool = True,
) -> LabelledPictures:
    """Read all sources, decode every picture once, keep what can be used.

    Args:
        classes: names in order, or the file that holds them; None takes those found, sorted.
        notes, progress: see `trimtab.data.pairs.load_pairs`.
        every_class: refuse if a class has no picture.

    Raises:
        DataError: a source cannot be used; a picture without label or with one that is no class; classes of the
            same name; a picture with two labels; a class without picture; fewer than 2 classes; more than half of the
            pictures unusable.
    """
    where = ", ".join(source.path for source in sources)
    entries: list[Entry] = []
    dropped: list[Dropped] = []
    for one in sources:
        # Class names themselves are the texts. `text` is not read, but must be another column than `image`.
        source = PairSource(one.path, one.image, text=one.label, label=one.label, root=one.root, templates=("{}",))
        for entry in read_entries(source):
            if isinstance(entry.picture, str) and not entry.texts:
                dropped.append(Dropped(entry.file, entry.row, entry.picture))
            else:
                entries.append(entry)
    read = len(entries) + len(dropped)
    if not entries:
        _report(where, dropped, read)
    names = [_label(entry) for entry in entries]
    listed = isinstance(classes, (str, Path))
    known = (
        read_class_names(classes) if isinstance(classes, (str, Path)) else None if classes is None else list(classes)
    )
    if known is None:
        known = _found(entries, names)
    origin = str(classes) if listed else where if classes is None else "training"
    if classes is None and all(map(_is_number, known)):
        logger.warning(
            "%s: all labels are numbers, %s, and are taken as the names of the classes, which methods that read texts "
            "can make nothing of: give the file with the names (data.classes)", where, _some(known),
        )  # fmt: skip
    if len(known) < 2:
        raise DataError(f"{origin}: there is only the class {known[0]!r}, and telling classes apart takes two")
    numbers = _numbers(entries, names, known, origin)

    labels: dict[PictureFile, int] = {}
    places: dict[PictureFile, Entry] = {}
    for entry, label in zip(entries, numbers, strict=True):
        picture = entry.picture
        if isinstance(picture, str) or not picture.exists():
            reason = picture if isinstance(picture, str) else f"{picture}: no such file"
            dropped.append(Dropped(entry.file, entry.row, reason))
        elif labels.setdefault(picture, label) != label:
            first = places[picture]
            raise DataError(
                f"{entry.file}, row {entry.row}: {picture} is of class {known[label]!r} here and "
                f"{known[labels[picture]]!r} in {first.file}, row {first.row}: a picture has one class; remove a row"
            )
        else:
            places.setdefault(picture, entry)
    for picture, reason in find_damaged(list(labels), notes, progress).items():
        dropped.append(Dropped(places[picture].file, places[picture].row, f"{picture}: {reason}"))
        del labels[picture]
    _report(where, dropped, read)
    found = LabelledPictures(
        tuple(labels), np.fromiter(labels.values(), np.int64, len(labels)), tuple(known), tuple(dropped)
    )
    lacking = [known[at] for at in np.flatnonzero(found.counts == 0)]
    if lacking and every_class:
        raise DataError(
            f"{where}: {len(lacking)} of {len(known)} classes have no picture: {_some(lacking)}. Add pictures of them, "
            f"or take their names out of {classes if listed else 'the classes'}"
        )
    return found


def _label(entry: Entry) -> str:
    name = clean_text(entry.texts[0]) if entry.texts else ""
    if not name:
        raise DataError(f"{entry.file}, row {entry.row}: the picture has no label: give one, or remove the row")
    if len(entry.texts) > 1:
        raise DataError(f"{entry.file}, row {entry.row}: {len(entry.texts)} labels: a picture has one class")
    return name


def _found(entries: Sequence[Entry], names: Sequence[str]) -> list[str]:
    """The class names there are, sorted; what a folder is called gives way to a label that only writes it otherwise."""
    folders = {file for file in {entry.file for entry in entries} if Path(file).is_dir()}
    written = {name for entry, name in zip(entries, names, strict=True) if entry.file not in folders}
    place = _Places(written)
    return sorted(written | {name for name in set(names) if place.get(name) is None})


class _Places:
    """Positions of class names; a name that only one of them equals, case, hyphens and underscores aside, is that one.

    A folder's name is tidied for captions, so a list or a table may write it in another way.
    """

    def __init__(self, classes: Iterable[str]) -> None:
        self._exact = index_classes([clean_text(name) for name in classes])
        self._folded: dict[str, list[int]] = {}
        for name, at in self._exact.items():
            self._folded.setdefault(fold_name(name), []).append(at)

    def get(self, name: str) -> int | None:
        if name in self._exact:
            return self._exact[name]
        near = self._folded.get(fold_name(name), [])
        return near[0] if len(near) == 1 else None


def _numbers(entries: Sequence[Entry], names: Sequence[str], classes: Sequence[str], origin: str) -> list[int]:
    """The class of each entry, from its name, or from its number where all labels are numbers and none is a name."""
    places = _Places(classes)
    place = {name: places.get(name) for name in set(names)}
    unknown = [at for at, name in enumerate(names) if place[name] is None]
    if not unknown:
        return [at for name in names if (at := place[name]) is not None]
    if len(unknown) == len(names) and all(map(_is_number, names)):
        numbers = [int(name) for name in names]
        if max(numbers) >= len(classes):
            last = int(np.argmax(numbers))
            hint = (
                "they are off by one: count from 0, or write names"
                if min(numbers) >= 1 and max(numbers) == len(classes)
                else "mend the labels, or add the classes"
            )
            raise DataError(
                f"{entries[last].file}, row {entries[last].row}: label {numbers[last]}, but the {len(classes)} classes "
                f"of {origin} have the numbers 0 to {len(classes) - 1}; the labels run from {min(numbers)} to "
                f"{max(numbers)}: {hint}"
            )
        return numbers
    shown = []
    for name, count in Counter(names[at] for at in unknown).most_common(_NAMED):
        entry = entries[names.index(name)]
        near = close_match(name, classes)
        meant = f", do you mean {near!r}?" if near else ""
        shown.append(f"{name!r} ({entry.file}, row {entry.row}; {count} pictures{meant})")
    more = len({names[at] for at in unknown}) - len(shown)
    raise DataError(
        f"labels that are not among the {len(classes)} classes of {origin}: {'; '.join(shown)}"
        f"{f'; and {more} more' if more else ''}. Mend the labels or add them to the classes"
    )


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _report(where: str, dropped: Sequence[Dropped], read: int) -> None:
    if not dropped:
        return
    some = "; ".join(f"{one.file}, row {one.row}: {one.reason}" for one in dropped[:_NAMED])
    summary = f"{where}: {len(dropped)} of {read} pictures cannot be used: {some}"
    if len(dropped) > _MOST_UNUSABLE * read:
        raise DataError(
            f"{summary}. More than half is too much to go on: check the columns image and label, the root and the files"
        )
    logger.warning("%s%s", summary, f"; and {len(dropped) - _NAMED} more" if len(dropped) > _NAMED else "")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
