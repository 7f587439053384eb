"""Where parallel text comes from: files of the user's, or prepared sources that packages carry."""

from __future__ import annotations

import difflib
import logging
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from trimtab.config import LanguageData, LanguageRecipe, TextSource
from trimtab.data import corpora
from trimtab.data.manifests import read_rows
from trimtab.data.packages import PACKAGES
from trimtab.data.parallel import CleaningCounts, ParallelText, clean, letters, read_parallel, split_validation
from trimtab.data.phrases import GRAMMARS, phrases
from trimtab.data.templates import DEFAULT_TEMPLATES, fill, fill_all, known_language, templates_for
from trimtab.errors import DataError, RecipeError
from trimtab.scripts import is_han, is_kana

logger = logging.getLogger(__name__)

PREPARED: dict[str, Callable[[str], Iterable[corpora.WeightedPair]]] = {
    "cedict": lambda _: corpora.cedict_pairs(),
    "cldr": corpora.cldr_pairs,
    "cataclysm": corpora.cataclysm_pairs,
    "imagenet21k": lambda _: ((text, text, weight) for text, weight in corpora.imagenet21k_texts()),
}
"""Sources known by name; what follows a colon is the locale: `cedict`, `cldr:ja`, `cataclysm:zh_CN`."""

_PACKAGES = {  # that they come out of
    "cedict": "cc-cedict",
    "cldr": "cldr-annotations",
    "cataclysm": "cataclysm-dda",
    "imagenet21k": "imagenet-names",
}
_LOCALES = {"cldr": "cldr:ja", "cataclysm": "cataclysm:zh_CN"}  # sources that need a locale, and an example
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_VARIANTS = 200  # nouns that show in which directions templates differ
_LONGEST_NOUN = 24  # letters of the target and of the English name that make a phrase


def shown_source(path: str) -> str:
    """A source as a card names it: a prepared one with its licence, a file without its folders."""
    name = path.partition(":")[0]
    if name in _PACKAGES:
        return f"`{path}`: {PACKAGES[_PACKAGES[name]].licence}"
    return f"`{Path(path).name}`"


@dataclass(frozen=True)
class Words:
    """What a translation memory is made of: nouns of the training pairs.

    Attributes:
        pairs: every noun in its language's first template, or alone where a language has none, as English ones; once
            for each of its meanings, as heavy as that was among the training pairs.
        variants: some nouns in all templates of their language, the templates of one noun side by side.
        templates: how many that are for each noun; 0 if there are no variants.
    """

    pairs: ParallelText
    variants: tuple[str, ...] = ()
    templates: int = 0


@dataclass(frozen=True)
class PreparedText:
    """Training and validation pairs, and what happened to the rest.

    Attributes:
        counts: for each source and for the whole, pairs read, dropped by each rule and kept.
        words: for a translation memory; null without one, or where no word may be in it.
    """

    train: ParallelText
    validation: ParallelText
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    words: Words | None = None


def read_source(source: TextSource) -> ParallelText:
    """All pairs of one source, as they are.

    Raises:
        DataError: the file is missing or unreadable, a package cannot be fetched.
        RecipeError: neither a file nor a prepared source.
    """
    name, _, locale = source.path.partition(":")
    if name in PREPARED:
        if bool(locale) != (name in _LOCALES):
            remedy = f"needs a locale, for example {_LOCALES[name]}" if name in _LOCALES else f"has none: write {name}"
            raise RecipeError(f"data source {source.path!r}: {name} {remedy}")
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
        near = difflib.get_close_matches(name.lower(), PREPARED, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"data source {source.path!r} is neither a file ({', '.join(_SUFFIXES)}) nor one of the prepared "
            f"sources {', '.join(PREPARED)}{hint}"
        )
    if source.limit is not None and source.limit < len(text):
        # The heaviest pairs first; among equals a fixed random order, since files are often sorted.
        shuffled = np.random.default_rng(0).permutation(len(text))
        heaviest = shuffled[np.argsort(-text.weights[shuffled], kind="stable")]
        text = text.take(np.sort(heaviest[: source.limit]))
    # English is told by its tag, which files write as "EN" or "en-US" too.
    spelt = {tag: "en" if _language_of(tag) == "en" else _canonical(tag) for tag in set(text.languages)}
    languages = [spelt[tag] for tag in text.languages]
    return ParallelText(text.targets, text.english, languages, text.weights * source.weight)


def prepare(recipe: LanguageRecipe) -> PreparedText:
    """Read, clean, keep test texts out, split validation off, compose phrases, fill templates.

    Raises:
        DataError: nothing is left, or a file cannot be used.
        RecipeError: the recipe asks for what the pairs do not give.
    """
    data = recipe.data
    counts: dict[str, dict[str, int]] = {}
    test_texts = {
        _normal(row.values["text"]) for path in data.exclude for row in read_rows(path, ("text",), nullable=("text",))
    }
    train = _read_all(data.train, data, counts)
    _warn_of_tags(train)
    train, counts["excluded as test texts"] = _exclude(train, test_texts)
    _refuse_none(train, "data.exclude names all of their targets as test texts")
    if all(language == "en" for language in train.languages):
        raise DataError(f"all {len(train)} training pairs are English-English: give pairs of another language too")
    if data.validation:
        held_out = _read_all(data.validation, data, counts, "validation: ")
        held_out, _ = _exclude(held_out, test_texts)  # else the weights would be chosen on the test
        held_out = held_out.take(_foreign(held_out))
    else:
        train, held_out = _split(train, data.validation_size, recipe.seed)
    picked = np.random.default_rng(recipe.seed).permutation(len(held_out))[: data.validation_size]
    validation = held_out.take(np.sort(picked))
    if len(validation) < 2:
        raise DataError(
            f"validation needs at least 2 pairs, and {len(validation)} can be used: raise data.validation_size or "
            "give a longer file in data.validation"
        )
    # Splitting keeps equal sentences together; here go those that differ in punctuation, and English-English pairs.
    train, counts["excluded as validation texts"] = _without(train, held_out)
    _refuse_none(train, "all share a sentence with the validation pairs")
    words = train
    if data.phrases:
        composed, _ = _without(_compose(words, data.phrases, recipe.seed), held_out)
        composed, _ = _exclude(composed, test_texts)
        counts["composed phrases"] = {"kept": len(composed)}
        train = train.concat(composed)
    if data.templates:
        filled, _ = _without(_in_templates(words, data.templates, recipe.seed), held_out)
        filled, _ = _exclude(filled, test_texts)
        counts["nouns in templates"] = {"kept": len(filled)}
        train = train.concat(filled)
    if data.english_share:
        english, _ = _exclude(_english_pairs(train, data.english_share, recipe.seed), test_texts)
        counts["English-English pairs"] = {"kept": len(english)}
        train = train.concat(english)
    known = None
    if count := recipe.adapter.memory:
        known = _memory_words(words, count, recipe.seed, with_english=recipe.english == "adapter")
        pairs, _ = _exclude(_without(known.pairs, held_out)[0], test_texts)
        counts["words in the memory"] = {"kept": len(set(pairs.targets))}
        known = replace(known, pairs=pairs) if len(pairs) else None  # as where all are test texts
    _refuse_constant(train)
    return PreparedText(train, validation, counts, known)


def drawing_probability(text: ParallelText, data: LanguageData) -> np.ndarray:
    """Probability (N,) of each training pair: languages balanced, and English as often as the recipe says."""
    probability = text.sampling_weights(data.language_balance)
    english = np.array([language == "en" for language in text.languages])
    if data.english_share and english.any():
        probability[english] *= data.english_share / probability[english].sum()
        probability[~english] *= (1 - data.english_share) / probability[~english].sum()
    return probability


def _read_all(
    sources: Iterable[TextSource], data: LanguageData, counts: dict[str, dict[str, int]], prefix: str = ""
) -> ParallelText:
    parts = []
    for source in sources:
        try:
            text, cleaning = clean(read_source(source), max_chars=data.max_chars)
        except DataError as error:
            named = source.path in str(error)
            raise DataError(str(error) if named else f"{source.path}: {error}") from error
        name = f"{prefix}{source.path}"
        if name in counts:  # one file may hold several languages, a column each
            name = f"{name} ({source.target}, {source.language})"
        counts[name] = cleaning.as_dict()
        parts.append(text)
    if len(parts) == 1:  # what is clean stays as it is
        joined, cleaning = parts[0], CleaningCounts(kept=len(parts[0]))
    else:
        joined, cleaning = clean(parts[0].concat(*parts[1:]), max_chars=data.max_chars)
    counts[f"{prefix}all sources"] = cleaning.as_dict()
    return joined


def _split(train: ParallelText, size: int, seed: int) -> tuple[ParallelText, ParallelText]:
    """Set validation pairs aside from all languages but English."""
    foreign = _foreign(train)
    if size >= foreign.sum():
        lower = max(2, foreign.sum() // 10)
        remedy = f"set it lower, for example to {lower}" if lower < min(size, foreign.sum()) else "give more pairs"
        raise RecipeError(f"data.validation_size={size} leaves nothing of {foreign.sum()} pairs to train on: {remedy}")
    if size > foreign.sum() / 3:
        logger.warning(
            "%d of %d pairs are set aside for validation and missed in training: set data.validation_size lower, for "
            "example to %d", size, foreign.sum(), max(2, foreign.sum() // 10),
        )  # fmt: skip
    rest, validation = split_validation(train.take(foreign), size, seed)
    return (rest.concat(train.take(~foreign)) if not foreign.all() else rest), validation


def _foreign(text: ParallelText) -> np.ndarray:
    """Which pairs (N,) are of another language than English, which has no translation to match."""
    return np.array([language != "en" for language in text.languages], bool)


def _warn_of_tags(train: ParallelText) -> None:
    """Say where languages are probably named wrongly: templates, the memory and the balance go by their tags."""
    chinese = [text for text, tag in zip(train.targets, train.languages, strict=True) if _language_of(tag) == "zh"]
    strange = [text for text in chinese if not any(map(is_han, text)) or any(map(is_kana, text))]
    if 2 * len(strange) > len(chinese):
        logger.warning(
            "%d of %d pairs of language zh have a target that is not Chinese, %r for one: say which language it is, as "
            "in data.train=[{path: pairs.csv, language: ja}] or in a column `language`; zh is what is taken where "
            "nothing is said",
            len(strange), len(chinese), strange[0],
        )  # fmt: skip
    counts = train.language_counts()
    if len(counts) < 2:
        return
    tags: dict[tuple[str, str], set[str]] = {}
    for target, english, tag in zip(train.targets, train.english, train.languages, strict=True):
        tags.setdefault((target, english), set()).add(tag)
    for several, count in Counter(frozenset(some) for some in tags.values() if len(some) > 1).most_common():
        if 2 * count > min(counts[tag] for tag in several):  # languages may well share some words
            logger.warning(
                "%d pairs stand under several languages, %s: if they are of one, name it alike in all sources, or they "
                "count twice",
                count, " and ".join(sorted(several)),
            )  # fmt: skip


def _refuse_constant(train: ParallelText) -> None:
    """Refuse pairs that are all alike on one side: from them nothing but a constant can be learned."""
    for side, texts in (("target", train.targets), ("english", train.english)):
        first = _normal(texts[0])
        if all(_normal(text) == first for text in texts):
            raise DataError(
                f"all {len(train)} training pairs have the same {side} text, {texts[0]!r:.80}: give pairs of different "
                "texts"
            )


def _refuse_none(train: ParallelText, reason: str) -> None:
    if len(train) == 0:
        raise DataError(f"no pair is left to train on: {reason}")


class _WithoutMarks(dict[int, int | None]):
    """For `str.translate`: drops punctuation, blanks and invisible signs. Each character is looked up once."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PZC" else code
        return self[code]


_WITHOUT_MARKS = _WithoutMarks()


def _normal(text: str) -> str:
    """What two sentences share that differ only in case, punctuation, blanks or width of letters."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return plain.translate(_WITHOUT_MARKS) or plain


def _exclude(text: ParallelText, test_texts: Collection[str]) -> tuple[ParallelText, dict[str, int]]:
    if not test_texts:
        return text, {"kept": len(text), "dropped": 0}
    keep = np.array([_normal(target) not in test_texts for target in text.targets], bool)
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
    nouns = _nouns(train, GRAMMARS, f"data.phrases={count}", "phrase patterns")
    total = sum(map(len, nouns.values()))
    parts = []
    for language, known in nouns.items():
        names = list(_first_meanings(known).items())
        made = list(phrases(names, language, round(count * len(known) / total), seed))
        parts.append(ParallelText.from_pairs(made, language))
    return clean(parts[0].concat(*parts[1:]))[0]


def _in_templates(train: ParallelText, count: int, seed: int) -> ParallelText:
    """Nouns as they stand when classes are named, in one default template each; large counts give them others too."""
    languages = [language for language in DEFAULT_TEMPLATES if language != "en"]
    nouns = _nouns(train, languages, f"data.templates={count}", "default templates")
    total = sum(map(len, nouns.values()))
    parts = []
    for language, known in nouns.items():
        ways = list(zip(templates_for(language), DEFAULT_TEMPLATES["en"], strict=True))
        names = random.Random(seed).sample(list(_first_meanings(known).items()), len(known))
        made = []
        for i in range(min(round(count * len(names) / total), len(names) * len(ways))):
            turn, place = divmod(i, len(names))
            own, english = ways[(place + turn) % len(ways)]
            made.append((fill(own, names[place][0]), fill(english, names[place][1])))
        parts.append(ParallelText.from_pairs(made, language))
    return parts[0].concat(*parts[1:])


def _memory_words(train: ParallelText, count: int, seed: int, *, with_english: bool) -> Words:
    """At most `count` nouns as a translation memory holds them, shared out between languages by their number.

    Args:
        with_english: let English names stand for themselves, or "rock" would be drawn to the skirt that a Rock is.
    """
    languages = {language for language in train.languages if language != "en"}
    nouns = _nouns(train, languages, f"adapter.memory={count}", "a translation memory")
    if with_english:
        foreign = {target for known in nouns.values() for target in known}
        meant = (name for known in nouns.values() for name in _first_meanings(known).values())
        nouns["en"] = {name: {name: 1.0} for name in meant if name not in foreign}
    total = sum(map(len, nouns.values()))
    pairs, variants, templates = [], [], 0
    for language, known in nouns.items():
        names = random.Random(seed).sample(list(known.items()), min(len(known), round(count * len(known) / total)))
        ways = templates_for(language) if language != "en" and known_language(language, DEFAULT_TEMPLATES) else []
        own, translated = (ways[0], DEFAULT_TEMPLATES["en"][0]) if ways else ("{}", "{}")
        rows = [(name, meaning, weight) for name, meanings in names for meaning, weight in meanings.items()]
        pairs.append(
            ParallelText(
                [fill(own, name) for name, _, _ in rows],
                [fill(translated, meaning) for _, meaning, _ in rows],
                [language] * len(rows),
                np.array([weight for _, _, weight in rows], np.float32),
            )
        )
        if ways:
            templates = len(ways)
            variants += fill_all(ways, [name for name, _ in names[:_VARIANTS]])
    return Words(pairs[0].concat(*pairs[1:]), tuple(variants), templates)


Meanings = dict[str, dict[str, float]]
"""English names of each word with their weights, in the order of the pairs."""


def _nouns(train: ParallelText, languages: Collection[str], key: str, what: str) -> dict[str, Meanings]:
    """Names of visible things by language tag."""
    nouns: dict[str, Meanings] = {}
    meant = {tag for tag in set(train.languages) if known_language(tag, languages)}
    rows = zip(train.targets, train.english, train.languages, train.weights.tolist(), strict=True)
    for target, english, language, weight in rows:
        short = max(letters(target), len(english)) <= _LONGEST_NOUN
        if short and language in meant and corpora.weight_of(english) > 1:
            nouns.setdefault(language, {}).setdefault(target, {}).setdefault(english.lower(), weight)
    if not nouns:
        raise RecipeError(
            f"{key}, but the training pairs hold no nouns of a language with {what} ({', '.join(languages)}): "
            f"set {key.split('=')[0]}=0"
        )
    return nouns


def _first_meanings(known: Meanings) -> dict[str, str]:
    return {target: next(iter(names)) for target, names in known.items()}


def _english_pairs(train: ParallelText, share: float, seed: int) -> ParallelText:
    """English texts of the training pairs as pairs with themselves, `share` of the result."""
    already = sum(language == "en" for language in train.languages)
    wanted = int(share / (1 - share) * (len(train) - already)) - already
    known = list(dict.fromkeys(train.english))
    rng = np.random.default_rng(seed)
    chosen = [known[i] for i in np.sort(rng.permutation(len(known))[: max(0, wanted)])]
    return ParallelText.from_pairs([(text, text) for text in chosen], "en")


def _canonical(tag: str) -> str:
    """A language tag as RFC 5646 recommends to write it, so that ZH and zh are one language."""
    first, *rest = tag.strip().replace("_", "-").split("-")
    spelt = {2: str.upper, 4: str.title}  # a country, a script
    return "-".join([first.lower(), *(spelt.get(len(part), str.lower)(part) for part in rest)])


def _language_of(locale: str) -> str:
    return _canonical(locale).split("-")[0]
