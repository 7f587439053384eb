"""Shards: read in place, nothing unpacked, nothing executed, damage survived."""

from __future__ import annotations

import contextlib
import io
import pickle
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tiny_pairs import picture_bytes, save_pictures, write_shard
from trimtab.data.images import ImageError, read_image
from trimtab.data.shards import PictureFile, expand_shards, find_damaged, picture_names, read_shard
from trimtab.errors import DataError


def whole(number: int) -> dict[str, bytes | str]:
    return {f"{number:03}.png": picture_bytes(number), f"{number:03}.txt": f"caption {number}"}


def test_samples_join_members_of_a_stem(tmp_path: Path) -> None:
    members = [
        ("a/001.jpg", picture_bytes(1, format="JPEG")),
        ("a/002.txt", "\ufeffsecond"),  # members of a sample need not be neighbours
        ("a/001.json", '{"caption": "first", "n": 1}'),
        ("a/002.webp", picture_bytes(2, format="WEBP")),
        ("b/001.PNG", picture_bytes(3)),
        ("b/001.cls", "7"),
        ("._a.png", "not a picture"),
    ]
    samples, damage = read_shard(write_shard(tmp_path / "s.tar", members))
    assert damage == ""
    assert list(samples) == ["a/001", "a/002", "b/001"]
    assert samples["a/001"].record == {"caption": "first", "n": 1}
    assert samples["a/002"].text == "second"
    assert (samples["b/001"].text, samples["b/001"].record) == ("", {})
    pictures = [sample.picture for sample in samples.values()]
    assert all(isinstance(picture, PictureFile) for picture in pictures)
    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(lambda picture: picture.read().size, pictures * 8))
    assert sizes == [(6, 5)] * 24
    assert pictures[2].read_bytes() == picture_bytes(3)
    assert str(pictures[1]).endswith("s.tar: 002.webp")
    assert pictures[1].name == "s.tar/a/002.webp"


def test_a_picture_of_a_phone_is_told_and_not_passed_over(tmp_path: Path) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    members = [("1.heic", heic), ("1.txt", "alone"), ("2.heic", heic), ("2.jpg", picture_bytes(2)), ("3.svg", "<svg/>")]
    samples, _ = read_shard(write_shard(tmp_path / "s.tar", members))
    found = {stem: sample.picture for stem, sample in samples.items()}
    assert all(isinstance(one, PictureFile) for one in found.values())
    damaged = find_damaged([one for one in found.values() if isinstance(one, PictureFile)])
    assert {one.name: reason.split(":")[0] for one, reason in damaged.items()} == {
        "s.tar/1.heic": "unsupported format HEIC",  # beside a JPEG it is not needed
        "s.tar/3.svg": "unsupported format SVG",
    }


def test_patterns_of_shards(tmp_path: Path) -> None:
    for name in ("s-008.tar", "s-009.tar", "s-010.tar", "t-1-1.tar", "t-1-2.tar", "t-2-1.tar", "t-2-2.tar"):
        (tmp_path / name).touch()
    assert [path.name for path in expand_shards(f"{tmp_path}/s-{{008..010}}.tar")] == [
        "s-008.tar",
        "s-009.tar",
        "s-010.tar",
    ]
    assert [path.name for path in expand_shards(f"{tmp_path}/t-{{1..2}}-{{1..2}}.tar")] == [
        "t-1-1.tar",
        "t-1-2.tar",
        "t-2-1.tar",
        "t-2-2.tar",
    ]
    assert [path.name for path in expand_shards(f"{tmp_path}/s-010.tar")] == ["s-010.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("pipe:cat /etc/hostname {0..1}.tar", "address or a command"),
        ("https://example.org/s-{0..1}.tar", "address or a command"),
        ("s-{3..1}.tar", r"\{3\.\.1\} must run upwards"),
        ("s-{0..999999999999}.tar", "at most 100,000 shards"),
        ("s-{000..002}.tar", "s-000.tar and 2 more of 3 shards: no such file"),
        ("s.tar", "s.tar: no such file"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        expand_shards(pattern)


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.txt", "/etc/evil.png", "../evil.bin"])
def test_members_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {**whole(0), name: picture_bytes(1)})
    with pytest.raises(DataError, match=r"s\.tar: member '.*evil.* leads out of the shard: pack it again"):
        read_shard(shard)
    assert [path.name for path in tmp_path.rglob("*")] == ["s.tar"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture_bytes(9))
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c.txt", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
    samples, _ = read_shard(tmp_path / "s.tar")
    assert "a link" in str(samples["a"].picture)
    assert "a link" in str(samples["b"].picture)
    assert "no plain file" in samples["c"].problem


class Planted:
    """Its pickle stops the test when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a pickle was executed",)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    planted = pickle.dumps(Planted())
    members = {"0.pyd": planted, "0.pkl": planted, "0.png": planted, "0.json": planted, "0.txt": "a caption"}
    samples, _ = read_shard(write_shard(tmp_path / "s.tar", members))
    sample = samples["0"]
    assert sample.text == "a caption"
    assert "not UTF-8" in sample.problem
    assert isinstance(sample.picture, PictureFile)
    for read in (sample.picture.read, lambda: read_image(sample.picture)):
        with pytest.raises(ImageError, match=r"s\.tar: 0\.png: not an image"):
            read()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "0.json is not JSON"),
        (b"[1]", "0.json is not a JSON object"),
        ("{'狗'}".encode("gb18030"), "0.json is not UTF-8"),
        (b"[" * 100_000, "0.json is not JSON"),
        (b" " * (1 << 20) + b"{}", "0.json is no plain file of at most 1 MB"),
    ],
    ids=["cut", "list", "gb18030", "deep", "long"],
)
def test_bad_records_are_named(content: bytes, problem: str, tmp_path: Path) -> None:
    samples, _ = read_shard(write_shard(tmp_path / "s.tar", {"0.json": content, "0.png": picture_bytes(0)}))
    assert problem in samples["0"].problem
    assert samples["0"].record == {}


def test_a_cut_shard_gives_what_comes_before(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {**whole(0), **whole(1), "002.png": picture_bytes(2, (300, 300), "BMP")})
    content = shard.read_bytes()
    for length, expected, damage in (
        (len(content), 3, ""),
        (content.rindex(b"002.png") + 600, 2, "cut off within '002.png'"),
        (content.rindex(b"002.png") + 100, 2, "cut off or damaged"),
        (content.rindex(b"002.png"), 2, "no end mark"),
    ):
        shard.write_bytes(content[:length])
        samples, found = read_shard(shard)
        assert (len(samples), damage in found) == (expected, True), found


def test_a_sample_with_a_member_twice_is_not_guessed(tmp_path: Path) -> None:
    # Two shards that count from 000, joined to one: the second's caption must not stand beside the first's picture.
    joined = [*whole(0).items(), *whole(1).items(), ("./000.png", picture_bytes(5)), ("000.txt", "another caption")]
    samples, damage = read_shard(write_shard(tmp_path / "s.tar", joined))
    assert damage == ""
    assert list(samples) == ["000", "001"]
    assert "000.png stands in the shard more than once" in str(samples["000"].picture)
    assert (samples["000"].text, samples["000"].problem) == ("", samples["000"].picture)
    assert isinstance(samples["001"].picture, PictureFile)
    assert samples["001"].text == "caption 1"


def test_a_repeated_member_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    name = b"\xb0\xc4.png".decode("utf-8", "surrogateescape")
    samples, _ = read_shard(write_shard(tmp_path / "s.tar", [(name, picture_bytes(0)), (name, picture_bytes(1))]))
    (sample,) = samples.values()
    assert "stands in the shard more than once" in sample.problem
    assert sample.problem.encode("utf-8")  # as digests and JSON do


def test_members_whose_names_are_not_utf8_are_read(tmp_path: Path) -> None:
    name = b"\xb0\xc4".decode("utf-8", "surrogateescape")
    members = {f"{name}.png": picture_bytes(1), f"{name}.txt": "a caption"}
    [(stem, sample)] = read_shard(write_shard(tmp_path / "s.tar", members))[0].items()
    assert isinstance(sample.picture, PictureFile)
    assert sample.picture.read().size == (6, 5)
    assert sample.text == "a caption"
    assert (stem + sample.picture.name + str(sample.picture)).encode()


def test_a_damaged_header_ends_the_shard(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {**whole(0), **whole(1)})
    content = bytearray(shard.read_bytes())
    content[content.index(b"001.png") + 20] ^= 0xFF  # the check sum no longer fits
    shard.write_bytes(content)
    samples, damage = read_shard(shard)
    assert list(samples) == ["000"]
    assert "damaged" in damage


@pytest.mark.parametrize("content", [b"", b"x", b"not a tar file" * 100, b"\x1f\x8b\x08" + b"\0" * 600], ids=range(4))
def test_what_is_no_tar_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"s\.tar: is not an uncompressed tar file"):
        read_shard(tmp_path / "s.tar")


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w:gz") as archive:
        info = tarfile.TarInfo("0.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(DataError, match="gunzip"):
        read_shard(tmp_path / "s.tar")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_239), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4))
def test_arbitrary_damage_gives_samples_or_a_data_error(changes: list[tuple[int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shard = write_shard(Path(folder) / "s.tar", {**whole(0), **whole(1), "2.json": '{"text": "x"}'})
        content = bytearray(shard.read_bytes())
        for position, replacement in changes:
            content[position : position + len(replacement)] = replacement
        shard.write_bytes(content)
        with contextlib.suppress(DataError):  # any other error, or no end, fails the test
            samples, _ = read_shard(shard)
            for sample in samples.values():
                if isinstance(sample.picture, PictureFile):
                    with contextlib.suppress(ImageError):
                        sample.picture.read()


def test_negative_sizes_do_not_loop(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {**whole(0), **whole(1)})
    content = bytearray(shard.read_bytes())
    start = content.index(b"001.png")
    header = content[start : start + 512]
    header[124:136] = b"\xff" * 10 + b"\xf8\x00"  # base 256, two's complement: -2048
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[start : start + 512] = header
    shard.write_bytes(content)
    samples, damage = read_shard(shard)
    assert list(samples) == ["000"]
    assert damage


def test_picture_files_are_equal_when_their_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture_bytes(1))
    assert PictureFile(path, "a.png") == PictureFile(path, "sub/a.png")
    assert PictureFile(path, "a.png") != PictureFile(path, "a.png", offset=0, length=5)
    assert PictureFile(path, "a.png").size() == len(picture_bytes(1))
    assert not PictureFile(tmp_path, "a.png").exists()
    assert not PictureFile(Path("x" * 5000), "a.png").exists()
    with pytest.raises(ImageError, match="no such file"):
        PictureFile(tmp_path / "none.png", "none.png").read()
    with pytest.raises(ImageError, match=r"none\.tar: a\.png: cannot be read"):
        PictureFile(tmp_path / "none.tar", "none.tar/a.png", offset=0, length=5).read()
    with pytest.raises(ImageError, match="has 300 MB, the limit is 256 MB"):
        PictureFile(path, "a.png", offset=0, length=300 << 20).read()


@settings(max_examples=30, deadline=None)
@given(st.integers(16, 20_000), st.floats(0, 0.999), st.sampled_from(["BM", "\xff\xd8\xff", "RIFF\n\r12WEBP"]))
def test_digests_follow_size_and_both_ends(size: int, where: float, magic: str) -> None:
    start = magic.encode("latin-1")
    content = bytearray(start + bytes(i * i % 251 for i in range(size - len(start))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(b"before" + content + b"behind")
        member = PictureFile(path, "x", offset=6, length=size)
        assert member.read_bytes() == content
        plain = PictureFile(Path(folder) / "y", "y")
        plain.path.write_bytes(content)
        digest = plain.digest()
        assert member.digest() == digest
        position = len(start) + int(where * (size - len(start)))
        content[position] ^= 1
        plain.path.write_bytes(content)
        assert (plain.digest() != digest) == (magic == "BM" or position < 4096 or position >= size - 4096)
        plain.path.write_bytes(content + b"x")
        assert plain.digest() != digest


@pytest.mark.parametrize("name", ["a.bmp", "a.ppm", "a.tif", "a.png", "a.jpg", "a.gif", "a.webp"])
def test_a_repainted_picture_has_another_digest(name: str, tmp_path: Path) -> None:
    picture = Image.new("RGB", (200, 200), "white")  # of one size in bytes where nothing is compressed
    digests = []
    for colour in ("red", "blue"):
        picture.paste(colour, (60, 60, 140, 140))
        picture.save(tmp_path / name)
        digests.append(PictureFile(tmp_path / name, name).digest())
    assert digests[0] != digests[1]


def test_damaged_pictures_are_found_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pictures(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    (tmp_path / "b.png").write_bytes(picture_bytes(1, (200, 200), "JPEG")[:-200])
    (tmp_path / "c.png").write_bytes(b"<html>404</html>")
    Image.new("RGB", (1001, 2)).save(tmp_path / "d.png")
    pictures = [PictureFile(tmp_path / f"{name}.png", f"{name}.png") for name in "abcd"]
    notes = tmp_path / "notes"
    found = find_damaged(pictures, notes)
    assert list(found) == pictures[1:]
    assert ["cut off" in found[pictures[1]], "web page" in found[pictures[2]]] == [True, True]
    assert found[pictures[3]] == "is too narrow (1001x2)"

    with monkeypatch.context() as patch:
        for way in ("check", "read"):
            patch.setattr(PictureFile, way, lambda self: pytest.fail("decoded again"))
        assert find_damaged(pictures, notes) == found
    (tmp_path / "c.png").write_bytes(picture_bytes(7))
    assert list(find_damaged(pictures, notes)) == [pictures[1], pictures[3]], "a changed file is looked at again"
    for note in notes.iterdir():
        note.write_text("[[99, 1]]")
    assert list(find_damaged(pictures, notes)) == [pictures[1], pictures[3]], "a damaged note is made anew"
    assert find_damaged([], notes) == {}


def test_a_check_that_fails_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: PictureFile) -> tuple[int, int]:
        raise ImageError(str(self), "cannot be scaled, as lossless JPEGs cannot")

    save_pictures(tmp_path, ["a.png", "b.png"])
    (tmp_path / "b.png").write_bytes(b"nothing")
    monkeypatch.setattr(PictureFile, "check", check)
    found = find_damaged(pictures := [PictureFile(tmp_path / name, name) for name in ("a.png", "b.png")])
    assert list(found) == pictures[1:]
    assert "not an image" in found[pictures[1]]


def test_picture_names() -> None:
    assert picture_names(["b.JPG", "a.png", ".a.png", "a.txt", "png", "c.jpeg"]) == ["a.png", "b.JPG", "c.jpeg"]
    assert picture_names(["a.jfif", "b.JPE", "c.avif", "d.pdf", "._e.png"]) == ["a.jfif", "b.JPE", "c.avif"]


def test_many_pictures_are_noted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.data.shards._NOTED", 2)
    names = ["a.png", "b.png", "c.png", "d.png", "e.png"]
    save_pictures(tmp_path, names)
    (tmp_path / "e.png").write_bytes(b"nothing")
    pictures = [PictureFile(tmp_path / name, name) for name in names]
    original, told, decoded = PictureFile.check, [], []

    def check(self: PictureFile) -> tuple[int, int]:
        if self.name == "d.png" and "d.png" not in decoded:
            decoded.append("d.png")
            raise KeyboardInterrupt
        decoded.append(self.name)
        return original(self)

    monkeypatch.setattr(PictureFile, "check", check)
    with pytest.raises(KeyboardInterrupt):
        find_damaged(pictures, tmp_path / "notes", lambda *at: told.append(at))
    assert told == [(2, 5)]
    found = find_damaged(pictures, tmp_path / "notes", lambda *at: told.append(at))
    assert list(found) == pictures[4:]
    assert told[1:] == [(2, 5), (4, 5), (5, 5)]
    assert sorted(decoded).count("a.png") == 1, "what the first run has noted is not decoded again"
