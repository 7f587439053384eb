"""What the domain link reads: training and validation pairs, and pictures outside the domain."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.config import DomainRecipe, PairSource
from trimtab.data.pairs import ImageTextPairs, keep_apart, load_pairs, shared_images, split_off
from trimtab.data.shards import PictureFile
from trimtab.errors import DataError
from trimtab.evaluation.forgetting import GeneralSet
from trimtab.recipes.decoding import decoding
from trimtab.scripts import is_latin
from trimtab.towers.dual_encoder import DualEncoder

logger = logging.getLogger(__name__)

_END = 40  # letters
_FOREIGN = (
    ". If it hardly reads this script, give captions that it reads; for texts in this language adapt a language link "
    "first, then compose the two (docs/compose.md)"
)


@dataclass(frozen=True)
class DomainPairs:
    """Training and validation pairs, and by side what became of everything that was read."""

    train: ImageTextPairs
    validation: ImageTextPairs
    counts: dict[str, dict[str, int]]


@dataclass(frozen=True)
class RetrievalSet:
    """Pairs as `trimtab.evaluation.retrieval` wants them."""

    images: Sequence[Any]
    texts: Sequence[str]
    positives: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, pairs: ImageTextPairs) -> RetrievalSet:
        """All pairs, pictures as what `DualEncoder.encode_image` takes."""
        positives = list(zip(pairs.image_index.tolist(), pairs.caption_index.tolist(), strict=True))
        return cls([readable(image) for image in pairs.images], pairs.captions, positives)


def readable(image: PictureFile) -> Path | PictureFile:
    """A picture as `trimtab.data.images.read_image` takes it; nothing is read yet."""
    return image.path if image.offset is None else image


def read_pairs(recipe: DomainRecipe) -> DomainPairs:
    """Read, check, split: training and validation pictures that no picture is on both sides of.

    Raises:
        DataError: sources that cannot be used, or too few different pairs on a side.
        RecipeError: options that do not go with a source.
    """
    data = recipe.data
    train = _load(data.train, recipe.seed)
    if not data.validation:
        read = train.counts
        whole, validation = split_off(train, data.validation_share, recipe.seed)
        # One picture may lie there under two names, one on each side now.
        train, _ = keep_apart(whole, validation, remove=data.check_duplicates)
        counts = {
            **read.as_dict(),
            "kept": len(train),
            "set_aside": read.set_aside + len(whole) - len(train),
            "for validation": len(validation),
        }
        return DomainPairs(train, validation, {"training": counts})
    validation = _load(data.validation, recipe.seed)
    train, _ = keep_apart(train, validation, remove=data.check_duplicates)
    counts_of = {"training": train.counts.as_dict(), "validation": validation.counts.as_dict()}
    return DomainPairs(train, validation, counts_of)


def as_read(pairs: DomainPairs, base: DualEncoder) -> DomainPairs:
    """The pairs with captions of the same tokens taken for one, as no training can part them; warns of these.

    Of texts that were cut it warns too: what was cut off may be all that they differ in.

    Raises:
        DataError: the text tower reads all captions of a side alike.
    """
    inputs = base.text_inputs
    sides = []
    long = 0
    for name, side in (("training", pairs.train), ("validation", pairs.validation)):
        first, cut = inputs.same(side.captions)
        long += cut
        alike = [
            (side.captions[other], text) for other, text in zip(first, side.captions) if text != side.captions[other]
        ]
        # Spellings of one word are read well, whatever their script.
        foreign = any(not is_latin(text) and text.casefold() != other.casefold() for other, text in alike)
        remedy = "write captions otherwise that mean different things" + (_FOREIGN if foreign else "")
        if alike:
            logger.warning(
                "%s reads %d of the %d %s captions as it reads others, for example %s: they count as one caption. They "
                "differ in what its tokenizer drops, such as case, in words that it does not know, or after its last "
                "token, of %d: %s",
                base.name, len(alike), len(side.captions), name,
                "; ".join(f"{_shown(text)!r} as {_shown(other)!r}" for other, text in alike[:2]), inputs.limit, remedy,
            )  # fmt: skip
        sides.append(side.merge_captions(first, f"{name} captions as {base.name} reads them", remedy))
    if long:
        count = len(pairs.train.captions) + len(pairs.validation.captions)
        logger.warning(
            "%d of %d captions are longer than the %d tokens that %s reads, and are cut",
            long, count, inputs.limit, base.name,
        )  # fmt: skip
    return replace(pairs, train=sides[0], validation=sides[1])


def _shown(text: str) -> str:
    """Both ends of a caption: long ones of the same tokens differ at their ends."""
    return text if len(text) <= 2 * _END else f"{text[:_END]}…{text[-_END:]}"


def general_sets(sources: Sequence[PairSource], seed: int, train: ImageTextPairs | None = None) -> list[GeneralSet]:
    """A retrieval set per source, named for its file or folder; warns of pictures that are trained on.

    Raises:
        DataError: as `read_pairs`; the message names the source.
    """
    stems = [Path(source.path).stem for source in sources]
    twice = {stem for stem, count in Counter(stems).items() if count > 1}
    found = []
    for source, stem in zip(sources, stems, strict=True):
        try:
            pairs = _load([source], seed)
        except DataError as error:
            raise DataError(f"general: {error}") from error
        if train is not None and (shared := shared_images(pairs, train)):
            first, other = next(iter(shared.items()))
            logger.warning(
                "%d of %d pictures of general %s are trained on too, for example %s (there: %s): less looks forgotten "
                "than is",
                len(shared), len(pairs.images), source.path, pairs.images[first], train.images[other],
            )  # fmt: skip
        found.append(GeneralSet(source.path if stem in twice else stem, RetrievalSet.of(pairs)))
    return found


def _load(sources: Sequence[PairSource], seed: int) -> ImageTextPairs:
    with decoding() as how:
        return load_pairs(sources, seed, **how)
