"""Parallel text out of dictionaries, annotations and translation catalogues that packages carry.

Each reader yields `(target, english, weight)`. The weight says how much a pair should count in training: plain
names of visible things count most, since that is what people type when they search pictures.
"""

from __future__ import annotations

import functools
import gettext
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from trimtab.data.packages import fetch, fetch_file
from trimtab.errors import DataError
from trimtab.files import digest_of

WeightedPair = tuple[str, str, float]

CONCRETE_WEIGHT = 3.0
"""Weight of a gloss that names a WordNet noun with pictures in ImageNet-21k, against 1 for any other."""

HELD_OUT_EMOJI = 200
"""Emoji whose names no training sees, neither starter's alignment nor the language link."""

_PARENTHESES = re.compile(r"\s*\([^()]*\)\s*")
_REFERENCE = re.compile(r"\S*\[[^\]]*\]")
_CROSS_REFERENCE = re.compile(
    r"^(surname|given name|variant|old variant|erhua variant|archaic variant|erhua form|used in|CL:|Kangxi|"
    r"Japanese variant|euphemistic variant|same as|equivalent of|see (also )?\S*[㐀-鿿]|"
    r"abbr\.|also (written|called|known as|translated)|(\S+ )?pr\.)(?!\w)",
    re.IGNORECASE,
)
# What is left of "..., abbr. for 國|国[guo2]" once the reference is taken out.
_IMAGENET_FOLDER = "timm/data/_info"
_DANGLING = re.compile(r"[\s,]*\b(abbr\. (for|to|of)|also (written|called|known as)|variant of|see also)$")
_MARKUP = re.compile(r"<[^<>]*>|%\d*\$?[-+.\d]*[a-zA-Z]|[{}|\x04\x00]")


@functools.cache
def concrete_nouns() -> frozenset[str]:
    """Lower-case English names of the visible things of ImageNet-21k (about 35,000)."""
    return frozenset(name.strip().lower() for names in _imagenet("lemma").values() for name in names.split(","))


def weight_of(english: str) -> float:
    """`CONCRETE_WEIGHT` for the name of a visible thing, else 1."""
    name = re.sub(r"^(a|an|the)\s+", "", english.lower())
    singular = name[:-1] if name.endswith("s") else name
    return CONCRETE_WEIGHT if name in concrete_nouns() or singular in concrete_nouns() else 1.0


def cedict_pairs(*, max_glosses: int = 4) -> Iterator[WeightedPair]:
    """CC-CEDICT: every gloss of an entry, without cross-references, readings and remarks in parentheses.

    A later gloss weighs less than the first, as it is more often a rarer sense. The file is read once per process.
    """
    path = fetch_file("cc-cedict", "*/data/all.js")
    yield from _cedict_pairs(path, path.stat().st_mtime_ns, max_glosses)


@functools.lru_cache(maxsize=2)
def _cedict_pairs(path: Path, _changed: int, max_glosses: int) -> tuple[WeightedPair, ...]:
    return tuple(_read_cedict(path.read_text(encoding="utf-8"), max_glosses))


def _read_cedict(text: str, max_glosses: int) -> Iterator[WeightedPair]:
    for _, simplified, pinyin, glosses, *_ in json.loads(text[text.index("{") :].rstrip().rstrip(";"))["all"]:
        if not re.search(r"[㐀-鿿]", simplified):
            continue
        names = [glosses] if isinstance(glosses, str) else glosses
        seen: set[str] = set()
        for gloss in (part for name in names for part in name.split(";")):
            english = _clean_gloss(gloss)
            if not english or english.lower() in seen:
                continue
            # A capitalised reading marks a proper name: right, yet rarely searched for in pictures.
            base = weight_of(english) * (0.5 if pinyin[:1].isupper() else 1.0)
            yield simplified, english, base / (1 + 0.5 * len(seen))
            seen.add(english.lower())
            if len(seen) == max_glosses:
                break


def _clean_gloss(gloss: str) -> str:
    gloss = _PARENTHESES.sub(" ", gloss).strip()
    if _CROSS_REFERENCE.match(gloss):
        return ""
    gloss = _REFERENCE.sub("", gloss)
    gloss = _DANGLING.sub("", re.sub(r"\s+", " ", gloss).strip(" ,;:"))
    return gloss if re.search(r"[A-Za-z]", gloss) and not re.search(r"[|㐀-鿿]", gloss) else ""


def cldr_annotations(locale: str) -> dict[str, tuple[str, list[str]]]:
    """Name and keywords of every annotated emoji in one locale.

    Raises:
        DataError: the package has no such locale.
    """
    folder = fetch("cldr-annotations") / "package" / "annotations"
    path = folder / locale / "annotations.json"
    if not path.exists():
        known = sorted(entry.name for entry in folder.iterdir())
        raise DataError(f"CLDR has no annotations for locale {locale!r}; it has {', '.join(known)}")
    entries = json.loads(path.read_text(encoding="utf-8"))["annotations"]["annotations"]
    return {
        symbol: (entry["tts"][0], entry.get("default", [])) for symbol, entry in entries.items() if entry.get("tts")
    }


@functools.cache
def emoji_table() -> dict[str, str]:
    """Emoji with a picture of their own, as symbol to OpenMoji's subgroup: no flags, no skin-tone variants."""
    path = fetch_file("openmoji", "*/data/openmoji.json")
    return {
        entry["emoji"].replace("\ufe0f", ""): entry["subgroups"]
        for entry in json.loads(path.read_text(encoding="utf-8"))
        if not entry["skintone"] and not entry["group"].startswith(("flags", "extras", "component"))
    }


@functools.cache
def held_out_emoji() -> frozenset[str]:
    """The `HELD_OUT_EMOJI` symbols whose entries no training takes, chosen by digest so that every run agrees."""
    eligible = emoji_table().keys() & cldr_annotations("en").keys() & cldr_annotations("zh").keys()
    return frozenset(sorted(eligible, key=lambda symbol: digest_of("held out", symbol))[:HELD_OUT_EMOJI])


def cldr_pairs(locale: str, *, with_held_out: bool = False) -> Iterator[WeightedPair]:
    """Emoji names of a locale beside the English ones, then both with their keywords.

    Keywords of two languages do not correspond one to one, but the name and the set of keywords do.
    """
    colon, comma = ("：", "、") if re.match("zh|yue|ja", locale) else (": ", ", ")
    english, target = cldr_annotations("en"), cldr_annotations(locale)
    for symbol, (name, keywords) in target.items():
        if symbol not in english or (symbol in held_out_emoji() and not with_held_out):
            continue
        english_name, english_keywords = english[symbol]
        yield name, english_name, weight_of(english_name)
        if keywords and english_keywords:
            yield (
                f"{name}{colon}{comma.join(keywords[:6])}",
                f"{english_name}: {', '.join(english_keywords[:6])}",
                0.5,
            )


def gettext_pairs(path: Path, *, min_words: int = 1, max_chars: int = 220) -> Iterator[WeightedPair]:
    """Messages of a compiled gettext catalogue (.mo), without markup, placeholders and plural duplicates.

    Raises:
        DataError: the file is missing or is no catalogue.
    """
    try:
        with path.open("rb") as stream:
            catalogue = gettext.GNUTranslations(stream)._catalog  # type: ignore[attr-defined]
    except (OSError, ValueError, struct.error) as error:
        raise DataError(f"{path} is not a readable gettext catalogue: {error}") from error
    for key, translation in catalogue.items():
        message = key[0] if isinstance(key, tuple) else key
        if not message or not translation or (isinstance(key, tuple) and key[1] != 0):
            continue
        english = message.rpartition("\x04")[2]
        # Text with markup or placeholders is of the program, not of the world.
        if _MARKUP.search(english) or _MARKUP.search(translation) or "\n" in english:
            continue
        english, target = re.sub(r"\s+", " ", english).strip(), re.sub(r"\s+", " ", translation).strip()
        if not re.search(r"[A-Za-z]{2}", english) or len(english) > max_chars or len(english.split()) < min_words:
            continue
        yield target, english, weight_of(english)


def cataclysm_pairs(locale: str) -> Iterator[WeightedPair]:
    """Things, creatures and scenes of the game Cataclysm: DDA, in a locale such as `zh_CN`.

    Raises:
        DataError: the package has no such locale.
    """
    folder = fetch("cataclysm-dda") / "usr/share/locale"
    path = folder / locale / "LC_MESSAGES" / "cataclysm-dda.mo"
    if not path.exists():
        known = sorted(entry.name for entry in folder.iterdir())
        raise DataError(f"cataclysm-dda has no locale {locale!r}; it has {', '.join(known)}")
    yield from gettext_pairs(path)


def imagenet21k_texts() -> Iterator[tuple[str, float]]:
    """English names of visible things, and some with their definition: text for English-English pairs."""
    names, definitions = _imagenet("lemma"), _imagenet("definition")
    for synset, lemma in names.items():
        for name in lemma.split(","):
            yield name.strip(), 1.0
        if synset in definitions:
            yield f"{lemma.split(',')[0].strip()}, {definitions[synset]}"[:200], 0.5


def imagenet_classes() -> list[tuple[list[str], str]]:
    """Names and definition of each of the 1,000 classes of ImageNet-1k, in the order of a classifier's outputs."""
    synsets = (fetch("imagenet-names") / _IMAGENET_FOLDER / "imagenet_synsets.txt").read_text("utf-8").split()
    names, definitions = _imagenet("lemma"), _imagenet("definition")
    return [([name.strip() for name in names[synset].split(",")], definitions[synset]) for synset in synsets]


def _imagenet(kind: str) -> dict[str, str]:
    """``lemma`` (names with commas between them) or ``definition`` of each synset of ImageNet-21k."""
    path = fetch("imagenet-names") / _IMAGENET_FOLDER / f"imagenet_synset_to_{kind}.txt"
    return dict(line.split("\t", 1) for line in path.read_text("utf-8").splitlines() if "\t" in line)
