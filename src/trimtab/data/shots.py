"""Few-shot draws: which pictures of each class a method may learn from, the same for every method.

A draw depends on the seed and on the pictures' bytes alone: not on the order of a table, nor on where it lies. Fewer
shots lie within more. Validation has min(shots, 4) pictures per class, as in CoOp's protocol (Zhou et al.,
arXiv 2109.01134).
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.data.labelled import LabelledPictures
from trimtab.data.shards import PictureFile, explain_vanished
from trimtab.errors import DataError
from trimtab.files import digest_of

logger = logging.getLogger(__name__)

VALIDATION_SHOTS = 4
_SHOWN = 5
_KEYS = {"training": "train"}  # sets that recipes call otherwise


@dataclass(frozen=True, eq=False)
class Shots:
    """What is learnt from, and what choices are made on; no picture is in both."""

    train: LabelledPictures
    validation: LabelledPictures


def draw_shots(
    train: LabelledPictures,
    validation: LabelledPictures | None,
    shots: int | None,
    seed: int,
    *,
    allow_fewer: bool = False,
    reserve: bool = False,
) -> Shots:
    """Draw `shots` pictures of each class, and min(shots, 4) for validation.

    Validation comes from the validation pictures where there are some, else from training pictures that are not
    learnt from. A class may have fewer validation pictures than that, or none.

    Args:
        shots: per class; None takes all pictures there are, but for those that `reserve` would keep.
        allow_fewer: take what there is of a class with fewer than `shots` pictures.
        reserve: without validation pictures, keep a quarter of each class for it, at most 4 and at least one of two,
            even if fewer than `shots` are then left to learn from.

    Raises:
        DataError: a class has fewer than `shots` pictures and `allow_fewer` is false; nothing is left for validation.
    """
    if shots is not None and shots < 1:
        raise ValueError(f"shots={shots} must be at least 1, or None for all")
    contents = list(map(_content, train.images))
    ranked = _ranked(train, contents, seed, "train")
    _check_enough(train, [len(some) for some in ranked], shots, allow_fewer)
    wanted = VALIDATION_SHOTS if shots is None else min(shots, VALIDATION_SHOTS)
    if validation is not None:
        held = [
            some if shots is None else some[:wanted]
            for some in _ranked(validation, list(map(_content, validation.images)), seed, "validation")
        ]
        learnt = ranked if shots is None else [some[:shots] for some in ranked]
        return Shots(train.take(np.concatenate(learnt)), validation.take(np.concatenate(held)))
    # From the other end: as long as there are enough, the pictures of validation stay when the shots grow.
    least = [min(wanted, len(some) // 2, max(1, len(some) // 4)) for some in ranked]
    held_count = least
    if shots is None:
        ranked = _those_alone_last(contents, ranked)
    else:
        beyond = [min(wanted, max(0, len(some) - shots)) for some in ranked]
        held_count = [max(pair) for pair in zip(beyond, least, strict=True)] if reserve else beyond
    held = [some[len(some) - count :] for some, count in zip(ranked, held_count, strict=True)]
    left = [some[: len(some) - count] for some, count in zip(ranked, held_count, strict=True)]
    drawn = np.concatenate(left if shots is None else [some[:shots] for some in left])
    # A picture that lies there under two names must not be on both sides.
    seen = {contents[at] for at in drawn}
    kept = [at for at in np.concatenate(held).tolist() if contents[at] not in seen]
    if not kept:
        raise DataError(
            f"no class has more than the {shots or 1} training pictures that are learnt from, copies aside, so none "
            "is left to choose by: give data.validation, or ask for fewer shots"
        )
    return Shots(train.take(drawn), train.take(np.array(kept)))


def _those_alone_last(contents: Sequence[str], ranked: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The same order, but pictures without a copy come last: copies of what is learnt from are no use to choose by."""
    times = Counter(contents)
    alone = np.array([times[content] == 1 for content in contents], bool)
    return [np.concatenate([some[~alone[some]], some[alone[some]]]) for some in ranked]


def take_share(train: LabelledPictures, share: float, seed: int) -> LabelledPictures:
    """A share of every class's pictures, at least one of each; a smaller share lies within a larger one."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1")
    ranked = _ranked(train, list(map(_content, train.images)), seed, "share")
    return train.take(np.concatenate([some[: max(1, round(share * len(some)))] for some in ranked]))


def apart(part: LabelledPictures, other: LabelledPictures, *, name: str, where: str) -> LabelledPictures:
    """`part` without the pictures that `other` has too, by their bytes; says so if there are some.

    Raises:
        DataError: `other` has them all.
    """
    theirs = {_content(image) for image in other.images}
    keep = np.array([_content(image) not in theirs for image in part.images], bool)
    if len(keep) and not keep.any():
        raise DataError(
            f"all {len(keep)} {name} pictures are among those of {where} too, for example {part.images[0]}: none is "
            f"left for {name}; name other pictures in data.{_KEYS.get(name, name)} or in data.{_KEYS.get(where, where)}"
        )
    if not keep.all():
        logger.warning(
            "%d of %d %s pictures are among those of %s too, for example %s: they are left out of %s",
            int((~keep).sum()), len(part), name, where, part.images[int(np.argmin(keep))], name,
        )  # fmt: skip
    return part.take(keep)


def warn_of_copies(part: LabelledPictures, *, name: str) -> None:
    """Warn of pictures that are there twice, by their bytes: each counts as a shot, and of two classes one is wrong."""
    first: dict[str, int] = {}
    again: list[tuple[int, int]] = []
    torn: list[tuple[int, int]] = []
    sizes = [_status(image).st_size for image in part.images]
    times = Counter(sizes)
    for at, image in enumerate(part.images):
        if times[sizes[at]] == 1:
            continue  # no need to read it
        if (before := first.setdefault(_content(image), at)) != at:
            (again if part.labels[before] == part.labels[at] else torn).append((before, at))
    if torn:
        one, other = torn[0]
        logger.warning(
            "%d of %d %s pictures are there under another class too, for example %s as %r and %s as %r: remove one",
            len(torn), len(part), name, part.images[one], part.classes[part.labels[one]], part.images[other],
            part.classes[part.labels[other]],
        )  # fmt: skip
    if again:
        one, other = again[0]
        logger.warning(
            "%d of %d %s pictures are copies of others of their class, for example %s of %s, and count beside them",
            len(again), len(part), name, part.images[other], part.images[one],
        )  # fmt: skip


def warn_of_unjudged(*draws: Shots) -> None:
    """Warn of classes that have no validation picture, of many draws once."""
    for unseen, classes in {_unjudged(drawn): drawn.train.classes for drawn in draws}.items():
        if unseen:
            logger.warning(
                "%d of %d classes have no validation picture, %r for one: choices and calibration of scores rest on "
                "the others alone. Give more pictures of them, or data.validation",
                len(unseen), len(classes), classes[unseen[0]],
            )  # fmt: skip


def _unjudged(drawn: Shots) -> tuple[int, ...]:
    return tuple(sorted(set(range(len(drawn.train.classes))) - set(drawn.validation.labels.tolist())))


def _check_enough(train: LabelledPictures, counts: Sequence[int], shots: int | None, allow_fewer: bool) -> None:
    short = [f"{name!r} ({count})" for name, count in zip(train.classes, counts) if count < (shots or 1)]
    if not short or (allow_fewer and min(counts) > 0):
        return
    more = f", and {len(short) - _SHOWN} more" if len(short) > _SHOWN else ""
    if min(counts) == 0:
        remedy = "add pictures, or leave classes without any out"
    else:
        remedy = "ask for fewer shots, add pictures, or take what there is with data.allow_fewer=true"
    raise DataError(
        f"{'1 shot is' if (shots or 1) == 1 else f'{shots} shots are'} asked for, but {len(short)} of {len(counts)} "
        f"classes have fewer training pictures: {', '.join(short[:_SHOWN])}{more}; {remedy}"
    )


def _ranked(part: LabelledPictures, contents: Sequence[str], seed: int, stream: str) -> list[np.ndarray]:
    """Positions of each class's pictures in the order in which they are drawn."""
    keys = [
        (digest_of(stream, str(seed), content), image.name)
        for content, image in zip(contents, part.images, strict=True)
    ]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    return [order[part.labels[order] == label] for label in range(len(part.classes))]


def _content(image: PictureFile) -> str:
    """What changes with a picture's bytes."""
    status = _status(image)
    with explain_vanished(image):
        return _digest(image, status.st_size, status.st_mtime_ns)


def _status(image: PictureFile) -> os.stat_result:
    with explain_vanished(image):
        return image.path.stat()


@functools.lru_cache(maxsize=1 << 17)
def _digest(image: PictureFile, size: int, changed: int) -> str:
    """Read once for all draws, and again when the file has changed."""
    return image.digest()
