"""The examples run, on tiny models."""

from __future__ import annotations

import importlib.util
import io
import urllib.error
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tiny_adapted import save_tiny_adapted
from tiny_links import save_tiny_domain
from trimtab.serve.embed import embed
from trimtab.towers.text_encoder import TextEncoder

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for at, picture in enumerate(pictures):
        picture.save(folder / ("inner" if at % 2 else "") / f"{at}.png")
    return folder


def test_embed_and_compare(
    tiny_folder: Callable[[str], Path], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [str(path) for path in sorted(photos.glob("*.png"))]
    example("embed_and_compare").main(
        [*pictures, "--model", str(tiny_folder("clip")), "--text", "a cat", "--text", "a dog"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(pictures)
    assert lines[0].startswith("0.png: a ")


def test_adapt_your_pairs(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("adapt_your_pairs")
    # Words that the tiny tokenizer knows.
    nouns, patterns = "猫狗鸟花茶椅熊车", ("{}", "一只{}", "{}的照片", "红色{}", "小{}", "旧{}", "两个{}", "黑{}")
    module.THINGS = {noun: f"thing {at}" for at, noun in enumerate(nouns)}
    module.SENTENCES = {pattern: f"pattern {at} of {{}}" for at, pattern in enumerate(patterns)}
    out = tmp_path / "runs" / "mine"
    arguments = ["--base", str(tiny_folder("clip")), "--student", str(tiny_folder("bert")), "--epochs", "1"]
    module.main([*arguments, "--out", str(out)])
    assert (out / "adapter.safetensors").is_file()
    assert "translation match on pairs kept aside" in capsys.readouterr().out


def test_domain(tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("domain")
    # Words that the tiny tokenizer knows.
    module.BRANDS = {"cat": ("crimson", "disc"), "dog": ("seagreen", "bars"), "car": ("royalblue", "disc")}
    module.TEMPLATE = "a photo of a {}"
    out = tmp_path / "runs" / "tea"
    arguments = ["--base", str(tiny_folder("clip")), "--pictures", "6", "--epochs", "2", "--out", str(out)]
    module.main(arguments)
    assert (out / "adapter.safetensors").is_file()
    told = capsys.readouterr().out
    assert told.count("of 30 new packets get their brand") == 2
    assert Path(told.rsplit(": ", 1)[1].strip()).is_file()


def test_chinese_search(
    tiny_base: Callable[[str], Any],
    tiny_folder: Callable[[str], Path],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    student = TextEncoder.load(tiny_folder("bert"), device="cpu")
    folder = save_tiny_adapted(tmp_path / "adapted", tiny_base("clip"), student)
    (photos / "damaged.jpg").write_bytes(b"no picture")
    search = example("chinese_search").main
    search([str(folder), str(photos), "一只猫", "a dog", "--top", "3"])
    first = capsys.readouterr()
    found = first.out.strip().splitlines()
    assert len(found) == 2 * (1 + 3)
    assert "left out" in first.err
    assert list((tmp_path / "cache" / "example-search").glob("*.npz"))
    search([str(folder), str(photos), "一只猫", "a dog", "--top", "3"])
    assert capsys.readouterr().out.strip().splitlines() == found  # from the cache
    with pytest.raises(SystemExit, match="holds no pictures"):
        search([str(folder), str(tmp_path / "cache"), "猫"])


def test_serve_client(
    tiny_base: Callable[[str], Any], photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_server import Site, StubIndex
    from trimtab.serve.http.service import Service

    monkeypatch.setenv("TRIMTAB_KEY", "key")
    model = tiny_base("clip")
    index = StubIndex(model.encode_image([photos / "0.png"]), ["0.png"], model.fingerprint)
    client = example("serve_client")
    site = Site(Service(model, name="tiny", index=index), "key")
    try:
        picture = ["--picture", str(photos / "0.png"), "--classes", "猫", "狗"]
        client.main(["一只猫", *picture, "--address", site.address])
        with pytest.raises(SystemExit, match=r"422: .*empty"):
            client.main(["", "--address", site.address])
    finally:
        site.close()
    lines = capsys.readouterr().out
    assert "model tiny, 12 dimensions" in lines
    assert "cosine of 一只猫 and 0.png" in lines
    assert "%  猫" in lines
    with pytest.raises(SystemExit, match="cannot be reached"):
        client.main(["a", "--address", site.address])


def test_serve_client_reads_errors_in_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    client = example("serve_client")

    def busy(*_: Any, **__: Any) -> Any:
        raise urllib.error.HTTPError("http://x", 503, "Busy", Message(), io.BytesIO(b"Service Unavailable"))

    monkeypatch.setattr(client.urllib.request, "urlopen", busy)
    with pytest.raises(SystemExit, match="503: Service Unavailable"):
        client.main(["a"])


def test_serve_client_says_what_was_too_large(tiny_base: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_server import Site
    from trimtab.serve.http.service import Service

    client = example("serve_client")
    site = Site(Service(tiny_base("clip"), name="tiny"))
    try:
        with pytest.raises(SystemExit, match="413: the request is larger than 32 MiB"):
            client.Client(site.address).ask("/v1/embeddings", {"input": "a" * (40 << 20)})
    finally:
        site.close()

    def ended(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError(ConnectionResetError("reset"))

    monkeypatch.setattr(client.urllib.request, "urlopen", ended)
    with pytest.raises(SystemExit, match=r"reset.*3\.0 MiB may be too large"):
        client.Client("http://x").ask("/v1/embeddings", {"input": "a" * (3 << 20)})
    with pytest.raises(SystemExit, match="cannot be reached"):
        client.Client("http://x").ask("/v1/models")


def test_prompt(tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for at, name in enumerate(("cat", "dog")):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(5):
            colour = (200 * at, 40 * number, 90)
            Image.new("RGB", (40, 40), colour).save(tmp_path / "classes" / name / f"{number}.png")
    picture, out = str(tmp_path / "classes" / "cat" / "0.png"), tmp_path / "runs" / "mine"
    main = example("prompt").main
    main([str(tmp_path / "classes"), picture, "--base", str(tiny_folder("clip")), "--out", str(out)])
    assert (out / "adapter.safetensors").is_file()
    told = capsys.readouterr().out
    assert "named right in validation" in told
    assert picture in told
    with pytest.raises(SystemExit):
        main([])
    assert "CLASS_FOLDER" in capsys.readouterr().err


def test_compose(
    tiny_base: Callable[[str], Any],
    tiny_folder: Callable[[str], Path],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tiny_base("clip")
    language = save_tiny_adapted(tmp_path / "zh", base, TextEncoder.load(tiny_folder("bert"), device="cpu"))
    domain = save_tiny_domain(tmp_path / "shop", base)
    folders = [str(language), str(domain), "--base", base.name]
    example("compose").main([*folders, "--image", str(photos / "0.png"), "一只猫", "一只狗"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("domain and language on ")
    assert [line.split(":")[0] for line in lines[1:]] == ["alpha 0.0", "alpha 0.5", "alpha 1.0"]


def test_qdrant_upload(
    tiny_base: Callable[[str], Any], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("qdrant_client")
    model = tiny_base("clip")
    embed(photos, model, tmp_path / "e", shard_size=2)
    example("qdrant_upload").main([str(tmp_path / "e"), "a cat", "--model", model.name])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 points in e"
    assert lines[1] == "a cat"
    assert sum(".png" in line for line in lines) == 5
