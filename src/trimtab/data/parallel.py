"""Parallel text: sentences of a target language beside their English; cleaning, sampling, splitting."""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from trimtab.data.manifests import read_rows
from trimtab.errors import DataError, RecipeError
from trimtab.files import digest_of
from trimtab.scripts import is_east_asian, normal_form

Pair: TypeAlias = tuple[str, str]
"""(target, english)"""

# Control characters that are not white space, byte-order marks, halves of characters.
_JUNK = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\ud800-\udfff]")
_SELECTORS = frozenset(map(chr, range(0xFE00, 0xFE10)))
# Added to both lengths before their ratio is taken, so that one-word entries with a long gloss stay.
_RATIO_OFFSET = 16
_FEWEST_VALIDATED = 100  # pairs of each of several languages; of one that has fewer than 1,000, a tenth of them


@dataclass(eq=False)
class ParallelText:
    """Pairs of sentences, as columns of equal length.

    Attributes:
        targets: sentences of the target language.
        english: their translations.
        languages: language tag of each target.
        weights: (N,) float32, positive: how much more often a pair is drawn than others of its language.
    """

    targets: list[str]
    english: list[str]
    languages: list[str] = field(default_factory=list)
    weights: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    def __post_init__(self) -> None:
        if not self.languages:
            self.languages = ["und"] * len(self.targets)
        if len(self.weights) == 0:
            self.weights = np.ones(len(self.targets), np.float32)
        self.weights = np.asarray(self.weights, np.float32)
        sizes = {len(self.targets), len(self.english), len(self.languages), len(self.weights)}
        if len(sizes) > 1:
            raise ValueError(
                f"columns differ in length: {len(self.targets)} targets, {len(self.english)} english, "
                f"{len(self.languages)} languages, {len(self.weights)} weights"
            )
        if not ((self.weights > 0) & np.isfinite(self.weights)).all():
            raise ValueError("weights must be positive numbers")

    @classmethod
    def from_pairs(cls, pairs: Sequence[Pair], language: str = "und") -> ParallelText:
        """Pairs of one language, all of weight 1."""
        return cls([target for target, _ in pairs], [english for _, english in pairs], [language] * len(pairs))

    def __len__(self) -> int:
        return len(self.targets)

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 over all columns, in order. Computed once: treat the columns as read-only."""
        weights = np.ascontiguousarray(self.weights, dtype="<f4").tobytes()
        columns = (self.targets, self.english, self.languages)
        encoded = (text.encode("utf-8", "surrogatepass") for column in columns for text in column)
        return digest_of(str(len(self)), *encoded, weights)

    def concat(self, *others: ParallelText) -> ParallelText:
        """These pairs, then those of the others."""
        parts = (self, *others)
        return ParallelText(
            [text for part in parts for text in part.targets],
            [text for part in parts for text in part.english],
            [tag for part in parts for tag in part.languages],
            np.concatenate([part.weights for part in parts]),
        )

    def take(self, indices: Sequence[int] | np.ndarray) -> ParallelText:
        """The pairs at these positions, in this order, or where a boolean mask is true."""
        positions = np.asarray(indices)
        positions = np.flatnonzero(positions) if positions.dtype == bool else positions.astype(np.int64)
        listed = positions.tolist()
        return ParallelText(
            [self.targets[i] for i in listed],
            [self.english[i] for i in listed],
            [self.languages[i] for i in listed],
            self.weights[positions],
        )

    def language_counts(self) -> dict[str, int]:
        """Number of pairs per language tag, most frequent first."""
        return dict(Counter(self.languages).most_common())

    def sampling_weights(self, temperature: float) -> np.ndarray:
        """Probability of each pair when languages are balanced.

        A language is drawn in proportion to (number of its pairs) ** temperature, then a pair within it in
        proportion to its weight. 1 leaves languages as frequent as they are, 0 makes them equally frequent.

        Returns:
            (N,) float64 that sums to 1.

        Raises:
            RecipeError: when temperature is not in 0..1.
        """
        if not 0 <= temperature <= 1:
            raise RecipeError(f"language balance temperature is {temperature}; it must be in 0..1")
        if len(self) == 0:
            return np.empty(0)
        _, code = np.unique(np.asarray(self.languages, dtype=object), return_inverse=True)
        weights = self.weights.astype(np.float64)
        per_language = np.bincount(code).astype(np.float64) ** temperature
        probability = weights * (per_language / np.bincount(code, weights=weights))[code]
        return probability / probability.sum()


@dataclass(frozen=True)
class CleaningCounts:
    """What cleaning did: pairs kept, and pairs dropped by the first rule that each broke."""

    kept: int = 0
    empty: int = 0
    too_short: int = 0
    too_long: int = 0
    length_ratio: int = 0
    identical: int = 0
    duplicate: int = 0

    def as_dict(self) -> dict[str, int]:
        """For reports; the values add up to the number of pairs read."""
        return dataclasses.asdict(self)


def read_parallel(
    path: str | Path, *, target: str = "target", english: str = "english", language: str = "und"
) -> ParallelText:
    """Read parallel text as it is (see `clean`) from a CSV, TSV, JSONL or Parquet file.

    Args:
        path: the file; optional columns `language` (a tag per row) and `weight` (a positive number).
        target: column of the target language.
        english: column of its English translation.
        language: tag of rows that have none of their own.

    Raises:
        DataError: as `read_rows`, and for weights that are not positive numbers.
    """
    rows = read_rows(path, (target, english), optional=("language", "weight"), nullable=(target, english))
    weights = np.ones(len(rows), np.float32)
    for position, record in enumerate(rows):
        if text := record.values["weight"].strip():
            try:
                weights[position] = float(text)
            except ValueError:
                weights[position] = np.nan
            if not 0 < weights[position] < np.inf:
                raise DataError(f"{path}, row {record.row}: weight {text!r} is not a positive number")
    return ParallelText(
        [record.values[target] for record in rows],
        [record.values[english] for record in rows],
        [record.values["language"].strip() or language for record in rows],
        weights,
    )


def clean_text(text: str) -> str:
    """Drop control characters and byte-order marks, turn every run of white space into one blank, strip; in
    `normal_form`."""
    if not text.isprintable():  # most texts have nothing to drop
        text = _JUNK.sub("", text)
    text = normal_form(text)
    return text if text.isprintable() and "  " not in text and text == text.strip() else " ".join(text.split())


def clean(
    pairs: ParallelText,
    *,
    min_chars: int = 1,
    max_chars: int = 300,
    max_ratio: float | None = 5.0,
    drop_identical: bool = False,
) -> tuple[ParallelText, CleaningCounts]:
    """Tidy both sides with `clean_text`, then drop pairs that teach nothing.

    Args:
        pairs: parallel text as read.
        min_chars: fewest characters of a side.
        max_chars: most characters of a side.
        max_ratio: most that one side may be longer than the other, in `letters` with 16 added to both; None for no
            limit.
        drop_identical: also drop pairs with twice the same text, as names often are.

    Returns:
        The pairs kept, in order, and the counts. Of equal pairs of a language the first stays.

    Raises:
        DataError: when no pair is left; says which rule dropped how many.
    """
    counts: Counter[str] = Counter()
    seen: set[tuple[str, str, str]] = set()
    kept, targets, sources = [], [], []
    for index, (raw_target, raw_english) in enumerate(zip(pairs.targets, pairs.english)):
        target, english = clean_text(raw_target), clean_text(raw_english)
        key = (pairs.languages[index], target, english)
        if says_nothing(target) or says_nothing(english):
            counts["empty"] += 1
        elif min(len(target), len(english)) < min_chars:
            counts["too_short"] += 1
        elif max(len(target), len(english)) > max_chars:
            counts["too_long"] += 1
        elif max_ratio is not None and _length_ratio(target, english) > max_ratio:
            counts["length_ratio"] += 1
        elif drop_identical and target == english:
            counts["identical"] += 1
        elif key in seen:
            counts["duplicate"] += 1
        else:
            seen.add(key)
            kept.append(index)
            targets.append(target)
            sources.append(english)
    result = CleaningCounts(kept=len(kept), **counts)
    if not kept:
        rules = ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "there were none"
        raise DataError(
            f"no pair is left of {len(pairs)} after cleaning ({rules}): check the columns and the limits "
            f"(min_chars {min_chars}, max_chars {max_chars}, max_ratio {max_ratio})"
        )
    return ParallelText(targets, sources, [pairs.languages[i] for i in kept], pairs.weights[kept]), result


def split_validation(pairs: ParallelText, size: int, seed: int) -> tuple[ParallelText, ParallelText]:
    """Set `size` pairs aside so that neither side of any of them stands in what is left for training.

    Pairs that share a sentence on either side (letter case aside), directly or through others, form a group;
    whole groups are drawn at random. Large groups (more than 4 pairs, than languages and than 1% of all), such as
    those that common short glosses tie together, always stay in training. Where groups do not add up to `size`,
    validation is smaller.

    Of several languages each gets its share of `size`, and small ones 100 pairs or a tenth of theirs if there is room.

    Returns:
        (train, validation), each in the order of `pairs`.

    Raises:
        DataError: when `size` leaves nothing to train on, or all pairs hang together.
    """
    if size < 1:
        raise RecipeError(f"validation size is {size}; it must be at least 1")
    if size >= len(pairs):
        raise DataError(f"cannot set {size} of {len(pairs)} pairs aside for validation: ask for fewer")
    held_out = _draw_groups(pairs, size, seed)
    if not held_out.any():
        raise DataError(
            f"cannot set {size} of {len(pairs)} pairs aside for validation: nearly all share a sentence with "
            "another; give a validation file of its own"
        )
    return pairs.take(np.flatnonzero(~held_out)), pairs.take(np.flatnonzero(held_out))


def _draw_groups(pairs: ParallelText, size: int, seed: int) -> np.ndarray:
    """Which pairs (N,) are of the groups that `split_validation` draws."""
    group = _groups(pairs)
    sizes = np.bincount(group)
    _, language = np.unique(np.asarray(pairs.languages, dtype=object), return_inverse=True)
    counts = np.bincount(language)
    # A table with a column for each language has every English sentence once in each.
    fits = sizes <= max(4, len(counts), len(pairs) // 100)
    room, left = _shares(counts, size), size
    by_group, first = np.argsort(group, kind="stable"), np.cumsum(sizes) - sizes
    chosen = np.zeros(len(sizes), bool)
    order = np.random.default_rng(seed).permutation(len(sizes))
    # Small languages first: their groups may take pairs of large ones along, which have room for that.
    for one in np.argsort(counts, kind="stable").tolist():
        own = np.bincount(group[language == one], minlength=len(sizes))
        for candidate in order[(own > 0)[order] & (fits & ~chosen)[order]].tolist():
            if min(room[one], left) <= 0:
                break
            if own[candidate] <= room[one] and sizes[candidate] <= left:
                chosen[candidate] = True
                members = by_group[first[candidate] : first[candidate] + sizes[candidate]]
                room -= np.bincount(language[members], minlength=len(room))
                left -= int(sizes[candidate])
    return chosen[group]


def _shares(counts: np.ndarray, size: int) -> np.ndarray:
    """How many of `size` pairs are for each language (L,): in proportion to its pairs, of small ones some at least."""
    least = np.minimum(_FEWEST_VALIDATED, counts // 10)
    above = np.maximum(size * counts / counts.sum() - least, 0)
    if least.sum() > size:
        shares = least * size // least.sum()
    else:
        shares = least + ((size - least.sum()) * above / max(above.sum(), 1e-9)).astype(np.int64)
    shares[counts.argmax()] += size - shares.sum()
    return shares


def _groups(pairs: ParallelText) -> np.ndarray:
    """Number (N,) of each pair's group, counted from 0: union-find over the sentences of both sides."""
    parent: list[int] = list(range(len(pairs)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for column in (pairs.targets, pairs.english):
        first: dict[str, int] = {}
        for index, text in enumerate(column):
            known = first.setdefault(clean_text(text).casefold(), index)
            if known != index:
                parent[root(index)] = root(known)
    return np.unique([root(index) for index in range(len(pairs))], return_inverse=True)[1]


def says_nothing(text: str) -> bool:
    """Whether there is nothing to see: joiners, direction marks, variation selectors are no text by themselves."""
    if text[:1].isalnum():  # as most texts begin
        return False
    return not any(unicodedata.category(char)[0] not in "CZ" and char not in _SELECTORS for char in text)


def letters(text: str) -> int:
    """Length of a text in letters of an alphabet: a Chinese, Japanese or Korean character says as much as three."""
    return len(text) if text.isascii() else len(text) + 2 * sum(map(is_east_asian, text))


def _length_ratio(target: str, english: str) -> float:
    shorter, longer = sorted((letters(target), letters(english)))
    return (longer + _RATIO_OFFSET) / (shorter + _RATIO_OFFSET)
