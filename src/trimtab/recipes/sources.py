"""Where parallel text comes from: files of the user's, or prepared sources that packages carry."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trimtab.config import LanguageData, LanguageRecipe, TextSource
from trimtab.data import corpora
from trimtab.data.manifests import read_rows
from trimtab.data.parallel import ParallelText, clean, clean_text, read_parallel, split_validation
from trimtab.data.phrases import GRAMMARS, phrases
from trimtab.errors import DataError, RecipeError

PREPARED: dict[str, Callable[[str], Iterable[corpora.WeightedPair]]] = {
    "cedict": lambda _: corpora.cedict_pairs(),
    "cldr": corpora.cldr_pairs,
    "cataclysm": corpora.cataclysm_pairs,
    "imagenet21k": lambda _: ((text, text, weight) for text, weight in corpora.imagenet21k_texts()),
}
"""Sources known by name; what follows a colon is the locale: `cedict`, `cldr:ja`, `cataclysm:zh_CN`."""

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_LONGEST_NOUN = (8, 24)  # characters of the target and of the English name that make a phrase


@dataclass(frozen=True)
class PreparedText:
    """Training and validation pairs, and what happened to the rest.

    Attributes:
        counts: for each source and for the whole, pairs read, dropped by each rule and kept.
    """

    train: ParallelText
    validation: ParallelText
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


def read_source(source: TextSource) -> ParallelText:
    """All pairs of one source, as they are.

    Raises:
        DataError: the file is missing or unreadable, a package cannot be fetched.
        RecipeError: neither a file nor a prepared source.
    """
    name, _, locale = source.path.partition(":")
    if name in PREPARED:
        rows = list(PREPARED[name](locale))
        language = "en" if name == "imagenet21k" else source.language if not locale else _language_of(locale)
        text = ParallelText(
            [target for target, _, _ in rows],
            [english for _, english, _ in rows],
            [language] * len(rows),
            np.array([weight for _, _, weight in rows], np.float32),
        )
    elif Path(source.path).suffix.lower() in _SUFFIXES:
        text = read_parallel(source.path, target=source.target, english=source.english, language=source.language)
    else:
        near = difflib.get_close_matches(name, PREPARED, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"data source {source.path!r} is neither a file ({', '.join(_SUFFIXES)}) nor one of the prepared "
            f"sources {', '.join(PREPARED)}{hint}"
        )
    if source.limit is not None:
        text = text.take(np.arange(min(source.limit, len(text))))
    return ParallelText(text.targets, text.english, text.languages, text.weights * source.weight)


def prepare(recipe: LanguageRecipe) -> PreparedText:
    """Read, clean, keep test texts out, split validation off, compose phrases.

    Raises:
        DataError: nothing is left, or a file cannot be used.
    """
    data = recipe.data
    counts: dict[str, dict[str, int]] = {}
    train = _read_all(data.train, data, counts)
    train, counts["excluded as test texts"] = _exclude(train, data.exclude)
    if data.validation:
        validation = _read_all(data.validation, data, counts)
        train, counts["excluded as validation texts"] = _without(train, validation)
        if len(validation) > data.validation_size:
            rng = np.random.default_rng(recipe.seed)
            validation = validation.take(np.sort(rng.permutation(len(validation))[: data.validation_size]))
    else:
        foreign = np.array([language != "en" for language in train.languages])
        rest, validation = split_validation(train.take(foreign), data.validation_size, recipe.seed)
        train = rest.concat(train.take(~foreign)) if (~foreign).any() else rest
    if data.phrases:
        composed = _compose(train, data.phrases, recipe.seed)
        composed, _ = _without(composed, validation)
        composed, _ = _exclude(composed, data.exclude)
        counts["composed phrases"] = {"kept": len(composed)}
        train = train.concat(composed)
    if data.english_share:
        english = _english_pairs(train, data.english_share, recipe.seed)
        counts["English-English pairs"] = {"kept": len(english)}
        train = train.concat(english)
    return PreparedText(train, validation, counts)


def _read_all(sources: Iterable[TextSource], data: LanguageData, counts: dict[str, dict[str, int]]) -> ParallelText:
    parts = []
    for source in sources:
        text, cleaning = clean(read_source(source), max_chars=data.max_chars)
        counts[source.path] = cleaning.as_dict()
        parts.append(text)
    joined, cleaning = clean(parts[0].concat(*parts[1:]), max_chars=data.max_chars)
    counts["all sources"] = cleaning.as_dict()
    return joined


def _normal(text: str) -> str:
    return clean_text(text).strip(" .。!！?？").casefold()


def _exclude(text: ParallelText, files: Iterable[str]) -> tuple[ParallelText, dict[str, int]]:
    banned = {_normal(row.values["text"]) for path in files for row in read_rows(path, ("text",))}
    keep = np.array([_normal(target) not in banned for target in text.targets], bool)
    if not keep.any():
        raise DataError("data.exclude leaves no training pair: every target is among the test texts")
    return text.take(keep), {"kept": int(keep.sum()), "dropped": int((~keep).sum())}


def _without(text: ParallelText, other: ParallelText) -> tuple[ParallelText, dict[str, int]]:
    targets, english = {_normal(t) for t in other.targets}, {_normal(t) for t in other.english}
    keep = np.array(
        [
            _normal(target) not in targets and _normal(source) not in english
            for target, source in zip(text.targets, text.english, strict=True)
        ],
        bool,
    )
    return text.take(keep), {"kept": int(keep.sum()), "dropped": int((~keep).sum())}


def _compose(train: ParallelText, count: int, seed: int) -> ParallelText:
    """Phrases for every language that has a grammar, shared out by the number of its nouns."""
    nouns: dict[str, dict[str, str]] = {}
    for target, english, language in zip(train.targets, train.english, train.languages, strict=True):
        short = len(target) <= _LONGEST_NOUN[0] and len(english) <= _LONGEST_NOUN[1]
        if short and language in GRAMMARS and corpora.weight_of(english) > 1:
            nouns.setdefault(language, {}).setdefault(target, english.lower())
    if not nouns:
        raise RecipeError(
            f"data.phrases={count}, but the training pairs hold no nouns of a language with phrase patterns "
            f"({', '.join(GRAMMARS)}): set data.phrases=0"
        )
    total = sum(len(known) for known in nouns.values())
    parts = []
    for language, known in nouns.items():
        made = list(phrases(list(known.items()), language, round(count * len(known) / total), seed))
        parts.append(ParallelText.from_pairs(made, language))
    return clean(parts[0].concat(*parts[1:]))[0]


def _english_pairs(train: ParallelText, share: float, seed: int) -> ParallelText:
    """English texts of the training pairs as pairs with themselves, `share` of the result."""
    already = sum(language == "en" for language in train.languages)
    wanted = int(share / (1 - share) * (len(train) - already)) - already
    known = list(dict.fromkeys(train.english))
    rng = np.random.default_rng(seed)
    chosen = [known[i] for i in np.sort(rng.permutation(len(known))[: max(0, wanted)])]
    return ParallelText.from_pairs([(text, text) for text in chosen], "en")


def _language_of(locale: str) -> str:
    return locale.replace("_", "-").split("-")[0].lower()
