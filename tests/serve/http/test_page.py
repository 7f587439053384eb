"""The web page in a headless Chromium, against a server on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headless_browser import CHROMIUM, DRIVER, Browser, driver
from tiny_server import Site, StubIndex, png
from trimtab.serve.http.service import Service
from trimtab.serve.http.thumbnails import Thumbnails

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]

# Names that would do harm if they were taken for markup; "/" cannot stand in a file's name.
EVIL = "<img src=x onerror='window.broken=1'>.png"
COLORS = {"红苹果.png": (200, 30, 30), "green.png": (30, 200, 30), EVIL: (30, 30, 200)}
KEY = "a-key"
ENTER, ESCAPE, ARROW_RIGHT = "\ue007", "\ue00c", "\ue014"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, color in COLORS.items():
        (folder / name).write_bytes(png(color))
    return folder


@pytest.fixture(scope="module")
def sites(tiny_base: Callable[[str], Any], folder: Path) -> Iterator[dict[str, str]]:
    model = tiny_base("clip")
    index = StubIndex(model.encode_image([folder / name for name in COLORS]), list(COLORS), model.fingerprint)
    thumbnails = Thumbnails(index.find, folder)
    open_site = Site(
        Service(model, name="tiny", classes=["<b>cat</b>", "狗"], index=index, thumbnails=thumbnails), None
    )
    locked = Site(Service(model, name="locked", index=index, thumbnails=thumbnails), KEY)
    bare = Site(Service(model, name="bare"), None)
    yield {"open": open_site.address, "locked": locked.address, "bare": bare.address}
    for site in (open_site, locked, bare):
        site.close()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with driver() as address:
        browser = Browser(address, tmp_path_factory.mktemp("profile"))
        yield browser
        browser.close()


def opened(window: Browser, address: str) -> Browser:
    window.open("about:blank")  # otherwise a change of what follows # alone loads nothing
    window.open(address)
    window.complaints()
    return window


def names(window: Browser) -> list[str]:
    found = window.run("return [...document.querySelectorAll('.hit .name')].map((one) => one.textContent)")
    return list(found)


def test_who_types_sees_pictures(window: Browser, sites: dict[str, str]) -> None:
    opened(window, sites["open"])
    window.wait(lambda: window.text("#model") == "tiny")
    assert window.text("#examples").isascii()  # the model reads no Chinese
    window.type("#query", "红苹果")
    window.wait(lambda: window.count(".hit .frame img") == 3)
    assert sorted(names(window)) == sorted(COLORS)
    assert "3 pictures in " in window.text("#status")
    assert window.run("return location.hash").startswith("#q=%E7%BA%A2")
    assert window.run("return [...document.querySelectorAll('.hit img')].every((one) => one.naturalWidth === 40)")
    assert window.complaints() == []


def test_nothing_of_the_server_is_taken_for_markup(window: Browser, sites: dict[str, str]) -> None:
    opened(window, sites["open"] + "#q=a")
    window.wait(lambda: window.count(".hit .frame img") == 3)
    assert EVIL in names(window)
    window.drop(png(), "<b>.png", "image/png")
    window.wait(lambda: window.count("#labels li") == 2)
    assert window.run("return window.broken") is None
    assert window.count("#labels b b") == 0
    assert "<b>cat</b>" in window.text("#labels")


def test_who_drops_a_picture_sees_names_and_similar_pictures(window: Browser, sites: dict[str, str]) -> None:
    opened(window, sites["open"])
    window.wait(lambda: window.text("#model") == "tiny")
    window.drop(png(COLORS["green.png"]), "any.png", "image/png")
    window.wait(lambda: window.count("#labels li") == 2 and window.count(".hit") == 3)
    assert names(window)[0] == "green.png"
    assert "3 similar pictures" in window.text("#status")
    assert "out of 2 names" in window.text("#label-status")
    shares = window.run(
        "return [...document.querySelectorAll('#labels .pair b')].map((one) => parseFloat(one.textContent))"
    )
    assert sum(shares) == pytest.approx(100, abs=0.3)
    window.run("const area = document.getElementById('classes'); area.value = '猫，狗、鸟';"
               "area.dispatchEvent(new Event('change'))")  # fmt: skip
    window.wait(lambda: window.count("#labels li") == 3)
    window.run("const area = document.getElementById('classes'); area.value = 'قطة، كلب؛ طائر; سمكة；猫';"
               "area.dispatchEvent(new Event('change'))")  # fmt: skip
    window.wait(lambda: window.count("#labels li") == 5)


def test_what_is_no_picture_is_told(window: Browser, sites: dict[str, str]) -> None:
    opened(window, sites["open"])
    window.wait(lambda: window.text("#model") == "tiny")
    window.drop(b"hello", "a.txt", "text/plain")
    window.wait(lambda: "not a picture" in window.text("#label-status"))
    window.drop(b"hello", "a.png", "image/png")
    window.wait(lambda: "not an image of a supported format" in window.text("#label-status"))
    assert window.count(".hit") == 0


def test_the_keyboard_suffices(window: Browser, sites: dict[str, str]) -> None:
    opened(window, sites["open"])
    window.wait(lambda: window.text("#model") == "tiny")
    window.run("document.activeElement.blur()")
    window.press("/")
    assert window.run("return document.activeElement.id") == "query"
    window.press("a")
    window.press(ENTER)
    window.wait(lambda: window.count(".hit .frame img") == 3)
    window.run("document.querySelector('.frame').focus()")
    window.press(ARROW_RIGHT)
    assert window.run("return [...document.querySelectorAll('.frame')].indexOf(document.activeElement)") == 1
    window.press(ENTER)
    window.wait(lambda: "similar" in window.text("#status"))
    window.run("document.getElementById('query').focus()")
    window.press("b")
    window.wait(lambda: "pictures in" in window.text("#status"))
    window.press(ESCAPE)
    window.wait(lambda: window.count(".hit") == 0)


def test_an_input_method_is_waited_for(window: Browser, sites: dict[str, str]) -> None:
    opened(window, sites["open"])
    window.wait(lambda: window.text("#model") == "tiny")
    window.run(
        """
        window.asked = 0;
        const fetched = window.fetch;
        window.fetch = (...given) => { window.asked += 1; return fetched(...given); };
        const query = document.getElementById("query");
        query.dispatchEvent(new CompositionEvent("compositionstart"));
        query.value = "hong";
        query.dispatchEvent(new InputEvent("input"));
        """
    )
    window.run("return new Promise((done) => setTimeout(done, 600))")
    assert window.run("return window.asked") == 0
    window.run("const query = document.getElementById('query'); query.value = '红';"
               "query.dispatchEvent(new CompositionEvent('compositionend'))")  # fmt: skip
    window.wait(lambda: window.count(".hit") == 3)


def test_language_and_theme(window: Browser, sites: dict[str, str]) -> None:
    opened(window, sites["open"] + "#q=a")
    window.wait(lambda: "3 pictures in" in window.text("#status"))
    window.run("document.getElementById('language').click()")
    assert "3 张图片" in window.text("#status")
    assert window.run("return document.documentElement.lang") == "zh-CN"
    window.run("document.getElementById('theme').click()")
    first = window.run("return getComputedStyle(document.body).backgroundColor")
    opened(window, sites["open"])
    assert window.run("return getComputedStyle(document.body).backgroundColor") == first
    window.run("localStorage.clear()")


def test_a_locked_server_asks_for_its_key(window: Browser, sites: dict[str, str]) -> None:
    opened(window, sites["locked"])
    window.wait(lambda: not window.run("return document.getElementById('key-form').hidden"))
    window.drop(png(COLORS["green.png"]), "any.png", "image/png")  # before the key: it waits
    window.wait(lambda: not window.run("return document.getElementById('preview').hidden"))
    window.type("#key", "wrong")
    window.press(ENTER)
    window.wait(lambda: "API key" in window.text("#status"))
    window.run("document.getElementById('key').value = ''")
    window.type("#key", KEY)
    window.press(ENTER)
    window.wait(lambda: window.text("#model") == "locked")
    window.wait(lambda: window.count(".hit") == 3 and names(window)[0] == "green.png")
    assert all("401" in one for one in window.complaints())
    window.type("#query", "a")
    window.wait(lambda: window.count(".hit .frame img") == 3)


def test_without_an_index_pictures_are_named(window: Browser, sites: dict[str, str]) -> None:
    opened(window, sites["bare"])
    window.wait(lambda: "no index" in window.text("#status"))
    assert window.run("return document.getElementById('search-form').hidden")
    window.drop(png(), "a.png", "image/png")
    window.wait(lambda: "Write some names" in window.text("#label-status"))
    window.type("#classes", "猫, 狗")
    window.run("document.getElementById('classes').dispatchEvent(new Event('change'))")
    window.wait(lambda: window.count("#labels li") == 2)
    assert window.complaints() == []
