from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from tiny_pairs import write_shard
from trimtab.adapters.adapted import load
from trimtab.config import PairSource
from trimtab.data.captions import read_entries
from trimtab.data.shards import PictureFile
from trimtab.errors import DataError, ModelError, TrimtabError
from trimtab.serve import embed as module
from trimtab.serve.embed import embed
from trimtab.serve.items import items_of, open_input
from trimtab.serve.store import Embeddings


@pytest.fixture
def model(tiny_base: Callable[[str], Any]) -> Any:
    return tiny_base("clip")


@pytest.fixture
def photos(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for at in range(10):
        pictures[at % 5].rotate(at).save(folder / ("inner" if at % 2 else "") / f"图{at}.png")
    return folder


def read(folder: Path) -> tuple[list[dict[str, str]], np.ndarray]:
    parts = list(Embeddings.open(folder).blocks())
    return [row for table, _ in parts for row in table.to_pylist()], np.concatenate([one for _, one in parts])


def write_csv(path: Path, header: list[str], rows: list[tuple[str, ...]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


# Inputs


def test_a_folder_of_pictures(model: Any, photos: Path, tmp_path: Path) -> None:
    outcome = embed(photos, model, tmp_path / "e", shard_size=4)
    assert (outcome["count"], outcome["skipped"], outcome["shards"], outcome["of"]) == (10, 0, 3, "images")
    rows, vectors = read(tmp_path / "e")
    assert rows[0] == {"id": "图0.png", "image": "图0.png"}
    assert rows[-1]["id"] == "inner/图9.png"
    expected = model.encode_image([photos / row["image"] for row in rows])
    assert np.allclose(vectors, expected, atol=1e-6)
    about = json.loads((tmp_path / "e/embeddings.json").read_text())
    assert about["model"]["fingerprint"] == model.fingerprint
    assert about["input"]["root"] == str(photos)
    assert not (tmp_path / "e/skipped.csv").exists()


def test_what_a_folder_has_besides_is_listed(model: Any, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (photos / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    (photos / "inner/b.svg").write_text("<svg/>")
    (photos / "inner/here").symlink_to(photos)
    (photos / "there").symlink_to(tmp_path / "elsewhere")
    (photos / "notes.txt").write_text("")
    (photos / b"\xb0\xc4.png".decode("utf-8", "surrogateescape")).write_bytes(b"")
    outcome = embed(photos, model, tmp_path / "e")
    assert outcome["count"] == 10
    listed = {one["source"]: one["reason"] for one in outcome["skipped_items"]}
    assert set(listed) == {"a.heic", "inner/b.svg", "inner/here", "there", r"\udcb0\udcc4.png"}
    assert "not UTF-8" in listed[r"\udcb0\udcc4.png"]
    assert "HEIC" in listed["a.heic"]
    assert "SVG" in listed["inner/b.svg"]
    assert listed["inner/here"] == listed["there"] == "is a link to a folder, which is not followed: copy the folder"


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_of_pictures(model: Any, photos: Path, tmp_path: Path, suffix: str) -> None:
    names = ["图0.png", "图2.png", "图0.png"]
    path = photos / f"table.{suffix}"
    if suffix == "csv":
        write_csv(path, ["image", "text"], [(name, "一只猫") for name in names])
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps({"image": name, "text": "一只猫"}) + "\n" for name in names))
    else:
        pq.write_table(pa.table({"image": names, "text": ["一只猫"] * 3}), path)
    embed(path, model, tmp_path / "e", keep=("text",))
    rows, _ = read(tmp_path / "e")  # a picture with two captions is one picture
    assert rows == [{"id": name, "image": name, "text": "一只猫"} for name in names[:2]]


def test_a_table_with_ids_and_another_root(model: Any, photos: Path, tmp_path: Path) -> None:
    rows = [("a", "图0.png"), ("b", "图0.png")]
    path = write_csv(tmp_path / "table.tsv".replace("tsv", "csv"), ["sku", "photo"], rows)
    embed(path, model, tmp_path / "e", of="images", column="photo", id_column="sku", root=photos)
    assert [row["id"] for row in read(tmp_path / "e")[0]] == ["a", "b"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [(("a", "b", "a"), r"t\.csv, row 4: 'id' is 'a', as in row 2"), (("a", " ", "b"), r"t\.csv, row 3: 'id' is empty")],
)
def test_ids_that_name_no_row_or_two_are_refused(
    model: Any, photos: Path, tmp_path: Path, ids: Sequence[str], message: str
) -> None:
    path = write_csv(tmp_path / "t.csv", ["id", "image"], [(own, f"图{at}.png") for at, own in enumerate(ids)])
    with pytest.raises(DataError, match=message):
        embed(path, model, tmp_path / "e", root=photos)


def test_a_picture_that_is_replaced_or_mended_is_embedded_again(model: Any, photos: Path, tmp_path: Path) -> None:
    (photos / "图4.png").write_bytes(b"no picture")
    assert embed(photos, model, tmp_path / "e", shard_size=4)["skipped"] == 1
    mended, replaced = photos / "图4.png", photos / "图0.png"
    shutil.copy(photos / "图2.png", mended)
    shutil.copy(photos / "图2.png", replaced)
    outcome = embed(photos, model, tmp_path / "e", shard_size=4)
    assert (outcome["count"], outcome["skipped"]) == (10, 0)
    rows, vectors = read(tmp_path / "e")
    place = {row["id"]: at for at, row in enumerate(rows)}
    for name in ("图0.png", "图4.png"):
        assert np.allclose(vectors[place[name]], vectors[place["图2.png"]], atol=1e-6)


def test_texts(model: Any, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ["id", "text"], [("x", "a cat"), ("y", " "), ("z", "a dog")])
    outcome = embed(path, model, tmp_path / "e")
    assert outcome["of"] == "texts"
    assert outcome["skipped_items"] == [{"id": "y", "source": " ", "reason": "is empty"}]
    rows, vectors = read(tmp_path / "e")
    assert [row["id"] for row in rows] == ["x", "z"]
    assert np.allclose(vectors, model.encode_text(["a cat", "a dog"]), atol=1e-6)


def test_a_null_text_is_skipped_as_an_empty_one_is(model: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["x", "y"], "text": ["a cat", None]}), tmp_path / "t.parquet")
    outcome = embed(tmp_path / "t.parquet", model, tmp_path / "e")
    assert outcome["count"] == 1
    assert [one["reason"] for one in outcome["skipped_items"]] == ["is empty"]


def test_texts_of_a_table_with_pictures(model: Any, photos: Path, tmp_path: Path) -> None:
    path = write_csv(photos / "t.csv", ["image", "text"], [("图0.png", "a cat")])
    assert embed(path, model, tmp_path / "e", of="texts")["of"] == "texts"
    assert read(tmp_path / "e")[0] == [{"id": "2", "text": "a cat"}]  # the line


def test_the_column_of_texts_by_its_name(model: Any, photos: Path, tmp_path: Path) -> None:
    path = write_csv(photos / "t.csv", ["image", "text"], [("图0.png", "a cat"), ("图1.png", "a dog")])
    outcome = embed(path, model, tmp_path / "e", column="text")
    assert (outcome["of"], outcome["count"], outcome["skipped"]) == ("texts", 2, 0)


def pack(folder: Path, name: str, pictures: list[Image.Image], extra: dict[str, bytes] | None = None) -> Path:
    import io

    with tarfile.open(folder / name, "w") as archive:
        members = dict(extra or {})
        for at, picture in enumerate(pictures):
            stream = io.BytesIO()
            picture.save(stream, "png")
            members[f"{at:03d}.png"] = stream.getvalue()
            members[f"{at:03d}.txt"] = f"caption {at}".encode()
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return folder / name


def test_webdataset_shards(model: Any, pictures: list[Image.Image], tmp_path: Path) -> None:
    pack(tmp_path, "s-0.tar", pictures[:3])
    pack(tmp_path, "s-1.tar", pictures[3:], {"bad.jpg": b"no picture", "lone.txt": b"no picture beside it"})
    outcome = embed(f"{tmp_path}/s-{{0..1}}.tar", model, tmp_path / "e")
    assert (outcome["count"], outcome["skipped"], outcome["shards"]) == (5, 2, 2)
    rows, vectors = read(tmp_path / "e")
    assert rows[3] == {"id": "s-1.tar/000", "image": "s-1.tar/000.png"}  # both count from 0
    assert np.allclose(vectors, model.encode_image(pictures), atol=1e-6)
    reasons = {one["id"]: one["reason"] for one in outcome["skipped_items"]}
    assert "no picture" in reasons["s-1.tar/lone"]
    assert "not an image" in reasons["s-1.tar/bad"]
    embed(f"{tmp_path}/s-{{0..1}}.tar", model, tmp_path / "t", of="texts")
    assert [row["text"] for row in read(tmp_path / "t")[0][:3]] == ["caption 0", "caption 1", "caption 2"]


def test_captions_of_shards_that_are_missing(tmp_path: Path) -> None:
    records = {"a.json": b'{"caption": NaN}', "b.json": b'{"caption": null}', "c.json": b'{"caption": " x "}'}
    (work,) = open_input(pack(tmp_path, "s.tar", [], records), of="texts").works(10)
    items, _ = items_of(work, "texts")
    assert [item.source for item in items] == ["", "", "x"]


def test_captions_of_shards_are_those_that_adapting_reads(pictures: list[Image.Image], tmp_path: Path) -> None:
    records = [
        {"caption": "of JSON"}, {"text": "a text"}, {"caption": ["first", "second"]}, {"text": 7.5}, {"caption": {}},
    ]  # fmt: skip
    members = {f"{at:03d}.json": json.dumps(record).encode() for at, record in enumerate(records)}
    path = pack(tmp_path, "s.tar", pictures, members)
    (work,) = open_input(path, of="texts").works(10)
    items, _ = items_of(work, "texts")
    found = [item.source for item in items]
    assert found == ["of JSON", "a text", "first", "7.5", ""]
    read = [entry.texts[:1] for entry in read_entries(PairSource(str(path)))]
    assert [texts[0] if texts else "" for texts in read] == found


def test_a_shard_that_is_cut_off_gives_what_it_has(model: Any, pictures: list[Image.Image], tmp_path: Path) -> None:
    path = pack(tmp_path, "s.tar", pictures)
    path.write_bytes(path.read_bytes()[:-12_000])
    outcome = embed(path, model, tmp_path / "e")
    assert 0 < outcome["count"] < 5
    assert "what follows is lost" in outcome["skipped_items"][-1]["reason"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=4))
def test_texts_of_every_plane_come_back(model: Any, tmp_path: Path, texts: list[str]) -> None:
    assume(any(text.strip() for text in texts))
    for name in ("e", "t.jsonl"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for format in ("parquet", "npy"):
        embed(tmp_path / "t.jsonl", model, tmp_path / "e" / format, format=format)
        assert [row["text"] for row in read(tmp_path / "e" / format)[0]] == [text for text in texts if text.strip()]


# What cannot be used


def test_unreadable_pictures_are_listed(model: Any, photos: Path, tmp_path: Path) -> None:
    (photos / "a.jpg").write_bytes(b"")
    (photos / "b.jpg").write_bytes(b"<html>")
    rows = [(name, "x") for name in ("a.jpg", "图0.png", "b.jpg", "gone.png", "")]
    path = write_csv(photos / "t.csv", ["image", "note"], rows)
    outcome = embed(path, model, tmp_path / "e", shard_size=2)
    assert (outcome["count"], outcome["skipped"]) == (1, 4)
    with (tmp_path / "e/skipped.csv").open(encoding="utf-8") as stream:
        listed = list(csv.DictReader(stream))
    assert [one["id"] for one in listed] == ["a.jpg", "b.jpg", "gone.png", ""]
    assert "empty" in listed[0]["reason"]
    assert "web page" in listed[1]["reason"]
    assert "no such file" in listed[2]["reason"]


def test_an_input_without_anything_usable_is_refused(model: Any, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", ["caption"], [("a red car",), ("a blue car",)])
    with pytest.raises(DataError, match=r"t\.csv: none of the 2 images .*a red car.*--of texts"):
        embed(table, model, tmp_path / "out", column="caption")
    assert not (tmp_path / "out" / "embeddings.json").exists()
    assert embed(table, model, tmp_path / "texts", of="texts", column="caption")["count"] == 2


@pytest.mark.parametrize("members", [{}, {"a.cls": "1"}])
def test_shards_without_a_sample_are_refused(model: Any, tmp_path: Path, members: dict[str, Any]) -> None:
    path = write_shard(tmp_path / "s.tar", members)
    with pytest.raises(DataError, match=r"s\.tar: holds no images"):
        embed(path, model, tmp_path / "out")
    assert not (tmp_path / "out" / "embeddings.json").exists()


def test_blanks_alone_are_an_empty_table(model: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\u3000\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"t\.jsonl: is empty"):
        embed(tmp_path / "t.jsonl", model, tmp_path / "out", of="texts")


def test_bad_rows_show_before_the_model_is_loaded(photos: Path, tmp_path: Path) -> None:
    path = write_csv(photos / "t.csv", ["image"], [("图0.png",), ("../secret.png",)])
    with pytest.raises(DataError, match=r"row 3.*outside"):
        embed(path, "no-such-model", tmp_path / "e")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("input", "options", "words"),
    [
        ("gone.csv", {}, "no such file"),
        ("gone", {}, "no such input"),
        ("https://example.org/a.csv", {}, "neither is ever opened"),
        ("t.csv", {"column": "foto"}, "no column 'foto'; columns found: image, id"),
        ("t.csv", {"id_column": "sku"}, "no column 'sku'"),
        ("t.csv", {"keep": ("image",)}, "taken"),
        ("t.csv", {"root": "gone"}, "no such folder"),
        ("t.csv", {"of": "sounds"}, "images or texts"),
        (".", {"column": "image"}, "no table"),
        (".", {"of": "texts"}, "folder of pictures"),
        ("t.csv", {"shard_size": 0}, "at least 1"),
        ("t.csv", {"part": (3, 2)}, "first of four"),
        ("t.csv", {"format": "csv"}, "parquet or npy"),
        ("t.csv", {"dtype": "int8"}, "float32 or float16"),
        ("t.csv", {"engine": "spark"}, "local or ray"),
        ("empty", {}, "holds no images"),
    ],
)
def test_inputs_and_options_that_do_not_fit(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, input: str, options: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(photos)
    (photos / "empty").mkdir()
    write_csv(photos / "t.csv", ["image", "id"], [("图0.png", "1")])
    with pytest.raises(TrimtabError, match=words):
        embed(input, "no-such-model", tmp_path / "e", **options)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are any bytes on Linux alone")
@pytest.mark.parametrize("where", ["folder", "table", "root", "out", "model"])
def test_a_place_whose_name_is_no_utf8_is_refused_before_the_work(
    model: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    latin = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(photos, latin)
    for folder in (photos, latin):
        write_csv(folder / "t.csv", ["image"], [("图0.png",)])
    options: dict[str, Any] = {"root": latin} if where == "root" else {}
    source = {"folder": latin, "table": latin / "t.csv", "root": photos / "t.csv"}.get(where, photos)
    if where == "model":
        monkeypatch.setattr(model, "name", str(latin))
    monkeypatch.setattr(module, "make_shard", lambda *_: pytest.fail("embedded"))
    with pytest.raises(DataError, match=r"caf\\udce9.*: the name is not UTF-8: rename it"):
        embed(source, model, latin / "e" if where == "out" else tmp_path / "e", **options)


def test_an_unknown_model(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="unknown model"):
        embed(photos, "./no-such-model", tmp_path / "e")


def test_a_folder_is_read_from_where_it_was_opened(model: Any, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    embed(photos, model, "e")
    opened = Embeddings.open("e")
    monkeypatch.chdir(photos)
    assert sum(len(vectors) for _, vectors in opened.blocks()) == 10


# Going on


def test_finished_shards_are_not_repeated(model: Any, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    first = embed(photos, model, tmp_path / "e", shard_size=4)
    made: list[int] = []
    original = module.make_shard
    monkeypatch.setattr(module, "make_shard", lambda *a: (made.append(a[2].number), original(*a))[1])
    (tmp_path / "e/shard-00001.parquet").unlink()
    assert embed(photos, model, tmp_path / "e", shard_size=4) == first
    assert made == [1]
    shutil.copy(photos / "图0.png", photos / "龥.png")  # an input that grew: the others stay
    assert embed(photos, model, tmp_path / "e", shard_size=4)["count"] == 11
    assert made[1:] == [1, 2]  # from where the order changed
    assert len(read(tmp_path / "e")[1]) == 11
    shutil.rmtree(photos / "inner")
    assert embed(photos, model, tmp_path / "e", shard_size=4)["count"] == 6
    assert len(read(tmp_path / "e")[1]) == 6


def test_a_shard_whose_ids_are_missing_is_made_again(model: Any, photos: Path, tmp_path: Path) -> None:
    embed(photos, model, tmp_path / "e", shard_size=4, format="npy")
    rows = read(tmp_path / "e")[0]
    note = json.loads((tmp_path / "e/shard-00002.json").read_text())
    del note["columns_sha256"]  # as older ones are
    (tmp_path / "e/shard-00002.json").write_text(json.dumps(note))
    before = (tmp_path / "e/shard-00002.npy").stat().st_mtime_ns
    (tmp_path / "e/shard-00001.jsonl").unlink()
    embed(photos, model, tmp_path / "e", shard_size=4, format="npy")
    assert read(tmp_path / "e")[0] == rows
    assert (tmp_path / "e/shard-00002.npy").stat().st_mtime_ns == before


def test_replaced_and_repaired_pictures_are_embedded_again(
    model: Any, photos: Path, pictures: list[Image.Image], tmp_path: Path, monkeypatch: Any
) -> None:
    (photos / "图4.png").write_bytes(b"")
    assert embed(photos, model, tmp_path / "e", shard_size=4)["skipped"] == 1
    made: list[int] = []
    original = module.make_shard
    monkeypatch.setattr(module, "make_shard", lambda *a: (made.append(a[2].number), original(*a))[1])
    pictures[0].save(photos / "图4.png")
    assert embed(photos, model, tmp_path / "e", shard_size=4)["skipped"] == 0
    path = photos / "inner/图9.png"
    before = path.stat()
    path.write_bytes(path.read_bytes())  # of the same size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    embed(photos, model, tmp_path / "e", shard_size=4)
    assert made == [0, 2]


def test_a_replaced_webdataset_shard_is_embedded_again(
    model: Any, pictures: list[Image.Image], tmp_path: Path, monkeypatch: Any
) -> None:
    path = pack(tmp_path, "s.tar", pictures)
    first = embed(path, model, tmp_path / "e")
    os.utime(path, ns=(0, 0))
    made: list[int] = []
    original = module.make_shard
    monkeypatch.setattr(module, "make_shard", lambda *a: (made.append(a[2].number), original(*a))[1])
    assert embed(path, model, tmp_path / "e") == first
    assert made == [0]


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_shards_of_a_longer_input_are_removed(model: Any, photos: Path, tmp_path: Path, format: str) -> None:
    rows = [(f"{'inner/' if at % 2 else ''}图{at}.png",) for at in range(5)]
    path, out = write_csv(photos / "t.csv", ["image"], rows), tmp_path / "e"
    embed(path, model, out, shard_size=2, format=format)
    assert len(list(out.glob("shard-00002.*"))) > 1
    write_csv(path, ["image"], rows[:2])
    outcome = embed(path, model, out, shard_size=2, format=format)
    assert (outcome["count"], outcome["shards"]) == (2, 1)
    assert {path.stem for path in out.glob("shard-*")} == {"shard-00000"}
    assert len(Embeddings.open(out)) == 2


def test_a_killed_run_goes_on(tiny_folder: Callable[[str], Path], photos: Path, tmp_path: Path, model: Any) -> None:
    code = (
        "import os, signal\n"
        "from trimtab.serve import embed as m\n"
        "original = m.write_shard\n"
        "def stop(folder, number, *a, **k):\n"
        "    if number == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(folder, number, *a, **k)\n"
        "m.write_shard = stop\n"
        f"m.embed({str(photos)!r}, {str(tiny_folder('clip'))!r}, {str(tmp_path / 'e')!r}, shard_size=3)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    with pytest.raises(DataError, match="not finished"):
        Embeddings.open(tmp_path / "e")
    before = (tmp_path / "e/shard-00001.parquet").stat().st_mtime_ns
    assert embed(photos, model, tmp_path / "e", shard_size=3)["count"] == 10
    assert (tmp_path / "e/shard-00001.parquet").stat().st_mtime_ns == before
    embed(photos, model, tmp_path / "whole", shard_size=3)
    assert np.array_equal(read(tmp_path / "e")[1], read(tmp_path / "whole")[1])


def test_parts_make_a_whole(model: Any, photos: Path, tmp_path: Path) -> None:
    first = embed(photos, model, tmp_path / "e", shard_size=2, part=(1, 2))
    assert (first["shards"], first["unfinished_shards"]) == (5, 2)
    with pytest.raises(DataError, match="not finished"):
        Embeddings.open(tmp_path / "e")
    assert embed(photos, model, tmp_path / "e", shard_size=2, part=(2, 2))["unfinished_shards"] == 0
    assert len(read(tmp_path / "e")[1]) == 10


def test_another_job_is_refused(model: Any, tiny_base: Any, photos: Path, tmp_path: Path) -> None:
    embed(photos, model, tmp_path / "e", shard_size=4)
    with pytest.raises(DataError, match=r"another job \(shard_size differ"):
        embed(photos, model, tmp_path / "e", shard_size=5)
    with pytest.raises(DataError, match=r"another job \(model, preparing differ"):
        embed(photos, tiny_base("siglip"), tmp_path / "e", shard_size=4)
    with pytest.raises(DataError, match="other files"):
        embed(photos, model, photos)
    for text in ("{", "[" * 100_000):
        (tmp_path / "e/plan.json").write_text(text)
        with pytest.raises(DataError, match="damaged"):
            embed(photos, model, tmp_path / "e", shard_size=4)


def test_two_at_once_are_refused(model: Any, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def again(*_: Any) -> None:
        embed(photos, model, tmp_path / "e")

    monkeypatch.setattr(module, "make_shard", again)
    with pytest.raises(DataError, match="another process"):
        embed(photos, model, tmp_path / "e")


def test_a_full_disk_keeps_finished_shards(model: Any, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    original = pq.write_table

    def full(table: Any, where: Any, **options: Any) -> None:
        if "shard-00001" in str(where):
            raise OSError(errno.ENOSPC, "no space")
        original(table, where, **options)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(TrimtabError, match="disk is full"):
        embed(photos, model, tmp_path / "e", shard_size=4)
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "e").iterdir() if path.name.startswith("shard"))
    assert names == ["shard-00000.json", "shard-00000.parquet"]
    assert embed(photos, model, tmp_path / "e", shard_size=4)["count"] == 10


def test_progress_counts_items(model: Any, photos: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    embed(photos, model, tmp_path / "e", shard_size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_halves(model: Any, photos: Path, tmp_path: Path) -> None:
    embed(photos, model, tmp_path / "e", dtype="float16")
    schema = pq.read_schema(tmp_path / "e/shard-00000.parquet")
    assert schema.field("embedding").type == pa.list_(pa.float16(), model.embedding_dim)
    assert read(tmp_path / "e")[1].dtype == np.float32


def test_a_model_that_prepares_pictures_otherwise_is_another_job(
    model: Any, photos: Path, tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    other = Path(shutil.copytree(tiny_folder("clip"), tmp_path / "other"))
    path = other / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.5] * 3}))
    embed(photos, model, tmp_path / "e", shard_size=4)
    with pytest.raises(DataError, match=r"another job \(preparing differ"):
        embed(photos, other, tmp_path / "e", shard_size=4, device="cpu")
    reference = Embeddings.open(tmp_path / "e").about.model
    changed = load(other, device="cpu")
    assert reference.fits(model, "images")
    assert not reference.fits(changed, "images")
    assert reference.fits(changed, "texts")  # its tokenizer is the same

    plan = json.loads((tmp_path / "e/plan.json").read_text())
    del plan["preparing"]  # as earlier versions wrote it
    (tmp_path / "e/plan.json").write_text(json.dumps(plan))
    assert embed(photos, model, tmp_path / "e", shard_size=4)["count"] == 10
    assert replace(reference, image_input_digest="").fits(changed, "images")


def test_while_pictures_are_embedded_again_the_folder_is_not_whole(
    model: Any, photos: Path, tmp_path: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(photos, model, tmp_path / "e", shard_size=4)
    pictures[3].rotate(90).save(photos / "图0.png")

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "make_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        embed(photos, model, tmp_path / "e", shard_size=4)
    assert not (tmp_path / "e/embeddings.json").exists(), "its vectors are of other pictures"


def test_a_worker_refuses_a_model_that_is_not_the_job_s(model: Any, tiny_folder: Any) -> None:
    job = module.Job(str(tiny_folder("clip")), model.fingerprint, "out", "images", ("id",), device="cpu")
    job = replace(job, preparing=module.input_digest(model, "images"))
    assert job.load_model().fingerprint == model.fingerprint
    for other in ({"preparing": "x"}, {"fingerprint": "x"}):
        with pytest.raises(ModelError, match="another model on a worker"):
            replace(job, **other).load_model()


def test_batches_have_the_size_asked_for(model: Any, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    sizes: list[int] = []
    original = type(model).pixel_features

    def counted(self: Any, pixels: dict[str, Any]) -> Any:
        sizes.append(len(pixels["pixel_values"]))
        return original(self, pixels)

    monkeypatch.setattr(type(model), "pixel_features", counted)
    embed(photos, model, tmp_path / "e", batch_size=3)
    assert sizes == [3, 3, 3, 1]


def test_of_many_skipped_pictures_some_are_listed_and_all_counted(
    model: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.serve.store._LISTED", 2)
    for at in (1, 3, 5):
        (photos / f"inner/图{at}.png").write_bytes(b"nothing")
    outcome = embed(photos, model, tmp_path / "e")
    assert (outcome["count"], outcome["skipped"], len(outcome["skipped_items"])) == (7, 3, 2)


def test_what_could_not_be_read_for_a_moment_is_embedded_later(
    model: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Size and time of the file stay as they are."""
    opened = Path.open
    broken = {"图2.png"}

    def failing(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name in broken:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return opened(self, *arguments, **options)

    made: list[int] = []
    make_shard = module.make_shard
    monkeypatch.setattr(module, "make_shard", lambda *a: made.append(a[2].number) or make_shard(*a))
    monkeypatch.setattr(Path, "open", failing)
    (photos / "图8.png").write_bytes(b"no picture")
    outcome = embed(photos, model, tmp_path / "e", shard_size=2)
    assert outcome["skipped"] == 2
    assert embed(photos, model, tmp_path / "e", shard_size=2)["skipped"] == 2
    assert made == [0, 1, 2, 3, 4]  # not again as long as it is so
    broken.clear()
    assert embed(photos, model, tmp_path / "e", shard_size=2)["count"] == 9
    assert made == [0, 1, 2, 3, 4, 0]
    assert embed(photos, model, tmp_path / "e", shard_size=2)["skipped"] == 1
    assert len(made) == 6


def test_a_tar_file_that_could_not_be_read_for_a_moment(
    model: Any, pictures: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tmp_path, "s.tar", pictures[:3])
    read_bytes = PictureFile.read_bytes

    def failing(self: PictureFile) -> bytes:
        if self.name.endswith("001.png"):
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(self)

    monkeypatch.setattr(PictureFile, "read_bytes", failing)
    assert embed(tmp_path / "s.tar", model, tmp_path / "e")["skipped"] == 1
    monkeypatch.undo()
    assert embed(tmp_path / "s.tar", model, tmp_path / "e")["count"] == 3


def test_parts_that_begin_at_once(model: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_file = Path.is_file
    out = tmp_path / "e"

    def other_part_first(self: Path) -> bool:
        found = is_file(self)
        if self.name == "plan.json" and not found:
            monkeypatch.undo()
            embed(photos, model, out, shard_size=4, part=(1, 2))
        return found

    monkeypatch.setattr(Path, "is_file", other_part_first)
    assert embed(photos, model, out, shard_size=4, part=(2, 2))["count"] == 10


def test_what_a_killed_run_was_writing_is_deleted(model: Any, photos: Path, tmp_path: Path) -> None:
    embed(photos, model, tmp_path / "e", shard_size=4)
    names = [".shard-00000.parquet.a_b1.tmp", ".shard-00001.json.x.tmp", ".shard-00000.npy.y.tmp"]
    for name in names:
        (tmp_path / "e" / name).write_bytes(b"")
        os.utime(tmp_path / "e" / name, (0, 0))
    os.utime(tmp_path / "e" / names[2])  # another run, in other parts, is at it
    embed(photos, model, tmp_path / "e", shard_size=4)
    assert {path.name for path in (tmp_path / "e").glob("*.tmp")} == {names[2]}
