"""Safe image decoding: whatever a user's folder holds becomes an RGB picture or a clear `ImageError`."""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import struct
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from trimtab.data.bombs import count_scans, tile_of_tiff
from trimtab.data.rgb import to_rgb, upright
from trimtab.errors import DataError

DEFAULT_MAX_PIXELS = 120_000_000
_MAX_SCANS = 100  # of a JPEG; encoders write ten or so

T = TypeVar("T")
ImageSource: TypeAlias = "str | Path | bytes | Image.Image | np.ndarray | StoredPicture"

# Importing the plugin registers its format with Pillow; no other plugin is ever asked to parse a file.
FORMATS = {
    "JPEG": JpegImagePlugin,
    "PNG": PngImagePlugin,
    "WEBP": WebPImagePlugin,
    "GIF": GifImagePlugin,
    "BMP": BmpImagePlugin,
    "TIFF": TiffImagePlugin,
    "PPM": PpmImagePlugin,
    "AVIF": AvifImagePlugin,
}

_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_ADDRESS = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.\-]+://|(?:data|file|pipe):)")


class ImageError(DataError):
    """One picture that cannot be used.

    Attributes:
        source: the path, or a short description of bytes, arrays and opened images.
        reason: what is wrong with it, without the source.
    """

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source = source
        self.reason = reason

    @property
    def unread(self) -> bool:
        """Whether the system did not let it be read, which may be otherwise a moment later."""
        return isinstance(self.__cause__, OSError) and self.__cause__.errno is not None  # decoders' own have none

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class StoredPicture(ABC):
    """A picture that lies somewhere and is read when it is needed, such as a member of a shard."""

    __slots__ = ()

    @abstractmethod
    def read(self, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
        """Decode to RGB, as `read_image` does.

        Raises:
            ImageError: it is missing, or no whole picture of a known format.
        """


class SkippedImage(NamedTuple):
    """Where in the input a picture stood (from 0), what it was, and why it was left out."""

    position: int
    source: str
    reason: str


class SkippedImages(list[SkippedImage]):
    """The pictures that `read_images` left out, in input order.

    Attributes:
        unread: positions of those that the system did not let be read, see `ImageError`.
    """

    def __init__(self, items: Iterable[SkippedImage] = ()) -> None:
        super().__init__(items)
        self.unread: set[int] = set()

    def add(self, position: int, error: ImageError) -> None:
        """Append what could not be used for an error."""
        self.append(SkippedImage(position, error.source, error.reason))
        if error.unread:
            self.unread.add(position)

    @property
    def indices(self) -> list[int]:
        """Positions in the input."""
        return [item.position for item in self]

    def summary(self, limit: int = 5) -> str:
        """One line for a log or a report; at most `limit` pictures are named."""
        named = "; ".join(f"{item.source}: {item.reason}" for item in self[:limit])
        more = f"; and {len(self) - limit} more" if len(self) > limit else ""
        return f"{len(self)} images skipped" + (f" ({named}{more})" if self else "")


def is_address(value: str) -> bool:
    """Whether a string is a web address or another URL rather than a path."""
    return bool(_ADDRESS.match(value.strip()))


def read_image(source: ImageSource, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode one picture to RGB, upright, opaque.

    16-bit and float pictures are rescaled (not clipped), transparency is composited over white, animations
    give their first frame, EXIF rotation is applied. Addresses are never opened.

    Args:
        source: a path; a `StoredPicture`; the bytes of an image file; an opened image (left as it is); or an array
            (H, W), (H, W, 3) or (H, W, 4) of uint8, uint16 (0..65535) or floats (0..1).
        max_pixels: largest width x height that is decoded; checked on the header, before memory is taken.

    Raises:
        ImageError: with `.source` and `.reason`, for anything that is not a whole picture of a known format.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or f"<{source.mode} image {source.width}x{source.height}>"
        return _decode(source, str(name), max_pixels)
    if isinstance(source, StoredPicture):
        return source.read(max_pixels=max_pixels)
    return _read_encoded(source, max_pixels, _decode)


def check_image(source: str | Path | bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Decode one picture as `read_image` does, a JPEG at an eighth of its size, which takes a fraction of the time.

    All of a JPEG is gone through nonetheless, so what is damaged fails here too. A few that are whole fail here alone,
    such as lossless ones, which no decoder scales.

    Returns:
        Width and height as they are stored.

    Raises:
        ImageError: as `read_image`.
    """
    return _read_encoded(source, max_pixels, _check)


def _read_encoded(
    source: str | os.PathLike[str] | bytes, max_pixels: int, use: Callable[[Image.Image, str, int], T]
) -> T:
    if isinstance(source, (bytes, bytearray)):
        return _read_stream(io.BytesIO(source), f"<{len(source)} bytes>", max_pixels, use)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"<{type(source).__name__}>", "not a path, bytes, PIL image or NumPy array")
    name = source if isinstance(source, str) else str(Path(source))
    if isinstance(source, str) and is_address(source):
        raise ImageError(name, "is an address, and addresses are never opened: download the picture first")
    try:
        status = Path(source).stat()  # before open(), which would wait forever on a named pipe
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(name, "is a folder, not an image file")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(name, "is not a regular file")
        with Path(source).open("rb") as stream:
            return _read_stream(stream, name, max_pixels, use)
    except FileNotFoundError:
        raise ImageError(name, "no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(name, f"cannot be opened ({getattr(error, 'strerror', None) or error})") from error


def read_images(
    sources: Iterable[ImageSource],
    *,
    on_error: Literal["raise", "skip"] = "raise",
    skipped: SkippedImages | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Iterator[tuple[int, Image.Image]]:
    """Decode pictures one after the other.

    Args:
        sources: anything that `read_image` takes.
        on_error: "raise" stops at the first bad picture; "skip" leaves it out.
        skipped: collects what was left out.
        max_pixels: as for `read_image`.

    Yields:
        The position in `sources` and the RGB picture.

    Raises:
        ImageError: for the first bad picture, when `on_error` is "raise".
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; it must be 'raise' or 'skip'")
    for index, source in enumerate(sources):
        try:
            image = read_image(source, max_pixels=max_pixels)
        except ImageError as error:
            if on_error == "raise":
                raise
            if skipped is not None:
                skipped.add(index, error)
            continue
        yield index, image


def _read_stream(stream: BinaryIO, name: str, max_pixels: int, use: Callable[[Image.Image, str, int], T]) -> T:
    prefix = stream.read(512)
    if not prefix:
        raise ImageError(name, "the file is empty")
    for format_name in FORMATS:
        factory, accept = Image.OPEN[format_name]
        # Shorter prefixes make some of them fail; one that was built without its codec answers with a text.
        if (accept is None or accept(prefix.ljust(16, b"\0")) is True) and _is_rightly(format_name, prefix):
            break
    else:
        raise ImageError(name, _what_it_is_instead(prefix))
    stream.seek(0)
    # The plugin is called directly, since Image.open judges the size by Pillow's own limits, with a global
    # warning. The GIF and TIFF plugins judge by themselves, so those two are silenced.
    with _no_bomb_warnings() if format_name in ("GIF", "TIFF") else contextlib.nullcontext():
        try:
            image = factory(stream, "")
        except MemoryError:
            raise
        except Exception as error:  # decoders fail in every way on arbitrary bytes
            raise ImageError(name, _explain(error, format_name, max_pixels)) from error
        return use(image, name, max_pixels)


def _is_rightly(format_name: str, prefix: bytes) -> bool:
    """Whether a plugin may have what it accepts: AVIF's takes all containers of its kind, of which phones' are HEIC."""
    return format_name != "AVIF" or bool(_AVIF_BRANDS & _brands(prefix))


def _brands(prefix: bytes) -> set[bytes]:
    """What a file of the ISO base media format says it is, the first word and those it is compatible with."""
    if prefix[4:8] != b"ftyp":
        return set()
    end = min(len(prefix), int.from_bytes(prefix[:4], "big"))
    return {prefix[8:12], *(prefix[at : at + 4] for at in range(16, end - 3, 4))}


@contextlib.contextmanager
def _no_bomb_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _check(image: Image.Image, name: str, max_pixels: int) -> tuple[int, int]:
    width, height = image.size
    if width * height <= max_pixels:  # else it is to be refused by its full size
        image.draft(None, (1, 1))  # of the formats here JPEG alone knows it
    _decode(image, name, max_pixels)
    return width, height


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height == 0:
        raise ImageError(name, f"has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError(name, _too_large(f"{width}x{height} pixels", max_pixels))
    try:
        _check_cost(image, name, max_pixels)
        rgb = upright(image)
    except (MemoryError, ImageError):
        raise
    except Exception as error:
        raise ImageError(name, _explain(error, image.format or image.mode, max_pixels)) from error
    rgb.info = {}  # the EXIF block would turn the picture again if it is read a second time
    return rgb


def _check_cost(image: Image.Image, name: str, max_pixels: int) -> None:
    """Refuse a picture of few bytes and pixels that would take minutes or gigabytes all the same.

    One that is decoded already has no stream or no parts any more.
    """
    stream, parts = getattr(image, "fp", None), getattr(image, "tile", None)
    if stream is None or not parts:
        return
    position = stream.tell()
    if isinstance(image, JpegImagePlugin.JpegImageFile):  # those of several pictures too
        if count_scans(stream, parts[0].offset, _MAX_SCANS) > _MAX_SCANS:
            raise ImageError(name, f"takes too long to decode safely: more than {_MAX_SCANS} scans: save it again")
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = tile_of_tiff(stream, image.tag_v2.offset)
        if width * height > max_pixels:
            raise ImageError(name, _too_large(f"tiles of {width}x{height} pixels", max_pixels, "save it again"))
    stream.seek(position)


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    name = f"<array {array.shape} {array.dtype}>"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(name, "has the wrong shape: give (H, W), (H, W, 3) or (H, W, 4)")
    if array.size == 0:
        raise ImageError(name, "has no pixels")
    if array.shape[0] * array.shape[1] > max_pixels:
        raise ImageError(name, _too_large(f"{array.shape[1]}x{array.shape[0]} pixels", max_pixels))
    if array.dtype == np.uint16:
        array = np.rint(array.astype(np.float32) / 257).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # also catches NaN
            raise ImageError(name, "holds floats outside 0..1: divide by 255 first, or give uint8")
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(name, "has the wrong type: give uint8, uint16 or floats in 0..1")
    return to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def _too_large(size: str, max_pixels: int, remedy: str = "scale it down") -> str:
    return f"is too large to decode safely: {size}, the limit is {max_pixels / 1e6:g} million: {remedy}"


def _explain(error: Exception, format_name: str, max_pixels: int) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return _too_large(str(error).split(" exceeds")[0], max_pixels)
    if isinstance(error, (struct.error, IndexError, EOFError)) or "truncated" in str(error).lower():
        return f"is cut off or damaged ({format_name}: {error or type(error).__name__})"
    return f"cannot be decoded ({format_name}: {error or type(error).__name__})"


def _what_it_is_instead(prefix: bytes) -> str:
    start = prefix.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<svg") or b"<svg" in start:
        return "unsupported format SVG: convert it to PNG"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")):
        return "is a web page, not an image (a download that failed?): fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not an image: run 'git lfs pull'"
    if brands := _brands(prefix):
        if brands & _AVIF_BRANDS:  # this Pillow was built without it
            return "unsupported format AVIF: convert it to JPEG or PNG, or install Pillow from PyPI"
        if brands & _HEIC_BRANDS:
            return "unsupported format HEIC: convert it to JPEG or PNG"
    for magic, kind in ((b"%pdf", "PDF"), (b"%!ps", "EPS"), (b"8bps", "PSD"), (b"\x00\x00\x01\x00", "ICO")):
        if start.startswith(magic):
            return f"unsupported format {kind}: convert it to JPEG or PNG"
    return f"not an image of a supported format ({', '.join(FORMATS)})"
