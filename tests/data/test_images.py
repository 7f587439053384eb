from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from tiny_pictures import bmp_with_alpha, tiff_of_12_bits
from trimtab.data import images
from trimtab.data.images import ImageError, SkippedImages, check_image, read_image, read_images
from trimtab.errors import DataError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def noise(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).convert(mode)


def halves() -> Image.Image:
    """Left half red, right half blue; 16 wide, 8 high."""
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (8, 0, 16, 8))
    return image


def png_header(width: int, height: int) -> bytes:
    """A whole PNG of a few bytes that claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM"])
def test_formats_on_the_list_decode_to_rgb(format: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.bin"  # the content tells the format, not the name
    path.write_bytes(encoded(halves(), format))
    for source in (path, str(path), path.read_bytes()):
        image = read_image(source)
        assert (image.mode, image.size) == ("RGB", (16, 8))
        assert np.abs(np.asarray(image)[4, 2].astype(int) - RED).max() < 60


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_are_refused(format: str, share: float) -> None:
    data = encoded(noise((64, 48)), format)
    with pytest.raises(ImageError) as caught:
        read_image(data[: int(len(data) * share)])
    assert caught.value.reason


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_truncated_compressed_tiff_is_refused(compression: str) -> None:
    data = encoded(noise((64, 48)), "TIFF", compression=compression)
    # The directory of tags often stands at the end, so damage the pixels rather than cut them off.
    broken = bytearray(data)
    broken[len(data) // 4 : len(data) // 2] = b"\xff" * (len(data) // 2 - len(data) // 4)
    for bad in (data[: len(data) // 2], bytes(broken) if compression != "packbits" else b"II*\0"):
        with pytest.raises(ImageError):
            read_image(bad)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "F", "I"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    direct = mode in ("PA", "LAB", "HSV")
    source = Image.new(mode, (16, 8)) if direct else noise((16, 8), "L").convert(mode)
    image = read_image(source)
    assert (image.mode, image.size) == ("RGB", (16, 8))


def test_cmyk_jpeg_keeps_its_colours() -> None:
    image = read_image(encoded(halves().convert("CMYK"), "JPEG", quality=95))
    pixels = np.asarray(image).astype(int)
    assert np.abs(pixels[4, 3] - RED).max() < 12
    assert np.abs(pixels[4, 12] - BLUE).max() < 12


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_ramp_keeps_its_levels(format: str) -> None:
    ramp = np.linspace(0, 65535, 512).astype(np.uint16)[None].repeat(4, axis=0)
    image = np.asarray(read_image(encoded(Image.fromarray(ramp), format)))
    assert len(np.unique(image[..., 0])) > 200
    assert (image[0, 0, 0], image[0, -1, 0]) == (0, 255)
    assert (np.diff(image[0, :, 0].astype(int)) >= 0).all()


def test_white_of_12_bits_is_white() -> None:
    ramp = np.linspace(0, 4095, 512).astype(np.uint16)[None].repeat(4, axis=0)
    found = np.asarray(read_image(tiff_of_12_bits(ramp))).astype(float)
    assert np.abs(found - ramp[..., None] * (255 / 4095)).max() <= 0.5


def test_a_16_bit_tiff_with_white_at_zero_is_no_negative() -> None:
    ramp = np.linspace(0, 65535, 512).astype(np.uint16)[None].repeat(4, axis=0)
    white_at_zero = TiffImagePlugin.ImageFileDirectory_v2()
    white_at_zero[0x0106] = 0
    for compression in ("raw", "tiff_lzw"):
        data = encoded(Image.fromarray(ramp), "TIFF", tiffinfo=white_at_zero, compression=compression)
        found = np.asarray(read_image(data))[0, :, 0].astype(float)
        assert np.abs(found - (255 - ramp[0] / 257)).max() <= 0.5


def test_a_bmp_whose_alpha_was_never_written_is_no_blank() -> None:
    pixels = np.dstack([np.asarray(noise()), np.zeros((30, 40), np.uint8)])
    assert np.array_equal(np.asarray(read_image(bmp_with_alpha(pixels))), pixels[..., :3])
    pixels[0, 0, 3] = 255
    found = np.asarray(read_image(bmp_with_alpha(pixels)))
    assert np.array_equal(found[0, 0], pixels[0, 0, :3])
    assert (found[1:] == 255).all()


def test_a_dark_16_bit_picture_stays_dark() -> None:
    dark = np.full((4, 4), 200, np.uint16)
    assert np.asarray(read_image(encoded(Image.fromarray(dark), "PNG"))).max() <= 1


@pytest.mark.parametrize("scale", [1.0, 255.0, 65535.0, 1e6])
def test_float_tiff_is_rescaled(scale: float) -> None:
    ramp = (np.linspace(0, 1, 512)[None].repeat(4, axis=0) * scale).astype(np.float32)
    image = np.asarray(read_image(encoded(Image.fromarray(ramp), "TIFF")))
    assert len(np.unique(image)) > 200


def test_float_tiff_with_nan_is_refused() -> None:
    bad = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(ImageError, match="NaN"):
        read_image(encoded(Image.fromarray(bad), "TIFF"))


def test_transparency_is_composited_over_white() -> None:
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    grey = Image.new("LA", (4, 4), (0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    for source, expected in ((hidden, 255), (grey, 255), (half, 127)):
        pixels = np.asarray(read_image(encoded(source, "PNG"))).astype(int)
        assert np.abs(pixels - expected).max() <= 1


def test_palette_transparency_is_composited_over_white() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 1)
    for format in ("PNG", "GIF"):
        pixels = np.asarray(read_image(encoded(palette, format, transparency=0)))
        assert tuple(pixels[0, 0]) == BLUE
        assert tuple(pixels[3, 3]) == (255, 255, 255)


def test_rgb_with_a_transparent_colour_is_composited() -> None:
    pixels = np.asarray(read_image(encoded(halves(), "PNG", transparency=RED)))
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert tuple(pixels[0, 15]) == BLUE


@pytest.mark.parametrize("format", ["GIF", "WEBP", "AVIF", "PNG", "TIFF"])
def test_animations_give_their_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, (0, 255, 0))]
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(format, {})
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert np.abs(np.asarray(read_image(data))[4, 4].astype(int) - RED).max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"quality": 95} if format == "JPEG" else {}
    data = encoded(halves(), format, exif=exif, **({"lossless": True} if format == "WEBP" else options))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image = read_image(data)
    assert image.size == ((8, 16) if orientation >= 5 else (16, 8))
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert np.array_equal(np.asarray(read_image(image)), np.asarray(image)), "reading twice turned it twice"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_lose_the_picture() -> None:
    data = encoded(halves(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk")
    assert read_image(data).size == (16, 8)


def test_pixel_bombs_are_refused_by_the_header() -> None:
    for width, height in ((20_000, 20_000), (2_000_000_000, 1), (12_000, 10_001)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ImageError, match="too large"):
                read_image(png_header(width, height))


def test_pillow_warns_about_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    animated = encoded(Image.new("L", (16, 8)), "GIF", save_all=True, append_images=[Image.new("L", (16, 8), 9)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (*(encoded(halves(), name) for name in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF")), animated):
            assert read_image(data).size == (16, 8)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_own_cap_counts_for_every_source() -> None:
    array = np.zeros((20, 20), np.uint8)
    for source in (array, Image.fromarray(array), encoded(Image.fromarray(array), "PNG")):
        assert read_image(source, max_pixels=400).size == (20, 20)
        with pytest.raises(ImageError, match="too large"):
            read_image(source, max_pixels=399)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\n <html><body>403", "web page"),
        (b'<?xml version="1.0"?><svg xmlns="x"/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported format HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "unsupported format HEIC"),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1miaf", "AVIF"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported format EPS"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"GIF89a", "GIF"),
        (b"P", "not an image"),
        (b"B", "not an image"),
        (b"just text", "not an image"),
        (b"BM" + b"\0" * 60, "BMP"),
        (png_header(0, 5), "pixels|PNG"),
        (b"P6 0 4 255\n", "pixels|PPM"),
    ],
    ids=lambda value: ascii(value[:14]) if isinstance(value, bytes) else None,
)
def test_what_is_no_picture_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=message) as caught:
        read_image(path)
    assert caught.value.source == str(path)
    assert str(path) in str(caught.value)


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source, message in (
        (tmp_path / "none.png", "no such file"),
        (tmp_path, "folder"),
        (tmp_path / "pipe", "regular"),
        ("a\0b", "cannot be opened"),
        ("x" * 5000, "cannot be opened"),
        ("", "."),
    ):
        with pytest.raises(ImageError, match=message):
            read_image(source)


@pytest.mark.parametrize(
    "address",
    [
        "http://x/a.png",
        "HTTPS://x/a.png",
        "file:///etc/hostname",
        "s3://b/a",
        "data:image/png;base64,AA",
        "pipe:ls",
    ],
)
def test_addresses_are_never_opened(address: str) -> None:
    with pytest.raises(ImageError, match="address"):
        read_image(address)


def test_arrays() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(grey[..., None], 3, axis=2)
    wide = grey.astype(np.uint16) * 257
    for array in (
        grey,
        grey[..., None],
        expected,
        wide,
        grey / 255,
        (grey / 255).astype(np.float32),
        expected / 255,
    ):
        assert np.array_equal(np.asarray(read_image(array)), expected)
    clear = np.zeros((4, 4, 4), np.uint8)
    assert np.asarray(read_image(clear)).min() == 255
    assert np.array_equal(np.asarray(read_image(expected[:, ::2])), expected[:, ::2]), "strided arrays"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), "shape"),
        (np.zeros(8, np.uint8), "shape"),
        (np.zeros((0, 8), np.uint8), "no pixels"),
        (np.full((8, 8), 255.0), "0..1"),
        (np.full((8, 8), np.nan), "0..1"),
        (np.zeros((8, 8), np.int64), "type"),
    ],
)
def test_bad_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_image(array)


def test_other_types_are_refused() -> None:
    with pytest.raises(ImageError, match="not a path"):
        read_image(3)  # type: ignore[arg-type]


def test_the_callers_image_is_left_alone() -> None:
    image = halves()
    result = read_image(image)
    result.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) == RED


def test_zero_pixel_image_is_refused() -> None:
    with pytest.raises(ImageError, match="no pixels"):
        read_image(Image.new("RGB", (0, 5)))


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.png", "is bad")))
    assert (error.source, error.reason, str(error)) == ("a.png", "is bad", "a.png: is bad")
    assert isinstance(error, DataError)


def test_read_images_skips_and_collects(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encoded(halves(), "PNG"))
    (tmp_path / "bad.png").write_bytes(b"<html>")
    sources = [tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "none.png", halves()]
    skipped = SkippedImages()
    assert [index for index, _ in read_images(sources, on_error="skip", skipped=skipped)] == [0, 3]
    assert skipped.indices == [1, 2]
    assert [(position, Path(source).name) for position, source, _ in skipped] == [
        (1, "bad.png"),
        (2, "none.png"),
    ]
    assert "2 images skipped" in skipped.summary(1)
    assert "and 1 more" in skipped.summary(1)
    with pytest.raises(ImageError, match=r"bad\.png"):
        list(read_images(sources))
    with pytest.raises(ValueError, match="on_error"):
        list(read_images(sources, on_error="ignore"))  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=20))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with contextlib.suppress(ImageError):
        read_image(data, max_pixels=1000)


GOOD = [encoded(noise((24, 18)), name) for name in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=12),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_an_image_error(data: bytes, changes: list[tuple[int, int]]) -> None:
    broken = bytearray(data)
    for position, value in changes:
        broken[position % len(broken)] = value
    with contextlib.suppress(ImageError):  # any other error fails the test
        assert read_image(bytes(broken), max_pixels=1_000_000).mode == "RGB"


def reason(data: bytes, read: Callable[..., object]) -> str:
    try:
        read(data, max_pixels=1_000_000)
    except ImageError as error:
        return error.reason
    return ""


JPEGS = [
    encoded(noise(size, mode), "JPEG", **options)
    for size in ((24, 18), (131, 67))
    for mode in ("RGB", "L", "CMYK")
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3})
]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([*JPEGS, *GOOD]),
    st.lists(st.tuples(st.integers(0, 20_000), st.binary(min_size=1, max_size=3)), max_size=4),
    st.one_of(st.just(0), st.integers(0, 40), st.integers(0, 20_000)),
)
@pytest.mark.filterwarnings("ignore")
def test_a_check_refuses_what_reading_refuses(data: bytes, changes: list[tuple[int, bytes]], cut: int) -> None:
    broken = bytearray(data)
    for position, values in changes:
        at = position % len(broken)
        broken[at : at + len(values)] = values
    del broken[len(broken) - cut % len(broken) :]
    assert reason(bytes(broken), check_image) == reason(bytes(broken), read_image)


def test_a_jpeg_is_checked_at_an_eighth_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode = [], images._decode

    def watched(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
        decoded.append(decode(image, name, max_pixels).size)
        return decode(image, name, max_pixels)

    monkeypatch.setattr(images, "_decode", watched)
    photo = noise((640, 483))
    assert check_image(encoded(photo, "JPEG", progressive=True)) == (640, 483)
    assert check_image(encoded(photo, "PNG")) == (640, 483)
    assert decoded == [(80, 61), (640, 483)]
    with pytest.raises(ImageError, match="640x483 pixels"):
        check_image(encoded(photo, "JPEG"), max_pixels=300_000)
