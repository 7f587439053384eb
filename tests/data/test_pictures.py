from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from real_packages import needs
from trimtab.data import corpora, pictures
from trimtab.data.pictures import (
    EMOJI_VENDORS,
    Captioned,
    clip_art,
    emoji_pictures,
    openmoji_pictures,
    render_svg,
    tuxpaint_photos,
)
from trimtab.errors import DataError

CAT, DOG, HEART, COPYRIGHT = "🐱", "🐶", "❤\u200d🔥", "©"
CACHED: list[Any] = [corpora.concrete_nouns, corpora.emoji_table, corpora.held_out_emoji]
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="{}"><rect width="9" height="9" fill="red"/></svg>'


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Four emoji, of which the dog is held out, in small folders of the packages."""
    monkeypatch.setattr(pictures, "fetch", lambda key: tmp_path / key)
    monkeypatch.setattr(corpora, "fetch", lambda key: tmp_path / key)
    names = {CAT: "cat face", DOG: "dog face", HEART: "heart on fire", COPYRIGHT: "copyright"}
    target = {CAT: "猫脸", DOG: "狗脸", HEART: "火上之心", COPYRIGHT: "版权"}
    annotations = {
        locale: {s: (name, [name.split()[0]]) for s, name in of.items()}
        for locale, of in (("en", names), ("zh", target))
    }
    for module in (corpora, pictures):
        monkeypatch.setattr(module, "cldr_annotations", annotations.__getitem__)
        monkeypatch.setattr(module, "emoji_table", lambda: dict.fromkeys([*names, "🦄"], "sub"))
        monkeypatch.setattr(module, "held_out_emoji", lambda: frozenset({DOG}))
    yield tmp_path
    for function in CACHED:
        function.cache_clear()


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


# Emoji


def test_training_vendors_without_held_out_names(fake: Path) -> None:
    folder = fake / "emoji-google/package/img/google/64"
    files = ("1f431", "1f436", "2764-fe0f-200d-1f525", "00a9-fe0f", "1f984", "1f600", "1f3ef1f3fb")
    touch(*(folder / f"{name}.png" for name in files), folder / "1f431.txt")
    found = {picture.group: picture for picture in emoji_pictures("google")}
    assert found.keys() == {f"emoji:{CAT}", f"emoji:{HEART}", f"emoji:{COPYRIGHT}"}  # no dog; the unicorn has no name
    cat = found[f"emoji:{CAT}"]
    assert (cat.path, cat.name, cat.keywords) == (folder / "1f431.png", "cat face", ("cat",))
    assert found[f"emoji:{HEART}"].path.name == "2764-fe0f-200d-1f525.png"


def test_every_vendor_shows_the_same_groups(fake: Path) -> None:
    for package, folder, suffix in EMOJI_VENDORS.values():
        touch(fake / package / folder / f"1f431{suffix}", fake / package / folder / f"1f436{suffix}")
    shown = [{picture.group for picture in emoji_pictures(vendor)} for vendor in EMOJI_VENDORS]
    assert shown == [{f"emoji:{CAT}"}] * 3  # so that a split by group never divides one emoji


def test_the_held_out_vendor(fake: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = fake / "openmoji/package/color/svg"
    # OpenMoji pads to four digits and keeps variation selectors, also inside.
    touch(*(root / f"{name}.svg" for name in ("1F431", "1F436", "2764-FE0F-200D-1F525", "00A9-FE0F", "E000")))

    def render(path: Path, target: Path) -> Path:
        assert path.exists()
        return target

    monkeypatch.setattr(pictures, "render_svg", render)
    out = tmp_path / "out"
    assert list(openmoji_pictures("zh", out)) == [Captioned(out / "1F436.png", "dog face", "狗脸")]
    every = {picture.english: picture for picture in openmoji_pictures("zh", out, held_out_only=False)}
    assert every.keys() == {"cat face", "dog face", "heart on fire", "copyright"}
    assert every["heart on fire"] == Captioned(out / "2764-FE0F-200D-1F525.png", "heart on fire", "火上之心")


def test_the_plain_file_wins_over_its_variant(tmp_path: Path) -> None:
    touch(tmp_path / "2639.svg", tmp_path / "2639-FE0F.svg", tmp_path / "2640-FE0F.svg")
    files = pictures._by_codes(tmp_path, ".svg")
    assert {codes: path.name for codes, path in files.items()} == {(0x2639,): "2639.svg", (0x2640,): "2640-FE0F.svg"}


# Clip art


def svg_with(title: str = "", subjects: tuple[str, ...] = ()) -> str:
    items = "".join(f"<rdf:li>{subject}</rdf:li>" for subject in subjects)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f"<metadata><dc:title>{title}</dc:title><dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject></metadata></svg>"
    )


def test_clip_art_by_title_or_file_name(fake: Path) -> None:
    root = fake / "openclipart/usr/share/openclipart/svg"
    files = {
        "animals/birds/x.svg": svg_with("Grey_Owl-2", ("owl", "", "a very long subject indeed, longer than names")),
        "food_and_drink/red_apple_01.svg": svg_with(),
        "food/broken_pear.svg": "<svg",
        "animals/pup.svg": svg_with("Dog Face"),  # the name of a held-out emoji
        "shapes/star.svg": svg_with("star"),
        "food/12.svg": svg_with("12"),
    }
    for name, content in files.items():
        touch(root / name)
        (root / name).write_text(content, encoding="utf-8")
    found = {picture.path.relative_to(root).as_posix(): picture for picture in clip_art()}
    assert found.keys() == {"animals/birds/x.svg", "food_and_drink/red_apple_01.svg", "food/broken_pear.svg"}
    owl = found["animals/birds/x.svg"]
    assert (owl.name, owl.keywords, owl.group) == ("Grey Owl", ("owl", "birds", "animals"), "clipart:grey owl")
    assert found["food_and_drink/red_apple_01.svg"].name == "red apple"
    assert found["food_and_drink/red_apple_01.svg"].keywords == ("food and drink",)
    assert found["food/broken_pear.svg"].name == "broken pear"


# Photographs


def webp(size: tuple[int, int], mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(stream, "WEBP")
    return stream.getvalue()


def test_photographs_out_of_resource_files(fake: Path) -> None:
    first, second = webp((200, 160)), webp((150, 300))
    cut_out = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    cut_out.save(stream := io.BytesIO(), "WEBP")
    root = fake / "gcompris/usr/share/rcc"
    touch(root / "animals.rcc", root / "tools.rcc", root / "readme.txt")
    (root / "animals.rcc").write_bytes(
        b"qres\0\0" + webp((90, 200)) + b"\0\x12RIFF" + first + stream.getvalue() + b"RIFF"
    )
    (root / "tools.rcc").write_bytes(second)
    (root / "readme.txt").write_bytes(first)
    assert pictures.photographs() == [first, second]


# Stamps


def test_stamps_with_a_sentence_in_both_languages(fake: Path) -> None:
    root = fake / "tuxpaint-stamps/usr/share/tuxpaint/stamps"
    texts = {
        "food/apple.txt": "A red apple.\nde.utf8=Ein Apfel.\nzh_cn.utf8=红苹果。\nzh_tw.utf8=紅蘋果。\n",
        "food/pear.txt": "A pear.\nzh_CN.utf8=梨。",
        "food/plum.txt": "A plum.\nde.utf8=Eine Pflaume.\nzh_cn.utf8=\n",
        "food/empty.txt": "\nzh_cn.utf8=空",
        "food/alone.txt": "No picture.\nzh_cn.utf8=没有",
        "symbols/a.txt": "The letter A.\nzh_cn.utf8=字母A",
    }
    for name, content in texts.items():
        touch(root / name)
        (root / name).write_text(content, encoding="utf-8")
        if "alone" not in name:
            touch((root / name).with_suffix(".png"))
    assert tuxpaint_photos("zh_CN") == [
        Captioned(root / "food/apple.png", "A red apple.", "红苹果。"),
        Captioned(root / "food/pear.png", "A pear.", "梨。"),
    ]
    assert [photo.target for photo in tuxpaint_photos("de")] == ["Ein Apfel.", "Eine Pflaume."]
    assert tuxpaint_photos("fr") == []


# Rendering


@pytest.mark.parametrize(("width", "height", "expected"), [(9, 9, (64, 64)), (9, 36, (16, 64)), (36, 9, (64, 16))])
def test_the_longer_side_has_the_size(tmp_path: Path, width: int, height: int, expected: tuple[int, int]) -> None:
    pytest.importorskip("resvg_py")
    (tmp_path / "x.svg").write_text(SVG.format(width, height))
    path = render_svg(tmp_path / "x.svg", tmp_path / "out" / "x.png", size=64)
    image = Image.open(path).convert("RGBA")
    assert image.size == expected
    assert image.getpixel((1, 1)) == (255, 0, 0, 255)
    corner = (expected[0] - 1, expected[1] - 1)
    if width != height:
        assert image.getpixel(corner) == (255, 255, 255, 255)
        clear = render_svg(tmp_path / "x.svg", tmp_path / "out" / "clear.png", size=64, background=None)
        assert Image.open(clear).convert("RGBA").getpixel(corner)[3] == 0


@pytest.mark.parametrize("content", ["", "<svg", "no picture"])
def test_damaged_drawings_are_named(tmp_path: Path, content: str) -> None:
    pytest.importorskip("resvg_py")
    (tmp_path / "x.svg").write_text(content)
    with pytest.raises(DataError, match=r"x\.svg cannot be rendered"):
        render_svg(tmp_path / "x.svg", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_nothing_is_rendered_twice(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"rendered before")
    assert render_svg(tmp_path / "absent.svg", tmp_path / "x.png").read_bytes() == b"rendered before"


def test_a_missing_renderer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(DataError, match="needs resvg-py: pip install"):
        render_svg(tmp_path / "x.svg", tmp_path / "x.png")


def test_panics_of_the_renderer_are_errors_but_ctrl_c_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    def render(error: BaseException) -> None:
        def fail(**_: Any) -> None:
            raise error

        monkeypatch.setitem(__import__("sys").modules, "resvg_py", SimpleNamespace(svg_to_bytes=fail))
        render_svg(tmp_path / "x.svg", tmp_path / "x.png")

    with pytest.raises(DataError, match="out of bounds"):
        render(Panic("out of bounds"))
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            render(error())


# The packages themselves


@needs("openmoji", "cldr-annotations")
def test_every_held_out_emoji_has_a_picture() -> None:
    files = pictures._by_codes(pictures.fetch("openmoji") / "package/color/svg", ".svg")
    assert all(pictures._codes(symbol) in files for symbol in corpora.held_out_emoji())


@needs("openmoji", "cldr-annotations", *(package for package, *_ in EMOJI_VENDORS.values()))
def test_no_training_vendor_shows_a_held_out_emoji() -> None:
    names = {corpora.cldr_annotations("en")[symbol][0] for symbol in corpora.held_out_emoji()}
    for vendor in EMOJI_VENDORS:
        found = emoji_pictures(vendor)
        assert len(found) > 1300
        assert not names & {picture.name for picture in found}
        assert not {f"emoji:{symbol}" for symbol in corpora.held_out_emoji()} & {picture.group for picture in found}


@needs("tuxpaint-stamps")
def test_the_real_stamps() -> None:
    photos = tuxpaint_photos("zh_CN")
    assert len(photos) > 400
    assert all(photo.path.exists() for photo in photos)
    json.dumps([photo.target for photo in photos]).encode()  # no broken characters
    assert not any("\ufffd" in photo.english + photo.target for photo in photos)
