"""Pictures that packages carry: emoji of four vendors, clip art and stamps with texts, photographs without.

Emoji of three vendors and clip art align `starter`; photographs keep what it knows of photographs. The stamps of Tux
Paint, the vendor OpenMoji and the names in `corpora.held_out_emoji` are kept from training, so that they can measure.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from trimtab.data.corpora import cldr_annotations, emoji_table, held_out_emoji
from trimtab.data.packages import fetch
from trimtab.errors import DataError
from trimtab.files import atomic_path

EMOJI_VENDORS = {
    "google": ("emoji-google", "package/img/google/64", ".png"),
    "twitter": ("emoji-twitter", "package/img/twitter/64", ".png"),
    "fluent": ("emoji-fluent", "package/assets", ".webp"),
}
"""Vendors that alignment may see: package, folder, file suffix."""

RENDERED_SIZE = 256
"""Side, in pixels, to which vector pictures are rendered."""

SMALLEST_PHOTOGRAPH = 150
"""Least shorter side, in pixels, of what `photographs` gives."""

_VARIATION = 0xFE0F  # the selector of colour, which vendors put into file names or leave out as they like


@dataclass(frozen=True)
class Picture:
    """A file with the texts that describe it; `group` joins pictures of the same thing."""

    path: Path
    name: str
    keywords: tuple[str, ...]
    group: str


def _by_codes(folder: Path, suffix: str) -> dict[tuple[int, ...], Path]:
    """Emoji files, named such as `2764-FE0F-200D-1F525.svg`, by code points without the variation selector."""
    # Backwards, so that the plain name wins where both are there.
    files = {tuple(int(code, 16) for code in path.stem.split("-")): path for path in folder.glob(f"*{suffix}")}
    return {tuple(code for code in codes if code != _VARIATION): files[codes] for codes in sorted(files, reverse=True)}


def _codes(symbol: str) -> tuple[int, ...]:
    return tuple(code for code in map(ord, symbol) if code != _VARIATION)


def vendor_files(folder: Path, suffix: str, symbols: Iterable[str]) -> dict[str, Path]:
    """A vendor's files of these emoji, as many as it draws."""
    files = _by_codes(folder, suffix)
    return {symbol: path for symbol in symbols if (path := files.get(_codes(symbol))) is not None}


def emoji_pictures(vendor: str) -> list[Picture]:
    """Pictures of one training vendor with their English names, held-out names left away."""
    package, folder, suffix = EMOJI_VENDORS[vendor]
    files = _by_codes(fetch(package) / folder, suffix)
    pictures = []
    annotations = cldr_annotations("en")
    for symbol in emoji_table():
        path = files.get(_codes(symbol))
        if path is None or symbol in held_out_emoji() or symbol not in annotations:
            continue
        name, keywords = annotations[symbol]
        pictures.append(Picture(path, name, tuple(keywords), f"emoji:{symbol}"))
    return pictures


def clip_art() -> list[Picture]:
    """Clip art whose title is words, without pure geometry; titles equal to a held-out emoji name are left away."""
    root = fetch("openclipart") / "usr/share/openclipart/svg"
    names = cldr_annotations("en")
    banned = {names[symbol][0].lower() for symbol in held_out_emoji()}
    pictures = []
    for path in sorted(root.rglob("*.svg")):
        title, subjects = _svg_metadata(path)
        folders = path.relative_to(root).parts[:-1]
        name = re.sub(r"[\d_\-.]+", " ", title or path.stem).strip()
        if folders[0] in ("shapes", "unsorted", "special", "logos") or not re.search(r"[A-Za-z]{3}", name):
            continue
        if name.lower() in banned:
            continue
        keywords = dict.fromkeys([*subjects, *(folder.replace("_", " ") for folder in reversed(folders))])
        pictures.append(Picture(path, name, tuple(keywords), f"clipart:{name.lower()}"))
    return pictures


def _svg_metadata(path: Path) -> tuple[str, list[str]]:
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError):
        return "", []
    title = next((e.text or "" for e in root.iter() if e.tag.endswith("}title") and (e.text or "").strip()), "")
    subjects = [(e.text or "").strip() for e in root.iter() if e.tag.endswith("}li")]
    return title.strip(), [subject for subject in subjects if subject and len(subject) < 30]


def import_renderer() -> Any:
    """What renders vector pictures, or a sentence on how to get it."""
    try:
        import resvg_py
    except ImportError as error:
        raise DataError("rendering SVG needs resvg-py: pip install 'trimtab[quickstart]'") from error
    return resvg_py


def render_svg(path: Path, target: Path, *, size: int = RENDERED_SIZE, background: str | None = "#ffffff") -> Path:
    """Render a vector picture to PNG, its longer side `size` pixels; nothing is done when it exists.

    Args:
        background: a CSS colour; None keeps what is not drawn transparent.

    Raises:
        DataError: the renderer is not installed or refuses the file.
    """
    if target.exists():
        return target
    resvg_py = import_renderer()
    try:
        # With both sides given the renderer fits the picture inside and keeps its proportions.
        data = bytes(
            resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size, background=background, dpi=96.0)
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the renderer's panics are no Exceptions
        raise DataError(f"{path.name} cannot be rendered: {error}") from error
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)
    return target


def photographs() -> list[bytes]:
    """Photographs of things, animals and buildings out of GCompris, without texts: WebP files as they are.

    Qt's resource files hold small files one after another; WebP begins with a header that says how long it is.
    """
    found = []
    for path in sorted(fetch("gcompris").rglob("*.rcc")):
        content = path.read_bytes()
        for header in re.finditer(rb"RIFF(....)WEBP", content, re.DOTALL):
            file = content[header.start() : header.start() + 8 + int.from_bytes(header[1], "little")]
            with Image.open(io.BytesIO(file)) as image:
                if image.mode == "RGB" and min(image.size) >= SMALLEST_PHOTOGRAPH:  # drawings are cut out, or small
                    found.append(file)
    return found


@dataclass(frozen=True)
class Captioned:
    """A held-out picture with its English text and the same text in a target language."""

    path: Path
    english: str
    target: str


def tuxpaint_photos(locale: str) -> list[Captioned]:
    """Stamps of Tux Paint that carry a sentence in `locale` (such as `zh_CN`); letters and signs are left away."""
    root = next(path for path in fetch("tuxpaint-stamps").rglob("stamps") if path.is_dir())
    captioned = []
    for text in sorted(root.rglob("*.txt")):
        picture = text.with_suffix(".png")
        if text.relative_to(root).parts[0] == "symbols" or not picture.exists():
            continue
        english, *translations = text.read_text(encoding="utf-8", errors="replace").splitlines()
        prefix = f"{locale.lower()}.utf8="
        target = next((line.partition("=")[2] for line in translations if line.lower().startswith(prefix)), "")
        if english.strip() and target.strip():
            captioned.append(Captioned(picture, english.strip(), target.strip()))
    return captioned


def openmoji_pictures(locale: str, folder: Path, *, held_out_only: bool = True) -> Iterator[Captioned]:
    """Pictures of the held-out vendor, rendered into `folder`, with names in English and `locale`."""
    english, target = cldr_annotations("en"), cldr_annotations(locale)
    files = _by_codes(fetch("openmoji") / "package/color/svg", ".svg")
    for symbol in sorted(held_out_emoji() if held_out_only else emoji_table()):
        path = files.get(_codes(symbol))
        if path and symbol in english and symbol in target:
            picture = render_svg(path, folder / f"{path.stem}.png")
            yield Captioned(picture, english[symbol][0], target[symbol][0])
