"""Files that cost far more to decode than their bytes and pixels tell, and those that only look so."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiny_pictures import jpeg_segment, many_scans, tiled_tiff
from trimtab.data.bombs import count_scans, tile_of_tiff
from trimtab.data.images import ImageError, check_image, read_image

COMMENT, APP1 = 0xFE, 0xE1


def jpeg(mode: str = "RGB", format: str = "JPEG", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format, **options)
    return stream.getvalue()


def scans(data: bytes, most: int = 1000) -> int:
    return count_scans(io.BytesIO(data), 0, most)


def with_segment(data: bytes, marker: int, content: bytes) -> bytes:
    """Right behind the start of the image."""
    return data[:2] + jpeg_segment(marker, content) + data[2:]


def one_channel_a_scan(times: int) -> bytes:
    """A sequential JPEG in colours whose channels come one after the other, the first one so many times."""
    colours, grey = jpeg(subsampling=0, quality=75), jpeg("L", quality=75)
    head, content = colours[: colours.index(b"\xff\xda")], grey[grey.index(b"\xff\xda") + 10 : -2]
    parts = [jpeg_segment(0xDA, bytes([1, channel, 0, 0, 63, 0])) + content for channel in (1,) * times + (2, 3)]
    return head + b"".join(parts) + b"\xff\xd9"


def test_many_scans_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = jpeg("L", progressive=True)
    assert read_image(many_scans(usual, 100 - scans(usual))).size == (64, 48)
    bomb = many_scans(usual, 101 - scans(usual))
    (tmp_path / "bomb.jpg").write_bytes(bomb)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("was decoded"))
    with pytest.raises(ImageError, match="scans: save it again"):
        check_image(bomb)
    for source in (bomb, tmp_path / "bomb.jpg", Image.open(io.BytesIO(bomb))):
        with pytest.raises(ImageError, match="takes too long to decode safely: more than 100 scans: save it again"):
            read_image(source)


def test_scans_of_sequential_pictures_count() -> None:
    assert scans(one_channel_a_scan(1)) == 3
    assert read_image(one_channel_a_scan(3)).size == (64, 48)
    with pytest.raises(ImageError, match="scans"):
        read_image(one_channel_a_scan(99))


def test_scans_of_the_first_of_several_pictures_count() -> None:
    other = Image.new("RGB", (64, 48))
    pair = jpeg(format="MPO", save_all=True, append_images=[other])
    opened = Image.open(io.BytesIO(pair))
    assert opened.format == "MPO"
    assert np.array_equal(np.asarray(read_image(pair)), np.asarray(opened))
    opened.seek(1)
    assert np.array_equal(np.asarray(read_image(opened)), np.asarray(other)), "the picture that the caller chose"
    head = pair.index(b"\xff\xda")
    first = one_channel_a_scan(99)
    bomb = pair[:head] + first[first.index(b"\xff\xda") :]
    with pytest.raises(ImageError, match="scans"):
        read_image(bomb)


@pytest.mark.parametrize("marker", [COMMENT, APP1])
def test_an_end_inside_metadata_hides_nothing(marker: int) -> None:
    bomb = with_segment(many_scans(jpeg("L", progressive=True), 100), marker, b"\xff\xd9" * 20)
    with pytest.raises(ImageError, match="scans"):
        read_image(bomb)


def test_scans_in_metadata_and_behind_the_picture_do_not_count() -> None:
    usual = jpeg(progressive=True)
    expected = np.asarray(read_image(usual))
    other = many_scans(jpeg("L", progressive=True), 200)
    for data in (
        with_segment(usual, APP1, other[:60_000]),
        with_segment(usual, COMMENT, b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 500),
        usual + other,
        usual + b"\xff\xda" * 5000,
    ):
        assert scans(data) == scans(usual)
        assert np.array_equal(np.asarray(read_image(data)), expected)


def test_a_picture_that_lost_its_end_is_not_counted_on_into_what_follows() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 1 << 24, dtype=np.uint8).tobytes()
    usual = jpeg()[:-2]
    assert noise.count(b"\xff\xda") > 100
    assert scans(usual + noise) < 5
    assert scans(usual + many_scans(jpeg("L", progressive=True), 200)) == 1


def test_restarts_and_fillers_are_no_scans() -> None:
    usual = jpeg(restart_marker_blocks=1)
    assert usual.count(b"\xff\xd0") > 0
    assert scans(usual) == 1
    assert scans(many_scans(usual, 4)) == 5
    assert scans(usual.replace(b"\xff\xda", b"\xff\xff\xff\xda")) == 1


@pytest.mark.parametrize("distance", range(-14, 3))
def test_markers_across_blocks_count(distance: int) -> None:
    bomb = many_scans(jpeg("L", progressive=True), 200)
    room = (1 << 16) + distance - bomb.index(b"\xff\xda")
    for padded in (
        with_segment(with_segment(bomb, COMMENT, bytes(30_000)), COMMENT, bytes(room - 30_008)),
        bomb[:2] + bytes(room) + bomb[2:],
    ):
        assert padded.index(b"\xff\xda") == (1 << 16) + distance
        assert scans(padded) == scans(bomb)


def test_the_end_of_metadata_and_what_follows_make_no_marker() -> None:
    bomb = many_scans(jpeg("L", progressive=True), 200)
    block = 1 << 16
    comments = jpeg_segment(COMMENT, bytes(block // 2 - 4)) + jpeg_segment(COMMENT, bytes(block // 2 - 5) + b"\xff")
    assert len(comments) == block
    assert scans(bomb[:2] + comments + b"\xd9" + bomb[2:]) == scans(bomb)


def test_what_is_cut_off_has_the_scans_that_are_there() -> None:
    bomb = many_scans(jpeg("L", progressive=True), 10)
    found = [scans(bomb[:end]) for end in range(2, len(bomb))]
    assert found == sorted(found)
    assert found[-1] == scans(bomb)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": ">"},
        {"kind": "H"},
        {"kind": "H", "order": ">"},
        {"kind": "Q"},
        {"big": True},
        {"big": True, "kind": "Q"},
    ],
    ids=str,
)
def test_huge_tiles_are_refused_before_they_are_decoded(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tiled_tiff((64, 64), **options)
    assert np.asarray(read_image(usual)).shape == (64, 64, 3)
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", lambda image: pytest.fail("was decoded"))
    with pytest.raises(ImageError, match=r"too large to decode safely: tiles of 32768x16384 pixels.*save it again"):
        read_image(tiled_tiff((32768, 16384), **options))


def test_a_size_that_is_told_twice_counts_as_the_larger() -> None:
    for sizes in (((64, 64), (16384, 16384)), ((16384, 16384), (64, 64))):
        with pytest.raises(ImageError, match="tiles of 16384x16384"):
            read_image(tiled_tiff(*sizes))


def test_tiles_up_to_the_limit_are_decoded() -> None:
    assert read_image(tiled_tiff((128, 64)), max_pixels=128 * 64).size == (64, 64)
    with pytest.raises(ImageError, match="tiles of 128x64"):
        read_image(tiled_tiff((128, 64)), max_pixels=128 * 64 - 1)


def test_a_tiff_in_strips_has_no_tiles() -> None:
    stream = io.BytesIO()
    Image.new("L", (64, 64)).save(stream, "TIFF")
    opened = Image.open(stream)
    assert tile_of_tiff(stream, opened.tag_v2.offset) == (0, 0)  # type: ignore[attr-defined]


def test_a_caller_s_opened_tiff_is_looked_at_too() -> None:
    bomb = Image.open(io.BytesIO(tiled_tiff((32768, 16384))))
    with pytest.raises(ImageError, match="tiles"):
        read_image(bomb)
